"""Stored results, one file each, named by a hash of the question that they answer.

An interrupted search resumes from them, and several processes can share one folder. A file is
written atomically and never changed. If the disk is full, results stay in memory, and this is
logged once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visattn._atomic import write_whole

__all__ = ["ResultStore", "StoredResult", "key_of"]

logger = logging.getLogger("visattn")


class StoredResult(NamedTuple):
    """A result.

    Attributes:
        value: JSON values.
        tensors: by name.
    """

    value: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def key_of(kind: str, question: Any) -> str:
    """Return the name of a result.

    Args:
        kind: of the result; the name begins with it.
        question: what the result answers, as JSON values.
    """
    text = json.dumps(question, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class ResultStore:
    """Results by key.

    Args:
        folder: where they are stored; it is created if it is missing. None: in memory only.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.lost: str | None = None  # why results could not be written
        self._memory: dict[str, StoredResult] = {}
        self._damaged: set[str] = set()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> StoredResult | None:
        """Return a result; None: there is none, or its file is damaged."""
        if key in self._memory or self.folder is None:
            return self._memory.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                kept = file.metadata()
                if kept["key"] != key:
                    raise ValueError("it is of another key")
                value = json.loads(kept["value"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(value, dict):
                raise TypeError(f"a result is no {type(value).__name__}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
            if key not in self._damaged:
                logger.warning("visattn: %s is damaged and will be computed again", path)
                self._damaged.add(key)
            return None
        self._memory[key] = StoredResult(value, tensors)
        return self._memory[key]

    def put(
        self, key: str, value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> StoredResult:
        """Store a result, and return it as ``get`` does.

        Args:
            key: of ``key_of``.
            value: JSON values.
            tensors: by name.
        """
        from safetensors.torch import save

        text = json.dumps(value, allow_nan=False)
        on_cpu = {name: x.detach().cpu().contiguous() for name, x in (tensors or {}).items()}
        self._memory[key] = StoredResult(json.loads(text), on_cpu)
        if self.folder is not None:
            try:
                write_whole(self._path(key), save(on_cpu, {"key": key, "value": text}))
            except OSError as error:
                if self.lost is None:
                    logger.warning(
                        "visattn: results stay in memory only, because %s cannot be written: %s",
                        self.folder,
                        error.strerror,
                    )
                self.lost = str(error)
        return self._memory[key]

    def forget(self) -> None:
        """Free the memory of results that can be read again."""
        if self.folder is not None and self.lost is None:
            self._memory.clear()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
