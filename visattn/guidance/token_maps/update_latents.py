"""``update_latents``: update the latents of an unmodified pipeline by the gradient of a loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from visattn.guidance.edits.read_tokens import ReadTokens
from visattn.guidance.edits.steer import enter, place
from visattn.guidance.guiders.denoiser_io import part_of
from visattn.guidance.token_maps.latent_update import LatentUpdate
from visattn.guidance.token_maps.partial_forward import LayerMean, PartialForward
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.models.denoisers import known_denoisers
from visattn.runtime.torch_settings import plain_torch

__all__ = ["update_latents"]

# methods of schedulers that compute the sample of a step again from the previous one
CORRECTORS = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
Losses = dict[int, list[torch.Tensor]]


@dataclass
class _Change:
    """The update of the latents of a step.

    Attributes:
        step: index of the step.
        latents: the latents before the update, as the denoiser was given them.
        added: what the update adds to them.
    """

    step: int
    latents: torch.Tensor
    added: torch.Tensor

    def belongs_to(self, latents: torch.Tensor) -> bool:
        """Return whether latents are those before the update, up to rounding."""
        old = self.latents
        if latents.shape != old.shape or latents.device != old.device:
            return False
        error = 4 * max(torch.finfo(x.dtype).eps for x in (latents, old))
        expected = old.float()
        tolerance = error * float(expected.abs().max())
        return torch.allclose(latents.float(), expected, error, tolerance)


class _Latents:
    """The updates of a generation, for the latents that the denoiser and the scheduler get.

    Args:
        pipe: the pipeline.
        update: the settings of the updates.
    """

    def __init__(self, pipe: Any, update: LatentUpdate) -> None:
        self.pipe, self.update = pipe, update
        self.now: _Change | None = None
        self.maps: torch.Tensor | None = None  # maps of the previous step
        self.losses: Losses = {}

    def begin(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call of the pipeline: forget the previous generation."""
        self.now = self.maps = None
        self.losses.clear()
        return inner(*args, **kwargs)

    def changed(
        self, step: int, steps: int, latents: torch.Tensor, partial: PartialForward, call: Any
    ) -> _Change:
        """Compute the update of a step.

        Args:
            step: index of the step.
            steps: number of steps.
            latents: the latents of the conditional pass.
            partial: the forward pass up to the last layer to read.
            call: a function of latents that returns the arguments of the denoiser.
        """
        update, updated = self.update, latents.detach().float()
        size, bound = update.size(step, steps), update.bound(step, steps)
        losses = self.losses[step] = []
        with partial.reading(step, steps):
            loss, slope, maps = self._slope(updated, latents.dtype, partial, call)
            losses.append(loss)
            for _ in range(0 if bound is None else update.refinements):
                above = loss > (bound or 0.0)
                if not bool(above.any()):
                    break
                updated = updated - size * slope * above.reshape(-1, *[1] * (updated.ndim - 1))
                loss, slope, maps = self._slope(updated, latents.dtype, partial, call)
                losses.append(loss)
            updated = updated - size * slope
        self.maps = maps
        return _Change(step, latents.detach().clone(), updated - latents.detach().float())

    def _slope(
        self, latents: torch.Tensor, dtype: torch.dtype, partial: PartialForward, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of each sample, its gradient with respect to the latents, and the
        maps."""
        with torch.enable_grad():
            leaf = latents.clone().requires_grad_(True)
            partial(call(leaf.to(dtype)))
            with plain_torch():
                maps = partial.sink.maps(self.update.normalise)
                loss = self.update.losses(maps, self.maps)
                (slope,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), slope, maps.detach()

    def step(self, step: Any) -> Any:
        """Return the ``step`` of a scheduler, changed to add the update to its sample."""
        signature = inspect.signature(step)

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            change, self.now = self.now, None
            if change is None:
                return step(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            if not change.belongs_to(sample):
                raise ValueError(
                    f"{type(self.pipe).__name__} gives its denoiser other latents than its "
                    "scheduler, so its latents cannot be updated"
                )
            bound.arguments["sample"] = (sample + change.added).to(sample.dtype)
            with _corrected(self.pipe.scheduler, change.added):
                return step(*bound.args, **bound.kwargs)

        return stepped


class _Updated:
    """Handler of the calls of a denoiser, which gives it the updated latents.

    Args:
        role: role of the denoiser.
        model: the denoiser.
        latents: the updates of the generation.
        partial: the forward pass up to the last layer to read.
    """

    def __init__(
        self, role: str, model: torch.nn.Module, latents: _Latents, partial: PartialForward
    ) -> None:
        self.role, self.model, self.latents, self.partial = role, model, latents, partial

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = attached(self.model)
        assert attachment is not None
        with attachment.turn.taken():
            return self._call(attachment, inner, args, kwargs)

    def _call(
        self, attachment: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
        hidden = arguments["hidden_states"]
        step, steps, passes = self._moment(attachment, arguments)
        if not self.latents.update.active(step, steps):
            return inner(*args, **kwargs)
        parts = hidden.chunk(len(passes))
        change = self.latents.now
        if change is None or change.step != step or not change.belongs_to(parts[0]):
            change = self.latents.now = self._change(arguments, parts, passes, step, steps)
        new = [(part.float() + change.added).to(part.dtype) for part in parts]
        arguments["hidden_states"] = torch.cat(new)
        return inner(**arguments)

    def _moment(
        self, attachment: Attachment, arguments: dict[str, Any]
    ) -> tuple[int, int, tuple[str, ...]]:
        """Return the step, number of steps and passes of the next call of the denoiser."""
        attachment.note(arguments)
        step, steps = attachment.step()
        passes = attachment.passes(arguments["hidden_states"].shape[0])
        if step is None or steps is None or passes is None:
            raise ValueError(
                "latents cannot be updated, as "
                + attachment.unknown("step or pass", "another pipeline of the family", "guide")
            )
        return step, steps, passes

    def _change(
        self,
        arguments: dict[str, Any],
        parts: tuple[torch.Tensor, ...],
        passes: tuple[str, ...],
        step: int,
        steps: int,
    ) -> _Change:
        """Return the update of a step."""
        if "cond" not in passes:
            raise ValueError(
                f"the {passes[0]} pass of {self.role} runs before the conditional one, which the "
                "update needs first; the latents of this pipeline cannot be updated"
            )
        if getattr(self.model, "is_cache_enabled", False):
            raise ValueError(
                f"{self.role} has a cache enabled, which skips the update of steps; call its "
                "disable_cache() first"
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "torch.inference_mode has no gradients; run the pipeline in torch.no_grad instead"
            )
        cond, size = passes.index("cond"), parts[0].shape[0]
        rows = None if len(passes) == 1 else slice(cond * size, (cond + 1) * size)
        batch = size * len(passes)
        of_pass = {name: part_of(name, value, batch, rows) for name, value in arguments.items()}

        def call(latents: torch.Tensor) -> dict[str, Any]:
            return {**of_pass, "hidden_states": latents}

        return self.latents.changed(step, steps, parts[cond], self.partial, call)


@contextmanager
def update_latents(pipe: Any, update: LatentUpdate) -> Iterator[Losses]:
    """Update the latents of a pipeline before its steps, inside a ``with`` block. After the block,
    also after an error, the pipeline computes what it did before.

    Before the first pass of a step, the denoiser runs conditionally, with a gradient, up to the
    last layer to read. All passes of the step and the scheduler then get the updated latents.

    Schedulers with a corrector (UniPC, SA-Solver) compute the sample of a step again from that of
    the previous step, which would undo the update; it is therefore added to the corrected sample.

    Args:
        pipe: a diffusers pipeline of a known family, with a plan or without. Its denoiser must get
            nothing but the latents as its image input, and all passes in one call or the
            conditional pass first. It can be combined with ``guide`` and ``steer``, in either
            order.
        update: the update, such as ``AStar`` or ``AttendAndExcite``.

    Yields:
        The losses ``[samples]`` of the last generation by step, as lists in the order in which they
        were computed.

    Raises:
        TypeError: ``pipe`` is no pipeline, or ``update`` no LatentUpdate.
        ValueError: the pipeline has no such layer or token, or its latents cannot be updated; or,
            at the end of the block, no step was updated.

    Example:
        >>> from visattn.guidance import AStar, real_tokens, update_latents
        >>> prompt = "a red square a blue circle"
        >>> update = AStar(tokens=[2, 5], real=real_tokens(pipe.tokenizer, prompt), layers=[0])
        >>> with update_latents(pipe, update) as losses:
        ...     video = pipe(prompt, height=16, width=16, num_frames=5, num_inference_steps=2)
        >>> losses[0][0].shape  # the first loss of step 0, for each sample
        torch.Size([1])
    """
    if not isinstance(update, LatentUpdate):
        raise TypeError(
            f"update={update!r} must be a LatentUpdate, such as AStar(tokens=(2, 5), real=...)"
        )
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(pipe, torch.nn.Module) or scheduler is None:
        raise TypeError(f"pipe={type(pipe).__name__} must be a pipeline with a scheduler")
    known = known_denoisers(pipe)
    for role, (model, _) in known.items():
        _refuse_more_channels(role, model)
    latents, sink = _Latents(pipe, update), LayerMean()
    with ExitStack() as stack:
        reads = [
            ReadTokens(
                tokens=update.tokens,
                real=update.real if update.normalise == "real" else None,
                sink=sink,
                layers=update.layers,
                heads=update.heads,
                attention=update.attention or ("cross" if family.cross else "self"),
                gradient=True,
                role=role,
            )
            for role, (_, family) in known.items()
            if update.role in ("any", role)
        ]
        if not reads:
            raise ValueError(
                f"LatentUpdate(role={update.role!r}): {type(pipe).__name__} has {', '.join(known)}"
            )
        steerings = enter(stack, pipe, place(pipe, reads), on=False)
        for role, (model, family) in known.items():
            if update.role not in ("any", role):
                continue
            partial = PartialForward(stack, model, family, steerings[role], sink, update.recompute)
            updated, target = _Updated(role, model, latents, partial), getattr(pipe, role)
            add_handler(target, updated)
            stack.callback(remove_handler, target, updated)
        _replace(stack, scheduler, "step", latents.step(scheduler.step))
        begin = latents.begin
        add_handler(pipe, begin)
        stack.callback(remove_handler, pipe, begin)
        yield latents.losses
        if not latents.losses:
            raise ValueError(
                f"{type(update).__name__} has updated no latents: the pipeline did not run, or no "
                "step within start and stop"
            )


@contextmanager
def _corrected(scheduler: Any, added: torch.Tensor) -> Iterator[None]:
    """Inside the ``with`` block, add a tensor to the samples of a scheduler's corrector."""
    with ExitStack() as stack:
        for name in CORRECTORS:
            correct = getattr(scheduler, name, None)
            if correct is not None:
                _replace(stack, scheduler, name, _adding(correct, added))
        yield


def _adding(correct: Any, added: torch.Tensor) -> Any:
    """Return a corrector that adds a tensor to its sample."""

    def corrected(*args: Any, **kwargs: Any) -> torch.Tensor:
        sample: torch.Tensor = correct(*args, **kwargs)
        return (sample + added).to(sample.dtype)

    return corrected


def _refuse_more_channels(role: str, model: torch.nn.Module) -> None:
    """Raise ValueError if a denoiser gets more than the latents as its image input."""
    config: Any = getattr(model, "config", None)
    inputs, outputs = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    if None not in (inputs, outputs) and inputs != outputs:
        raise ValueError(
            f"{role} has {inputs} input channels and {outputs} output channels: its input has "
            "more than the latents, such as a first frame; use a text-to-video pipeline"
        )


def _replace(stack: ExitStack, target: Any, name: str, new: Any) -> None:
    """Replace a method of an object until the stack is closed."""
    before = vars(target).get(name)
    setattr(target, name, new)
    if before is None:
        stack.callback(vars(target).pop, name, None)
    else:
        stack.callback(setattr, target, name, before)
