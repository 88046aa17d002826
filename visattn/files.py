"""Files that are written whole or not at all, and files that are read with a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["read_limited", "write_whole"]


def read_limited(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes. A pipe or a device is not waited for.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no regular file, or is larger than ``limit``.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{os.fspath(path)!r} is no regular file; put a file in its place")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{os.fspath(path)!r} has more than the {limit} bytes allowed")
    return data


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name beside its own, then give it its own.

    Raises:
        OSError: the folder is missing or cannot be written; it names ``path``.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    finally:
        part.unlink(missing_ok=True)
