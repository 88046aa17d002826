"""``visattn.search``: from a pipeline and a few prompts to a plan with a receipt."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visattn._arguments import check_count, is_number
from visattn._atomic import write_whole
from visattn._version import __version__
from visattn.cost import device_name
from visattn.patterns import HeadPattern, Skip
from visattn.plan import Plan
from visattn.runtime.processes import join
from visattn.search.candidates.learned_stencils import middle_of
from visattn.search.measure.clip_quality import ClipScorer, caption_scorer
from visattn.search.measure.target import SearchTarget
from visattn.search.receipt import (
    PLANNED,
    ClipStatistics,
    claims,
    head_rows,
    machine,
    rounded,
    stencil_rows,
)
from visattn.search.run import Search, Settings
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.tasks.runner import Progress

__all__ = ["SearchResult", "search"]

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

UNSEEN = 1000  # added to the seeds of held-out pairs
CHOOSING = 4  # clips by which min_psnr is judged, none of them held out


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the chosen one.
        report: the receipt as JSON values (``visattn.report``).
        folder: where results are kept, or None.
    """

    plan: Plan
    report: Mapping[str, Any]
    folder: Path | None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan, ``report.json`` and ``report.html`` into a folder, which is made when it
        is missing; the path of the page. A receipt that is there goes first: whatever ends the
        writing, none stands beside a plan that it is not of.

        Raises:
            OSError: it cannot be written.
        """
        from visattn.report import render_page

        target = Path(folder)
        text = json.dumps(self.report, indent=1, sort_keys=True, allow_nan=False)
        parts = {"report.json": f"{text}\n", "report.html": render_page(self.report)}
        for name in parts:
            (target / name).unlink(missing_ok=True)
        self.plan.save_pretrained(target)
        for name, part in parts.items():
            write_whole(target / name, part.encode())
        return target / "report.html"


def search(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    also: Sequence[Mapping[str, Any]] = (),
    target_speedup: float | None = None,
    max_error: float | None = None,
    min_psnr: float | None = None,
    budget: str | float | None = None,
    phases: int = 1,
    candidates: Sequence[str | HeadPattern] | None = None,
    seeds: Sequence[int] = (0,),
    held_out: Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    scorer: ClipScorer = caption_scorer,
    model: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find out which attention each head of a pipeline needs at a shape, and what that costs.

    Dense generations are read at sampled rows; every candidate's error at the output of each head
    is computed from them, and its seconds are measured; plans for several speeds are put together
    in several ways, beside one pattern for all heads and the choices of published rules; the error
    of the model's own output on the dense trajectory decides between them; and whole generations of
    prompts that were not used before say what the result is worth.

    Args:
        pipe: a diffusers pipeline of a family that plans know; a plan on it is taken off.
        prompts: to calibrate on, a few; the first half is learned from, the other half scores.
        call: arguments of the pipeline's call: ``height``, ``width``, ``num_frames``,
            ``num_inference_steps``, ``guidance_scale``, ``negative_prompt``.
        also: other shapes that the plan is for, as the fields of ``call`` that differ: losses are
            means over all shapes, and the speed is reached at each of them (as MoA's constraint for
            several lengths; Fu et al. 2024, arXiv 2406.14909). Validation is at ``call``.
        target_speedup: of a whole generation, above 1: the plan of least error at that speed.
        max_error: instead, the fastest plan whose error of the denoiser's output
            (``|e' - e|^2 / |e|^2`` with guidance, teacher-forced) is at most this. Without any of
            the three: 0.05.
        min_psnr: instead, the fastest plan whose videos have this PSNR against dense, in dB.
        budget: of time, as ``"10m"``; when it ends, validation takes no further clip.
        phases: equal parts of the denoising steps, each with its own patterns.
        candidates: names of families, or patterns; None: all that there are.
        seeds: of the calibration, one for each prompt in turn; held-out clips have others.
        held_out: prompts of the validation. None: every second one of ``prompts`` is held out;
            where there is one alone it is used with other seeds.
        resume: a folder in which everything is kept as it is found; a search with the same
            arguments goes on from there. The processes of ``torchrun`` share it, and the work.
        settings: how much is looked at.
        scorer: verdicts on a clip, by name; default: of the captions of the small model.
        model, command: for the receipt.
        progress: is told of stages as they go on.

    Returns:
        The plan and the receipt.

    Raises:
        TypeError, ValueError: an argument is wrong, or the speed is not to be had.
        OSError: the folder cannot be made.
    """
    begin = time.monotonic()
    goals = {"target_speedup": target_speedup, "max_error": max_error, "min_psnr": min_psnr}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} exclude each other; give one")
    for name, value in goals.items():
        least = 1.0 if name == "target_speedup" else 0.0
        if value is not None and not is_number(value):
            raise TypeError(f"{name}={value!r} must be a number above {least:g}")
        if value is not None and not (math.isfinite(value) and value > least):
            raise ValueError(f"{name}={value} must be a number above {least:g}")
    if not given:
        goals["max_error"] = 0.05
    check_count("phases", phases, 1)
    deadline = begin + read_budget(budget)
    settings = settings or Settings()
    used, unseen = split_prompts(prompts, held_out, seeds, settings.pairs)
    subject = SearchTarget(pipe, call or {}, model)
    with join("a search") as group:
        own = Search(
            subject,
            used,
            unseen,
            phases=tuple(n / phases for n in range(1, phases)),
            candidates=candidates,
            settings=settings,
            folder=resume,
            progress=progress,
            deadline=deadline,
            scorer=scorer,
            group=group,
        )
        return _run(own, also, goals, command, begin)


