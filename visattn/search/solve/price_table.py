"""What a search knows of every head: losses and seconds of its candidates; plans are made of it."""

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
    """Losses ``[H, candidates, 3]`` of every call that was scored, by group, with the number of its
    generation."""
    out: dict[Group, list[tuple[int, SamplePlace, torch.Tensor]]] = {}
    for number, item in enumerate(items):
        for at, values in enumerate(item.value["places"]):
            place = SamplePlace(*values)
            group = phase_of(place.step), place.role, place.number
            out.setdefault(group, []).append((number, place, item.tensors["errors"][at]))
    return out


@dataclass(frozen=True)
class PriceTable:
    """Losses and seconds.

    Args:
        pool: the candidates; times: what they cost in a layer.
        calls: losses of every scored call, of ``losses_of``.
        heads: of every layer; paths: of their modules.
        runs: how often a layer's attention runs in a generation, by phase and role, passes counted
            apart.
        generation: seconds of a dense one.
        layout, denoisers, phases, model: for plans.
        also: the same at other shapes, with the same candidates; losses are then means over the
            shapes, and a plan is as fast as at the shape where it is slowest.
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

    # ---- what is known of heads

    def weight(self, group: Group) -> int:
        """How often the attention of a group runs in a generation."""
        return self.runs[group[0], group[1]]

    def share(self, group: Group) -> float:
        """The same, of a denoiser that has the group's steps throughout."""
        return self.weight(group) / sum(self.runs.values())

    @cached_property
    def groups(self) -> list[Group]:
        """Every layer in every phase that was scored."""
        return sorted(self.losses)

    @cached_property
    def losses(self) -> dict[Group, torch.Tensor]:
        """Mean losses over calls, ``[H, candidates, 3]``, NaN where one could never be computed, or
        not at every shape."""
        own = {
            group: torch.stack([losses for _, _, losses in calls]).nanmean(0)
            for group, calls in self.calls.items()
        }
        return {
            group: torch.stack([losses, *(other.losses[group] for other in self.also)]).mean(0)
            for group, losses in own.items()
            if all(group in other.losses for other in self.also)
        }

    def candidates(self, group: Group, head: int) -> list[tuple[str, HeadPattern]]:
        """Of a head, with their families, in the order of the losses."""
        return self.pool.options(group[1:], head)

    def options(
        self, group: Group, head: int, allowed: Allowed | None = None, loss: str = LOSSES[0]
    ) -> list[Option]:
        """What a head may take: seconds in a generation, its loss, and the number of the candidate,
        -1 for Dense; without those that another beats in both.

        Args:
            allowed: which families and patterns; None: all. Dense always is.
            loss: one of LOSSES.
        """
        at = LOSSES.index(loss)
        share = self.share(group)
        own = [Option(self.cost(group, Dense()), 0.0, (-1,))]
        values = self.losses[group][head, :, at].tolist()
        for number, ((family, pattern), value) in enumerate(
            zip(self.candidates(group, head), values, strict=True)
        ):
            if not math.isfinite(value) or not self.timed(pattern):
                continue
            if allowed is None or allowed(family, pattern):
                own.append(Option(self.cost(group, pattern), share * value, (number,)))
        return pareto(own)

    def timed(self, pattern: HeadPattern) -> bool:
        """Whether a pattern's seconds are known, at every shape."""
        name = repr(pattern)
        return all(name in table.times.seconds for table in (self, *self.also))

    def cost(self, group: Group, pattern: HeadPattern) -> float:
        """Seconds of a head in a generation: what dense attention takes, less the smallest saving
        at any shape, as a share of the generation there."""
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
        """The patterns of a layer's heads by the numbers of their candidates."""
        return tuple(
            Dense() if number < 0 else self.candidates(group, head)[number][1]
            for head, number in enumerate(choices)
        )

    def loss(self, group: Group, patterns: Sequence[HeadPattern]) -> float:
        """The projected loss of a layer's heads, as options have it."""
        total = 0.0
        for head, pattern in enumerate(patterns):
            own = [known for _, known in self.candidates(group, head)]
            if pattern in own:
                total += float(self.losses[group][head, own.index(pattern), 0])
        return self.share(group) * total

    def uniform(self, pattern: HeadPattern) -> dict[Group, tuple[HeadPattern, ...]]:
        """One pattern for all heads."""
        return {group: (pattern,) * self.heads[group[1:]] for group in self.groups}

    # ---- what is known of plans

    def saved(self, assignment: Assignment) -> float:
        """Seconds of a generation that an assignment saves, by what its layers cost."""
        return sum(
            self.weight(group) * (self.times.dense - self.times.layer(heads))
            for group, heads in assignment.items()
            if any(pattern != Dense() for pattern in heads)
        )

    def speedup(self, assignment: Assignment) -> float:
        """Of a whole generation, predicted, at the shape where it is least."""
        own = self.generation / max(1e-9, self.generation - self.saved(assignment))
        return min([own, *(other.speedup(assignment) for other in self.also)])

    def known(self, assignment: Assignment) -> bool:
        """Whether all of its patterns were timed."""
        return all(self.timed(own) for own in {p for heads in assignment.values() for p in heads})

    def plan(self, assignment: Assignment) -> Plan:
        """The plan of an assignment; layers that are all dense have no rule."""
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
