"""Rows of a block map in plain torch: what they see, and memory and masks that are used again."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from support.caches import clear_caches, clear_functions, live_tensors
from support.cases import LAYOUTS, draw

import visattn.attention.backends.block_rows as module
import visattn.attention.backends.blockwise_cpu as cpu_rows
from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.backends.block_rows import (
    keys_of,
    mask_of,
    ordered,
    products_of,
    rows_of,
    window_of,
)
from visattn.attention.backends.workspace import _KEPT, KEPT, workspace
from visattn.attention.lowering import MAPS, lower_cached
from visattn.patterns import PATTERNS, Diagonal, Neighborhood, Radial, Skip, Stripe

LAYOUT = LAYOUTS["video_6x6x7_both_texts"]


@pytest.mark.parametrize("name", PATTERNS)
def test_rows_see_what_the_pattern_keeps(name: str) -> None:
    """Products of rows, laid out pair by pair, are the pattern's own mask; each query is in one."""
    pattern = draw(name, LAYOUT, 3)
    block_map = pattern.lower(LAYOUT, 16, 8)
    found = torch.zeros(LAYOUT.length, LAYOUT.length, dtype=torch.int64)
    positions = torch.arange(LAYOUT.length)[None, :, None]
    queries: list[int] = []
    for group in products_of(rows_of(block_map), 2, 8, True):
        mask = mask_of(group, block_map.tiles[0])
        own = torch.arange(group[0].begin, group[-1].end).view(len(group), -1)
        queries += own.flatten().tolist()
        if not group[0].keys:
            continue
        keys = keys_of(positions, group)[0, :, :, 0]
        kept = torch.ones(*own.shape, keys.shape[1]) if mask is None else mask[0]
        for row, (q, k) in enumerate(zip(own, keys, strict=True)):
            found[q[:, None], k] += kept[min(row, len(kept) - 1)].long()
    assert queries == list(range(LAYOUT.length))
    tokens = torch.arange(LAYOUT.length)
    q_index, k_index = (
        tokens if x.index is None else x.index for x in (block_map.q_blocks, block_map.k_blocks)
    )
    mask = pattern.allows(q_index[:, None], k_index, LAYOUT)
    assert torch.equal(found, mask.long())


def test_equal_rows_are_joined_and_even_runs_are_windows() -> None:
    layout = TokenLayout(Grid(1, 1, 1024))
    wide = Neighborhood((1, 1, 384), stride=(1, 1, 128)).lower(layout, 32, 32)
    rows = rows_of(wide)
    # the windows of the first two and of the last two are the same, at the ends
    assert [row.shape for row in rows] == [(256, 384), *[(128, 384)] * 4, (256, 384)]
    groups = list(products_of(rows[1:-1], 1, 8, True))
    assert [len(group) for group in groups] == [4]
    assert window_of(groups[0]) == (128, 128)
    x = torch.randn(1, 1024, 8)
    seen = keys_of(x, groups[0])
    assert seen.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for number, row in enumerate(groups[0]):
        assert torch.equal(seen[0, number], x[0, row.runs[0][0] : row.runs[0][1]])


