"""``guide``: adds guidance by a perturbed pass to pipelines that have no such guidance."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from visattn.guidance.edits.steer import enter
from visattn.guidance.guiders.cfg_slope import call_arguments, not_linear, slope
from visattn.guidance.guiders.cfg_zero_star import CFGZeroStar
from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample
from visattn.guidance.guiders.guidance import Guidance, InPass
from visattn.guidance.guiders.perturbation import Perturbation
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.call_state import caller
from visattn.inject.hooks.class_swap import Next, add_handler, handlers_of, remove_handler
from visattn.inject.hooks.run_state import Context
from visattn.inject.models.denoisers import describe, known_denoisers
from visattn.pipelines.family import Family

__all__ = ["guide"]

logger = logging.getLogger("visattn")


class _Guided:
    """Handles the calls of a denoiser: returns guided predictions.

    Args:
        pipe: the pipeline; None means the denoiser is used without one.
        role: of the denoiser.
        model: the denoiser.
        family: of the denoiser.
        perturbations: guidances by a perturbed pass.
        zero: CFG-Zero*; None means it is not used.
        pipe_arguments: arguments of the pipeline's call, which are set before each call.
    """

    def __init__(
        self,
        pipe: Any,
        role: str,
        model: torch.nn.Module,
        family: Family,
        perturbations: Sequence[Perturbation],
        zero: CFGZeroStar | None,
        pipe_arguments: dict[str, Any],
    ) -> None:
        self.pipe, self.role, self.model, self.family = pipe, role, model, family
        self.perturbations, self.zero = perturbations, zero
        self.pipe_arguments = pipe_arguments
        self.in_perturbed_pass = False
        # the last conditional prediction of each thread or task, for its unconditional pass
        self.conds: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
        self.zero_applied = False  # whether CFG-Zero* changed a prediction

    @property
    def has_effect(self) -> bool:
        """Whether predictions may change."""
        return bool(self.perturbations) or self.zero is not None

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = attached(self.model)
        assert attachment is not None
        with attachment.turn.taken():
            if self.in_perturbed_pass:
                return inner(*args, **kwargs)
            return self._call(attachment, inner, args, kwargs)

    def _call(
        self, attachment: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
        attachment.note(arguments)  # a denoiser that is compiled as a whole does not do this
        with ExitStack() as stack:
            for perturbation in self.perturbations:
                cache = perturbation.caches.get(self.role)
                if cache is not None:
                    cache.outputs.clear()
                    if not perturbation.idle and cache.is_reusable(arguments):
                        stack.enter_context(cache.recording())
            output = inner(*args, **kwargs)
        attachment.note(arguments)  # an inner guidance may have made other calls
        batch = arguments["hidden_states"].shape[0]
        passes = attachment.passes(batch)
        if passes is None and self.pipe is None:
            passes = ("cond",)  # a denoiser without a pipeline
        if passes is None:
            raise ValueError(
                "guidance cannot be added, as "
                + attachment.unknown("pass", "another pipeline of the family", "guide")
            )
        step, steps = attachment.step()
        sample = sample_of(output)
        guided = self._perturbed(attachment, arguments, inner, sample, passes, step, steps)
        for perturbation in self.perturbations:
            for cache in perturbation.caches.values():
                cache.outputs.clear()
        if self.zero is not None:
            guided = self._zero_star(sample, guided, passes, step, steps)
        return output if guided is sample else with_sample(output, guided)

    def _perturbed(
        self,
        attachment: Attachment,
        arguments: dict[str, Any],
        inner: Next,
        sample: torch.Tensor,
        passes: tuple[str, ...],
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """Return the predictions; ``w (c - p)`` over the slope is added to the conditional one."""
        active = [
            perturbation
            for perturbation in self.perturbations
            if not perturbation.idle and perturbation.guidance.active(step, steps)
        ]
        if not active or "cond" not in passes:
            return sample
        num_samples = sample.shape[0] // len(passes)
        first = passes.index("cond") * num_samples
        rows = None if len(passes) == 1 else slice(first, first + num_samples)
        cond = sample if rows is None else sample[rows]
        cond_acc = cond.to(torch.promote_types(cond.dtype, torch.float32))
        timestep = arguments.get("timestep")
        cfg_slope = slope(self.pipe, self.role, self.pipe_arguments, timestep, step, steps)
        added = torch.zeros_like(cond_acc)
        cond_arguments = {
            name: part_of(name, value, sample.shape[0], rows) for name, value in arguments.items()
        }
        for perturbation in active:
            perturbed = self._pass(
                attachment, perturbation, cond_arguments, inner, rows, step, steps
            )
            weight = perturbation.guidance.scale / cfg_slope
            added += weight * (cond_acc - perturbed.to(cond_acc.dtype))
        guided = (cond_acc + added).to(cond.dtype)
        if rows is None:
            return guided
        predictions = sample.clone()
        predictions[rows] = guided
        return predictions

    def _pass(
        self,
        attachment: Attachment,
        perturbation: Perturbation,
        arguments: dict[str, Any],
        inner: Next,
        rows: slice | None,
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """Return the perturbed prediction."""
        before = attachment.context
        self.in_perturbed_pass = True
        with ExitStack() as stack:
            stack.callback(setattr, self, "in_perturbed_pass", False)
            cache_context = getattr(type(self.model), "cache_context", None)
            if cache_context is not None:  # a cache of steps gets a separate state for the pass
                stack.enter_context(cache_context(self.model, "perturbed"))
            stack.callback(setattr, attachment, "context", before)
            attachment.context = Context("perturbed", step, steps)
            stack.enter_context(perturbation.on())
            if self.role in perturbation.caches:
                stack.enter_context(perturbation.caches[self.role].replaying(rows))
            return sample_of(inner(**arguments))

    def _zero_star(
        self,
        sample: torch.Tensor,
        guided: torch.Tensor,
        passes: tuple[str, ...],
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """Return the predictions of CFG-Zero*: ``s u`` instead of ``u``."""
        assert self.zero is not None
        zero_init = self.zero.zero_init
        if zero_init and (step is None or steps is None):
            raise ValueError(
                "CFGZeroStar predicts 0 at the first steps, and the step is not known; guide the "
                "pipeline that runs"
            )
        num_zero = zero_init if isinstance(zero_init, int) else zero_init * (steps or 0)
        if zero_init and (step or 0) < num_zero:
            self.zero_applied = True
            return torch.zeros_like(guided)
        by_pass = dict(zip(passes, sample.chunk(len(passes)), strict=True))
        if "uncond" not in by_pass:
            if "cond" in by_pass:
                self.conds[caller()] = by_pass["cond"]
            return guided
        cond = by_pass.get("cond", self.conds.get(caller()))
        if cond is None:
            raise ValueError(
                f"CFGZeroStar scales the unconditional prediction by the conditional one, but "
                f"{type(self.pipe).__name__} runs the unconditional pass first"
            )
        uncond = by_pass["uncond"]
        num_samples = uncond.shape[0]
        cond = cond[:num_samples]  # the rows after the prompts' samples are of other texts
        first = passes.index("uncond") * num_samples
        self.zero_applied = True
        predictions = guided.clone()
        predictions[first : first + num_samples] = _scaled(cond, uncond)
        return predictions


def _is_guiding(handler: object) -> bool:
    return isinstance(handler, _Guided) and handler.has_effect


def _scaled(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Return ``s u`` with ``s = <c, u> / |u|^2`` for each sample."""
    c, u = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (cond, uncond))
    s = (c * u).sum(1) / ((u * u).sum(1) + 1e-8)
    return (s.reshape(-1, *[1] * (uncond.ndim - 1)) * uncond).to(uncond.dtype)


