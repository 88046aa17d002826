"""Tiny pipelines of supported families that do not say where they stand, and calls of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    StableDiffusion3PAGPipeline,
    WanVideoToVideoPipeline,
)
from support import tiny, tiny_images

STEPS = 4
IMAGE = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(3))


def changed(model: Any, **config: Any) -> Any:
    """A denoiser of another configuration."""
    torch.manual_seed(4)
    own = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**{**own, **config}).eval()


def parts_for(kind: Any, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The components of a pipeline that another class takes."""
    names = inspect.signature(kind.__init__).parameters
    return {name: part for name, part in pipe.components.items() if name in names}


def of_flux(kind: Any, channels: int = 16) -> DiffusionPipeline:
    """A pipeline of the Flux family; ``channels``: that its denoiser takes."""
    pipe = tiny_images.flux()
    pipe.transformer = changed(pipe.transformer, in_channels=channels, out_channels=16)
    more = {}
    if kind is FluxControlNetPipeline:
        more["controlnet"] = FluxControlNetModel.from_transformer(
            pipe.transformer,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=tiny.DIM,
            num_attention_heads=tiny.HEADS,
        )
    return kind(**parts_for(kind, pipe), **more)


def of_hunyuanvideo(kind: Any) -> DiffusionPipeline:
    parts = tiny.hunyuanvideo().components
    config = {"in_channels": 8, "out_channels": 4}
    if kind is HunyuanVideoImageToVideoPipeline:
        config = {**config, "in_channels": 9, "image_condition_type": "latent_concat"}
        parts |= {"image_processor": None, "text_encoder": None, "tokenizer": None}
    parts["transformer"] = changed(parts["transformer"], **config)
    return kind(**parts)


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux img2img": lambda: of_flux(FluxImg2ImgPipeline),
    "flux inpaint": lambda: of_flux(FluxInpaintPipeline),
    "flux controlnet": lambda: of_flux(FluxControlNetPipeline),
    "flux kontext": lambda: of_flux(FluxKontextPipeline),
    "flux control": lambda: of_flux(FluxControlPipeline, 32),
    "flux fill": lambda: of_flux(FluxFillPipeline, 48),
    "wan v2v": lambda: WanVideoToVideoPipeline.from_pipe(tiny.wan21()),
    "hunyuanvideo i2v": lambda: of_hunyuanvideo(HunyuanVideoImageToVideoPipeline),
    "skyreels i2v": lambda: of_hunyuanvideo(HunyuanSkyreelsImageToVideoPipeline),
}
UNGUIDED = ("flux control", "flux fill")  # have no guidance
FIRST = {"flux img2img": 2, "flux inpaint": 2}  # the step that they begin at


def sd3_pag() -> StableDiffusion3PAGPipeline:
    """Perturbed attention guidance of diffusers, on the second of three blocks."""
    kind = StableDiffusion3PAGPipeline
    return kind(**parts_for(kind, tiny_images.sd3()), pag_applied_layers=["blocks.1"])


def text(negative: bool) -> dict[str, torch.Tensor]:
    """Embeddings of HunyuanVideo."""
    torch.manual_seed(5)
    out = {}
    for name in ("", "negative_") if negative else ("",):
        out[f"{name}prompt_embeds"] = torch.randn(1, 10, 16)
        out[f"{name}pooled_prompt_embeds"] = torch.randn(1, 8)
        out[f"{name}prompt_attention_mask"] = torch.ones(1, 10, dtype=torch.bool)
    return out


def generate(name: str, pipe: Any, guided: bool, **options: Any) -> torch.Tensor:
    """Latents of a generation of ``STEPS``, of which two run where it begins in the midst."""
    pipe.set_progress_bar_config(disable=True)
    family = name.split()[0]
    settings: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if family == "flux":
        settings |= {"prompt": "a red square", "max_sequence_length": tiny_images.TEXT}
        settings |= tiny_images.SHAPE
        which = "control_image" if "control" in name else "image"
        settings[which] = IMAGE
        if name in FIRST:
            settings["strength"] = 0.5
        if name in ("flux inpaint", "flux fill"):
            settings["mask_image"] = torch.ones(1, 1, 24, 16)
        if name == "flux kontext":
            settings |= {"_auto_resize": False, "max_area": 24 * 16}
        if guided:
            settings |= {"negative_prompt": "blue circle", "true_cfg_scale": 3.0}
    elif family == "wan":
        torch.manual_seed(2)
        settings |= {
            "latents": torch.randn(1, 4, 3, 12, 8),
            "prompt_embeds": torch.randn(1, 10, 16),
            "negative_prompt_embeds": torch.randn(1, 10, 16),
            "guidance_scale": 3.0 if guided else 1.0,
            "strength": 1.0,
            "height": tiny.SHAPE["height"],
            "width": tiny.SHAPE["width"],
        }
    else:
        settings |= {**tiny.SHAPE, "image": torch.full((1, 3, 96, 64), 0.5), **text(True)}
        settings["true_cfg_scale"] = 3.0 if guided else 1.0
    out = pipe(**{**settings, **options})
    return out.frames if hasattr(out, "frames") else out.images
