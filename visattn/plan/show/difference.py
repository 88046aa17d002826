"""The difference of two plans, head by head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern
from visattn.plan.plan import Plan
from visattn.plan.rule import ANY, PASSES, Table
from visattn.plan.show.plan_view import (
    Densities,
    densities_of,
    mean_density,
    names_of,
    pass_words,
    rounded,
)
from visattn.plan.show.planned_denoisers import (
    Heads,
    Paths,
    PlannedDenoiser,
    denoisers_of,
    entry,
    table_of,
)

__all__ = ["HeadChange", "PlanDifference", "difference"]

WRITTEN = ("patterns", "rules", "visattn")  # compared by their effect
BY_KEY = ("evidence", "provenance", "denoisers")


@dataclass(frozen=True)
class HeadChange:
    """Heads of neighbouring layers whose pattern changes.

    Attributes:
        denoiser: the denoiser.
        layers: module paths of the layers.
        when: phase and pass in words.
        heads: indices of the heads; None for all heads of an unknown number.
        count: number of heads of a layer; None if unknown.
        old: the pattern before.
        new: the pattern after.
    """

    denoiser: PlannedDenoiser
    layers: tuple[str, ...]
    when: str
    heads: tuple[int, ...] | None
    count: int | None
    old: HeadPattern
    new: HeadPattern


@dataclass(frozen=True, eq=False)
class PlanDifference:
    """The difference of two plans.

    Attributes:
        settings: JSON values of both plans by key, such as ``"provenance.seed"``; None where a plan
            lacks the key.
        changes: of heads.
        note: why heads could not be compared, or None.
        names: short names of the patterns that changed.
        densities: of the patterns of the old and of the new plan.
        density: mean density of each plan, as in ``PlanView``.
    """

    settings: Mapping[str, tuple[Any, Any]]
    changes: tuple[HeadChange, ...]
    note: str | None
    names: Mapping[HeadPattern, str]
    densities: tuple[Densities, Densities]
    density: tuple[float | None, float | None]

    @property
    def same(self) -> bool:
        """Whether both plans have the same effect."""
        return not self.settings and not self.changes and self.note is None

    def numbers(self) -> dict[str, Any]:
        """The difference as JSON values."""
        old, new = self.densities
        return {
            "same": self.same,
            "note": self.note,
            "settings": {key: list(values) for key, values in self.settings.items()},
            "density": [rounded(density) for density in self.density],
            "changes": [
                {
                    "role": change.denoiser.role,
                    "layers": list(change.layers),
                    "when": change.when,
                    "heads": None if change.heads is None else list(change.heads),
                    "old": repr(change.old),
                    "new": repr(change.new),
                    "old_density": rounded(old[change.old]),
                    "new_density": rounded(new[change.new]),
                }
                for change in self.changes
            ],
        }


def difference(
    old: Plan, new: Plan, layout: TokenLayout | None = None, paths: Paths | None = None
) -> PlanDifference:
    """Compare two plans.

    Args:
        old: the plan before.
        new: the plan after.
        layout: the tokens for densities; default: the geometry of each plan, or of the other plan.
        paths: the paths of the attention layers by role, if known.

    Returns:
        The difference; ``difference_text`` prints it.

    Raises:
        ValueError: the layout has more tokens than a plan's geometry may have.
    """
    note = None
    changes: list[HeadChange] = []
    denoisers: tuple[PlannedDenoiser, ...] = ()
    try:
        denoisers = denoisers_of([old, new], paths or {})
        for denoiser in denoisers:
            changes += _changes(old, new, denoiser)
    except ValueError as error:
        note, changes, denoisers = str(error), [], ()
    sides = (
        densities_of(_patterns(old), layout or old.geometry or new.geometry)[0],
        densities_of(_patterns(new), layout or new.geometry or old.geometry)[0],
    )
    return PlanDifference(
        _settings(old, new),
        tuple(changes),
        note,
        names_of(pattern for change in changes for pattern in (change.old, change.new)),
        sides,
        (
            mean_density(old, denoisers, sides[0]) if denoisers else None,
            mean_density(new, denoisers, sides[1]) if denoisers else None,
        ),
    )


def _patterns(plan: Plan) -> Iterator[HeadPattern]:
    """Yield every pattern that a plan may run."""
    yield Dense()
    for rule in plan.rules:
        yield from rule.heads


def _settings(old: Plan, new: Plan) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ."""
    sides = []
    for plan in (old, new):
        value = {k: item for k, item in json.loads(plan.to_json()).items() if k not in WRITTEN}
        for name in BY_KEY:
            value |= {f"{name}.{key}": item for key, item in value.pop(name).items()}
        sides.append(value)
    keys = sorted(sides[0].keys() | sides[1].keys())
    both = {key: (sides[0].get(key), sides[1].get(key)) for key in keys}
    return {key: values for key, values in both.items() if values[0] != values[1]}


