"""A plan to be looked at: what every layer runs, and at which density."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Pattern, Skip
from visattn.plan.plan import ANY, MAX_TOKENS, Plan, Table
from visattn.plan.show.places import Heads, Paths, Place, entry, places_of, table_of

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

# of patterns; None for those that choose at run time or do not fit, and where no layout is known
Densities = Mapping[HeadPattern, float | None]
GUIDED = ("cond", "uncond")  # the passes that a step has with guidance


@dataclass(frozen=True)
class PlanRow:
    """What the heads of a layer run in a phase and pass.

    Attributes:
        phase: None for all; pass_: ``"any"`` for those that have no row of their own; when: both in
            words.
        patterns: of the heads.
        density: mean over the heads; None where that of one is not known.
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
    """A plan, resolved.

    Attributes:
        layout: the tokens that densities are of; None where there are none.
        places: the denoisers; rows: of their layers, in order.
        names: of the patterns: ``p1``, ``p2``, ..., ``dense`` and ``skip``.
        densities: of the patterns; misfits: why some of them do not fit the layout.
        density: mean over all layers and heads and both passes of guidance, the phases by their
            shares of the steps; dense layers count, dense steps do not. None where not known.
    """

    plan: Plan
    layout: TokenLayout | None
    places: tuple[Place, ...]
    rows: tuple[PlanRow, ...]
    names: Mapping[HeadPattern, str]
    densities: Densities
    misfits: Mapping[HeadPattern, str]
    density: float | None

    @cached_property
    def layers(self) -> tuple[tuple[Place, str, tuple[PlanRow, ...]], ...]:
        """The rows of each layer."""
        found: dict[tuple[str, str], list[PlanRow]] = {}
        for row in self.rows:
            found.setdefault((row.role, row.layer), []).append(row)
        return tuple(
            (place, layer, tuple(found[place.role, layer]))
            for place in self.places
            for layer in place.layers
        )

    def numbers(self) -> dict[str, Any]:
        """The plan and its densities as JSON values."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "tokens": None if self.layout is None else self.layout.tokens,
            "density": rounded(self.density),
            "patterns": {
                name: {
                    "pattern": repr(own),
                    "density": rounded(self.densities[own]),
                    "misfit": self.misfits.get(own),
                }
                for own, name in self.names.items()
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
    """Look at a plan.

    Args:
        layout: the tokens that densities are computed at; default: the plan's geometry.
        paths: of the attention layers by role, where they are known.

    Returns:
        The view; ``plan_text`` prints it and ``visattn.draw.plan_picture.draw_plan`` draws it.

    Raises:
        ValueError: the layout is larger than any video.
    """
    layout = plan.geometry if layout is None else layout
    places = places_of([plan], paths or {})
    parts = [
        (place, place.layers[number], _parts(plan, place, table_of(plan, place, number)))
        for place in places
        for number in range(len(place.layers))
    ]
    used = (pattern for _, _, own in parts for *_, heads in own for pattern in heads)
    densities, misfits = densities_of(used, layout)
    rows = tuple(
        PlanRow(place.role, layer, phase, pass_, when, heads, mean_of(heads, densities))
        for place, layer, own in parts
        for phase, pass_, when, heads in own
    )
    density = mean_density(plan, places, densities)
    return PlanView(
        plan, layout, places, rows, names_of(densities), densities, misfits, density
    )


def names_of(patterns: Iterable[HeadPattern]) -> dict[HeadPattern, str]:
    """Short names, in the order of their appearance."""
    fixed: dict[HeadPattern, str] = {Dense(): "dense", Skip(): "skip"}
    distinct = dict.fromkeys(patterns)
    others = [pattern for pattern in distinct if pattern not in fixed]
    names = {pattern: f"p{number}" for number, pattern in enumerate(others, 1)}
    return names | {pattern: name for pattern, name in fixed.items() if pattern in distinct}


def densities_of(
    patterns: Iterable[HeadPattern], layout: TokenLayout | None
) -> tuple[Densities, Mapping[HeadPattern, str]]:
    """The density of each distinct pattern, and why some of them have none on the layout.

    Raises:
        ValueError: the layout is larger than any video.
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
    """Mean density of some heads; None where that of one is not known."""
    known = [own for pattern in heads if (own := densities[pattern]) is not None]
    return sum(known) / len(known) if len(known) == len(heads) else None


def mean_density(plan: Plan, places: Sequence[Place], densities: Densities) -> float | None:
    """The mean density of a plan, as ``PlanView`` says."""
    if not all(place.whole or len(place.layers) == 1 for place in places):
        return None
    ends = (0.0, *plan.phases, 1.0)
    layers = [
        table_of(plan, place, number) for place in places for number in range(len(place.layers))
    ]
    total = 0.0
    for table in layers:
        for phase in range(len(plan.phases) + 1):
            for pass_ in GUIDED:
                heads = entry(table, phase, pass_)
                own = 1.0 if heads is None else mean_of(heads, densities)
                if own is None:
                    return None
                total += own * (ends[phase + 1] - ends[phase]) / len(GUIDED)
    return total / len(layers)


def pass_words(pass_: str, others: bool) -> str:
    """A pass in words; ``others``: some passes have a row of their own."""
    return pass_ if pass_ != ANY else "other passes" if others else ""


def rounded(value: float | None) -> float | None:
    """A density as it stands in JSON."""
    return None if value is None else round(value, 6)


def _parts(plan: Plan, place: Place, table: Table) -> list[tuple[int | None, str, str, Heads]]:
    """Phase, pass, both in words, and heads, for each phase and pass that differs from others."""
    dense: Heads = (Dense(),) * (place.heads or 1)
    phases: list[dict[str, Heads]] = []
    for phase in range(len(plan.phases) + 1):
        base = entry(table, phase, ANY) or dense
        own = {pass_: entry(table, phase, pass_) or dense for pass_ in plan.passes}
        phases.append({ANY: base} | {key: heads for key, heads in own.items() if heads != base})
    same = all(own == phases[0] for own in phases)
    out = []
    for phase, rows in enumerate(phases[:1] if same else phases):
        for pass_, heads in rows.items():
            words = ["" if same else f"phase {phase}", pass_words(pass_, len(rows) > 1)]
            when = " ".join(filter(None, words)) or "always"
            out.append((None if same else phase, pass_, when, heads))
    return out
