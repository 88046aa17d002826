"""What is different between two plans, head by head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern
from visattn.plan.plan import ANY, PASSES, Plan, Table
from visattn.plan.show.places import Heads, Paths, Place, entry, places_of, table_of
from visattn.plan.show.plan_view import (
    Densities,
    densities_of,
    mean_density,
    names_of,
    pass_words,
    rounded,
)

__all__ = ["HeadChange", "PlanDifference", "difference"]

WRITTEN = ("patterns", "rules", "visattn")  # compared by what they do
BY_KEY = ("evidence", "provenance", "denoisers")


@dataclass(frozen=True)
class HeadChange:
    """Heads of neighbouring layers that ran one pattern and now run another.

    Attributes:
        layers: paths; when: phase and pass in words.
        heads: their numbers, of how many there are; both None for all of an unknown number.
    """

    place: Place
    layers: tuple[str, ...]
    when: str
    heads: tuple[int, ...] | None
    count: int | None
    old: HeadPattern
    new: HeadPattern


@dataclass(frozen=True, eq=False)
class PlanDifference:
    """What is different between two plans.

    Attributes:
        settings: JSON values of both plans, by their key, ``"provenance.seed"``; None where one
            has none.
        changes: of heads; note: why heads could not be compared.
        names: of the patterns that changed; densities: of those of the old and the new plan.
        density: mean of each plan, as in ``PlanView``.
    """

    settings: Mapping[str, tuple[Any, Any]]
    changes: tuple[HeadChange, ...]
    note: str | None
    names: Mapping[HeadPattern, str]
    densities: tuple[Densities, Densities]
    density: tuple[float | None, float | None]

    @property
    def same(self) -> bool:
        """Whether both plans say the same."""
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
                    "role": own.place.role,
                    "layers": list(own.layers),
                    "when": own.when,
                    "heads": None if own.heads is None else list(own.heads),
                    "old": repr(own.old),
                    "new": repr(own.new),
                    "old_density": rounded(old[own.old]),
                    "new_density": rounded(new[own.new]),
                }
                for own in self.changes
            ],
        }


def difference(
    old: Plan, new: Plan, layout: TokenLayout | None = None, paths: Paths | None = None
) -> PlanDifference:
    """What is different between two plans.

    Args:
        layout: the tokens that densities are computed at; default: the geometry of each plan, or
            that of the other one.
        paths: of the attention layers by role, where they are known.

    Returns:
        The difference; ``difference_text`` prints it.

    Raises:
        ValueError: the layout is larger than any video.
    """
    note = None
    changes: list[HeadChange] = []
    places: tuple[Place, ...] = ()
    try:
        places = places_of([old, new], paths or {})
        for place in places:
            changes += _changes(old, new, place)
    except ValueError as error:
        note, changes, places = str(error), [], ()
    sides = (
        densities_of(_patterns(old), layout or old.geometry or new.geometry)[0],
        densities_of(_patterns(new), layout or new.geometry or old.geometry)[0],
    )
    return PlanDifference(
        _settings(old, new),
        tuple(changes),
        note,
        names_of(pattern for own in changes for pattern in (own.old, own.new)),
        sides,
        (
            mean_density(old, places, sides[0]) if places else None,
            mean_density(new, places, sides[1]) if places else None,
        ),
    )


def _patterns(plan: Plan) -> Iterator[HeadPattern]:
    """All that a plan may run."""
    yield Dense()
    for rule in plan.rules:
        yield from rule.heads


def _settings(old: Plan, new: Plan) -> dict[str, tuple[Any, Any]]:
    """Settings that differ."""
    sides = []
    for plan in (old, new):
        value = {k: own for k, own in json.loads(plan.to_json()).items() if k not in WRITTEN}
        for name in BY_KEY:
            value |= {f"{name}.{key}": own for key, own in value.pop(name).items()}
        sides.append(value)
    keys = sorted(sides[0].keys() | sides[1].keys())
    both = {key: (sides[0].get(key), sides[1].get(key)) for key in keys}
    return {key: values for key, values in both.items() if values[0] != values[1]}


# heads that change in a layer: when, which, of how many, from what to what
Change = tuple[str, tuple[int, ...] | None, int | None, HeadPattern, HeadPattern]


def _changes(old: Plan, new: Plan, place: Place) -> list[HeadChange]:
    """What changes in a denoiser; neighbouring layers with the same changes stand together."""
    runs: list[tuple[list[str], list[Change]]] = []
    for number, layer in enumerate(place.layers):
        own = _layer(old, new, place, number)
        if place.whole and runs and runs[-1][1] == own:
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], own))
    return [HeadChange(place, tuple(layers), *change) for layers, own in runs for change in own]


def _layer(old: Plan, new: Plan, place: Place, number: int) -> list[Change]:
    """What changes in a layer, by the stretches of steps that both plans have one phase in."""
    tables = table_of(old, place, number), table_of(new, place, number)
    cuts = sorted({0.0, 1.0, *old.phases, *new.phases})
    stretches = []
    for begin, end in pairwise(cuts):
        phases = [sum(cut <= begin for cut in plan.phases) for plan in (old, new)]
        name = f"phase {phases[0]}" if old.phases == new.phases else f"steps {begin:.0%}-{end:.0%}"
        stretches.append((name, _stretch(old, new, place, tables, (phases[0], phases[1]))))
    if all(own == stretches[0][1] for _, own in stretches):
        stretches = [("", stretches[0][1])]
    return [
        (" ".join(filter(None, (name, change[0]))) or "always", *change[1:])
        for name, changes in stretches
        for change in changes
    ]


def _stretch(
    old: Plan, new: Plan, place: Place, tables: tuple[Table, Table], phases: tuple[int, int]
) -> list[Change]:
    """The changes of a stretch, with the pass in words."""
    told = [p for p in PASSES if p in old.passes or p in new.passes]
    pairs = {
        pass_: _both(
            entry(tables[0], phases[0], pass_), entry(tables[1], phases[1], pass_), place
        )
        for pass_ in (ANY, *told)
    }
    pairs = {pass_: both for pass_, both in pairs.items() if pass_ == ANY or both != pairs[ANY]}
    out: list[Change] = []
    for pass_, (before, after) in pairs.items():
        words = pass_words(pass_, len(pairs) > 1)
        groups: dict[tuple[HeadPattern, HeadPattern], list[int]] = {}
        for head, change in enumerate(zip(before, after, strict=True)):
            if change[0] != change[1]:
                groups.setdefault(change, []).append(head)
        known = place.heads is not None or len(before) > 1
        out += [
            (words, tuple(heads) if known else None, len(before) if known else None, *change)
            for change, heads in groups.items()
        ]
    return out


def _both(before: Heads | None, after: Heads | None, place: Place) -> tuple[Heads, Heads]:
    """The heads of both plans, of the same number."""
    count = max(len(before or ()), len(after or ()), place.heads or 1)
    sides: list[Heads] = []
    for own in (before, after):
        heads: Heads = (Dense(),) if own is None else own
        if len(heads) not in (1, count):
            raise ValueError(
                f"the plans are for different models: one gives {len(heads)} heads to the layers "
                f"of {place.role}, the other {count}"
            )
        sides.append(heads if len(heads) == count else heads * count)
    return sides[0], sides[1]
