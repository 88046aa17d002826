"""Calls of a denoiser on the dense trajectory, run again under plans: the error of the model's own
output, and the time of a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from visattn.cost import now
from visattn.inject import Observation, observe, sparse
from visattn.inject.attachment import attached
from visattn.inject.models.denoisers import models_of
from visattn.plan import Plan
from visattn.runtime.private_names import guidance_scale, second_guidance_scale
from visattn.tasks.result_store import StoredResult

__all__ = ["CallRecorder", "RecordedCall", "Replay"]


@dataclass(frozen=True)
class RecordedCall:
    """A call of a denoiser: where it stood, what it got and what it gave.

    Attributes:
        role, name: of the denoiser, and what the pipeline calls the pass, or None.
        step: from 0; schedule: the timesteps of the generation; guidance: its scale, or None.
        passes: in the batch, where they are known.
        arguments: of the forward; output: its first result.
    """

    role: str
    name: str | None
    step: int
    schedule: torch.Tensor
    guidance: float | None
    passes: tuple[str, ...] | None
    arguments: Mapping[str, Any]
    output: torch.Tensor


class CallRecorder:
    """Keeps the calls of a pipeline's denoisers at some steps.

    Args:
        pipe: the pipeline; steps: that are kept.
        true_scale: of classifier-free guidance, where the pipeline does not say it: what some say
            is what their model is told.
    """

    def __init__(
        self, pipe: Any, steps: Collection[int], true_scale: float | None = None
    ) -> None:
        self.pipe, self.steps, self.true_scale = pipe, steps, true_scale
        self.calls: list[RecordedCall] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, generations are recorded."""
        handles = []
        with observe(self.pipe, _nothing):  # which makes step and pass known
            for role, model in models_of(self.pipe).items():
                if attached(model) is not None:
                    hook = _Hook(self, role)
                    handles.append(model.register_forward_hook(hook, with_kwargs=True))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def item(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What is kept of a generation."""
        tensors: dict[str, torch.Tensor] = {}
        calls = [
            {
                "role": own.role,
                "name": own.name,
                "step": own.step,
                "guidance": own.guidance,
                "passes": None if own.passes is None else list(own.passes),
                "schedule": _put(own.schedule, tensors),
                "arguments": _put(dict(own.arguments), tensors),
                "output": _put(own.output, tensors),
            }
            for own in self.calls
        ]
        return {"calls": calls}, tensors

    @staticmethod
    def read(item: StoredResult, device: torch.device) -> list[RecordedCall]:
        """The calls of an item, on a device."""
        return [
            RecordedCall(
                role=own["role"],
                name=own["name"],
                step=own["step"],
                schedule=_take(own["schedule"], item.tensors, device),
                guidance=own["guidance"],
                passes=None if own["passes"] is None else tuple(own["passes"]),
                arguments=_take(own["arguments"], item.tensors, device),
                output=_take(own["output"], item.tensors, device),
            )
            for own in item.value["calls"]
        ]


class _Hook:
    def __init__(self, recorder: CallRecorder, role: str) -> None:
        self.recorder, self.role = recorder, role

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        own = attached(model)
        assert own is not None
        step, _ = own.step()
        if step not in self.recorder.steps:
            return
        arguments = dict(zip(own.names, args, strict=False)) | kwargs
        arguments.pop("return_dict", None)
        first = output[0] if isinstance(output, tuple) else output.sample
        guidance = self.recorder.true_scale
        if guidance is None:
            pipe = self.recorder.pipe
            guidance = guidance_scale(pipe)
            if self.role == "transformer_2":
                guidance = second_guidance_scale(pipe, guidance)
        assert step is not None
        self.recorder.calls.append(
            RecordedCall(
                role=self.role,
                name=None if own.context is None else own.context.name,
                step=step,
                schedule=self.recorder.pipe.scheduler.timesteps.clone(),
                guidance=float(guidance) if isinstance(guidance, (int, float)) else None,
                passes=own.passes(len(first)),
                arguments=_copied(arguments),
                output=first.detach().clone(),
            )
        )


class PipelineStandIn:
    """To a plan, the pipeline that stands at a recorded call."""

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self.__dict__.update(models)
        self.scheduler = SimpleNamespace(timesteps=None)
        self._current_timestep: torch.Tensor | None = None
        self._guidance_scale: float | None = None
        self._visattn_passes: tuple[str, ...] | None = None


class Replay:
    """Recorded calls, run again.

    Args:
        pipe: whose denoisers they are of; calls: in the order of their generations.
    """

    def __init__(self, pipe: Any, calls: Sequence[RecordedCall]) -> None:
        if not calls:
            raise ValueError("calls is empty; record a generation first")
        self.models, self.calls = models_of(pipe), list(calls)
        self.stand = PipelineStandIn(self.models)

    @torch.no_grad()
    def error(self, plan: Plan, *, backend: str = "auto") -> float:
        """How far the guided output of the denoisers is from the dense one when each call alone
        runs under a plan: ``|e' - e|^2 / |e|^2``, the mean over the recorded steps; ``e = u + s (c
        - u)`` with guidance of scale ``s``. Infinite where it is not finite."""
        with sparse(self.stand, plan, backend=backend, guard=False):
            found = [(own, self._run(own)) for own in self.calls]
        return _guided_error(found)

    @torch.no_grad()
    def seconds(self, plan: Plan | None, *, backend: str = "auto") -> float:
        """Seconds of the recorded calls, one after the other."""
        planned = (
            nullcontext()
            if plan is None
            else sparse(self.stand, plan, backend=backend, guard=False)
        )
        with planned:
            device = self.calls[0].output.device
            begin = now(device)
            for own in self.calls:
                self._run(own)
            return now(device) - begin

    @torch.no_grad()
    def observed(self, observer: Any, number: int) -> None:
        """Run one call dense, with its attention shown to an observer."""
        with observe(self.stand, observer):
            self._run(self.calls[number])

    def part(self, numbers: Sequence[int]) -> Replay:
        """Some of the calls."""
        out = object.__new__(Replay)
        out.models, out.stand = self.models, self.stand
        out.calls = [self.calls[number] for number in numbers]
        return out

    def _run(self, own: RecordedCall) -> torch.Tensor:
        model: Any = self.models[own.role]
        self.stand.scheduler.timesteps = own.schedule
        self.stand._current_timestep = own.schedule[own.step]
        self.stand._guidance_scale = own.guidance
        self.stand._visattn_passes = own.passes
        named = own.name is not None and hasattr(model, "cache_context")
        with model.cache_context(own.name) if named else nullcontext():
            out: torch.Tensor = model(**own.arguments, return_dict=False)[0]
        return out


def _guided_error(found: Sequence[tuple[RecordedCall, torch.Tensor]]) -> float:
    """The mean over steps; neighbouring calls of one step are its passes."""
    steps: list[list[tuple[RecordedCall, torch.Tensor]]] = []
    for own, out in found:
        last = steps[-1][-1][0] if steps else None
        alike = last is not None and (last.role, last.step) == (own.role, own.step)
        several = own.passes is None or len(own.passes) == 1
        seen = {call.passes for call, _ in steps[-1]} if steps else set()
        if alike and several and own.passes not in seen:
            steps[-1].append((own, out))
        else:
            steps.append([(own, out)])
    errors = []
    for calls in steps:
        dense: dict[str, torch.Tensor] = {}
        planned: dict[str, torch.Tensor] = {}
        for number, (own, out) in enumerate(calls):
            names = own.passes or (str(number),)
            pairs = zip(names, own.output.chunk(len(names)), out.chunk(len(names)), strict=True)
            for name, a, b in pairs:
                dense[name], planned[name] = a.double(), b.double()
        scale = calls[0][0].guidance
        exact, other = _guide(dense, scale), _guide(planned, scale)
        error = float((other - exact).square().sum() / exact.square().sum())
        errors.append(error if error == error else float("inf"))
    return sum(errors) / len(errors)


def _guide(passes: Mapping[str, torch.Tensor], scale: float | None) -> torch.Tensor:
    if scale is not None and {"cond", "uncond"} <= set(passes):
        return passes["uncond"] + scale * (passes["cond"] - passes["uncond"])
    return torch.cat(list(passes.values()))


def _nothing(observation: Observation) -> None:
    """Shown calls are not looked at."""


def _copied(value: Any) -> Any:
    """A value without the tensors of a running generation, which may change them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        items = map(_copied, value)
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _put(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON, its tensors beside."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "items"
        return {kind: [_put(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"object": {key: _put(item, tensors) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(
        f"the denoiser got an argument of {type(value).__name__}, which cannot be recorded"
    )


def _take(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]].to(device)
    if "list" in value:
        return [_take(item, tensors, device) for item in value["list"]]
    if "items" in value:
        return tuple(_take(item, tensors, device) for item in value["items"])
    if "object" in value:
        return {key: _take(item, tensors, device) for key, item in value["object"].items()}
    return value["value"]
