"""Guidance by a perturbed pass as a guider of diffusers, for its modular pipelines. Importing this
module imports diffusers."""

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

# The passes of a step, by the names that guiders of diffusers give to their predictions.
COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_skip"


class _Passes:
    """Handles the calls of a denoiser during a step of a guider.

    Args:
        guider: the guider.
        denoiser: the denoiser.
        perturbation: the edits of the perturbed pass; None means the step has no such pass.
    """

    def __init__(
        self,
        guider: PerturbedGuidance,
        denoiser: torch.nn.Module,
        perturbation: Perturbation | None,
    ) -> None:
        self.guider, self.denoiser, self.perturbation = guider, denoiser, perturbation
        self.turn = guider._turn

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.turn.check()
        guider = self.guider
        name, guider._next = guider._next, None
        try:
            return guider._call(name, self.denoiser, self.perturbation, inner, args, kwargs)
        except BaseException:
            guider._leave()
            raise


class PerturbedGuidance(BaseGuidance):
    """A guider of modular pipelines: ``u + g (c - u) + w (c - p)``, where ``p`` is the conditional
    prediction with the perturbation of a guidance.

    Without classifier-free guidance the prediction is ``c + w (c - p)``; guiders of diffusers have
    ``p + w (c - p)``. Add it with ``pipe.update_components(guider=PerturbedGuidance(SEG()))``. For
    other pipelines use ``visattn.guide``.

    The further pass has the conditional inputs and computes only the blocks from the first
    perturbed one on. The denoiser is steered only while the passes of a step run. The configuration
    has JSON values. A modular pipeline does not save the guider with its models; use
    ``save_pretrained`` and ``from_pretrained`` of the guider.

    Args:
        guidance: a guidance by a perturbed pass, such as PAG, SEG, SLG or SoftPAG, with its scale
            ``w`` and its steps; or its text form, ``"SEG(sigma=2.0)"``, which the configuration
            has. Configurations of older versions, ``{"name": "SEG", "sigma": 2.0}``, can be read.
        guidance_scale: ``g``; 1 is no classifier-free guidance (0 in the original formulation).
        start: share of the steps at which classifier-free guidance starts.
        stop: share of the steps at which classifier-free guidance ends.
        guidance_rescale: from 0 to 1; with 1 the prediction gets the standard deviation of ``c``
            ("Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891).
        use_original_formulation: whether the prediction is ``c + g (c - u) + w (c - p)``.
        enabled: False: the prediction is ``c``.
        base: a guider of diffusers that combines ``c`` and ``u`` (one of BASES: CFG-Zero*, adaptive
            projected guidance and others), or its configuration. Its prediction replaces ``u + g (c
            - u)``, and its parameters replace guidance_scale, start, stop, guidance_rescale and
            use_original_formulation.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; at a step, the guidance names layers, heads or
            blocks that the denoiser does not have, or was never applied.

    Example:
        >>> from visattn.guidance import SEG, PerturbedGuidance
        >>> guider = PerturbedGuidance(SEG(layers=[1], sigma=2.0), guidance_scale=4.0)
        >>> guider.num_conditions
        3
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
        parsed = read_guidance(guidance)
        text = guidance_text(parsed)
        arguments = (guidance_scale, start, stop, guidance_rescale, use_original_formulation)
        if base is not None and arguments != (3.0, 0.0, 1.0, 0.0, False):
            raise ValueError(
                "base has its own guidance_scale, start, stop, guidance_rescale and "
                "use_original_formulation; give these arguments only to base"
            )
        self._begin(parsed, guidance_scale, guidance_rescale, use_original_formulation)
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
        self._next: str | None = None  # the pass of the next call of the denoiser
        self._stack = ExitStack()  # removes what is on the denoiser during a step
        self._turn = Turn("denoiser")
        self._caller: object = None  # the thread or task that started the step

    # ---- the passes of a step

    @property
    def passes(self) -> list[str]:
        """The passes of this step in their order. The perturbed one follows the conditional one, so
        the outputs that it reuses are freed early."""
        passes = [COND]
        if self._perturbs():
            passes.append(PERTURBED)
        if self._guides():
            passes.append(UNCOND)
        return passes

    @property
    def num_conditions(self) -> int:
        return len(self.passes)

    @property
    def is_conditional(self) -> bool:
        index = self._count_prepared - 1
        return not 0 <= index < self.num_conditions or self.passes[index] != UNCOND

    def _guides(self) -> bool:
        """Return whether this step has classifier-free guidance."""
        if self.base is not None:
            return self._enabled and bool(self.base.num_conditions > 1)
        neutral_scale = 0.0 if self.use_original_formulation else 1.0
        if not self._enabled or math.isclose(self.guidance_scale, neutral_scale):
            return False
        if self._num_inference_steps is None:
            return True
        steps = self._num_inference_steps
        return int(self._start * steps) <= self._step < int(self._stop * steps)

    def _perturbs(self) -> bool:
        """Return whether this step has a perturbed pass."""
        if not self._enabled or not self.guidance.scale:
            return False
        if self._num_inference_steps is None:
            return True
        return self.guidance.active(self._step, self._num_inference_steps)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        self._turn.check()  # first, so that the step of another thread or task is not changed
        self._leave()  # removes what an interrupted step left
        self._caller = caller()
        super().set_state(step, num_inference_steps, timestep)
        if self.base is not None:
            self.base.set_state(step, num_inference_steps, timestep)
        if not self._enabled or not self.guidance.scale:
            return
        steps = range(num_inference_steps)
        if not any(self.guidance.active(index, num_inference_steps) for index in steps):
            raise ValueError(
                f"{type(self.guidance).__name__} has start={self.guidance.start}, "
                f"stop={self.guidance.stop}, which select none of {num_inference_steps} steps; use "
                "scale=0 for no perturbed guidance"
            )

    def prepare_inputs(self, data: Any) -> list[Any]:
        if self.base is not None:  # it may reset its state at the first step
            self.base.prepare_inputs(data)
        return [self._prepare_batch(data, int(name == UNCOND), name) for name in self.passes]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[Any]:
        if self.base is not None:
            self.base.prepare_inputs_from_block_state(data, input_fields)
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(name == UNCOND), name)
            for name in self.passes
        ]

    # ---- the denoiser

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        if self._caller not in (None, caller()):
            raise RuntimeError(
                "another thread or asyncio task has started a step with this guider, which keeps "
                "the state of one request; run one request at a time, or give each request its own "
                "guider and denoiser"
            )
        super().prepare_models(denoiser)
        if self._count_prepared == 1:
            self._enter(denoiser)
        self._next = self.passes[self._count_prepared - 1]

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._count_prepared >= self.num_conditions:
            self._leave()

    def _enter(self, denoiser: torch.nn.Module) -> None:
        """Handle the calls of a denoiser until the last pass of the step."""
        self._leave()
        self._caller = caller()
        turns = [each.turn for each in handlers_of(denoiser) if isinstance(each, _Passes)]
        (model,) = models_of(denoiser).values()
        before = attached(model)
        for turn in turns if before is None else (*turns, before.turn):
            turn.check()
        self.guidance.fits(denoisers(denoiser))
        with ExitStack() as stack:
            stack.enter_context(self._turn.taken())
            perturbation = None
            if self._perturbs():
                perturbation = Perturbation(stack, denoiser, self.guidance, reuse_prefix=True)
            attachment = attached(model)
            if attachment is not None:
                stack.enter_context(attachment.turn.taken())
            handler = _Passes(self, denoiser, perturbation)
            add_handler(denoiser, handler)
            stack.callback(remove_handler, denoiser, handler)
            self._stack = stack.pop_all()

    def _leave(self) -> None:
        """Restore the denoiser."""
        self._next = self._caller = None
        self._stack.close()

    def _call(
        self,
        name: str | None,
        denoiser: torch.nn.Module,
        perturbation: Perturbation | None,
        inner: Next,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the denoiser in the pass ``name``; None means the call is not of this guider."""
        (model,) = models_of(denoiser).values()
        attachment = attached(model)
        if name is None or attachment is None:
            return inner(*args, **kwargs)
        cache = None if perturbation is None else next(iter(perturbation.caches.values()))
        with ExitStack() as stack:
            stack.callback(setattr, attachment, "context", attachment.context)
            attachment.context = Context(name, self._step, self._num_inference_steps)
            if perturbation is not None and cache is not None and not perturbation.idle:
                arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
                if name == COND and cache.is_reusable(arguments):
                    stack.enter_context(cache.recording())
                elif name == PERTURBED:
                    stack.enter_context(perturbation.on())
                    stack.enter_context(cache.replaying(None))
            output = inner(*args, **kwargs)
        if perturbation is not None and name == PERTURBED:
            perturbation.check()
        return output

    # ---- the combination of the predictions

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_skip: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """Return the guided prediction from ``c``, and ``u`` and ``p`` if the step has them."""
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
    """``PerturbedGuidance`` with SoftPAG. The guider has the parameters of SoftPAG.

    Args:
        guidance_scale: as of PerturbedGuidance.
        perturbed_scale: ``w``; with 0 there is no further pass; None means the default of SoftPAG.
        heads: as of SoftPAG.
        strength: as of SoftPAG.
        policy: as of SoftPAG.
        target: as of SoftPAG.
        start: as of PerturbedGuidance.
        stop: as of PerturbedGuidance.
        perturbed_start: share of the steps at which ``w (c - p)`` starts.
        perturbed_stop: share of the steps at which ``w (c - p)`` ends.
        guidance_rescale: as of PerturbedGuidance.
        use_original_formulation: as of PerturbedGuidance.
        enabled: as of PerturbedGuidance.

    Raises:
        TypeError: as of PerturbedGuidance.
        ValueError: as of PerturbedGuidance.

    Example:
        >>> from visattn.guidance import SoftPerturbedGuidance
        >>> guider = SoftPerturbedGuidance(4.0, perturbed_scale=2.0, heads={1: [0, 3]})
        >>> guider.config["heads"]
        {'1': [0, 3]}
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
