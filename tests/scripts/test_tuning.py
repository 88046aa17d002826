"""What is measured on a GPU, without one: the candidates of the launch tables, the loops that lose
nothing, and the verdicts. Nothing is timed."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cli import ROOT

pytest.importorskip("triton")

from visattn import Grid, TokenLayout, sparse_attention
from visattn.bench import SHAPES, Shape, WrongResult
from visattn.kernels.targets import BACKWARD, LAUNCHES, TARGETS, BackwardLaunch, Launch
from visattn.patterns import Neighborhood, Radial, SlidingTile

MEASURED = ("candidates", "gradients", "running", "sections", "tuning")
NAMES = (*(f"measured.{name}" for name in MEASURED), "tune_attention", "gpu_table")
PLACES = [
    (target, size, itemsize)
    for target in TARGETS
    for itemsize in (2, 4)
    for size in LAUNCHES[target][itemsize]
]


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    """The scripts and what they are made of, by the last part of their names."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        found = {name.split(".")[-1]: importlib.import_module(name) for name in NAMES}
        yield SimpleNamespace(**found)
    finally:
        sys.path[:] = before


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_candidates_fit_and_begin_with_the_committed_entry(
    parts: SimpleNamespace, place: tuple[str, int, int]
) -> None:
    target, size, itemsize = place
    own = parts.candidates
    forward = own.forward_candidates(*place)
    backward = own.backward_candidates(*place)
    assert forward[0] == LAUNCHES[target][itemsize][size]
    assert backward[0] == BACKWARD[target][itemsize][size]
    limit = TARGETS[target].shared_bytes
    assert all(own.forward_bytes(target, x, size, itemsize) <= limit for x in forward)
    assert all(own.backward_bytes(target, x, size, itemsize) <= limit for x in backward)
    for found in (forward, backward):
        assert len(set(found)) == len(found) > 1
        away = [own.distance(x, found[0]) for x in found]
        assert away == sorted(away)
    assert all(x.block_q % x.queries == x.block_q % x.masked == 0 for x in backward)
    described = any(x.descriptors for x in LAUNCHES[target][2].values())
    assert described or not any(x.descriptors for x in forward)


def test_the_formula_of_shared_memory_is_near_what_was_compiled(parts: SimpleNamespace) -> None:
    """At the core head sizes in 16 bits on NVIDIA, from half of what the largest variant takes to a
    third above what the least takes; it need not be exact, as what does not fit is found out."""
    table = json.loads((ROOT / "assets" / "tables" / "compile_matrix.json").read_text())
    taken: dict[tuple[str, str, int], list[int]] = {}
    for row in table["rows"]:
        core = row["dim"] in (64, 128) and row["dtype"] == "bfloat16"
        named = row["family"] in ("forward", "backward") and not row["variant"].startswith("level")
        if core and named and row["target"] != "gfx942":
            place = (row["family"], row["target"], row["dim"])
            taken.setdefault(place, []).append(row["shared"])
    assert len(taken) == 20
    for (family, target, size), values in taken.items():
        settings = parts.candidates.committed(family, target, size, 2)
        formula = getattr(parts.candidates, f"{family}_bytes")
        about = formula(target, settings, size, 2)
        assert 0.49 * max(values) <= about <= 1.34 * min(values), (family, target, size)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tuned(
    parts: SimpleNamespace, records: list[Any], seconds: float, log: list[Any]
) -> tuple[int, int]:
    """A run in which trying 4 candidates takes 2 seconds and each map 1; how many candidates there
    are, and how many are left."""
    clock = Clock()
    budget = parts.running.Budget(seconds, clock)
    jobs = parts.tuning.jobs_of("sm_80", ["forward"], ["bfloat16"], [128])

    def try_out(batch: list[Any]) -> list[dict[str, str | None]]:
        clock.now += 2
        return [
            {"full": None, "partial": "OutOfResources: no" if job.launch.warps == 4 else None}
            for job in batch
        ]

    def measure(job: Any, name: str) -> dict[str, float]:
        clock.now += 1
        log.append((job.settings, name))
        if job.launch.block_k == 128:
            raise WrongResult("off by 1")
        ratio = 0.5 if job.launch.block_q == 64 else 1.0
        return {"seconds": ratio, "committed_seconds": 1.0, "ratio": ratio}

    left = parts.tuning.tune(
        jobs,
        records,
        budget,
        try_out=try_out,
        measure=measure,
        keep=lambda: log.append(len(records)),
        width=4,
    )
    return len(jobs), left


