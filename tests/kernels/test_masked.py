"""What is masked cannot matter: NaN and infinite numbers past the end of a text, in keys that a
pattern excludes, in other heads and batch items, and in queries without a gradient.

``blockwise`` and ``reference`` hold this key by key and for every query without a gradient; the
kernels for the key blocks that a query block visits, as a product takes a whole block, and for text
queries without a gradient.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.kernel_cases import DEVICE
from support.selectors_oracle import small

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.backends.reference import pattern_mask
from visattn.attention.lowering import lower_cached
from visattn.kernels.launch import INTERPRETED, INTERPRETED_BACKWARD
from visattn.patterns import (
    Dense,
    Diagonal,
    GridBlocks,
    HeadPattern,
    Neighborhood,
    Pattern,
    Radial,
    Skip,
    Stripe,
    parse_pattern,
)
from visattn.selectors import SELECTORS

LAYOUT = TokenLayout(Grid(3, 3, 9), text_before=5, text_after=6)
LENGTHS = torch.tensor([[0, 6], [1, 0], [5, 1]])
HEADS, DIM = 2, 16
KINDS: dict[str, Pattern] = {
    "none": Dense(),
    "axis": Neighborhood((1, 3, 5)),
    "strided": GridBlocks((3, 1, 3)),
    "band": Diagonal(4),
    "radial": Radial(0.5, rule="token"),
    "label": Stripe(False, (5,)),
    "nothing": Skip(),
}
SEEN = (7, 50)  # queries that are looked at: of the first frame, and of the last one


def poison(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``x`` with NaN and both infinities in the rows that are not kept, bool ``[B, H, L]``."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], device=x.device).repeat(x.shape[3])
    return torch.where(kept[..., None].to(x.device), x, bad[: x.shape[3]].to(x.dtype))


def valid_text(lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens are no padding, bool ``[B, L]``."""
    valid = torch.ones(len(lengths), LAYOUT.length, dtype=torch.bool)
    for item, own in enumerate(lengths.tolist()):
        for (first, capacity), length in zip(LAYOUT.texts, own, strict=True):
            valid[item, first + length : first + capacity] = False
    return valid


def reached(pattern: Pattern, backend: str) -> torch.Tensor:
    """Which keys can reach a query, bool ``[L, L]``."""
    mask = pattern_mask(pattern, LAYOUT)
    if backend != "triton":
        return mask
    blocks = [INTERPRETED[:2], INTERPRETED_BACKWARD[0]] if DEVICE.type == "cpu" else [(128, 128)]
    for block in blocks:
        own = lower_cached(pattern, LAYOUT, None, *block)
        visited = own.status() != 0
        q, q_there = own.q_blocks.tokens(torch.arange(len(own.q_blocks)))
        k, k_there = own.k_blocks.tokens(torch.arange(len(own.k_blocks)))
        for i, j in visited.nonzero().tolist():
            mask[q[i][q_there[i]][:, None], k[j][k_there[j]]] = True
    return mask


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["triton", "blockwise", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_does_not_matter(kind: str, backend: str) -> None:
    """Of patterns of every kind of predicate; gradients by the kernels of one of them and one
    sample, as these take the interpreter seconds."""
    kernels = backend == "triton"
    forward_only = kind == "nothing" or (kernels and kind != "axis")
    lengths = LENGTHS[:1] if kernels and not forward_only else LENGTHS
    pattern, valid = KINDS[kind], valid_text(lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), HEADS, LAYOUT.length, DIM)
    plain = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    used = torch.zeros(shape[:3], dtype=torch.bool)
    used[:, 0, SEEN] = True  # of the other head nothing is
    grads = [plain[3] * used[..., None], plain[4][..., 0] * used]
    keys = valid & reached(pattern, backend)[list(SEEN)].any(0)
    if kernels and not forward_only:  # a query that sees a NaN has a NaN gradient, used or not
        keys = valid
    keys = torch.stack([keys, torch.zeros_like(keys)], 1)
    queries = used.clone()
    queries[:, 0] |= valid & kernels
    assert not keys.all() and not queries.all()

    def run(qkv: list[torch.Tensor], dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        call = partial(
            sparse_attention,
            pattern=[pattern, Skip()],
            layout=LAYOUT,
            text_lengths=lengths,
            backend=backend,
        )
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in qkv]
        if forward_only:
            with torch.no_grad():
                return [call(*leaves).double().cpu()[used]]
        with torch.no_grad():
            plain_out = None if backend == "triton" else call(*leaves)
        out, lse = call(*leaves, return_lse=True)
        given = [grads[0].to(out), grads[1].to(lse)]
        dq, dk, dv = torch.autograd.grad([out, lse], leaves, given)
        found = [x.double().cpu()[used] for x in (out, lse, dq)]
        found += [x.double().cpu()[keys] for x in (dk, dv)]
        return found if plain_out is None else [*found, plain_out.double().cpu()[used]]

    q, k, v = plain[:3]
    poisoned = [poison(q, queries), poison(k, keys), poison(v, keys)]
    found = run(poisoned, torch.float32 if kernels else torch.float64, backend)
    expected = run([q, k, v], torch.float64, "reference")
    bound = {"atol": 1e-5, "rtol": 1.3e-6} if kernels else {"atol": 1e-7, "rtol": 1e-7}
    for own, exact in zip(found, expected, strict=False):
        torch.testing.assert_close(own, exact, **bound)


@pytest.mark.second
def test_padding_does_not_matter_to_dynamic_patterns() -> None:
    """Neither to what they choose, nor to outputs and gradients of what is no padding."""
    valid = valid_text(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), 4, LAYOUT.length, DIM)
    plain = [torch.randn(shape, generator=generator) for _ in range(4)]
    kept = valid[:, None].expand(shape[:3])
    grad = plain[3] * kept[..., None]

    def run(pattern: HeadPattern, qkv: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = sparse_attention(*leaves, pattern, LAYOUT, text_lengths=LENGTHS, backend=backend)
        return [x[kept] for x in (out, *torch.autograd.grad(out, leaves, grad))]

    poisoned = [poison(x, kept) for x in plain[:3]]
    for name in (*SELECTORS, "agent"):
        pattern = parse_pattern("agent((1, 3, 3))") if name == "agent" else small(name)
        found, expected = (run(pattern, x, "blockwise") for x in (poisoned, plain[:3]))
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
    by_one = run(small("top_blocks"), poisoned, "reference")
    torch.testing.assert_close(by_one, run(small("top_blocks"), plain[:3], "reference"))
