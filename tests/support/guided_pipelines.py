"""Tiny pipelines of videos and of images, which generate by the same call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from support import tiny, tiny_images

PIPELINES = {**tiny.PIPELINES, **tiny_images.IMAGES}


@functools.cache
def pipeline(kind: str) -> DiffusionPipeline:
    """One that tests share, which leave nothing on it."""
    return PIPELINES[kind]()


def generate(
    pipe: DiffusionPipeline, steps: int = 3, guidance: bool = True, **options: Any
) -> torch.Tensor:
    """Latents of a short generation, with classifier-free guidance of scale 3 or without."""
    if type(pipe).__name__.startswith(("Flux", "StableDiffusion3")):
        return tiny_images.generate(pipe, steps=steps, guidance=guidance, **options)
    if not guidance:
        kind = type(pipe).__name__
        options["true_cfg_scale" if kind.startswith("Hunyuan") else "guidance_scale"] = 1.0
    return tiny.generate(pipe, steps=steps, **options)
