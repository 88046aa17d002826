"""Calibrations of devices, measured once and then read from files."""

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
STEADY = 0.5  # the largest spread of a calibration that is written for later processes
RATES = ("launch", "row", "full", "partial", "broad", "moved", "dense")
MOST_SECONDS = 60.0  # of any rate
_CALIBRATIONS: dict[str, Calibration] = {}
_REPEATED: set[str] = set()  # keys that this process has measured a second time


def calibration_of(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    dense_attention: DenseAttention = TORCH,
) -> Calibration:
    """Return the calibration of a device, which is measured once for a few seconds and stored.

    A calibration is stored for each device, thread count, dtype, head size, dense attention and
    version of visattn, torch and triton, in ``$VISATTN_CACHE`` or ``~/.cache/visattn``. If a file
    cannot be read or has impossible values, the device is measured again. A calibration of a busy
    machine, with a large spread, is used by this process and not stored. If the file cannot be
    written, a warning is logged.

    Args:
        device: a CPU, or a GPU that the kernels support.
        dtype: of queries, keys and values.
        head_size: D.
        dense_attention: with which sparse attention is compared.

    Example:
        >>> from visattn.cost import calibration_of
        >>> calibration_of("cpu").backend  # doctest: +SKIP
        'blockwise'
    """
    device = torch.device(device)
    key = _key(device, dtype, head_size, dense_attention.name)
    if key not in _CALIBRATIONS:
        calibration = _read(_path(key), key)
        if calibration is None:
            logger.info("visattn: measuring %s once, for a few seconds", device_name(device))
            calibration = _measured(key, device, dtype, head_size, dense_attention)
        _CALIBRATIONS[key] = calibration
    return _CALIBRATIONS[key]


def measured_again(
    device: torch.device | str,
    dtype: torch.dtype,
    head_size: int,
    dense_attention: DenseAttention = TORCH,
) -> bool:
    """Measure a device again and replace its stored calibration, once in a process.

    Args:
        device: a CPU, or a GPU that the kernels support.
        dtype: of queries, keys and values.
        head_size: D.
        dense_attention: with which sparse attention is compared.

    Returns:
        Whether the device was measured; False if this process has done so before.

    Example:
        >>> import torch
        >>> from visattn.cost import measured_again
        >>> measured_again("cpu", torch.float32, 64)  # doctest: +SKIP
        True
    """
    device = torch.device(device)
    key = _key(device, dtype, head_size, dense_attention.name)
    if key in _REPEATED:
        return False
    _REPEATED.add(key)
    _CALIBRATIONS[key] = _measured(key, device, dtype, head_size, dense_attention)
    return True


def _measured(
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    dense_attention: DenseAttention,
) -> Calibration:
    calibration = calibrate(device, dtype, head_size, dense_attention=dense_attention)
    if calibration.spread <= STEADY:
        _write(_path(key), key, calibration)
    else:
        logger.info(
            "visattn: %s is busy (times spread by %.0f%%); its calibration is not stored",
            device_name(device),
            100 * calibration.spread,
        )
    return calibration


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
    folder = os.environ.get("VISATTN_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visattn"


def _read(path: Path, key: str) -> Calibration | None:
    """Return the calibration of a file; None if it is missing, of another key, or impossible."""
    try:
        value: Any = json.loads(read_limited(path, FILE_LIMIT))
        if value.pop("key") != key:
            return None
        value["block"] = tuple(value["block"])
        calibration = Calibration(**value)
        complete = set(value) == {field.name for field in fields(Calibration)}
        good = complete and _possible(calibration)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return calibration if good else None


def _possible(values: Calibration) -> bool:
    """Return whether a device can have these values."""
    texts = (values.device, values.backend, values.dtype, values.dense_by)
    counts = (values.head_size, values.slots, *values.block)
    rates = [getattr(values, name) for name in RATES]
    return (
        all(isinstance(text, str) for text in texts)
        and values.backend in ("triton", "blockwise")
        and len(values.block) == 2
        and all(type(count) is int and 0 < count < 2**20 for count in counts)
        and all(_number(rate) and 0 <= rate < MOST_SECONDS for rate in rates)
        and values.full > 0
        and values.dense > 0
        and _number(values.spread)
        and 0 <= values.spread <= STEADY
    )


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _write(path: Path, key: str, calibration: Calibration) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key} | asdict(calibration), indent=1).encode())
    except OSError as error:
        logger.warning("visattn: the calibration is not stored: %s", error)
