"""What visattn knows of a model family: where its self-attention is, and what its tokens mean."""

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
        name: as the family calls itself.
        models: class names of its denoisers.
        layers: regular expression that the module paths of its self-attention (joint attention
            where text is part of the sequence) match in full, and nothing else does.
        tokens: the attention's tokens from the model's configuration and the arguments of its
            forward, in the order of the sequence. It is traced by ``torch.compile``: it reads
            shapes, and values only where these do not say it.
        cfg_batch_order: the passes in a batch that classifier-free guidance has doubled, in their
            order; empty where each pass is a separate call.
        calls: the passes of a step in their order, where its pipelines make a call of each; some do
            not name them.
        cross: regular expression of its cross-attention to text; empty where it has none.
        blocks: a regular expression for each stack of blocks that its denoiser runs one after the
            other, which the module paths of its blocks match in full.
        timestep_unit: what its pipelines divide a timestep of the scheduler by before the denoiser
            gets it.
        perturbed_argument: argument of its forward by which a pipeline asks for a perturbed pass of
            its own.
        has_rope: whether its blocks depend on the order of their image tokens, as by a rotary
            embedding, from the model's configuration. Positions that are added to the tokens before
            the first block do not count.
        image_output: which output of a block the image tokens are, where it gives text as well.
        fused_out_projection: the linear layer of a block whose first inputs are the outputs of an
            attention module that has no output projection.
        masks_text_padding: whether its attention gets a key mask ``[B, 1, 1, L]`` that excludes the
            padding of its text and nothing else; the first tokens of a text are the valid ones.
        frame_rate: frames per second of the videos that a pipeline of it makes, by its authors,
            from the pipeline.
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
