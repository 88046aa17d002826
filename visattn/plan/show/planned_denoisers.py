"""The denoisers and layers that a plan has rules for, as far as the plan names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visattn.patterns import HeadPattern
from visattn.plan.plan import Plan
from visattn.plan.rule import ANY, Denoiser, Table

__all__ = ["Heads", "Paths", "PlannedDenoiser", "denoisers_of", "entry", "table_of"]

# The paths of the attention layers, by role of the denoiser.
Paths = Mapping[str, Sequence[str]]
# The pattern of each head, or one pattern for all heads if their number is unknown.
Heads = tuple[HeadPattern, ...]


@dataclass(frozen=True)
class PlannedDenoiser:
    """A denoiser, as far as plans describe it.

    Attributes:
        role: its role; ``"any"``: all denoisers without an entry of their own.
        layers: paths of its layers; if these are unknown, the layers that rules name, and
            ``"any"`` for the others.
        heads: number of heads of a layer; None if unknown.
        whole: whether ``layers`` holds all layers in order, so that they have indices.
    """

    role: str
    layers: tuple[str, ...]
    heads: int | None
    whole: bool

    def words(self, layers: Sequence[str]) -> str:
        """Return some of its layers in words: ``"transformer.blocks.1.attn1 and 38 more"``."""
        layer = layers[0]
        if layer == ANY:
            layer = "all layers" if self.layers == (ANY,) else "other layers"
        elif layer.isdecimal():
            layer = f"layer {layer}"
        joint = ", " if " " in layer else "."
        name = layer if self.role == ANY else f"{self.role}{joint}{layer}"
        return name + (f" and {len(layers) - 1} more" if layers[1:] else "")


def denoisers_of(plans: Sequence[Plan], paths: Paths) -> tuple[PlannedDenoiser, ...]:
    """Return the denoisers that plans have rules for.

    Args:
        plans: one plan, or two plans to compare.
        paths: the paths of the layers, if known. Without them the layers of a denoiser whose
            layers no rule names are called by their indices.

    Raises:
        ValueError: the plans are for different denoisers.
    """
    rules = [rule for plan in plans for rule in plan.rules]
    known = dict.fromkeys(role for plan in plans for role in plan.denoisers)
    roles = known | dict.fromkeys(rule.role for rule in rules if rule.role != ANY)
    if not known and (not roles or any(rule.role == ANY for rule in rules)):
        roles[ANY] = None
    denoisers = []
    for role in roles:
        matching = [rule for rule in rules if rule.role in (role, ANY)]
        named = sorted({rule.layer for rule in matching} - {ANY}, key=by_number)
        denoiser = _denoiser(role, plans)
        if denoiser is None:
            sizes = {len(rule.patterns) for rule in matching if isinstance(rule.patterns, tuple)}
            heads = sizes.pop() if len(sizes) == 1 else None
            denoisers.append(PlannedDenoiser(role, (*named, ANY), heads, whole=False))
            continue
        layers = tuple(paths.get(role, ()))
        if len(layers) != denoiser.layers:
            layers = () if named else tuple(map(str, range(denoiser.layers)))
        denoisers.append(
            PlannedDenoiser(role, layers or (*named, ANY), denoiser.heads, whole=bool(layers))
        )
    return tuple(denoisers)


def table_of(plan: Plan, denoiser: PlannedDenoiser, number: int) -> Table:
    """Return the patterns of the heads of a layer by phase and pass, as ``Plan.table``.

    There is one entry for all heads if their number is unknown. ``dense_layers`` holds indices, so
    that it counts only where the layers have indices.

    Args:
        plan: the plan.
        denoiser: the denoiser.
        number: index of the layer in ``denoiser.layers``.
    """
    if not denoiser.whole:
        return plan.table_at(denoiser.role, denoiser.layers[number], denoiser.heads or 1)
    return plan.table(denoiser.role, number, denoiser.layers, denoiser.heads or 1)


def entry(table: Table, phase: int, pass_: str) -> Heads | None:
    """Return the heads of a phase and pass in a table; None: all heads are dense."""
    return table.get((phase, pass_), table.get((phase, ANY)))


def _denoiser(role: str, plans: Sequence[Plan]) -> Denoiser | None:
    denoisers = list(dict.fromkeys(p.denoisers[role] for p in plans if role in p.denoisers))
    if len(denoisers) > 1:
        one, other = denoisers
        raise ValueError(
            f"the plans are for different models, so that their heads cannot be compared: {role} "
            f"is {one} in one and {other} in the other"
        )
    return denoisers[0] if denoisers else None


def by_number(path: str) -> list[tuple[int, str]]:
    """Return a sort key by which ``blocks.9`` comes before ``blocks.10``."""
    pieces = re.split(r"(\d+)", path)  # words at even and numbers at odd positions
    return [(len(piece) if index % 2 else 0, piece) for index, piece in enumerate(pieces)]
