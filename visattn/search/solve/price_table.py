"""The table of losses and seconds of all candidates, from which plans are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern
from visattn.plan import Denoiser, Plan, Rule
from visattn.search.measure.latency import LayerLatency
from visattn.search.measure.output_losses import LOSSES, CandidatePool, Layer
from visattn.search.measure.recorded_attention import SamplePlace
from visattn.search.solve.knapsack import Option, pareto
from visattn.tasks.result_store import StoredResult

__all__ = ["Assignment", "Group", "PriceTable", "losses_of"]

Group = tuple[int, str, int]  # phase, role, number of the layer
Assignment = Mapping[Group, tuple[HeadPattern, ...]]
Allowed = Callable[[str, HeadPattern], bool]


def losses_of(
    items: Sequence[StoredResult], phase_of: Callable[[int], int]
) -> dict[Group, list[tuple[int, SamplePlace, torch.Tensor]]]:
    """Return the losses ``[H, candidates, 3]`` of every scored call by group, with the number of
    its generation and its place.

    Args:
        items: stored results of ``CandidateScorer.item``, one for each generation.
        phase_of: function from a step to its phase.
    """
    by_group: dict[Group, list[tuple[int, SamplePlace, torch.Tensor]]] = {}
    for generation, item in enumerate(items):
        for index, values in enumerate(item.value["places"]):
            place = SamplePlace(*values)
            group = phase_of(place.step), place.role, place.number
            losses = item.tensors["errors"][index]
            by_group.setdefault(group, []).append((generation, place, losses))
    return by_group


@dataclass(frozen=True)
class PriceTable:
    """Losses and seconds of all candidates.

    Args:
        pool: the candidates.
        times: the seconds of patterns in a layer.
        calls: losses of every scored call, as ``losses_of`` returns them.
        heads: number of heads of each layer.
        paths: path of the module of each layer.
        runs: how often a layer's attention runs in a generation, by phase and role; each pass
            counts.
        generation: seconds of a dense generation.
        layout: layout of the tokens.
        denoisers: description of each denoiser by role, for plans.
        phases: where one phase ends and the next begins, as in a Plan.
        model: name of the model, for plans.
        also: tables at other shapes, with the same candidates. Losses are then means over all
            shapes, and the speedup of a plan is that of the shape where it is least.
    """

    pool: CandidatePool
    times: LayerLatency
    calls: Mapping[Group, Sequence[tuple[int, SamplePlace, torch.Tensor]]]
    heads: Mapping[Layer, int]
    paths: Mapping[Layer, str]
    runs: Mapping[tuple[int, str], int]
    generation: float
    layout: TokenLayout
    denoisers: Mapping[str, Denoiser]
    phases: tuple[float, ...] = ()
    model: str | None = None
    also: tuple[PriceTable, ...] = ()

    # ---- heads

    def weight(self, group: Group) -> int:
        """Return how often the attention of a group runs in a generation."""
        return self.runs[group[0], group[1]]

    def share(self, group: Group) -> float:
        """Return the share of a group's phase and role in the attention runs of a generation."""
        return self.weight(group) / sum(self.runs.values())

    @cached_property
    def groups(self) -> list[Group]:
        """All layers in all phases whose candidates were scored."""
        return sorted(self.losses)

    @cached_property
    def losses(self) -> dict[Group, torch.Tensor]:
        """Mean losses over calls, ``[H, candidates, 3]`` by group. A loss is NaN if at some shape
        it could not be computed for any call."""
        of_this_shape = {
            group: torch.stack([losses for _, _, losses in calls]).nanmean(0)
            for group, calls in self.calls.items()
        }
        return {
            group: torch.stack([losses, *(other.losses[group] for other in self.also)]).mean(0)
            for group, losses in of_this_shape.items()
            if all(group in other.losses for other in self.also)
        }

    def candidates(self, group: Group, head: int) -> list[tuple[str, HeadPattern]]:
        """Return the candidates of a head with their families, in the order of the losses."""
        return self.pool.options(group[1:], head)

    def options(
        self, group: Group, head: int, allowed: Allowed | None = None, loss: str = LOSSES[0]
    ) -> list[Option]:
        """Return the options of a head, without those that another option beats in both cost and
        loss.

        The cost of an option is its seconds in a generation. Its choice is the number of the
        candidate, or -1 for Dense.

        Args:
            group: the phase and the layer.
            head: the head.
            allowed: whether the head can take a pattern of a family; None: all patterns. Dense is
                always allowed.
            loss: one of LOSSES.
        """
        loss_index = LOSSES.index(loss)
        share = self.share(group)
        options = [Option(self.cost(group, Dense()), 0.0, (-1,))]
        values = self.losses[group][head, :, loss_index].tolist()
        for number, ((family, pattern), value) in enumerate(
            zip(self.candidates(group, head), values, strict=True)
        ):
            if not math.isfinite(value) or not self.timed(pattern):
                continue
            if allowed is None or allowed(family, pattern):
                options.append(Option(self.cost(group, pattern), share * value, (number,)))
        return pareto(options)

    def timed(self, pattern: HeadPattern) -> bool:
        """Return whether the seconds of a pattern are known at every shape."""
        name = repr(pattern)
        return all(name in table.times.seconds for table in (self, *self.also))

    def cost(self, group: Group, pattern: HeadPattern) -> float:
        """Return the seconds of a head in a generation.

        With several shapes it is the time of dense attention minus the least saving: the saving at
        each shape is a share of the generation there.
        """
        dense = self.weight(group) * self.times.head(Dense())
        if not self.also:
            return self.weight(group) * self.times.head(pattern)
        shares = [
            table.weight(group)
            * (table.times.head(Dense()) - table.times.head(pattern))
            / table.generation
            for table in (self, *self.also)
        ]
        return dense - self.generation * min(shares)

    def patterns(self, group: Group, choices: Sequence[int]) -> tuple[HeadPattern, ...]:
        """Return the patterns of a layer's heads from the numbers of their candidates."""
        return tuple(
            Dense() if number < 0 else self.candidates(group, head)[number][1]
            for head, number in enumerate(choices)
        )

    def loss(self, group: Group, patterns: Sequence[HeadPattern]) -> float:
        """Return the total projected loss of a layer's heads, in the unit of the options."""
        total = 0.0
        for head, pattern in enumerate(patterns):
            candidates = [candidate for _, candidate in self.candidates(group, head)]
            if pattern in candidates:
                total += float(self.losses[group][head, candidates.index(pattern), 0])
        return self.share(group) * total

    def uniform(self, pattern: HeadPattern) -> dict[Group, tuple[HeadPattern, ...]]:
        """Return the assignment of one pattern to all heads."""
        return {group: (pattern,) * self.heads[group[1:]] for group in self.groups}

    # ---- plans

    def saved(self, assignment: Assignment) -> float:
        """Return the seconds of a generation that an assignment saves, from those of its layers."""
        return sum(
            self.weight(group) * (self.times.dense - self.times.layer(heads))
            for group, heads in assignment.items()
            if any(pattern != Dense() for pattern in heads)
        )

    def speedup(self, assignment: Assignment) -> float:
        """Return the predicted speedup of a whole generation, at the shape where it is least."""
        speedup = self.generation / max(1e-9, self.generation - self.saved(assignment))
        return min([speedup, *(other.speedup(assignment) for other in self.also)])

    def known(self, assignment: Assignment) -> bool:
        """Return whether the seconds of all patterns of an assignment are known."""
        return all(self.timed(x) for x in {p for heads in assignment.values() for p in heads})

    def plan(self, assignment: Assignment) -> Plan:
        """Return the plan of an assignment. Layers whose heads are all dense have no rule."""
        rules = []
        roles = {role for role, _ in self.heads}
        for group in sorted(assignment):
            phase, role, number = group
            heads = assignment[group]
            if all(pattern == Dense() for pattern in heads):
                continue
            rules.append(
                Rule(
                    heads[0] if len(set(heads)) == 1 else heads,
                    layer=self.paths[role, number],
                    role=role if len(roles) > 1 else "any",
                    phase=phase if self.phases else None,
                )
            )
        return Plan(
            tuple(rules),
            phases=self.phases,
            geometry=self.layout,
            model=self.model,
            denoisers=dict(self.denoisers),
        )
