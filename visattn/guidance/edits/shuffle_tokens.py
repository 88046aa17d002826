"""Blocks get their image tokens in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from visattn._arguments import POSITIVE_SHARE, check_number
from visattn.guidance.edits.block_edits import BlockCall, BlockEdit
from visattn.inject.hooks.class_swap import Next, kind_of
from visattn.pipelines.family import Family

__all__ = ["ShuffleTokens"]


@dataclass(frozen=True, kw_only=True)
class ShuffleTokens(BlockEdit):
    """Give blocks their image tokens in another order, and restore the order of their outputs
    (token perturbation guidance, Rajabi et al. 2025, arXiv 2506.10036).

    Every step and block has a new order. It is for denoisers whose blocks depend on the order: Wan,
    HunyuanVideo, Flux, and CogVideoX with a rotary embedding.

    Args:
        blocks: numbers of blocks over all stacks, in the order in which they run; None: all.
        share: which share of the tokens changes places.
        seed: of the orders.
        passes: of ``cond``, ``uncond`` and ``perturbed``; None: all.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``blocks`` has another form.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import ShuffleTokens, steer
        >>> with steer(pipe, ShuffleTokens(blocks=[0], share=0.5, passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Rajabi et al. (2025), "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
    Default:
        paper. Its code was not compared with.
    Differences:
        - Tokens get back their places after each block, as blocks of transformers have positions.
    """

    share: float = 1.0
    seed: int = 0
    example: ClassVar[str] = "ShuffleTokens(blocks=[0, 1], share=0.5, passes=['uncond'])"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ShuffleTokens", "share", self.share, *POSITIVE_SHARE)

    def order(self, length: int, path: str, step: int) -> torch.Tensor:
        """Return the order of the tokens in a block at a step, int64 ``[length]``.

        Args:
            length: number of tokens.
            path: of the block.
            step: index of the step.
        """
        number = sum(ord(letter) * 131**n for n, letter in enumerate(path))
        seed = (self.seed * 1_000_003 + step) * 1_000_003 + number
        random = torch.Generator().manual_seed(seed % 2**62)
        moved = torch.randperm(length, generator=random)[: max(2, round(self.share * length))]
        out = torch.arange(length)
        out[moved.sort().values] = moved
        return out

    def check(self, model: Any, family: Family) -> None:
        if not family.has_rope(model.config):
            raise ValueError(_without_positions(model))

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        # a denoiser whose embedding is an argument may be called without one
        if call.kwargs.get("image_rotary_emb", ...) is None:
            raise ValueError(_without_positions(call.attachment.model))
        hidden = call.hidden
        order = self.order(hidden.shape[1], call.path, call.step).to(hidden.device)
        new = hidden.clone()
        new[call.rows] = hidden[call.rows][:, order]
        args, kwargs = call.args, dict(call.kwargs)
        if args:
            args = (new, *args[1:])
        else:
            kwargs["hidden_states"] = new
        return _restored(inner(*args, **kwargs), call, order)


def _without_positions(model: Any) -> str:
    return (
        f"ShuffleTokens (token perturbation) is refused for {kind_of(model).__name__}: without a "
        "rotary embedding its blocks do not depend on the order of tokens, so that shuffling them "
        "changes nothing in dense attention; take another guidance, such as SLG or PAG"
    )


def _restored(out: Any, call: BlockCall, order: torch.Tensor) -> Any:
    """Return the outputs of a block with the image tokens in their places again."""
    if isinstance(out, tuple):
        image = call.image_output
        return tuple(_restored(x, call, order) if n == image else x for n, x in enumerate(out))
    new = out.clone()
    new[call.rows] = out[call.rows][:, order.argsort()]
    return new
