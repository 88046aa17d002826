"""What a search is asked for: a speed, an error, a PSNR, phases."""

import pytest
from support import search_runner

from visattn.search.clip_statistics import PLANNED, ClipStatistics
from visattn.tasks.result_store import StoredResult

pytestmark = pytest.mark.second


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    search_runner.make_up_seconds(monkeypatch.setattr)


def chosen(**options):
    """The result, and the line of its plan in the table."""
    result = search_runner.run(None, candidates=("band", "windows"), **options)
    (row,) = [row for row in result.report["table"] if row["chosen"]]
    return result, row


def test_least_error_at_a_speed():
    result, row = chosen(target_speedup=1.35)
    at_speed = [x for x in result.report["table"] if x["name"].endswith(", 1.35x")]
    assert row["error"] == min(x["error"] for x in at_speed)
    assert len(at_speed) > 3


@pytest.mark.second
def test_fastest_within_an_error():
    """Of the speeds that are tried, and without a goal within 0.05."""
    _, row = chosen(target_speedup=None)
    assert row["error"] <= 0.05
    with pytest.raises(ValueError, match=r"max_error=1e-09 is met by no plan that is faster"):
        chosen(target_speedup=None, max_error=1e-9)


@pytest.mark.second
def test_fastest_within_a_psnr():
    """By clips that are not the held-out ones."""
    result, row = chosen(target_speedup=None, min_psnr=20.0)
    assert row["psnr"] > 15
    assert len(result.report["clips"]) == 1
    with pytest.raises(ValueError, match=r"min_psnr=79 is met by no plan"):
        chosen(target_speedup=None, min_psnr=79.0)


def test_phases_have_patterns_of_their_own():
    result, _ = chosen(phases=2)
    assert result.plan.phases == (0.5,)
    assert {rule.phase for rule in result.plan.rules} - {0, 1} == set()
    assert {row["phase"] for row in result.report["heads"]} == {0, 1}


def test_flips_are_told_by_word():
    def clip(dense, own):
        value = {"dense": {"verdicts": dense}, PLANNED: {"verdicts": own}}
        return "a prompt", 0, StoredResult(value, {})

    clips = ClipStatistics(
        [
            clip({"colour": 1.0, "object": 0.0}, {"colour": 1.0, "object": 1.0}),
            clip({"colour": 1.0, "object": 1.0}, {"colour": 0.0, "object": 1.0}),
        ]
    )
    assert clips.flips(PLANNED) == (2, 4)
    assert clips.why_flips(PLANNED) == (
        "1 of colour, 1 of object; the dense clips match their prompts in 3 of 4 verdicts"
    )
