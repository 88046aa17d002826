"""The same result from one process and two, and from a run that was killed at random moments."""

import json
import socket

import pytest
import torch
from support import search_runner
from support.search_runner import finish, heads_of, kept, killed, plan_of, start

KILLS = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The lines of a run in one go, and how many results it keeps."""
    folder = tmp_path_factory.mktemp("search")
    return finish(start(folder)), kept(folder)


@pytest.mark.second
def test_killed_at_random_moments(tmp_path, reference):
    """No file is half written, and what was done is not done again."""
    lines, files = reference
    rest = killed(tmp_path, KILLS, len(lines))
    assert plan_of(rest) == plan_of(lines)
    assert kept(tmp_path) == files
    assert len(rest) < len(lines)


@pytest.mark.second
def test_two_processes(tmp_path, reference):
    """Find what one finds, to the bit, with a device each, and share the work of both searches."""
    lines, files = reference
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        start(
            tmp_path,
            WORLD_SIZE="2",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]
    found = [finish(process) for process in both]
    assert [plan_of(own) for own in found] == [plan_of(lines)] * 2
    assert [heads_of(own)["layers"] for own in found] == [heads_of(lines)["layers"]] * 2
    assert kept(tmp_path) == files
    tasks = [[line for line in own if line.startswith("task ")] for own in (lines, *found)]
    assert len(tasks[1]) + len(tasks[2]) <= 1.2 * len(tasks[0])
    assert min(len(tasks[1]), len(tasks[2])) > 0.3 * len(tasks[0])
    judged = [own.count("judged") for own in (lines, *found)]
    assert judged[0] == judged[1] + judged[2] == 5 and min(judged) >= 2
    log = (tmp_path / "heads.jsonl").read_text().splitlines()
    assert len(log) == 6


@pytest.fixture
def made_up(monkeypatch):
    search_runner.make_up_seconds(monkeypatch.setattr)
    torch.manual_seed(0)


@pytest.mark.second
def test_a_second_search_asks_nothing(tmp_path, made_up):
    """And says the same, but for the time that it took."""
    told = []
    first = search_runner.run(tmp_path, candidates=("band", "windows"))
    again = search_runner.run(
        tmp_path, lambda *line: told.append(line), candidates=("band", "windows")
    )
    assert told == []
    assert again.plan.to_json() == first.plan.to_json()
    same = {key: value for key, value in first.report.items() if key not in ("time", "headline")}
    assert {key: again.report[key] for key in same} == same


def test_a_search_writes_its_receipt(tmp_path, made_up, monkeypatch):
    result = search_runner.run(None, candidates=("band",))
    page = result.save(tmp_path / "out")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "report.html",
        "report.json",
        "visattn_plan.json",
    ]
    report = json.loads((page.parent / "report.json").read_text())
    assert report["plan"] == json.loads(result.plan.to_json())
    assert len(report["clips"]) == 1
    assert report["clips"][0]["dense"]
    assert {row["kind"] for row in report["table"]} >= {"searched", "uniform static", "random"}
    assert sum(row["chosen"] for row in report["front"]) == 1
    assert {claim["holds"] for claim in report["claims"]} <= {True, False}

    def interrupted(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("visattn.search.result.write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save(page.parent)  # a receipt never stands beside another plan
    assert [path.name for path in page.parent.iterdir()] == ["visattn_plan.json"]


@pytest.mark.second
def test_a_plan_for_two_shapes(made_up):
    """Is as fast as was asked for at both, and its error is the mean of both."""
    result = search_runner.run(
        None, candidates=("band", "windows", "stencil"), also=[{"height": 64, "num_frames": 5}]
    )
    notes = [note for note in result.report["notes"] if note.startswith("at 2x")]
    (speed,) = [float(note.split()[-1].removesuffix("x")) for note in notes]
    assert speed >= 1.2 - 0.005
    chosen = next(row for row in result.report["table"] if row["chosen"])
    assert chosen["error"] > 0
