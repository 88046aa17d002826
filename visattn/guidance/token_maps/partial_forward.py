"""A denoiser's forward up to the last layer that is read, with a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from visattn.guidance.edits.block_edits import block_paths
from visattn.guidance.edits.read_tokens import Reading
from visattn.guidance.edits.steer import Steering
from visattn.inject.attachment import attached
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.hooks.run_state import Context
from visattn.patterns import Pattern
from visattn.pipelines.family import Family

__all__ = ["LayerMean", "PartialForward"]


class _Reached(Exception):
    """The last layer that is read has been."""


class LayerMean:
    """A sink of readings with a gradient: their mean over layers. The last ends the forward."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.readings: list[Reading] = []

    def begin(self, layers: frozenset[str]) -> None:
        """Wait for the readings of some layers."""
        self.missing, self.readings = set(layers), []

    def __call__(self, reading: Reading) -> None:
        if reading.layer not in self.missing:  # a block that is run again for the gradient
            return
        self.missing.discard(reading.layer)
        self.readings.append(reading)
        if not self.missing:
            raise _Reached

    def maps(self, normalise: str) -> torch.Tensor:
        """``[samples, tokens, frames, height, width]``; the readings are let go."""
        every, self.readings = self.readings, []
        columns = torch.stack([own.columns for own in every]).mean(0)
        if normalise == "real":
            real = torch.stack([own.real for own in every if own.real is not None]).mean(0)
            columns = columns / real[..., None].clamp_min(torch.finfo(real.dtype).tiny)
        maps: torch.Tensor = columns.mT.unflatten(2, every[0].grid.shape)
        return maps


class PartialForward:
    """Runs a denoiser as far as its readouts need.

    Args:
        stack: closing it leaves the blocks as they were.
        model, family: the denoiser; steering: with the readouts, off otherwise; sink: of them.
        recompute: the blocks before the last that is read keep their inputs only, and run again for
            the gradient. Where a plan has dynamic patterns they do not, since these may choose
            otherwise the second time.
    """

    def __init__(
        self,
        stack: ExitStack,
        model: torch.nn.Module,
        family: Family,
        steering: Steering,
        sink: LayerMean,
        recompute: bool,
    ) -> None:
        self.model, self.steering, self.sink, self.recompute = model, steering, sink, recompute
        self.on = False
        self.wanted = frozenset(path for _, where in steering.edits for path in where)
        paths = [path for own in block_paths(model, family) for path in own]
        read = [n for n, path in enumerate(paths) if self._reads(path)]
        handler = self._block
        for path in paths[: max(read, default=0)]:
            block = model.get_submodule(path)
            add_handler(block, handler)
            stack.callback(remove_handler, block, handler)

    def _reads(self, path: str) -> bool:
        return any(layer.startswith(path + ".") for layer in self.wanted)

    def _block(self, _: Any, inner: Next, args: Any, kwargs: Any) -> Any:
        if not (self.on and self._recomputes()):
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    def _recomputes(self) -> bool:
        own = attached(self.model)
        rules = () if own is None else own.plan.rules
        return self.recompute and all(
            isinstance(head, Pattern) for rule in rules for head in rule.heads
        )

    @contextmanager
    def reading(self, step: int, steps: int) -> Iterator[None]:
        """Inside, calls are conditional ones that are read, by nobody else. The gradient is taken
        inside too."""
        own = attached(self.model)
        assert own is not None
        assert isinstance(own.editor, Steering)
        context, parameters = own.context, [p for p in self.model.parameters() if p.requires_grad]
        with ExitStack() as stack:
            stack.callback(setattr, own, "context", context)
            own.context = Context("cond", step, steps)
            stack.enter_context(own.editor.reading_only(self.steering))
            for switch in (self, self.steering):
                stack.callback(setattr, switch, "on", False)
                switch.on = True
            for parameter in parameters:  # whose gradients would keep the activations
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            yield

    def __call__(self, arguments: dict[str, Any]) -> None:
        """Let the sink have the readings of a call.

        Raises:
            RuntimeError: a layer that is to be read was not called.
        """
        self.sink.begin(self.wanted)
        try:  # past the handlers of calls, which are for those of the pipeline
            torch.nn.Module.__call__(self.model, **arguments)
        except _Reached:
            return
        missing = ", ".join(sorted(self.sink.missing))
        raise RuntimeError(
            f"the forward of {type(self.model).__name__} did not come by {missing}, whose "
            "attention is to be read; take a processor of another kind off it"
        )
