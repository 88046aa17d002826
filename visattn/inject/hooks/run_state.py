"""The position in a denoising loop: the step, the number of steps, and the passes in the batch."""

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

# the pass by the name that a pipeline or guider gives its call
PASS_OF = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    "perturbed": "perturbed",
    "pred_cond_skip": "perturbed",
}


class Context(NamedTuple):
    """What a pipeline passes to ``model.cache_context`` for a call of its denoiser."""

    name: str
    step: int | None
    steps: int | None


class PipeRef:
    """A weak reference to a pipeline. A copy of it refers to the copy of the pipeline, or to
    none if only the denoiser was copied."""

    def __init__(self, pipe: object | None = None) -> None:
        self._ref = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> Any:
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> PipeRef:
        return PipeRef(memo.get(id(self())))

    def __reduce__(self) -> tuple[type[PipeRef], tuple[()]]:
        return PipeRef, ()


def place(timestep: torch.Tensor, timesteps: torch.Tensor) -> int | None:
    """Return the index of a timestep that is a view of the scheduler's timesteps, as a loop over
    them yields; None for another tensor."""
    if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
    return int(offset) if 0 <= offset < len(timesteps) else None


def schedule_of(pipe: Any) -> torch.Tensor | None:
    """Return the timesteps of a pipeline's scheduler, ``[steps]``; None if it has none."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def current_of(pipe: Any) -> torch.Tensor | None:
    """Return the present timestep of a pipeline: the one that it exposes, or else, during its call,
    the one that its scheduler counts."""
    current, timesteps = current_timestep(pipe), schedule_of(pipe)
    if isinstance(current, torch.Tensor):
        return current
    if timesteps is None or run_of(pipe) is None:
        return None
    index = index_of(pipe) or 0
    return timesteps[index] if index < len(timesteps) else None


def index_of(pipe: Any) -> int | None:
    """Return the present step of the scheduler of a pipeline; before the first step, the step at
    which it will begin."""
    scheduler = getattr(pipe, "scheduler", None)
    index = step_index(scheduler)
    index = begin_index(scheduler) if index is None else index
    return index if isinstance(index, int) else None


def runs(pipe: Any, timestep: torch.Tensor | None, unit: int = 1) -> bool:
    """Return whether a pipeline makes a call of its denoiser.

    Several pipelines can share a denoiser and a scheduler, and an interrupted pipeline keeps its
    old timestep. A pipeline makes the call if its present timestep is that of the call. If the
    timestep of the call is not known, its present timestep must be one of its schedule. If the
    pipeline exposes no timestep, that of the call must be a view of its schedule. A pipeline whose
    calls are announced (``Announced``) runs only inside them.

    Args:
        pipe: the pipeline.
        timestep: of the call; None: it is not known.
        unit: the pipeline divides its timesteps by this before the call.
    """
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
    return bool(timestep.amax() == now)  # image-to-video has 0 for the input frames


def step_of(
    context: Context | None, pipe: Any, timestep: torch.Tensor | None, unit: int = 1
) -> tuple[int | None, int | None]:
    """Return the step and the number of steps: as the pipeline gives them, or else the index of the
    timestep in its schedule; None for what is not known.

    Timesteps are compared by value only if the pipeline makes the call, because another pipeline
    that shares the denoiser may have the same value at another index.

    Args:
        context: what the pipeline passed to ``cache_context``; None: nothing.
        pipe: the pipeline.
        timestep: of the call; None: it is not known.
        unit: the pipeline divides its timesteps by this before the call.
    """
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
            indices = (timesteps == current.to(timesteps.device)).nonzero()
            step = int(indices[0]) if len(indices) else None
    return step, len(timesteps)


class Batch:
    """Finds the passes in the batch of a pipeline by its guidance scale.

    A dynamic scale changes from step to step and may become 1, while the batch keeps its passes.
    Therefore the scale at the first call of a schedule decides. If the batch gets another size,
    guidance was turned on or off, and the present scale decides, if the size fits it.
    """

    def __init__(self) -> None:
        self._timesteps: object = None
        self._passes: tuple[str, ...] = ()
        self._size = 0

    def __call__(self, pipe: Any, order: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        """Return the passes in a batch; None if they are not known.

        Args:
            pipe: the pipeline.
            order: the passes in a batch that guidance doubles.
            size: samples of the batch.
        """
        scale = guidance_scale(pipe)
        if not isinstance(scale, (int, float)):
            return None
        passes = order if scale > 1 else ("cond",)
        if getattr(pipe, "do_perturbed_attention_guidance", False):
            passes = (*passes, "perturbed")
        timesteps = schedule_of(pipe)
        if timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._passes, self._size = timesteps, passes, size
        if size == self._size:
            return self._passes
        fits = passes != self._passes and size * len(self._passes) == self._size * len(passes)
        return passes if fits else None


def passes_in(
    passes: tuple[str, ...], size: int, batch: int, masked: bool
) -> tuple[str, ...] | None:
    """Return the passes in an attention call; None if they are not known.

    Args:
        passes: the passes in the batch of the denoiser.
        size: samples of the batch of the denoiser.
        batch: samples of the attention call. Layers of perturbed attention guidance make two calls:
            one for the perturbed samples, which has a mask, and one for those before them.
        masked: whether the call has a mask.
    """
    if batch % len(passes) == 0 and batch == size:
        return passes
    if passes[-1] != "perturbed" or len(passes) == 1 or size % len(passes):
        return None
    pass_size = size // len(passes)
    if masked:
        return passes[-1:] if batch == pass_size else None
    return passes[:-1] if batch == size - pass_size else None


def pass_named(context: Context | None) -> tuple[str, ...] | None:
    """Return the pass of the name that a pipeline gives to its call; None for an unknown name."""
    pass_ = None if context is None else PASS_OF.get(context.name)
    return None if pass_ is None else (pass_,)
