"""Does a video show what its caption says? Read from the frames alone, by arithmetic.

The captions are those of the moving scenes that the embedded model is trained on: an object of one
colour travels in one direction over one background. Reading them back needs no trained network:

- objects are the saturated pixels, since every background is muted;
- the colour is the nearest hue, in the circle of hues, to the mean of those pixels;
- the direction is the axis along which their centre travels most, and its sign;
- the object is the nearest template, by correlation, of its outline averaged over the frames;
- the background is the nearest of the backgrounds' own colours, or the photograph when the rest of
  the picture has more fine detail than a soft background can have.

The words of the captions are defined here, and the data is drawn from the same tables.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.runtime.torch_settings import plain_torch

# Red, green and blue in [0, 1].
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "yellow": (0.96, 0.86, 0.08),
    "green": (0.08, 0.66, 0.20),
    "blue": (0.10, 0.25, 0.92),
    "purple": (0.72, 0.10, 0.82),
}
SHAPES = ("circle", "square", "triangle", "cross")
# A picture is a photograph in a coloured frame.
PICTURE = "picture"
DIGITS: Mapping[str, int] = {"zero": 0, "two": 2, "four": 4, "seven": 7}
OBJECTS = (*SHAPES, *DIGITS, PICTURE)
# Unit steps (right, down) in the picture.
DIRECTIONS: Mapping[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "night": (0.07, 0.09, 0.19),
    "fog": (0.50, 0.52, 0.54),
    "sand": (0.82, 0.70, 0.54),
    "snow": (0.93, 0.95, 0.97),
}
PHOTOGRAPH = "photograph"

# Saturation (largest minus smallest of red, green and blue) below which a pixel is background and
# above which it is object.
SATURATION = (0.32, 0.55)
# Pixels across the frame on which photographs are told from soft backgrounds, and the mean absolute
# difference of neighbours above which a background is a photograph.
DETAIL_SIDE, DETAIL = 32, 0.030
TEMPLATE_SIDE = 24  # cells of an outline's box along each side
MARGIN = 1.3  # the box in sizes of the object: a square that fills its box would have no outline
# Share of an object's pixels outside the box on each of its sides.
TAIL = 0.01
# Share of the frame's side that a centre travels before it counts as moving.
STILL = 0.04

# Handwritten digits, 8 rows of 8 grey values in 0..f each: means of clusters of the instances of
# scikit-learn's set that are trained on, as `scripts/tiny_wan/digits.py` prints them.
_DIGITS: Mapping[str, tuple[str, ...]] = {
    "zero": (
        "003cb20001bedb1003e93d3004e40b6005e20b6003e43e5000bcdd10003cd500",
        "001a9000038c970005930b000492055003b0039000d102c0006b49b00009ed40",
        "005d920001ddc90005d33d2006b1086006a0068004c0088001d98e40004dd700",
        "007bd60001db6c1003d208400591075006700b2004805b0001c7d400006d5000",
        "005cc40002da7d2004d11a5006b008700690096004c01b4001d68c10005dd400",
        "004ba60000bdbd3002d8176004e3056005b0075003c11c3001c8bb00004db200",
    ),
    "two": (
        "01ae920007ebc4000573d4000115e200001ba000005e521001cdbb7001bec950",
        "0001bc200006ce6000086e6000026e300148e70006ff9000018de7200001ae80",
        "006ed40001ab9c1001643d2000104d2000008b100014d700005dea72007edcd7",
        "02dd400007ee8100057ba000012c8000004e400001ab211004fcaa6002deed60",
        "0038ec10007dce4000644e200021c8000018c20003ae500017efc5000148db20",
        "007e910003ebd50004a2c6000131d6000003d3000019c200007ec981007dccb4",
    ),
    "four": (
        "0006d200003e801000cc144005e53c9009facf4004bdfb000015e5000007e100",
        "001c7000007e220001d7482006e29a400bd8ed6007dee610013ca000001d7000",
        "0004d300001da100008d223003e6186009d15c500ceced2005abf8000005e400",
        "0002d4000008c110004d545002c93b7008eabf70079ace200011bb000002e600",
        "0009a111006e425201e817a207f68e9006eeed300025d7000007d200000b9000",
        "0005c200001cd400007ec50003d8d51008ebfc6007cdfa300116e1000005c000",
    ),
    "seven": (
        "004deb3001bcbd3001617c100022ca10018efe60017dc610001d6000004d2000",
        "009ed40002bad8000113c700005afc6003bed940016d6000007c200000b80000",
        "002bbcc4009eacd201c71b8001925d200025ca300029d510001b8000003e3000",
        "006dfd4001a98e4000107c20004aeea001bde730002b8000003e3000008b0000",
        "018db97203eacb3003a2c6000127e420028eea3003be5300019a000001b50000",
        "0029ee92008c9cb100211c8000269e8001befd500166d6000007c100001b6000",
    ),
}


@dataclass(frozen=True)
class Thing:
    """One moving object; None where nothing could be read."""

    colour: str | None
    object: str | None
    direction: str | None


@dataclass(frozen=True)
class Scene:
    """What a caption says, or what a video shows."""

    things: tuple[Thing, ...]
    background: str | None


@dataclass(frozen=True)
class PromptScore:
    """Shares in [0, 1] of a caption's words that the video shows, over its things."""

    colour: float
    object: float
    direction: float
    background: float

    @property
    def mean(self) -> float:
        """Mean over the four kinds of words."""
        return (self.colour + self.object + self.direction + self.background) / 4


