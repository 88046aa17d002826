"""Recorded denoiser calls of the dense trajectory, replayed with plans: the error of the model
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
    """A call of a denoiser, with its position in the generation, its arguments and its output.

    Attributes:
        role: role of the denoiser.
        name: the pipeline's name of the pass, or None.
        step: the denoising step, from 0.
        schedule: the timesteps of the generation.
        guidance: the guidance scale, or None.
        passes: the passes in the batch; None if they are not known.
        arguments: arguments of the forward.
        output: the first result of the forward.
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
    """Records the calls of a pipeline's denoisers at some steps.

    Args:
        pipe: the pipeline.
        steps: the denoising steps that are recorded.
        true_scale: scale of classifier-free guidance, for pipelines whose ``guidance_scale`` is an
            input of a distilled model.
    """

    def __init__(
        self, pipe: Any, steps: Collection[int], true_scale: float | None = None
    ) -> None:
        self.pipe, self.steps, self.true_scale = pipe, steps, true_scale
        self.calls: list[RecordedCall] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the generations that run inside the context."""
        handles = []
        with observe(self.pipe, _nothing):  # without it, step and pass are not known
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
        """Return what is stored of a generation: JSON values and tensors."""
        tensors: dict[str, torch.Tensor] = {}
        calls = [
            {
                "role": call.role,
                "name": call.name,
                "step": call.step,
                "guidance": call.guidance,
                "passes": None if call.passes is None else list(call.passes),
                "schedule": _put(call.schedule, tensors),
                "arguments": _put(dict(call.arguments), tensors),
                "output": _put(call.output, tensors),
            }
            for call in self.calls
        ]
        return {"calls": calls}, tensors

    @staticmethod
    def read(item: StoredResult, device: torch.device) -> list[RecordedCall]:
        """Return the calls of a stored result of ``item``, with their tensors on a device."""
        return [
            RecordedCall(
                role=values["role"],
                name=values["name"],
                step=values["step"],
                schedule=_take(values["schedule"], item.tensors, device),
                guidance=values["guidance"],
                passes=None if values["passes"] is None else tuple(values["passes"]),
                arguments=_take(values["arguments"], item.tensors, device),
                output=_take(values["output"], item.tensors, device),
            )
            for values in item.value["calls"]
        ]


class _Hook:
    """A forward hook that records the calls of one denoiser."""

    def __init__(self, recorder: CallRecorder, role: str) -> None:
        self.recorder, self.role = recorder, role

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        attachment = attached(model)
        assert attachment is not None
        step, _ = attachment.step()
        if step not in self.recorder.steps:
            return
        arguments = dict(zip(attachment.names, args, strict=False)) | kwargs
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
                name=None if attachment.context is None else attachment.context.name,
                step=step,
                schedule=self.recorder.pipe.scheduler.timesteps.clone(),
                guidance=float(guidance) if isinstance(guidance, (int, float)) else None,
                passes=attachment.passes(len(first)),
                arguments=_copied(arguments),
                output=first.detach().clone(),
            )
        )


class PipelineStandIn:
    """An object with the attributes of a pipeline that plans read, set from a recorded call."""

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self.__dict__.update(models)
        self.scheduler = SimpleNamespace(timesteps=None)
        self._current_timestep: torch.Tensor | None = None
        self._guidance_scale: float | None = None
        self._visattn_passes: tuple[str, ...] | None = None


class Replay:
    """Runs recorded calls again.

    Args:
        pipe: the pipeline whose denoisers were recorded.
        calls: the recorded calls in the order in which they ran.

    Raises:
        ValueError: there are no calls.
    """

    def __init__(self, pipe: Any, calls: Sequence[RecordedCall]) -> None:
        if not calls:
            raise ValueError("calls is empty; record a generation first")
        self.models, self.calls = models_of(pipe), list(calls)
        self.stand_in = PipelineStandIn(self.models)

    @torch.no_grad()
    def error(self, plan: Plan, *, backend: str = "auto") -> float:
        """Return the relative error of the guided output when the calls run with a plan.

        Each call gets its recorded input, so that errors do not add up over steps. With guidance of
        scale ``s`` the output is ``e = u + s (c - u)``.

        Returns:
            ``|e' - e|^2 / |e|^2``, the mean over the recorded steps; infinity where it is not a
            number.
        """
        with sparse(self.stand_in, plan, backend=backend, guard=False):
            outputs = [(call, self._run(call)) for call in self.calls]
        return _guided_error(outputs)

    @torch.no_grad()
    def seconds(self, plan: Plan | None, *, backend: str = "auto") -> float:
        """Run the recorded calls one after the other, and return the seconds that they take."""
        planned = (
            nullcontext()
            if plan is None
            else sparse(self.stand_in, plan, backend=backend, guard=False)
        )
        with planned:
            device = self.calls[0].output.device
            begin = now(device)
            for call in self.calls:
                self._run(call)
            return now(device) - begin

    @torch.no_grad()
    def observed(self, observer: Any, number: int) -> None:
        """Run the call with an index, dense, while an observer sees its attention."""
        with observe(self.stand_in, observer):
            self._run(self.calls[number])

    def _run(self, call: RecordedCall) -> torch.Tensor:
        model: Any = self.models[call.role]
        self.stand_in.scheduler.timesteps = call.schedule
        self.stand_in._current_timestep = call.schedule[call.step]
        self.stand_in._guidance_scale = call.guidance
        self.stand_in._visattn_passes = call.passes
        named = call.name is not None and hasattr(model, "cache_context")
        with model.cache_context(call.name) if named else nullcontext():
            out: torch.Tensor = model(**call.arguments, return_dict=False)[0]
        return out


def _guided_error(outputs: Sequence[tuple[RecordedCall, torch.Tensor]]) -> float:
    """Return the mean error over steps; consecutive calls of one step are its passes."""
    steps: list[list[tuple[RecordedCall, torch.Tensor]]] = []
    for call, out in outputs:
        last = steps[-1][-1][0] if steps else None
        same_step = last is not None and (last.role, last.step) == (call.role, call.step)
        one_pass = call.passes is None or len(call.passes) == 1
        seen = {other.passes for other, _ in steps[-1]} if steps else set()
        if same_step and one_pass and call.passes not in seen:
            steps[-1].append((call, out))
        else:
            steps.append([(call, out)])
    errors = []
    for calls in steps:
        dense: dict[str, torch.Tensor] = {}
        planned: dict[str, torch.Tensor] = {}
        for number, (call, out) in enumerate(calls):
            names = call.passes or (str(number),)
            pairs = zip(names, call.output.chunk(len(names)), out.chunk(len(names)), strict=True)
            for name, a, b in pairs:
                dense[name], planned[name] = a.double(), b.double()
        scale = calls[0][0].guidance
        exact, other = _guide(dense, scale), _guide(planned, scale)
        error = float((other - exact).square().sum() / exact.square().sum())
        errors.append(error if error == error else float("inf"))
    return sum(errors) / len(errors)


def _guide(passes: Mapping[str, torch.Tensor], scale: float | None) -> torch.Tensor:
    """Return the guided output; without guidance the outputs of all passes."""
    if scale is not None and {"cond", "uncond"} <= set(passes):
        return passes["uncond"] + scale * (passes["cond"] - passes["uncond"])
    return torch.cat(list(passes.values()))


def _nothing(observation: Observation) -> None:
    """An observer that does nothing."""


def _copied(value: Any) -> Any:
    """Return a value with copies of its tensors: the generation may change the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        items = map(_copied, value)
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _put(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON values, and add its tensors to ``tensors``; ``_take`` reads it."""
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
        f"the denoiser got an argument of type {type(value).__name__}, which cannot be recorded"
    )


def _take(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    """Return the value that ``_put`` has written, with its tensors on a device."""
    if "tensor" in value:
        return tensors[value["tensor"]].to(device)
    if "list" in value:
        return [_take(item, tensors, device) for item in value["list"]]
    if "items" in value:
        return tuple(_take(item, tensors, device) for item in value["items"])
    if "object" in value:
        return {key: _take(item, tensors, device) for key, item in value["object"].items()}
    return value["value"]
