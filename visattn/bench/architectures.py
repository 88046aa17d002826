"""Denoisers of published models with random weights, at the video sizes of their pipelines.

The configurations come from the conversion scripts of diffusers and from the defaults of its model
classes; sizes and text lengths are the defaults of its pipelines. Only families that plans can be
applied to are listed. Random weights make no video, but a step takes as long as one of the model.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from visattn._arguments import check_count
from visattn.runtime.private_names import float32_modules

__all__ = ["ARCHITECTURES", "Architecture", "build", "operations", "skeleton", "step_inputs"]

STD = 0.02  # standard deviation of random weights
# Pixels along a side and frames per latent, for all VAEs here. The first frame has a latent alone.
PIXELS, FRAMES = 8, 4
STEPS = 50  # the default of all pipelines here


@dataclass(frozen=True)
class Architecture:
    """A denoiser and the size of its input.

    Args:
        model: the name of the class in diffusers.
        height: height of the video in pixels.
        width: width of the video in pixels.
        num_frames: number of frames of the video.
        text: number of text tokens.
        config: ``num_layers``, ``num_single_layers`` if the model has single-stream layers, and
            the arguments of the class that differ from its defaults.
        steps: number of denoising steps of a generation.
        patch: latents along the height and width of a token.
        trained: whether this is the small trained model of the checkout, which brings its
            configuration and weights.

    Raises:
        TypeError: a size is no integer.
        ValueError: the model does not accept the size.

    Example:
        >>> from visattn.bench import ARCHITECTURES
        >>> wan = ARCHITECTURES["wan2.1-1.3b"]
        >>> wan.layers, wan.latents
        (30, (21, 60, 104))
    """

    model: str
    height: int
    width: int
    num_frames: int
    text: int
    config: Mapping[str, Any]
    steps: int = STEPS
    patch: int = 2
    trained: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "steps"):
            check_count(name, getattr(self, name), 1)
        unit = PIXELS * self.patch
        for name in ("height", "width"):
            if getattr(self, name) % unit:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of {unit}")
        if (self.num_frames - 1) % FRAMES:
            raise ValueError(
                f"num_frames={self.num_frames} must be 1 more than a multiple of {FRAMES}"
            )

    def at(
        self, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> Architecture:
        """Return the architecture at another size; None keeps a value.

        Raises:
            TypeError: a size is no integer.
            ValueError: the model does not accept the size.
        """
        given: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        return dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})

    @property
    def layers(self) -> int:
        """Number of layers of the whole model."""
        return layers_of(SimpleNamespace(**self.config))

    @property
    def step_words(self) -> str:
        """The calls of a denoising step (``step_inputs``) in words."""
        words = {
            WAN: "two calls, one for each pass",
            COGVIDEOX: "one call with both passes",
            HUNYUANVIDEO: "one call with one pass and an embedded guidance scale",
        }
        return words[self.model]

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns. Frames are rounded up to whole patches, as in the
        pipelines."""
        patch = int(self.config.get("patch_size_t", 1))
        frames = (self.num_frames - 1) // FRAMES + 1
        return -(-frames // patch) * patch, self.height // PIXELS, self.width // PIXELS


WAN, COGVIDEOX = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
HUNYUANVIDEO = "HunyuanVideoTransformer3DModel"
SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
LARGE_15 = LARGE | {"patch_size_t": 2, "patch_bias": False}

ARCHITECTURES: dict[str, Architecture] = {
    "tiny-wan": Architecture(
        WAN, 128, 128, 33, 512, {"num_layers": 12}, steps=20, patch=1, trained=True
    ),
    "wan2.1-1.3b": Architecture(WAN, 480, 832, 81, 512, SMALL),
    # Each of the two denoisers of Wan 2.2 A14B has this configuration too.
    "wan2.1-14b": Architecture(WAN, 720, 1280, 81, 512, {"num_layers": 40}),
    "cogvideox-2b": Architecture(COGVIDEOX, 480, 720, 49, 226, {"num_layers": 30}),
    "cogvideox-5b": Architecture(COGVIDEOX, 480, 720, 49, 226, LARGE),
    "cogvideox1.5-5b": Architecture(COGVIDEOX, 768, 1360, 81, 226, LARGE_15),
    "hunyuanvideo": Architecture(
        HUNYUANVIDEO, 720, 1280, 129, 256, {"num_layers": 20, "num_single_layers": 40}
    ),
}


def layers_of(config: Any) -> int:
    """Return the number of layers of a denoiser from its configuration."""
    return int(config.num_layers) + int(getattr(config, "num_single_layers", 0))


def skeleton(architecture: Architecture, layers: int | None = None) -> Any:
    """Make the denoiser with all weights on the ``meta`` device, where they take no memory.

    Args:
        architecture: the denoiser; not the small trained model.
        layers: number of layers, or None for all.

    Raises:
        TypeError: ``layers`` is no integer.
        ValueError: the model has fewer layers, or it is the small trained model.
    """
    accelerate: Any = importlib.import_module("accelerate")
    diffusers: Any = importlib.import_module("diffusers")
    if architecture.trained:
        raise ValueError("the small model is trained and has no random weights; load it by build()")
    config = dict(architecture.config)
    if layers is not None:
        if check_count("layers", layers, 1) > architecture.layers:
            raise ValueError(
                f"layers={layers} must be at most {architecture.layers}, the layers of the model"
            )
        config["num_layers"] = first = min(layers, config["num_layers"])
        if "num_single_layers" in config:
            config["num_single_layers"] = layers - first
    with accelerate.init_empty_weights(include_buffers=False):
        model = getattr(diffusers, architecture.model)(**config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def build(
    architecture: Architecture,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Any:
    """Make the denoiser with random weights, or load the small trained model.

    Weights are drawn from a normal distribution of standard deviation 0.02; weights of norms are 1,
    biases 0. Parameters that diffusers keeps in float32 are float32.

    Args:
        architecture: the denoiser.
        layers: number of layers, or None for all.
        dtype: dtype of the weights.
        device: the device on which the weights are made.
        seed: seed of the random weights.

    Returns:
        The diffusers model, in evaluation mode and without gradients.

    Raises:
        TypeError: ``layers`` is no integer.
        ValueError: the model has fewer layers, or the small model is missing.

    Example:
        >>> from visattn.bench import Architecture, build
        >>> config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        ...           "ffn_dim": 64, "text_dim": 32}
        >>> small = Architecture("WanTransformer3DModel", 64, 64, 9, 8, config)
        >>> model = build(small, layers=1)
        >>> len(model.blocks)
        1
    """
    if architecture.trained:
        return _trained(layers, dtype, device)
    model = skeleton(architecture, layers)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    float32_parts = float32_modules(model)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            parts = f"{path}.{name}".split(".")
            is_float32 = any(part in parts for part in float32_parts)
            weight_dtype = torch.float32 if is_float32 else dtype
            values = torch.empty(parameter.shape, dtype=weight_dtype, device=device)
            if parameter.ndim > 1:
                values.normal_(0.0, STD, generator=generator)
            else:
                values.fill_(1.0 if name == "weight" else 0.0)
            module.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    return model.to(device)  # buffers too


def _trained(layers: int | None, dtype: torch.dtype, device: torch.device | str) -> Any:
    from visattn.generation import Loading, default_model, load_pipeline

    if layers is not None:
        raise ValueError(
            f"layers={layers} is for random weights; the small model runs with all of its layers"
        )
    name = str(dtype).removeprefix("torch.")
    pipe = load_pipeline(Loading(default_model(), dtype=name, device=str(device)))
    return pipe.transformer.eval().requires_grad_(False)


def operations(architecture: Architecture, model: Any) -> float:
    """Return the approximate number of multiplications and additions of a step: of the linear
    layers at every token, and of self-attention.

    Args:
        architecture: the size of the input.
        model: the model of ``skeleton`` or ``build``.
    """
    config = model.config
    frames, rows, columns = architecture.latents
    patch_t = int(architecture.config.get("patch_size_t", 1))
    tokens = frames // patch_t * (rows // architecture.patch) * (columns // architecture.patch)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    width = int(config.num_attention_heads * config.attention_head_dim)
    linear: float = 2.0 * weights * tokens
    passes = 1 if architecture.model == HUNYUANVIDEO else 2
    return passes * (linear + 4.0 * tokens**2 * width * layers_of(config))


def step_inputs(
    architecture: Architecture, model: Any, timestep: torch.Tensor, seed: int = 0
) -> list[tuple[str, dict[str, Any]]]:
    """Return the arguments of the model calls in one denoising step with guidance.

    Wan is called twice, once for each pass of classifier-free guidance. CogVideoX is called once
    with both passes in the batch. HunyuanVideo is called once, with an embedded guidance scale; a
    quarter of its text tokens are valid and the rest is padding.

    Args:
        architecture: the size of the input.
        model: the model of ``build``; the inputs have its dtype and device.
        timestep: 0-d tensor.
        seed: seed of the random noise and text.

    Returns:
        For each call its name in the pipelines' ``cache_context``, and its arguments.
    """
    config, device, dtype = model.config, model.device, model.dtype
    frames, rows, columns = architecture.latents
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    arguments: dict[str, Any]
    if architecture.model == WAN:
        latents = noise(1, config.in_channels, frames, rows, columns)
        return [
            (
                name,
                {
                    "hidden_states": latents,
                    "timestep": timestep.expand(1),
                    "encoder_hidden_states": noise(1, architecture.text, config.text_dim),
                },
            )
            for name in ("cond", "uncond")
        ]
    if architecture.model == HUNYUANVIDEO:
        mask = torch.zeros(1, architecture.text, device=device, dtype=dtype)
        mask[:, : -(-architecture.text // 4)] = 1
        arguments = {
            "hidden_states": noise(1, config.in_channels, frames, rows, columns),
            "timestep": timestep.expand(1),
            "encoder_hidden_states": noise(1, architecture.text, config.text_embed_dim),
            "encoder_attention_mask": mask,
            "pooled_projections": noise(1, config.pooled_projection_dim),
            "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        }
        return [("cond", arguments)]
    latents = noise(1, frames, config.in_channels, rows, columns).expand(2, -1, -1, -1, -1)
    arguments = {
        "hidden_states": latents,
        "timestep": timestep.expand(2),
        "encoder_hidden_states": noise(2, architecture.text, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        patch, patch_t = config.patch_size, config.patch_size_t or 1
        tokens = (frames // patch_t) * (rows // patch) * (columns // patch)
        # the values of the angles do not change the time
        angle = torch.rand(tokens, config.attention_head_dim, generator=generator).to(device)
        arguments["image_rotary_emb"] = (angle.cos(), angle.sin())
    return [("cond_uncond", arguments)]
