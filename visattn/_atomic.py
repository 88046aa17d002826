"""Write files atomically; read files with a size limit, or as text."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from visattn.runtime.temporary_files import clear_leftovers, part_of

__all__ = ["check_writable", "read_limited", "read_text", "sha256_of", "write_whole"]

MOST_TEXT = 1 << 26  # default limit of a text, in bytes
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_limited(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes. Does not wait for a pipe or a device.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no regular file, or is larger than ``limit``.
    """
    with _regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{os.fspath(path)!r} has more than the {limit} bytes allowed")
    return data


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file of any size, which is read in pieces.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no regular file.
    """
    digest = hashlib.sha256()
    with _regular(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _regular(path: str | os.PathLike[str]) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{os.fspath(path)!r} is no regular file; put a file in its place")
    return os.fdopen(handle, "rb")


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises:
        OSError: the folder is missing or cannot be written; it names ``path``.
    """
    target = Path(path)
    part = part_of(target)
    clear_leftovers(target.parent)
    try:
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file or folder can be written, before the work that makes it. Creates no parent
    folders.

    Raises:
        OSError: the folder around it is missing or cannot be written; it names ``path``.
    """
    target = Path(path)
    part = part_of(target)
    clear_leftovers(target.parent)
    try:
        part.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    part.unlink()


def read_text(path: str | os.PathLike[str], what: str, limit: int = MOST_TEXT) -> str:
    """Return the text of a file in UTF-8, or in the encoding of its byte order mark, with lines
    that end in ``\\n``.

    Args:
        path: the file, which may be a pipe.
        what: what error messages call the file, for example ``"plan"``.
        limit: the largest allowed size in bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a text, is too large, or holds the character NUL.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{what} {str(path)!r} has more than the {limit} bytes allowed")
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"{what} {str(path)!r} is no UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"{what} {str(path)!r} holds the character NUL; save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")