def parse_caption(caption: str) -> Scene:
    """Return what a caption says: each colour word begins a thing, digits may be figures."""
    figures = {str(digit): name for name, digit in DIGITS.items()}
    things: list[Thing] = []
    background = None
    for word in re.findall(r"[a-z]+|\d", caption.lower()):
        word = figures.get(word, word)
        if word in COLOURS:
            things.append(Thing(word, None, None))
        elif word in BACKGROUNDS or word == PHOTOGRAPH:
            background = word
        elif things and word in OBJECTS:
            things[-1] = Thing(things[-1].colour, word, things[-1].direction)
        elif things and word in DIRECTIONS:
            things[-1] = Thing(things[-1].colour, things[-1].object, word)
    if not things or background is None or None in itertools.chain(*map(_words, things)):
        raise ValueError(
            f"caption={caption!r} must name a colour, an object, a direction and a background, "
            "as in 'a red square moves left over the fog'"
        )
    return Scene(tuple(things), background)


def _words(thing: Thing) -> tuple[str | None, str | None, str | None]:
    return thing.colour, thing.object, thing.direction


def _hue(colour: Tensor) -> Tensor:
    """Return the angle of colours ``[..., 3]`` in the circle of hues, ``[...]`` in radians."""
    red, green, blue = colour.unbind(-1)
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _nearest_colour(colour: Tensor) -> Tensor:
    """Return the index in COLOURS of the nearest hue of colours ``[..., 3]``."""
    table = _hue(torch.tensor(list(COLOURS.values()), dtype=colour.dtype, device=colour.device))
    difference = _hue(colour)[..., None] - table
    return torch.cos(difference).argmax(-1)


def _objectness(frames: Tensor) -> Tensor:
    """Return how much each pixel is object rather than background, ``[F, H, W]`` in [0, 1]."""
    saturation = frames.amax(1) - frames.amin(1)
    low, high = SATURATION
    return ((saturation - low) / (high - low)).clamp(0, 1)


