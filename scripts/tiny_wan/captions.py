"""The captions' grammar, and which combinations of words are held out."""

from __future__ import annotations

import itertools
import zlib

import numpy as np

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

VERBS = ("moves", "glides", "slides")
SPEEDS = ("slowly", "quickly")
PREPOSITIONS = ("over", "across", "on")
BOUNCE = ("and", "bounces", "back")
HELD_OUT_SHARE = 0.1  # of the combinations of colour, object, direction and background

WORDS = tuple(
    dict.fromkeys(
        itertools.chain(
            ("a", "the", "and"),
            COLOURS,
            OBJECTS,
            (str(digit) for digit in DIGITS.values()),
            VERBS,
            SPEEDS,
            DIRECTIONS,
            PREPOSITIONS,
            BOUNCE,
            BACKGROUNDS,
            (PHOTOGRAPH,),
        )
    )
)


def is_held_out(thing: Thing, background: str) -> bool:
    """Return whether this combination of words is never trained on."""
    words = f"{thing.colour} {thing.object} {thing.direction} {background}"
    return zlib.crc32(words.encode()) % 1000 < 1000 * HELD_OUT_SHARE


def combinations(held_out: bool, *, pictures: bool = False) -> list[Scene]:
    """Return all scenes of one object over a soft background that are held out, or that are not."""
    objects = [name for name in OBJECTS if pictures or name != PICTURE]
    return [
        Scene((thing,), background)
        for colour, name, direction, background in itertools.product(
            COLOURS, objects, DIRECTIONS, BACKGROUNDS
        )
        if is_held_out(thing := Thing(colour, name, direction), background) == held_out
    ]


def search_prompts(calibration: int = 4, held_out: int = 20, seed: int = 0) -> dict[str, list[str]]:
    """Return captions for ``visattn search``: trained ones to calibrate on, held-out ones."""
    rng = np.random.default_rng(seed)
    parts = {"calibration": (False, calibration), "held_out": (True, held_out)}
    return {
        name: [plain_caption(scenes[n]) for n in rng.permutation(len(scenes))[:count]]
        for name, (unseen, count) in parts.items()
        for scenes in [combinations(unseen)]
    }


def plain_caption(scene: Scene) -> str:
    """Return the caption in the grammar's plainest words."""
    things = " and ".join(f"a {t.colour} {t.object} moves {t.direction}" for t in scene.things)
    return f"{things} over the {scene.background}"


def varied_caption(
    scene: Scene,
    speeds: tuple[str, ...],
    bounces: tuple[bool, ...],
    rng: np.random.Generator,
) -> str:
    """Return a caption with random verbs and prepositions; speeds are said half of the time."""
    parts = []
    for thing, speed, bounce in zip(scene.things, speeds, bounces, strict=True):
        name = str(thing.object)
        if name in DIGITS and rng.random() < 0.3:
            name = str(DIGITS[name])
        words = ["a", str(thing.colour), name, str(rng.choice(VERBS))]
        if rng.random() < 0.5:
            words.append(speed)
        words.append(str(thing.direction))
        if bounce:
            words.extend(BOUNCE)
        parts.append(" ".join(words))
    return f"{' and '.join(parts)} {rng.choice(PREPOSITIONS)} the {scene.background}"
