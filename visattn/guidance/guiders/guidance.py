"""The base classes of guidances.

``Guidance`` is by a perturbed pass: ``pred = u + g (c - u) + w (c - p)``, where ``p`` is the
conditional prediction with perturbed attention. ``InPass`` acts inside the passes of the pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from visattn._arguments import check_number, check_window, in_window
from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.written_form import Writable
from visattn.plan import Denoiser

__all__ = ["Guidance", "InPass", "Window"]


@dataclass(frozen=True, kw_only=True)
class Window(Writable):
    """The steps of a guidance.

    Args:
        start: the first step: an int is a step, a float a share of the steps.
        stop: the first step after the guidance, as an int, or as a share of the steps.
    """

    start: int | float = 0
    stop: int | float = 1.0

    def active(self, step: int | None, steps: int | None) -> bool:
        """Return whether the guidance applies at a step.

        Args:
            step: index of the step; None where it is not known.
            steps: number of steps; None where it is not known.

        Raises:
            ValueError: the guidance is for some steps, and the step is not known.
        """
        if self.start == 0 and self.stop == 1.0 and isinstance(self.stop, float):
            return True
        if step is None or steps is None:
            raise ValueError(
                f"{type(self).__name__} is for some steps, and the step is not known; guide the "
                "pipeline that runs"
            )
        return in_window(self.start, self.stop, step, steps)


@dataclass(frozen=True, kw_only=True)
class Guidance(Window):
    """Base class of guidances by a perturbed pass. A subclass defines ``edits``, which perturb the
    pass; to have a text form it sets ``example``.

    Args:
        scale: ``w`` of ``w (c - p)``; with 0 there is no further pass. Without classifier-free
            guidance the prediction is ``c + w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from dataclasses import dataclass
        >>> from visattn.guidance import Guidance, ScaleHeads, guide
        >>> @dataclass(frozen=True, kw_only=True)
        ... class WeakHeads(Guidance):
        ...     def edits(self):
        ...         return [ScaleHeads(layers=[1], heads=[0], scale=0.5)]
        >>> with guide(pipe, WeakHeads(scale=2.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
    """

    scale: float = 3.0

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "scale", self.scale, "a finite number")
        check_window(type(self).__name__, self.start, self.stop)
        self.edits()

    def edits(self) -> list[Edit | BlockEdit]:
        """Return the edits that perturb the pass."""
        raise NotImplementedError

    def fits(self, denoisers: Mapping[str, Denoiser]) -> None:
        """Raise ValueError when the guidance is for other denoisers.

        Args:
            denoisers: those of a pipeline, by role.
        """


class InPass(ABC):
    """Base class of guidances inside the passes that a pipeline runs anyway. A subclass defines
    ``put``, which adds the guidance to the pipeline."""

    @abstractmethod
    def put(self, stack: ExitStack, pipe: Any) -> Callable[[], None]:
        """Add the guidance to a pipeline until the stack is closed.

        Args:
            stack: closing it restores the pipeline.
            pipe: a pipeline, or a denoiser.

        Returns:
            A function to call at the end. It raises ValueError if the guidance was never applied.
        """
