"""``visattn bench``: what it measures, prints and refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable

import pytest
import torch
from support.cli import good, refused, run

from visattn import Grid, TokenLayout
from visattn.bench import Scattered, Shape, WrongResult, time_attention, timing
from visattn.bench import measure_attention as attention
from visattn.bench.measure_attention import check
from visattn.bench.measure_selection import smooth_fields, time_selection
from visattn.bench.timing import take_turns
from visattn.cost import clock
from visattn.patterns import Diagonal
from visattn.selectors import TopBlocks


def test_functions_take_turns() -> None:
    calls: list[str] = []
    times = take_turns(
        [lambda: calls.append("a"), lambda: calls.append("b")], 3, torch.device("cpu")
    )
    assert "".join(calls) == "ab" * 4
    assert all(0 <= own.low <= own.median <= own.high for own in times)


def test_smooth_fields_are_local_and_the_same_every_time() -> None:
    layout = TokenLayout(Grid(4, 8, 8), text_after=5)
    q, k, _ = smooth_fields(layout, 2, 16)
    assert torch.equal(smooth_fields(layout, 2, 16)[0], q)
    weights = (q @ k.mT * 0.25).softmax(-1)
    top = weights.sort(-1, descending=True).values[..., : layout.length // 5].sum(-1)
    assert float(top.mean()) > 0.6


def test_selection_is_timed() -> None:
    layout = TokenLayout(Grid(4, 8, 8))
    found = time_selection(TopBlocks(0.25, block=16), layout, heads=2, dim=16, repeats=3)
    assert found.tokens == 256 and 0.2 < found.density < 0.35
    assert 0 < found.share_low <= found.share <= found.share_high
    assert found.share == pytest.approx(found.selection / found.dense)


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    own = (
        "--pattern",
        "top_blocks(0.3, block=16)",
        "jenga(block=16)",
        "--grid",
        "2x8x8",
        "--heads",
        "2",
        "--head-size",
        "16",
        "--repeats",
        "2",
        "--device",
        "cpu",
    )
    text = good(capsys, "bench", "selection", *own)
    assert "TopBlocks" in text and "Jenga" in text and "of dense" in text
    numbers = json.loads(good(capsys, "bench", "selection", *own, "--json"))
    assert [row["tokens"] for row in numbers["times"]] == [128, 128]
    assert numbers["dtype"] == "float32" and numbers["repeats"] == 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pattern", "radial"), "--pattern radial is static"),
        (("--pattern", "reuse(jenga())"), "give the selector inside it"),
        (("--grid", "8"), "--grid '8' must be"),
        (("--repeats", "0"), "--repeats 0 must be at least 1"),
        (("--heads", "-1"), "--heads -1 must be at least 1"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", "selection", *arguments)[-1]


SMALL = Shape(TokenLayout(Grid(4, 8, 8), text_after=5), 2, 16)


def test_scattered_blocks_are_what_they_say() -> None:
    layout = TokenLayout(Grid(4, 8, 8))
    pattern = Scattered(0.5, block=32, seed=3)
    rows = torch.arange(layout.length)
    kept = pattern.allows(rows[:, None], rows, layout)
    assert pattern.density(layout) == pytest.approx(float(kept.float().mean())) == 0.5
    assert pattern.lower(layout, 32, 32).num_partial == 0
    assert bool(kept.diagonal().all())


@pytest.mark.parametrize("pattern", [Diagonal(9), Scattered(0.4, block=32)], ids=str)
def test_attention_is_checked_and_timed(pattern: Diagonal | Scattered) -> None:
    found = time_attention(pattern, SMALL, repeats=3, flex=False)
    assert found.tokens == 261 and found.density == pattern.density(SMALL.layout)
    assert found.executed >= found.density
    assert len(found.sparse.samples) == len(found.efficiency.samples) == 3
    ratios = sorted(
        a * found.density / b
        for a, b in zip(found.dense.samples, found.sparse.samples, strict=True)
    )
    assert found.efficiency.median == pytest.approx(ratios[1])
    assert found.flex is None and found.peak is None


def test_a_wrong_result_is_not_timed() -> None:
    q, k, v = (torch.randn(1, 2, 261, 16) for _ in range(3))
    with pytest.raises(WrongResult, match="differs from exact attention by"):
        check(torch.zeros_like(q), q, k, v, Diagonal(9), SMALL.layout)
    with pytest.raises(WrongResult, match="differs from exact attention by nan"):
        check(torch.full_like(q, torch.nan), q, k, v, Diagonal(9), SMALL.layout)


def test_a_wrong_pattern_is_said_and_the_others_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.sparse_attention

    def wrong(q: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        out = right(q, *rest, **more)  # type: ignore[call-overload]
        return 2 * out if rest[2] == Diagonal(7) else out

    monkeypatch.setattr(attention, "sparse_attention", wrong)
    code, text, error = run(
        capsys,
        "bench",
        "attention",
        "--shape",
        "tiny-wan-evaluation",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--no-flex",
        "--pattern",
        "diagonal(7)",
        "diagonal(9)",
    )
    assert code == 1 and "Diagonal(width=9)" in text and "Diagonal(width=7)" not in text
    assert "Diagonal(width=7)" in error and "differs from exact attention by" in error


def test_attention_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    own = (
        "--shape",
        "tiny-wan-evaluation",
        "--pattern",
        "diagonal(0.1)",
        "scattered:0.3",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--no-flex",
    )
    text = good(capsys, "bench", "attention", *own)
    assert "1008 tokens, 2 heads of 64" in text and "Scattered" in text
    numbers = json.loads(good(capsys, "bench", "attention", *own, "--json"))
    assert [row["pattern"] for row in numbers["times"]["tiny-wan-evaluation"]] == [
        "Diagonal(width=0.1)",
        "Scattered(share=0.3, block=128, seed=0)",
    ]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pattern", "jenga()"), "--pattern jenga() is dynamic"),
        (("--pattern", "scattered:2"), "share=2.0 must be above 0"),
        (("--shape", "hunyuan-720p", "--device", "cpu"), "which take minutes on a CPU"),
        (("--device", "cuda:9"), "--device cuda:9 cannot be used"),
        (("--repeats", "0"), "--repeats 0 must be at least 1"),
    ],
)
def test_attention_refusals(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", "attention", *arguments)[-1]


def test_short_calls_of_a_gpu_are_timed_by_do_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold L2 cache and device time; long calls, and whole steps, are timed by the wall clock."""
    asked: list[dict[str, object]] = []

    def do_bench(function: Callable[[], object], **options: object) -> list[float]:
        function()
        asked.append(options)
        return [1.0, 3.0]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    seconds = itertools.count()
    gpu, calls = torch.device("cuda"), []
    short = clock.stopwatch(lambda: calls.append("a"), gpu, lambda _: next(seconds) * 1e-3)
    assert short() == pytest.approx(2e-3) and len(calls) == 3
    assert asked == [{"warmup": 1, "rep": 20.0, "return_mode": "all"}]
    long = clock.stopwatch(lambda: calls.append("a"), gpu, lambda _: float(next(seconds)))
    assert long() == 1.0 and len(calls) == 6 and len(asked) == 1
    monkeypatch.setattr(timing, "wall", lambda _: float(next(seconds)))
    assert take_turns([lambda: None], 2, gpu, whole=True)[0].samples == (1.0, 1.0)
    assert len(asked) == 1


@pytest.mark.gpu
def test_do_bench_measures_seconds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.ones(4096, 4096, device="cuda")
    times = take_turns([lambda: x @ x, lambda: torch.cuda._sleep(0)], 3, x.device)
    assert 1e-5 < times[0].median < 0.1 and times[1].median < times[0].median
