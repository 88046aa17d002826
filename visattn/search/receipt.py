"""The receipt of a search: what was found, as the JSON values that ``visattn.report`` draws."""

from __future__ import annotations

import base64
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn._version import __version__
from visattn.attention.lowering import block_sizes, lower_cached
from visattn.patterns import Dense, HeadPattern, Pattern, Stencil
from visattn.search.measure.statistics import Interval, interval
from visattn.search.measure.tile_grid import TileGrid
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.search.solve.price_table import Group, PriceTable
from visattn.tasks.result_store import StoredResult

__all__ = ["ClipStatistics", "claims", "head_rows", "machine", "stencil_rows"]

PLANNED = "plan"  # the name of the chosen plan among clips
FLIPS = 2  # verdicts of 60 that may differ from dense
NEAR = 0.07  # of the measured speed that the prediction may be off
MORE = 1.0  # dB over the best uniform static family
MOST_STENCILS = 200  # heads whose stencils the page draws


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number of the report; None where it is not finite."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


class ClipStatistics:
    """Held-out clips, dense and by plans.

    Args:
        clips: ``(prompt, seed, item)`` of ``clip_of``.
    """

    def __init__(self, clips: Sequence[tuple[str, int, StoredResult]]) -> None:
        self.clips = list(clips)

    def __len__(self) -> int:
        return len(self.clips)

    def values(self, name: str, key: str) -> list[float]:
        """A number of every clip that has it; images have no flicker."""
        found = [item.value[name][key] for _, _, item in self.clips]
        return [float(value) for value in found if value is not None]

    def psnr(self, name: str) -> Interval:
        """Against dense, in dB."""
        return interval(self.values(name, "psnr"))

    def over(self, name: str, other: str) -> Interval:
        """How much more PSNR a plan has than another, clip by clip."""
        pairs = zip(self.values(name, "psnr"), self.values(other, "psnr"), strict=True)
        return interval([a - b for a, b in pairs])

    def speed(self, name: str) -> tuple[float, float, float]:
        """Median dense seconds over the median of a plan; and the quartiles of the clips'
        ratios."""
        dense, own = self.values("dense", "seconds"), self.values(name, "seconds")
        ratios = [a / b for a, b in zip(dense, own, strict=True)]
        middle = statistics.median(dense) / statistics.median(own)
        if len(ratios) < 2:
            return middle, middle, middle
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high

    def flips(self, name: str) -> tuple[int, int]:
        """Verdicts that differ from those on the dense clip, of how many."""
        differ = total = 0
        for _, _, item in self.clips:
            dense, own = item.value["dense"]["verdicts"], item.value[name]["verdicts"]
            total += len(dense)
            differ += sum(own.get(key) != value for key, value in dense.items())
        return differ, total

    def why_flips(self, name: str) -> str:
        """Which verdicts differ, and how often the dense clips themselves show what is said."""
        words: dict[str, int] = {}
        held = total = 0
        for _, _, item in self.clips:
            dense, own = item.value["dense"]["verdicts"], item.value[name]["verdicts"]
            for key, value in dense.items():
                words[key] = words.get(key, 0) + (own.get(key) != value)
                held, total = held + (value >= 1), total + 1
        counts = ", ".join(f"{count} of {key}" for key, count in words.items())
        return f"{counts}; the dense clips themselves show {held} of {total} as the prompts say"

    def shown(self, label: str) -> list[dict[str, Any]]:
        """The clips of which there are videos, as the page takes them."""
        out = []
        for prompt, seed, item in self.clips:
            if "dense" not in item.tensors:
                continue
            own, dense = item.value[PLANNED], item.value["dense"]
            verdict = None
            if dense["verdicts"]:
                verdict = {"dense": _words(dense["verdicts"]), "sparse": _words(own["verdicts"])}
            out.append(
                {
                    "prompt": prompt,
                    "seed": seed,
                    "dense": _base64(item.tensors["dense"]),
                    "sparse": _base64(item.tensors[PLANNED]),
                    "dense_label": "dense",
                    "sparse_label": label,
                    "metrics": [
                        _metric("PSNR", own["psnr"], "dB", None),
                        _metric("SSIM", own["ssim"], "", None),
                        _metric("flicker", own["flicker"], "", own["flicker_dense"]),
                    ],
                    "verdict": verdict,
                    "seconds": {
                        "dense": rounded(dense["seconds"], 3),
                        "sparse": rounded(own["seconds"], 3),
                    },
                }
            )
        return out


