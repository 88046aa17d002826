"""``visattn bench``: what it measures, prints and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from cli import good, refused

from visattn import Grid, TokenLayout
from visattn.bench.selection import smooth_fields, time_selection
from visattn.bench.timing import take_turns
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
    own = ("--pattern", "top_blocks(0.3, block=16)", "jenga(block=16)", "--grid", "2x8x8",
           "--heads", "2", "--head-size", "16", "--repeats", "2", "--device", "cpu")
    text = good(capsys, "bench", "selection", *own)
    assert "TopBlocks" in text and "Jenga" in text and "of dense" in text
    numbers = json.loads(good(capsys, "bench", "selection", *own, "--json"))
    assert [row["tokens"] for row in numbers["times"]] == [128, 128]
    assert numbers["dtype"] == "float32" and numbers["repeats"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pattern", "radial"), "--pattern radial is static"),
        (("--pattern", "reuse(jenga())"), "measure the selector within"),
        (("--grid", "8"), "--grid '8' must be"),
        (("--repeats", "0"), "--repeats 0 must be at least 1"),
        (("--heads", "-1"), "--heads -1 must be at least 1"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", "selection", *arguments)[-1]
