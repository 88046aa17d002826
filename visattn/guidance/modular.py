"""Perturbed guidance as a guider of diffusers, for its modular pipelines. Importing this module
imports diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg

from visattn.guidance.guider_config import (
    read_base,
    read_guidance,
    read_heads,
    written_base,
    written_heads,
)
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.guiders.perturbation import Perturbation
from visattn.guidance.guiders.soft_pag import SoftPAG
from visattn.guidance.head_set import HeadSet
from visattn.guidance.written_form import guidance_text
from visattn.inject.attachment import attached
from visattn.inject.hooks.call_state import caller
from visattn.inject.hooks.class_swap import Next, add_handler, handlers_of, remove_handler
from visattn.inject.hooks.run_state import Context
from visattn.inject.hooks.turn import Turn
from visattn.inject.models.denoisers import denoisers, models_of

__all__ = ["PerturbedGuidance", "SoftPerturbedGuidance"]

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_skip"
class _Passes:
    """The calls of a denoiser during a step of a guider."""

    def __init__(
        self, guider: PerturbedGuidance, denoiser: torch.nn.Module, own: Perturbation | None
    ) -> None:
        self.guider, self.denoiser, self.own = guider, denoiser, own
        self.turn = guider._turn

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.turn.check()
        guider = self.guider
        name, guider._next = guider._next, None
        try:
            return guider._call(name, self.denoiser, self.own, inner, args, kwargs)
        except BaseException:
            guider._leave()
            raise


class PerturbedGuidance(BaseGuidance):
    """``u + g (c - u) + w (c - p)``, where ``p`` is the conditional prediction as a guidance
    perturbs it. Without classifier-free guidance it is ``c + w (c - p)``; the guiders of diffusers
    have ``p + w (c - p)`` there.

    It is for modular pipelines: ``pipe.update_components(guider=PerturbedGuidance(SEG()))``. For
    others there is ``visattn.guide``.

    The further pass has the conditional inputs and computes only the blocks from the first
    perturbed one on. The denoiser is steered while the passes of a step run, and as it was after
    them. The configuration is JSON values: ``save_pretrained`` and ``from_pretrained`` are those of
    the guider, which a modular pipeline does not save with its models.

    Args:
        guidance: a guidance by a perturbed pass, such as PAG, SEG, SLG or SoftPAG, with its scale
            ``w`` and its window; or its text form, ``"SEG(sigma=2.0)"``, as the configuration has
            it. Configurations of older versions, ``{"name": "SEG", "sigma": 2.0}``, are read.
        guidance_scale: ``g``; 1 is no classifier-free guidance (0 in the original formulation).
        start, stop: shares of the steps in which there is classifier-free guidance, as of every
            guider.
        guidance_rescale: how far the deviation of the prediction is made that of ``c``, from 0 to 1
            ("Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891).
        use_original_formulation: ``c + g (c - u) + w (c - p)``.
        enabled: False is the conditional prediction alone.
        base: a guider of diffusers that combines c and u alone (BASES: CFG-Zero*, adaptive
            projected guidance and others), or its configuration: what it gives stands in place of
            ``u + g (c - u)``, and its parameters in place of guidance_scale, start, stop,
            guidance_rescale and use_original_formulation.

    Raises:
        TypeError, ValueError: an argument is something else; at a step, layers, heads or blocks
            that the denoiser does not have, or a denoiser in which nothing was reached.
    """

    _input_predictions: Any = [COND, UNCOND, PERTURBED]  # noqa: RUF012
    base: BaseGuidance | None

    def __init__(
        self,
        guidance: Guidance | str | Mapping[str, object],
        guidance_scale: float = 3.0,
        start: float = 0.0,
        stop: float = 1.0,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        enabled: bool = True,
        base: BaseGuidance | Mapping[str, object] | None = None,
    ) -> None:
        own = read_guidance(guidance)
        text = guidance_text(own)
        given = (guidance_scale, start, stop, guidance_rescale, use_original_formulation)
        if base is not None and given != (3.0, 0.0, 1.0, 0.0, False):
            raise ValueError(
                "base has its own guidance_scale, start, stop, guidance_rescale and "
                "use_original_formulation; give them to it alone"
            )
        self._begin(own, guidance_scale, guidance_rescale, use_original_formulation)
        super().__init__(start, stop, enabled)
        self.register_to_config(  # type: ignore[no-untyped-call]
            guidance=text,
            guidance_scale=guidance_scale,
            start=start,
            stop=stop,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            enabled=enabled,
            base=None if base is None else written_base(base),
        )
        self.base = None if base is None else read_base(base)

    def _begin(self, guidance: Guidance, scale: float, rescale: float, original: bool) -> None:
        self.guidance = guidance
        self.base = None
        self.guidance_scale, self.guidance_rescale = scale, rescale
        self.use_original_formulation = original
        self._next: str | None = None  # the pass whose call of the denoiser comes next
        self._stack = ExitStack()  # of what is on the denoiser during a step
        self._turn = Turn("denoiser")
        self._caller: object = None  # who began the step

    # ---- the passes of a step

    @property
    def passes(self) -> list[str]:
        """The passes of this step in their order. The perturbed one follows the conditional one,
        so that what it reuses is kept no longer than that."""
        found = [COND]
        if self._perturbs():
            found.append(PERTURBED)
        if self._guides():
            found.append(UNCOND)
        return found

    @property
    def num_conditions(self) -> int:
        return len(self.passes)

    @property
    def is_conditional(self) -> bool:
        number = self._count_prepared - 1
        return not 0 <= number < self.num_conditions or self.passes[number] != UNCOND

    def _guides(self) -> bool:
        """Whether there is classifier-free guidance at this step."""
        if self.base is not None:
            return self._enabled and bool(self.base.num_conditions > 1)
        none = 0.0 if self.use_original_formulation else 1.0
        if not self._enabled or math.isclose(self.guidance_scale, none):
            return False
        if self._num_inference_steps is None:
            return True
        steps = self._num_inference_steps
        return int(self._start * steps) <= self._step < int(self._stop * steps)

    def _perturbs(self) -> bool:
        """Whether there is a perturbed pass at this step."""
        if not self._enabled or not self.guidance.scale:
            return False
        if self._num_inference_steps is None:
            return True
        return self.guidance.active(self._step, self._num_inference_steps)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        self._turn.check()  # before anything of another one's step changes
        self._leave()  # what an interrupted step has left
        self._caller = caller()
        super().set_state(step, num_inference_steps, timestep)
        if self.base is not None:
            self.base.set_state(step, num_inference_steps, timestep)
        if not self._enabled or not self.guidance.scale:
            return
        every = range(num_inference_steps)
        if not any(self.guidance.active(number, num_inference_steps) for number in every):
            raise ValueError(
                f"{type(self.guidance).__name__} has start={self.guidance.start}, "
                f"stop={self.guidance.stop}, which leave none of {num_inference_steps} steps; a "
                "scale of 0 is no perturbed guidance"
            )

    def prepare_inputs(self, data: Any) -> list[Any]:
        if self.base is not None:  # which may begin anew at the first step
            self.base.prepare_inputs(data)
        return [self._prepare_batch(data, int(own == UNCOND), own) for own in self.passes]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[Any]:
        if self.base is not None:
            self.base.prepare_inputs_from_block_state(data, input_fields)
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(own == UNCOND), own)
            for own in self.passes
        ]

    # ---- the denoiser

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        if self._caller not in (None, caller()):
            raise RuntimeError(
                "another thread or asyncio task has begun a step with this guider, which keeps the "
                "state of one request; run one request at a time, or give each a guider and a "
                "denoiser of its own"
            )
        super().prepare_models(denoiser)
        if self._count_prepared == 1:
            self._enter(denoiser)
        self._next = self.passes[self._count_prepared - 1]

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._count_prepared >= self.num_conditions:
            self._leave()

    def _enter(self, denoiser: torch.nn.Module) -> None:
        """Have the calls of a denoiser go by us until the last pass of the step."""
        self._leave()
        self._caller = caller()
        turns = [one.turn for one in handlers_of(denoiser) if isinstance(one, _Passes)]
        (model,) = models_of(denoiser).values()
        before = attached(model)
        for turn in turns if before is None else (*turns, before.turn):
            turn.check()
        self.guidance.fits(denoisers(denoiser))
        with ExitStack() as stack:
            stack.enter_context(self._turn.taken())
            own = Perturbation(stack, denoiser, self.guidance, True) if self._perturbs() else None
            attachment = attached(model)
            if attachment is not None:
                stack.enter_context(attachment.turn.taken())
            handle = _Passes(self, denoiser, own)
            add_handler(denoiser, handle)
            stack.callback(remove_handler, denoiser, handle)
            self._stack = stack.pop_all()

    def _leave(self) -> None:
        """Leave the denoiser as it was."""
        self._next = self._caller = None
        self._stack.close()

    def _call(
        self,
        name: str | None,
        denoiser: torch.nn.Module,
        own: Perturbation | None,
        inner: Next,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of the denoiser in the pass of a name; None: it is none of ours."""
        (model,) = models_of(denoiser).values()
        attachment = attached(model)
        if name is None or attachment is None:
            return inner(*args, **kwargs)
        prefix = None if own is None else next(iter(own.caches.values()))
        with ExitStack() as stack:
            stack.callback(setattr, attachment, "context", attachment.context)
            attachment.context = Context(name, self._step, self._num_inference_steps)
            if own is not None and prefix is not None and not own.idle:
                arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
                if name == COND and prefix.is_reusable(arguments):
                    stack.enter_context(prefix.recording())
                elif name == PERTURBED:
                    stack.enter_context(own.on())
                    stack.enter_context(prefix.replaying(None))
            out = inner(*args, **kwargs)
        if own is not None and name == PERTURBED:
            own.check()
        return out

    # ---- their combination

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_skip: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """The guided prediction."""
        pred = pred_cond
        if self.base is not None and self._enabled:
            pred = self.base.forward(pred_cond, pred_uncond).pred
        elif pred_uncond is not None:
            base = pred_cond if self.use_original_formulation else pred_uncond
            pred = base + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_cond_skip is not None:
            pred = pred + self.guidance.scale * (pred_cond - pred_cond_skip)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(  # type: ignore[no-untyped-call]
                pred, pred_cond, self.guidance_rescale
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class SoftPerturbedGuidance(PerturbedGuidance):
    """``PerturbedGuidance`` by SoftPAG, whose parameters are the guider's own.

    Args:
        guidance_scale, start, stop, guidance_rescale, use_original_formulation, enabled: as of
            PerturbedGuidance.
        perturbed_scale: ``w``; 0 is no further pass.
        heads, strength, policy, target: as of SoftPAG, also where they are left out.
        perturbed_start, perturbed_stop: shares of the steps in which there is ``w (c - p)``; the
            start is part of it.

    Raises:
        TypeError, ValueError: as of PerturbedGuidance.
    """

    def __init__(
        self,
        guidance_scale: float = 3.0,
        perturbed_scale: float | None = None,
        heads: HeadSet | Mapping[int | str, object] | None = None,
        strength: float | None = None,
        policy: str | None = None,
        target: str | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        perturbed_start: float = 0.0,
        perturbed_stop: float = 1.0,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        enabled: bool = True,
    ) -> None:
        softpag = SoftPAG(
            heads if isinstance(heads, HeadSet) else read_heads(heads),
            strength,
            perturbed_scale,
            policy=cast("Any", policy),
            target=cast("Any", target),
            start=float(perturbed_start),
            stop=float(perturbed_stop),
        )
        self._begin(softpag, guidance_scale, guidance_rescale, use_original_formulation)
        BaseGuidance.__init__(self, start, stop, enabled)
        self.register_to_config(  # type: ignore[no-untyped-call]
            guidance_scale=guidance_scale,
            perturbed_scale=softpag.scale,
            heads=written_heads(softpag.heads),
            strength=softpag.strength,
            policy=softpag.policy,
            target=softpag.target,
            start=start,
            stop=stop,
            perturbed_start=perturbed_start,
            perturbed_stop=perturbed_stop,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            enabled=enabled,
        )
