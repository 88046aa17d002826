"""Biases of the logits by labels of queries and keys, written as extra dimensions of queries and
keys: a query gets its row of the table, a key its one-hot label. Every attention kernel, dense or
sparse, then computes the biases, and no attention map is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

__all__ = ["FORBIDDEN", "Bias", "biased", "keyless_rows"]

FORBIDDEN = 2e4  # subtracted from the logit of a forbidden pair, so that its weight is exactly 0
ALIGNED = 8  # head sizes are padded to a multiple of this


@dataclass(frozen=True)
class Bias:
    """A bias of the logits: ``S[i, j] += table[q_labels[i], k_labels[j]]``.

    Args:
        table: float32 ``[labels of queries, labels of keys]``. Minus infinity forbids the pair.
        q_labels: labels of the queries, int64 ``[b or 1, Lq]``.
        k_labels: labels of the keys, int64 ``[b or 1, Lk]``.
        heads: whether a head has the bias, bool ``[H]``.
    """

    table: torch.Tensor
    q_labels: torch.Tensor
    k_labels: torch.Tensor
    heads: torch.Tensor

    def rows(self, rows: slice | torch.Tensor) -> Bias:
        """Return the bias of some query rows."""
        return replace(self, q_labels=self.q_labels[:, rows])


def biased(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    biases: list[Bias],
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of a larger head size whose logits include the biases.

    Args:
        q: queries ``[b, H, Lq, D]``.
        k: keys ``[b, H, Lk, D]``.
        v: values ``[b, H, Lk, D]``.
        biases: the biases.
        factor: scale of the logits.

    Returns:
        Queries, keys and values ``[b, H, L, D']``. The products of queries and keys times
        ``factor`` are the biased logits. The extra dimensions of the values are 0.
    """
    more_q, more_k = [], []
    for bias in biases:
        for table, unit in _tables(bias.table.to(q.device), factor, q.dtype):
            onehot = torch.nn.functional.one_hot(bias.k_labels.to(q.device), table.shape[1])
            table_rows = table.to(q.dtype)[bias.q_labels.to(q.device)]  # [b or 1, Lq, labels]
            heads = bias.heads.to(q.device)[None, :, None, None]
            more_q.append((table_rows[:, None] * heads).expand(*q.shape[:3], -1))
            more_k.append((unit * onehot.to(k.dtype))[:, None].expand(*k.shape[:3], -1))
    added = sum(columns.shape[3] for columns in more_q)
    padding = -(q.shape[3] + added) % ALIGNED
    pad = torch.nn.functional.pad
    q = pad(torch.cat([q, *more_q], 3), (0, padding))
    k = pad(torch.cat([k, *more_k], 3), (0, padding))
    return q, k, pad(v, (0, added + padding))


def _tables(
    table: torch.Tensor, factor: float, dtype: torch.dtype
) -> list[tuple[torch.Tensor, float]]:
    """Split a table of biases into tables that a dtype represents exactly, each with a unit. The
    sum of table times unit, times ``factor``, is the given table."""
    out = []
    allowed = table > -torch.inf
    if not bool(allowed.all()):
        unit = (FORBIDDEN / factor) ** 0.5
        out.append((torch.where(allowed, 0.0, -unit), unit))
    remainder = torch.where(allowed, table, 0.0) / factor
    # half precision needs a second table for the rounding error of the first
    for _ in range(2 if dtype.itemsize < 4 else 1):
        largest = float(remainder.abs().max())
        if largest:
            unit = 2.0 ** max(0, math.ceil(math.log2(2 * largest / torch.finfo(dtype).max)))
            rounded = (remainder / unit).to(dtype).to(remainder.dtype)
            out.append((rounded, unit))
            remainder = remainder - rounded * unit
    return out or [(torch.zeros_like(table), 1.0)]


def keyless_rows(biases: list[Bias], q: torch.Tensor) -> torch.Tensor:
    """Return whether the biases forbid a query all keys, bool ``[b, H, Lq]``.

    Keys have few labels, so the function tries each combination of labels that occurs.

    Args:
        biases: the biases of a call.
        q: queries of the call, ``[b, H, Lq, D]``.
    """
    batch, heads, length, _ = q.shape
    labels = torch.stack(
        [bias.k_labels.to(q.device).expand(batch, -1) for bias in biases], 2
    )  # [b, Lk, biases]
    seen = torch.zeros(batch, heads, length, dtype=torch.bool, device=q.device)
    for sample in range(batch):
        for combination in labels[sample].unique(dim=0):
            allowed = torch.ones(heads, length, dtype=torch.bool, device=q.device)
            for bias, label in zip(biases, combination, strict=True):
                column = (bias.table.to(q.device) > -torch.inf)[:, label]
                by_query = column[bias.q_labels.to(q.device).expand(batch, -1)[sample]]
                allowed &= by_query[None] | ~bias.heads.to(q.device)[:, None]
            seen[sample] |= allowed
    return ~seen
