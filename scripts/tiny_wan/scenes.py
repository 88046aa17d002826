"""Clips of moving objects over soft or photographed backgrounds, drawn from a seed.

A clip is a function of (settings, seed, index) alone. One object stays inside the frame and travels
in one direction; its size, place, speed, shade and background vary. With `rich` settings there may
be two objects, bounces, pictures in coloured frames, and photographs that pan and zoom behind.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_wan import photographs, sprites
from tiny_wan.captions import combinations, is_held_out, plain_caption, varied_caption
from visattn.metrics.prompt import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    OBJECTS,
    PHOTOGRAPH,
    PICTURE,
    Scene,
    Thing,
)

SMALLEST_SIDE = 32  # pixels
LARGEST_DIAMETER = 25.0  # of the mean object
SLOW, QUICK = (0.45, 0.65), (0.75, 1.0)  # share of the free way that an object travels


@dataclass(frozen=True)
class Clip:
    """Frames ``[frames, 3, height, width]`` in [0, 1] and what they show.

    ``covered`` is the opacity of the objects, ``[frames, height, width]``; ``centres`` are theirs
    in pixels, ``[things, frames, 2]`` (x, y).
    """

    frames: Tensor
    covered: Tensor
    centres: Tensor
    scene: Scene
    caption: str


@dataclass(frozen=True)
class Settings:
    """What clips may hold: size in (frames, height, width), and the rich data of a GPU run."""

    size: tuple[int, int, int]
    rich: bool = False

    def __post_init__(self) -> None:
        if min(self.size[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"size={self.size} must be at least {SMALLEST_SIDE} pixels high and wide, or the "
                "objects have no room to move"
            )


def diameter(side: int) -> float:
    """Return the mean object's size in pixels for frames with this shorter side.

    It is about three tokens at all sizes: what an object looks like is learnt on a few tokens, many
    objects at a time, and serves the large sizes.
    """
    return min(10 + 0.42 * side, LARGEST_DIAMETER)


def _soft_background(name: str, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Return a background ``[3, height, width]``: a colour, a slope and soft clouds."""
    height, width = size
    base = torch.tensor(BACKGROUNDS[name]) + float(rng.uniform(-0.02, 0.02))
    coarse = torch.from_numpy(rng.normal(size=(1, 1, 3, 3))).float()
    clouds = F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0, 0]
    angle = rng.uniform(0, 2 * math.pi)
    y = torch.linspace(-1, 1, height)[:, None] * math.sin(angle)
    x = torch.linspace(-1, 1, width)[None, :] * math.cos(angle)
    light = 0.03 * clouds.clamp(-2, 2) + 0.04 * (x + y)
    return base[:, None, None] + light


def _track(
    direction: str,
    free: tuple[float, float],
    travel: float,
    bounce: bool,
    frames: int,
    rng: np.random.Generator,
) -> Tensor:
    """Return the object's offset from the free area's corner, ``[frames, 2]`` (x, y) in pixels."""
    step_x, step_y = DIRECTIONS[direction]
    along, across = (free[0], free[1]) if step_x else (free[1], free[0])
    way = along * travel
    start = rng.uniform(0, along - way)
    time = torch.linspace(0, 1, frames)
    if bounce:  # there and half way back
        time = torch.where(time < 2 / 3, time * 1.5, 2 - time * 1.5)
    moving = start + way * (time if step_x + step_y > 0 else 1 - time)
    resting = torch.full((frames,), float(rng.uniform(0, across)))
    return torch.stack((moving, resting) if step_x else (resting, moving), dim=1)


def _place(sprite: Tensor, centres: Tensor, size: tuple[int, int], pixels: float) -> Tensor:
    """Return a sprite ``[C, S, S]`` drawn at the centres, ``[frames, C, height, width]``."""
    height, width = size
    y = (torch.arange(height) + 0.5)[None, :] - centres[:, 1:2]
    x = (torch.arange(width) + 0.5)[None, :] - centres[:, 0:1]
    grid = torch.stack(
        (
            (x * 2 / pixels)[:, None, :].expand(-1, height, -1),
            (y * 2 / pixels)[:, :, None].expand(-1, -1, width),
        ),
        dim=-1,
    )
    frames = centres.shape[0]
    return F.grid_sample(sprite.expand(frames, -1, -1, -1), grid, align_corners=False)


