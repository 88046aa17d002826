"""How long a denoising step and a generation take, dense and by a plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from visattn.bench.architectures import Architecture, layers_of
from visattn.bench.check_step import check_step
from visattn.bench.denoising_step import AttentionClock, Denoising, backend_of, peak_bytes, watch
from visattn.bench.timing import Time, take_turns
from visattn.generation import Job, run_job
from visattn.inject import sparse
from visattn.patterns import HeadPattern
from visattn.plan import Plan
from visattn.plan.read import as_plan

__all__ = ["GenerationTime", "StepTime", "time_generation", "time_step"]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one denoising step with guidance.

    Attributes:
        layers: that ran; parameters: of the denoiser with them; tokens: as a layout is written.
        calls: of the denoiser in a step: two where each pass is a call of its own, else one.
        step, steps: the step that was timed, from 0, of how many.
        density: what the plan keeps at this step, the mean over layers, passes and heads: of the
            pairs, or, where a dynamic pattern chose, of the blocks; None where none is counted.
        dense, planned: the step without us and with the plan.
        dense_attention, planned_attention: of it, inside attention calls of the layers that plans
            speak of (self-attention, or joint attention with the text).
        share: of attention in a dense step.
        speedup: dense over planned, turn by turn.
        predicted: Amdahl's 1 / (1 − share · (1 − density)): as if attention took its density's part
            of the dense time, and nothing were added; None without a density.
        dense_peak, planned_peak: bytes allocated at most during a step, weights included, on a GPU;
            else None.
        backend: that computed what is sparse.
        notes: why layers stayed dense that the plan wanted sparse.
    """

    layers: int
    parameters: int
    tokens: str
    calls: int
    step: int
    steps: int
    density: float | None
    dense: Time
    planned: Time
    dense_attention: Time
    planned_attention: Time
    share: Time
    speedup: Time
    predicted: float | None
    dense_peak: int | None
    planned_peak: int | None
    backend: str
    notes: tuple[str, ...]

    def numbers(self) -> dict[str, Any]:
        """JSON values; a time is an object of its median, quartiles and samples."""
        return _numbers(self)


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of one generation, from the prompt to the frames: dense, with the plan, and the one
    over the other, turn by turn."""

    dense: Time
    planned: Time
    speedup: Time

    def numbers(self) -> dict[str, Any]:
        """JSON values; a time is an object of its median, quartiles and samples."""
        return _numbers(self)


def _numbers(found: StepTime | GenerationTime) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Time) else value
        for name, value in vars(found).items()
    }


@torch.no_grad()
def time_step(
    architecture: Architecture,
    model: Any,
    plan: Plan | HeadPattern | str,
    *,
    repeats: int = 5,
) -> StepTime:
    """Check a plan on a denoiser, then time a denoising step without it and with it, in turn.

    The step is the middle one of a generation, with classifier-free guidance. Every call stands
    alone: what dynamic patterns carry from step to step begins anew, so that ``Reuse`` is timed at
    a step that chooses. Attention is timed where plans take hold of it (``visattn.inject``), from
    the call of diffusers' attention function to its return, by the clock, or by events on a GPU;
    the dense step that is compared with is another one, with nothing of ours on the model.

    Checked first: watched, but without a plan, the step gives what it gives without us, to the bit
    where the device repeats itself to the bit; and each static pattern that the plan runs is held,
    on some rows of a head that runs it, to exact attention of the same queries and keys. How far
    the plan's video is from the dense one is not looked at: with random weights it says nothing.

    The plan runs as it is written, on the backend that ``auto`` takes here, named: no head is left
    dense because it would be slow.

    Args:
        architecture: what the model is, and the size of the video; model: of its ``build``.
        plan: as ``apply_plan`` takes it.
        repeats: of each, after a first that is not counted.

    Raises:
        TypeError, ValueError: no such plan, or it is for another model or grid.
        WrongResult: a check failed; nothing is timed.
    """
    own, denoising = as_plan(plan), Denoising(architecture, model)
    checked = check_step(denoising, own)
    device = denoising.device
    dense_clock, planned_clock = AttentionClock(device), AttentionClock(device)
    runs = (
        denoising.step,
        functools.partial(dense_clock.run, denoising, watch(denoising, None, dense_clock.around)),
        functools.partial(
            planned_clock.run, denoising, watch(denoising, own, planned_clock.around)
        ),
    )
    dense, clocked, planned = take_turns(runs, repeats, device, whole=True)
    dense_attention, planned_attention = (
        Time.of(clock.sums[-repeats:]) for clock in (dense_clock, planned_clock)
    )
    share, density = _ratios(dense_attention, clocked), checked.density
    predicted = None if density is None else 1 / (1 - share.median * (1 - density))
    return StepTime(
        layers=layers_of(model.config),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=str(checked.layout),
        calls=len(denoising.calls),
        step=denoising.number,
        steps=architecture.steps,
        density=density,
        dense=dense,
        planned=planned,
        dense_attention=dense_attention,
        planned_attention=planned_attention,
        share=share,
        speedup=_ratios(dense, planned),
        predicted=predicted,
        dense_peak=peak_bytes(runs[0], device),
        planned_peak=peak_bytes(runs[2], device),
        backend=backend_of(model),
        notes=checked.notes,
    )


@torch.no_grad()
def time_generation(
    pipe: Any, plan: Plan | HeadPattern | str, job: Job, *, repeats: int = 5
) -> GenerationTime:
    """Time whole generations without a plan and with it, in turn: text encoder, denoising, decoder.
    The plan runs as it is written, as in ``time_step``.

    Args:
        pipe: a pipeline without a plan; plan: as ``apply_plan`` takes it; job: what is generated.
        repeats: of each, after a first that is not counted.

    Raises:
        TypeError, ValueError: no such plan, it is for another model or grid, or the pipeline
            refuses the job.
        GenerationError: the pipeline broke down.
    """
    own, backend = as_plan(plan), backend_of(pipe.transformer)

    def planned() -> None:
        with sparse(pipe, own, backend=backend):
            run_job(pipe, job)

    runs = (functools.partial(run_job, pipe, job), planned)
    dense, other = take_turns(runs, repeats, torch.device(pipe.device), whole=True)
    return GenerationTime(dense, other, _ratios(dense, other))


def _ratios(a: Time, b: Time) -> Time:
    return Time.of([x / y for x, y in zip(a.samples, b.samples, strict=True)])