@contextmanager
def guide(
    pipe: Any,
    guidances: Guidance | CFGZeroStar | InPass | Sequence[Guidance | CFGZeroStar | InPass],
    *,
    reuse_prefix: bool = True,
) -> Iterator[None]:
    """Guide a pipeline inside a ``with`` block, with or without classifier-free guidance. After the
    block the pipeline computes as before, also after an error.

    For its conditional prediction ``c`` the denoiser returns ``c + (w / slope) (c - p)``. The slope
    is the factor of ``c`` in the classifier-free guidance of the pipeline, so the pipeline gets
    ``u + g (c - u) + w (c - p)``. The further pass has the conditional prompt. It computes only the
    blocks from the first perturbed one on.

    Inside the block one thread or asyncio task at a time may run the denoiser; others get an error.

    Args:
        pipe: a diffusers pipeline of a known family, with or without a plan; or a denoiser, which
            is guided without classifier-free guidance. The perturbed pass runs the patterns of the
            conditional one, unless the plan has patterns for it.
        guidances: one or several. Their ``w (c - p)`` are added. NAG acts inside every pass.
        reuse_prefix: False computes all blocks of the further pass. All blocks are also computed if
            a cache of steps is on, a control net adds to blocks, or the denoiser is compiled as a
            whole.

    Raises:
        TypeError: ``guidances`` has something else.
        ValueError: a guidance names a layer, head or block that does not exist, or is of another
            model; another ``guide`` guides the pipeline already; at the end of the block, a
            guidance was never applied.

    Warns:
        The guidance of the pipeline is not linear, as with ``guidance_rescale``. The result is then
        approximate.

    Example:
        >>> from visattn import SoftPAG, guide
        >>> from visattn.guidance import CFGZeroStar
        >>> with guide(pipe, [SoftPAG(heads={1: [0]}), CFGZeroStar(zero_init=0)]):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
    """
    kinds = (Guidance, CFGZeroStar, InPass)
    listed = list(guidances) if isinstance(guidances, Sequence) else [guidances]
    for guidance in listed:
        if not isinstance(guidance, kinds):
            raise TypeError(
                f"guidances has {guidance!r}; it must be guidances of visattn.guidance, such as "
                "SoftPAG(heads) (edits such as Perturb go to visattn.steer)"
            )
    zero = next((guidance for guidance in listed if isinstance(guidance, CFGZeroStar)), None)
    if sum(isinstance(guidance, CFGZeroStar) for guidance in listed) > 1:
        raise ValueError("guidances has CFGZeroStar twice; give it once")
    perturbed = [guidance for guidance in listed if isinstance(guidance, Guidance)]
    known = known_denoisers(pipe)
    for guidance in perturbed:
        guidance.fits({role: describe(model, family) for role, (model, family) in known.items()})
    is_denoiser = isinstance(pipe, torch.nn.Module)
    pipe_or_none = None if is_denoiser else pipe
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        perturbations = [
            Perturbation(stack, pipe, guidance, reuse_prefix) for guidance in perturbed
        ]
        if not perturbations:
            enter(stack, pipe, {})  # attaches what knows the passes
        handlers = []
        for role, (model, family) in known.items():
            target = pipe if is_denoiser else getattr(pipe, role)
            handler = _Guided(pipe_or_none, role, model, family, perturbations, zero, arguments)
            handlers.append(handler)
            if handler.has_effect and any(map(_is_guiding, handlers_of(target))):
                raise ValueError(
                    f"the {role} is guided already; give all guidances to one guide, as in "
                    "guide(pipe, [one, other])"
                )
            add_handler(target, handler)
            stack.callback(remove_handler, target, handler)
        if not is_denoiser:
            listener = _listener(pipe, arguments)
            add_handler(pipe, listener)
            stack.callback(remove_handler, pipe, listener)
        checks = [each.put(stack, pipe) for each in listed if isinstance(each, InPass)]
        yield
        for check in (*(perturbation.check for perturbation in perturbations), *checks):
            check()
        if zero is not None and not any(handler.zero_applied for handler in handlers):
            raise ValueError(
                "CFGZeroStar was never applied: the pipeline did not run, or ran without "
                "classifier-free guidance"
            )


def _listener(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Return a handler that keeps the arguments of the pipeline's call."""
    warned: set[str] = set()

    def listen(_: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments.clear()
        arguments.update(call_arguments(pipe, args, kwargs))
        reason = not_linear(arguments)
        if reason is not None and reason not in warned:
            warned.add(reason)
            logger.warning("guidance is approximate: %s", reason)
        return inner(*args, **kwargs)

    return listen
