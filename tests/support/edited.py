"""Attention calls to try edits on, and what they must give: dense, float64, with the map written
out."""

from __future__ import annotations

import torch

from visattn.attention import sparse_attention
from visattn.attention.backends.reference import pattern_mask
from visattn.attention.dense_attention import dense_with_lse
from visattn.geometry.layout import Grid, Segment, TokenLayout
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import apply_edits
from visattn.inject.editor import AttentionCall

GRID = Grid(2, 4, 3)
HEADS, DIM = 3, 16
VIDEO = TokenLayout(GRID)
FIRST = TokenLayout(GRID, text_before=5)
LAST = TokenLayout(GRID, text_after=5)
WORDS = TokenLayout(segments=[Segment("text", 7)])
PATHS = ("blocks.0.attn1", "blocks.1.attn1")


def tensors(layout, keys=None, batch=2, dtype=torch.float64, seed=0, heads=HEADS, dim=DIM):
    """q, k, v."""
    random = torch.Generator().manual_seed(seed)
    sizes = (layout.length, *[(keys or layout).length] * 2)
    return [
        torch.randn(batch, heads, size, dim, generator=random, dtype=torch.float64).to(dtype)
        for size in sizes
    ]


def caught(q, k, v, layout, pattern=None, kv_layout=None, step=0, steps=4, backend="blockwise"):
    """A call that was caught; ``pattern``: what all heads run under a plan."""
    factor = q.shape[3] ** -0.5
    kind = "cross" if kv_layout is not None else "joint" if layout.texts else "self"

    def kernel(part, q, k, v, heads=None, lse=False, again=False):
        if pattern is None:
            return dense_with_lse(q, k, v, factor)
        return sparse_attention(
            q, k, v, pattern, layout, scale=factor, backend=backend, return_lse=True
        )

    return AttentionCall(
        role="transformer",
        layer=PATHS[0],
        number=0,
        step=step,
        steps=steps,
        passes=None,
        q=q,
        k=k,
        v=v,
        layout=layout,
        scale=None,
        kind=kind,
        kv_layout=kv_layout or layout,
        factor=factor,
        sparse=pattern is not None,
        kernel=kernel,
    )


def edited(edits, q, k, v, layout, pattern=None, kv_layout=None, **options):
    """What edits make of a call."""
    call = caught(q, k, v, layout, pattern, kv_layout, **options)
    active = [(edit, edit.place(PATHS, q.shape[1]).strengths[PATHS[0]]) for edit in listed(edits)]
    return apply_edits(State(call, 0, None, q, k, v), active)


def listed(edits):
    return [edits] if isinstance(edits, Edit) else list(edits)


def logits(q, k):
    return q.double() @ k.double().mT * q.shape[3] ** -0.5


def softmax(q, k, layout, pattern=None, bias=None):
    """The map ``[b, H, Lq, Lk]``: with a pattern what that keeps, with a bias on the logits."""
    own = logits(q, k)
    if bias is not None:
        own = own + bias
    if pattern is not None:
        own = own.masked_fill(~pattern_mask(pattern, layout), -torch.inf)
    return own.softmax(-1)


def attention(q, k, v, layout, pattern=None, bias=None):
    return softmax(q, k, layout, pattern, bias) @ v.double()


def text_of(layout):
    """Positions of the text."""
    return torch.cat([torch.arange(start, start + n) for start, n in layout.texts])


def image_of(layout):
    """Positions of the grid."""
    start, grid = layout.grids[0]
    return torch.arange(start, start + grid.numel)
