"""Faults of the operator: what is masked and mattered, and tensors that it cannot take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trial_cases.case import Case
from visattn import Grid, TokenLayout, sparse_attention
from visattn.patterns import Diagonal, Neighborhood, Skip
from visattn.selectors import OnlineChoice, TopBlocks

LAYOUT = TokenLayout(Grid(2, 3, 4), text_before=33)


def empty_text(folder: Path) -> str:
    """A text of length 0 whose keys and values are NaN."""
    q, k, v = (torch.randn(1, 1, LAYOUT.length, 16) for _ in range(3))
    k[:, :, :33] = v[:, :, :33] = torch.nan
    for backend in ("blockwise", "reference"):
        for pattern in (Neighborhood((2, 3, 3)), TopBlocks(0.5), OnlineChoice()):
            none = torch.tensor([0])
            out = sparse_attention(q, k, v, pattern, LAYOUT, text_lengths=none, backend=backend)
            assert bool(out.isfinite().all()), (backend, pattern)
    return f"all {LAYOUT.length} rows are finite"


def masked_values(folder: Path) -> str:
    """NaN in values that a pattern excludes, and a head that sees nothing."""
    layout = TokenLayout(Grid(1, 1, 40))
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    v[:, :, 20:] = torch.nan
    for backend in ("blockwise", "reference"):
        out = sparse_attention(q, k, v, [Diagonal(3), Skip()], layout, backend=backend)
        assert bool(out[:, 0, :17].isfinite().all()) and bool(out[:, 0, 17:].isnan().all())
        assert bool((out[:, 1] == 0).all())
    return "only the rows that see a NaN are NaN"


def one_head(folder: Path) -> str:
    """A NaN in the queries of one head, of a dynamic pattern."""
    layout = TokenLayout(Grid(4, 8, 8))
    q, k, v = (torch.randn(2, 2, 256, 16) for _ in range(3))
    plain = sparse_attention(q, k, v, TopBlocks(0.25), layout)
    q[1, 1, 100] = torch.nan
    out = sparse_attention(q, k, v, TopBlocks(0.25), layout)
    same = [bool(torch.equal(out[b, h], plain[b, h])) for b in range(2) for h in range(2)]
    assert same == [True, True, True, False], same
    return "the other heads and samples choose as before"


def told(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error) if "\n" not in str(error) else "more than a line"
    return "nothing"


def other_tensors(folder: Path) -> str:
    """Sparse tensors, meta tensors, and torch.vmap."""
    q = torch.randn(2, 1, 1, LAYOUT.length, 16)
    calls = {
        "call to_dense() first": lambda p: sparse_attention(*[q[0].to_sparse()] * 3, p, LAYOUT),
        "put that axis into the batch": lambda p: torch.vmap(
            lambda x: sparse_attention(x, x, x, p, LAYOUT)
        )(q),
        "has no values for": lambda p: sparse_attention(*[q[0].to("meta")] * 3, p, LAYOUT),
    }
    for words, call in calls.items():
        for pattern in (Diagonal(3), TopBlocks(0.5))[words == "has no values for" :]:
            assert words in told(lambda call=call, pattern=pattern: call(pattern))
    return "one sentence each"


CASES = [
    Case("a text of length 0 with NaN makes every row NaN", empty_text),
    Case("NaN in values that are masked", masked_values),
    Case("a NaN in one head makes all heads dense", one_head),
    Case("sparse, meta and vmapped tensors fail with internal errors", other_tensors),
]
