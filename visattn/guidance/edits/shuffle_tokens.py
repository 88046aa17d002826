"""Give blocks their image tokens in a random order."""

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
    """Give blocks their image tokens in a random order, and restore the order of their outputs
    (token perturbation guidance, Rajabi et al. 2025, arXiv 2506.10036).

    Every step and block has a new order. The edit needs a denoiser whose blocks depend on the order
    of the tokens: Wan, HunyuanVideo, Flux, or CogVideoX with a rotary embedding.

    Args:
        blocks: indices of blocks over all stacks, in the order in which they run. None means all
            blocks.
        share: share of the tokens that change places.
        seed: seed of the orders.
        passes: some of ``cond``, ``uncond`` and ``perturbed``. None means all passes.
        start: the first step, as an int, or as a float share of the steps.
        stop: the step after the last one, as an int, or as a float share of the steps.

    Raises:
        TypeError: ``blocks`` has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import ShuffleTokens, steer
        >>> with steer(pipe, ShuffleTokens(blocks=[0], share=0.5, passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Rajabi et al. (2025), "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
    Default:
        paper. The authors' code was not compared.
    Differences:
        - Tokens return to their places after each block, as blocks of transformers have positions.
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
            path: path of the block.
            step: index of the step.
        """
        path_hash = sum(ord(letter) * 131**n for n, letter in enumerate(path))
        seed = (self.seed * 1_000_003 + step) * 1_000_003 + path_hash
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
        "changes nothing in dense attention; use another guidance, such as SLG or PAG"
    )


def _restored(out: Any, call: BlockCall, order: torch.Tensor) -> Any:
    """Return the outputs of a block, with the image tokens in their original order."""
    if isinstance(out, tuple):
        image = call.image_output
        return tuple(_restored(x, call, order) if n == image else x for n, x in enumerate(out))
    new = out.clone()
    new[call.rows] = out[call.rows][:, order.argsort()]
    return new
