"""The receipt of a search: all that it measured, as the JSON values of ``visattn.report``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from visattn._version import __version__
from visattn.cost import device_name
from visattn.plan import Plan
from visattn.search.arguments import Goal
from visattn.search.candidates.learned_stencils import middle_of
from visattn.search.claims import claims
from visattn.search.clip_statistics import PLANNED, ClipStatistics, rounded
from visattn.search.comparison import Comparison
from visattn.search.head_rows import head_rows, stability_rows, stencil_rows
from visattn.search.request import SearchRequest
from visattn.search.result import SearchResult
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.search.stages.calibrate import Calibrated
from visattn.search.stages.observe import Observed
from visattn.search.stages.price import Priced

__all__ = ["Searched", "attention_share", "write_receipt"]

NO_SCORER = (
    "no scorer was given: the clips are compared frame by frame with the dense ones, and nothing "
    "judges whether they show what the prompts say"
)


@dataclass(frozen=True)
class Searched:
    """The results of all stages.

    Attributes:
        request: the search.
        goal: which plan was asked for.
        observed: result of the first stage.
        calibrated: result of the second stage.
        priced: result of the third stage.
        comparison: the plans, the chosen one, and those it is compared with.
        steps: predicted speedup of each compared plan, by name.
        clips: clips of the fifth stage.
        notes: sentences for the reader of the receipt.
        command: the command line, if there was one.
        begin: ``time.monotonic()`` at the start of the search.
    """

    request: SearchRequest
    goal: Goal
    observed: Observed
    calibrated: Calibrated
    priced: Priced
    comparison: Comparison
    steps: Mapping[str, float]
    clips: ClipStatistics
    notes: Sequence[str]
    command: str | None
    begin: float


def write_receipt(searched: Searched) -> SearchResult:
    """Return the chosen plan with its evidence, and the receipt."""
    request, clips = searched.request, searched.clips
    comparison, chosen = searched.comparison, searched.comparison.chosen
    plan = _with_evidence(searched)
    rows = [_row(evaluated, searched) for evaluated in comparison.listed()]
    heads = head_rows(searched.priced.table, chosen.heads)
    grid = searched.observed.layout.grids[0][1]
    target, speed, psnr = request.target, clips.speed(PLANNED)[0], clips.psnr(PLANNED)
    report: dict[str, Any] = {
        "schema": "visattn.report/1",
        "kind": "search",
        "title": f"{target.name} at {searched.observed.layout}: {speed:.2f}x, {psnr.mean:.1f} dB",
        "command": searched.command or "",
        "model": {
            "name": target.name,
            "denoisers": {
                role: {"class": d.kind, "layers": d.layers, "heads": d.heads}
                for role, d in target.denoisers.items()
            },
        },
        "layout": str(searched.observed.layout),
        "grid": list(grid.shape),
        "settings": {
            **target.call,
            **searched.goal.given,
            "phases": len(request.phases) + 1,
            "calibration prompts": len(request.prompts),
            "held-out pairs": len(clips),
        },
        "machine": _machine(target.device),
        "headline": _headline(searched, heads),
        "clips": clips.with_videos(f"plan, {speed:.2f}x"),
        "heads": heads,
        "stencils": stencil_rows(
            searched.priced.table,
            chosen.heads,
            searched.calibrated.tables,
            searched.priced.grids,
            searched.calibrated.attention,
            middle_of(grid),
        ),
        "front": [_point(row) for row in rows],
        "table": rows,
        "speed": [_speed_row(name, x, searched) for name, x in comparison.named.items()],
        "claims": claims(
            clips,
            chosen,
            comparison.static,
            comparison.dynamic,
            searched.steps[PLANNED],
            comparison.fastest_dynamic,
        ),
        "stability": stability_rows(heads),
        "failures": [
            {"item": item, "error": error} for item, error in request.runner.failures.items()
        ],
        "notes": _notes(searched),
        "time": [
            {"stage": name, "seconds": round(value, 2)}
            for name, value in request.runner.seconds.items()
        ],
        "plan": json.loads(plan.to_json()),
    }
    return SearchResult(plan, report, request.runner.store.folder)


def attention_share(observed: Observed, priced: Priced) -> float:
    """Return the share of a dense generation's seconds that attention takes."""
    table = priced.table
    runs = sum(map(table.weight, table.groups))
    share: float = table.times.dense * runs / observed.seconds
    return min(1.0, share)