def _run(
    own: Search,
    also: Sequence[Mapping[str, Any]],
    goals: Mapping[str, float | None],
    command: str | None,
    begin: float,
) -> SearchResult:
    """All stages of a search, from dense generations to the receipt."""
    target_speedup = goals["target_speedup"]
    elsewhere = [own.beside(fields) for fields in also]
    for each in (own, *elsewhere):
        each.look()
        each.learn()
    own.score()
    for each in elsewhere:
        each.score(like=own)
    own.time()
    for each in elsewhere:
        each.time(like=own)
    own.join()
    own.ask_layers()
    findings = own.try_plans(target_speedup)
    front = best_by_speed(findings)
    if not front:
        raise ValueError(
            f"no plan is faster than dense here, where attention is {_attention_share(own):.0%} of "
            f"a generation, {1e3 * own.table.times.dense:.3g} ms in a layer: more tokens or more "
            "steps have more to save"
        )
    if target_speedup is not None and target_speedup not in front:
        raise ValueError(
            f"target_speedup={target_speedup} cannot be had: plans reach {max(front):g}x here, and "
            f"{own.table.speedup(own.table.uniform(Skip())):.2f}x is what no attention at all "
            "would give"
        )
    speed = _speed(own, front, goals)
    speeds = sorted(front)
    at = speeds.index(speed)
    others = [front[speeds[n]] for n in (at - 1, at + 1) if 0 <= n < len(speeds)]
    return _receipt(own, findings, front, front[speed], others, goals, command, begin)


