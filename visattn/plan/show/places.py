"""Where a plan says something: the denoisers and layers that it can be looked at by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visattn.patterns import HeadPattern
from visattn.plan.plan import ANY, Denoiser, Plan, Table

__all__ = ["Heads", "Paths", "Place", "entry", "places_of", "table_of"]

# the paths of the attention layers, by role of the denoiser
Paths = Mapping[str, Sequence[str]]
# the pattern of each head, or a single one for all where their number is not known
Heads = tuple[HeadPattern, ...]


@dataclass(frozen=True)
class Place:
    """A denoiser, as far as plans tell.

    Attributes:
        role: its role; ``"any"``: all that have no place of their own.
        layers: paths of its layers; where these are not known, those that rules name, and
            ``"any"`` for the others.
        heads: of a layer; None where not known.
        whole: the layers are all that it has, in order, so that they have numbers.
    """

    role: str
    layers: tuple[str, ...]
    heads: int | None
    whole: bool

    def words(self, layers: Sequence[str]) -> str:
        """Some of its layers in words: ``"transformer.blocks.1.attn1 and 38 more"``."""
        layer = layers[0]
        if layer == ANY:
            layer = "all layers" if self.layers == (ANY,) else "other layers"
        elif layer.isdecimal():
            layer = f"layer {layer}"
        joint = ", " if " " in layer else "."
        name = layer if self.role == ANY else f"{self.role}{joint}{layer}"
        return name + (f" and {len(layers) - 1} more" if layers[1:] else "")


def places_of(plans: Sequence[Plan], paths: Paths) -> tuple[Place, ...]:
    """The denoisers that plans speak of.

    Args:
        plans: one plan, or two to be compared.
        paths: of the layers, where they are known; without them the layers of a denoiser whose
            layers no rule names are called by their numbers.

    Raises:
        ValueError: the plans are for different denoisers.
    """
    rules = [rule for plan in plans for rule in plan.rules]
    known = dict.fromkeys(role for plan in plans for role in plan.denoisers)
    roles = known | dict.fromkeys(rule.role for rule in rules if rule.role != ANY)
    if not known and (not roles or any(rule.role == ANY for rule in rules)):
        roles[ANY] = None
    places = []
    for role in roles:
        own = [rule for rule in rules if rule.role in (role, ANY)]
        named = sorted({rule.layer for rule in own} - {ANY}, key=by_number)
        denoiser = _denoiser(role, plans)
        if denoiser is None:
            sizes = {len(rule.patterns) for rule in own if isinstance(rule.patterns, tuple)}
            heads = sizes.pop() if len(sizes) == 1 else None
            places.append(Place(role, (*named, ANY), heads, whole=False))
            continue
        layers = tuple(paths.get(role, ()))
        if len(layers) != denoiser.layers:
            layers = () if named else tuple(map(str, range(denoiser.layers)))
        places.append(
            Place(role, layers or (*named, ANY), denoiser.heads, whole=bool(layers))
        )
    return tuple(places)


def table_of(plan: Plan, place: Place, number: int) -> Table:
    """What the heads of one layer of a place run, by phase and pass, as ``Plan.table``; one entry
    for all heads where their number is not known. Dense layers are told by number, and so only
    where the layers have numbers."""
    if not place.whole:
        return plan.table_at(place.role, place.layers[number], place.heads or 1)
    return plan.table(place.role, number, place.layers, place.heads or 1)


def entry(table: Table, phase: int, pass_: str) -> Heads | None:
    """What a table says of a phase and pass; None: all heads are dense."""
    return table.get((phase, pass_), table.get((phase, ANY)))


def _denoiser(role: str, plans: Sequence[Plan]) -> Denoiser | None:
    found = list(dict.fromkeys(p.denoisers[role] for p in plans if role in p.denoisers))
    if len(found) > 1:
        one, other = found
        raise ValueError(
            f"the plans are for different models, so that their heads cannot be compared: {role} "
            f"is {one} in one and {other} in the other"
        )
    return found[0] if found else None


def by_number(path: str) -> list[tuple[int, str]]:
    """An order in which ``blocks.9`` comes before ``blocks.10``."""
    parts = re.split(r"(\d+)", path)  # by turns words and numbers
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]
