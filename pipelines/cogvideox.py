"""CogVideoX and CogVideoX 1.5: joint attention with the text first; guidance doubles the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visattn.geometry.layout import Tokens
from visattn.pipelines.family import Family

__all__ = ["COGVIDEOX"]


def tokens(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a call. ``hidden_states`` is ``[B, T, C, H, W]``; patches of 1.5 also
    span two frames. The padding of the text is not masked, so all text tokens are valid."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    text = arguments["encoder_hidden_states"].shape[1]
    grid = ("grid", (frames + patch_t - 1) // patch_t, height // patch, width // patch)
    return (("text", text), grid)


COGVIDEOX = Family(
    name="CogVideoX",
    models=("CogVideoXTransformer3DModel",),
    layers=r"transformer_blocks\.\d+\.attn1",
    tokens=tokens,
    cfg_batch_order=("uncond", "cond"),
    blocks=(r"transformer_blocks\.\d+",),
    has_rope=lambda config: config.use_rotary_positional_embeddings,  # not those of 2B
    image_output=0,
    frame_rate=lambda pipe: 16.0 if pipe.transformer.config.patch_size_t else 8.0,  # 1.5 has 16
)
