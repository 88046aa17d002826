"""Dynamic candidates: rules that choose their blocks at every call, at some budgets."""

from __future__ import annotations

from visattn.patterns import HeadPattern
from visattn.selectors import PISA, Sparge, TopBlocks, VMoBA, XAttention

__all__ = ["ORACLE", "dynamic_families"]

BUDGETS = (0.12, 0.25, 0.4)
MASSES = (0.6, 0.8)
ORACLE = "exact mass (oracle)"


def dynamic_families(block: int) -> dict[str, list[HeadPattern]]:
    """Rules by name, each at several budgets of blocks, or of mass.

    Args:
        block: tokens of a block.
    """
    return {
        "pooled top-k": [TopBlocks(keep, block=block) for keep in BUDGETS],
        "pooled top-k + means": [
            TopBlocks(keep, rest="pooled", block=block) for keep in BUDGETS
        ],
        "pooled top-k + first order": [
            TopBlocks(keep, rest="first_order", block=block) for keep in BUDGETS
        ],
        "pooled top-p": [TopBlocks(0.01, mass=mass, block=block) for mass in MASSES],
        "piecewise sparse": [PISA(keep, block) for keep in BUDGETS[:2]],
        "antidiagonal": [XAttention(mass, 4, block) for mass in MASSES],
        "self-similar": [Sparge(mass, 0.0, block, block) for mass in MASSES],
        "mixture of blocks": [
            VMoBA("3d", 1, (4, 4), (1, 4, 4), share, 0.01, "head", block) for share in BUDGETS[:2]
        ],
    }
