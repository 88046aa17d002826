"""Dynamic candidates: selectors at the budgets that their classes name."""

from __future__ import annotations

from visattn.patterns import HeadPattern
from visattn.selectors import SELECTORS

__all__ = ["ORACLE", "dynamic_families"]

ORACLE = "exact mass (oracle)"


def dynamic_families(block: int) -> dict[str, list[HeadPattern]]:
    """Return the dynamic candidates by label, several budgets for each label.

    Args:
        block: tokens of a block.
    """
    families: dict[str, list[HeadPattern]] = {}
    for kind in SELECTORS.values():
        for label, members in kind.search_budgets(block).items():
            families.setdefault(label, []).extend(members)
    return families