def split_prompts(
    prompts: Sequence[str], held_out: Sequence[str] | None, seeds: Sequence[int], pairs: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(prompt, seed) pairs to calibrate on, and ``pairs`` held-out ones.

    Raises:
        TypeError, ValueError: there are no prompts or seeds, or they are something else; or a
            held-out prompt is one that is calibrated on.
    """
    for name, texts in (("prompts", prompts), ("held_out", held_out or ())):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a list of texts")
    if not prompts or not seeds:
        raise ValueError(f"{'seeds' if prompts else 'prompts'} is empty; give one at least")
    for seed in seeds:
        check_count("seeds", seed, 0)
    used = list(dict.fromkeys(prompts))
    if held_out is None:
        unseen = used[1::2] or used
        used = used[::2]
    else:
        unseen = list(dict.fromkeys(held_out))
        both = [text for text in unseen if text in used]
        if both or not unseen:
            raise ValueError(
                f"held_out holds {both[0]!r}, which is in prompts too"
                if both
                else "held_out is empty; leave it out to hold out some of the prompts"
            )
    first = max(seeds) + UNSEEN
    return (
        [(text, seeds[n % len(seeds)]) for n, text in enumerate(used)],
        [(unseen[n % len(unseen)], first + n) for n in range(pairs)],
    )


def best_by_speed(findings: Sequence[EvaluatedPlan]) -> dict[float, EvaluatedPlan]:
    """The plan of least error for every speed, of whatever kind."""
    out: dict[float, EvaluatedPlan] = {}
    for own in findings:
        if own.target is None or not math.isfinite(own.error):
            continue
        if own.target not in out or own.error < out[own.target].error:
            out[own.target] = own
    return dict(sorted(out.items()))


def _speed(
    own: Search,
    front: Mapping[float, EvaluatedPlan],
    goals: Mapping[str, float | None],
) -> float:
    """The speed of the front that the goal names."""
    target, max_error, min_psnr = (
        goals[name] for name in ("target_speedup", "max_error", "min_psnr")
    )
    speeds = sorted(front)
    if target is not None:
        return target
    if max_error is not None:
        within = [speed for speed in speeds if front[speed].error <= max_error]
        goal = f"max_error={max_error:g}"
    else:
        assert min_psnr is not None
        pairs = [(prompt, seed + UNSEEN // 2) for prompt, seed in own.prompts[:CHOOSING]]
        plans = {f"{speed:g}": front[speed].plan for speed in speeds}
        clips = ClipStatistics(own.validate(plans, pairs))
        within = [speed for speed in speeds if clips.psnr(f"{speed:g}").mean >= min_psnr]
        goal = f"min_psnr={min_psnr:g}"
    if not within:
        raise ValueError(
            f"{goal} is met by no plan that is faster than dense: the slowest, {speeds[0]:g}x, has "
            f"an error of {front[speeds[0]].error:.3g}; ask for less"
        )
    return max(within)


def _receipt(
    own: Search,
    findings: Sequence[EvaluatedPlan],
    front: Mapping[float, EvaluatedPlan],
    chosen: EvaluatedPlan,
    others: Sequence[EvaluatedPlan],
    goals: Mapping[str, float | None],
    command: str | None,
    begin: float,
) -> SearchResult:
    """Validate the chosen plan with what it is compared with, and write everything down."""
    assert chosen.target is not None
    static = _best(findings, "uniform static", chosen)
    dynamic = _dynamic_beside(findings, chosen)
    fastest = max(
        (x for x in findings if x.kind == "uniform dynamic" and x.predicted is not None),
        key=lambda x: x.predicted or 0.0,
        default=None,
    )
    named: dict[str, EvaluatedPlan] = {PLANNED: chosen}
    if static is not None:
        named["best static"] = static
    if dynamic is not None:
        named["best dynamic"] = dynamic
    named |= {f"front {other.target:g}x": other for other in others}
    steps = own.step_speedups({name: found.plan for name, found in named.items()})
    clips = ClipStatistics(own.validate({name: found.plan for name, found in named.items()}))
    for other in own.others:
        own.notes.append(
            f"at {other.layout} the plan is predicted at {other.table.speedup(chosen.heads):.2f}x"
        )
    psnr, (speed, _, _) = clips.psnr(PLANNED), clips.speed(PLANNED)
    predicted = steps[PLANNED]
    if chosen.kind != "searched":
        own.notes.append(
            f"the search's own plans are refused: {chosen.name}, {chosen.kind}, has less error at "
            f"{chosen.target:g}x"
        )
    evidence = {
        "speedup_measured": round(speed, 4),
        "speedup_predicted": round(predicted, 4),
        "psnr": [round(value, 3) for value in psnr],
        "error": round(chosen.error, 6),
        "pairs": len(clips),
        "call": dict(own.subject.call),
        "measured_on": device_name(own.subject.device),
    }
    provenance = {
        "kind": f"searched: {chosen.name}",
        "goal": {name: value for name, value in goals.items() if value is not None},
        "fingerprint": own.team.about["model"],
        "calibrated_on": [list(pair) for pair in own.prompts],
        "visattn": __version__,
    }
    plan = replace(chosen.plan, evidence=evidence, provenance=provenance)
    rows = [_row(found, named, clips, steps, own) for found in _listed(findings, front, chosen)]
    heads = head_rows(own.table, chosen.heads)
    grid = own.layout.grids[0][1]
    attended = [row["density"] for row in heads if row["density"] is not None]
    executed = [row["executed"] for row in heads if row["executed"] is not None]
    title = f"{own.subject.name} at {own.layout}: {speed:.2f}x, {psnr.mean:.1f} dB"
    report: dict[str, Any] = {
        "schema": "visattn.report/1",
        "kind": "search",
        "title": title,
        "command": command or "",
        "model": {
            "name": own.subject.name,
            "denoisers": {
                role: {"class": d.kind, "layers": d.layers, "heads": d.heads}
                for role, d in own.subject.denoisers.items()
            },
        },
        "layout": str(own.layout),
        "grid": list(grid.shape),
        "settings": {
            **own.subject.call,
            **{name: value for name, value in goals.items() if value is not None},
            "phases": len(own.phases) + 1,
            "calibration prompts": len(own.prompts),
            "held-out pairs": len(clips),
        },
        "machine": machine(own.subject.device),
        "headline": [
            {
                "label": "a whole generation",
                "value": f"{speed:.2f}x",
                "note": f"predicted {predicted:.2f}x",
            },
            {
                "label": "PSNR against dense",
                "value": f"{psnr.mean:.1f} dB",
                "note": f"[{psnr.low:.1f}, {psnr.high:.1f}], {len(clips)} clips",
            },
            {
                "label": "density",
                "value": f"{sum(attended) / len(attended):.2f}" if attended else None,
                "note": f"{sum(executed) / len(executed):.2f} of the blocks" if executed else "",
            },
            {
                "label": "attention, of a dense generation",
                "value": f"{_attention_share(own):.0%}",
                "note": f"{own.generation:.2f} s in all",
            },
            {
                "label": "searched in",
                "value": _minutes(time.monotonic() - begin),
                "note": f"{len(findings)} plans tried",
            },
        ],
        "clips": clips.shown(f"plan, {speed:.2f}x"),
        "heads": heads,
        "stencils": stencil_rows(
            own.table, chosen.heads, own.tables, own.grids, own.attention, middle_of(grid)
        ),
        "front": [_point(row) for row in rows],
        "table": rows,
        "speed": [
            {
                "name": label(found),
                "predicted": rounded(steps[name]),
                "measured": rounded(clips.speed(name)[0]),
                "low": rounded(clips.speed(name)[1]),
                "high": rounded(clips.speed(name)[2]),
            }
            for name, found in named.items()
        ],
        "claims": claims(clips, chosen, static, dynamic, predicted, fastest),
        "stability": _stability(heads),
        "failures": [{"item": item, "error": error} for item, error in own.team.failures.items()],
        "notes": own.notes,
        "time": [
            {"stage": name, "seconds": round(value, 2)} for name, value in own.team.seconds.items()
        ],
        "plan": json.loads(plan.to_json()),
    }
    return SearchResult(plan, report, own.team.store.folder)


def label(found: EvaluatedPlan) -> str:
    """A plan by name and speed."""
    at = "" if found.target is None else f", {found.target:g}x"
    return f"{found.name}{at}"


def _best(
    findings: Sequence[EvaluatedPlan], kind: str, chosen: EvaluatedPlan
) -> EvaluatedPlan | None:
    """The plan of a kind with least error at the chosen one's speed, besides itself."""
    own = [x for x in findings if x.kind == kind and x.target == chosen.target and x is not chosen]
    own = [x for x in own if math.isfinite(x.error)]
    return min(own, key=lambda x: x.error, default=None)


def _dynamic_beside(
    findings: Sequence[EvaluatedPlan], chosen: EvaluatedPlan
) -> EvaluatedPlan | None:
    """The dynamic rule to compare with: of those that are as fast the one of least error; where
    none is, of those that are no more than a quarter slower than the fastest."""
    found = _best(findings, "uniform dynamic", chosen)
    if found is not None:
        return found
    own = [x for x in findings if x.kind == "uniform dynamic" and x.predicted is not None]
    own = [x for x in own if math.isfinite(x.error)]
    if not own:
        return None
    top = max(x.predicted or 0.0 for x in own)
    return min((x for x in own if (x.predicted or 0) >= top / 1.25), key=lambda x: x.error)


def _listed(
    findings: Sequence[EvaluatedPlan], front: Mapping[float, EvaluatedPlan], chosen: EvaluatedPlan
) -> list[EvaluatedPlan]:
    """The plans of the table: all at the chosen speed, the front, the dynamic rules; none twice."""
    best: dict[tuple[str, str], EvaluatedPlan] = {}
    for own in findings:
        if own.target is None and math.isfinite(own.error):
            key = own.kind, own.name
            if key not in best or own.error < best[key].error:
                best[key] = own
    listed = [x for x in findings if x.target == chosen.target and math.isfinite(x.error)]
    listed += [x for x in front.values() if x.target != chosen.target]
    listed += [x for x in best.values() if not any(y.plan == x.plan for y in listed)]
    return sorted(listed, key=lambda x: x is not chosen)


def _row(
    found: EvaluatedPlan,
    named: Mapping[str, EvaluatedPlan],
    clips: ClipStatistics,
    steps: Mapping[str, float],
    own: Search,
) -> dict[str, Any]:
    """A line of the table."""
    name = next((name for name, other in named.items() if other is found), None)
    row: dict[str, Any] = {
        "name": label(found),
        "kind": found.kind,
        "pattern": found.pattern,
        "density": rounded(found.density),
        "executed": None,
        "predicted": rounded(found.predicted if name is None else steps[name]),
        "measured": None,
        "error": rounded(found.error, 6),
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
    psnr, over = clips.psnr(name), clips.over(PLANNED, name)
    differ, total = clips.flips(name)
    row |= {
        "measured": rounded(clips.speed(name)[0]),
        "psnr": rounded(psnr.mean, 3),
        "psnr_low": rounded(psnr.low, 3),
        "psnr_high": rounded(psnr.high, 3),
        "ssim": rounded(_mean(clips.values(name, "ssim"))),
        "flicker": rounded(_mean(clips.values(name, "flicker")), 5),
        "flips": f"{differ} of {total}" if total else "",
    }
    if name != PLANNED:
        row |= {
            "against": rounded(over.mean, 3),
            "against_low": rounded(over.low, 3),
            "against_high": rounded(over.high, 3),
        }
    return row


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table as a point of the front."""
    keys = ("name", "kind", "measured", "error", "psnr", "psnr_low", "psnr_high", "chosen")
    return {key: row[key] for key in (*keys, "pattern")} | {"speed": row["predicted"]}


def _mean(values: Sequence[float]) -> float | None:
    """None where there are none."""
    return math.fsum(values) / len(values) if values else None


def _attention_share(own: Search) -> float:
    runs = sum(map(own.table.weight, own.table.groups))
    share: float = own.table.times.dense * runs / own.generation
    return min(1.0, share)


def _stability(heads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over heads."""
    out = []
    for name in ("prompts", "steps"):
        known = [row["stability"][name] for row in heads if row["stability"][name] is not None]
        if known:
            out.append(
                {
                    "name": f"two {name} agree on a head's best static candidate",
                    "value": rounded(_mean(known)),
                    "note": "of about a quarter of the pairs, mean over heads",
                }
            )
    return out


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def read_budget(text: str | float | None) -> float:
    """Seconds of ``"10m"``, ``"90s"``, ``"2h"``, a number of seconds, or None (no end).

    Raises:
        ValueError: it is none of these.
    """
    if text is None:
        return math.inf
    if is_number(text) and text > 0:
        return float(text)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"budget={text!r} must be a time such as '90s', '10m' or '2h'")
    return float(found[1]) * UNITS[found[2]]
