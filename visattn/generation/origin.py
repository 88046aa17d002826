"""What a pipeline is loaded from: by content and not by name, so that other weights under the same
name are told apart without loading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from visattn._atomic import read_limited
from visattn.generation.loading import Loading

__all__ = ["origin_of"]

KINDS = (".safetensors", ".json", ".txt", ".model", ".py")  # that a pipeline is loaded from
OURS = ("visattn_", "checksums.json")  # beginnings of names that it is not
PIECES, PIECE = 16, 65536  # of a file that are read, and their bytes


def origin_of(loading: Loading) -> dict[str, Any]:
    """Hashes of the model and of the adapters, and the attention backend that the environment names
    where the loading names none; as JSON values."""
    own = loading.attention_backend or os.environ.get("DIFFUSERS_ATTN_BACKEND")
    return {
        "model": _content(loading.model, loading.revision),
        "loras": [_content(lora.lora_id, None) for lora in loading.loras],
        "attention_backend": own,
    }


def _content(name: str, revision: str | None) -> str | None:
    """A hash of a file or folder, or the commit of a hub id as it lies here; None where it does
    not."""
    path = Path(name)
    if path.is_file():
        return _hash([path], path.parent)
    if path.is_dir():
        files = [own for own in path.rglob("*") if own.suffix in KINDS and own.is_file()]
        return _hash([own for own in files if not own.name.startswith(OURS)], path)
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        return read_limited(folder / "refs" / wanted, 1024).decode().strip()
    except (OSError, ValueError):
        return wanted if (folder / "snapshots" / wanted).is_dir() else None


def _hash(files: list[Path], root: Path) -> str:
    """Of names, sizes and some pieces of files, spread over each."""
    found = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(f"{path.relative_to(root).as_posix()} {size} ".encode())
            for number in range(PIECES):
                file.seek(max(0, size - PIECE) * number // (PIECES - 1))
                found.update(file.read(PIECE))
                if size <= PIECE:
                    break
    return found.hexdigest()
