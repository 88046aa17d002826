"""The cost model: what is counted, what is measured, and what is predicted from both."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visattn import TokenLayout, sparse_attention
from visattn.attention.lowering import block_sizes, lower_cached
from visattn.blocks.block_map import BlockMap
from visattn.cost import (
    TORCH,
    Calibration,
    DenseAttention,
    Timing,
    calibrate,
    calibration_of,
    clock,
    interleaved,
)
from visattn.cost import calibration_cache as module
from visattn.cost.calibration import CASES, DENSE_QUERIES, HEADS, TOKENS, fit
from visattn.geometry.layout import Grid
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
    monkeypatch.setattr(module, "_CALIBRATIONS", {})
    monkeypatch.setattr(module, "_REPEATED", set())
    return tmp_path / "cache"


def lower(pattern: Pattern, layout: TokenLayout = LAYOUT, size: int = 64) -> BlockMap:
    return lower_cached(pattern, layout, None, size, size)


@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_count_the_blocks_of_the_map(name: str) -> None:
    from support.cases import draw

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
    from support.cases import draw

    import visattn.attention.backends.blockwise_cpu as rows

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


def planted(
    rates: Calibration,
) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, Timing]]:
    """The times of a machine that takes just what the rates say."""
    from visattn.cost.model import seconds_of

    def seconds(name: str) -> float:
        tokens = TOKENS["cpu"]
        if name == "dense":
            return rates.dense * HEADS * DENSE_QUERIES["cpu"] * tokens
        layout, pattern = CASES[name](tokens, max(rates.block))
        work = work_of(
            lower_cached(pattern, layout, None, *rates.block), "blockwise", HEADS, rates.head_size
        )
        return seconds_of([work], rates)

    return lambda functions: {name: Timing(seconds(name), 0.1) for name in functions}


def test_calibration_finds_planted_rates() -> None:
    found = calibrate("cpu", timer=planted(PLANTED))
    assert found.block == PLANTED.block and found.backend == "blockwise"
    assert found.dense == pytest.approx(PLANTED.dense, rel=1e-6)
    assert found.dense_by == "native" and found.spread == 0.1
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

    def fake(
        device: torch.device, dtype: torch.dtype, head_size: int, dense_attention: DenseAttention
    ) -> Calibration:
        made.append((str(device), dtype, head_size))
        return replace(PLANTED, head_size=head_size, dense_by=dense_attention.name)

    monkeypatch.setattr(module, "calibrate", fake)
    first = calibration_of("cpu")
    assert calibration_of("cpu") == first and len(made) == 1
    module._CALIBRATIONS.clear()  # another process
    assert calibration_of("cpu") == first and len(made) == 1
    assert calibration_of("cpu", head_size=128).head_size == 128 and len(made) == 2
    other = DenseAttention("another", TORCH.run)
    assert calibration_of("cpu", dense_attention=other).dense_by == "another" and len(made) == 3
    assert calibration_of("cpu") == first and len(made) == 3
    before = len(made)
    assert module.measured_again("cpu", torch.float32, 64) and len(made) == before + 1
    assert not module.measured_again("cpu", torch.float32, 64) and len(made) == before + 1
    module._CALIBRATIONS.clear()
    monkeypatch.setattr(module, "__version__", "later")
    calibration_of("cpu")
    assert len(made) == before + 2
    assert not [path for path in cache.iterdir() if path.suffix != ".json"]


def _altered(**values: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_text("{"),
    "list": lambda path: path.write_text("[]"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "deep": lambda path: path.write_text("[" * 30000),
    "large": lambda path: path.write_text(path.read_text() + " " * 10**6),
    "another key": _altered(key="another"),
    "no such field": _altered(extra=1.0),
    "negative": _altered(full=-1.0),
    "not a number": _altered(dense=math.nan),
    "infinite": _altered(row=math.inf),
    "absurd": _altered(dense=1e300),
    "zero": _altered(full=0.0),
    "a text": _altered(launch="1"),
    "a truth": _altered(slots=True),
    "block of one": _altered(block=[64]),
    "block of texts": _altered(block=["64", "64"]),
    "another backend": _altered(backend="cuda"),
    "pipe": _replaced(os.mkfifo),
    "endless": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "folder": _replaced(Path.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_right_is_measured_again(
    damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: made.append(1) or PLANTED)
    calibration_of("cpu")
    DAMAGES[damage](next(cache.iterdir()))
    module._CALIBRATIONS.clear()
    assert calibration_of("cpu") == PLANTED and len(made) == 2


def test_what_a_busy_machine_gives_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = replace(PLANTED, spread=module.STEADY + 0.1)
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: busy)
    assert calibration_of("cpu") == busy
    assert not cache.exists()


class BusyMachine:
    """Another process takes the core for 50 ms after every 30 ms of ours, and the machine is slower
    in every second round: short calls fit between, and long ones do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = 0.0
        monkeypatch.setattr(clock.time, "thread_time", lambda: self.ours)
        monkeypatch.setattr(
            clock.time, "perf_counter", lambda: self.ours + 0.05 * (self.ours // 0.03)
        )

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.ours += seconds

        return run


def test_a_busy_machine_does_not_make_long_calls_look_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = BusyMachine(monkeypatch)
    calls = {"dense": machine.work(0.2), "short": machine.work(0.001)}
    found = interleaved(calls, torch.device("cpu"), seconds=2.0)
    assert found["dense"].seconds == pytest.approx(0.2)
    assert found["short"].seconds == pytest.approx(0.001)
    assert found["dense"].spread == pytest.approx(0, abs=1e-6)


def test_functions_take_turns_in_slices_of_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = BusyMachine(monkeypatch)
    order: list[str] = []

    def named(name: str, seconds: float) -> Callable[[], None]:
        run = machine.work(seconds)
        return lambda: (order.append(name), run())[1]

    interleaved({"a": named("a", 0.02), "b": named("b", 0.005)}, torch.device("cpu"), seconds=0.0)
    turns = [["a"], ["b"] * 4] * clock.LEAST_ROUNDS
    assert order == ["a", "a", "b", "b", *(name for turn in turns for name in turn)]


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: PLANTED)
    with caplog.at_level(logging.WARNING, "visattn"):
        assert calibration_of("cpu") == PLANTED
    assert "the calibration is not stored" in caplog.text


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
