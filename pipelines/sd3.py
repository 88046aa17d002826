"""Stable Diffusion 3 and 3.5: joint attention with the image first; guidance doubles the batch.
Plans and edits leave out the second attention of the image in blocks of 3.5 medium (``attn2``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visattn.geometry.layout import Tokens
from visattn.pipelines.family import Family

__all__ = ["SD3"]


def tokens(config: Any, arguments: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a call. ``hidden_states`` is ``[B, C, H, W]``; a patch is a token. The
    padding of the text is not masked, so all text tokens are valid."""
    height, width = arguments["hidden_states"].shape[-2:]
    text = arguments["encoder_hidden_states"].shape[1]
    return (("grid", 1, height // config.patch_size, width // config.patch_size), ("text", text))


SD3 = Family(
    name="Stable Diffusion 3",
    models=("SD3Transformer2DModel",),
    layers=r"transformer_blocks\.\d+\.attn",
    tokens=tokens,
    cfg_batch_order=("uncond", "cond"),
    blocks=(r"transformer_blocks\.\d+",),
    perturbed_argument="skip_layers",
    has_rope=lambda _: False,  # positions are added to the patches
)
