"""Block means and levels, computed by the Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from visattn.selectors.stages.blocks import BlockPartition
from visattn.selectors.stages.choose import ChoiceRule, Levels, Threshold, TokenBudget, TopK, TopP
from visattn.selectors.stages.prefix import PARTS

if TYPE_CHECKING:
    from visattn.kernels.select import Rule

__all__ = ["kernel_levels", "rule_of", "summary", "unit_stride"]


def rule_of(select: ChoiceRule) -> Rule | None:
    """Return the rule of the select kernel for a ChoiceRule; None if the kernel has none."""
    from visattn.kernels.select import COUNT, MASS, MOST_ENDS, TOKENS, Rule

    def shares(*values: float) -> tuple[int, ...]:
        return tuple(int(value * PARTS + 1e-6) for value in values)

    def bound(keep: int | float | None) -> tuple[int, bool] | None:
        if keep is None:
            return None
        return (keep, True) if isinstance(keep, int) else (shares(keep)[0], False)

    if isinstance(select, TopK):
        numbers = isinstance(select.keep, int)
        return Rule(
            COUNT.value,
            (int(select.keep),) if numbers else shares(select.keep),
            numbers=numbers,
            first=select.inside,
            some=not numbers,
            head=select.scope == "head",
        )
    if isinstance(select, TopP):
        if not select.crossing:
            return None
        return Rule(
            MASS.value,
            shares(select.mass),
            least=bound(select.least),
            most=bound(select.most),
            first=select.counted,
            head=select.scope == "head",
        )
    if isinstance(select, Threshold):
        return Rule(MASS.value, (select.units,), least=(1, True), above=True)
    if isinstance(select, TokenBudget):
        return Rule(TOKENS.value, shares(select.share), first=True)
    if isinstance(select, Levels) and len(select.ends) <= MOST_ENDS:
        by = MASS.value if select.by == "mass" else COUNT.value
        return Rule(by, shares(*select.ends), select.pools, least=bound(select.least))
    return None


def kernel_levels(
    select: ChoiceRule, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
) -> torch.Tensor | None:
    """Return ``select(scores, length, forced)``, computed by the kernel.

    Returns None if the kernel lacks the rule, or if rows have too many blocks for it.
    """
    from visattn.kernels.select import MOST_BLOCKS
    from visattn.kernels.select import select as run

    rule = rule_of(select)
    if rule is None or scores.shape[3] > MOST_BLOCKS:
        return None
    return run(scores.contiguous(), length.int(), forced, rule)


def summary(x: torch.Tensor, side: BlockPartition, heads: int) -> torch.Tensor:
    """Return the means of blocks, float32 ``[B, heads, N, D]``."""
    from visattn.kernels.summary import summarise

    x = unit_stride(x)
    mean = x.new_empty(x.shape[0], heads, len(side), x.shape[3], dtype=torch.float32)
    summarise(x, side.tokens32, side.length32, part=side.size, width=1, mean=mean)
    return mean


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor, copied if its last dimension is not contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()
