"""How a pipeline combines its passes: the derivative of the guided prediction with respect to the
conditional one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from visattn.inject.hooks.class_swap import kind_of
from visattn.runtime.private_names import guidance_scale, second_guidance_scale

__all__ = ["call_arguments", "not_linear", "slope"]


def call_arguments(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call by name, with defaults.

    Args:
        pipe: a diffusers pipeline.
        args: arguments by position.
        kwargs: arguments by name.
    """
    try:
        bound = inspect.signature(kind_of(pipe).__call__).bind(pipe, *args, **kwargs)
    except TypeError:  # the pipeline itself raises an error for wrong arguments
        return dict(kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def not_linear(arguments: Mapping[str, Any]) -> str | None:
    """Return why a pipeline's guidance is not linear in its passes; None means it is linear.

    Args:
        arguments: of the pipeline's call, by name.
    """
    rescale = arguments.get("guidance_rescale")
    if isinstance(rescale, (int, float)) and rescale > 0:
        return f"guidance_rescale={rescale} scales the prediction by its standard deviation"
    return None


def slope(
    pipe: Any,
    role: str,
    arguments: Mapping[str, Any],
    timestep: torch.Tensor | None,
    step: int | None = None,
    steps: int | None = None,
) -> float:
    """Return ``d pred / d c``: the guidance scale; 1 without classifier-free guidance.

    Args:
        pipe: the pipeline; None means the denoiser is used without one.
        role: of the denoiser that runs.
        arguments: of the pipeline's call, by name.
        timestep: of the denoiser's call.
        step: index of the step; None where it is not known.
        steps: number of steps; None where it is not known.

    Raises:
        ValueError: the slope is 0, or needs a step or timestep that is not known.
    """
    if pipe is None:
        return 1.0
    if "true_cfg_scale" in arguments:  # guidance_scale is an input of a distilled model
        # Flux needs the pooled embeddings too
        pooled = arguments.get("negative_pooled_prompt_embeds", 0)
        embedded = arguments.get("negative_prompt_embeds") is not None and pooled is not None
        negative = arguments.get("negative_prompt") is not None or embedded
        true_scale = float(arguments["true_cfg_scale"])
        return true_scale if negative and true_scale > 1 else 1.0
    if arguments.get("use_dynamic_cfg"):
        return _dynamic(arguments, timestep)
    scale = guidance_scale(pipe)
    if not isinstance(scale, (int, float)):
        scale = arguments.get("guidance_scale", 1.0)
    if not scale > 1:
        return 1.0
    if role == "transformer_2":
        second = second_guidance_scale(pipe)
        scale = second if isinstance(second, (int, float)) else scale
    if arguments.get("skip_guidance_layers") is not None:
        scale += _skip_layer_scale(arguments, step, steps)
    if not scale:
        raise ValueError(
            f"the guidance scale of {role} is 0, so the conditional prediction has no effect and "
            "cannot be guided; use another scale"
        )
    return float(scale)


def _skip_layer_scale(arguments: Mapping[str, Any], step: int | None, steps: int | None) -> float:
    """Return what the skip layer guidance of Stable Diffusion 3's pipeline adds to the scale."""
    if step is None or steps is None:
        raise ValueError(
            "skip_guidance_layers is for some steps, and the step is not known; omit it and guide "
            "with SLG"
        )
    first, last = (steps * arguments[f"skip_layer_guidance_{end}"] for end in ("start", "stop"))
    return float(arguments["skip_layer_guidance_scale"]) if first < step < last else 0.0


def _dynamic(arguments: Mapping[str, Any], timestep: torch.Tensor | None) -> float:
    """Return the scale that CogVideoX computes after the call of its denoiser."""
    if not arguments["guidance_scale"] > 1:
        return 1.0
    if timestep is None:
        raise ValueError(
            "use_dynamic_cfg=True: the scale depends on the timestep, which is not known; omit "
            "use_dynamic_cfg"
        )
    steps, time = arguments["num_inference_steps"], float(timestep.flatten()[0])
    wave = math.cos(math.pi * ((steps - time) / steps) ** 5.0)
    return 1 + float(arguments["guidance_scale"]) * (1 - wave) / 2
