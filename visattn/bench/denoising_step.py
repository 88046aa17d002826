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
# Replaces a call of attention; takes the layer, its attend function, and the arguments of that.
Around = Callable[..., torch.Tensor]


class Denoising:
    """A denoiser at the middle step of a generation. It has the attributes of a pipeline at that
    step, so that plans can be applied to it.

    Args:
        architecture: the denoiser and the size of its input.
        model: the model of ``build``.
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
        """Return the outputs of the denoiser for all passes."""
        outs = []
        for name, arguments in self.calls:
            with self.transformer.cache_context(name):
                outs.append(self.transformer(**arguments, return_dict=False)[0])
        return torch.cat(outs)

    def watched(self, attachment: Attachment) -> torch.Tensor:
        """Run the step with an attachment of ``watch``, which is removed after it."""
        attachment.install()
        try:
            return self.step()
        finally:
            attachment.remove()


def watch(denoising: Denoising, plan: Plan | None, around: Around) -> Attachment:
    """Return an attachment of a plan, or of none, that runs the attention calls of every layer
    through ``around``. It is not installed yet."""

    def nothing(observation: Observation) -> None:
        """Does nothing: observed layers are intercepted even if they have no plan."""

    backend = backend_of(denoising.transformer)
    planned = nullcontext() if plan is None else sparse(denoising, plan, backend=backend)
    with planned, observe(denoising, nothing):
        attachment = attached(denoising.transformer)
    assert attachment is not None
    for layer in attachment.layers:
        layer.attend = functools.partial(around, layer, layer.attend)  # type: ignore[method-assign]
    return attachment


class AttentionClock:
    """Measures the seconds that a step spends in attention calls; ``sums`` has one value a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: list[float] = []
        self._spans: list[tuple[Any, Any]] = []

    def around(self, layer: Layer, attend: Attend, *arguments: Any) -> torch.Tensor:
        """Run a call of attention and time it."""
        begin = self._now()
        out = attend(*arguments)
        self._spans.append((begin, self._now()))
        return out

    def run(self, denoising: Denoising, attachment: Attachment) -> None:
        """Run a step and append the seconds of its attention calls to ``sums``."""
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
    """Return the backend that ``auto`` chooses for a denoiser. It is passed to ``sparse`` by name,
    so that a plan runs exactly as written: ``auto`` itself may run heads dense if that is
    faster."""
    size = model.config.attention_head_dim
    return choose_backend(
        "auto", torch.empty(1, 1, 1, size, dtype=model.dtype, device=model.device)
    ).backend


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the largest number of bytes that are allocated on a GPU during a call, with those
    allocated before it; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return int(torch.cuda.max_memory_allocated(device))