# Heads that change in a layer: when, their indices, the number of heads, old and new pattern.
Change = tuple[str, tuple[int, ...] | None, int | None, HeadPattern, HeadPattern]


def _changes(old: Plan, new: Plan, denoiser: PlannedDenoiser) -> list[HeadChange]:
    """Return the changes of a denoiser, with neighbouring layers of equal changes together."""
    runs: list[tuple[list[str], list[Change]]] = []
    for number, layer in enumerate(denoiser.layers):
        changes = _layer(old, new, denoiser, number)
        if denoiser.whole and runs and runs[-1][1] == changes:
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], changes))
    return [
        HeadChange(denoiser, tuple(layers), *change)
        for layers, changes in runs
        for change in changes
    ]


def _layer(old: Plan, new: Plan, denoiser: PlannedDenoiser, number: int) -> list[Change]:
    """Return the changes of a layer, by intervals of steps in which both plans have one phase."""
    tables = table_of(old, denoiser, number), table_of(new, denoiser, number)
    cuts = sorted({0.0, 1.0, *old.phases, *new.phases})
    stretches = []
    for begin, end in pairwise(cuts):
        phases = [sum(cut <= begin for cut in plan.phases) for plan in (old, new)]
        name = f"phase {phases[0]}" if old.phases == new.phases else f"steps {begin:.0%}-{end:.0%}"
        stretches.append((name, _stretch(old, new, denoiser, tables, (phases[0], phases[1]))))
    if all(changes == stretches[0][1] for _, changes in stretches):
        stretches = [("", stretches[0][1])]
    return [
        (" ".join(filter(None, (name, change[0]))) or "always", *change[1:])
        for name, changes in stretches
        for change in changes
    ]


def _stretch(
    old: Plan,
    new: Plan,
    denoiser: PlannedDenoiser,
    tables: tuple[Table, Table],
    phases: tuple[int, int],
) -> list[Change]:
    """Return the changes in an interval of steps, with the pass in words."""
    passes = [p for p in PASSES if p in old.passes or p in new.passes]
    pairs = {
        pass_: _both(
            entry(tables[0], phases[0], pass_), entry(tables[1], phases[1], pass_), denoiser
        )
        for pass_ in (ANY, *passes)
    }
    pairs = {pass_: both for pass_, both in pairs.items() if pass_ == ANY or both != pairs[ANY]}
    out: list[Change] = []
    for pass_, (before, after) in pairs.items():
        words = pass_words(pass_, len(pairs) > 1)
        groups: dict[tuple[HeadPattern, HeadPattern], list[int]] = {}
        for head, change in enumerate(zip(before, after, strict=True)):
            if change[0] != change[1]:
                groups.setdefault(change, []).append(head)
        known = denoiser.heads is not None or len(before) > 1
        out += [
            (words, tuple(heads) if known else None, len(before) if known else None, *change)
            for change, heads in groups.items()
        ]
    return out


def _both(
    before: Heads | None, after: Heads | None, denoiser: PlannedDenoiser
) -> tuple[Heads, Heads]:
    """Return the patterns of the heads of both plans, as many of each."""
    count = max(len(before or ()), len(after or ()), denoiser.heads or 1)
    sides: list[Heads] = []
    for patterns in (before, after):
        heads: Heads = (Dense(),) if patterns is None else patterns
        if len(heads) not in (1, count):
            raise ValueError(
                f"the plans are for different models: one gives {len(heads)} heads to the layers "
                f"of {denoiser.role}, the other {count}"
            )
        sides.append(heads if len(heads) == count else heads * count)
    return sides[0], sides[1]
