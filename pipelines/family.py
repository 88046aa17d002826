"""A model family: where its self-attention is, and what its tokens mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visattn.geometry.layout import Tokens

__all__ = ["Family"]


def _always(_: Any) -> bool:
    return True


def _sixteen(_: Any) -> float:
    return 16.0


@dataclass(frozen=True)
class Family:
    """A family of denoisers.

    Args:
        name: of the family.
        models: class names of its denoisers.
        layers: regular expression that matches in full the module paths of its self-attention
            (joint attention if text is part of the sequence) and nothing else.
        tokens: returns the tokens of attention in the order of the sequence, from the configuration
            of the denoiser and the arguments of its forward. ``torch.compile`` traces it: it reads
            shapes, and values only if shapes do not have the information.
        cfg_batch_order: the order of the passes in a batch that classifier-free guidance has
            doubled; empty: each pass is a separate call.
        calls: the order of the passes of a step, if each is a separate call; some pipelines do not
            name them.
        cross: regular expression of its cross-attention to text; empty: it has none.
        blocks: regular expressions that match in full the module paths of its blocks, one for each
            stack of blocks that run one after the other.
        timestep_unit: its pipelines divide a timestep of the scheduler by this number before they
            pass it to the denoiser.
        perturbed_argument: the argument of its forward with which a pipeline runs a perturbed pass
            of its own.
        has_rope: returns from the configuration whether its blocks depend on the order of their
            image tokens, for example by a rotary embedding. Positions that are added to the tokens
            before the first block do not count.
        image_output: index of the image tokens in the outputs of a block that also returns text.
        fused_out_projection: the linear layer of a block that starts with the outputs of an
            attention module without an output projection.
        masks_text_padding: whether its attention gets a key mask ``[B, 1, 1, L]`` that excludes the
            padding of its text and nothing else. The valid tokens of a text come first.
        frame_rate: returns the frames per second of the videos of a pipeline, as published.
    """

    name: str
    models: tuple[str, ...]
    layers: str
    tokens: Callable[[Any, Mapping[str, Any]], Tokens]
    cfg_batch_order: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    cross: str = ""
    blocks: tuple[str, ...] = ()
    timestep_unit: int = 1
    perturbed_argument: str = ""
    has_rope: Callable[[Any], bool] = _always
    image_output: int = 1
    fused_out_projection: str = ""
    masks_text_padding: bool = False
    frame_rate: Callable[[Any], float] = _sixteen
