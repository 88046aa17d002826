"""The arguments of a search, read and checked: settings, goal, prompts, time budget."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from visattn._arguments import check_count, is_number

__all__ = [
    "SEED_OFFSET",
    "Goal",
    "PromptPair",
    "Settings",
    "read_budget",
    "read_goal",
    "split_prompts",
]

PromptPair = tuple[str, int]  # a prompt and a seed

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
SEED_OFFSET = 1000  # held-out clips have the seeds of the calibration plus this
DEFAULT_MAX_ERROR = 0.05


@dataclass(frozen=True)
class Settings:
    """How much a search measures.

    Args:
        steps: denoising steps of each generation whose attention is read.
        tiles: query tiles sampled in each attention call.
        rows: query rows sampled in each tile.
        replays: approximate number of recorded denoiser calls used to score a plan.
        pairs: (prompt, seed) pairs on which the result is validated.
        pictures: how many of these pairs have their videos in the receipt.
        layer_seconds: approximate time budget, in seconds, for measuring each layer's effect on
            the model output in isolation.
        exact: score whole attention outputs instead of sampled rows; several times slower.

    Example:
        >>> import visattn.search
        >>> quick = visattn.search.Settings(steps=2, pairs=4, pictures=1)
        >>> quick.tiles, quick.rows
        (8, 8)
    """

    steps: int = 4
    tiles: int = 8
    rows: int = 8
    replays: int = 8
    pairs: int = 20
    pictures: int = 4
    layer_seconds: float = 300.0
    exact: bool = False


@dataclass(frozen=True)
class Goal:
    """Which plan a search chooses; one of the three is a number.

    Args:
        target_speedup: the plan of least error at this speedup of a whole generation.
        max_error: the fastest plan whose error of the denoiser's output is at most this.
        min_psnr: the fastest plan whose videos have this PSNR against dense, in dB.
    """

    target_speedup: float | None = None
    max_error: float | None = None
    min_psnr: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The goal by its name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_goal(
    target_speedup: float | None, max_error: float | None, min_psnr: float | None
) -> Goal:
    """Return the goal of a search; without any, the default is ``max_error=0.05``.

    Raises:
        TypeError: a goal is no number.
        ValueError: there are two goals, or one is out of range.
    """
    goal = Goal(target_speedup, max_error, min_psnr)
    names = list(goal.given)
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} exclude each other; give one")
    for name, value in goal.given.items():
        least = 1.0 if name == "target_speedup" else 0.0
        if not is_number(value):
            raise TypeError(f"{name}={value!r} must be a number above {least:g}")
        if not (math.isfinite(value) and value > least):
            raise ValueError(f"{name}={value} must be a number above {least:g}")
    return goal if names else Goal(max_error=DEFAULT_MAX_ERROR)


def split_prompts(
    prompts: Sequence[str], held_out: Sequence[str] | None, seeds: Sequence[int], pairs: int
) -> tuple[list[PromptPair], list[PromptPair]]:
    """Return the (prompt, seed) pairs to calibrate on, and ``pairs`` held-out ones.

    Raises:
        TypeError: prompts or held_out are no lists of texts.
        ValueError: there are no prompts or no seeds, or a held-out prompt is also calibrated on.
    """
    for name, texts in (("prompts", prompts), ("held_out", held_out or ())):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a list of texts")
    if not prompts or not seeds:
        raise ValueError(f"{'seeds' if prompts else 'prompts'} is empty; give at least one")
    for seed in seeds:
        check_count("seeds", seed, 0)
    calibration = list(dict.fromkeys(prompts))
    if held_out is None:
        unseen = calibration[1::2] or calibration
        calibration = calibration[::2]
    else:
        unseen = list(dict.fromkeys(held_out))
        shared = [text for text in unseen if text in calibration]
        if shared or not unseen:
            raise ValueError(
                f"held_out holds {shared[0]!r}, which is in prompts too"
                if shared
                else "held_out is empty; leave it out to hold out some of the prompts"
            )
    first = max(seeds) + SEED_OFFSET
    return (
        [(text, seeds[n % len(seeds)]) for n, text in enumerate(calibration)],
        [(unseen[n % len(unseen)], first + n) for n in range(pairs)],
    )


def read_budget(text: str | float | None) -> float:
    """Return the seconds of ``"10m"``, ``"90s"`` or ``"2h"``, of a number of seconds, or of None
    (infinite).

    Raises:
        ValueError: it is none of these.
    """
    if text is None:
        return math.inf
    if is_number(text) and text > 0:
        return float(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"budget={text!r} must be a time such as '90s', '10m' or '2h'")
    return float(match[1]) * UNITS[match[2]]
