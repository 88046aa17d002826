"""How a pipeline combines its passes: what the prediction gains by a change of the conditional
one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.hooks.class_swap import kind_of

__all__ = ["call_arguments", "not_linear", "slope"]


def call_arguments(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call by name, with defaults."""
    try:
        bound = inspect.signature(kind_of(pipe).__call__).bind(pipe, *args, **kwargs)
    except TypeError:  # the pipeline itself says what is wrong with them
        return dict(kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def not_linear(given: Mapping[str, Any]) -> str | None:
    """Why a pipeline's guidance is not linear in its passes, or None."""
    rescale = given.get("guidance_rescale")
    if isinstance(rescale, (int, float)) and rescale > 0:
        return f"guidance_rescale={rescale} scales the prediction by its own deviation"
    return None


def slope(
    pipe: Any,
    role: str,
    given: Mapping[str, Any],
    timestep: torch.Tensor | None,
    step: int | None = None,
    steps: int | None = None,
) -> float:
    """``d pred / d c``: the guidance scale, 1 without classifier-free guidance.

    Args:
        pipe: the pipeline, None for a denoiser that is alone; role: of the denoiser that runs.
        given: the arguments of the pipeline's call; timestep: of the denoiser's; step, steps: where
            it is, where that is known.

    Raises:
        ValueError: it is 0, or cannot be known.
    """
    if pipe is None:
        return 1.0
    if "true_cfg_scale" in given:  # guidance_scale is what a distilled model is told
        pooled = given.get("negative_pooled_prompt_embeds", 0)  # which Flux needs beside the others
        embedded = given.get("negative_prompt_embeds") is not None and pooled is not None
        negative = given.get("negative_prompt") is not None or embedded
        true = float(given["true_cfg_scale"])
        return true if negative and true > 1 else 1.0
    if given.get("use_dynamic_cfg"):
        return _dynamic(given, timestep)
    scale = getattr(pipe, "_guidance_scale", None)
    if not isinstance(scale, (int, float)):
        scale = given.get("guidance_scale", 1.0)
    if not scale > 1:
        return 1.0
    if role == "transformer_2":
        second = getattr(pipe, "_guidance_scale_2", None)
        scale = second if isinstance(second, (int, float)) else scale
    if given.get("skip_guidance_layers") is not None:
        scale += _skipping(given, step, steps)
    if not scale:
        raise ValueError(
            f"the guidance scale of {role} is 0, so that its conditional prediction counts for "
            "nothing and cannot be guided; give it another scale"
        )
    return float(scale)


def _skipping(given: Mapping[str, Any], step: int | None, steps: int | None) -> float:
    """What Stable Diffusion 3's own skip layer guidance adds to the scale at a step."""
    if step is None or steps is None:
        raise ValueError(
            "skip_guidance_layers is for some steps, and the step is not known here; leave it out, "
            "and guide with SLG"
        )
    first, last = (steps * given[f"skip_layer_guidance_{end}"] for end in ("start", "stop"))
    return float(given["skip_layer_guidance_scale"]) if first < step < last else 0.0


def _dynamic(given: Mapping[str, Any], timestep: torch.Tensor | None) -> float:
    """CogVideoX's scale, which it works out after the call of its denoiser."""
    if not given["guidance_scale"] > 1:
        return 1.0
    if timestep is None:
        raise ValueError(
            "use_dynamic_cfg=True: the scale follows the timestep, which is not known here; leave "
            "it out"
        )
    steps, now = given["num_inference_steps"], float(timestep.flatten()[0])
    wave = math.cos(math.pi * ((steps - now) / steps) ** 5.0)
    return 1 + float(given["guidance_scale"]) * (1 - wave) / 2
