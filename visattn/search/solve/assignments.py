"""Ways to give each head a pattern within a budget of seconds, and what others would choose."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Mapping, Sequence

from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.search.measure.output_losses import LOSSES
from visattn.search.solve.knapsack import Option, best_choice, frontier, pareto
from visattn.search.solve.price_table import Allowed, Assignment, Group, PriceTable

__all__ = ["LayerFronts", "meeting", "published_rules", "solutions", "uniform_plans"]

POINTS = 200  # of a layer's front
HEAD_CAP = 0.25  # of the whole loss that one head may have, or four times its even share
LAYER_CAPS = (0.4, 2.0)  # of an even share of the seconds that a layer may have
TIGHTER = 8  # times that a budget is drawn in until the prediction meets the target
ROUNDS = 40  # of options that are taken from heads whose loss is above the cap

Made = dict[Group, tuple[HeadPattern, ...]]
Fronts = Mapping[Group, Sequence[Option]]


class LayerFronts:
    """The best options of each layer, over its heads.

    Args:
        table: of the search; allowed: families and patterns; loss: one of LOSSES.
    """

    def __init__(
        self, table: PriceTable, allowed: Allowed | None = None, loss: str = LOSSES[0]
    ) -> None:
        self.table = table
        self.heads = {
            group: [
                table.options(group, head, allowed, loss)
                for head in range(table.heads[group[1:]])
            ]
            for group in table.groups
        }
        self.fronts: Fronts = {group: frontier(own, POINTS) for group, own in self.heads.items()}

    def measured(
        self,
        errors: Mapping[Group, Sequence[tuple[float, float]]],
        weights: Mapping[Group, float] | None = None,
    ) -> Fronts:
        """The fronts with the error of the model's output in place of losses, on a line between
        what was measured, in logarithms.

        Args:
            errors: of each layer alone, ``(loss, error)`` for some of its options.
            weights: factors of the errors of some layers.
        """
        out = {}
        for group, front in self.fronts.items():
            weight = 1.0 if weights is None else weights.get(group, 1.0)
            known = errors.get(group, ())
            out[group] = pareto(
                [own._replace(loss=weight * _between(known, own.loss)) for own in front]
            )
        return out

    def error_of(
        self,
        group: Group,
        heads: tuple[HeadPattern, ...],
        errors: Mapping[Group, Sequence[tuple[float, float]]],
    ) -> float:
        """The error of the model's output that a layer alone is expected to make."""
        return _between(errors.get(group, ()), self.table.loss(group, heads))

    def even(self, budget: float) -> Made:
        """Every layer with the same seconds, by its share of the steps."""
        table = self.table
        whole = sum(table.weight(group) for group in self.fronts)
        made = {}
        for group, front in self.fronts.items():
            own = budget * table.weight(group) / whole
            within = [option for option in front if option.cost <= own] or [front[0]]
            made[group] = table.patterns(group, within[-1].choice)
        return made

    def across(
        self, budget: float, fronts: Fronts | None = None, caps: tuple[float, float] | None = None
    ) -> Made | None:
        """The options of least loss in all, None where the budget is too small.

        Args:
            fronts: other losses; caps: shares of an even part of the budget that a layer's seconds
                must lie between.
        """
        fronts = self.fronts if fronts is None else fronts
        groups = list(fronts)
        lines = [list(fronts[group]) for group in groups]
        if caps is not None:
            whole = sum(map(self.table.weight, groups))
            for number, group in enumerate(groups):
                even = budget * self.table.weight(group) / whole
                low, high = (cap * even for cap in caps)
                within = [own for own in lines[number] if low <= own.cost <= high]
                lines[number] = within or [min(lines[number], key=lambda own: abs(own.cost - even))]
        chosen = best_choice(lines, budget)
        if chosen is None:
            return None
        return {
            group: self.table.patterns(group, line[number].choice)
            for group, line, number in zip(groups, lines, chosen, strict=True)
        }

    def capped(self, budget: float) -> Made | None:
        """As ``across``, with a cap on each layer's seconds and on each head's share of the
        loss."""
        for _ in range(ROUNDS):
            made = self.across(budget, caps=LAYER_CAPS)
            if made is None or not self._without_worst(made):
                return made
        return made

    def _without_worst(self, made: Assignment) -> bool:
        """Take its option from the head that has more of the loss than it may; False where none
        has."""
        found = []
        for group, heads in made.items():
            for head, pattern in enumerate(heads):
                for own in self.heads[group][head]:
                    if self.table.patterns(group, (-1,) * head + own.choice)[head] == pattern:
                        found.append((own.loss, group, head, own))
                        break
        total = sum(own[0] for own in found)
        loss, group, head, option = max(found, key=lambda own: own[0])
        if total == 0 or loss <= max(HEAD_CAP, 4 / len(found)) * total:
            return False
        self.heads[group][head] = [own for own in self.heads[group][head] if own != option]
        self.fronts = {**self.fronts, group: frontier(self.heads[group], POINTS)}
        return True


