"""Reuses outputs of the conditional pass in the perturbed pass: the blocks before the first edited
one would compute the same in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from visattn.guidance.edits.block_edits import EditedBlock
from visattn.guidance.edits.steer import Steering
from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import Next, add_handler, handlers_of, remove_handler

__all__ = ["BlockCache"]

# Arguments of a denoiser that a control net adds to the outputs of blocks.
RESIDUALS = ("controlnet_block_samples", "block_controlnet_hidden_states")


class BlockCache:
    """The outputs of a denoiser's blocks before the first edited one.

    Args:
        stack: closing it restores the blocks.
        model: the denoiser.
        stacks: the paths of its blocks, stack by stack.
        first_edited: index of the first edited block over all stacks.

    Attributes:
        outputs: by the path of the last reused block of each stack.
        num_skipped: calls of blocks that were not computed.
    """

    def __init__(
        self,
        stack: ExitStack,
        model: torch.nn.Module,
        stacks: Sequence[Sequence[str]],
        first_edited: int,
    ) -> None:
        self.model, self.blocks = model, list[torch.nn.Module]()
        self.mode: Literal["compute", "record", "replay"] = "compute"
        self.outputs: dict[str, Any] = {}
        self.last_paths: list[str] = []
        self.num_skipped = 0
        for paths in stacks:
            reused = tuple(paths[: max(0, first_edited)])
            first_edited -= len(paths)
            for path in reused:
                block, handler = model.get_submodule(path), self._handler(path, reused[-1])
                add_handler(block, handler)
                stack.callback(remove_handler, block, handler)
                self.blocks.append(block)
            self.last_paths += reused[-1:]

    def _handler(self, path: str, last_path: str) -> Any:
        def handle(_: Any, inner: Next, args: Any, kwargs: Any) -> Any:
            if self.mode == "replay":
                self.num_skipped += 1
                return self.outputs[last_path]
            output = inner(*args, **kwargs)
            if self.mode == "record" and path == last_path:
                if path in self.outputs:  # the pass has several calls, each with other rows
                    self.mode, self.outputs = "compute", {}
                else:
                    self.outputs[path] = output
            return output

        return handle

    def is_reusable(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the blocks compute the same in the conditional and the perturbed pass.

        Args:
            arguments: of the call of the denoiser, by name.
        """
        attachment = attached(self.model)
        has_cache = bool(getattr(self.model, "is_cache_enabled", False))
        if attachment is None or has_cache or "perturbed" in attachment.plan.passes:
            return False
        edits: list[Any] = []
        if isinstance(attachment.editor, Steering):
            edits += [entry.edit for entry in attachment.editor.entries]
        for block in self.blocks:
            handlers = handlers_of(block)
            edits += [handler.edit for handler in handlers if isinstance(handler, EditedBlock)]
        for edit in edits:
            if edit.passes and ("cond" in edit.passes) != ("perturbed" in edit.passes):
                return False
        return all(arguments.get(name) is None for name in RESIDUALS)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the outputs of the pass that runs inside the ``with`` block."""
        self.outputs.clear()
        self.mode = "record"
        try:
            yield
        finally:
            self.mode = "compute"

    @contextmanager
    def replaying(self, rows: slice | None) -> Iterator[None]:
        """Inside the ``with`` block, the blocks return the recorded outputs; after it they are
        dropped. If nothing was recorded (as when the denoiser is compiled as a whole), the blocks
        compute.

        Args:
            rows: of the batch; None means all.
        """
        if self.last_paths and all(path in self.outputs for path in self.last_paths):
            self.outputs = {path: _rows_of(output, rows) for path, output in self.outputs.items()}
            self.mode = "replay"
        try:
            yield
        finally:
            self.mode = "compute"
            self.outputs = {}


def _rows_of(output: Any, rows: slice | None) -> Any:
    if rows is None or output is None:
        return output
    if isinstance(output, tuple):
        return tuple(_rows_of(item, rows) for item in output)
    return output[rows]
