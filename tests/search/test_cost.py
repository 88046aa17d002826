"""The cost model: what is counted, what is measured, and what is predicted from both."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from visattn import TokenLayout, sparse_attention
from visattn.blockmap import BlockMap
from visattn.cost import calibration as module
from visattn.cost.calibration import CASES, HEADS, Calibration, calibrate, calibration_of, fit
from visattn.execute import block_sizes, lower_cached
from visattn.layout import Grid
from visattn.patterns import PATTERNS, Dense, Diagonal, Neighborhood, Pattern, Radial, Skip, Stripe
from visattn.search.cost import crossover, layer_cost, step_speedup, work_of
from visattn.selectors import TopBlocks

LAYOUT = TokenLayout(Grid(8, 12, 12), text_after=40)
PLANTED = Calibration(
    device="planted",
    backend="blockwise",
    dtype="float32",
    head_size=64,
    block=(64, 64),
    slots=1,
    launch=2e-4,
    row=5e-5,
    full=8e-6,
    partial=1e-5,
    broad=7e-6,
    moved=4e-10,
    dense=1.6e-9,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_FOUND", {})
    return tmp_path / "cache"


def lower(pattern: Pattern, layout: TokenLayout = LAYOUT, size: int = 64) -> BlockMap:
    return lower_cached(pattern, layout, None, size, size)


@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_count_the_blocks_of_the_map(name: str) -> None:
    from cases import draw

    block_map = lower(draw(name, LAYOUT, 1))
    work = work_of(block_map, "triton", 3, 64)
    assert work.full + work.partial == 3 * block_map.num_visited
    status = block_map.status()
    assert work.full == 3 * int(((status == 1) | (status == 2)).sum())
    assert work.rows == 3 * len(block_map.q_blocks)
    assert max(map(sum, work.shapes)) == int(block_map.visits.max())
    ordered = block_map.k_blocks.index is not None
    assert work.moved == 3 * 64 * 2 * LAYOUT.length * ordered


@pytest.mark.parametrize("name", PATTERNS)
def test_plain_torch_counts_what_it_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, products and copied elements as the backend itself has them."""
    from cases import draw

    import visattn.cpu_rows as rows

    pattern = draw(name, LAYOUT, 1)
    seen = {"logits": 0, "products": 0}
    real = rows.scaled_dot_product_attention

    def count(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: object) -> torch.Tensor:
        seen["logits"] += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        seen["products"] += 1
        return real(q, k, v, **rest)

    monkeypatch.setattr(rows, "scaled_dot_product_attention", count)
    monkeypatch.setattr(rows, "_is_narrow", lambda *_: False)  # the same products, in two parts
    qkv = (torch.randn(1, 2, LAYOUT.length, 8) for _ in range(3))
    sparse_attention(*qkv, [pattern] * 2, LAYOUT, backend="blockwise")  # type: ignore[call-overload]
    size = block_sizes(LAYOUT.length)[0]
    work = work_of(lower(pattern, size=size), "blockwise", 2, 8)
    assert (work.full + work.partial + work.broad) * size**2 == pytest.approx(seen["logits"])
    assert work.rows == seen["products"] or pattern == Skip()


def planted(rates: Calibration) -> Callable[[str, Callable[[], object]], float]:
    """A clock of a machine that takes just what the rates say."""
    from visattn.cost.model import seconds_of

    def clock(name: str, run: Callable[[], object]) -> float:
        tokens = module.TOKENS["cpu"]
        if name == "dense":
            return rates.dense * HEADS * tokens**2
        layout, pattern = CASES[name](tokens, max(rates.block))
        work = work_of(
            lower_cached(pattern, layout, None, *rates.block), "blockwise", HEADS, rates.head_size
        )
        return seconds_of([work], rates)

    return clock


def test_calibration_finds_planted_rates() -> None:
    found = calibrate("cpu", timer=planted(PLANTED))
    assert found.block == PLANTED.block and found.backend == "blockwise"
    assert found.dense == pytest.approx(PLANTED.dense, rel=1e-6)
    for name in ("launch", "row", "full", "partial", "broad", "moved"):
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=0.02), name
    for pattern in (Neighborhood((3, 5, 5)), Radial(), Stripe(), Diagonal(100)):
        true, own = (layer_cost([pattern] * 4, LAYOUT, x).seconds for x in (PLANTED, found))
        assert own == pytest.approx(true, rel=0.01), pattern


def test_fit_solves_and_keeps_to_the_least() -> None:
    counts = [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]]
    assert fit([5.0, 5.0, 6.0], counts, [0, 0]) == pytest.approx([1.0, 2.0])
    assert fit([2.0, 1.0, 2.0], counts, [0.5, 0.0])[0] == pytest.approx(0.5)
    assert fit([1.0], [[0.0, 1.0]], [0.25, 0.0]) == pytest.approx([0.25, 1.0])


