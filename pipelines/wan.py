"""Wan 2.1 and 2.2: self-attention of video tokens; text enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visattn.geometry.layout import Tokens
from visattn.pipelines.family import Family

__all__ = ["WAN"]


def tokens(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a call: patches of ``hidden_states`` ``[B, C, T, H, W]``."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch_t, patch_h, patch_w = config.patch_size
    return (("grid", frames // patch_t, height // patch_h, width // patch_w),)


WAN = Family(
    name="Wan",
    models=("WanTransformer3DModel",),
    layers=r"blocks\.\d+\.attn1",
    tokens=tokens,
    calls=("cond", "uncond"),
    cross=r"blocks\.\d+\.attn2",
    blocks=(r"blocks\.\d+",),
    # Wan 2.2 5B has a timestep for each token, and 24 frames per second
    frame_rate=lambda pipe: 24.0 if pipe.config.get("expand_timesteps") else 16.0,
)
