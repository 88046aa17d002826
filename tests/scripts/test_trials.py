"""The cases of scripts/trials.py: every area has some, and one that fails is told."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
AREAS = {
    "authors",
    "calibration",
    "callstate",
    "cli",
    "guidance",
    "kernels",
    "numerics",
    "parallel",
    "passes",
    "processes",
}


@pytest.fixture
def trials(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import trials

    return trials


def test_every_area_has_cases(trials):
    names = trials.named_cases()
    assert {name.partition(":")[0] for name in names} == AREAS
    assert len(names) >= 60


def test_a_case_that_fails_is_told(trials, capsys, monkeypatch, tmp_path):
    from trial_cases.case import Case

    def fails(folder):
        assert not list(folder.iterdir())
        raise KeyError("a key")

    own = {"x: a": Case("a", lambda folder: "seen"), "x: b": Case("b", fails)}
    monkeypatch.setattr(trials, "named_cases", lambda: own)
    assert trials.main([]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("ok   x: a: seen")
    assert second.startswith("FAIL x: b: KeyError: 'a key'")
    assert last == "1 of 2"
    assert trials.main(["--only", "x: a"]) == 0