def test_it_is_measured_once_for_a_device_and_version(
    cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, torch.dtype, int]] = []

    def fake(device: torch.device, dtype: torch.dtype, head_size: int) -> Calibration:
        made.append((str(device), dtype, head_size))
        return replace(PLANTED, head_size=head_size)

    monkeypatch.setattr(module, "calibrate", fake)
    first = calibration_of("cpu")
    assert calibration_of("cpu") == first and len(made) == 1
    module._FOUND.clear()  # another process
    assert calibration_of("cpu") == first and len(made) == 1
    assert calibration_of("cpu", head_size=128).head_size == 128 and len(made) == 2
    for damage in ("", "{", '{"key": 3}', "[]", json.dumps({"key": "another"})):
        module._FOUND.clear()
        for path in cache.iterdir():
            path.write_text(damage)
        before = len(made)
        assert calibration_of("cpu") == first and len(made) == before + 1
    module._FOUND.clear()
    for path in cache.iterdir():
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value | {"full": -1.0}))
    before = len(made)
    assert calibration_of("cpu") == first and len(made) == before + 1
    module._FOUND.clear()
    monkeypatch.setattr(module, "__version__", "later")
    calibration_of("cpu")
    assert len(made) == before + 2
    assert not [path for path in cache.iterdir() if path.suffix != ".json"]


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(module, "calibrate", lambda *_: PLANTED)
    with caplog.at_level(logging.WARNING, "visattn"):
        assert calibration_of("cpu") == PLANTED
    assert "the calibration is not kept" in caplog.text


def test_layer_cost_adds_up() -> None:
    one = layer_cost([Radial()], LAYOUT, PLANTED)
    four = layer_cost([Radial()] * 4, LAYOUT, PLANTED)
    assert one.seconds < four.seconds < 4 * one.seconds + PLANTED.launch
    assert four.dense == pytest.approx(4 * PLANTED.dense * LAYOUT.length**2)
    dense = layer_cost([Dense()] * 4, LAYOUT, PLANTED)
    assert dense.seconds == dense.dense == four.dense and dense.speedup == 1
    mixed = layer_cost([Dense(), Dense(), Radial(), Radial()], LAYOUT, PLANTED)
    two = layer_cost([Radial()] * 2, LAYOUT, PLANTED)
    half = layer_cost([Dense()] * 2, LAYOUT, PLANTED)
    assert mixed.seconds > two.seconds + half.seconds  # heads are taken apart and put together
    assert layer_cost([Skip()] * 4, LAYOUT, PLANTED).seconds < 0.3 * four.seconds
    twice = layer_cost([Radial()] * 4, LAYOUT, PLANTED, batch=2)
    assert twice.seconds > 1.9 * (four.seconds - PLANTED.launch)


def test_mean_and_worst_row_of_a_gpu() -> None:
    """132 rows at a time; one long row alone decides."""
    gpu = replace(PLANTED, backend="triton", slots=132, block=(128, 64), full=1e-6, row=1e-6)
    cost = layer_cost([Neighborhood((3, 5, 5))] * 24, LAYOUT, gpu)
    assert cost.mean < cost.worst
    block_map = lower_cached(Neighborhood((3, 5, 5)), LAYOUT, None, 128, 64)
    work = work_of(block_map, "triton", 24, 64)
    rows = work.rows * gpu.row + work.full * gpu.full + work.partial * gpu.partial
    fixed = gpu.launch + gpu.moved * work.moved
    assert cost.mean == pytest.approx(fixed + rows / 132)
    longest = max(gpu.row + f * gpu.full + p * gpu.partial for f, p in work.shapes)
    assert cost.worst == pytest.approx(fixed + work.rows * longest / 132)
    alone = layer_cost([Stripe()], LAYOUT, gpu)  # fewer rows than slots
    assert alone.seconds > alone.mean


def test_crossover() -> None:
    shares = [crossover(PLANTED, tokens) for tokens in (64, 256, 1024, 8192, 65536)]
    assert shares == sorted(shares) and 0 <= shares[0] < 0.2 < shares[-1] < 1
    share = PLANTED.dense * 64 * 64 / PLANTED.full
    assert crossover(replace(PLANTED, row=0.0), 8192) == pytest.approx(share)
    assert crossover(replace(PLANTED, full=1e-9), 8192) == 1


def test_step_speedup_is_amdahls() -> None:
    layers = [layer_cost([Stripe()] * 4, LAYOUT, PLANTED)] * 3
    assert step_speedup(layers, 0) == 1
    assert step_speedup(layers, 1) == pytest.approx(layers[0].speedup)
    half = step_speedup(layers, 0.5)
    assert half == pytest.approx(1 / (0.5 + 0.5 / layers[0].speedup))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"patterns=\(\) is empty; a layer has one pattern"):
        layer_cost([], LAYOUT, PLANTED)
    with pytest.raises(ValueError, match="chooses its blocks at every call"):
        layer_cost([TopBlocks(0.2)], LAYOUT, PLANTED)  # type: ignore[list-item]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(module._folder()) == os.environ["VISATTN_CACHE"]
    monkeypatch.delenv("VISATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(module._folder()) == "/somewhere/visattn"
