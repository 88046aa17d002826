"""One denoising step of a model, whose attention calls can be watched and timed."""


from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from visattn.attention import choose_backend
from visattn.bench.architectures import Architecture, step_inputs
from visattn.cost.clock import wall
from visattn.inject import Observation, observe, sparse
from visattn.inject.attachment import Attachment, attached
from visattn.inject.layers.layer import Layer
from visattn.plan import Plan

__all__ = ["Around", "Attend", "AttentionClock", "Denoising", "backend_of", "peak_bytes", "watch"]

GUIDANCE = 5.0  # above 1, so that a step has two passes
Attend = Callable[..., torch.Tensor]
Around = Callable[..., torch.Tensor]  # of a layer, its attend, and the arguments of that


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


class AttentionClock:
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


def backend_of(model: Any) -> str:
    """The backend that ``auto`` takes for a denoiser. It is named to ``sparse``, so that a plan
    runs as it is written, also where ``auto`` would rather have heads dense."""
    size = model.config.attention_head_dim
    return choose_backend(
        "auto", torch.empty(1, 1, 1, size, dtype=model.dtype, device=model.device)
    ).backend


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """What is allocated at most during a call, with all that was there before, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return int(torch.cuda.max_memory_allocated(device))
