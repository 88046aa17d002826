"""Where a denoising loop is: the step, how many there are, and the passes in the batch."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

__all__ = ["Context", "Guidance", "PipeRef", "passes_of", "runs", "step_of"]

# the names that pipelines and guiders give their calls
PASS_OF = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    "perturbed": "perturbed",
    "pred_cond_skip": "perturbed",
}


class Context(NamedTuple):
    """What a pipeline says of a call of its denoiser (``model.cache_context``)."""

    name: str
    step: int | None
    steps: int | None


class PipeRef:
    """A pipeline that is not kept alive. A copy of it refers to the copy of the pipeline, and to
    none where the denoiser alone was copied."""

    def __init__(self, pipe: object | None = None) -> None:
        self._ref = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> Any:
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> PipeRef:
        return PipeRef(memo.get(id(self())))

    def __reduce__(self) -> tuple[type[PipeRef], tuple[()]]:
        return PipeRef, ()


def place(timestep: torch.Tensor, timesteps: torch.Tensor) -> int | None:
    """Index of a timestep that is a view of the scheduler's, as those are that pipelines get by
    looping over them; None for another tensor."""
    if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
    return int(offset) if 0 <= offset < len(timesteps) else None


def schedule_of(pipe: Any) -> torch.Tensor | None:
    """The timesteps of a pipeline's scheduler, one-dimensional."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def runs(pipe: Any, timestep: torch.Tensor | None, unit: int = 1) -> bool:
    """Whether a pipeline is the one that makes a call of its denoiser: it stands at the timestep of
    the call, or at one of its present schedule where that of the call is not known. Another may
    share the denoiser, and one that was interrupted stays where it was. A pipeline that does not
    say where it stands runs where the timestep is one of its schedule, which another must not
    share. ``unit``: what it divides timesteps by."""
    current, timesteps = getattr(pipe, "_current_timestep", None), schedule_of(pipe)
    if timesteps is None:
        return False
    if not hasattr(pipe, "_current_timestep"):
        return timestep is not None and place(timestep, timesteps) is not None
    if not isinstance(current, torch.Tensor):
        return False
    if timestep is None:
        return place(current, timesteps) is not None
    if timestep.data_ptr() == current.data_ptr():
        return True
    now = current.to(timestep) if unit == 1 else current.to(timestep) / unit
    return bool(timestep.amax() == now)  # image-to-video has 0 for given frames


def step_of(
    context: Context | None, pipe: Any, timestep: torch.Tensor | None, unit: int = 1
) -> tuple[int | None, int | None]:
    """The step and the number of steps: as the pipeline says them, or else the place of the
    timestep in its schedule. Values are compared for a pipeline that runs alone: one that shares
    the denoiser with it may have the same value at another place."""
    if context is not None and context.step is not None and context.steps is not None:
        return context.step, context.steps
    timesteps = schedule_of(pipe)
    if timesteps is None:
        return None, None
    step = None if timestep is None else place(timestep, timesteps)
    if step is None and runs(pipe, timestep, unit):
        current = pipe._current_timestep
        step = place(current, timesteps)
        if step is None:
            found = (timesteps == current.to(timesteps.device)).nonzero()
            step = int(found[0]) if len(found) else None
    return step, len(timesteps)


class Guidance:
    """Whether guidance has doubled the batch of a pipeline. The pipeline says its scale, and a
    dynamic one moves from step to step, through 1 as well, while the batch stays what it was: the
    scale at the first call of a schedule decides."""

    def __init__(self) -> None:
        self._timesteps: object = None
        self._on = False

    def __call__(self, pipe: Any) -> bool | None:
        scale = getattr(pipe, "_guidance_scale", None)
        if not isinstance(scale, (int, float)):
            return None
        timesteps = schedule_of(pipe)
        if timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._on = timesteps, scale > 1
        return self._on


def passes_of(
    context: Context | None, guided: bool | None, order: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The passes in a batch. ``order``: those of a batch that guidance has doubled."""
    if context is not None and context.name in PASS_OF:
        return (PASS_OF[context.name],)
    if not order or guided is None:
        return None
    return order if guided else ("cond",)
