"""Skip blocks, or only their attention or feed-forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import POSITIVE_SHARE, check_number
from visattn.guidance.edits.block_edits import BlockCall, BlockEdit
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.runtime.private_names import compiled_call, set_compiled_call

__all__ = ["SkipBlock", "SkipRandomBlocks"]


@dataclass(frozen=True, kw_only=True)
class SkipBlock(BlockEdit):
    """Skip blocks, or only their attention or feed-forward: the residual alone is passed on (skip
    layer guidance of SD3.5; spatiotemporal skip guidance, Hyung et al. 2024, arXiv 2411.18664).

    Args:
        blocks: indices of blocks over all stacks, in the order in which they run. None means all
            blocks.
        what: ``block``, ``attention`` (self-attention or joint attention) or ``feedforward``.
        passes: some of ``cond``, ``uncond`` and ``perturbed``. None means all passes.
        start: the first step, as an int, or as a float share of the steps.
        stop: the step after the last one, as an int, or as a float share of the steps.

    Raises:
        TypeError: ``blocks`` has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import SkipBlock, steer
        >>> with steer(pipe, SkipBlock(blocks=[1], passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Hyung et al. (2024), "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling",
        arXiv 2411.18664. Code: github.com/junhahyung/STGuidance (commit f2b7482).
    Default:
        code. The released pipelines skip whole blocks.
    Differences:
        none
    """

    what: Literal["block", "attention", "feedforward"] = "block"
    example: ClassVar[str] = "SkipBlock(blocks=[10], passes=['uncond'], start=0.2)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("block", "attention", "feedforward"):
            raise ValueError(
                f"SkipBlock(what={self.what!r}) must be block, attention or feedforward"
            )

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        if self.what == "block":
            return _with_inputs(inner(*call.args, **call.kwargs), call)
        names = ("attn1", "attn") if self.what == "attention" else ("ffn", "ff", "ff_context")
        modules = [module for name in names if (module := getattr(block, name, None)) is not None]
        if self.what == "attention":
            modules = modules[:1]
        if not modules:
            raise ValueError(
                f"SkipBlock(what={self.what!r}): {call.path} has no such module; skip the block"
            )

        def zero(_: Any, module_call: Next, args: Any, kwargs: Any) -> Any:
            return _zeroed(module_call(*args, **kwargs), call.rows)

        with ExitStack() as stack:
            stack.enter_context(_uncompiled(block))
            for module in modules:
                add_handler(module, zero)
                stack.callback(remove_handler, module, zero)
            return inner(*call.args, **call.kwargs)


@contextmanager
def _uncompiled(block: Any) -> Iterator[None]:
    """Inside the ``with`` block, a compiled block runs eagerly, since compiled code ignores the
    handlers of its submodules."""
    compiled = compiled_call(block)
    if compiled is not None:
        set_compiled_call(block, None)
    try:
        yield
    finally:
        if compiled is not None:
            set_compiled_call(block, compiled)


@dataclass(frozen=True, kw_only=True)
class SkipRandomBlocks(SkipBlock):
    """Skip random blocks, drawn again at every step (S2-Guidance, Chen et al. 2025, arXiv
    2508.12880).

    Args:
        share: share of the blocks to skip. At least one block is skipped.
        seed: seed of the draws.
        blocks: indices of the blocks to draw from. None means all blocks.
        what: ``block``, ``attention`` or ``feedforward``, as in ``SkipBlock``.
        passes: some of ``cond``, ``uncond`` and ``perturbed``. None means all passes.
        start: the first step, as an int, or as a float share of the steps.
        stop: the step after the last one, as an int, or as a float share of the steps.

    Raises:
        TypeError: ``blocks`` has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import SkipRandomBlocks, steer
        >>> with steer(pipe, SkipRandomBlocks(share=0.3, passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Chen et al. (2025), "S2-Guidance", arXiv 2508.12880.
    Default:
        paper. No code was released.
    Differences:
        - At least one block is skipped.
    """

    blocks: int | Sequence[int] | None = None
    share: float = 0.1
    seed: int = 0
    example: ClassVar[str] = "SkipRandomBlocks(share=0.1, passes=['uncond'])"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("SkipRandomBlocks", "share", self.share, *POSITIVE_SHARE)

    def drawn(self, paths: Sequence[str], step: int) -> set[str]:
        """Return the paths of the blocks to skip at a step.

        Args:
            paths: paths of the blocks to draw from.
            step: index of the step.
        """
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(paths), generator=random).tolist()
        return {paths[n] for n in order[: max(1, round(self.share * len(paths)))]}

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        if call.path in self.drawn(call.paths, call.step):
            return super().run(block, inner, call)
        return inner(*call.args, **call.kwargs)


def _with_inputs(out: Any, call: BlockCall) -> Any:
    """Return the outputs of a block, with the inputs of the block in the edited rows."""
    if not isinstance(out, tuple):
        return _with_rows(out, call.hidden, call.rows)
    inputs = [call.hidden if n == call.image_output else call.text for n in range(len(out))]
    return tuple(
        x if x is None else _with_rows(x, given, call.rows)
        for x, given in zip(out, inputs, strict=True)
    )


def _with_rows(out: torch.Tensor, new: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    assert new is not None
    out = out.clone()
    out[rows] = new[rows].to(out.dtype)
    return out


def _zeroed(out: Any, rows: torch.Tensor) -> Any:
    """Return the outputs of a module, with zeros in the edited rows."""
    if isinstance(out, tuple):
        return tuple(_zeroed(x, rows) for x in out)
    if out is None:
        return None
    out = out.clone()
    out[rows] = 0
    return out
