"""A training that stops and goes on: when to stop, what a step is, what a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_wan.checkpoint import save_checkpoint
from tiny_wan.muon import Muon
from tiny_wan.presets import Preset

REPORT_EVERY = 25  # steps
JUDGE_EVERY = 500  # steps between held-out figures
SAVE_EVERY_S = 240.0


class Clock:
    """Says when to stop and when to save."""

    def __init__(self, minutes: float | None = None, last: int | None = None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.last = last  # the step of a stage to stop at
        self.saved = self.reported = time.monotonic()

    def says_stop(self, step: int) -> bool:
        """Return whether the minutes, or the steps, are over."""
        return step == self.last or (self.end is not None and time.monotonic() >= self.end)

    def says_save(self) -> bool:
        """Return whether a checkpoint is due, and count from now if so."""
        due = time.monotonic() - self.saved > SAVE_EVERY_S
        if due:
            self.saved = time.monotonic()
        return due

    def seconds_since_report(self) -> float:
        """Return the seconds since the last call."""
        now = time.monotonic()
        seconds, self.reported = now - self.reported, now
        return seconds


@dataclass
class Stage:
    """One training: what it steps, what a step is, and what a checkpoint holds.

    ``loss_of(step, batch)`` returns the loss and figures to report.
    """

    name: str
    steps: int
    data: torch.utils.data.Dataset[Any]
    model: torch.nn.Module
    optimiser: Muon
    scale: Callable[[int, int], float]
    loss_of: Callable[[int, Any], tuple[Tensor, dict[str, float]]]
    extra: dict[str, Any]  # more tensors and numbers for the checkpoint
    after_step: Callable[[int], None] = lambda step: None
    judge: Callable[[], str] | None = None


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def random_numbers(preset: Preset, stage: int, step: int) -> torch.Generator:
    """Return the random numbers of a step, the same whenever it runs."""
    return torch.Generator().manual_seed((preset.seed * 4 + stage) * 10_000_000 + step)


def batches_from(
    data: torch.utils.data.Dataset[Any], steps: range, preset: Preset
) -> Iterator[Any]:
    """Yield the batches of the steps."""
    return iter(
        torch.utils.data.DataLoader(
            data, sampler=steps, batch_size=None, num_workers=preset.workers
        )
    )


def train(stage: Stage, preset: Preset, path: Path, first: int, clock: Clock) -> bool:
    """Take the stage's steps from ``first`` on; return whether it is finished."""

    def save(step: int) -> None:
        content = {
            "step": step,
            "model": stage.model.state_dict(),
            "optimiser": stage.optimiser.state_dict(),
        }
        for key, value in stage.extra.items():
            content[key] = value.state_dict() if isinstance(value, torch.nn.Module) else value
        save_checkpoint(path, content)

    figures: dict[str, list[float]] = {}
    count = 0
    steps = range(first, stage.steps)
    for step, batch in zip(steps, batches_from(stage.data, steps, preset), strict=True):
        if clock.says_stop(step):
            save(step)
            return False
        stage.optimiser.set_scale(stage.scale(step, stage.steps))
        loss, found = stage.loss_of(step, batch)
        stage.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        stage.optimiser.step()
        stage.after_step(step)
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
        count += 1
        done = step + 1
        if done % REPORT_EVERY == 0:
            means = " ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in sorted(figures.items()))
            seconds = clock.seconds_since_report() / count
            say(f"{stage.name} {done}/{stage.steps} {means} {seconds:.3f} s/step")
            figures, count = {}, 0
        if stage.judge is not None and done % JUDGE_EVERY == 0:
            say(f"{stage.name} {done}/{stage.steps} {stage.judge()}")
        if clock.says_save():
            save(done)
    if first < stage.steps:
        save(stage.steps)
    return True
