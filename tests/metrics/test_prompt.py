"""The scorer reads what the data draws, and agrees with other captions as often as chance."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from visattn.metrics.prompt import (
    COLOURS,
    DIRECTIONS,
    OBJECTS,
    PICTURE,
    Scene,
    Thing,
    object_margin,
    parse_caption,
    read_scene,
    score_prompt,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
needs_digits = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sklearn", "skimage"))),
    reason="needs scikit-learn and scikit-image",
)


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch):
    """The data's generator, as the training script finds it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from tiny_wan import scenes

    yield scenes
    for name in [name for name in sys.modules if name.split(".")[0] == "tiny_wan"]:
        del sys.modules[name]


def rectangle(
    *,
    colour: tuple[float, float, float] = COLOURS["red"],
    background: tuple[float, float, float] = (0.5, 0.52, 0.54),
    start: tuple[int, int] = (4, 20),
    step: tuple[int, int] = (2, 0),
    num_frames: int = 12,
    size: tuple[int, int] = (48, 64),
) -> torch.Tensor:
    """Return a plain moving square of 16 pixels, ``[F, 3, H, W]``; places and steps are (x, y)."""
    frames = torch.tensor(background).view(1, 3, 1, 1).repeat(num_frames, 1, *size)
    for frame in range(num_frames):
        x, y = start[0] + step[0] * frame, start[1] + step[1] * frame
        frames[frame, :, y : y + 16, x : x + 16] = torch.tensor(colour).view(3, 1, 1)
    return frames


def test_caption_is_parsed():
    scene = parse_caption("A blue 4 glides slowly UP and bounces back across the snow")
    assert scene == Scene((Thing("blue", "four", "up"),), "snow")
    scene = parse_caption("a red square moves left and a green zero moves down over the photograph")
    assert scene.things == (Thing("red", "square", "left"), Thing("green", "zero", "down"))
    assert scene.background == "photograph"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog runs",
        "a red square moves left",
        "red over the fog",
        "a square moves on the fog",
    ],
)
def test_caption_without_all_four_words_is_refused(caption):
    with pytest.raises(ValueError, match="must name a colour, an object, a direction"):
        parse_caption(caption)


def test_frames_are_checked():
    with pytest.raises(ValueError, match=r"frames must be \[F, 3, H, W\]"):
        read_scene(torch.zeros(5, 8, 8, 3))
    with pytest.raises(ValueError, match="num_things=0"):
        read_scene(torch.zeros(5, 3, 8, 8), 0)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_plain_square_is_read(colour, direction):
    step = DIRECTIONS[direction]
    start = (24 - 8 * step[0], 16 - 8 * step[1])
    frames = rectangle(colour=COLOURS[colour], start=start, step=step, num_frames=17)
    assert read_scene(frames) == Scene((Thing(colour, "square", direction),), "fog")


def test_margin_is_above_0_where_the_object_is_seen():
    frames = rectangle()
    caption = "a red {} moves right over the fog".format
    assert read_scene(frames).things[0].object == "square"
    assert object_margin(frames, caption("square")) > 0
    for other in set(OBJECTS) - {"square"}:
        assert -2 <= object_margin(frames, caption(other)) < 0
    assert object_margin(torch.full((5, 3, 32, 32), 0.5), caption("square")) == 0
    with pytest.raises(ValueError, match="2 things"):
        object_margin(frames, "a red square moves left and a green zero moves down over the fog")


def test_nothing_is_read_from_an_empty_video():
    assert read_scene(torch.full((5, 3, 32, 32), 0.5)).things == (Thing(None, None, None),)
    frames = rectangle(step=(0, 0))
    assert read_scene(frames).things == (Thing("red", "square", None),)


def test_reading_depends_on_the_frames_alone():
    frames = rectangle()
    before = frames.clone()
    first = score_prompt(frames, "a red square moves right over the fog")
    assert (first.colour, first.object, first.direction, first.background) == (1, 1, 1, 1)
    assert score_prompt(frames, "a red square moves right over the fog") == first
    assert torch.equal(frames, before)
    assert score_prompt(frames, "a blue circle moves left over the night").mean == 0
    half = score_prompt(frames.half(), "a red circle moves right over the sand")
    assert half.mean == 0.5


def test_a_played_back_video_moves_the_other_way():
    frames = rectangle()
    assert read_scene(frames.flip(0)).things[0].direction == "left"
    assert read_scene(frames.flip(3)).things[0].direction == "left"


def test_two_things_are_told_apart_by_colour():
    frames = rectangle(start=(2, 2), step=(2, 0), size=(64, 64))
    second = rectangle(
        colour=COLOURS["blue"], start=(40, 46), step=(0, -1), size=(64, 64), num_frames=12
    )
    blue = second[:, 2] > 0.8
    frames = torch.where(blue[:, None], second, frames)
    score = score_prompt(frames, "a blue square moves up and a red square moves right over the fog")
    assert score.mean == 1


@pytest.mark.second
@needs_digits
@pytest.mark.parametrize("size", [(17, 64, 64), (25, 96, 96)], ids=str)
def test_held_out_videos_are_read(scenes, size):
    """At least 99 in 100 of the ground truth's words, and few of another caption's."""
    settings = scenes.Settings(size)
    clips = [scenes.draw_clip(settings, 5, index, held_out=True) for index in range(40)]
    own = [score_prompt(clip.frames, clip.caption) for clip in clips]
    assert sum(score.mean for score in own) / len(own) >= 0.99
    shuffled = [
        score_prompt(clip.frames, other.caption)
        for clip, other in zip(clips, clips[7:] + clips[:7], strict=True)
    ]
    chance = (1 / 5 + 1 / 8 + 1 / 4 + 1 / 4) / 4
    assert abs(sum(score.mean for score in shuffled) / len(shuffled) - chance) < 0.1


@needs_digits
def test_rich_videos_are_read(scenes):
    """Two objects, bounces, pictures and photographs, as in the data for a GPU."""
    settings = scenes.Settings((17, 96, 96), rich=True)
    clips = [scenes.draw_clip(settings, 5, index, held_out=True) for index in range(40)]
    scores = [score_prompt(clip.frames, clip.caption) for clip in clips]
    assert sum(score.mean for score in scores) / len(scores) >= 0.98


@needs_digits
def test_every_object_is_read_in_small_and_blurred_videos(scenes):
    for name in OBJECTS:
        if name == PICTURE:
            continue
        scene = Scene((Thing("green", name, "down"),), "night")
        rng = scenes.np.random.default_rng(3)
        clip = scenes.render(scene, scenes.Settings((9, 64, 64)), rng, held_out=True, plain=True)
        blurred = torch.nn.functional.avg_pool2d(clip.frames, 3, stride=1, padding=1)
        assert read_scene(blurred) == scene