def test_a_run_stops_in_time_and_goes_on(parts: SimpleNamespace) -> None:
    records: list[Any] = []
    log: list[Any] = []
    count, left = tuned(parts, records, 25, log)
    assert 0 < left < count and len(records) == count - left
    assert [x for x in log if isinstance(x, int)] == list(range(1, len(records) + 1))
    early = {x for x in log if isinstance(x, tuple)}
    log.clear()
    assert tuned(parts, records, 1e6, log) == (count, 0)
    assert len(records) == count and not early & {x for x in log if isinstance(x, tuple)}
    assert len({parts.tuning.identity(record) for record in records}) == count
    assert any("wrong" in x["maps"]["full"] for x in records)
    assert any("skipped" in x["maps"]["partial"] for x in records)
    log.clear()
    assert tuned(parts, records, 1e6, log) == (count, 0) and log == []


def test_what_is_best_and_what_is_not_enough(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = parts.tune_attention
    monkeypatch.setattr(script, "MAPS", {"full": None, "partial": None})
    records: list[Any] = []
    tuned(parts, records, 1e6, [])
    (row,) = script.summary("sm_80", records)
    own = list(LAUNCHES["sm_80"][2][128])
    assert row["committed"] == own and row["entry"] == row["best"] and row["entry"][0] == 64
    assert row["entry"][2] == 8  # where 4 warps ran, they did not run on every map
    assert row["ratio"] == pytest.approx(0.5) and row["wrong"] > 0 and row["not_run"] > 0
    text = script.table("sm_80", [row], 3)
    assert f"Launch({', '.join(map(str, row['entry']))}),  # 0.500 of before" in text
    assert "LAUNCHES['sm_80'][2]  128" in text and "3 candidates were not reached" in text
    for record in records:  # faster, but not by enough
        for found in record["maps"].values():
            if "ratio" in found:
                found["ratio"] = 1.0 if record["settings"] == own else 0.99
    (row,) = script.summary("sm_80", records)
    assert row["entry"] == own != row["best"]
    assert "# as it is" in script.table("sm_80", [row], 0)


def test_results_of_something_else_are_not_gone_on_with(parts: SimpleNamespace) -> None:
    script, now = parts.tune_attention, {"device": "x", "torch": "2", "command": "c", "records": []}
    assert script.resumed(now, {}) == []
    assert script.resumed(now, now | {"command": "d", "records": [1]}) == [1]
    with pytest.raises(ValueError, match="the file is of another torch; leave --resume out"):
        script.resumed(now, now | {"torch": "3"})


def test_a_write_that_is_killed_leaves_the_file_before(
    parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "table.json"
    parts.running.save(path, {"rows": [1]})
    whole = Path.write_bytes

    def killed(self: Path, data: bytes) -> int:
        whole(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.running.save(path, {"rows": [1, 2]})
    assert parts.running.read_json(path) == {"rows": [1]}
    assert parts.running.read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("value", "limit", "holds"),
    [
        (0.79, {"at_least": 0.8}, False),
        (0.8, {"at_least": 0.8}, True),
        (1.11, {"at_most": 1.1}, False),
        (1.1, {"at_most": 1.1}, True),
        (0, {"at_most": 0}, True),
        (float("nan"), {"at_least": 0.8}, False),
        (float("nan"), {"at_most": 1.1}, False),
        (None, {"at_most": 1.1}, False),
    ],
)
def test_verdicts(
    parts: SimpleNamespace, value: float | None, limit: dict[str, float], holds: bool
) -> None:
    must = parts.sections.judged("speed", value, **limit)
    assert must["holds"] is holds
    assert parts.gpu_table.verdict(must).startswith("holds" if holds else "FAILS")


def test_a_section_that_breaks_down_loses_nothing_else(parts: SimpleNamespace) -> None:
    clock = Clock()
    budget = parts.running.Budget(190, clock)
    found: dict[str, Any] = {}
    kept: list[int] = []

    def start(
        function: Callable[..., None], given: tuple[str, float], seconds: float, hear: Any
    ) -> str | None:
        key, own = given
        assert own == seconds <= 190 - clock.now
        hear(("rows", {"name": "speed", "ms": 1.0}))
        hear(("musts", parts.sections.judged("speed", 0.7, at_least=0.8)))
        clock.now += 60
        return "stopped after 60 s" if key == "c" else None

    parts.gpu_table.run(
        ["j", "c", "a", "e", "d"],
        found,
        budget,
        keep=lambda: kept.append(len(json.dumps(found))),
        start=start,
    )
    assert list(found) == ["a", "c", "e", "d", "j"]  # in the table's order
    ended = [own["ended"] for own in found.values()]
    assert ended == ["well", "stopped after 60 s", "well", *["not run: no time was left"] * 2]
    assert found["c"]["rows"] and kept == sorted(kept)
    text = parts.gpu_table.summary(found)
    assert "c. density 1 beside dense attention: stopped after 60 s" in text
    assert "FAILS       0.7 >= 0.8    speed" in text and "0 of " in text


def test_a_case_that_fails_is_told_and_the_section_goes_on(parts: SimpleNamespace) -> None:
    heard: list[Any] = []
    report = parts.sections.Report(heard.append, 10)
    with report.case("small"):
        raise WrongResult("off by 1")
    assert [kind for kind, _ in heard] == ["rows", "musts"]
    assert heard[1][1]["holds"] is False and heard[1][1]["why"] == "WrongResult: off by 1"
    with pytest.raises(RuntimeError), report.case("dead"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_processes_of_their_own(parts: SimpleNamespace, tmp_path: Path) -> None:
    """What they sent is there, however they end."""
    (tmp_path / "ends.py").write_text(
        "import os, time\n"
        "def well(send, x): send(x); send(x + 1)\n"
        "def badly(send): send(1); raise ValueError('wrong\\nand more')\n"
        "def hard(send): send(1); os._exit(7)\n"
        "def never(send): send(1); time.sleep(60)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        ends = importlib.import_module("ends")
        heard: list[int] = []
        apart = parts.running.apart
        assert apart(ends.well, (3,), 60, heard.append) is None and heard == [3, 4]
        assert apart(ends.badly, (), 60, heard.append) == "ValueError: wrong"
        assert apart(ends.hard, (), 60, heard.append) == "its process ended with exit code 7"
        assert apart(ends.never, (), 1, heard.append) == "stopped after 1 s"
        assert heard[2:4] == [1, 1]
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("ends", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["tune_attention", "gpu_table"])
def test_without_a_gpu(
    parts: SimpleNamespace, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert getattr(parts, script).main([]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "torch sees none here" in error


def test_gradients_of_some_rows(parts: SimpleNamespace) -> None:
    layout, pattern = TokenLayout(Grid(3, 6, 7)), Neighborhood(3)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (torch.randn(1, 2, 126, 16, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(q, k, v, pattern, layout, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad_out)
    given = (tuple(x.detach() for x in leaves), out.detach(), lse.detach(), grad_out)
    parts.gradients.check_gradients(grads, *given, pattern, layout)
    for number, name in enumerate(("dq", "dk", "dv")):
        for wrong in (1.001 * grads[number], torch.full_like(q, torch.nan)):
            other = [wrong if n == number else x for n, x in enumerate(grads)]
            with pytest.raises(WrongResult, match=f"{name} of Neighborhood"):
                parts.gradients.check_gradients(other, *given, pattern, layout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for the interpreter")
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_measuring_in_the_interpreter(
    parts: SimpleNamespace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a measurement, on few tokens; its numbers mean nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without its interpreter")
    monkeypatch.setitem(SHAPES, "few", Shape(TokenLayout(Grid(2, 4, 8)), 1, 16))
    monkeypatch.setattr(parts.tuning, "CALLS", 1)
    bench = parts.tuning.Bench("sm_80", "few", 1, device="cpu", repeats=1)
    small = (64, 32, 4, 2, False) if kind == "forward" else (64, 32, 32, 16, 4, 1)
    job = parts.tuning.Job(kind, "float32", 16, small, 2)
    assert job.launch == (Launch if kind == "forward" else BackwardLaunch)(*small)
    sent: list[tuple[str, str | None]] = []
    parts.tuning.try_maps(sent.append, bench, job)
    assert sent == [("full", None), ("partial", None), ("radial", None)]
    found = bench.measure(job, "partial")
    assert found["ratio"] > 0 and len(found["samples"]) == 1


def test_densities_that_the_table_holds_patterns_to(parts: SimpleNamespace) -> None:
    layout = parts.sections.HUNYUAN
    assert Radial(0.95).density(layout) == pytest.approx(0.2746, abs=1e-3)
    assert SlidingTile((6, 8, 8), (3, 3, 3)).density(layout) == pytest.approx(0.09)
    assert SlidingTile((6, 8, 8), (5, 5, 5)).density(layout) == pytest.approx(5 / 12)


def test_fields_are_numbers_that_json_gives_back(parts: SimpleNamespace) -> None:
    """Also of entries with spare settings, which a run goes on from."""
    spared = [x for table in BACKWARD.values() for x in table[2].values() if x.spare is not None]
    assert spared
    for launch in spared:
        values = parts.candidates.fields(launch)
        assert json.loads(json.dumps(values)) == list(values)
        assert BackwardLaunch(*values) == replace(launch, spare=None)
