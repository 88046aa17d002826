"""Hashes of the files of a pipeline, which distinguish other weights of the same name without
loading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from visattn._atomic import read_limited
from visattn.generation.loading import Loading

__all__ = ["origin_of"]

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".py")  # files that a pipeline loads
IGNORED = ("visattn_", "checksums.json")  # prefixes of names of files that it does not load
PIECES, PIECE = 16, 65536  # number of pieces of a file that are read, and their bytes


def origin_of(loading: Loading) -> dict[str, Any]:
    """Return hashes of the model and the adapters, and the attention backend of the loading or else
    of the environment, as JSON values."""
    backend = loading.attention_backend or os.environ.get("DIFFUSERS_ATTN_BACKEND")
    return {
        "model": _content(loading.model, loading.revision),
        "loras": [_content(lora.lora_id, None) for lora in loading.loras],
        "attention_backend": backend,
    }


def _content(name: str, revision: str | None) -> str | None:
    """Return a hash of a file or folder, or the cached commit of a hub id, or None if there is
    none."""
    path = Path(name)
    if path.is_file():
        return _hash([path], path.parent)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        return _hash([file for file in files if not file.name.startswith(IGNORED)], path)
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        return read_limited(folder / "refs" / wanted, 1024).decode().strip()
    except (OSError, ValueError):
        return wanted if (folder / "snapshots" / wanted).is_dir() else None


def _hash(files: list[Path], root: Path) -> str:
    """Return a hash of the names and sizes of files, and of pieces spread over each file."""
    sha256 = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256.update(f"{path.relative_to(root).as_posix()} {size} ".encode())
            for number in range(PIECES):
                file.seek(max(0, size - PIECE) * number // (PIECES - 1))
                sha256.update(file.read(PIECE))
                if size <= PIECE:
                    break
    return sha256.hexdigest()
