"""Checksums of the files of a model, which are verified when it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from visattn._atomic import read_limited, sha256_of, write_whole

__all__ = ["check_checksums", "write_checksums"]

CHECKSUMS = "checksums.json"
MOST_BYTES = 16 << 20


def write_checksums(folder: str | os.PathLike[str]) -> None:
    """Write ``checksums.json`` with the SHA-256 of every file of a folder except README.md."""
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sums = {
        path.relative_to(root).as_posix(): sha256_of(path)
        for path in files
        if path.name not in (CHECKSUMS, "README.md")
    }
    write_whole(root / CHECKSUMS, (json.dumps(sums, indent=2, sort_keys=True) + "\n").encode())


def check_checksums(folder: str | os.PathLike[str]) -> None:
    """Verify the files of a folder by its ``checksums.json`` if it has one.

    Raises:
        ValueError: a file is missing or has changed.
    """
    root = Path(folder)
    if not (root / CHECKSUMS).exists():
        return
    remedy = "download or copy the folder again"
    try:
        sums = json.loads(read_limited(root / CHECKSUMS, MOST_BYTES))
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict):
        raise ValueError(f"model {str(folder)!r} has a broken {CHECKSUMS}; {remedy}")
    for name, value in sums.items():
        path = root / name
        if not path.is_file():
            raise ValueError(f"model {str(folder)!r} lacks the file {name}; {remedy}")
        if sha256_of(path) != value:
            raise ValueError(f"model {str(folder)!r} is damaged or changed: {name}; {remedy}")
