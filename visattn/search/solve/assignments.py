"""Methods that assign a pattern to each head within a budget of seconds."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Mapping, Sequence

from visattn.patterns import Dense, HeadPattern
from visattn.search.measure.output_losses import LOSSES
from visattn.search.solve.knapsack import Option, best_choice, frontier, pareto
from visattn.search.solve.price_table import Allowed, Assignment, Group, PriceTable

__all__ = ["LayerFronts", "Made", "meeting", "solutions", "uniform_plans"]

POINTS = 200  # largest number of options on a layer's front
HEAD_CAP = 0.25  # largest share of the total loss of one head, or four times its even share
LAYER_CAPS = (0.4, 2.0)  # least and largest seconds of a layer, relative to an even share
BISECTIONS = 8  # steps in which a budget is adjusted until the prediction meets the target
ROUNDS = 40  # most options that are removed from heads whose loss is above the cap

Made = dict[Group, tuple[HeadPattern, ...]]
Fronts = Mapping[Group, Sequence[Option]]


class LayerFronts:
    """The best options of each layer: combinations of the options of its heads.

    Args:
        table: losses and seconds of the candidates.
        allowed: whether a head can take a pattern of a family; None: all patterns.
        loss: one of LOSSES.
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
        self.fronts: Fronts = {
            group: frontier(options, POINTS) for group, options in self.heads.items()
        }

    def copied(self) -> LayerFronts:
        """Return a copy whose options can be removed without a change of the original."""
        other = copy.copy(self)
        other.heads = {group: list(options) for group, options in self.heads.items()}
        return other

    def measured(
        self,
        errors: Mapping[Group, Sequence[tuple[float, float]]],
        weights: Mapping[Group, float] | None = None,
    ) -> Fronts:
        """Return the fronts with the error of the model output instead of the loss.

        The error is interpolated between the measured points, linearly in logarithms.

        Args:
            errors: ``(loss, error)`` for some options of each layer, when only this layer is
                sparse.
            weights: factors of the errors of some layers.
        """
        fronts = {}
        for group, front in self.fronts.items():
            weight = 1.0 if weights is None else weights.get(group, 1.0)
            known = errors.get(group, ())
            fronts[group] = pareto(
                [
                    option._replace(loss=weight * _interpolated(known, option.loss))
                    for option in front
                ]
            )
        return fronts

    def error_of(
        self,
        group: Group,
        heads: tuple[HeadPattern, ...],
        errors: Mapping[Group, Sequence[tuple[float, float]]],
    ) -> float:
        """Return the expected error of the model output when only this layer is sparse."""
        return _interpolated(errors.get(group, ()), self.table.loss(group, heads))

    def even(self, budget: float) -> Made:
        """Give every layer the same seconds for each run of its attention, and return the options
        of least loss."""
        table = self.table
        total = sum(table.weight(group) for group in self.fronts)
        made = {}
        for group, front in self.fronts.items():
            share = budget * table.weight(group) / total
            within = [option for option in front if option.cost <= share] or [front[0]]
            made[group] = table.patterns(group, within[-1].choice)
        return made

    def across(
        self, budget: float, fronts: Fronts | None = None, caps: tuple[float, float] | None = None
    ) -> Made | None:
        """Return the options of least total loss, or None if the budget is too small.

        Args:
            budget: seconds of all layers.
            fronts: fronts with other losses; None: those of the layers.
            caps: least and largest seconds of a layer, relative to an even share of the budget.
        """
        fronts = self.fronts if fronts is None else fronts
        groups = list(fronts)
        options = [list(fronts[group]) for group in groups]
        if caps is not None:
            total = sum(map(self.table.weight, groups))
            for number, group in enumerate(groups):
                even = budget * self.table.weight(group) / total
                low, high = (cap * even for cap in caps)
                within = [x for x in options[number] if low <= x.cost <= high]
                options[number] = within or [min(options[number], key=lambda x: abs(x.cost - even))]
        chosen = best_choice(options, budget)
        if chosen is None:
            return None
        return {
            group: self.table.patterns(group, of_group[number].choice)
            for group, of_group, number in zip(groups, options, chosen, strict=True)
        }

    def capped(self, budget: float) -> Made | None:
        """Return what ``across`` does, with caps on each layer's seconds and on each head's share
        of the loss. This removes options; use a copy."""
        for _ in range(ROUNDS):
            made = self.across(budget, caps=LAYER_CAPS)
            if made is None or not self._removed_worst(made):
                return made
        return made

    def _removed_worst(self, made: Assignment) -> bool:
        """Remove the chosen option of the head with the largest loss, if that is above the cap;
        return whether it was."""
        choices = []
        for group, heads in made.items():
            for head, pattern in enumerate(heads):
                for option in self.heads[group][head]:
                    if self.table.patterns(group, (-1,) * head + option.choice)[head] == pattern:
                        choices.append((option.loss, group, head, option))
                        break
        total = sum(choice[0] for choice in choices)
        loss, group, head, worst = max(choices, key=lambda choice: choice[0])
        if total == 0 or loss <= max(HEAD_CAP, 4 / len(choices)) * total:
            return False
        self.heads[group][head] = [x for x in self.heads[group][head] if x != worst]
        self.fronts = {**self.fronts, group: frontier(self.heads[group], POINTS)}
        return True


