"""Perturbed guidance as a guider of diffusers, for its modular pipelines. Importing this module
imports diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg

from visattn.guidance.guidances import SoftPAG
from visattn.guidance.guide import Perturbation
from visattn.guidance.heads import HeadSet
from visattn.inject.apply import denoisers, models_of
from visattn.inject.attachment import attached
from visattn.inject.front import Next, put_front, take_front
from visattn.inject.moment import Context

__all__ = ["SoftPerturbedGuidance"]

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_skip"


class SoftPerturbedGuidance(BaseGuidance):
    """``u + g (c - u) + w (c - p)``, where ``p`` is the conditional prediction with the attention
    of some heads perturbed (SoftPAG). Without classifier-free guidance it is ``c + w (c - p)``; the
    guiders of diffusers have ``p + w (c - p)`` there.

    It is for modular pipelines: ``pipe.update_components(guider=SoftPerturbedGuidance(...))``. For
    others there is ``visattn.guide``.

    The further pass has the conditional inputs and computes only the blocks from the first
    perturbed one on. The denoiser is steered while the passes of a step run, and as it was after
    them. The configuration is JSON values, so that the guider is saved and loaded with the
    pipeline.

    Args:
        guidance_scale: ``g``; 1 is no classifier-free guidance (0 in the original formulation).
        perturbed_scale: ``w``; 0 is no further pass.
        heads, strength, policy, target: as of SoftPAG, also where they are left out. The
            configuration has numbers of heads as text, as JSON has.
        start, stop: shares of the steps in which there is classifier-free guidance, as of every
            guider.
        perturbed_start, perturbed_stop: the same for ``w (c - p)``; the start is part of it.
        guidance_rescale: how far the deviation of the prediction is made that of ``c``, from 0 to 1
            ("Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891).
        use_original_formulation: ``c + g (c - u) + w (c - p)``.
        enabled: False is the conditional prediction alone.

    Raises:
        TypeError, ValueError: an argument is something else; at a step, heads that the denoiser
            does not have, or a denoiser whose attention calls were not reached.
    """

    _input_predictions: Any = [COND, UNCOND, PERTURBED]  # noqa: RUF012

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
        super().__init__(start, stop, enabled)
        self.softpag = SoftPAG(
            heads if isinstance(heads, HeadSet) else _read(heads),
            strength,
            perturbed_scale,
            policy=cast("Any", policy),
            target=cast("Any", target),
            start=float(perturbed_start),
            stop=float(perturbed_stop),
        )
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.use_original_formulation = use_original_formulation
        self.register_to_config(  # type: ignore[no-untyped-call]
            guidance_scale=guidance_scale,
            perturbed_scale=self.softpag.scale,
            heads=_written(self.softpag.heads),
            strength=self.softpag.strength,
            policy=self.softpag.policy,
            target=self.softpag.target,
            start=start,
            stop=stop,
            perturbed_start=perturbed_start,
            perturbed_stop=perturbed_stop,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            enabled=enabled,
        )
        self._next: str | None = None  # the pass whose call of the denoiser comes next
        self._stack = ExitStack()  # of what is on the denoiser during a step

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
        none = 0.0 if self.use_original_formulation else 1.0
        if not self._enabled or math.isclose(self.guidance_scale, none):
            return False
        if self._num_inference_steps is None:
            return True
        steps = self._num_inference_steps
        return int(self._start * steps) <= self._step < int(self._stop * steps)

    def _perturbs(self) -> bool:
        """Whether there is a perturbed pass at this step."""
        if not self._enabled or not self.softpag.scale:
            return False
        if self._num_inference_steps is None:
            return True
        return self.softpag.active(self._step, self._num_inference_steps)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        self._leave()  # what an interrupted step has left
        super().set_state(step, num_inference_steps, timestep)
        every = range(num_inference_steps)
        if not any(self.softpag.active(number, num_inference_steps) for number in every):
            raise ValueError(
                f"perturbed_start={self.softpag.start}, perturbed_stop={self.softpag.stop} leave "
                f"none of {num_inference_steps} steps; perturbed_scale=0 is no perturbed guidance"
            )

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, int(own == UNCOND), own) for own in self.passes]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(own == UNCOND), own)
            for own in self.passes
        ]

    # ---- the denoiser

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
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
        self.softpag.fits(denoisers(denoiser))
        with ExitStack() as stack:
            own = Perturbation(stack, denoiser, self.softpag, True) if self._perturbs() else None

            def handle(_: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                name, self._next = self._next, None
                try:
                    return self._call(name, denoiser, own, inner, args, kwargs)
                except BaseException:
                    self._leave()
                    raise

            put_front(denoiser, handle)
            stack.callback(take_front, denoiser, handle)
            self._stack = stack.pop_all()

    def _leave(self) -> None:
        """Leave the denoiser as it was."""
        self._next = None
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
        prefix = None if own is None else next(iter(own.prefixes.values()))
        with ExitStack() as stack:
            stack.callback(setattr, attachment, "context", attachment.context)
            attachment.context = Context(name, self._step, self._num_inference_steps)
            if own is not None and prefix is not None and not own.idle:
                arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
                if name == COND and prefix.reusable(arguments):
                    stack.enter_context(prefix.keeping())
                elif name == PERTURBED:
                    stack.enter_context(own.on())
                    stack.enter_context(prefix.giving(None))
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
        if pred_uncond is not None:
            base = pred_cond if self.use_original_formulation else pred_uncond
            pred = base + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_cond_skip is not None:
            pred = pred + self.softpag.scale * (pred_cond - pred_cond_skip)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(  # type: ignore[no-untyped-call]
                pred, pred_cond, self.guidance_rescale
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _read(
    heads: Mapping[int | str, object] | None,
) -> Mapping[int | str, object] | None:
    """Heads by layer, whose numbers may be text."""
    if heads is None:
        return None
    if not isinstance(heads, Mapping):
        raise TypeError(
            f"heads={heads!r} must be a HeadSet, or heads by layer, as in {{3: {{0: 1.0}}}}"
        )
    return {
        _number(layer): {_number(head): u for head, u in own.items()}
        if isinstance(own, Mapping)
        else own
        for layer, own in heads.items()
    }


def _number(key: object) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _written(heads: HeadSet | Mapping[int | str, object] | None) -> dict[str, Any] | None:
    """The same as JSON has it."""
    if heads is None:
        return None
    layers = heads.layers if isinstance(heads, HeadSet) else heads
    out: dict[str, Any] = {}
    for layer, own in cast("Mapping[int | str, object]", layers).items():
        if isinstance(own, Mapping):
            out[str(layer)] = {str(head): float(u) for head, u in own.items()}
        else:
            out[str(layer)] = own if own is None or isinstance(own, int) else list(cast("Any", own))
    return out
