"""Training the denoiser with its text encoder by flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_wan.parts import FLOW_SHIFT, build_text_encoder, build_transformer, encode_text
from tiny_wan.presets import Grid, Preset, clip_size
from tiny_wan.scenes import Settings, draw_clip

WARM_UP = 60  # steps
DECAY = 0.25  # share of the steps in which the rates fall to 0 at the end
OBJECT_WEIGHT = 4.0  # of errors at objects, besides that of all
NO_CAPTION = 0.1  # share of clips that are trained without their caption
MOST_LONG_TEXTS = 32  # clips of a batch; above it texts are short, as each token costs
LARGEST_BATCH = 1024  # clip numbers of a step begin at a multiple of it


class Denoiser(nn.Module):
    """The two parts that are trained together."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.transformer = build_transformer(preset)
        self.text_encoder = build_text_encoder()


@dataclass(frozen=True)
class Batch:
    """What a step sees: frames ``[B, 3, F, H, W]`` in [−1, 1], the weights of the latents' errors
    ``[B, 1, f, h, w]``, captions, text length."""

    frames: Tensor
    weights: Tensor
    captions: list[str]
    text_length: int


def _draw(shares: dict[Grid, float] | dict[int, float], rng: np.random.Generator) -> int:
    """Return the index of an entry of ``shares``, drawn in proportion."""
    weights = np.array(list(shares.values()))
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def error_weights(covered: Tensor) -> Tensor:
    """Return the weights of the latents' errors, ``[1, f, h, w]`` with mean 1: more where an object
    is or whose neighbour it is. What an object is shows in few latents, its colour and way in all.
    """
    later = covered[1:].reshape(len(covered) // 4, 4, *covered.shape[1:]).amax(1)
    frames = torch.cat([covered[:1], later])
    blocks = F.max_pool2d(frames[:, None], 8)
    near = F.max_pool2d(blocks, 3, stride=1, padding=1)[:, 0]
    weights = 1 + OBJECT_WEIGHT * near
    return (weights / weights.mean())[None]


class Batches(torch.utils.data.Dataset[Batch]):
    """The batch of every step, from the run's seed and the step's number alone."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def __len__(self) -> int:
        return self.preset.denoiser_steps

    def __getitem__(self, step: int) -> Batch:
        preset = self.preset
        rng = np.random.default_rng([preset.seed, step, 11])
        shares = preset.shares(step / preset.denoiser_steps)
        grid = list(shares)[_draw(shares, rng)]
        settings = Settings(clip_size(grid), rich=preset.rich)
        clips = [
            draw_clip(settings, preset.seed + 4, step * LARGEST_BATCH + index)
            for index in range(preset.batches[grid])
        ]
        captions = ["" if rng.random() < NO_CAPTION else clip.caption for clip in clips]
        text_length = list(preset.text_lengths)[_draw(preset.text_lengths, rng)]
        if len(clips) > MOST_LONG_TEXTS:
            text_length = min(preset.text_lengths)
        frames = torch.stack([clip.frames.movedim(0, 1) for clip in clips]) * 2 - 1
        weights = torch.stack([error_weights(clip.covered) for clip in clips])
        return Batch(frames, weights, captions, text_length)


def rate_scale(step: int, steps: int) -> float:
    """Return the scale of the rates: a warm-up, a plateau, and a straight fall to 0."""
    return min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / DECAY)


@torch.no_grad()
def normalised_latents(autoencoder: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Return the latents of ``frames`` as the pipeline denoises them, ``[B, C, f, h, w]``."""
    latents = autoencoder.encode(frames).latent_dist.mode()
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(autoencoder.config.latents_mean).view(shape).to(latents)
    std = torch.tensor(autoencoder.config.latents_std).view(shape).to(latents)
    return (latents - mean) / std


def flow_matching_loss(
    denoiser: Denoiser,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    weights: Tensor,
    captions: list[str],
    text_length: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the weighted mean squared error of the velocity noise − latents.

    Noise levels are spread over the batch, on the sampler's own shifted scale, more of them in the
    middle, where what is seen takes shape (the logistic of evenly spread normal numbers).
    """
    batch = len(latents)
    offset = torch.rand(1, generator=generator)
    order = torch.randperm(batch, generator=generator)
    even = torch.special.ndtri(((order + offset) / batch).clamp(1e-4, 1 - 1e-4))
    even = even.sigmoid().to(latents)
    sigma = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    mixed = (1 - level) * latents + level * noise
    text = encode_text(denoiser.text_encoder, tokenizer, captions, text_length)
    velocity = denoiser.transformer(mixed, sigma * 1000, text, return_dict=False)[0]
    return ((velocity.float() - (noise - latents)).square() * weights).mean()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, longest: float) -> None:
    """Move the average of the weights towards the model's; it is short at the beginning."""
    keep = min(longest, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - keep)
