"""Denoisers of published models, with random weights, at the sizes that they are used at.

The configurations are those of diffusers' conversion scripts and of the class's own defaults, sizes
and text lengths the defaults of its pipelines; only families that plans can be applied to are here.
Random weights make no video, but a step of them costs what a step of the model costs.
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

__all__ = ["ARCHITECTURES", "Architecture", "build", "operations", "skeleton", "step_inputs"]

STD = 0.02  # of random weights
PIXELS, FRAMES = 8, 4  # of a latent, in all VAEs here; the first frame has a latent of its own
STEPS = 50  # the default of all pipelines here


@dataclass(frozen=True)
class Architecture:
    """A denoiser, and what it is used on.

    Args:
        model: class name in diffusers.
        height, width: in pixels; num_frames: of the video; text: tokens.
        config: ``num_layers`` (with those of one stream apart, where there are such, as
            ``num_single_layers``), and the class's arguments that are not its defaults.
        steps: of a generation; patch: latents along the side of a token, in height and width.
        trained: it is the small model of the checkout, with its own configuration and weights.

    Raises:
        TypeError, ValueError: the size is none that the model takes.
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
        """The same at another size; what is None stays.

        Raises:
            TypeError, ValueError: the size is none that the model takes.
        """
        given: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        return dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})

    @property
    def layers(self) -> int:
        """How many layers the whole model has."""
        return layers_of(SimpleNamespace(**self.config))

    @property
    def step_words(self) -> str:
        """What a step calls it with, as ``step_inputs`` gives it."""
        words = {
            WAN: "two calls, a pass each",
            COGVIDEOX: "one call with both passes",
            HUNYUANVIDEO: "one call of one pass, which is told its guidance",
        }
        return words[self.model]

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns; frames fill whole patches, as the pipelines see to."""
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
    # each of the two denoisers of Wan 2.2 A14B is the same
    "wan2.1-14b": Architecture(WAN, 720, 1280, 81, 512, {"num_layers": 40}),
    "cogvideox-2b": Architecture(COGVIDEOX, 480, 720, 49, 226, {"num_layers": 30}),
    "cogvideox-5b": Architecture(COGVIDEOX, 480, 720, 49, 226, LARGE),
    "cogvideox1.5-5b": Architecture(COGVIDEOX, 768, 1360, 81, 226, LARGE_15),
    "hunyuanvideo": Architecture(
        HUNYUANVIDEO, 720, 1280, 129, 256, {"num_layers": 20, "num_single_layers": 40}
    ),
}


def layers_of(config: Any) -> int:
    """How many layers a denoiser has, by its configuration."""
    return int(config.num_layers) + int(getattr(config, "num_single_layers", 0))


def skeleton(architecture: Architecture, layers: int | None = None) -> Any:
    """The denoiser with all weights on ``meta``: they have sizes and no values, and take no memory.

    Args:
        layers: how many of its layers; None is all of them.

    Raises:
        TypeError, ValueError: it has fewer layers, or its weights are the small model's.
    """
    accelerate: Any = importlib.import_module("accelerate")
    diffusers: Any = importlib.import_module("diffusers")
    if architecture.trained:
        raise ValueError("the small model has weights of its own; build() loads it")
    config = dict(architecture.config)
    if layers is not None:
        if check_count("layers", layers, 1) > architecture.layers:
            raise ValueError(
                f"layers={layers} must be at most {architecture.layers}, which the model has"
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
    """The denoiser with weights: drawn from a normal distribution of standard deviation 0.02, norms
    1 and biases 0; what diffusers keeps in float32 is in float32. The small model is loaded.

    Args:
        layers: how many of its layers; None is all of them.
        dtype, device: of the weights, which are made there; seed: of what is drawn.

    Raises:
        TypeError, ValueError: it has fewer layers, or the small model is not there.
    """
    if architecture.trained:
        return _trained(layers, dtype, device)
    model = skeleton(architecture, layers)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    wide = tuple(model._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        for name, own in list(module.named_parameters(recurse=False)):
            parts = f"{path}.{name}".split(".")
            kind = torch.float32 if any(part in parts for part in wide) else dtype
            made = torch.empty(own.shape, dtype=kind, device=device)
            if own.ndim > 1:
                made.normal_(0.0, STD, generator=generator)
            else:
                made.fill_(1.0 if name == "weight" else 0.0)
            module.register_parameter(name, torch.nn.Parameter(made, requires_grad=False))
    return model.to(device)  # buffers too


def _trained(layers: int | None, dtype: torch.dtype, device: torch.device | str) -> Any:
    from visattn.generation import Loading, default_model, load_pipeline

    if layers is not None:
        raise ValueError(f"layers={layers} is for random weights; the small model is run whole")
    name = str(dtype).removeprefix("torch.")
    pipe = load_pipeline(Loading(default_model(), dtype=name, device=str(device)))
    return pipe.transformer.eval().requires_grad_(False)


def operations(architecture: Architecture, model: Any) -> float:
    """About how many multiplications and additions a step takes: of linear layers at every token,
    and of self-attention.

    Args:
        model: of ``skeleton`` or ``build``.
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
    """What one denoising step calls the model with. With classifier-free guidance, for Wan twice, a
    pass each; for CogVideoX once, with both passes in the batch. HunyuanVideo is told its guidance,
    and called once; a quarter of its text is there and the rest is padding.

    Args:
        model: of ``build``; its dtype and device are those of what it is called with.
        timestep: 0-d; seed: of noise and text, which are drawn.

    Returns:
        For each call the name by which the pipelines announce it, and its arguments.
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
        # angles cost the same whatever they are
        angle = torch.rand(tokens, config.attention_head_dim, generator=generator).to(device)
        arguments["image_rotary_emb"] = (angle.cos(), angle.sin())
    return [("cond_uncond", arguments)]