def _interpolated(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the error at a loss from some ``(loss, error)``, linear in logarithms between them and
    proportional to the loss outside; the loss itself if there are no points."""
    known = sorted((x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(y))
    if loss <= 0:
        return 0.0
    if not known:
        return loss
    index = bisect.bisect([x for x, _ in known], loss)
    if index == 0:
        return known[0][1] * loss / known[0][0]
    if index == len(known):
        return known[-1][1] * loss / known[-1][0]
    (x0, y0), (x1, y1) = known[index - 1], known[index]
    share = math.log(loss / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def solutions(
    table: PriceTable,
    speed: float,
    fronts: Mapping[str, LayerFronts],
    errors: Mapping[Group, Sequence[tuple[float, float]]],
) -> dict[str, Made]:
    """Return assignments that reach a predicted speed, by the name of the method.

    Args:
        table: losses and seconds of the candidates.
        speed: least speedup of a whole generation.
        fronts: by name: ``"all"``, ``"static"``, ``"stencils"``, ``"output"``, ``"mass"``.
        errors: errors of the model output, as ``LayerFronts.measured`` takes them; empty if they
            were not measured.
    """
    every = fronts["all"]
    methods: dict[str, Callable[[float], Made | None]] = {
        "projected error": every.across,
        "projected error, capped": lambda budget: every.copied().capped(budget),
        "projected error, even layers": every.even,
        "stencils, even layers": fronts["stencils"].even,
        "static, even layers": fronts["static"].even,
        "by output error, even layers": fronts["output"].even,
        "by mass, even layers": fronts["mass"].even,
    }
    if errors:
        measured = every.measured(errors)
        methods["error by layer"] = lambda budget: every.across(budget, measured)
        methods["error by layer, capped"] = lambda budget: every.across(
            budget, measured, LAYER_CAPS
        )
    assignments: dict[str, Made] = {}
    for name, method in methods.items():
        made = meeting(table, speed, method)
        if made is not None:
            assignments[name] = made
    return assignments


def meeting(
    table: PriceTable, speed: float, method: Callable[[float], Made | None]
) -> Made | None:
    """Return the assignment of a method at the largest budget that reaches a predicted speed.

    A bisection finds the budget: the method adds up the seconds of single heads, but the speed is
    predicted for whole layers, which cost slightly less or more.

    Args:
        table: losses and seconds of the candidates.
        speed: least speedup of a whole generation.
        method: function from a budget in seconds to an assignment.

    Returns:
        The assignment, or None if the speed is not reached.
    """
    attention = table.times.dense * sum(map(table.weight, table.groups))
    wanted = attention - (table.generation - table.generation / speed)
    heads = sum(
        table.weight(g) * table.times.head(Dense()) * table.heads[g[1:]] for g in table.groups
    )
    low, high, best = 0.0, 1.5, None
    if wanted <= 0:
        return None
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        made = method(share * wanted * heads / attention)
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
    """Return for each family one pattern for all heads that reaches a predicted speed.

    It is the member of least total loss, or the slowest member if no loss is known. Families
    without a member that reaches the speed are left out.

    Args:
        table: losses and seconds of the candidates.
        speed: least speedup of a whole generation.
        kinds: the members of each family.
    """

    def loss_and_speed(pattern: HeadPattern) -> tuple[float, float]:
        return total_loss(table, pattern), -table.times.head(pattern)

    chosen: dict[str, HeadPattern] = {}
    for family, members in kinds.items():
        fast_enough = [
            pattern
            for pattern in members
            if table.known(table.uniform(pattern))
            and table.speedup(table.uniform(pattern)) >= speed
        ]
        if fast_enough:
            chosen[family] = min(fast_enough, key=loss_and_speed)
    return chosen


def total_loss(table: PriceTable, pattern: HeadPattern) -> float:
    """Return the loss of a pattern on all heads; infinity if it is not in the pool or could not
    run."""
    candidates = [candidate for _, candidate in table.candidates(table.groups[0], 0)]
    if pattern not in candidates:
        return math.inf
    number = candidates.index(pattern)
    total = sum(
        table.share(group) * float(table.losses[group][:, number, 0].sum())
        for group in table.groups
    )
    return total if math.isfinite(total) else math.inf
