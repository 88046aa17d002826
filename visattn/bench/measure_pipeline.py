"""How long a denoising step and a generation take, dense and by a plan."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from visattn.attention import choose_backend
from visattn.bench.architectures import Architecture, layers_of, step_inputs
from visattn.bench.measure_attention import WrongResult, check
from visattn.bench.timing import Time, take_turns
from visattn.cost.clock import wall
from visattn.generation import Job, run_job
from visattn.geometry.layout import TokenLayout
from visattn.inject import Observation, observe, sparse
from visattn.inject.attachment import Attachment, attached
from visattn.inject.layers.compiled_layer import Call
from visattn.inject.layers.head_groups import is_dense
from visattn.inject.layers.layer import Layer
from visattn.inject.layers.measured import executed
from visattn.patterns import HeadPattern, Pattern, Skip
from visattn.plan import ANY, Plan
from visattn.plan.read import as_plan

__all__ = ["GenerationTime", "StepTime", "time_generation", "time_step"]

GUIDANCE = 5.0  # above 1, so that a step has two passes
Attend = Callable[..., torch.Tensor]
Around = Callable[..., torch.Tensor]  # of a layer, its attend, and the arguments of that


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
    dense_clock, planned_clock = Clock(device), Clock(device)
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


def backend_of(model: Any) -> str:
    """The backend that ``auto`` takes for a denoiser. It is named to ``sparse``, so that a plan
    runs as it is written, also where ``auto`` would rather have heads dense."""
    size = model.config.attention_head_dim
    return choose_backend(
        "auto", torch.empty(1, 1, 1, size, dtype=model.dtype, device=model.device)
    ).backend


class Denoising:
    """A denoiser at the middle step of a generation; to a plan it is a pipeline that stands there.

    Args:
        architecture, model: as ``time_step`` takes them.
    """

    def __init__(self, architecture: Architecture, model: Any) -> None:
        self.transformer = model
        self.device = torch.device(model.device)
        self.number = architecture.steps // 2
        timesteps = torch.linspace(1000, 0, architecture.steps + 1, device=self.device)[:-1]
        self.scheduler = SimpleNamespace(timesteps=timesteps)
        self._current_timestep = timesteps[self.number]
        self._guidance_scale = GUIDANCE
        self.calls = step_inputs(architecture, model, self._current_timestep)

    def step(self) -> torch.Tensor:
        """What the denoiser gives for both passes."""
        outs = []
        for name, arguments in self.calls:
            with self.transformer.cache_context(name):
                outs.append(self.transformer(**arguments, return_dict=False)[0])
        return torch.cat(outs)

    def watched(self, attachment: Attachment) -> torch.Tensor:
        """The same with an attachment of ``watch`` on the denoiser, for this step only."""
        attachment.install()
        try:
            return self.step()
        finally:
            attachment.remove()


def watch(denoising: Denoising, plan: Plan | None, around: Around) -> Attachment:
    """A plan for a denoiser, or none, which gives the attention of every layer to ``around``. It is
    not on the denoiser yet."""

    def nothing(observation: Observation) -> None:
        """Observed layers are caught whether or not they have a plan."""

    backend = backend_of(denoising.transformer)
    planned = nullcontext() if plan is None else sparse(denoising, plan, backend=backend)
    with planned, observe(denoising, nothing):
        own = attached(denoising.transformer)
    assert own is not None
    for layer in own.layers:
        layer.attend = functools.partial(around, layer, layer.attend)  # type: ignore[method-assign]
    return own


class Clock:
    """Sums up the seconds of attention calls, step by step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[float] = []
        self._spans: list[tuple[Any, Any]] = []

    def around(self, layer: Layer, attend: Attend, *arguments: Any) -> torch.Tensor:
        """A call of attention, timed."""
        begin = self._now()
        out = attend(*arguments)
        self._spans.append((begin, self._now()))
        return out

    def run(self, denoising: Denoising, attachment: Attachment) -> None:
        """A step, and what its attention took."""
        self._spans.clear()
        denoising.watched(attachment)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.sums.append(sum(a.elapsed_time(b) for a, b in self._spans) / 1e3)
        else:
            self.sums.append(sum(b - a for a, b in self._spans))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return wall(self.device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Checked(NamedTuple):
    """What a step that was checked has shown: as ``StepTime`` names it."""

    layout: TokenLayout
    density: float | None
    notes: tuple[str, ...]


def check_step(denoising: Denoising, plan: Plan) -> Checked:
    """The checks of ``time_step``.

    Raises:
        WrongResult: one failed.
    """
    dense = denoising.step()
    noise = float((denoising.step() - dense).abs().max())
    watched = denoising.watched(watch(denoising, None, _pass_on))
    error = float((watched - dense).abs().max())
    if not error <= noise:
        raise WrongResult(
            f"a step without a plan is off by {error:.2e} when it is watched, where {noise:.2e} is "
            "allowed; it is not timed"
        )
    witness = Witness()
    attachment = watch(denoising, plan, witness.around)
    denoising.watched(attachment)
    reasons = Counter(layer.reason for layer in attachment.layers if layer.reason is not None)
    return Checked(
        layout=TokenLayout.from_tokens(attachment.latest),
        density=mean(witness.densities),
        notes=tuple(f"{count} layers: {reason}" for reason, count in reasons.items()),
    )


def _pass_on(layer: Layer, attend: Attend, *arguments: Any) -> torch.Tensor:
    return attend(*arguments)


class Witness:
    """Sees what the heads of a step run, and holds each static pattern to exact attention once."""

    def __init__(self) -> None:
        self.densities: list[float | None] = []  # of each call and part of its batch
        self._known: dict[Pattern, float] = {}  # that were held to it, with their densities

    def around(
        self,
        layer: Layer,
        attend: Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        *rest: Any,
    ) -> torch.Tensor:
        """A call of attention, checked."""
        before = layer.sparse_calls
        out = attend(query, key, value, call, *rest)
        if layer.sparse_calls == before:
            self.densities.append(1.0)
            return out
        tensors = [query, key, value, out]
        if not call.heads_first:
            tensors = [x.transpose(1, 2) for x in tensors]
        moments = layer.attachment.moments(len(query))
        lengths = layer.lengths(query, call)
        for number, (phase, pass_) in enumerate(moments):
            heads = layer.table.get((phase, pass_)) or layer.table.get((phase, ANY), ())
            sample = number * len(query) // len(moments)
            own = slice(sample, sample + 1)
            texts = None if lengths is None else lengths[own]
            kept = [
                self._held(layer, pattern, [x[own, head : head + 1] for x in tensors], texts)
                for head, pattern in enumerate(heads)
            ]
            self.densities.append(mean(kept) if kept else 1.0)
        return out

    def _held(
        self,
        layer: Layer,
        pattern: HeadPattern,
        tensors: list[torch.Tensor],
        text_lengths: torch.Tensor | None,
    ) -> float | None:
        """The density of a pattern, whose result on one head is checked if it is new; ``tensors``
        are queries, keys, values and output ``[1, 1, L, D]``; text_lengths: ``[1, texts]``."""
        if not isinstance(pattern, Pattern):
            return executed(layer, pattern)
        if pattern not in self._known:
            layout = layer.attachment.layout
            self._known[pattern] = pattern.density(layout)
            if not isinstance(pattern, Skip) and not is_dense(pattern, layout):
                q, k, v, out = tensors
                check(out, q, k, v, pattern, layout, text_lengths)
        return self._known[pattern]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """What is allocated at most during a call, with all that was there before, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return int(torch.cuda.max_memory_allocated(device))
