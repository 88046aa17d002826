"""The calibration of a device, measured once and then read from a file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from visattn._atomic import read_limited, write_whole
from visattn._version import __version__
from visattn.cost.calibration import TORCH, Calibration, DenseAttention, calibrate, device_name

__all__ = ["calibration_of", "measured_again"]

logger = logging.getLogger(__name__)

FILE_LIMIT = 65536  # bytes
STEADY = 0.5  # the greatest spread of a calibration that later processes read
RATES = ("launch", "row", "full", "partial", "broad", "moved", "dense")
MOST_SECONDS = 60.0  # of any one thing that is measured
_FOUND: dict[str, Calibration] = {}
_AGAIN: set[str] = set()  # what this process has measured a second time


def calibration_of(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    dense_attention: DenseAttention = TORCH,
) -> Calibration:
    """The calibration of a device, measured once (for a few seconds) and then kept.

    It is measured once for each device, thread count, dtype, head size, dense attention and version
    of visattn, torch and triton, and kept in ``$VISATTN_CACHE``, by default ``~/.cache/visattn``. A
    file that cannot be read, or whose values cannot be right, is measured again. A calibration of a
    busy machine, with a large spread, is used in this process and not written. A file that cannot
    be written is said once and does no harm.

    Args:
        device: a CPU, or a GPU that the kernels run on.
        dtype: of queries, keys and values.
        head_size: D.
        dense_attention: that sparse attention is compared with.
    """
    device = torch.device(device)
    key = _key(device, dtype, head_size, dense_attention.name)
    if key not in _FOUND:
        found = _read(_path(key), key)
        if found is None:
            logger.info("visattn: measuring %s once, for a few seconds", device_name(device))
            found = _measured(key, device, dtype, head_size, dense_attention)
        _FOUND[key] = found
    return _FOUND[key]


def measured_again(
    device: torch.device | str,
    dtype: torch.dtype,
    head_size: int,
    dense_attention: DenseAttention = TORCH,
) -> bool:
    """Measure a device now, in place of the calibration that is kept, once in a process.

    Returns:
        False where this process has done so before, and nothing is measured.
    """
    device = torch.device(device)
    key = _key(device, dtype, head_size, dense_attention.name)
    if key in _AGAIN:
        return False
    _AGAIN.add(key)
    _FOUND[key] = _measured(key, device, dtype, head_size, dense_attention)
    return True


def _measured(
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    dense_attention: DenseAttention,
) -> Calibration:
    found = calibrate(device, dtype, head_size, dense_attention=dense_attention)
    if found.spread <= STEADY:
        _write(_path(key), key, found)
    else:
        logger.info(
            "visattn: %s is busy (times spread by %.0f%%): what was measured is not kept",
            device_name(device),
            100 * found.spread,
        )
    return found


def _key(device: torch.device, dtype: torch.dtype, head_size: int, dense_by: str) -> str:
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    versions = (__version__, torch.__version__, triton_version, platform.node())
    return "|".join([device_name(device), str(dtype), str(head_size), dense_by, *versions])


def _path(key: str) -> Path:
    return _folder() / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _folder() -> Path:
    own = os.environ.get("VISATTN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visattn"


def _read(path: Path, key: str) -> Calibration | None:
    """What a file holds, or None where it is missing, of another key, or cannot be right."""
    try:
        value: Any = json.loads(read_limited(path, FILE_LIMIT))
        if value.pop("key") != key:
            return None
        value["block"] = tuple(value["block"])
        found = Calibration(**value)
        good = set(value) == {own.name for own in fields(Calibration)} and _possible(found)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return found if good else None


def _possible(found: Calibration) -> bool:
    """Whether the values of a calibration can be those of a device."""
    texts = (found.device, found.backend, found.dtype, found.dense_by)
    counts = (found.head_size, found.slots, *found.block)
    rates = [getattr(found, name) for name in RATES]
    return (
        all(isinstance(own, str) for own in texts)
        and found.backend in ("triton", "blockwise")
        and len(found.block) == 2
        and all(type(own) is int and 0 < own < 2**20 for own in counts)
        and all(_number(own) and 0 <= own < MOST_SECONDS for own in rates)
        and found.full > 0
        and found.dense > 0
        and _number(found.spread)
        and 0 <= found.spread <= STEADY
    )


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _write(path: Path, key: str, found: Calibration) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key} | asdict(found), indent=1).encode())
    except OSError as error:
        logger.warning("visattn: the calibration is not kept: %s", error)
