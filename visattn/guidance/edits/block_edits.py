"""Edits of whole blocks: skipped ones, and shuffled tokens (B1, B2)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from visattn._arguments import POSITIVE_SHARE, as_indices, check_number, check_window, in_window
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.class_swap import Next, add_handler, kind_of, remove_handler
from visattn.inject.models.wrappers import bare, unwrapped
from visattn.pipelines.family import Family
from visattn.plan import PASSES

__all__ = [
    "BlockEdit",
    "BlockSwitch",
    "EditedBlock",
    "ShuffleTokens",
    "SkipBlock",
    "SkipRandomBlocks",
    "block_numbers",
    "block_paths",
    "edit_blocks",
]


def block_paths(model: torch.nn.Module, family: Family) -> tuple[tuple[str, ...], ...]:
    """The paths of a denoiser's blocks, stack by stack, in the order in which they run."""
    paths = list(dict.fromkeys(bare(path) for path, _ in model.named_modules()))
    return tuple(
        tuple(path for path in paths if re.fullmatch(stack, path)) for stack in family.blocks
    )


@dataclass(frozen=True, kw_only=True)
class BlockEdit:
    """A change of whole blocks.

    Args:
        blocks: numbers of blocks over all stacks, in the order in which they run; one or several;
            None: all.
        passes: of ``cond``, ``uncond`` and ``perturbed``; default: all.
        start, stop: the steps, as of an Edit.
    """

    blocks: int | Sequence[int] | None
    passes: tuple[str, ...] | None = None
    start: int | float = 0
    stop: int | float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.blocks is not None:
            object.__setattr__(self, "blocks", as_indices(f"{name}(blocks=...)", self.blocks))
            if not self.blocks:
                raise ValueError(f"{name} names no block; None is all of them")
        check_window(name, self.start, self.stop)
        passes = (self.passes,) if isinstance(self.passes, str) else self.passes
        if passes is not None and not set(passes) <= set(PASSES):
            raise ValueError(f"{name}(passes={passes!r}) must be of {', '.join(PASSES)}")
        object.__setattr__(self, "passes", None if passes is None else tuple(passes))

    def check(self, model: Any, family: Family) -> None:
        """Raise ValueError where the edit can change nothing in a denoiser."""

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        """What a block gives in the passes that the edit is for."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockCall:
    """A call of a block: its path among those that the edit is for, its arguments, the rows of the
    batch that are edited, and the step."""

    path: str
    paths: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: torch.Tensor
    step: int
    attachment: Attachment

    @property
    def hidden(self) -> torch.Tensor:
        """The image tokens that go in, ``[B, L, C]``."""
        found = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(found, torch.Tensor)
        return found

    @property
    def text(self) -> torch.Tensor | None:
        """The text tokens that go in."""
        found = self.args[1] if len(self.args) > 1 else self.kwargs.get("encoder_hidden_states")
        return found if isinstance(found, torch.Tensor) else None

    @property
    def image_output(self) -> int:
        """Which output of the block are the image tokens, where it gives text as well."""
        return self.attachment.family.image_output


@dataclass(frozen=True, kw_only=True)
class SkipBlock(BlockEdit):
    """Blocks, or their attention or feed-forward alone, are skipped: only the residual goes on
    (skip layer guidance of SD3.5; spatiotemporal skip guidance, Hyung et al. 2024, arXiv
    2411.18664).

    Args:
        what: ``block``, ``attention`` (self-attention or joint attention) or ``feedforward``.

    Source:
        Hyung et al. (2024), "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling",
        arXiv 2411.18664. Code: github.com/junhahyung/STGuidance (commit f2b7482).
    Default:
        code. The released pipelines skip whole blocks.
    Differences:
        none
    """

    what: Literal["block", "attention", "feedforward"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("block", "attention", "feedforward"):
            raise ValueError(
                f"SkipBlock(what={self.what!r}) must be block, attention or feedforward"
            )

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        if self.what == "block":
            return skipped(inner(*call.args, **call.kwargs), call)
        names = ("attn1", "attn") if self.what == "attention" else ("ffn", "ff", "ff_context")
        parts = [part for name in names if (part := getattr(block, name, None)) is not None]
        if self.what == "attention":
            parts = parts[:1]
        if not parts:
            raise ValueError(
                f"SkipBlock(what={self.what!r}): {call.path} has no such part; skip the block"
            )

        def zero(_: Any, own: Next, args: Any, kwargs: Any) -> Any:
            return _without(own(*args, **kwargs), call.rows)

        with ExitStack() as stack:
            stack.enter_context(_as_written(block))
            for part in parts:
                add_handler(part, zero)
                stack.callback(remove_handler, part, zero)
            return inner(*call.args, **call.kwargs)


@contextmanager
def _as_written(block: Any) -> Iterator[None]:
    """Inside, a block that is compiled runs as it is written: compiled code goes by the handlers of
    its parts."""
    own = vars(block).get("_compiled_call_impl")
    if own is not None:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        if own is not None:
            block._compiled_call_impl = own


@dataclass(frozen=True, kw_only=True)
class SkipRandomBlocks(SkipBlock):
    """Blocks that are drawn anew at every step are skipped (S2-Guidance, Chen et al. 2025, arXiv
    2508.12880).

    Args:
        share: of the blocks, at least one; seed: of the draws.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("SkipRandomBlocks", "share", self.share, *POSITIVE_SHARE)

    def drawn(self, paths: Sequence[str], step: int) -> set[str]:
        """The blocks that are skipped at a step."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(paths), generator=random).tolist()
        return {paths[n] for n in order[: max(1, round(self.share * len(paths)))]}

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        if call.path in self.drawn(call.paths, call.step):
            return super().run(block, inner, call)
        return inner(*call.args, **call.kwargs)


@dataclass(frozen=True, kw_only=True)
class ShuffleTokens(BlockEdit):
    """Blocks get their image tokens in another order, and give them back in theirs (token
    perturbation guidance, Rajabi et al. 2025, arXiv 2506.10036). A new order for every step and
    block. For denoisers whose blocks depend on the order: Wan, HunyuanVideo, Flux, and CogVideoX
    with a rotary embedding.

    Args:
        share: of the tokens that change places.
        seed: of the orders.

    Source:
        Rajabi et al. (2025), "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
    Default:
        paper. Its code was not compared with.
    Differences:
        - Tokens get back their places after each block, as blocks of transformers have positions.
    """

    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ShuffleTokens", "share", self.share, *POSITIVE_SHARE)

    def order(self, length: int, path: str, step: int) -> torch.Tensor:
        """The order of the tokens in a block at a step, int64 ``[length]``."""
        number = sum(ord(letter) * 131**n for n, letter in enumerate(path))
        seed = (self.seed * 1_000_003 + step) * 1_000_003 + number
        random = torch.Generator().manual_seed(seed % 2**62)
        moved = torch.randperm(length, generator=random)[: max(2, round(self.share * length))]
        out = torch.arange(length)
        out[moved.sort().values] = moved
        return out

    def check(self, model: Any, family: Family) -> None:
        if not family.has_rope(model.config):
            raise ValueError(_unordered(model))

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        # a denoiser that has no embedding of its own may be called without one
        if call.kwargs.get("image_rotary_emb", ...) is None:
            raise ValueError(_unordered(call.attachment.model))
        hidden = call.hidden
        order = self.order(hidden.shape[1], call.path, call.step).to(hidden.device)
        new = hidden.clone()
        new[call.rows] = hidden[call.rows][:, order]
        args, kwargs = call.args, dict(call.kwargs)
        if args:
            args = (new, *args[1:])
        else:
            kwargs["hidden_states"] = new
        out = inner(*args, **kwargs)
        return _back(out, call, order)


def _unordered(model: Any) -> str:
    return (
        f"ShuffleTokens (token perturbation) is refused for {kind_of(model).__name__}: without a "
        "rotary embedding its blocks do not depend on the order of tokens, so that shuffling them "
        "changes nothing in dense attention; take another guidance, such as SLG or PAG"
    )


def _back(out: Any, call: BlockCall, order: torch.Tensor) -> Any:
    """The outputs of a block with the image tokens in their places again."""
    if isinstance(out, tuple):
        image = call.image_output
        return tuple(_back(x, call, order) if n == image else x for n, x in enumerate(out))
    new = out.clone()
    new[call.rows] = out[call.rows][:, order.argsort()]
    return new


def skipped(out: Any, call: BlockCall) -> Any:
    """The outputs of a block, those of the edited rows being its inputs."""
    if not isinstance(out, tuple):
        return _put(out, call.hidden, call.rows)
    return tuple(
        x if x is None else _put(x, call.hidden if n == call.image_output else call.text, call.rows)
        for n, x in enumerate(out)
    )


def _put(out: torch.Tensor, new: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    assert new is not None
    out = out.clone()
    out[rows] = new[rows].to(out.dtype)
    return out


def _without(out: Any, rows: torch.Tensor) -> Any:
    if isinstance(out, tuple):
        return tuple(_without(x, rows) for x in out)
    if out is None:
        return None
    out = out.clone()
    out[rows] = 0
    return out


def block_numbers(edit: BlockEdit, count: int, role: str) -> tuple[int, ...]:
    """The numbers of the blocks that an edit is for.

    Raises:
        ValueError: there is no such block.
    """
    numbers = range(count) if edit.blocks is None else edit.blocks
    assert not isinstance(numbers, int)
    for number in numbers:
        if number >= count:
            raise ValueError(
                f"{type(edit).__name__} names block {number}; the {role} has {count}, from 0 on"
            )
    return tuple(numbers)


def edit_blocks(stack: ExitStack, pipe: Any, edits: Sequence[BlockEdit]) -> list[BlockSwitch]:
    """Put block edits on a pipeline until the stack is closed.

    Raises:
        ValueError: there is no such block, the edit can change nothing in this denoiser, or the
            denoiser is compiled as a whole.
    """
    switches = []
    for edit in edits:
        switch = BlockSwitch()
        switches.append(switch)
        for role, (model, family) in known_denoisers(pipe).items():
            edit.check(model, family)
            if _compiled(pipe if isinstance(pipe, torch.nn.Module) else getattr(pipe, role)):
                raise ValueError(
                    f"{type(edit).__name__} is of blocks, and the {role} is compiled as a whole, "
                    "which goes by them; compile its blocks (compile_repeated_blocks)"
                )
            every = [path for own in block_paths(model, family) for path in own]
            paths = tuple(every[n] for n in block_numbers(edit, len(every), role))
            for path in paths:
                block = model.get_submodule(path)
                handler = EditedBlock(edit, model, path, paths, switch)
                add_handler(block, handler)
                stack.callback(remove_handler, block, handler)
    return switches


def _compiled(model: Any) -> bool:
    """Whether torch.compile has a model as a whole."""
    return any(
        hasattr(own, "_orig_mod") or vars(own).get("_compiled_call_impl") is not None
        for own in unwrapped(model)
    )


class BlockSwitch:
    """Whether a block edit is made now, and how many calls it has changed."""

    def __init__(self) -> None:
        self.on, self.touched = True, 0


class EditedBlock:
    """Handles the calls of a block that an edit is for.

    Args:
        edit: the edit.
        model: the denoiser.
        path: of the block.
        paths: of all blocks that the edit is for.
        switch: whether the edit is made now.
    """

    def __init__(
        self,
        edit: BlockEdit,
        model: torch.nn.Module,
        path: str,
        paths: tuple[str, ...],
        switch: BlockSwitch,
    ) -> None:
        self.edit, self.model, self.switch = edit, model, switch
        self.path, self.paths = path, paths

    def __call__(
        self, block: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.switch.on:
            return inner(*args, **kwargs)
        edit, attachment = self.edit, attached(self.model)
        assert attachment is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        batch = hidden.shape[0]
        step, steps = attachment.step()
        windowed = edit.start != 0 or edit.stop != 1.0
        if windowed and (step is None or steps is None):
            raise ValueError(
                f"{type(edit).__name__} is for some steps, and "
                + attachment.unknown("step", "start=0 and stop=1.0", "steer")
            )
        if windowed and not in_window(edit.start, edit.stop, step or 0, steps or 1):
            return inner(*args, **kwargs)
        rows = torch.ones(batch, dtype=torch.bool)
        if edit.passes is not None:
            passes = attachment.passes(batch)
            if passes is None:
                raise ValueError(
                    f"{type(edit).__name__} is for the {' and '.join(edit.passes)} pass, and "
                    + attachment.unknown("pass", "passes=None", "steer")
                )
            edited = torch.tensor([pass_ in edit.passes for pass_ in passes])
            rows = edited.repeat_interleave(batch // len(passes))
        if not bool(rows.any()):
            return inner(*args, **kwargs)
        self.switch.touched += 1
        rows = rows.to(hidden.device)
        call = BlockCall(self.path, self.paths, args, kwargs, rows, step or 0, attachment)
        return edit.run(block, inner, call)
