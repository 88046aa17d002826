"""A plan as data for display: the patterns and densities of every layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Pattern, Skip
from visattn.plan.plan import Plan
from visattn.plan.plan_file import MAX_TOKENS
from visattn.plan.rule import ANY, Table
from visattn.plan.show.planned_denoisers import (
    Heads,
    Paths,
    PlannedDenoiser,
    denoisers_of,
    entry,
    table_of,
)

__all__ = [
    "Densities",
    "PlanRow",
    "PlanView",
    "densities_of",
    "mean_density",
    "mean_of",
    "names_of",
    "pass_words",
    "rounded",
    "view_plan",
]

# The density of each pattern; None for dynamic patterns, patterns that do not fit, or no layout.
Densities = Mapping[HeadPattern, float | None]
GUIDED = ("cond", "uncond")  # the passes of a step with guidance


@dataclass(frozen=True)
class PlanRow:
    """The patterns of the heads of a layer in a phase and pass.

    Attributes:
        role: role of the denoiser.
        layer: module path of the layer.
        phase: index of the phase; None for all phases.
        pass_: the pass; ``"any"`` for passes without a row of their own.
        when: phase and pass in words.
        patterns: the pattern of each head.
        density: mean over the heads; None if the density of a head is unknown.
    """

    role: str
    layer: str
    phase: int | None
    pass_: str
    when: str
    patterns: Heads
    density: float | None


@dataclass(frozen=True, eq=False)
class PlanView:
    """A plan, resolved layer by layer.

    Attributes:
        plan: the plan.
        layout: the tokens of the densities; None if there is no layout.
        denoisers: the denoisers of the plan.
        rows: of the layers of the denoisers, in order.
        names: short names of the patterns: ``p1``, ``p2``, ..., ``dense`` and ``skip``.
        densities: of the patterns.
        misfits: why some patterns do not fit the layout.
        density: mean over all layers, heads and both passes of guidance, with phases weighted by
            their shares of the steps. Dense layers count, dense steps do not. None if unknown.
    """

    plan: Plan
    layout: TokenLayout | None
    denoisers: tuple[PlannedDenoiser, ...]
    rows: tuple[PlanRow, ...]
    names: Mapping[HeadPattern, str]
    densities: Densities
    misfits: Mapping[HeadPattern, str]
    density: float | None

    @cached_property
    def layers(self) -> tuple[tuple[PlannedDenoiser, str, tuple[PlanRow, ...]], ...]:
        """The rows of each layer."""
        rows: dict[tuple[str, str], list[PlanRow]] = {}
        for row in self.rows:
            rows.setdefault((row.role, row.layer), []).append(row)
        return tuple(
            (denoiser, layer, tuple(rows[denoiser.role, layer]))
            for denoiser in self.denoisers
            for layer in denoiser.layers
        )

    def numbers(self) -> dict[str, Any]:
        """The plan and its densities as JSON values."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "tokens": None if self.layout is None else self.layout.tokens,
            "density": rounded(self.density),
            "patterns": {
                name: {
                    "pattern": repr(pattern),
                    "density": rounded(self.densities[pattern]),
                    "misfit": self.misfits.get(pattern),
                }
                for pattern, name in self.names.items()
            },
            "layers": [
                {
                    "role": row.role,
                    "layer": row.layer,
                    "phase": row.phase,
                    "pass": row.pass_,
                    "density": rounded(row.density),
                    "heads": [self.names[pattern] for pattern in row.patterns],
                }
                for row in self.rows
            ],
        }


def view_plan(
    plan: Plan, layout: TokenLayout | None = None, paths: Paths | None = None
) -> PlanView:
    """Resolve a plan layer by layer.

    Args:
        plan: the plan.
        layout: the tokens for densities; default: the plan's geometry.
        paths: the paths of the attention layers by role, if known.

    Returns:
        The view; ``plan_text`` prints it and ``visattn.draw.plan_picture.draw_plan`` draws it.

    Raises:
        ValueError: the layout has more tokens than a plan's geometry may have.
    """
    layout = plan.geometry if layout is None else layout
    denoisers = denoisers_of([plan], paths or {})
    parts = [
        (denoiser, layer, _parts(plan, denoiser, table_of(plan, denoiser, number)))
        for denoiser in denoisers
        for number, layer in enumerate(denoiser.layers)
    ]
    used = (pattern for _, _, entries in parts for *_, heads in entries for pattern in heads)
    densities, misfits = densities_of(used, layout)
    rows = tuple(
        PlanRow(denoiser.role, layer, phase, pass_, when, heads, mean_of(heads, densities))
        for denoiser, layer, entries in parts
        for phase, pass_, when, heads in entries
    )
    density = mean_density(plan, denoisers, densities)
    return PlanView(
        plan, layout, denoisers, rows, names_of(densities), densities, misfits, density
    )