def _with_evidence(searched: Searched) -> Plan:
    """Return the chosen plan with its evidence and its provenance."""
    request, clips, chosen = searched.request, searched.clips, searched.comparison.chosen
    return replace(
        chosen.plan,
        evidence={
            "speedup_measured": round(clips.speed(PLANNED)[0], 4),
            "speedup_predicted": round(searched.steps[PLANNED], 4),
            "psnr": [round(value, 3) for value in clips.psnr(PLANNED)],
            "error": round(chosen.error, 6),
            "pairs": len(clips),
            "call": dict(request.target.call),
            "measured_on": device_name(request.target.device),
        },
        provenance={
            "kind": f"searched: {chosen.name}",
            "goal": searched.goal.given,
            "fingerprint": request.runner.about["model"],
            "calibrated_on": [list(pair) for pair in request.prompts],
            "visattn": __version__,
        },
    )


def _notes(searched: Searched) -> list[str]:
    chosen = searched.comparison.chosen
    notes = list(searched.notes)
    for other in searched.priced.table.also:
        notes.append(
            f"at {other.layout} the plan is predicted at {other.speedup(chosen.heads):.2f}x"
        )
    if chosen.kind != "searched":
        notes.append(
            f"the plans made by the search are rejected: {chosen.name}, {chosen.kind}, has less "
            f"error at {chosen.target_speedup:g}x"
        )
    if searched.request.scorer is None:
        notes.append(NO_SCORER)
    return notes


def _headline(searched: Searched, heads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that are read first."""
    clips = searched.clips
    psnr = clips.psnr(PLANNED)
    density = [row["density"] for row in heads if row["density"] is not None]
    executed = [row["executed"] for row in heads if row["executed"] is not None]
    return [
        {
            "label": "a whole generation",
            "value": f"{clips.speed(PLANNED)[0]:.2f}x",
            "note": f"predicted {searched.steps[PLANNED]:.2f}x",
        },
        {
            "label": "PSNR against dense",
            "value": f"{psnr.mean:.1f} dB",
            "note": f"[{psnr.low:.1f}, {psnr.high:.1f}], {len(clips)} clips",
        },
        {
            "label": "density",
            "value": f"{sum(density) / len(density):.2f}" if density else None,
            "note": f"{sum(executed) / len(executed):.2f} of the blocks" if executed else "",
        },
        {
            "label": "attention, of a dense generation",
            "value": f"{attention_share(searched.observed, searched.priced):.0%}",
            "note": f"{searched.observed.seconds:.2f} s in all",
        },
        {
            "label": "searched in",
            "value": _minutes(time.monotonic() - searched.begin),
            "note": f"{len(searched.comparison.plans)} plans tried",
        },
    ]


def _row(evaluated: EvaluatedPlan, searched: Searched) -> dict[str, Any]:
    """Return a line of the table of plans."""
    clips, named = searched.clips, searched.comparison.named
    name = next((name for name, other in named.items() if other is evaluated), None)
    row: dict[str, Any] = {
        "name": evaluated.label,
        "kind": evaluated.kind,
        "pattern": evaluated.pattern,
        "density": rounded(evaluated.density),
        "executed": None,
        "predicted": rounded(evaluated.predicted if name is None else searched.steps[name]),
        "measured": None,
        "error": rounded(evaluated.error, 6),
        "psnr": None,
        "psnr_low": None,
        "psnr_high": None,
        "against": None,
        "against_low": None,
        "against_high": None,
        "ssim": None,
        "flicker": None,
        "flips": "",
        "note": "",
        "chosen": name == PLANNED,
    }
    if name is None:
        return row
    psnr = clips.psnr(name)
    differ, total = clips.flips(name)
    row |= {
        "measured": rounded(clips.speed(name)[0]),
        "psnr": rounded(psnr.mean, 3),
        "psnr_low": rounded(psnr.low, 3),
        "psnr_high": rounded(psnr.high, 3),
        "ssim": rounded(clips.mean(name, "ssim")),
        "flicker": rounded(clips.mean(name, "flicker"), 5),
        "flips": f"{differ} of {total}" if total else "",
    }
    if name != PLANNED:
        gain = clips.psnr_gain(PLANNED, name)
        row |= {
            "against": rounded(gain.mean, 3),
            "against_low": rounded(gain.low, 3),
            "against_high": rounded(gain.high, 3),
        }
    return row


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the table as a point of the front."""
    keys = ("name", "kind", "measured", "error", "psnr", "psnr_low", "psnr_high", "chosen")
    return {key: row[key] for key in (*keys, "pattern")} | {"speed": row["predicted"]}


def _speed_row(name: str, evaluated: EvaluatedPlan, searched: Searched) -> dict[str, Any]:
    """Return the predicted and the measured speedup of a plan."""
    measured, low, high = searched.clips.speed(name)
    return {
        "name": evaluated.label,
        "predicted": rounded(searched.steps[name]),
        "measured": rounded(measured),
        "low": rounded(low),
        "high": rounded(high),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """Return the device and the versions of the libraries."""
    names = ("diffusers", "transformers", "accelerate")
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "visattn": __version__,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