def _metric(name: str, value: float | None, unit: str, dense: float | None) -> dict[str, Any]:
    return {"name": name, "value": rounded(value), "unit": unit, "dense": rounded(dense)}


def _words(verdicts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {'✓' if value >= 1 else '✗'}" for name, value in verdicts.items())


def _base64(data: torch.Tensor) -> str:
    return base64.b64encode(data.numpy().tobytes()).decode()


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran."""
    names = ("diffusers", "transformers", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in names}
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "visattn": __version__,
        "torch": torch.__version__,
        **versions,
    }


def head_rows(
    table: PriceTable, patterns: Mapping[Group, tuple[HeadPattern, ...]]
) -> list[dict[str, Any]]:
    """What every head runs, with what is known of it."""
    sizes = block_sizes(table.layout.length)
    out = []
    for group in table.groups:
        phase, role, number = group
        heads = patterns.get(group, (Dense(),) * table.heads[role, number])
        for head, pattern in enumerate(heads):
            found = table.candidates(group, head)
            at = next((n for n, (_, own) in enumerate(found) if own == pattern), None)
            loss = 0.0 if at is None else float(table.losses[group][head, at, 0])
            density = executed = None
            if isinstance(pattern, Pattern):
                density = pattern.density(table.layout)
                executed = lower_cached(pattern, table.layout, None, *sizes).block_density
            out.append(
                {
                    "role": role,
                    "layer": table.paths[role, number],
                    "number": number,
                    "head": head,
                    "phase": phase,
                    "pattern": repr(pattern),
                    "family": pattern.name if at is None else found[at][0],
                    "density": rounded(density),
                    "executed": rounded(executed),
                    "error": rounded(loss, 6),
                    "seconds": rounded(table.weight(group) * table.times.head(pattern), 6)
                    if repr(pattern) in table.times.seconds
                    else None,
                    "reason": None,
                    "stability": stability(table, group, head),
                }
            )
    return out


def stability(table: PriceTable, group: Group, head: int) -> dict[str, float | None]:
    """How often two generations, and two steps, agree on the best static candidate of about a
    quarter of the pairs."""
    near = [
        number
        for number, (_, pattern) in enumerate(table.pool.static)
        if 0.15 <= pattern.density(table.layout) <= 0.26
    ]
    if not near:
        return {"prompts": None, "steps": None}
    by_prompt: dict[int, list[torch.Tensor]] = {}
    by_step: dict[int, list[torch.Tensor]] = {}
    for generation, place, losses in table.calls[group]:
        own = losses[head, near, 0]
        by_prompt.setdefault(generation, []).append(own)
        by_step.setdefault(place.step, []).append(own)
    return {"prompts": _agreement(by_prompt), "steps": _agreement(by_step)}


def _agreement(parts: Mapping[int, Sequence[torch.Tensor]]) -> float | None:
    best = [int(torch.stack(list(own)).nanmean(0).argmin()) for own in parts.values()]
    pairs = [(a, b) for n, a in enumerate(best) for b in best[n + 1 :]]
    return rounded(sum(a == b for a, b in pairs) / len(pairs)) if pairs else None


def stencil_rows(
    table: PriceTable,
    patterns: Mapping[Group, tuple[HeadPattern, ...]],
    tables: Mapping[tuple[str, int], Sequence[torch.Tensor]],
    grids: Sequence[TileGrid],
    attention: Mapping[tuple[str, int], torch.Tensor],
    query: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """Where the attention of heads lies by relative tile offset, and what their stencils keep."""
    out: list[dict[str, Any]] = []
    for group in table.groups:
        phase, role, number = group
        if phase or len(out) >= MOST_STENCILS or (role, number) not in tables:
            continue
        heads = patterns.get(group, (Dense(),) * table.heads[role, number])
        for head, pattern in enumerate(heads):
            own = pattern if isinstance(pattern, Stencil) else None
            at = next((n for n, grid in enumerate(grids) if own and grid.tile == own.tile), 0)
            grid, values = grids[at], tables[role, number][at][head]
            mass = values[: len(grid.pairs)].view(grid.sides.shape)
            seen = attention.get((role, number))
            out.append(
                {
                    "role": role,
                    "number": number,
                    "head": head,
                    "tile": list(grid.tile),
                    "count": list(grid.count.shape),
                    "mass": _nested(mass),
                    "kept": [] if own is None else [list(offset) for offset in own.offsets],
                    "columns": [] if own is None else list(own.columns),
                    "attention": None if seen is None else _nested(seen[head]),
                    "query": None if seen is None else list(query),
                }
            )
    return out


def _nested(values: torch.Tensor) -> Any:
    """Numbers with four digits that count."""
    return [
        [[float(f"{x:.4g}") for x in row] for row in plane] for plane in values.double().tolist()
    ]


def claims(
    clips: ClipStatistics,
    chosen: EvaluatedPlan,
    static: EvaluatedPlan | None,
    dynamic: EvaluatedPlan | None,
    predicted: float,
    fastest: EvaluatedPlan | None,
) -> list[dict[str, Any]]:
    """What a search should reach, and whether this one did.

    Args:
        static, dynamic: the best uniform ones, under these names among the clips.
        fastest: the dynamic rule that is predicted to be the fastest.
    """
    out: list[dict[str, Any]] = []
    speed, low, high = clips.speed(PLANNED)
    if static is not None:
        over = clips.over(PLANNED, "best static")
        out.append(
            {
                "text": f"The plan is at least {MORE:g} dB over the best uniform static family at "
                f"its speed, {static.name}",
                "holds": over.mean >= MORE and over.low > 0,
                "figures": _decibels(over),
                "cause": None
                if over.mean >= MORE and over.low > 0
                else "the error of the model's own output by which plans are chosen differs too "
                f"little: {chosen.error:.4f} against {static.error:.4f}",
            }
        )
    if dynamic is not None:
        over = clips.over(PLANNED, "best dynamic")
        reason = None
        if dynamic.predicted is not None and dynamic.predicted < 0.97 * (chosen.predicted or 1):
            reason = (
                f"no dynamic rule is as fast here: {dynamic.name} is compared at its own speed, "
                f"{clips.speed('best dynamic')[0]:.2f}x"
            )
            if fastest is not None and fastest.predicted is not None:
                reason += f"; the fastest, {fastest.name}, is predicted at {fastest.predicted:.2f}x"
        out.append(
            {
                "text": "The plan is not below the best uniform dynamic rule",
                "holds": over.high >= 0,
                "figures": _decibels(over),
                "cause": reason,
            }
        )
    differ, total = clips.flips(PLANNED)
    if total:
        allowed = FLIPS * total / 60
        out.append(
            {
                "text": f"At most {FLIPS} of 60 verdicts on the clips differ from dense",
                "holds": differ <= allowed,
                "figures": f"{differ} of {total}",
                "cause": None if differ <= allowed else clips.why_flips(PLANNED),
            }
        )
    off = speed / predicted - 1
    out.append(
        {
            "text": f"The measured speed is within {NEAR:.0%} of the predicted",
            "holds": abs(off) <= NEAR,
            "figures": f"{speed:.3f}x [{low:.3f}, {high:.3f}] against {predicted:.3f}x",
            "cause": None if abs(off) <= NEAR else "the machine's speed moved between the two",
        }
    )
    return out


def _decibels(value: Interval) -> str:
    return f"{value.mean:+.2f} dB [{value.low:+.2f}, {value.high:+.2f}]"
