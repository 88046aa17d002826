"""Rules that turn the scores of a call into a level for each block pair.

The level says how finely a query block sees a key block. 0: not at all. 1: token by token.
n > 1: by means of n tokens each. BLOCK: by one mean of the whole block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from visattn.selectors.stages.prefix import (
    ONE,
    count_of,
    levels_by,
    mass_weights,
    of_total,
    order_keys,
    smallest_prefix,
    top_count,
    top_mass,
)

__all__ = ["BLOCK", "ChoiceRule", "Levels", "Scope", "Threshold", "TokenBudget", "TopK", "TopP"]

BLOCK = 255
Scope = Literal["row", "head"]


class ChoiceRule(ABC):
    """Base class of the rules that turn scores into levels.

    Attributes:
        levels: the values above 0 that the rule returns.
        row_independent: whether the choice of each row depends only on the scores of that row.
    """

    @property
    def levels(self) -> tuple[int, ...]:
        return (1,)

    @property
    def row_independent(self) -> bool:
        return getattr(self, "scope", "row") in ("row", "query")

    @abstractmethod
    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        """Return levels, uint8 ``[B, H, Nq, Nk]``.

        Args:
            scores: float32 ``[B, H, Nq, Nk]``, minus infinity for pairs that cannot be chosen.
            length: tokens of the key blocks, int64 ``[G, G', Nk]``.
            forced: pairs that are kept in any case, at level 1; bool, broadcasts to the scores.
        """


def as_scope(x: torch.Tensor, scope: Scope) -> torch.Tensor:
    """Return the rows as they are, or with scope ``"head"`` all rows of a head joined to one."""
    return x if scope == "row" else x.flatten(2)[:, :, None]


def of_scope(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the result of ``as_scope`` in the shape of ``like`` again."""
    return x.reshape(like.shape)


def candidates(scores: torch.Tensor) -> torch.Tensor:
    """Return how many candidates each row has, int64 ``[..., 1]``."""
    return (scores > -torch.inf).sum(-1, keepdim=True)


@dataclass(frozen=True)
class TopK(ChoiceRule):
    """The best blocks of each row, or of each head.

    Args:
        keep: an int is a number of blocks of a row, a float the share of them, rounded up.
        scope: ``"row"``, or ``"head"``: all rows of a head compete for the sum of their numbers.
        inside: whether forced blocks count towards ``keep``; else they are kept in addition.
    """

    keep: int | float = 0.25
    scope: Scope = "row"
    inside: bool = True

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        if self.inside:
            scores = scores.masked_fill(forced & (scores > -torch.inf), torch.inf)
        rows = as_scope(scores, self.scope)
        if isinstance(self.keep, int) and self.scope == "head":
            choosing = (scores > -torch.inf).any(-1).sum(-1)
            count: torch.Tensor | int = self.keep * choosing[..., None, None]
        else:
            count = count_of(self.keep, candidates(rows))
        kept = of_scope(top_count(rows, count), scores)
        return (kept | forced).to(torch.uint8)


@dataclass(frozen=True)
class TopP(ChoiceRule):
    """The smallest set of blocks that holds a share of the mass.

    Args:
        mass: the share of the mass, computed from the scores.
        least: least number of blocks of a row, as ``keep`` of TopK; None is no bound.
        most: largest number of blocks of a row, in the same form.
        scope: as in TopK. With ``"head"`` every row has the same total mass.
        counted: whether forced blocks come first and their mass counts; else they are kept in
            addition.
        crossing: whether to keep the block with which the share is reached.
    """

    mass: float = 0.9
    least: int | float | None = 1
    most: int | float | None = None
    scope: Scope = "row"
    counted: bool = False
    crossing: bool = True

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        total = candidates(scores)
        weights = mass_weights(scores)
        if self.scope == "head":
            total_weight = weights.sum(-1, keepdim=True).clamp(min=1)
            weights = weights * ONE // total_weight
            scores = weights.float().masked_fill(scores == -torch.inf, -torch.inf)
        if self.counted:
            scores = scores.masked_fill(forced & (scores > -torch.inf), torch.inf)
        rows = as_scope(scores, self.scope)
        kept = top_mass(
            rows, self.mass, as_scope(weights, self.scope), crossing=self.crossing
        )
        kept = of_scope(kept, scores)
        if self.least is not None:
            kept = kept | top_count(scores, count_of(self.least, total))
        if self.most is not None:
            kept = kept & top_count(scores, count_of(self.most, total))
        return (kept | forced).to(torch.uint8)


@dataclass(frozen=True)
class Threshold(ChoiceRule):
    """Every block whose probability in its row is above a threshold, and the best block.

    Args:
        value: the threshold, from 0 to 1.
    """

    value: float = 5e-4

    @property
    def units(self) -> int:
        """The threshold in units of 1 / 2^24."""
        return int(self.value * ONE)

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        weights = mass_weights(scores)
        kept = weights * ONE > self.units * weights.sum(-1, keepdim=True)
        return (kept | top_count(scores, 1) | forced).to(torch.uint8)


@dataclass(frozen=True)
class TokenBudget(ChoiceRule):
    """The best blocks of each row until they hold a share of the tokens.

    This rule is for blocks of unequal length. The block that reaches the share is kept.

    Args:
        share: share of the tokens of all candidates.
    """

    share: float = 0.25

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        free = scores > -torch.inf
        weights = length[..., None, :] * free
        scores = scores.masked_fill(forced & free, torch.inf)
        target = of_total(self.share, weights.sum(-1, keepdim=True))
        kept = smallest_prefix(order_keys(scores), weights, target)
        return (kept | forced).to(torch.uint8)


@dataclass(frozen=True)
class Levels(ChoiceRule):
    """Several levels per row: the best blocks token by token, the next by means of two, and so on.

    Blocks beyond the last end are dropped. Source: Li et al. 2025, pyramid sparse attention, arXiv
    2512.04025, multi-level retention.

    Args:
        ends: cumulative share of the mass, or of the blocks, at which each level ends; must not
            decrease.
        pools: the levels, increasing; BLOCK is one mean of the whole block.
        by: whether ``ends`` are shares of the ``"mass"`` or of the ``"count"`` of blocks.
        least: least number of blocks of a row at the first level, or the share of them; None is no
            bound.
    """

    ends: tuple[float, ...] = (0.4, 0.5, 0.6, 0.8)
    pools: tuple[int, ...] = (1, 2, 4, 8)
    by: Literal["mass", "count"] = "mass"
    least: int | float | None = 1

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, *self.pools)))

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        total = candidates(scores)
        if self.by == "mass":
            weights = mass_weights(scores)
            masks = [top_mass(scores, end, weights) for end in self.ends]
        else:
            masks = [top_count(scores, of_total(end, total)) for end in self.ends]
        if self.least is not None:
            masks[0] = masks[0] | top_count(scores, count_of(self.least, total))
        return levels_by(masks, self.pools).masked_fill(forced, 1)
