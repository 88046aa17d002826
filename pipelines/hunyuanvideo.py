"""HunyuanVideo: joint attention with the text last, in blocks of two streams and then of one.
The padding of the text is masked. The guidance scale is an input of the model; classifier-free
guidance makes a separate call for each pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visattn.geometry.layout import Tokens
from visattn.pipelines.family import Family

__all__ = ["HUNYUANVIDEO"]


def tokens(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a call. ``hidden_states`` is ``[B, C, T, H, W]``. The text has as many
    tokens as ``encoder_hidden_states``; ``encoder_attention_mask`` says which are valid."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = config.patch_size
    text = arguments["encoder_hidden_states"].shape[1]
    grid = ("grid", frames // config.patch_size_t, height // patch, width // patch)
    return (grid, ("text", text))


HUNYUANVIDEO = Family(
    name="HunyuanVideo",
    models=("HunyuanVideoTransformer3DModel",),
    layers=r"(single_)?transformer_blocks\.\d+\.attn",
    tokens=tokens,
    calls=("cond", "uncond"),
    blocks=(r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
    image_output=0,
    fused_out_projection="proj_out",
    masks_text_padding=True,
    frame_rate=lambda pipe: 24.0,
)