def _direction(weights: Tensor) -> str | None:
    """Return where the centre of ``weights`` ``[F, H, W]`` goes until it is farthest away."""
    height, width = weights.shape[1:]
    mass = weights.sum((1, 2))
    seen = mass > 0.2 * mass.median()
    y = torch.arange(height, dtype=weights.dtype, device=weights.device)
    x = torch.arange(width, dtype=weights.dtype, device=weights.device)
    centres = torch.stack(
        ((weights.sum(1) * x).sum(1), (weights.sum(2) * y).sum(1)), dim=1
    ) / mass.clamp(min=1e-6).unsqueeze(1)
    centres = centres[seen]
    if len(centres) < 2:
        return None
    # Means of neighbouring frames, so that one bad frame decides nothing.
    window = max(1, len(centres) // 5)
    smooth = centres.unfold(0, window, 1).mean(-1)
    away = smooth - smooth[0]
    farthest = away[away.square().sum(1).argmax()]
    axis = int(farthest.abs().argmax())
    if float(farthest[axis].abs()) < STILL * (width, height)[axis]:
        return None
    step = int(farthest[axis].sign())
    return next(
        name for name, unit in DIRECTIONS.items() if unit == ((step, 0) if axis == 0 else (0, step))
    )


def _interval(profile: Tensor) -> tuple[float, float]:
    """Return the first and last edge between which a profile ``[N]`` holds all but its tails."""
    profile = profile / profile.sum().clamp(min=1e-6)
    share = profile.cumsum(0)
    inside = ((share > TAIL) & (share - profile < 1 - TAIL)).nonzero()
    return float(inside[0]), float(inside[-1] + 1)


def outline(weights: Tensor) -> Tensor:
    """Return an object's outline, the mean over frames of its box, ``[SIDE, SIDE]`` in [0, 1].

    The box is a square around the object in each frame of ``weights`` ``[F, H, W]``; SIDE is
    TEMPLATE_SIDE. Frames without the object are left out.
    """
    height, width = weights.shape[1:]
    mass = weights.sum((1, 2))
    boxes, seen = [], []
    for frame in (mass > max(4.0, 0.2 * float(mass.median()))).nonzero().flatten().tolist():
        left, right = _interval(weights[frame].sum(0))
        top, bottom = _interval(weights[frame].sum(1))
        boxes.append((left + right, top + bottom, max(right - left, bottom - top)))
        seen.append(frame)
    if not seen:
        return weights.new_zeros(TEMPLATE_SIDE, TEMPLATE_SIDE)
    box = torch.tensor(boxes, dtype=weights.dtype, device=weights.device)
    # One size for all frames: objects do not grow, and a frame in which one is torn says little.
    side = MARGIN * box[:, 2].median()
    cells = (torch.arange(TEMPLATE_SIDE, device=weights.device) + 0.5) / TEMPLATE_SIDE - 0.5
    x = (box[:, 0:1] / 2 + cells * side) / width * 2 - 1
    y = (box[:, 1:2] / 2 + cells * side) / height * 2 - 1
    grid = torch.stack(
        (
            x[:, None, :].expand(-1, TEMPLATE_SIDE, -1),
            y[:, :, None].expand(-1, -1, TEMPLATE_SIDE),
        ),
        dim=-1,
    )
    crops = F.grid_sample(weights[seen][:, None], grid.to(weights.dtype), align_corners=False)
    return crops.mean((0, 1))


def _drawn_shape(name: str) -> Tensor:
    """Return a shape as the data draws it, crisp, ``[96, 96]``."""
    axis = (torch.arange(96) + 0.5) / 48 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    farther = torch.maximum(x.abs(), y.abs())
    if name == "circle":
        inside = x.square() + y.square() < 0.81
    elif name == "square":
        inside = farther < 0.8
    elif name == "triangle":
        inside = (x.abs() < 0.5 * (y + 0.9)) & (y < 0.8)
    elif name == "cross":
        inside = (torch.minimum(x.abs(), y.abs()) < 0.32) & (farther < 0.9)
    else:  # the frame of a picture
        inside = (farther < 0.85) & (farther > 0.41)
    return inside.float()


def _drawn_digit(values: str) -> Tensor:
    """Return strokes from 8 rows of hexadecimal grey values, ``[96, 96]``."""
    grey = torch.tensor([int(value, 16) / 15 for value in values]).view(1, 1, 8, 8)
    large = F.interpolate(grey, size=(96, 96), mode="bicubic")
    large = F.avg_pool2d(large, 7, stride=1, padding=3)[0, 0]
    return ((large - 0.15) / 0.3).clamp(0, 1)


def _templates(like: Tensor) -> tuple[list[str], Tensor]:
    """Return the objects' names and outlines of mean 0 and norm 1, ``[N, SIDE × SIDE]``."""
    names, drawn = [], []
    for name in OBJECTS:
        if name in DIGITS:
            for values in _DIGITS[name]:
                names.append(name)
                drawn.append(_drawn_digit(values))
        else:
            names.append(name)
            drawn.append(_drawn_shape(name))
    outlines = torch.stack([outline(alpha[None]) for alpha in drawn]).flatten(1)
    return names, _standardised(outlines).to(like)


def _standardised(outlines: Tensor) -> Tensor:
    """Return outlines ``[..., N]`` with mean 0 and norm 1 (0 where nothing varies)."""
    return F.normalize(outlines - outlines.mean(-1, keepdim=True), dim=-1)


@plain_torch()
def _object(weights: Tensor) -> str | None:
    """Return the name of the nearest template to the outline of ``weights`` ``[F, H, W]``."""
    seen = _standardised(outline(weights).flatten())
    names, templates = _templates(seen)
    if float(seen.abs().sum()) == 0:
        return None
    return names[int((templates @ seen).argmax())]


@plain_torch()
def object_margin(frames: Tensor, caption: str) -> float:
    """Return how much nearer the outline of what is seen is to the object of ``caption`` than to
    any other, from -2 to 2: above 0 where ``score_prompt`` sees it, and 0 where nothing is seen.

    ``frames`` is ``[F, 3, H, W]`` in [0, 1]; ``caption`` has one thing.
    """
    things = parse_caption(caption).things
    if len(things) != 1:
        raise ValueError(f"caption={caption!r} has {len(things)} things; name one")
    seen = _standardised(outline(_objectness(frames.detach().float().clamp(0, 1))).flatten())
    names, templates = _templates(seen)
    likeness = (templates @ seen).tolist()
    by_name = list(zip(names, likeness, strict=True))
    captioned = max(value for name, value in by_name if name == things[0].object)
    other = max(value for name, value in by_name if name != things[0].object)
    return float(captioned - other)


def _background(frames: Tensor, weights: Tensor) -> str | None:
    """Return what ``frames`` ``[F, 3, H, W]`` show where ``weights`` ``[F, H, W]`` are 0."""
    small = F.interpolate(frames, size=(DETAIL_SIDE, DETAIL_SIDE), mode="area")
    covered = F.interpolate(weights[:, None], size=(DETAIL_SIDE, DETAIL_SIDE), mode="area")
    free = (F.max_pool2d(covered, 5, stride=1, padding=2) < 0.02).to(frames.dtype)[:, 0]
    if float(free.sum()) < 1:
        return None
    grey = small.mean(1)
    across = (grey[:, :, 1:] - grey[:, :, :-1]).abs() * free[:, :, 1:]
    along = (grey[:, 1:] - grey[:, :-1]).abs() * free[:, 1:]
    detail = (across.sum() + along.sum()) / (free[:, :, 1:].sum() + free[:, 1:].sum()).clamp(min=1)
    if float(detail) > DETAIL:
        return PHOTOGRAPH
    mean = (small * free[:, None]).sum((0, 2, 3)) / free.sum()
    table = torch.tensor(list(BACKGROUNDS.values()), dtype=mean.dtype, device=mean.device)
    return list(BACKGROUNDS)[int((table - mean).square().sum(1).argmin())]


def read_scene(frames: Tensor, num_things: int = 1) -> Scene:
    """Return what a video shows.

    ``frames`` is ``[F, 3, H, W]`` in [0, 1]. One thing is all that is saturated; two or more are
    distinguished by their colours and returned with the largest first.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(
            f"frames must be [F, 3, H, W] in [0, 1], but has shape {tuple(frames.shape)}"
        )
    if num_things < 1:
        raise ValueError(f"num_things={num_things} must be at least 1")
    frames = frames.detach().float().clamp(0, 1)
    weights = _objectness(frames)
    pixels = frames.movedim(1, -1)
    if num_things == 1:
        parts = [weights]
    else:
        nearest = _nearest_colour(pixels)
        by_colour = [weights * (nearest == index) for index in range(len(COLOURS))]
        parts = sorted(by_colour, key=lambda part: -float(part.sum()))[:num_things]
    things = []
    for part in parts:
        if float(part.sum()) < 4 * len(frames):
            things.append(Thing(None, None, None))
            continue
        mean = (pixels * part[..., None]).sum((0, 1, 2)) / part.sum()
        colour = list(COLOURS)[int(_nearest_colour(mean))]
        things.append(Thing(colour, _object(part), _direction(part)))
    return Scene(tuple(things), _background(frames, weights))


def score_prompt(frames: Tensor, caption: str) -> PromptScore:
    """Return how much of ``caption`` the video shows.

    ``frames`` is ``[F, 3, H, W]`` in [0, 1]. Things are matched to what is seen in the order that
    agrees best.
    """
    captioned = parse_caption(caption)
    shown = read_scene(frames, len(captioned.things))
    agreements = [
        [
            sum(_words(thing)[word] == _words(seen)[word] for thing, seen in pairs)
            / len(captioned.things)
            for word in range(3)
        ]
        for order in itertools.permutations(shown.things)
        if (pairs := list(zip(captioned.things, order, strict=True)))
    ]
    colour, name, direction = max(agreements, key=sum)
    return PromptScore(colour, name, direction, float(captioned.background == shown.background))