def _between(points: Sequence[tuple[float, float]], loss: float) -> float:
    """The error at a loss, from some ``(loss, error)``."""
    known = sorted((x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(y))
    if loss <= 0:
        return 0.0
    if not known:
        return loss
    at = bisect.bisect([x for x, _ in known], loss)
    if at == 0:
        return known[0][1] * loss / known[0][0]
    if at == len(known):
        return known[-1][1] * loss / known[-1][0]
    (x0, y0), (x1, y1) = known[at - 1], known[at]
    share = math.log(loss / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def solutions(
    table: PriceTable,
    speed: float,
    fronts: Mapping[str, LayerFronts],
    errors: Mapping[Group, Sequence[tuple[float, float]]],
) -> dict[str, Made]:
    """Assignments of a predicted speed, by how they were found.

    Args:
        speed: of a whole generation, at least.
        fronts: by name: ``"all"``, ``"static"``, ``"stencils"``, ``"output"``, ``"mass"``.
        errors: of the model's output, as ``LayerFronts.measured`` takes them; empty: not measured.
    """
    every = fronts["all"]
    ways: dict[str, Callable[[float], Made | None]] = {
        "projected error": every.across,
        "projected error, capped": lambda budget: _copy(every).capped(budget),
        "projected error, even layers": every.even,
        "stencils, even layers": fronts["stencils"].even,
        "static, even layers": fronts["static"].even,
        "by output error, even layers": fronts["output"].even,
        "by mass, even layers": fronts["mass"].even,
    }
    if errors:
        measured = every.measured(errors)
        ways["error by layer"] = lambda budget: every.across(budget, measured)
        ways["error by layer, capped"] = lambda budget: every.across(budget, measured, LAYER_CAPS)
    out: dict[str, Made] = {}
    for name, way in ways.items():
        made = meeting(table, speed, way)
        if made is not None:
            out[name] = made
    return out


def _copy(fronts: LayerFronts) -> LayerFronts:
    """Fronts that may be cut without the first ones' knowing."""
    out = object.__new__(LayerFronts)
    out.table, out.fronts = fronts.table, fronts.fronts
    out.heads = {group: list(own) for group, own in fronts.heads.items()}
    return out


def meeting(
    table: PriceTable, speed: float, way: Callable[[float], Made | None]
) -> Made | None:
    """What a way finds with a budget that meets the speed as it is predicted for whole layers,
    whose heads cost a little less or more than they do one by one."""
    attention = table.times.dense * sum(map(table.weight, table.groups))
    wanted = attention - (table.generation - table.generation / speed)
    heads = sum(
        table.weight(g) * table.times.head(Dense()) * table.heads[g[1:]] for g in table.groups
    )
    low, high, best = 0.0, 1.5, None
    if wanted <= 0:
        return None
    for _ in range(TIGHTER):
        share = (low + high) / 2
        made = way(share * wanted * heads / attention)
        if made is not None and table.speedup(made) >= speed:
            low, best = share, made
        elif made is None:
            low = share
        else:
            high = share
    return best


def uniform_plans(
    table: PriceTable, speed: float, kinds: Mapping[str, Sequence[HeadPattern]]
) -> dict[str, HeadPattern]:
    """Of each family the member for all heads that meets a predicted speed with the least loss in
    all, or, where that is not known, the slowest; families that never meet it are left out.

    Args:
        kinds: members by family.
    """

    def worth(pattern: HeadPattern) -> tuple[float, float]:
        return total_loss(table, pattern), -table.times.head(pattern)

    out: dict[str, HeadPattern] = {}
    for family, members in kinds.items():
        fitting = [
            own
            for own in members
            if table.known(table.uniform(own)) and table.speedup(table.uniform(own)) >= speed
        ]
        if fitting:
            out[family] = min(fitting, key=worth)
    return out


def total_loss(table: PriceTable, pattern: HeadPattern) -> float:
    """Of a pattern on all heads; infinite where it is not in the pool or could not run."""
    names = [own for _, own in table.candidates(table.groups[0], 0)]
    if pattern not in names:
        return math.inf
    number = names.index(pattern)
    total = sum(
        table.share(group) * float(table.losses[group][:, number, 0].sum())
        for group in table.groups
    )
    return total if math.isfinite(total) else math.inf


def published_rules(table: PriceTable, speed: float, seed: int = 0) -> dict[str, Made]:
    """What published rules choose at the densest level of their candidates that meets a predicted
    speed.

    - SVG (Xi et al. 2025, arXiv 2502.01776): per head a band within frames or, in the order (h, w,
      t), across them, by the output's error.
    - Sparse-vDiT (arXiv 2506.03065): per head skip, a band, a band across frames, or first frame
      and band, by the output's relative error + 0.5 (1 - sparsity), dense where none is below 1.
    - STA (Zhang et al. 2025, arXiv 2502.04507): per head the sliding window of least output error;
      no head stays dense.
    - Random: of all static candidates near the level, by a seeded draw.
    """
    luck = random.Random(seed)

    def svg(level: float) -> Made | None:
        return _arg_min(table, {"band", "band hwt"}, level, near=True)

    def sta(level: float) -> Made | None:
        return _arg_min(table, {"sliding tile"}, level, near=False)

    def vdit(level: float) -> Made | None:
        own = _arg_min(
            table,
            {"skip", "band", "bands across frames", "first frame and band"},
            level,
            near=True,
            penalty=0.5,
            most=1.0,
        )
        return own

    def at_random(level: float) -> Made | None:
        own = [p for _, p in table.pool.static if _near(table, p, level)]
        return (
            {g: tuple(luck.choice(own) for _ in range(table.heads[g[1:]])) for g in table.groups}
            if own
            else None
        )

    out: dict[str, Made] = {}
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
                out[name] = made
                break
    return out


def _near(table: PriceTable, pattern: HeadPattern, level: float) -> bool:
    """Whether a pattern keeps about as much as a level says."""
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
    """For each head the candidate of some families with the least output error, plus a penalty
    times its density; dense where the least is above ``most``. None where none keeps so much."""
    at = LOSSES.index("output")
    made: Made = {}
    for group in table.groups:
        heads: list[HeadPattern] = []
        for head in range(table.heads[group[1:]]):
            found: list[tuple[float, int, HeadPattern]] = []
            for number, (family, pattern) in enumerate(table.candidates(group, head)):
                assert isinstance(pattern, Pattern) or family not in families
                if family not in families or not isinstance(pattern, Pattern):
                    continue
                density = pattern.density(table.layout)
                within = _near(table, pattern, level) if near else density <= 1.02 * level
                if within or family == "skip":
                    loss = float(table.losses[group][head, number, at]) + penalty * density
                    found.append((loss, number, pattern))
            if not any(repr(own) != "Skip()" for _, _, own in found):
                return None
            loss, _, own = min(found)
            heads.append(own if loss <= most else Dense())
        made[group] = tuple(heads)
    return made
