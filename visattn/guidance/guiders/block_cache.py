"""Blocks before the first one that is edited are not run again: what they gave in the conditional
pass is what they would give in the perturbed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from visattn.guidance.edits.block_edits import EditedBlock
from visattn.guidance.edits.steer import Steering
from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import Next, add_handler, handlers_of, remove_handler

__all__ = ["Prefix"]

RESIDUALS = ("controlnet_block_samples", "block_controlnet_hidden_states")


class Prefix:
    """The outputs that a denoiser's blocks had before the first edited one.

    Args:
        stack: closing it leaves the blocks as they were.
        model: the denoiser; stacks: the paths of its blocks, stack by stack; first: number of the
            first edited block over all stacks.
    """

    def __init__(
        self, stack: ExitStack, model: torch.nn.Module, stacks: Sequence[Sequence[str]], first: int
    ) -> None:
        self.model, self.blocks = model, list[torch.nn.Module]()
        self.mode: Literal["run", "keep", "give"] = "run"
        self.kept: dict[str, Any] = {}  # by the path of the last such block of each stack
        self.lasts: list[str] = []
        self.given = 0  # calls of blocks that were not computed
        for paths in stacks:
            own = tuple(paths[: max(0, first)])
            first -= len(paths)
            for path in own:
                block, handler = model.get_submodule(path), self._handler(path, own[-1])
                add_handler(block, handler)
                stack.callback(remove_handler, block, handler)
                self.blocks.append(block)
            self.lasts += own[-1:]

    def _handler(self, path: str, last: str) -> Any:
        def handle(_: Any, inner: Next, args: Any, kwargs: Any) -> Any:
            if self.mode == "give":
                self.given += 1
                return self.kept[last]
            out = inner(*args, **kwargs)
            if self.mode == "keep" and path == last:
                if path in self.kept:  # the pass is made of several calls, each of other rows
                    self.mode, self.kept = "run", {}
                else:
                    self.kept[path] = out
            return out

        return handle

    def reusable(self, arguments: Mapping[str, Any]) -> bool:
        """Whether what blocks give in the conditional pass is what they would give in the perturbed
        one, at a call of the denoiser with some arguments."""
        own = attached(self.model)
        cached = bool(getattr(self.model, "is_cache_enabled", False))
        if own is None or cached or "perturbed" in own.plan.passes:
            return False
        edits: list[Any] = []
        if isinstance(own.editor, Steering):
            edits += [entry.edit for entry in own.editor.entries]
        for block in self.blocks:
            handlers = handlers_of(block)
            edits += [each.edit for each in handlers if isinstance(each, EditedBlock)]
        if any(e.passes and ("cond" in e.passes) != ("perturbed" in e.passes) for e in edits):
            return False
        return all(arguments.get(name) is None for name in RESIDUALS)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, the outputs of a pass are kept."""
        self.kept.clear()
        self.mode = "keep"
        try:
            yield
        finally:
            self.mode = "run"

    @contextmanager
    def giving(self, rows: slice | None) -> Iterator[None]:
        """Inside, the blocks give what was kept of some rows of the batch, and nothing is kept
        after it. Where nothing was kept, as by code that is compiled as a whole, they run."""
        if self.lasts and all(last in self.kept for last in self.lasts):
            self.kept = {path: _rows(out, rows) for path, out in self.kept.items()}
            self.mode = "give"
        try:
            yield
        finally:
            self.mode = "run"
            self.kept = {}


def _rows(out: Any, rows: slice | None) -> Any:
    if rows is None or out is None:
        return out
    if isinstance(out, tuple):
        return tuple(_rows(x, rows) for x in out)
    return out[rows]
