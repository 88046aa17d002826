"""What dynamic patterns allocate in plain torch: up to 8,192 tokens, where a byte for each pair of
blocks is little, no tensor is larger than a few times the queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.selectors_oracle import small
from torch.utils._python_dispatch import TorchDispatchMode

from visattn import Grid, TokenLayout
from visattn.bench.measure_selection import smooth_fields
from visattn.patterns import parse_pattern
from visattn.selectors import SELECTORS, BlockSelector, MoBA, Selector, TopBlocks, VMoBA, selector
from visattn.selectors.attend.dynamic_blockwise import attend

DIM = 32
SIZES = {2048: (2, 32, 32), 4096: (4, 32, 32), 8192: (8, 32, 32)}
MOST = 6  # bytes of the largest tensor over those of the queries in float32
# with parameters of the size that the tests are
OWN = {
    "cluster_blocks": "cluster_blocks(0.3, 0.1, 16, 32, 2)",
    "vmoba": "vmoba('3d', scope='query', queries=1, share=0.1)",
    "moba": "moba(0.05)",
    "hashing": "hashing(64, 64)",
}


class Allocations(TorchDispatchMode):
    """The bytes of the largest storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.seen = 0, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def largest(pattern: Selector, tokens: int) -> float:
    layout = TokenLayout(Grid(*SIZES[tokens]))
    q, k, v = smooth_fields(layout, 1, DIM)
    pattern.select(q, k, v, layout, DIM**-0.5)  # what depends on the layout alone is made once
    with Allocations() as seen:
        selection = pattern.select(q, k, v, layout, DIM**-0.5)
        attend(q, k, v, selection, layout, None, DIM**-0.5)
    return seen.largest / (tokens * DIM * 4)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "reuse"])
def test_no_tensor_grows_faster_than_the_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are cut into parts of a constant size, which is small here."""
    from visattn.selectors.attend import dynamic_blockwise as attending
    from visattn.selectors.attend import largest_logits as largest_of
    from visattn.selectors.methods.per_head_blocks import cluster_blocks as clusters
    from visattn.selectors.stages import scores

    for module in (clusters, largest_of, scores, attending):
        monkeypatch.setattr(module, "CHUNK", 1 << 15)
    monkeypatch.setattr(selector, "MOST_SCORES", 1 << 15)
    pattern = parse_pattern(OWN.get(name, name))
    assert isinstance(pattern, Selector)
    ratios = [largest(pattern, tokens) for tokens in SIZES]
    assert max(ratios) <= MOST, ratios
    assert ratios[-1] <= 1.5 * ratios[0], ratios  # of a quadratic one 4


def test_rows_chosen_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout(Grid(3, 5, 6), text_after=4)
    q, k, v = smooth_fields(layout, 2, 8)
    patterns = (
        MoBA(0.3, 8),
        TopBlocks(0.4, mass=0.5, block=8),
        VMoBA(queries=1, scope="query", box=(2, 2, 2)),
    )
    whole = [pattern.select(q, k, v, layout, 0.3) for pattern in patterns]
    monkeypatch.setattr(selector, "MOST_SCORES", 40)
    for pattern, own in zip(patterns, whole, strict=True):
        assert torch.equal(pattern.select(q, k, v, layout, 0.3).levels, own.levels)
    k[0, 0, 3] = torch.nan
    broken = patterns[0].select(q, k, v, layout, 0.3)
    assert broken.broken.flatten().tolist() == [True, False]
    assert bool((broken.levels[0, 0] == 1).all())
    assert torch.equal(broken.levels[0, 1], whole[0].levels[0, 1])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, kind in SELECTORS.items()
        if issubclass(kind, BlockSelector) and kind.row_independent
    ],
)
def test_declared_row_independence_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout(Grid(3, 5, 6), text_after=4)
    q, k, v = smooth_fields(layout, 2, 8)
    pattern = small(name)
    whole = pattern.select(q, k, v, layout, 0.3)
    calls = []
    scores = type(pattern).scores
    monkeypatch.setattr(
        type(pattern), "scores", lambda *args: calls.append(1) or scores(*args)
    )
    monkeypatch.setattr(selector, "MOST_SCORES", 40)
    assert torch.equal(pattern.select(q, k, v, layout, 0.3).levels, whole.levels)
    assert len(calls) > 1


def test_methods_that_see_all_rows_do_not_declare_row_independence() -> None:
    """Only methods with the stages of the base choose row by row."""
    stages = ("scores", "adjusted", "finished", "widened")
    for kind in SELECTORS.values():
        if issubclass(kind, BlockSelector) and kind.row_independent:
            assert all(getattr(kind, stage) is getattr(BlockSelector, stage) for stage in stages)
