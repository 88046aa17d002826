"""``update_latents``: latents of a pipeline that knows nothing of it go down the gradient of a
loss."""

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

CORRECTORS = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
Losses = dict[int, list[torch.Tensor]]


@dataclass
class _Change:
    """What has been added to the latents of a step."""

    step: int
    latents: torch.Tensor  # as the denoiser was given them
    added: torch.Tensor

    def of(self, latents: torch.Tensor) -> bool:
        """Whether latents are those that were changed, but for rounding."""
        own = self.latents
        if latents.shape != own.shape or latents.device != own.device:
            return False
        error = 4 * max(torch.finfo(x.dtype).eps for x in (latents, own))
        wide = own.float()
        return torch.allclose(latents.float(), wide, error, error * float(wide.abs().max()))


class _Latents:
    """The latents of a generation, on their way to the denoiser and to the scheduler."""

    def __init__(self, pipe: Any, update: LatentUpdate) -> None:
        self.pipe, self.update = pipe, update
        self.now: _Change | None = None
        self.maps: torch.Tensor | None = None  # of the step before
        self.losses: Losses = {}

    def begin(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline: a generation that has nothing of an earlier one."""
        self.now = self.maps = None
        self.losses.clear()
        return inner(*args, **kwargs)

    def changed(
        self, step: int, steps: int, latents: torch.Tensor, partial: PartialForward, call: Any
    ) -> _Change:
        """Update the latents of a step. ``call``: makes the arguments of a forward from latents."""
        update, own = self.update, latents.detach().float()
        size, bound = update.size(step, steps), update.bound(step, steps)
        seen = self.losses[step] = []
        with partial.reading(step, steps):
            loss, slope, maps = self._slope(own, latents.dtype, partial, call)
            seen.append(loss)
            for _ in range(0 if bound is None else update.refinements):
                above = loss > (bound or 0.0)
                if not bool(above.any()):
                    break
                own = own - size * slope * above.reshape(-1, *[1] * (own.ndim - 1))
                loss, slope, maps = self._slope(own, latents.dtype, partial, call)
                seen.append(loss)
            own = own - size * slope
        self.maps = maps
        return _Change(step, latents.detach().clone(), own - latents.detach().float())

    def _slope(
        self, latents: torch.Tensor, dtype: torch.dtype, partial: PartialForward, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss of each sample, its gradient by the latents, and the maps."""
        with torch.enable_grad():
            own = latents.clone().requires_grad_(True)
            partial(call(own.to(dtype)))
            with plain_torch():
                maps = partial.sink.maps(self.update.normalise)
                loss = self.update.losses(maps, self.maps)
                (slope,) = torch.autograd.grad(loss.sum(), own)
        return loss.detach(), slope, maps.detach()

    def step(self, step: Any) -> Any:
        """A scheduler's ``step`` that is given the latents as they were changed."""
        signature = inspect.signature(step)

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            change, self.now = self.now, None
            if change is None:
                return step(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            if not change.of(sample):
                raise ValueError(
                    f"{type(self.pipe).__name__} gives its denoiser other latents than its "
                    "scheduler, so that an update does not fit both; it cannot be updated"
                )
            bound.arguments["sample"] = (sample + change.added).to(sample.dtype)
            with _corrected(self.pipe.scheduler, change.added):
                return step(*bound.args, **bound.kwargs)

        return stepped


class _Updated:
    """The calls of a denoiser with latents that were changed."""

    def __init__(
        self, role: str, model: torch.nn.Module, latents: _Latents, partial: PartialForward
    ) -> None:
        self.role, self.model, self.latents, self.partial = role, model, latents, partial

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = attached(self.model)
        assert own is not None
        with own.turn.taken():
            return self._call(own, inner, args, kwargs)

    def _call(
        self, own: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(own.names, args, strict=False)), **kwargs}
        given = arguments["hidden_states"]
        step, steps, passes = self._moment(own, arguments)
        if not self.latents.update.active(step, steps):
            return inner(*args, **kwargs)
        parts = given.chunk(len(passes))
        change = self.latents.now
        if change is None or change.step != step or not change.of(parts[0]):
            change = self.latents.now = self._change(arguments, parts, passes, step, steps)
        new = [(part.float() + change.added).to(part.dtype) for part in parts]
        arguments["hidden_states"] = torch.cat(new)
        return inner(**arguments)

    def _moment(
        self, own: Attachment, arguments: dict[str, Any]
    ) -> tuple[int, int, tuple[str, ...]]:
        """Step, number of steps and passes of a call that is about to be made."""
        own.note(arguments)
        step, steps = own.step()
        passes = own.passes(arguments["hidden_states"].shape[0])
        if step is None or steps is None or passes is None:
            raise ValueError(
                "latents cannot be updated, as "
                + own.unknown("step or pass", "another pipeline of the family", "guide")
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
        if "cond" not in passes:
            raise ValueError(
                f"the {passes[0]} pass of {self.role} comes before the conditional one, by which "
                "latents are updated; this pipeline cannot be updated"
            )
        if getattr(self.model, "is_cache_enabled", False):
            raise ValueError(
                f"{self.role} has a cache of steps, which an update would run past; disable_cache "
                "before"
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "there are no gradients in torch.inference_mode; run the pipeline in torch.no_grad"
            )
        at, each = passes.index("cond"), parts[0].shape[0]
        rows = None if len(passes) == 1 else slice(at * each, (at + 1) * each)
        batch = each * len(passes)
        mine = {name: part_of(name, value, batch, rows) for name, value in arguments.items()}

        def call(latents: torch.Tensor) -> dict[str, Any]:
            return {**mine, "hidden_states": latents}

        return self.latents.changed(step, steps, parts[at], self.partial, call)


@contextmanager
def update_latents(pipe: Any, update: LatentUpdate) -> Iterator[Losses]:
    """Update the latents of a pipeline inside a ``with`` block before its steps; after it the
    pipeline computes what it did before, also when there was an error.

    Before the first pass of a step the denoiser runs conditionally up to the last layer that is
    read, with a gradient; all passes of the step, and the scheduler, get the latents that result.

    Args:
        pipe: a diffusers pipeline of a known family whose denoiser is given the latents alone, all
            passes in one call or the conditional one first; with a plan or without. With ``guide``
            and ``steer`` in either order.
        update: such as ``AStar`` or ``AttendAndExcite``.

    Yields:
        The losses ``[samples]`` by step, in the order in which they were met, of the last
        generation.

    Schedulers with a corrector (UniPC, SA-Solver) make the sample of a step anew from that of the
    step before, which would take the update back; it is added to what they make.

    Raises:
        TypeError, ValueError: ``pipe`` is no pipeline, a layer or token is not there, or the
            pipeline's latents cannot be updated; on leaving, that no step was.
    """
    if not isinstance(update, LatentUpdate):
        raise TypeError(
            f"update={update!r} must be a LatentUpdate, such as AStar(tokens=(2, 5), real=...)"
        )
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(pipe, torch.nn.Module) or scheduler is None:
        raise TypeError(f"pipe={type(pipe).__name__} must be a pipeline, which has a scheduler")
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
                f"{type(update).__name__} has updated no latents: the pipeline did not run, or not "
                "the steps that the update is for"
            )


@contextmanager
def _corrected(scheduler: Any, added: torch.Tensor) -> Iterator[None]:
    """Inside, the corrector of a scheduler gives samples to which something is added."""
    with ExitStack() as stack:
        for name in CORRECTORS:
            correct = getattr(scheduler, name, None)
            if correct is not None:
                _replace(stack, scheduler, name, _adding(correct, added))
        yield


def _adding(correct: Any, added: torch.Tensor) -> Any:
    def corrected(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = correct(*args, **kwargs)
        return (found + added).to(found.dtype)

    return corrected


def _refuse_more_channels(role: str, model: torch.nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    given, made = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    if None not in (given, made) and given != made:
        raise ValueError(
            f"{role} is given {given} channels and makes {made}: what lies beside the latents, as "
            "an image to begin with, is not told apart; take a text-to-video pipeline"
        )


def _replace(stack: ExitStack, own: Any, name: str, new: Any) -> None:
    """Give an object another method until the stack is closed."""
    before = vars(own).get(name)
    setattr(own, name, new)
    if before is None:
        stack.callback(vars(own).pop, name, None)
    else:
        stack.callback(setattr, own, name, before)
