"""Times of a denoising step and of a generation, dense and by a plan."""

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
    """Times of one denoising step with guidance, in seconds.

    Attributes:
        layers: number of layers that ran.
        parameters: number of parameters of the denoiser with these layers.
        tokens: the token layout in written form.
        calls: calls of the denoiser in a step: two if each pass of guidance is one call, else one.
        step: index of the timed step.
        steps: number of steps of a generation.
        density: mean kept share over layers, passes and heads at this step: of the pairs for static
            patterns, of the blocks for dynamic ones; None if a pattern counts neither.
        dense: time of the step without a plan.
        planned: time of the step with the plan.
        dense_attention: time of the dense step inside the attention calls of the layers that plans
            apply to (self-attention, or joint attention with the text).
        planned_attention: the same time of the step with the plan.
        share: share of attention in the time of the dense step.
        speedup: dense time / planned time, round by round.
        predicted: speedup by Amdahl's law, 1 / (1 - share * (1 - density)), if the time of
            attention were proportional to the density and nothing were added; None without a
            density.
        dense_peak: most bytes allocated during a dense step, weights included; None unless on a
            GPU.
        planned_peak: the same for the step with the plan.
        backend: the backend that computed sparse attention.
        notes: the reasons why layers of the plan stayed dense.

    Example:
        >>> from visattn.bench import Architecture, build, time_step
        >>> config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        ...           "ffn_dim": 64, "text_dim": 32}
        >>> small = Architecture("WanTransformer3DModel", 64, 64, 9, 8, config)
        >>> time = time_step(small, build(small), "diagonal(8)", repeats=1)
        >>> time.layers, time.calls, time.step, time.steps
        (1, 2, 25, 50)
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
        """Return the fields as JSON values; a time has its median, quartiles and samples."""
        return _numbers(self)


@dataclass(frozen=True)
class GenerationTime:
    """Times of one generation in seconds, from the prompt to the frames.

    Attributes:
        dense: time without a plan.
        planned: time with the plan.
        speedup: dense time / planned time, round by round.

    Example:
        >>> from visattn.bench import time_generation
        >>> from visattn.generation import Job
        >>> job = Job("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        >>> time = time_generation(pipe, "diagonal(0.5)", job, repeats=1)
        >>> time.planned.median > 0
        True
    """

    dense: Time
    planned: Time
    speedup: Time

    def numbers(self) -> dict[str, Any]:
        """Return the fields as JSON values; a time has its median, quartiles and samples."""
        return _numbers(self)


def _numbers(times: StepTime | GenerationTime) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Time) else value
        for name, value in vars(times).items()
    }


@torch.no_grad()
def time_step(
    architecture: Architecture,
    model: Any,
    plan: Plan | HeadPattern | str,
    *,
    repeats: int = 5,
) -> StepTime:
    """Check a plan on a denoiser, then time a denoising step with and without it in turn.

    The step is the middle one of a generation, with classifier-free guidance. No state is kept
    between calls: the state of dynamic patterns is new in each, so that ``Reuse`` is timed at a
    step that selects blocks. The time of attention is that from the call of diffusers' attention
    function to its return, by the wall clock, or by events on a GPU. The dense step that is
    compared with runs on the unmodified model.

    Two checks come first. The step with watched attention calls and without a plan must give the
    same result as the unmodified step, up to the difference of two unmodified steps (bit-identical
    on a deterministic device). Each static pattern of the plan is compared with exact attention on
    some rows of one head that runs it. The video is not compared with the dense one: with random
    weights this would mean nothing.

    The plan runs exactly as written, on the backend that ``auto`` chooses for this device: no head
    is run dense because that would be faster.

    Args:
        architecture: the denoiser and the size of the video.
        model: the model of ``build(architecture)``.
        plan: the plan, as ``apply_plan`` takes it.
        repeats: number of timed rounds, after one that is not counted.

    Returns:
        The times.

    Raises:
        TypeError: ``plan`` is no plan.
        ValueError: there is no such plan, or it is for another model or grid.
        WrongResult: a check failed; nothing is timed.

    Example:
        >>> from visattn.bench import Architecture, build, time_step
        >>> config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        ...           "ffn_dim": 64, "text_dim": 32}
        >>> small = Architecture("WanTransformer3DModel", 64, 64, 9, 8, config)
        >>> time = time_step(small, build(small), "diagonal(8)", repeats=1)
        >>> time.planned.median > time.planned_attention.median > 0
        True
    """
    plan, denoising = as_plan(plan), Denoising(architecture, model)
    checked = check_step(denoising, plan)
    device = denoising.device
    dense_clock, planned_clock = AttentionClock(device), AttentionClock(device)
    runs = (
        denoising.step,
        functools.partial(dense_clock.run, denoising, watch(denoising, None, dense_clock.around)),
        functools.partial(
            planned_clock.run, denoising, watch(denoising, plan, planned_clock.around)
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
    """Time whole generations with and without a plan in turn: text encoder, denoising, decoder.

    The plan runs exactly as written, as in ``time_step``.

    Args:
        pipe: a pipeline without a plan.
        plan: the plan, as ``apply_plan`` takes it.
        job: the prompt and the options of the generation.
        repeats: number of timed rounds, after one that is not counted.

    Returns:
        The times.

    Raises:
        TypeError: ``plan`` is no plan, or the pipeline refuses the job.
        ValueError: there is no such plan, it is for another model or grid, or the pipeline refuses
            the job.
        GenerationError: the pipeline failed.

    Example:
        >>> from visattn.bench import time_generation
        >>> from visattn.generation import Job
        >>> job = Job("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        >>> time = time_generation(pipe, "diagonal(0.5)", job, repeats=1)
        >>> sorted(time.numbers())
        ['dense', 'planned', 'speedup']
    """
    plan, backend = as_plan(plan), backend_of(pipe.transformer)

    def planned() -> None:
        with sparse(pipe, plan, backend=backend):
            run_job(pipe, job)

    runs = (functools.partial(run_job, pipe, job), planned)
    dense, sparse_times = take_turns(runs, repeats, torch.device(pipe.device), whole=True)
    return GenerationTime(dense, sparse_times, _ratios(dense, sparse_times))


def _ratios(a: Time, b: Time) -> Time:
    return Time.of([x / y for x, y in zip(a.samples, b.samples, strict=True)])
