"""Edits of whole blocks: the base class, and the handler of block calls that applies them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from visattn._arguments import as_indices, check_window, in_window
from visattn.guidance.written_form import Writable
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.models.denoisers import known_denoisers
from visattn.inject.models.wrappers import bare, unwrapped
from visattn.pipelines.family import Family
from visattn.plan import PASSES
from visattn.runtime.private_names import compiled_call, compiled_module

__all__ = [
    "BlockCall",
    "BlockEdit",
    "BlockSwitch",
    "EditedBlock",
    "block_numbers",
    "block_paths",
    "edit_blocks",
]


def block_paths(model: torch.nn.Module, family: Family) -> tuple[tuple[str, ...], ...]:
    """Return the paths of a denoiser's blocks, stack by stack, in the order in which they run.

    Args:
        model: the denoiser.
        family: the model family of the denoiser.
    """
    paths = list(dict.fromkeys(bare(path) for path, _ in model.named_modules()))
    return tuple(
        tuple(path for path in paths if re.fullmatch(stack, path)) for stack in family.blocks
    )


@dataclass(frozen=True, kw_only=True)
class BlockEdit(Writable):
    """Base class of edits of whole blocks. A subclass defines ``run``. It also sets ``example`` if
    it has a text form.

    Args:
        blocks: one or several indices of blocks over all stacks, in the order in which they run.
            None means all blocks.
        passes: some of ``cond``, ``uncond`` and ``perturbed``. None means all passes.
        start: the first step, as an int, or as a float share of the steps.
        stop: the step after the last one, as an int, or as a float share of the steps.

    Raises:
        TypeError: ``blocks`` has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> from visattn.guidance import BlockEdit, steer
        >>> @dataclass(frozen=True, kw_only=True)
        ... class RunTwice(BlockEdit):
        ...     def run(self, block, inner, call):
        ...         inner(*call.args, **call.kwargs)
        ...         return inner(*call.args, **call.kwargs)
        >>> with steer(pipe, RunTwice(blocks=[0])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
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
                raise ValueError(f"{name} names no block; None means all")
        check_window(name, self.start, self.stop)
        passes = (self.passes,) if isinstance(self.passes, str) else self.passes
        if passes is not None and not set(passes) <= set(PASSES):
            raise ValueError(f"{name}(passes={passes!r}) must be of {', '.join(PASSES)}")
        object.__setattr__(self, "passes", None if passes is None else tuple(passes))

    def check(self, model: Any, family: Family) -> None:
        """Check that the edit can change the outputs of a denoiser. The base class accepts all.

        Args:
            model: the denoiser.
            family: the model family of the denoiser.

        Raises:
            ValueError: the edit can change nothing in this denoiser.
        """

    def run(self, block: Any, inner: Next, call: BlockCall) -> Any:
        """Run a block with the edit.

        Args:
            block: the module.
            inner: the unedited call of the block; takes the arguments of the block.
            call: the arguments, and the rows of the batch to change.

        Returns:
            The outputs of the block: image tokens ``[B, L, C]``, or a tuple of image and text
            tokens.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BlockCall:
    """A call of a block that an edit changes.

    Attributes:
        path: path of the block.
        paths: paths of all blocks that the edit applies to.
        args: the positional arguments.
        kwargs: the keyword arguments.
        rows: whether a row of the batch is edited, bool ``[B]``.
        step: index of the denoising step. 0 if it is not known.
        attachment: attachment of the denoiser.
    """

    path: str
    paths: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: torch.Tensor
    step: int
    attachment: Attachment

    @property
    def hidden(self) -> torch.Tensor:
        """The image tokens among the arguments, ``[B, L, C]``."""
        hidden = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        return hidden

    @property
    def text(self) -> torch.Tensor | None:
        """The text tokens among the arguments, ``[B, L, C]``. None if the block has none."""
        text = self.args[1] if len(self.args) > 1 else self.kwargs.get("encoder_hidden_states")
        return text if isinstance(text, torch.Tensor) else None

    @property
    def image_output(self) -> int:
        """Index of the image tokens among the outputs of a block that also returns text."""
        return self.attachment.family.image_output


def block_numbers(edit: BlockEdit, count: int, role: str) -> tuple[int, ...]:
    """Return the indices of the blocks that an edit applies to.

    Args:
        edit: the edit.
        count: number of blocks of the denoiser.
        role: role of the denoiser, for the error message.

    Raises:
        ValueError: the denoiser has no such block.
    """
    numbers = range(count) if edit.blocks is None else edit.blocks
    assert not isinstance(numbers, int)
    for number in numbers:
        if number >= count:
            raise ValueError(
                f"{type(edit).__name__} names block {number}; {role} has {count} blocks, from 0 on"
            )
    return tuple(numbers)


def edit_blocks(stack: ExitStack, pipe: Any, edits: Sequence[BlockEdit]) -> list[BlockSwitch]:
    """Put block edits on a pipeline until the stack is closed.

    Args:
        stack: closing it takes the edits off the pipeline.
        pipe: a pipeline or a denoiser.
        edits: the edits.

    Returns:
        A switch for each edit.

    Raises:
        ValueError: the denoiser has no such block, the edit can change nothing in it, or it is
            compiled as a whole.
    """
    switches = []
    for edit in edits:
        switch = BlockSwitch()
        switches.append(switch)
        for role, (model, family) in known_denoisers(pipe).items():
            edit.check(model, family)
            if _compiled(pipe if isinstance(pipe, torch.nn.Module) else getattr(pipe, role)):
                raise ValueError(
                    f"{type(edit).__name__} edits blocks, and {role} is compiled as a whole, which "
                    "bypasses the edits; compile its blocks instead (compile_repeated_blocks)"
                )
            blocks = [path for stack_paths in block_paths(model, family) for path in stack_paths]
            paths = tuple(blocks[n] for n in block_numbers(edit, len(blocks), role))
            for path in paths:
                block = model.get_submodule(path)
                handler = EditedBlock(edit, model, path, paths, switch)
                add_handler(block, handler)
                stack.callback(remove_handler, block, handler)
    return switches


def _compiled(model: Any) -> bool:
    """Return whether a model is compiled as a whole."""
    return any(
        compiled_module(module) is not None or compiled_call(module) is not None
        for module in unwrapped(model)
    )


class BlockSwitch:
    """The state of a block edit on a pipeline.

    Attributes:
        on: whether the edit is applied now.
        touched: number of block calls that it has changed.
    """

    def __init__(self) -> None:
        self.on, self.touched = True, 0


class EditedBlock:
    """Handler of the calls of one block, which applies an edit to them.

    Args:
        edit: the edit.
        model: the denoiser.
        path: path of the block.
        paths: paths of all blocks that the edit applies to.
        switch: whether the edit is applied now.
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
                f"{type(edit).__name__} is limited to some steps, and "
                + attachment.unknown("step", "start=0 and stop=1.0", "steer")
            )
        if windowed and not in_window(edit.start, edit.stop, step or 0, steps or 1):
            return inner(*args, **kwargs)
        rows = torch.ones(batch, dtype=torch.bool)
        if edit.passes is not None:
            passes = attachment.passes(batch)
            if passes is None:
                raise ValueError(
                    f"{type(edit).__name__} is limited to the {' and '.join(edit.passes)} pass, "
                    "and "
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