@pytest.mark.parametrize("limit", ["LISTED", "COPIED", "WORK"])
def test_limits_change_no_result(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = [torch.randn(1, 2, LAYOUT.length, 8) for _ in range(3)]
    for pattern in (Radial(), Neighborhood((3, 3, 3)), Stripe()):
        expected = sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise")
        monkeypatch.setattr(module, limit, 0)
        MAPS.clear()
        found = sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise")
        monkeypatch.undo()
        MAPS.clear()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_logits_that_are_written_out_change_no_result(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows with masks and without, of windows and of copies, some at a time, and of more heads
    than rows."""
    pattern = draw(name, LAYOUT, 3)
    layout = TokenLayout(Grid(6, 16, 16))
    plain = Neighborhood((3, 8, 8), stride=(3, 8, 8))  # no masks
    cases = [(pattern, LAYOUT, 2), (pattern, LAYOUT, 9), (plain, layout, 2), (plain, layout, 64)]
    generator = torch.Generator().manual_seed(0)
    written = cpu_rows._written_out
    calls: list[int] = []

    def counted(*args: object) -> None:
        calls.append(1)
        written(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_rows, "_written_out", counted)
    for own, place, heads in cases:
        shape = (1, heads, place.length, 8)
        qkv = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(cpu_rows, "NARROW", 0)
            expected = sparse_attention(*qkv, own, place, backend="blockwise")
        before = len(calls)
        for logits in (1 << 22, 5000):
            with monkeypatch.context() as patch:
                patch.setattr(cpu_rows, "LEAST", (0, 0))
                patch.setattr(cpu_rows, "LOGITS", logits)
                found = sparse_attention(*qkv, own, place, backend="blockwise")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert len(calls) > before or isinstance(own, Skip)


def test_a_product_is_written_out_where_that_pays() -> None:
    q = torch.empty(4, 2, 128, 64)
    mask = cpu_rows.Mask.of(torch.ones(1, 1, 128, 200, dtype=torch.bool).tril(), q.dtype)
    assert mask.spans == ((1, 200),)
    assert cpu_rows._is_narrow(q, 200, None) and not cpu_rows._is_narrow(q, 200, mask)
    assert cpu_rows._is_narrow(q, 600, mask)
    assert not cpu_rows._is_narrow(q, 100, None)
    assert not cpu_rows._is_narrow(q, cpu_rows.LOGITS // 128 + 1, None)  # too large for a cache
    assert not cpu_rows._is_narrow(q.bfloat16(), 600, None)  # whose logits would be rounded
    assert not cpu_rows._is_narrow(torch.empty(4, 2, 768, 64), 600, None)


def test_masks_are_kept_while_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = [torch.randn(1, 2, LAYOUT.length, 8) for _ in range(3)]
    pattern = Neighborhood((3, 5, 3))
    block_map = lower_cached(pattern, LAYOUT, None, 64, 64)
    block_map.made.clear()
    first = sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise")
    kept = block_map.made["masks", torch.float32]
    assert len(kept.by_tiles) > 1
    monkeypatch.setattr(cpu_rows, "mask_of", lambda *_: pytest.fail("made again"))
    assert torch.equal(sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise"), first)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_rows, "MASKS", 0)
    kept.by_tiles.clear()
    assert torch.equal(sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise"), first)
    assert len(kept.by_tiles) == 1


def test_results_stay_when_memory_is_used_again() -> None:
    """Of other sizes, heads, dtypes and threads too; arguments are not written to."""
    found = []
    for heads, dtype in ((2, torch.float32), (3, torch.float64), (1, torch.bfloat16)):
        qkv = [torch.randn(2, LAYOUT.length, heads, 8).to(dtype).transpose(1, 2) for _ in range(3)]
        before = [x.clone() for x in qkv]
        for pattern in (Neighborhood((3, 3, 3)), Diagonal(9), Skip()):
            out = sparse_attention(*qkv, pattern, LAYOUT, backend="blockwise")
            exact = sparse_attention(*qkv, pattern, LAYOUT, backend="reference")
            found.append((out, out.clone(), exact))
        assert all(torch.equal(x, y) for x, y in zip(qkv, before, strict=True))
    for out, then, exact in found:
        assert torch.equal(out, then)
        torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)


def test_threads_have_their_own_memory() -> None:
    qkv = [torch.randn(1, 2, LAYOUT.length, 8) for _ in range(3)]
    patterns = (Neighborhood((3, 3, 3)), Radial())
    expected = [sparse_attention(*qkv, p, LAYOUT, backend="blockwise") for p in patterns]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(20):
            out = sparse_attention(*qkv, patterns[number], LAYOUT, backend="blockwise")
            if not torch.equal(out, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_workspace() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    first = workspace("test", like, 4, 5)
    assert first.shape == (4, 5) and first.dtype == torch.float64
    again = workspace("test", like.float(), 3)
    assert again.data_ptr() == first.data_ptr() and again.dtype == torch.float32
    assert workspace("test", like, 100).numel() == 100
    assert workspace("other", like, 0).numel() == 0
    big = workspace("big", torch.zeros(1, dtype=torch.uint8), KEPT + 1)
    assert "big" not in _KEPT.tensors and big.numel() == KEPT + 1


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_ordered(batch: int, heads_first: bool) -> None:
    x = torch.randn(batch, 3, 10, 4)
    x = x if heads_first else x.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.randperm(10)
    assert torch.equal(ordered(x, None), x.reshape(-1, 10, 4))
    assert torch.equal(ordered(x, index), x[:, :, index].reshape(-1, 10, 4))
    out = torch.empty(batch * 30, 4)
    found = ordered(x, index, out)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(found, x[:, :, index].reshape(-1, 10, 4))
    odd = torch.randn(batch, 3, 10, 8)[..., ::2]
    assert torch.equal(ordered(odd, index), odd[:, :, index].reshape(-1, 10, 4))


def held_bytes() -> dict[int, int]:
    """Bytes of all memory that tensors have, by address."""
    storages = [x.untyped_storage() for x in live_tensors() if x.device.type == "cpu"]
    return {own.data_ptr(): own.nbytes() for own in storages}


@pytest.mark.second
def test_what_is_made_of_maps_counts_and_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many resolutions and two dtypes, without the help of the garbage collector."""
    patterns = (Diagonal(9), Neighborhood((1, 3, 3)))
    layouts = [TokenLayout(Grid(2, 5, width), text_after=3) for width in range(3, 31)]

    def run_all() -> None:
        for layout in layouts:
            for dtype in (torch.float32, torch.bfloat16):
                qkv = [torch.zeros(2, layout.length, 2, 8, dtype=dtype).transpose(1, 2)] * 3
                sparse_attention(*qkv, patterns, layout, backend="blockwise")

    run_all()  # memory that is used again is there
    clear_caches()
    gc.collect()
    gc.disable()
    try:
        before = held_bytes()
        monkeypatch.setattr(MAPS, "limit_bytes", 1_000_000)
        run_all()
        lower_cached(patterns[0], layouts[-1], None, 64, 64)  # holds the cache to its limit
        clear_functions()
        counted, maps, held = MAPS.nbytes, len(MAPS), held_bytes()
        MAPS.clear()
        after = held_bytes()
    finally:
        gc.enable()
    assert counted <= 1_000_000 and 2 <= maps < len(patterns) * len(layouts)
    assert 0.5 * counted < sum(n for at, n in held.items() if at not in before) <= counted
    assert {at: n for at, n in after.items() if at not in before} == {}
