"""The stages of a search: look, learn, score, time, try plans, validate."""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from visattn._version import versions
from visattn.attention.lowering import block_sizes
from visattn.geometry.layout import Grid, TokenLayout
from visattn.guidance.head_search.objectives import name_of
from visattn.inject import Observation, observe
from visattn.inject.layers.stock_attention import dense_attention
from visattn.kernels.launch import launch_of
from visattn.patterns import Dense, HeadPattern, Pattern, Skip, parse_pattern
from visattn.plan import Plan
from visattn.runtime.processes import ProcessGroup
from visattn.search.candidates.dynamic import dynamic_families
from visattn.search.candidates.learned_stencils import Learner, learned, stencils_of
from visattn.search.candidates.static import LEVELS, members, static_families
from visattn.search.measure.clip_quality import ClipScorer, caption_scorer, clip_of
from visattn.search.measure.latency import HeadLatency, LayerLatency, heads_run_separately, measure
from visattn.search.measure.output_losses import CandidatePool, CandidateScorer, Layer
from visattn.search.measure.recorded_attention import calls_of, spread_steps
from visattn.search.measure.replay import CallRecorder, Replay
from visattn.search.measure.target import SearchTarget
from visattn.search.measure.tile_grid import TileGrid, tile_grids
from visattn.search.solve.assignments import (
    LayerFronts,
    meeting,
    published_rules,
    solutions,
    uniform_plans,
)
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.search.solve.price_table import Group, PriceTable, losses_of
from visattn.tasks.result_store import ResultStore, StoredResult
from visattn.tasks.runner import Progress, Task, TaskRunner

__all__ = ["Search", "Settings"]

FORMAT = 2  # of what is kept
LIBRARIES = ("torch", "triton", "diffusers", "transformers")  # that results depend on
STENCIL_LEVELS = (0.06, 0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5)
TARGETS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
ROUNDS = 2  # of refining a plan
LAYER_POINTS = 5  # of a layer's front, that the model's own output is asked about
STENCILS_TIMED = 10  # of a head
UNIFORM_ELSEWHERE = 3  # families that are tried at other speeds than the target
TIMED = 3  # dense generations, after one that is not counted


@dataclass(frozen=True)
class Settings:
    """How much a search looks at.

    Args:
        steps: denoising steps whose attention is read, of each generation.
        tiles, rows: query tiles, and rows of each, that are sampled.
        replays: calls of the denoiser that plans are judged by, about.
        pairs: (prompt, seed) pairs that the result is validated on.
        pictures: of these, whose videos the receipt shows.
        layer_seconds: that may go into asking the model about each layer alone, about.
        exact: score whole outputs instead of sampled rows, which takes several times as long.
    """

    steps: int = 4
    tiles: int = 8
    rows: int = 8
    replays: int = 8
    pairs: int = 20
    pictures: int = 4
    layer_seconds: float = 300.0
    exact: bool = False


