"""The parts of the pipeline: autoencoder, denoiser, text encoder, tokenizer and scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tiny_wan.captions import WORDS
from tiny_wan.presets import Preset

LATENT_CHANNELS = 16
TEXT_WIDTH = 64
FLOW_SHIFT = 3.0
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_autoencoder(preset: Preset) -> AutoencoderKLWan:
    """Return an untrained autoencoder: 8 × 8 pixels × 4 frames to 16 channels."""
    return AutoencoderKLWan(
        base_dim=preset.encoder_width,
        decoder_base_dim=preset.decoder_width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer(preset: Preset) -> WanTransformer3DModel:
    """Return an untrained denoiser whose output is 0."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=preset.heads,
        attention_head_dim=preset.head_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=preset.feed_forward,
        num_layers=preset.layers,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def build_text_encoder() -> UMT5EncoderModel:
    """Return an untrained text encoder of 2 layers, 64 wide."""
    config = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the grammar's words; every caption ends in one end token."""
    vocabulary = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=512,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Return the scheduler that Wan ships with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def encode_text(
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
    length: int,
) -> Tensor:
    """Return captions as the pipeline embeds them, zeros after their end, ``[B, length, D]``."""
    longest = max(len(ids) for ids in tokenizer(captions)["input_ids"])
    tokens = tokenizer(captions, padding="max_length", max_length=longest, return_tensors="pt")
    device = next(text_encoder.parameters()).device
    mask = tokens["attention_mask"].to(device)
    states = text_encoder(tokens["input_ids"].to(device), mask).last_hidden_state
    return torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, length - longest))


def build_pipeline(
    autoencoder: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> WanPipeline:
    """Return the pipeline that the parts make."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=autoencoder,
        scheduler=build_scheduler(),
        transformer=transformer,
    )


def in_half_precision(pipeline: WanPipeline) -> WanPipeline:
    """Return the pipeline with float16 weights, but for those that diffusers keeps in float32."""
    for part in (pipeline.vae, pipeline.transformer, pipeline.text_encoder):
        kept = getattr(part, "_keep_in_fp32_modules", None) or ()
        for name, param in part.named_parameters():
            if not any(word in name for word in kept):
                param.data = param.data.half()
    return pipeline


def save_pipeline(pipeline: WanPipeline, folder: Path) -> None:
    """Write the pipeline in `save_pretrained` form, safetensors only."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    # The tokenizer's class has other names in some releases of transformers; this one is in all.
    for file, keys in (
        (folder / "model_index.json", ("tokenizer",)),
        (folder / "tokenizer" / "tokenizer_config.json", ("tokenizer_class",)),
    ):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            name = "PreTrainedTokenizerFast"
            content[key] = ["transformers", name] if key == "tokenizer" else name
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
