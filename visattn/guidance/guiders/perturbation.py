"""The edits of a guidance on a pipeline, which apply only in the perturbed pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from visattn.guidance.edits.block_edits import (
    BlockEdit,
    BlockSwitch,
    block_numbers,
    block_paths,
    edit_blocks,
)
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.steer import Steering, check_switches, check_touched, enter, place
from visattn.guidance.guiders.block_cache import BlockCache
from visattn.guidance.guiders.guidance import Guidance
from visattn.inject.models.denoisers import known_denoisers

__all__ = ["Perturbation"]


class Perturbation:
    """The edits of a guidance on a pipeline. They apply only in the perturbed pass.

    Args:
        stack: closing it removes the edits.
        pipe: a pipeline, or a denoiser.
        guidance: the guidance.
        reuse_prefix: whether the perturbed pass reuses outputs of the conditional one.

    Attributes:
        idle: whether the guidance has no effect.
        caches: reused outputs of blocks, by role of the denoiser.
    """

    def __init__(self, stack: ExitStack, pipe: Any, guidance: Guidance, reuse_prefix: bool) -> None:
        self.guidance = guidance
        edits = guidance.edits()
        self.edits = [edit for edit in edits if isinstance(edit, Edit)]
        self.block_edits = [edit for edit in edits if isinstance(edit, BlockEdit)]
        self.steerings: dict[str, Steering] = enter(stack, pipe, place(pipe, self.edits), on=False)
        self.switches: list[BlockSwitch] = edit_blocks(stack, pipe, self.block_edits)
        for switch in self.switches:
            switch.on = False
        strengths = [
            of_layer
            for steering in self.steerings.values()
            for _, strengths_by_layer in steering.edits
            for of_layer in strengths_by_layer.values()
        ]
        no_edit = not self.block_edits and not any(bool(each.any()) for each in strengths)
        self.idle = guidance.scale == 0 or no_edit  # no_edit: p would be c
        self.caches: dict[str, BlockCache] = {}
        for role, (model, family) in known_denoisers(pipe).items() if reuse_prefix else ():
            stacks = block_paths(model, family)
            first = self._first_edited(role, [path for paths in stacks for path in paths])
            self.caches[role] = BlockCache(stack, model, stacks, first)

    def _first_edited(self, role: str, paths: Sequence[str]) -> int:
        """Return the index of the first edited block."""
        edited = [
            index for edit in self.block_edits for index in block_numbers(edit, len(paths), role)
        ]
        for _, strengths_by_layer in self.steerings[role].edits:
            for layer in strengths_by_layer:
                edited += [i for i, path in enumerate(paths) if layer.startswith(path + ".")]
        return min(edited, default=0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Apply the edits inside the ``with`` block."""
        switches: list[Any] = [*self.steerings.values(), *self.switches]
        for switch in switches:
            switch.on = True
        try:
            yield
        finally:
            for switch in switches:
                switch.on = False

    def check(self) -> None:
        """Raise ValueError if an edit was never applied."""
        if not self.idle:
            check_touched(self.edits, self.steerings.values())
            check_switches(self.block_edits, self.switches)
