"""Biases of the logits by labels of queries and keys, as further dimensions of queries and keys: a
row of the table for each query against the label of each key. Every attention kernel computes them,
dense or sparse, and no map is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from visattn.guidance.edits.state import State

__all__ = ["FORBIDDEN", "Bias", "biased", "rescued", "rowless"]

FORBIDDEN = 2e4  # taken off the logit of a pair that is not allowed: its weight is exactly 0
ALIGNED = 8  # of head sizes


@dataclass(frozen=True)
class Bias:
    """``S[i, j] += table[q_labels[i], k_labels[j]]``.

    Args:
        table: float32 ``[labels of queries, labels of keys]``; minus infinity forbids the pair.
        q_labels: int64 ``[b or 1, Lq]``; k_labels: int64 ``[b or 1, Lk]``.
        heads: which heads have it, bool ``[H]``.
    """

    table: torch.Tensor
    q_labels: torch.Tensor
    k_labels: torch.Tensor
    heads: torch.Tensor

    def rows(self, rows: slice | torch.Tensor) -> Bias:
        """The bias of some queries."""
        return replace(self, q_labels=self.q_labels[:, rows])


def biased(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    biases: list[Bias],
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors of a larger head size, ``[b, H, L, D']``, whose logits at ``factor`` are those of
    ``q`` and ``k`` with the biases; the further dimensions of the values are 0."""
    more_q, more_k = [], []
    for bias in biases:
        for table, unit in _tables(bias.table.to(q.device), factor, q.dtype):
            onehot = torch.nn.functional.one_hot(bias.k_labels.to(q.device), table.shape[1])
            own = table.to(q.dtype)[bias.q_labels.to(q.device)]  # [b or 1, Lq, labels]
            heads = bias.heads.to(q.device)[None, :, None, None]
            more_q.append((own[:, None] * heads).expand(*q.shape[:3], -1))
            more_k.append((unit * onehot.to(k.dtype))[:, None].expand(*k.shape[:3], -1))
    wide = sum(part.shape[3] for part in more_q)
    pad = -(q.shape[3] + wide) % ALIGNED
    zeros = torch.nn.functional.pad
    q = zeros(torch.cat([q, *more_q], 3), (0, pad))
    k = zeros(torch.cat([k, *more_k], 3), (0, pad))
    return q, k, zeros(v, (0, wide + pad))


def _tables(
    table: torch.Tensor, factor: float, dtype: torch.dtype
) -> list[tuple[torch.Tensor, float]]:
    """Tables of a dtype that, times a unit and the factor, add up to a table."""
    out = []
    allowed = table > -torch.inf
    if not bool(allowed.all()):
        unit = (FORBIDDEN / factor) ** 0.5
        out.append((torch.where(allowed, 0.0, -unit), unit))
    left = torch.where(allowed, table, 0.0) / factor
    for _ in range(2 if dtype.itemsize < 4 else 1):  # what half precision cannot say, in two parts
        most = float(left.abs().max())
        if most:
            unit = 2.0 ** max(0, math.ceil(math.log2(2 * most / torch.finfo(dtype).max)))
            part = (left / unit).to(dtype).to(left.dtype)
            out.append((part, unit))
            left = left - part * unit
    return out or [(torch.zeros_like(table), 1.0)]


def rowless(biases: list[Bias], q: torch.Tensor) -> torch.Tensor:
    """Queries that may see no key at all, bool ``[b, H, Lq]``."""
    seen = _pairs_of(biases, q)
    return ~seen


def _pairs_of(biases: list[Bias], q: torch.Tensor) -> torch.Tensor:
    """Whether each query has a key that every bias allows, bool ``[b, H, Lq]``. Labels of keys are
    few: their combinations that occur are gone through."""
    batch, heads, length, _ = q.shape
    labels = torch.stack(
        [bias.k_labels.to(q.device).expand(batch, -1) for bias in biases], 2
    )  # [b, Lk, biases]
    out = torch.zeros(batch, heads, length, dtype=torch.bool, device=q.device)
    for sample in range(batch):
        for kinds in labels[sample].unique(dim=0):
            allowed = torch.ones(heads, length, dtype=torch.bool, device=q.device)
            for bias, kind in zip(biases, kinds, strict=True):
                column = (bias.table.to(q.device) > -torch.inf)[:, kind]
                own = column[bias.q_labels.to(q.device).expand(batch, -1)[sample]]
                allowed &= own[None] | ~bias.heads.to(q.device)[:, None]
            out[sample] |= allowed
    return out


def rescued(
    state: State, out: torch.Tensor, lse: torch.Tensor | None, alone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that see no key see their own token, and the text keys that they are allowed.

    Args:
        out: ``[b, H, Lq, D]``; lse: ``[b, H, Lq]``; alone: which rows, bool ``[b, H, Lq]``.
    """
    if not bool(alone.any()):
        return out, lse
    call = state.call
    b, h, i = alone.nonzero(as_tuple=True)
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    q = state.q[b, h, i].to(wide)
    keys = [] if call.kind == "cross" else [i]
    keys += [torch.full_like(i, j) for first, end in state.texts for j in range(first, end)]
    at = torch.stack(keys, 1)  # [n, keys]
    k, v = (x[b[:, None], h[:, None], at] for x in (state.k, state.v))
    logits = (q[:, None] * k.to(wide)).sum(2) * call.factor
    for bias in state.biases:
        table = bias.table.to(logits)
        q_label = bias.q_labels.to(b.device).expand(out.shape[0], -1)[b, i]
        k_label = bias.k_labels.to(b.device).expand(out.shape[0], -1)[b[:, None], at]
        own = table[q_label[:, None], k_label]
        own = torch.where(bias.heads.to(b.device)[h][:, None], own, 0.0)
        own[:, : 0 if call.kind == "cross" else 1] = 0
        logits = logits + own
    total = logits.logsumexp(1)
    weights = (logits - total[:, None]).nan_to_num(-torch.inf).exp()
    out = out.clone()
    out[b, h, i] = (weights[..., None] * v.to(wide)).sum(1).to(out.dtype)
    if lse is not None:
        lse = lse.clone()
        lse[b, h, i] = total.to(lse.dtype)
    return out, lse
