"""The state that the dynamic patterns of a layer keep between calls."""

from __future__ import annotations

from visattn.geometry.layout import TokenLayout
from visattn.inject.layers.denoising_state import DenoisingState
from visattn.inject.layers.head_groups import HeadGroups
from visattn.selectors import Memory

__all__ = ["Memories"]

MOST = 64  # limit for a layer, as texts of many lengths need one each


class Memories(dict[tuple[object, ...], Memory]):
    """The memories of a layer. They are separate for each size, for each known pass, for
    the heads that share one, and for each thread or task. A copy is empty.

    Attributes:
        latest: batch size and layout of the last call, the first items of its keys.
    """

    latest: tuple[object, ...] = ()

    def __deepcopy__(self, memo: object) -> Memories:
        return Memories()

    def of(
        self,
        parts: tuple[HeadGroups, ...],
        denoising: DenoisingState,
        layout: TokenLayout,
        batch: int,
        first: int = 0,
        whole: int | None = None,
    ) -> list[Memory]:
        """Return the memory of each part of a batch, ready for the running call.

        Args:
            parts: what the heads run in each part.
            denoising: the state of the denoiser.
            layout: layout of the call.
            batch: samples of the parts.
            first: index of the first part.
            whole: samples of the whole batch, if the parts are only some of it.
        """
        if not any(part.dynamic for part in parts) and not denoising.audit:
            return [Memory() for _ in parts]
        step, steps = denoising.step()
        passes, slot = denoising.passes(whole or batch), denoising.call.slot
        memories = []
        for number, part in enumerate(parts, first):
            key = (batch, layout, passes, number, len(parts), part.heads, slot)
            if key not in self and len(self) >= MOST:
                self.pop(next(iter(self)))
            memory = self.setdefault(key, Memory())
            self.latest = key[:2]
            memory.begin(None if passes is None else step, steps)
            memories.append(memory)
        return memories
