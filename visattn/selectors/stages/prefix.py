"""The select stage: which blocks of a row are kept, from their scores alone.

Everything here is a *prefix* of one order, score descending and index ascending among equals: the
smallest prefix whose weights add up to a target. Counting blocks has weight 1, a budget of tokens
their lengths, a share of the mass their probabilities. The prefix is found by bisection on the
score, in integers, so that every backend finds the same one; there is no sort, and nothing waits
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
PARTS = 1 << 16  # shares are counted in so many parts
LOG2_E = 94548  # log2(e), with 16 binary places
# 2^x on [0, 1): coefficients of x^4 to x^0 with 30 binary places, 1 at 0
POWERS = (14546923, 55861315, 259205647, 744127939, 1073741824)
LEAST = 30.0  # a mass below e^-30 of the best is 0
LOWEST = -(2**31)  # the key of what cannot be chosen, below that of every number


def order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers int32 in the order of float32 scores; zeros of either sign are equal, and minus
    infinity is the lowest integer."""
    bits = (scores.float() + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys.masked_fill(scores == -torch.inf, LOWEST)


def mass_weights(scores: torch.Tensor) -> torch.Tensor:
    """Probabilities of a softmax over the last axis as integers int64, ``2^24`` for the best one.

    The exponential is computed in integers too, within 3e-5 of its value, as floating-point ones
    differ between devices.
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
    """The smallest prefix, by key descending and index ascending, whose weights reach a target.

    Args:
        keys: int32 ``[..., N]``; the lowest one is never in a prefix.
        weights: int64 ``[..., N]``, not negative; None is 1 for each.
        target: int64 ``[..., 1]`` or of a shape that broadcasts to it. At 0 or less the prefix is
            empty, and where all weights do not reach it, it is all of them.

    Returns:
        bool ``[..., N]``.
    """
    free = keys > LOWEST
    own = None if weights is None else weights * free

    def total(mask: torch.Tensor) -> torch.Tensor:
        return (mask if own is None else own * mask).sum(-1, keepdim=True)

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
    if own is None:
        before = equal.cumsum(-1, dtype=torch.int32) - equal.int()
    else:
        before = (own * equal).cumsum(-1) - own * equal
    return (above | (equal & (before < missing))) & (target > 0)


def top_count(scores: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The ``count`` best of each row, bool; int or int64 that broadcasts to ``[..., 1]``."""
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
    """The smallest prefix that holds ``share`` of the mass, the crossing one with it, bool.

    Args:
        scores: logarithms of masses, up to a constant of each row; share: from 0 to 1.
        weights: of ``mass_weights``; default: made from the scores.
        crossing: False gives the largest prefix that holds no more than the share.
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
    """A share of an integer, rounded up; the share is rounded down to 1/65536 first, so that .3 of
    10 is 3."""
    return -(-total * int(share * PARTS + 1e-6) // PARTS)


def count_of(keep: int | float, total: torch.Tensor | int) -> torch.Tensor | int:
    """A number of blocks: an int is one, a float a share of ``total``, rounded up, at least 1."""
    if isinstance(keep, int):
        return keep
    if isinstance(total, int):
        return max(1, of_total(keep, total))
    return of_total(keep, total).clamp(min=1)


def levels_by(masks: list[torch.Tensor], values: tuple[int, ...]) -> torch.Tensor:
    """Levels uint8 from nested masks: ``values[i]`` where mask ``i`` is the first to hold, else
    0."""
    out = torch.zeros_like(masks[0], dtype=torch.uint8)
    for mask, value in zip(reversed(masks), reversed(values), strict=True):
        out = out.masked_fill(mask, value)
    return out
