"""Tiny real pipelines of joint image models, as of ``tiny``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from support.tiny import DIM, HEADS, WORDS, tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

# blocks of two streams and of one (Flux), blocks (SD3)
DOUBLE, SINGLE, BLOCKS = 2, 2, 3
TEXT = 10  # tokens of T5
CLIP = 12  # and of CLIP, which stand before them in SD3


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def clip(kind: type) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return kind(config).eval()


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def flux(seed: int = 0, guidance_embeds: bool = False) -> FluxPipeline:
    """Flux: text in front of the image, separate calls for cond and uncond."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizer(CLIP),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(TEXT),
        transformer=transformer.eval(),
    )


def sd3(seed: int = 0, dual: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: the image in front of the text, cond and uncond in one batch. ``dual``:
    the blocks that attend to the image alone beside, as those of 3.5 medium."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        caption_projection_dim=HEADS * DIM,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(CLIP),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(CLIP),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(TEXT),
    )


IMAGES: dict[str, Callable[[], DiffusionPipeline]] = {"flux": flux, "sd3": sd3}

# what every test generates: 6 x 4 tokens
SHAPE = {"height": 24, "width": 16}


def generate(
    pipe: DiffusionPipeline, seed: int = 0, steps: int = 3, **options: Any
) -> torch.Tensor:
    """Latents of a generation, the same for the same seed, with classifier-free guidance of scale
    3; ``guidance=False``: without."""
    pipe.set_progress_bar_config(disable=True)
    guided = options.pop("guidance", True)
    scale = "true_cfg_scale" if isinstance(pipe, FluxPipeline) else "guidance_scale"
    settings = {
        "prompt": "a red square moves right",
        "negative_prompt": "blue circle",
        "num_inference_steps": steps,
        scale: 3.0 if guided else 1.0,
        "max_sequence_length": TEXT,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **SHAPE,
        **options,
    }
    return pipe(**settings).images
