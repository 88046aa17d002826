"""Does the model do what it is asked? Held-out captions, generated and read back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tiny_wan.captions import combinations, plain_caption
from tiny_wan.presets import Grid, clip_size
from visattn.inject import observe
from visattn.metrics.prompt import PromptScore, score_prompt
from visattn.readout import Sampler

KINDS = ("colour", "object", "direction", "background")
SHEET_FRAMES = 4  # of a clip, in a row of the contact sheet
TEXT_HEIGHT = 26  # pixels under each row
TILE_SIZES = (64, 32, 16)  # most tokens of a tile when the structure of attention is measured
FEW = 0.3  # of the tiles: a head that keeps 90 % of its mass in so many has structure


@dataclass(frozen=True)
class Sample:
    """A generated video ``[F, 3, H, W]`` in [0, 1] and the scorer's verdict."""

    caption: str
    seed: int
    frames: Tensor
    score: PromptScore


def held_out_pairs(count: int) -> list[tuple[str, int]]:
    """Return fixed (caption, seed) pairs: combinations that were never trained on, in turn."""
    scenes = combinations(held_out=True)
    order = np.random.default_rng(0).permutation(len(scenes))
    return [
        (plain_caption(scenes[order[number % len(order)]]), 1000 + number)
        for number in range(count)
    ]


def generate(
    pipeline: Any,
    pairs: list[tuple[str, int]],
    *,
    grid: Grid,
    steps: int,
    guidance: float,
    text_length: int = 512,
    batch: int = 4,
) -> list[Sample]:
    """Return a scored video of each pair; a pair's video does not depend on its batch."""
    num_frames, height, width = clip_size(grid)
    samples = []
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        videos = pipeline(
            prompt=[caption for caption, _ in part],
            negative_prompt="",
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=text_length,
            output_type="pt",
        ).frames
        for (caption, seed), frames in zip(part, videos, strict=True):
            kept = frames.float().cpu()
            samples.append(Sample(caption, seed, kept, score_prompt(kept, caption)))
    return samples


def shares(samples: list[Sample]) -> dict[str, float]:
    """Return the mean score of each kind of word."""
    return {
        kind: sum(getattr(sample.score, kind) for sample in samples) / len(samples)
        for kind in KINDS
    }


def structure(
    pipeline: Any,
    pairs: list[tuple[str, int]],
    *,
    grid: Grid,
    steps: int,
    guidance: float,
) -> dict[str, Any]:
    """Return how many heads keep 90 % of their mass in few tiles, by the most tokens of a tile.

    The mean of all pairs, of four steps spread over the schedule, with the caption.
    """
    chosen = [(2 * n + 1) * steps // 8 for n in range(4)]
    samplers = {size: Sampler(passes=["cond"], steps=chosen, tile_size=size) for size in TILE_SIZES}
    with ExitStack() as stack:
        for sampler in samplers.values():
            stack.enter_context(observe(pipeline, sampler))
        generate(pipeline, pairs, grid=grid, steps=steps, guidance=guidance, batch=1)
    tables = {size: sampler.table() for size, sampler in samplers.items()}
    return {
        "pairs": len(pairs),
        "grid": list(grid),
        "heads": len(tables[TILE_SIZES[0]]),
        "few": {
            str(size): sum(head.shares.tile_share <= FEW for head in table)
            for size, table in tables.items()
        },
    }


def contact_sheet(samples: list[Sample], columns: int = 4) -> Image.Image:
    """Return a picture of all samples: frames in a row, caption and verdict under them."""
    num_frames, _, height, width = samples[0].frames.shape
    chosen = np.linspace(0, num_frames - 1, SHEET_FRAMES).round().astype(int)
    cell = (SHEET_FRAMES * width + 8, height + TEXT_HEIGHT)
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        left, top = number % columns * cell[0], number // columns * cell[1]
        for place, frame in enumerate(chosen):
            pixels = (sample.frames[frame].permute(1, 2, 0) * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels), (left + place * width, top))
        wrong = [kind for kind in KINDS if getattr(sample.score, kind) < 1]
        verdict = f"not the {', '.join(wrong)}" if wrong else "all as said"
        draw.text((left + 2, top + height), sample.caption, fill="black", font_size=10)
        draw.text(
            (left + 2, top + height + 12),
            verdict,
            fill="#a00000" if wrong else "#007000",
            font_size=10,
        )
    return sheet


def save_sheet(samples: list[Sample], path: Path) -> None:
    """Write the contact sheet as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(samples).save(path, optimize=True)