class Search:
    """The stages of a search; each keeps what it finds, so that a search that was ended goes on.

    Args:
        subject: the pipeline at a shape.
        prompts: to calibrate on, with seeds; held_out: to validate on.
        phases: where one phase ends and the next begins, as in a Plan.
        candidates: families or patterns that are tried; None: all.
        settings: how much is looked at.
        folder: where results are kept; progress: is told of them; deadline: ``time.monotonic()`` at
            which validation takes no further pair; group: of the processes that share the work.
    """

    def __init__(
        self,
        subject: SearchTarget,
        prompts: Sequence[tuple[str, int]],
        held_out: Sequence[tuple[str, int]],
        *,
        phases: tuple[float, ...] = (),
        candidates: Sequence[str | HeadPattern] | None = None,
        settings: Settings | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        deadline: float = math.inf,
        scorer: ClipScorer = caption_scorer,
        group: ProcessGroup | None = None,
    ) -> None:
        self.subject, self.prompts, self.held_out = subject, list(prompts), list(held_out)
        self.phases, self.settings = phases, settings or Settings()
        self.candidates, self.deadline, self.scorer = candidates, deadline, scorer
        self._check_candidates(Grid(4, 8, 8), 64)  # where every family has members
        self.notes: list[str] = []
        self.others: list[Search] = []  # the same at other shapes
        self.wanted: list[HeadPattern] = []  # patterns that are timed
        self.rules: list[tuple[str, HeadPattern]] = []  # dynamic ones, with their families
        about = {
            "versions": versions(LIBRARIES),
            "model": subject.fingerprint(),
            "call": subject.call,
            "device": kind_of_device(subject.device),
            "format": FORMAT,
        }
        self.team = TaskRunner(ResultStore(folder), about, progress, group)
        half = max(1, len(self.prompts) // 2)
        self.to_learn, self.to_score = self.prompts[:half], self.prompts[half:] or self.prompts

    def beside(self, call: Mapping[str, Any]) -> Search:
        """The same search at another shape, whose results are kept in the same folder."""
        subject = SearchTarget(self.subject.pipe, {**self.subject.call, **call}, self.subject.name)
        other = Search(
            subject,
            self.prompts,
            self.held_out,
            phases=self.phases,
            candidates=self.candidates,
            settings=self.settings,
            folder=self.team.store.folder,
            progress=self.team.progress,
            scorer=self.scorer,
            group=self.team.group,
        )
        self.others.append(other)
        return other

    # ---- a dense generation: how long it takes, and what it does

    def look(self) -> None:
        """Time dense generations; learn the layout and how often attention runs."""

        def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            prompt, seed = self.prompts[0]
            seen: dict[tuple[str, int], int] = {}
            layouts: set[TokenLayout] = set()
            steps = 0

            def count(observation: Observation) -> None:
                nonlocal steps
                if observation.steps is None:
                    raise ValueError("the number of denoising steps is not known")
                steps = observation.steps
                layouts.add(observation.layout)
                if observation.number == 0:
                    passes = len(observation.passes or ("any",))
                    key = observation.role, int(observation.step or 0)
                    seen[key] = seen.get(key, 0) + passes

            with observe(self.subject.pipe, count):
                self.subject.generate(prompt, seed)
            if len(layouts) != 1:
                raise ValueError(
                    f"a generation has the layouts {sorted(map(str, layouts))}; a search needs one"
                )
            seconds = [self.subject.generate(prompt, seed).seconds for _ in range(TIMED)]
            runs = [[role, step, n] for (role, step), n in sorted(seen.items())]
            tokens = [list(segment) for segment in layouts.pop().tokens]
            return {"seconds": seconds, "steps": steps, "runs": runs, "tokens": tokens}, {}

        (item,) = self.team.do("dense", [Task("dense", "a dense generation", run)], alone=True)
        assert item is not None
        value = item.value
        self.generation = statistics.median(value["seconds"])
        self.steps = int(value["steps"])
        self.layout = TokenLayout.from_tokens(tuple(map(tuple, value["tokens"])))
        self.runs: dict[tuple[int, str], int] = {}
        for role, step, count in value["runs"]:
            key = self.phase_of(step), role
            self.runs[key] = self.runs.get(key, 0) + count
        self.read = {
            role: set(own)
            for role in {role for _, role in self.runs}
            for own in [spread([s for r, s, _ in value["runs"] if r == role], self.settings.steps)]
        }
        self.block = self._block()
        self.grids = tile_grids(self.layout, self.block)

    def phase_of(self, step: int) -> int:
        """Of a denoising step."""
        return sum(step >= end * self.steps - 1e-9 for end in self.phases)

    @property
    def all_read(self) -> set[int]:
        """The steps that are read, of any denoiser."""
        return set().union(*self.read.values())

    def _block(self) -> int:
        """Most tokens of a tile that is a block."""
        module = next(iter(self.subject.modules.values()))
        own = next(module.parameters())
        dtype = own.dtype if own.dtype.itemsize > 1 else torch.float32
        q = torch.empty(1, 1, 1, 64, dtype=dtype, device=self.subject.device)
        return (
            block_sizes(self.layout.length)[0] if heads_run_separately(q) else min(launch_of(q)[:2])
        )

    # ---- where attention lies, and recorded calls

    def learn(self) -> None:
        """Tables of the first prompts, and calls of the denoisers to replay."""

        def task(prompt: str, seed: int) -> Task:
            def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
                learner = Learner(self.all_read, self.block, 2 * self.settings.tiles, 8)
                true_scale = self.subject.call.get("true_cfg_scale")
                recorder = CallRecorder(self.subject.pipe, self.all_read, true_scale)
                with observe(self.subject.pipe, learner), recorder.listening():
                    self.subject.generate(prompt, seed)
                (value, tensors), (calls, others) = learner.item(), recorder.item()
                named = {f"call {name}": x for name, x in others.items()}
                return {**value, **calls}, tensors | named

            asked = {"prompt": prompt, "seed": seed, "steps": sorted(self.all_read)}
            return Task(asked | {"tiles": self.settings.tiles}, f"{prompt!r}, seed {seed}", run)

        found = self.team.do("learn", [task(*own) for own in self.to_learn])
        items = [item for item in found if item is not None]
        for item in items:
            for text in item.value["failures"]:
                self.team.failures[f"learn: {text}"] = "left out"
        tables = learned(items, self.phase_of)
        self.tables = {
            (role, number): _mean_over_phases(tables, role, number) for _, role, number in tables
        }
        self.attention = _attention(items)
        calls = [
            own
            for item in items
            for own in CallRecorder.read(_part(item, "call ", cut=True), self.subject.device)
        ]
        self.replay = Replay(self.subject.pipe, calls)
        count = len(calls) // max(1, len(calls) // max(1, self.settings.replays))
        self.replay = self.replay.part(_groups(calls, count))

    # ---- what every candidate gets wrong

    def score(self, like: Search | None = None) -> None:
        """Losses of all candidates on the other prompts. Dynamic rules that take longer than dense
        attention are no candidates; they are compared with all the same.

        Args:
            like: the search whose candidates these are, at another shape.
        """
        self._check_candidates(self.layout.grids[0][1], self.block)
        self.rules = self._rules() if like is None else like.rules
        times = self._measured("rules", [own for _, own in self.rules])
        self.slow = {
            repr(own)
            for _, own in self.rules
            if repr(own) not in times or times[repr(own)].all >= times[repr(Dense())].all
        }
        self.seconds = times
        if like is None:
            self.pool = self._pool()
        else:
            self.pool = like.pool
            self.grids = [TileGrid(grid.tile, self.layout) for grid in like.grids]
        words = self.pool.words(list(self.tables))

        def task(prompt: str, seed: int) -> Task:
            def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
                scorer = CandidateScorer(
                    self.pool,
                    self.subject.weights,
                    self.all_read,
                    self.grids,
                    self.settings.tiles,
                    self.settings.rows,
                    exact=self.settings.exact,
                )
                with observe(self.subject.pipe, scorer):
                    self.subject.generate(prompt, seed)
                return scorer.item()

            asked = {"prompt": prompt, "seed": seed, "steps": sorted(self.all_read), "pool": words}
            asked |= {"tiles": self.settings.tiles, "rows": self.settings.rows}
            asked["exact"] = self.settings.exact
            return Task(asked, f"{prompt!r}, seed {seed}", run)

        found = self.team.do("score", [task(*own) for own in self.to_score])
        items = [item for item in found if item is not None]
        for item in items:
            self.team.failures.update(item.value["failures"])
        self.calls = losses_of(items, self.phase_of)
        missing = sorted(
            self.subject.paths[layer]
            for layer in self.subject.paths
            if not any(group[1:] == layer for group in self.calls)
        )
        if missing:
            self.notes.append(f"dense, as nothing is known of them: {', '.join(missing)}")

    def _pool(self) -> CandidatePool:
        grid = self.layout.grids[0][1]
        static: list[tuple[str, Pattern]] = []
        for family, own in static_families(grid, self.block).items():
            if self._wanted(family):
                static += [(family, pattern) for pattern in members(own, self.layout, LEVELS)]
        for pattern in self._given():
            if isinstance(pattern, Pattern):
                pattern.check(grid)
                static.append(("given", pattern))
        stencils = {}
        if self._wanted("stencil"):
            stencils = {
                layer: stencils_of(tables, self.grids, STENCIL_LEVELS)
                for layer, tables in self.tables.items()
            }
        kept = {pattern: family for family, pattern in reversed(static)}  # the first family's
        return CandidatePool(
            tuple((kept[p], p) for p in dict.fromkeys(p for _, p in static)),
            tuple(own for own in self.rules if repr(own[1]) not in self.slow),
            stencils,
        )

    def _check_candidates(self, grid: Grid, block: int) -> None:
        """Raise ValueError for a name that is no family."""
        families = [*static_families(grid, block), "stencil", *dynamic_families(block)]
        for own in self.candidates or ():
            if isinstance(own, str) and "(" not in own and own not in families:
                raise ValueError(
                    f"candidates holds {own!r}; families are {', '.join(map(repr, families))}, or "
                    "give a pattern as in 'radial(decay=0.2)'"
                )

    def _rules(self) -> list[tuple[str, HeadPattern]]:
        """Dynamic rules with their families."""
        return [
            (family, pattern)
            for family, patterns in dynamic_families(self.block).items()
            if self._wanted(family)
            for pattern in patterns
        ] + [("given", own) for own in self._given() if not isinstance(own, Pattern)]

    def _given(self) -> list[HeadPattern]:
        """Candidates that are patterns."""
        return [
            own if isinstance(own, HeadPattern) else parse_pattern(own)
            for own in self.candidates or ()
            if isinstance(own, HeadPattern) or "(" in own
        ]

    def _wanted(self, family: str) -> bool:
        names = [own for own in self.candidates or () if isinstance(own, str) and "(" not in own]
        return not self.candidates or any(family == name for name in names)

    # ---- what every candidate costs

    def time(self, like: Search | None = None) -> None:
        """Seconds of the candidates in a layer, and the table of both.

        Args:
            like: as for ``score``.
        """
        heads = {layer: self.subject.heads(layer) for layer in self.subject.paths}
        flat = PriceTable(
            pool=self.pool,
            times=_by_density(self),
            calls=self.calls,
            heads=heads,
            paths=self.subject.paths,
            runs=self.runs,
            generation=self.generation,
            layout=self.layout,
            denoisers=self.subject.denoisers,
            phases=self.phases,
            model=self.subject.name,
        )
        wanted: dict[HeadPattern, None] = dict.fromkeys(
            [*(pattern for _, pattern in self.pool.static), Skip()]
        )
        for group in flat.groups:  # of stencils those that are worth their density
            for head in range(heads[group[1:]]):
                front = flat.options(group, head, lambda family, _: family == "stencil")
                own = flat.candidates(group, head)
                chosen = [own[option.choice[0]][1] for option in front if option.choice[0] >= 0]
                step = max(1, -(-len(chosen) // STENCILS_TIMED))
                wanted.update(dict.fromkeys(chosen[::step]))

        self.wanted = list(wanted) if like is None else like.wanted
        self.seconds = self._measured("seconds", self.wanted) | self.seconds
        module = next(iter(self.subject.modules.values()))
        sample = torch.empty(1, 1, 1, 64, device=self.subject.device, dtype=torch.float32)
        times = LayerLatency(
            self.seconds,
            int(module.heads),
            heads_run_separately(sample),
        )
        self.table = replace(flat, times=times)

    def join(self) -> None:
        """Let the table know of the other shapes."""
        self.table = replace(self.table, also=tuple(other.table for other in self.others))

    def _measured(self, stage: str, patterns: Sequence[HeadPattern]) -> dict[str, HeadLatency]:
        """Seconds of patterns, and of dense attention, on a call of a layer in the middle."""

        def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
            middle = sorted(self.subject.paths)[len(self.subject.paths) // 2]

            def keep(observation: Observation) -> None:
                if (observation.role, observation.number) == middle and not seen:
                    own = next(calls_of(observation, {int(observation.step or 0)}))
                    seen.append((own.q[None], own.k[None], own.v[None]))

            numbers = [n for n, own in enumerate(self.replay.calls) if own.role == middle[0]]
            self.replay.observed(keep, numbers[0])
            q, k, v = seen[0]
            times, failures = measure(
                patterns, q, k, v, self.layout, dense_attention(self.subject.modules[middle])
            )
            return {"seconds": {k: list(v) for k, v in times.items()}, "failures": failures}, {}

        asked = {"patterns": [repr(own) for own in patterns]}
        (item,) = self.team.do(stage, [Task(asked, "candidates", run)], alone=True)
        assert item is not None
        self.team.failures.update(item.value["failures"])
        return {name: HeadLatency(*values) for name, values in item.value["seconds"].items()}

    # ---- what plans get wrong

    def errors(self, plans: Sequence[Plan], stage: str) -> list[float]:
        """The error of the model's own output under each plan, the mean over shapes; infinite where
        it could not run."""

        def task(plan: Plan) -> Task:
            return Task(
                {"plan": plan.to_json(), "calls": self.asked_calls},
                f"a plan of {len(plan.rules)} rules",
                lambda: ({"error": _finite(self.replay.error(plan))}, {}),
            )

        found = self.team.do(stage, [task(plan) for plan in plans], needed=False)
        out = []
        for item in found:
            value = None if item is None else item.value["error"]
            out.append(math.inf if value is None else float(value))
        elsewhere = [replace(plan, geometry=None) for plan in plans]
        found_there = [other.errors(elsewhere, stage) for other in self.others]
        return [statistics.fmean(errors) for errors in zip(out, *found_there, strict=True)]

    @property
    def asked_calls(self) -> list[Any]:
        """Which calls are replayed, as JSON values."""
        return [[prompt, seed] for prompt, seed in self.to_learn] + [
            [own.role, own.name, own.step] for own in self.replay.calls
        ]

    def ask_layers(self) -> None:
        """The model's own error when one layer at a time takes options of its front, as far as
        there is time."""
        every = LayerFronts(self.table)
        asked: list[tuple[Group, float, Plan]] = []
        points = self.points(len(every.fronts))
        for group, front in every.fronts.items() if points else ():
            sparse = [own for own in front if own.loss > 0]
            count = min(points, len(sparse))
            for n in range(count):
                own = sparse[n * (len(sparse) - 1) // max(1, count - 1)]
                made = {group: self.table.patterns(group, own.choice)}
                asked.append((group, own.loss, self.table.plan(made)))
        found = self.errors([plan for _, _, plan in asked], "layers")
        self.by_layer: dict[Group, list[tuple[float, float]]] = {}
        for (group, loss, _), error in zip(asked, found, strict=True):
            self.by_layer.setdefault(group, []).append((loss, error))
        self.fronts = {
            "all": every,
            "static": LayerFronts(self.table, lambda _, own: isinstance(own, Pattern)),
            "stencils": LayerFronts(self.table, lambda family, _: family == "stencil"),
            "output": LayerFronts(self.table, loss="output"),
            "mass": LayerFronts(self.table, lambda _, own: isinstance(own, Pattern), loss="mass"),
        }

    def points(self, groups: int) -> int:
        """Options of each layer that there is time to ask the model about, none or several."""
        call = self.generation / sum(self.runs.values())
        points = int(self.settings.layer_seconds / (call * len(self.replay.calls) * groups))
        if points < 2:
            self.notes.append(
                "layers are weighed by the error of their attention alone: asking the model about "
                f"each would take more than layer_seconds={self.settings.layer_seconds:g}"
            )
            return 0
        return min(LAYER_POINTS, points)

    def refine(self, best: EvaluatedPlan) -> list[EvaluatedPlan]:
        """A plan again, with layers weighed by what the model's own error loses when each alone is
        dense; as long as that makes it better."""
        out: list[EvaluatedPlan] = []
        every = self.fronts["all"]
        for _ in range(ROUNDS if self.by_layer and best.target else 0):
            sparse = [
                group
                for group, heads in best.heads.items()
                if any(pattern != Dense() for pattern in heads)
            ]
            without = [
                self.table.plan({g: heads for g, heads in best.heads.items() if g != group})
                for group in sparse
            ]
            found = self.errors(without, "refine")
            weights = {
                group: max(0.0, best.error - error)
                / max(1e-12, every.error_of(group, best.heads[group], self.by_layer))
                for group, error in zip(sparse, found, strict=True)
            }
            fronts = every.measured(self.by_layer, weights)
            assert best.target is not None
            way = functools.partial(every.across, fronts=fronts)
            made = meeting(self.table, best.target, way)
            if made is None:
                break
            (again,) = self._found([("error by layer, refined", "searched", best.target, made)])
            if again.error >= best.error:
                break
            out.append(again)
            best = again
        return out

    def try_plans(self, target: float | None) -> list[EvaluatedPlan]:
        """Plans for every speed that can be had, judged by the error of the model's own output.

        Args:
            target: a speed that is tried too, with all that there is to compare with.
        """
        speeds = sorted({*TARGETS, *([target] if target else [])})
        kinds: dict[str, list[HeadPattern]] = {}
        for family, pattern in (*self.pool.static, *self.rules):
            kinds.setdefault(family, []).append(pattern)
        dynamic = {family for family, _ in self.rules}
        made: list[tuple[str, str, float | None, Any]] = []
        reached = []
        for speed in speeds:
            own = solutions(self.table, speed, self.fronts, self.by_layer)
            if not own:
                break
            reached.append(speed)
            made += [(name, "searched", speed, found) for name, found in own.items()]
        self.reached = reached
        main = target if target in reached else (reached[len(reached) // 2] if reached else None)
        best: dict[str, float] = {}
        for speed in [main, *[own for own in reached if own != main]] if main else []:
            chosen = uniform_plans(self.table, speed, kinds)
            if speed != main:
                keep = sorted(best, key=lambda family: best[family])[:UNIFORM_ELSEWHERE]
                chosen = {family: own for family, own in chosen.items() if family in keep}
            plans = [self.table.plan(self.table.uniform(own)) for own in chosen.values()]
            found = self.errors(plans, "plans")
            if speed == main:
                best = dict(zip(chosen, found, strict=True))
            for family, pattern in chosen.items():
                kind = "uniform dynamic" if family in dynamic else "uniform static"
                made.append((family, kind, speed, pattern))
        slow = [family for family in kinds if main and not any(f == family for f, *_ in made)]
        if slow:
            self.notes.append(
                f"one pattern for all heads does not reach {main:g}x here with: {', '.join(slow)}"
            )
        for family in dynamic:  # at their own budgets, whatever they cost
            made += [(family, "uniform dynamic", None, own) for own in kinds[family]]
        if main:
            rules = published_rules(self.table, main)
            made += [
                (name, "random" if name == "random" else "published rule", main, own)
                for name, own in rules.items()
            ]
        findings = self._found(made)
        at = reached.index(main) if main else 0
        for speed in reached[max(0, at - 1) : at + 2]:  # those that will be validated
            searched = [x for x in findings if x.target == speed and x.kind == "searched"]
            findings += self.refine(min(searched, key=lambda x: x.error))
        return findings

    def _found(self, made: Sequence[tuple[str, str, float | None, Any]]) -> list[EvaluatedPlan]:
        assignments = [
            self.table.uniform(own) if isinstance(own, HeadPattern) else own for *_, own in made
        ]
        plans = [self.table.plan(own) for own in assignments]
        errors = self.errors(plans, "plans")
        out = []
        for (name, kind, target, own), assignment, plan, error in zip(
            made, assignments, plans, errors, strict=True
        ):
            out.append(
                EvaluatedPlan(
                    name=name,
                    kind=kind,
                    target=target,
                    plan=plan,
                    heads=assignment,
                    pattern=repr(own) if isinstance(own, HeadPattern) else None,
                    predicted=self.table.speedup(assignment)
                    if self.table.known(assignment)
                    else None,
                    error=error,
                    density=density_of(assignment, self.layout),
                )
            )
        return out

    # ---- whole generations

    def step_speedups(self, plans: Mapping[str, Plan]) -> dict[str, float]:
        """Speed-ups of whole generations by the time of replayed calls with and without each
        plan."""

        def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            best = dict.fromkeys(("", *plans), math.inf)
            for _ in range(1 + TIMED):
                for name in best:
                    best[name] = min(best[name], self.replay.seconds(plans.get(name)))
            return {"seconds": best}, {}

        asked = {
            "plans": {name: plan.to_json() for name, plan in plans.items()},
            "calls": self.asked_calls,
        }
        (item,) = self.team.do("steps", [Task(asked, "steps", run)], alone=True)
        assert item is not None
        seconds = item.value["seconds"]
        share = sum(self.runs.values()) / sum(
            len(own.passes or ("any",)) for own in self.replay.calls
        )
        rest = self.generation - share * seconds[""]
        return {name: self.generation / (rest + share * seconds[name]) for name in plans}

    def validate(
        self,
        plans: Mapping[str, Plan],
        pairs: Sequence[tuple[str, int]] | None = None,
    ) -> list[tuple[str, int, StoredResult]]:
        """Clips, dense and by each plan; of the held-out pairs where no others are named."""
        shown = ["dense", next(iter(plans))]

        def drawn(number: int) -> bool:
            return pairs is None and number < self.settings.pictures

        def task(number: int, prompt: str, seed: int) -> Task:
            def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
                pictures = shown if drawn(number) else []
                job = self.subject.job(prompt, seed)
                return clip_of(self.subject.pipe, job, plans, self.scorer, pictures, number)

            asked = {"prompt": prompt, "seed": seed, "pictures": drawn(number)}
            asked["plans"] = {name: plan.to_json() for name, plan in plans.items()}
            asked["scorer"] = name_of(self.scorer)
            return Task(asked, f"{prompt!r}, seed {seed}", run)

        wanted = list(enumerate(self.held_out[: self.settings.pairs] if pairs is None else pairs))
        many = self.team.world if math.isfinite(self.deadline) else len(wanted)
        out = []
        for begin in range(0, len(wanted), many):
            if begin >= 2 and self.team.agree(time.monotonic() > self.deadline):
                self.notes.append(f"the budget of time ended after {begin} of {len(wanted)} clips")
                break
            some = wanted[begin : begin + many]
            items = self.team.do(
                "validate", [task(number, *own) for number, own in some], timed=True
            )
            for (_, (prompt, seed)), item in zip(some, items, strict=True):
                if item is not None:
                    out.append((prompt, seed, item))
        return out


def kind_of_device(device: torch.device) -> str:
    """What a device is, without its index and the number of threads, which results do not depend
    on: of several processes each has its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} of {platform.machine()}"


def spread(steps: Sequence[int], count: int) -> tuple[int, ...]:
    """Some steps out of those that a denoiser runs, evenly."""
    return tuple(sorted(steps)[n] for n in spread_steps(len(steps), count))


def density_of(
    assignment: Mapping[Group, tuple[HeadPattern, ...]], layout: TokenLayout
) -> float | None:
    """Mean kept share of the pairs over heads; None with a dynamic pattern."""
    heads = [own for group in assignment.values() for own in group]
    if not all(isinstance(own, Pattern) for own in heads):
        return None
    known = {own: own.density(layout) for own in set(heads) if isinstance(own, Pattern)}
    return sum(known[own] for own in heads if isinstance(own, Pattern)) / len(heads)


def _part(item: StoredResult, prefix: str, *, cut: bool = False) -> StoredResult:
    """The tensors of an item whose names begin alike."""
    own = {
        (name.removeprefix(prefix) if cut else name): x
        for name, x in item.tensors.items()
        if name.startswith(prefix)
    }
    return StoredResult(item.value, own)


def _mean_over_phases(
    tables: Mapping[tuple[int, str, int], list[torch.Tensor]], role: str, number: int
) -> list[torch.Tensor]:
    own = [value for (_, r, n), value in tables.items() if (r, n) == (role, number)]
    return [torch.stack(list(x)).mean(0) for x in zip(*own, strict=True)]


def _attention(items: Sequence[StoredResult]) -> dict[Layer, torch.Tensor]:
    """Mean attention of one query over generations, ``[H, T, Y, X]`` by layer."""
    found: dict[Layer, list[torch.Tensor]] = {}
    for item in items:
        for at, (role, number) in enumerate(item.value["attended"]):
            found.setdefault((role, number), []).append(item.tensors["attention"][at])
    return {layer: torch.stack(own).mean(0) for layer, own in found.items()}


def _groups(calls: Sequence[Any], count: int) -> list[int]:
    """Numbers of about ``count`` calls, whole steps, spread over generations and steps: of the
    first generation one step, of the second another, and so on."""
    steps: list[list[int]] = []
    for number, own in enumerate(calls):
        last = calls[steps[-1][-1]] if steps else None
        same = last is not None and (last.role, last.step) == (own.role, own.step)
        if same and own.name not in {calls[n].name for n in steps[-1]}:
            steps[-1].append(number)
        else:
            steps.append([number])
    each = len(steps[0])
    wanted = max(1, min(len(steps), count // each))
    chosen = [steps[(2 * n + 1) * len(steps) // (2 * wanted)] for n in range(wanted)]
    return [number for own in chosen for number in own]


def _by_density(search: Search) -> LayerLatency:
    """Times that are in proportion to density, for want of measured ones."""
    seconds = {repr(Dense()): HeadLatency(1.0, 1.0), repr(Skip()): HeadLatency(0.0, 0.0)}
    pool = search.pool
    for own in {p for heads in pool.stencils.values() for head in heads for p in head}:
        density = own.density(search.layout)
        seconds[repr(own)] = HeadLatency(density, density)
    return LayerLatency(seconds, 1, True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
