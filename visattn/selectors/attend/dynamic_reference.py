"""Reference implementation of attention over a selection: one softmax per row, over all its tokens
and means."""

from __future__ import annotations

import math

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.geometry.padding import set_aside
from visattn.selectors.attend.rest import sample_tokens
from visattn.selectors.stages.blocks import BlockPartition
from visattn.selectors.stages.choose import BLOCK
from visattn.selectors.stages.selection import PooledRest, SampledRest, Selection

__all__ = ["reference_attend"]


def reference_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over a selection, one batch item, head and query block at a time.

    Takes and returns the same as ``attend``; holds all logits of a query block in memory.
    """
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=acc_dtype, device=q.device)
    valid = None if text_lengths is None else valid_keys(text_lengths, layout)
    q, wrong = set_aside(q)
    q_side, k_side, rest = selection.q_side, selection.k_side, selection.rest
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h // share].to(acc_dtype), v[b, h // share].to(acc_dtype)
            valid_tokens = None if valid is None else valid[b]
            k_blocks = _blocks(k_side, b, h)
            q_blocks = _blocks(q_side, b, h)
            for i, q_tokens in enumerate(q_blocks):
                if len(q_tokens) == 0:
                    continue
                query = q[b, h, q_tokens].to(acc_dtype)
                seen = selection.levels[b, h, i].tolist()
                logits, sums = [], []
                pooled = []  # the logits of whole blocks
                for number, (block, level) in enumerate(zip(k_blocks, seen, strict=True)):
                    if level == 0 or len(block) == 0:
                        continue
                    tokens = block if valid_tokens is None else block[valid_tokens[block]]
                    size = min(level, k_side.size)
                    if level == BLOCK and selection.weights is not None:
                        weight = selection.weights[b, h, number, : len(block)].to(acc_dtype)
                        entropy = -(weight * weight.clamp(min=1e-300).log()).sum()
                        logits.append(query @ (weight @ keys[block]) * scale + entropy)
                        sums.append((weight @ values[block]).expand_as(query))
                        continue
                    for begin in range(0, len(tokens), size):
                        part = tokens[begin : begin + size]
                        mean = keys[part].mean(0)
                        logit = query @ mean * scale + torch.log(query.new_tensor(len(part)))
                        if selection.variance and size > 1:
                            spread = keys[part].square().mean(0) - mean.square()
                            logit = logit + (query * scale).square() @ spread / 2
                        logits.append(logit)
                        sums.append(values[part].mean(0).expand_as(query))
                        if level == BLOCK:
                            pooled.append(len(logits) - 1)
                if isinstance(rest, SampledRest):
                    _sample(logits, sums, query, keys, values, rest, layout, k_blocks, seen, scale)
                if not logits:
                    continue
                stacked = torch.stack(logits, 1)
                lse[b, h, q_tokens] = stacked.logsumexp(1)
                weights = stacked.softmax(1)
                result = torch.einsum("mn,nmd->md", weights, torch.stack(sums))
                if isinstance(rest, PooledRest) and rest.first_order:
                    slope, count = _slope(k_side, k_blocks, keys, values)
                    mass = weights[:, pooled].sum(1, keepdim=True)
                    result = result + mass * (query @ slope) * (scale / count)
                if selection.correction is not None:
                    factor, extra = (x[b, h, i] for x in selection.correction)
                    result = result * factor + extra
                out[b, h, q_tokens] = result.to(q.dtype)
    return out + wrong[..., None], lse + wrong


def _blocks(side: BlockPartition, b: int, h: int) -> list[torch.Tensor]:
    """Return the tokens of each block for batch item ``b`` and head ``h``."""
    b, h = min(b, side.tokens.shape[0] - 1), min(h, side.tokens.shape[1] - 1)
    lengths = side.length[b, h].tolist()
    return [side.tokens[b, h, n, :length] for n, length in enumerate(lengths)]


def _slope(
    side: BlockPartition, blocks: list[torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return the sum over grid keys of (key - mean of its block) x value, and their number."""
    slope = keys.new_zeros(keys.shape[1], values.shape[1])
    count = 0
    for block, is_grid in zip(blocks, side.grid.tolist(), strict=True):
        if is_grid and len(block):
            slope += (keys[block] - keys[block].mean(0)).T @ values[block]
            count += len(block)
    return slope, count


def _sample(
    logits: list[torch.Tensor],
    sums: list[torch.Tensor],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rest: SampledRest,
    layout: TokenLayout,
    blocks: list[torch.Tensor],
    seen: list[int],
    scale: float,
) -> None:
    """Append the sampled keys of unselected blocks to ``logits`` and ``sums``."""
    unseen: list[int] = []
    for block, level in zip(blocks, seen, strict=True):
        unseen += block.tolist() if level == 0 else []
    drawn = [token for token in sample_tokens(rest, layout).tolist() if token in set(unseen)]
    weight = math.log(len(unseen) / len(drawn)) if drawn else 0.0
    for token in drawn:
        logits.append(query @ keys[token] * scale + weight)
        sums.append(values[token].expand_as(query))
