"""Statistics over the clips of a validation: PSNR, speed, verdicts."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.search.measure.statistics import Interval, interval
from visattn.tasks.result_store import StoredResult

__all__ = ["PLANNED", "ClipStatistics", "rounded"]

PLANNED = "plan"  # the name of the chosen plan among clips


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Return a number of the report; None where it is not finite."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


class ClipStatistics:
    """Held-out clips, dense and by plans.

    Args:
        clips: ``(prompt, seed, result)``, each result of ``clip_of``.
    """

    def __init__(self, clips: Sequence[tuple[str, int, StoredResult]]) -> None:
        self.clips = list(clips)

    def __len__(self) -> int:
        return len(self.clips)

    def values(self, name: str, key: str) -> list[float]:
        """Return a number of every clip that has it; images have no flicker."""
        values = [result.value[name][key] for _, _, result in self.clips]
        return [float(value) for value in values if value is not None]

    def mean(self, name: str, key: str) -> float | None:
        """Return the mean of a number over clips; None where no clip has it."""
        values = self.values(name, key)
        return statistics.fmean(values) if values else None

    def psnr(self, name: str) -> Interval:
        """Return the PSNR against dense, in dB."""
        return interval(self.values(name, "psnr"))

    def psnr_gain(self, name: str, other: str) -> Interval:
        """Return how much more PSNR a plan has than another, clip by clip, in dB."""
        pairs = zip(self.values(name, "psnr"), self.values(other, "psnr"), strict=True)
        return interval([a - b for a, b in pairs])

    def speed(self, name: str) -> tuple[float, float, float]:
        """Return the median seconds of dense clips over those of a plan, and the quartiles of the
        clips' ratios."""
        dense, sparse = self.values("dense", "seconds"), self.values(name, "seconds")
        ratios = [a / b for a, b in zip(dense, sparse, strict=True)]
        middle = statistics.median(dense) / statistics.median(sparse)
        if len(ratios) < 2:
            return middle, middle, middle
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high

    def flips(self, name: str) -> tuple[int, int]:
        """Return how many verdicts differ from those on the dense clip, and how many there are."""
        differ = total = 0
        for _, _, result in self.clips:
            dense, sparse = result.value["dense"]["verdicts"], result.value[name]["verdicts"]
            total += len(dense)
            differ += sum(sparse.get(key) != value for key, value in dense.items())
        return differ, total

    def why_flips(self, name: str) -> str:
        """Return which verdicts differ, and how often the dense clips match their prompts."""
        differ: dict[str, int] = {}
        held = total = 0
        for _, _, result in self.clips:
            dense, sparse = result.value["dense"]["verdicts"], result.value[name]["verdicts"]
            for key, value in dense.items():
                differ[key] = differ.get(key, 0) + (sparse.get(key) != value)
                held, total = held + (value >= 1), total + 1
        counts = ", ".join(f"{count} of {key}" for key, count in differ.items())
        return f"{counts}; the dense clips match their prompts in {held} of {total} verdicts"

    def with_videos(self, label: str) -> list[dict[str, Any]]:
        """Return the clips of which there are videos, as the page takes them.

        Args:
            label: of the chosen plan.
        """
        return [
            _clip(prompt, seed, result, label)
            for prompt, seed, result in self.clips
            if "dense" in result.tensors
        ]


def _clip(prompt: str, seed: int, result: StoredResult, label: str) -> dict[str, Any]:
    sparse, dense = result.value[PLANNED], result.value["dense"]
    verdict = None
    if dense["verdicts"]:
        verdict = {"dense": _words(dense["verdicts"]), "sparse": _words(sparse["verdicts"])}
    return {
        "prompt": prompt,
        "seed": seed,
        "dense": _base64(result.tensors["dense"]),
        "sparse": _base64(result.tensors[PLANNED]),
        "dense_label": "dense",
        "sparse_label": label,
        "metrics": [
            _metric("PSNR", sparse["psnr"], "dB", None),
            _metric("SSIM", sparse["ssim"], "", None),
            _metric("flicker", sparse["flicker"], "", sparse["flicker_dense"]),
        ],
        "verdict": verdict,
        "seconds": {
            "dense": rounded(dense["seconds"], 3),
            "sparse": rounded(sparse["seconds"], 3),
        },
    }


def _metric(name: str, value: float | None, unit: str, dense: float | None) -> dict[str, Any]:
    return {"name": name, "value": rounded(value), "unit": unit, "dense": rounded(dense)}


def _words(verdicts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {'✓' if value >= 1 else '✗'}" for name, value in verdicts.items())


def _base64(data: torch.Tensor) -> str:
    return base64.b64encode(data.numpy().tobytes()).decode()
