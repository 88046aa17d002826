"""The patterns that published rules choose for each head."""

from __future__ import annotations

import math
import random

from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.search.measure.output_losses import LOSSES
from visattn.search.solve.assignments import Made
from visattn.search.solve.price_table import PriceTable

__all__ = ["published_rules"]


def published_rules(table: PriceTable, speed: float, seed: int = 0) -> dict[str, Made]:
    """Return the assignments of published rules, each at the densest level of its candidates that
    reaches a predicted speed.

    - SVG (Xi et al. 2025, arXiv 2502.01776): each head gets a band within frames or, in the order
      (h, w, t), a band across frames, whichever has less output error.
    - Sparse-vDiT (arXiv 2506.03065): each head gets skip, a band, a band across frames, or the
      first frame and a band. The rule minimises relative output error + 0.5 (1 - sparsity). A head
      is dense if the minimum is not below 1.
    - STA (Zhang et al. 2025, arXiv 2502.04507): each head gets the sliding window of least output
      error. No head stays dense.
    - Random: each head gets a random static candidate near the level.

    Args:
        table: losses and seconds of the candidates.
        speed: least speedup of a whole generation.
        seed: seed of the random assignment.
    """
    generator = random.Random(seed)

    def svg(level: float) -> Made | None:
        return _arg_min(table, {"band", "band hwt"}, level, near=True)

    def sta(level: float) -> Made | None:
        return _arg_min(table, {"sliding tile"}, level, near=False)

    def vdit(level: float) -> Made | None:
        families = {"skip", "band", "bands across frames", "first frame and band"}
        return _arg_min(table, families, level, near=True, penalty=0.5, most=1.0)

    def at_random(level: float) -> Made | None:
        near = [pattern for _, pattern in table.pool.static if _near(table, pattern, level)]
        if not near:
            return None
        return {
            group: tuple(generator.choice(near) for _ in range(table.heads[group[1:]]))
            for group in table.groups
        }

    assignments: dict[str, Made] = {}
    levels = sorted({round(p.density(table.layout), 2) for _, p in table.pool.static}, reverse=True)
    for name, rule in (
        ("SVG's choice", svg),
        ("Sparse-vDiT's rule", vdit),
        ("STA's arg-min", sta),
        ("random", at_random),
    ):
        for level in levels:
            made = rule(level)
            if made is not None and table.known(made) and table.speedup(made) >= speed:
                assignments[name] = made
                break
    return assignments


def _near(table: PriceTable, pattern: HeadPattern, level: float) -> bool:
    """Return whether the density of a static pattern is close to a level."""
    if not isinstance(pattern, Pattern):
        return False
    return 0.7 * level <= pattern.density(table.layout) <= 1.02 * level


def _arg_min(
    table: PriceTable,
    families: set[str],
    level: float,
    *,
    near: bool,
    penalty: float = 0.0,
    most: float = math.inf,
) -> Made | None:
    """Return for each head the candidate of some families with the least output error plus a
    penalty.

    Args:
        table: losses and seconds of the candidates.
        families: names of the families.
        level: density of the candidates.
        near: whether a candidate's density must be near the level, and not just at most the level.
        penalty: factor of the density that is added to the error.
        most: a head is dense if its minimum is above this.

    Returns:
        The assignment, or None if a head has no candidate of that density but Skip.
    """
    loss_index = LOSSES.index("output")
    made: Made = {}
    for group in table.groups:
        heads: list[HeadPattern] = []
        for head in range(table.heads[group[1:]]):
            scored: list[tuple[float, int, HeadPattern]] = []
            for number, (family, pattern) in enumerate(table.candidates(group, head)):
                assert isinstance(pattern, Pattern) or family not in families
                if family not in families or not isinstance(pattern, Pattern):
                    continue
                density = pattern.density(table.layout)
                within = _near(table, pattern, level) if near else density <= 1.02 * level
                if within or family == "skip":
                    loss = float(table.losses[group][head, number, loss_index])
                    scored.append((loss + penalty * density, number, pattern))
            if not any(repr(candidate) != "Skip()" for _, _, candidate in scored):
                return None
            loss, _, best = min(scored)
            heads.append(best if loss <= most else Dense())
        made[group] = tuple(heads)
    return made
