"""The forward pass of a denoiser up to the last layer to read, with a gradient."""

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
    """Raised when the last layer to read has been read, to end the forward pass."""


class LayerMean:
    """A sink for readings with a gradient, which averages them over layers. The last expected
    reading ends the forward pass."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.readings: list[Reading] = []

    def begin(self, layers: frozenset[str]) -> None:
        """Expect one reading of each of some layers.

        Args:
            layers: paths of the layers.
        """
        self.missing, self.readings = set(layers), []

    def __call__(self, reading: Reading) -> None:
        if reading.layer not in self.missing:  # a recomputed block, or another layer
            return
        self.missing.discard(reading.layer)
        self.readings.append(reading)
        if not self.missing:
            raise _Reached

    def maps(self, normalise: str) -> torch.Tensor:
        """Return the mean maps of the readings, and drop the readings.

        Args:
            normalise: ``raw``, or ``real`` to divide by the attention to all real tokens.

        Returns:
            The maps ``[samples, tokens, frames, height, width]``.
        """
        readings, self.readings = self.readings, []
        columns = torch.stack([reading.columns for reading in readings]).mean(0)
        if normalise == "real":
            real = [reading.real for reading in readings if reading.real is not None]
            mean = torch.stack(real).mean(0)
            columns = columns / mean[..., None].clamp_min(torch.finfo(mean.dtype).tiny)
        maps: torch.Tensor = columns.mT.unflatten(2, readings[0].grid.shape)
        return maps


class PartialForward:
    """Runs a denoiser up to the last layer that its readouts need.

    Args:
        stack: closing it takes the handlers off the blocks.
        model: the denoiser.
        family: the model family of the denoiser.
        steering: the steering with the readouts, which is on only inside ``reading``.
        sink: the sink of the readouts.
        recompute: whether the blocks before the last one to read keep their inputs only and run
            again for the gradient. Plans with dynamic patterns never recompute, since these
            patterns might choose differently the second time.
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
        paths = [path for stack_paths in block_paths(model, family) for path in stack_paths]
        read = [n for n, path in enumerate(paths) if self._reads(path)]
        handler = self._run_block
        for path in paths[: max(read, default=0)]:
            block = model.get_submodule(path)
            add_handler(block, handler)
            stack.callback(remove_handler, block, handler)

    def _reads(self, path: str) -> bool:
        """Return whether a block has a layer to read."""
        return any(layer.startswith(path + ".") for layer in self.wanted)

    def _run_block(self, _: Any, inner: Next, args: Any, kwargs: Any) -> Any:
        """Handle a call of a block: run it, if possible as a checkpoint."""
        if not (self.on and self._recomputes()):
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    def _recomputes(self) -> bool:
        """Return whether blocks run again for the gradient."""
        attachment = attached(self.model)
        rules = () if attachment is None else attachment.plan.rules
        return self.recompute and all(
            isinstance(head, Pattern) for rule in rules for head in rule.heads
        )

    @contextmanager
    def reading(self, step: int, steps: int) -> Iterator[None]:
        """Inside the ``with`` block, calls of the denoiser count as those of the conditional pass,
        and only this steering reads them. Compute the gradient inside the block too.

        Args:
            step: index of the denoising step.
            steps: number of steps.
        """
        attachment = attached(self.model)
        assert attachment is not None
        assert isinstance(attachment.editor, Steering)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with ExitStack() as stack:
            stack.callback(setattr, attachment, "context", attachment.context)
            attachment.context = Context("cond", step, steps)
            stack.enter_context(attachment.editor.reading_only(self.steering))
            for switch in (self, self.steering):
                stack.callback(setattr, switch, "on", False)
                switch.on = True
            for parameter in parameters:  # their gradients would keep the activations in memory
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            yield

    def __call__(self, arguments: dict[str, Any]) -> None:
        """Call the denoiser until the sink has all its readings.

        Args:
            arguments: keyword arguments of the denoiser.

        Raises:
            RuntimeError: the denoiser did not call a layer to read.
        """
        self.sink.begin(self.wanted)
        try:  # not through the call handlers, which handle the calls of the pipeline
            torch.nn.Module.__call__(self.model, **arguments)
        except _Reached:
            return
        missing = ", ".join(sorted(self.sink.missing))
        raise RuntimeError(
            f"{type(self.model).__name__} did not call {missing}, whose attention is to be read; "
            "remove custom attention processors from it"
        )
