"""Tiny real pipelines: the classes of diffusers and transformers with seeded random weights, built
from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from visattn import Grid, TokenLayout

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "square", "circle", "moves", "right", "left")
LAYERS, HEADS, DIM = 3, 4, 16


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One word, one token."""
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def wan_transformer(seed: int, layers: int = LAYERS) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def _wan_parts(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    config = UMT5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return {
        "vae": vae.eval(),
        "text_encoder": UMT5EncoderModel(config).eval(),
        "tokenizer": tokenizer(32),
    }


def wan21(seed: int = 0, layers: int = LAYERS) -> WanPipeline:
    """Wan 2.1: pure self-attention, separate calls for cond and uncond."""
    return WanPipeline(
        **_wan_parts(seed),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=wan_transformer(seed + 1, layers),
    )


def wan22(seed: int = 0) -> WanPipeline:
    """Wan 2.2: a transformer for high noise and another for low noise."""
    return WanPipeline(
        **_wan_parts(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(seed + 1),
        transformer_2=wan_transformer(seed + 2),
        boundary_ratio=0.875,
    )


def _cogvideox(seed: int, patch_size_t: int | None) -> CogVideoXPipeline:
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=LAYERS,
        sample_width=8,
        sample_height=12,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        temporal_compression_ratio=4,
        max_text_seq_length=10,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer(10),
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def cogvideox(seed: int = 0) -> CogVideoXPipeline:
    """CogVideoX: text in front of the grid, cond and uncond in one batch."""
    return _cogvideox(seed, None)


def cogvideox15(seed: int = 0) -> CogVideoXPipeline:
    """CogVideoX 1.5: the same with patches of two frames."""
    return _cogvideox(seed, 2)


def hunyuanvideo(seed: int = 0) -> HunyuanVideoPipeline:
    """HunyuanVideo: text behind the grid, its padding masked; blocks of two streams and of one."""
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    llama = LlamaConfig(**sizes, **tokens, num_hidden_layers=3, num_attention_heads=2)
    clip = CLIPTextConfig(
        **{**sizes, "hidden_size": 8}, **tokens, num_hidden_layers=1, num_attention_heads=2
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=tokenizer(32),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tokenizer(77),
    )


def image_to_video() -> CogVideoXImageToVideoPipeline:
    """CogVideoX that begins with an image: its latents are stacked on the noise."""
    parts = cogvideox().components
    config = {**parts["transformer"].config, "in_channels": 8}
    torch.manual_seed(5)
    parts["transformer"] = CogVideoXTransformer3DModel.from_config(config).eval()
    return CogVideoXImageToVideoPipeline(**parts)


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan21": wan21,
    "wan22": wan22,
    "cogvideox": cogvideox,
    "cogvideox15": cogvideox15,
    "hunyuanvideo": hunyuanvideo,
}

# the attention layers, which plans number in this order
PATHS = {
    "wan": tuple(f"blocks.{n}.attn1" for n in range(LAYERS)),
    "cogvideox": tuple(f"transformer_blocks.{n}.attn1" for n in range(LAYERS)),
    "hunyuanvideo": (
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
    ),
}


def paths(name: str) -> tuple[str, ...]:
    """Of a pipeline."""
    return next(own for family, own in PATHS.items() if name.startswith(family))


def layout(name: str) -> TokenLayout:
    """Of ``generate`` with a pipeline."""
    grid = Grid(2 if name == "cogvideox15" else 3, 6, 4)
    before, after = 10 * name.startswith("cogvideox"), 10 * (name == "hunyuanvideo")
    return TokenLayout(grid, text_before=before, text_after=after)


# what every test generates: 3 latent frames of 6 x 4 tokens (2 of them for 1.5), and text
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "prompt_template": {"template": "{}", "crop_start": 0}}
SHAPE = {"height": 96, "width": 64, "num_frames": 9}


def generate(
    pipe: DiffusionPipeline, seed: int = 0, steps: int = 3, **options: Any
) -> torch.Tensor:
    """Latents of a short generation, the same for the same seed."""
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "prompt": "a red square moves right",
        "negative_prompt": "blue circle",
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "max_sequence_length": 10,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **SHAPE,
        **(TRUE_GUIDANCE if isinstance(pipe, HunyuanVideoPipeline) else {}),
        **options,
    }
    return pipe(**settings).frames


def footprint(pipe: DiffusionPipeline) -> list[Any]:
    """All that a plan could leave behind on a pipeline."""
    seen: list[Any] = []
    for role in ("transformer", "transformer_2"):
        model = getattr(pipe, role, None)
        for path, module in model.named_modules() if model is not None else ():
            own = {k for k in vars(module) if k not in ("_diffusers_hook", "cache_context")}
            hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
            processor = getattr(module, "processor", None)
            backend = getattr(processor, "_attention_backend", None)
            seen.append((path, type(module), own, hooks, type(processor), backend))
            seen.append("cache_context" in vars(module))
            seen.append(sorted(vars(processor)) if processor is not None else None)
    return seen
