"""Names of what is not whole yet, and the removal of what killed processes left under such names.

A name holds the process and the machine that write it. A process removes what it no longer needs;
what a kill keeps it from removing goes when the next one writes to the same folder. Nothing of a
process that lives, or of another machine that sees the same folder, is touched.
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
    """Beside a file or folder, where it is written until it is whole; with the same suffix."""
    return target.with_name(f".{target.stem}.{_tag()}.part{target.suffix}")


def old_of(target: Path) -> Path:
    """Beside a folder, where the one that it replaces is until the new one has its name."""
    return target.with_name(f".{target.name}.{_tag()}.old")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that are needed in a ``with`` block alone."""
    clear_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"visattn-{_tag()}-") as name:
        yield Path(name)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that have ended left in a folder; a folder of frames
    that was being replaced gets its name back. Each process looks at a folder once."""
    if os.name == "posix":  # elsewhere it cannot be asked whether a process lives
        _clear(Path(os.path.abspath(folder)))


@lru_cache(maxsize=256)
def _clear(folder: Path) -> None:
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            old = OLD.fullmatch(entry.name)
            found = old or PART.fullmatch(entry.name) or TEMPORARY.fullmatch(entry.name)
            if found is None or found["place"] != _place() or _lives(int(found["pid"])):
                continue
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            if old is not None and not os.path.lexists(folder / old["name"]):
                os.rename(entry.path, folder / old["name"])
            else:
                remove(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _tag() -> str:
    return f"{os.getpid()}-{_place()}"


@lru_cache(maxsize=1)
def _place() -> str:
    """Of the machine or container, within which the number of a process means one process."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{socket.gethostname()} {space}'.encode()):08x}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
