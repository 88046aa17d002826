"""Temporary names for unfinished files, and the removal of those that killed processes left.

A temporary name contains the number of the process and an identifier of the machine that write the
file. A process removes its temporary files when it ends. If it is killed, the next process that
writes to the same folder removes them. Files of a running process, or of another machine that
shares the folder, are never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["clear_leftovers", "old_of", "part_of", "remove", "temporary_folder"]

TAG = r"(?P<pid>\d+)-(?P<place>[0-9a-f]{8})"
PART = re.compile(rf"\..+\.{TAG}\.part(\.[^.]*)?", re.DOTALL)
OLD = re.compile(rf"\.(?P<name>.+)\.{TAG}\.old", re.DOTALL)
TEMPORARY = re.compile(rf"visattn-{TAG}-\w+")


def part_of(target: Path) -> Path:
    """Return the name, in the same folder and with the same suffix, under which a file or folder is
    written until it is complete."""
    return target.with_name(f".{target.stem}.{_tag()}.part{target.suffix}")


def old_of(target: Path) -> Path:
    """Return the name, in the same parent folder, that an existing folder has while a new one takes
    its place."""
    return target.with_name(f".{target.name}.{_tag()}.old")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that exists during a ``with`` block only."""
    clear_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"visattn-{_tag()}-") as name:
        yield Path(name)


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files that ended processes of this machine left in a folder. A folder of
    frames whose replacement was interrupted gets its name back. Each process checks a folder
    once."""
    if os.name == "posix":  # other systems cannot check whether a process is running
        _clear(Path(os.path.abspath(folder)))


@lru_cache(maxsize=256)
def _clear(folder: Path) -> None:
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            old = OLD.fullmatch(entry.name)
            match = old or PART.fullmatch(entry.name) or TEMPORARY.fullmatch(entry.name)
            if match is None or match["place"] != _place() or _is_running(int(match["pid"])):
                continue
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            if old is not None and not os.path.lexists(folder / old["name"]):
                os.rename(entry.path, folder / old["name"])
            else:
                remove(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _tag() -> str:
    return f"{os.getpid()}-{_place()}"


@lru_cache(maxsize=1)
def _place() -> str:
    """Return an identifier of the machine or container, within which process numbers are unique."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{socket.gethostname()} {space}'.encode()):08x}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