def _sprite(name: str, held_out: bool, rng: np.random.Generator) -> Tensor:
    """Return an outline of the object, ``[1, SIDE, SIDE]``."""
    if name in DIGITS:
        bank = sprites.digit_sprites(name, held_out)
        return bank[int(rng.integers(len(bank)))][None]
    return sprites.shape_sprite(name)[None]


def render(
    scene: Scene,
    settings: Settings,
    rng: np.random.Generator,
    *,
    held_out: bool,
    plain: bool,
) -> Clip:
    """Draw a scene; ``held_out`` chooses among the digit and photograph instances."""
    num_frames, height, width = settings.size
    size = (height, width)
    background = str(scene.background)
    if background == PHOTOGRAPH:
        frames = photographs.moving_background(settings.size, held_out, rng)
    else:
        frames = _soft_background(background, size, rng)[None].expand(num_frames, -1, -1, -1)
    covered = torch.zeros(num_frames, height, width)
    speeds, bounces, tracks = [], [], []
    for thing in scene.things:
        speed = str(rng.choice(("slowly", "quickly")))
        bounce = settings.rich and len(scene.things) == 1 and rng.random() < 0.15
        pixels = diameter(min(size)) * rng.uniform(0.94, 1.06)
        if len(scene.things) > 1:
            pixels *= 0.75
        free = (width - pixels, height - pixels)
        travel = rng.uniform(*(SLOW if speed == "slowly" else QUICK))
        track = _track(str(thing.direction), free, travel, bounce, num_frames, rng)
        centres = track + pixels / 2
        alpha = _place(_sprite(str(thing.object), held_out, rng), centres, size, pixels)
        shade = torch.from_numpy(rng.uniform(-0.03, 0.03, 3)).float()
        colour = (torch.tensor(COLOURS[str(thing.colour)]) + shade).view(3, 1, 1)
        if thing.object == PICTURE:
            inside = photographs.patch(sprites.SIDE, held_out, rng)
            opening = sprites.picture_opening()[None]
            layer = _place(torch.cat((inside * opening, opening)), centres, size, pixels)
            frames = frames * (1 - layer[:, 3:]) + layer[:, :3]
        frames = frames + alpha * (colour - frames)
        covered = torch.maximum(covered, alpha[:, 0])
        speeds.append(speed)
        bounces.append(bounce)
        tracks.append(centres)
    if plain:
        caption = plain_caption(scene)
    else:
        caption = varied_caption(scene, tuple(speeds), tuple(bounces), rng)
    return Clip(frames.clamp(0, 1), covered, torch.stack(tracks), scene, caption)


@functools.cache
def _scenes(held_out: bool) -> list[Scene]:
    return combinations(held_out)


def _rich_scene(held_out: bool, rng: np.random.Generator) -> Scene:
    """Return a scene with one or two objects over any background."""
    while True:
        background = str(rng.choice((*BACKGROUNDS, PHOTOGRAPH)))
        num_things = 1 + int(rng.random() < 0.35)
        colours = rng.choice(tuple(COLOURS), size=num_things, replace=False)
        things = tuple(
            Thing(str(colour), str(rng.choice(OBJECTS)), str(rng.choice(tuple(DIRECTIONS))))
            for colour in colours
        )
        if all(is_held_out(thing, background) == held_out for thing in things):
            return Scene(things, background)


def draw_clip(settings: Settings, seed: int, index: int, *, held_out: bool = False) -> Clip:
    """Return clip ``index`` of the endless set of ``seed``; held-out clips have plain captions."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    if settings.rich:
        scene = _rich_scene(held_out, rng)
    else:
        scenes = _scenes(held_out)
        scene = scenes[int(rng.integers(len(scenes)))]
    return render(scene, settings, rng, held_out=held_out, plain=held_out)
