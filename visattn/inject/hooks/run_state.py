"""Where a denoising loop is: the step, how many there are, and the passes in the batch."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from visattn.inject.hooks.running import is_announced, run_of
from visattn.runtime.private_names import (
    begin_index,
    current_timestep,
    guidance_scale,
    has_current_timestep,
    step_index,
)

__all__ = [
    "Batch",
    "Context",
    "PipeRef",
    "index_of",
    "pass_named",
    "passes_in",
    "runs",
    "schedule_of",
    "step_of",
]

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


def current_of(pipe: Any) -> torch.Tensor | None:
    """The timestep at which a pipeline stands: as it says it, or else, while its call is under way,
    as its scheduler counts."""
    current, timesteps = current_timestep(pipe), schedule_of(pipe)
    if isinstance(current, torch.Tensor):
        return current
    if timesteps is None or run_of(pipe) is None:
        return None
    index = index_of(pipe) or 0
    return timesteps[index] if index < len(timesteps) else None


def index_of(pipe: Any) -> int | None:
    """The step at which the scheduler of a pipeline stands; before the first step, the one that it
    was told to begin at."""
    scheduler = getattr(pipe, "scheduler", None)
    found = step_index(scheduler)
    found = begin_index(scheduler) if found is None else found
    return found if isinstance(found, int) else None


def runs(pipe: Any, timestep: torch.Tensor | None, unit: int = 1) -> bool:
    """Whether a pipeline is the one that makes a call of its denoiser: it stands at the timestep of
    the call, or at one of its present schedule where that of the call is not known. Another may
    share the denoiser and the scheduler, and one that was interrupted stays where it was. A
    pipeline whose calls are announced runs inside them. ``unit``: what it divides timesteps by."""
    timesteps = schedule_of(pipe)
    if timesteps is None:
        return False
    announced = is_announced(pipe)
    if announced and run_of(pipe) is None:
        return False
    if not announced and not has_current_timestep(pipe):
        return timestep is not None and place(timestep, timesteps) is not None
    current = current_of(pipe)
    if current is None:
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
        current = current_of(pipe)
        assert current is not None
        step = place(current, timesteps)
        if step is None:
            found = (timesteps == current.to(timesteps.device)).nonzero()
            step = int(found[0]) if len(found) else None
    return step, len(timesteps)


class Batch:
    """The passes in the batch of a pipeline. The pipeline says the scale of its guidance, and a
    dynamic one moves from step to step, through 1 as well, while the batch stays what it was: the
    scale at the first call of a schedule decides, until the batch has another size. Then guidance
    was switched off or on in between, and the present scale decides, if the size fits it."""

    def __init__(self) -> None:
        self._timesteps: object = None
        self._passes: tuple[str, ...] = ()
        self._size = 0

    def __call__(self, pipe: Any, order: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        """Those of a batch of ``size`` samples, where they are known; ``order``: of a batch that
        guidance has doubled."""
        scale = guidance_scale(pipe)
        if not isinstance(scale, (int, float)):
            return None
        now = order if scale > 1 else ("cond",)
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            now = (*now, "perturbed")
        timesteps = schedule_of(pipe)
        if timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._passes, self._size = timesteps, now, size
        if size == self._size:
            return self._passes
        fits = now != self._passes and size * len(self._passes) == self._size * len(now)
        return now if fits else None


def passes_in(
    passes: tuple[str, ...], size: int, batch: int, masked: bool
) -> tuple[str, ...] | None:
    """The passes in an attention call.

    Args:
        passes: in the batch of the denoiser, which has ``size`` samples.
        batch: samples of the call. Layers of perturbed attention guidance make two calls: one for
            the perturbed samples, which has a mask, and one for those before them.
        masked: whether the call has a mask.
    """
    if batch % len(passes) == 0 and batch == size:
        return passes
    if passes[-1] != "perturbed" or len(passes) == 1 or size % len(passes):
        return None
    each = size // len(passes)
    if masked:
        return passes[-1:] if batch == each else None
    return passes[:-1] if batch == size - each else None


def pass_named(context: Context | None) -> tuple[str, ...] | None:
    """The pass that a pipeline gives its name."""
    named = None if context is None else PASS_OF.get(context.name)
    return None if named is None else (named,)
