"""How kernels are launched for a tensor: tiles, warps and stages."""

from __future__ import annotations

import os

import torch

__all__ = ["interpreting", "launch_of"]

INTERPRETED = (32, 32, 4, 1)  # where Triton's interpreter runs the kernels


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET``), as tests do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def launch_of(q: torch.Tensor) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages of the loops, from the launch table."""
    if q.device.type == "cpu":
        return INTERPRETED
    from visattn.kernels.targets import launch_settings, target_of

    launch = launch_settings(target_of(q.device), q.dtype, q.shape[3])
    return launch.block_q, launch.block_k, launch.warps, launch.stages
