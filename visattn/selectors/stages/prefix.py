"""The select stage: which blocks of a row are kept, given their scores.

Each rule keeps a *prefix* of one order: score descending, index ascending among equal scores. It is
the smallest prefix whose weights add up to a target. The weights are 1 to count blocks, lengths for
a budget of tokens, and probabilities for a share of the mass. Bisection on the score finds the
prefix in integer arithmetic, so that all backends find the same one. There is no sort and no wait
for a device.

Scores are float32 ``[..., N]``. Minus infinity marks what cannot be chosen.
"""

from __future__ import annotations

from typing import TypeVar

import torch

__all__ = [
    "ONE",
    "count_of",
    "levels_by",
    "mass_weights",
    "of_total",
    "order_keys",
    "smallest_prefix",
    "top_count",
    "top_mass",
]

ONE = 1 << 24  # a probability of 1, relative to that of the best; sums of a head stay in 64 bits
PARTS = 1 << 16  # shares are integers in units of 1 / PARTS
LOG2_E = 94548  # log2(e), with 16 binary places
# 2^x on [0, 1): coefficients of x^4 to x^0 with 30 binary places, 1 at 0
POWERS = (14546923, 55861315, 259205647, 744127939, 1073741824)
LEAST = 30.0  # masses below e^-30 times the largest are 0
LOWEST = -(2**31)  # the key of what cannot be chosen, below that of every number


def order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return int32 keys in the order of float32 scores.

    0.0 and -0.0 have the same key; minus infinity has the lowest one.
    """
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys.masked_fill(scores == -torch.inf, LOWEST)


def mass_weights(scores: torch.Tensor) -> torch.Tensor:
    """Return softmax probabilities over the last axis as int64, scaled so that the largest is 2^24.

    The exponential is computed in integers too, within 3e-5 of its value, because floating-point
    exponentials differ between devices.
    """
    scores = scores.float()
    best = scores.amax(-1, keepdim=True)
    gone = scores == -torch.inf
    apart = (scores - best).masked_fill(gone, 0).clamp(min=-LEAST)
    twos = (apart * PARTS).floor().long() * LOG2_E >> 16  # the power of two, with 16 binary places
    part = twos & 0xFFFF
    value = torch.full_like(part, POWERS[0])
    for coefficient in POWERS[1:]:
        value = coefficient + (value * part >> 16)
    return (value >> (6 - (twos >> 16))).masked_fill(gone, 0)


def smallest_prefix(
    keys: torch.Tensor, weights: torch.Tensor | None, target: torch.Tensor
) -> torch.Tensor:
    """Return the smallest prefix, by key descending and index ascending, that reaches a target.

    Args:
        keys: int32 ``[..., N]``; entries with the lowest int32 are never in a prefix.
        weights: int64 ``[..., N]``, not negative; None counts each as 1.
        target: int64, broadcasts to ``[..., 1]``. At 0 or less the prefix is empty; if all weights
            together do not reach it, the prefix is everything.

    Returns:
        bool ``[..., N]``.
    """
    free = keys > LOWEST
    free_weights = None if weights is None else weights * free

    def total(mask: torch.Tensor) -> torch.Tensor:
        return (mask if free_weights is None else free_weights * mask).sum(-1, keepdim=True)

    target = torch.minimum(target, total(free)).expand(*keys.shape[:-1], 1)
    # the highest threshold at which the blocks at or above it reach the target
    low = torch.full_like(target, LOWEST)
    high = torch.full_like(target, 2**31 - 1)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        reached = total((keys >= middle) & free) >= target
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle - 1)
    above, equal = keys > low, (keys == low) & free
    missing = target - total(above)
    if free_weights is None:
        before = equal.cumsum(-1, dtype=torch.int32) - equal.int()
    else:
        before = (free_weights * equal).cumsum(-1) - free_weights * equal
    return (above | (equal & (before < missing))) & (target > 0)


def top_count(scores: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Return the ``count`` best of each row, bool; a tensor count broadcasts to ``[..., 1]``."""
    if not isinstance(count, torch.Tensor):
        count = torch.full((1,), count, dtype=torch.int64, device=scores.device)
    return smallest_prefix(order_keys(scores), None, count.long())


def top_mass(
    scores: torch.Tensor,
    share: float,
    weights: torch.Tensor | None = None,
    *,
    crossing: bool = True,
) -> torch.Tensor:
    """Return the smallest prefix that holds at least ``share`` of the mass, bool ``[..., N]``.

    Args:
        scores: logarithms of masses, up to a constant of each row.
        share: from 0 to 1.
        weights: from ``mass_weights``; by default computed from the scores.
        crossing: False returns the largest prefix that holds no more than the share.
    """
    weights = mass_weights(scores) if weights is None else weights
    keys, total = order_keys(scores), weights.sum(-1, keepdim=True)
    if crossing:
        return smallest_prefix(keys, weights, of_total(share, total))
    most = total * int(share * PARTS + 1e-6) // PARTS
    over = smallest_prefix(keys, weights, most + 1)  # the last one of it is above the share
    inside = (weights * over).sum(-1, keepdim=True) <= most
    lowest = keys.masked_fill(~over, 2**31 - 1).amin(-1, keepdim=True)
    equal = over & (keys == lowest)
    last = equal & (equal.cumsum(-1) == equal.sum(-1, keepdim=True))
    return over & (inside | ~last)


Total = TypeVar("Total", int, torch.Tensor)


def of_total(share: float, total: Total) -> Total:
    """Return a share of an integer, rounded up.

    The share is first rounded down to a multiple of 1/65536, so that 0.3 of 10 is 3.
    """
    return -(-total * int(share * PARTS + 1e-6) // PARTS)


def count_of(keep: int | float, total: torch.Tensor | int) -> torch.Tensor | int:
    """Return a number of blocks: an int as it is, a float as a share of ``total``.

    The share is rounded up, to at least 1.
    """
    if isinstance(keep, int):
        return keep
    if isinstance(total, int):
        return max(1, of_total(keep, total))
    return of_total(keep, total).clamp(min=1)


def levels_by(masks: list[torch.Tensor], values: tuple[int, ...]) -> torch.Tensor:
    """Return levels uint8 from nested masks.

    The level is ``values[i]`` if mask ``i`` is the first that is True, and 0 if none is.
    """
    out = torch.zeros_like(masks[0], dtype=torch.uint8)
    for mask, value in zip(reversed(masks), reversed(values), strict=True):
        out = out.masked_fill(mask, value)
    return out