def names_of(patterns: Iterable[HeadPattern]) -> dict[HeadPattern, str]:
    """Return short names of patterns, numbered in order of appearance."""
    fixed: dict[HeadPattern, str] = {Dense(): "dense", Skip(): "skip"}
    distinct = dict.fromkeys(patterns)
    others = [pattern for pattern in distinct if pattern not in fixed]
    names = {pattern: f"p{number}" for number, pattern in enumerate(others, 1)}
    return names | {pattern: name for pattern, name in fixed.items() if pattern in distinct}


def densities_of(
    patterns: Iterable[HeadPattern], layout: TokenLayout | None
) -> tuple[Densities, Mapping[HeadPattern, str]]:
    """Return the density of each distinct pattern, and why some patterns do not fit the layout.

    Args:
        patterns: the patterns, with repetitions.
        layout: the tokens; None: all densities are None.

    Raises:
        ValueError: the layout has more tokens than a plan's geometry may have.
    """
    if layout is not None and layout.length > MAX_TOKENS:
        raise ValueError(
            f"layout {layout} has {layout.length} tokens; densities of at most {MAX_TOKENS} are "
            "counted"
        )
    densities: dict[HeadPattern, float | None] = {}
    misfits = {}
    for pattern in dict.fromkeys(patterns):
        densities[pattern] = None
        if layout is not None:
            try:
                for _, grid in layout.grids:
                    pattern.check(grid)
                if isinstance(pattern, Pattern):
                    densities[pattern] = pattern.density(layout)
            except ValueError as error:
                misfits[pattern] = str(error)
    return densities, misfits


def mean_of(heads: Heads, densities: Densities) -> float | None:
    """Return the mean density of some heads; None if the density of a head is unknown."""
    known = [density for pattern in heads if (density := densities[pattern]) is not None]
    return sum(known) / len(known) if len(known) == len(heads) else None


def mean_density(
    plan: Plan, denoisers: Sequence[PlannedDenoiser], densities: Densities
) -> float | None:
    """Return the mean density of a plan, as ``PlanView`` defines it."""
    if not all(denoiser.whole or len(denoiser.layers) == 1 for denoiser in denoisers):
        return None
    ends = (0.0, *plan.phases, 1.0)
    layers = [
        table_of(plan, denoiser, number)
        for denoiser in denoisers
        for number in range(len(denoiser.layers))
    ]
    total = 0.0
    for table in layers:
        for phase in range(len(plan.phases) + 1):
            for pass_ in GUIDED:
                heads = entry(table, phase, pass_)
                density = 1.0 if heads is None else mean_of(heads, densities)
                if density is None:
                    return None
                total += density * (ends[phase + 1] - ends[phase]) / len(GUIDED)
    return total / len(layers)


def pass_words(pass_: str, others: bool) -> str:
    """Return a pass in words.

    Args:
        pass_: the pass.
        others: whether other passes have a row of their own.
    """
    return pass_ if pass_ != ANY else "other passes" if others else ""


def rounded(value: float | None) -> float | None:
    """Return a density as JSON files hold it."""
    return None if value is None else round(value, 6)


def _parts(
    plan: Plan, denoiser: PlannedDenoiser, table: Table
) -> list[tuple[int | None, str, str, Heads]]:
    """Return phase, pass, both in words, and heads of each phase and pass with patterns of its
    own."""
    dense: Heads = (Dense(),) * (denoiser.heads or 1)
    phases: list[dict[str, Heads]] = []
    for phase in range(len(plan.phases) + 1):
        base = entry(table, phase, ANY) or dense
        passes = {pass_: entry(table, phase, pass_) or dense for pass_ in plan.passes}
        phases.append({ANY: base} | {key: heads for key, heads in passes.items() if heads != base})
    same = all(rows == phases[0] for rows in phases)
    out = []
    for phase, rows in enumerate(phases[:1] if same else phases):
        for pass_, heads in rows.items():
            words = ["" if same else f"phase {phase}", pass_words(pass_, len(rows) > 1)]
            when = " ".join(filter(None, words)) or "always"
            out.append((None if same else phase, pass_, when, heads))
    return out
