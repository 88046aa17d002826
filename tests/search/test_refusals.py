"""What a search refuses, in one sentence, and what it survives."""

import pytest
import torch
from support import search_runner, tiny

import visattn
from visattn.search.measure import replay
from visattn.search.stages import price as price_stage


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    search_runner.make_up_seconds(monkeypatch.setattr)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_error": 0.1}, "target_speedup and max_error exclude each other"),
        ({"target_speedup": 1.0}, "must be a number above 1"),
        ({"target_speedup": "1.3"}, "target_speedup='1.3' must be a number above 1"),
        ({"target_speedup": None, "min_psnr": [30]}, r"min_psnr=\[30\] must be a number above 0"),
        ({"target_speedup": None, "min_psnr": float("nan")}, "must be a number above 0"),
        ({"budget": "soon"}, "must be a time such as"),
        ({"phases": 0}, "phases=0 must be at least 1"),
        ({"seeds": []}, "seeds is empty"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        search_runner.run(None, **options)


def test_wrong_calls_and_pipelines():
    with pytest.raises(ValueError, match=r"unknown key 'size'; keys are negative_prompt"):
        visattn.search(tiny.wan21(), ["a"], call={"size": 3})
    with pytest.raises(TypeError, match="a denoiser alone"):
        visattn.search(tiny.wan21().transformer, ["a"])


def test_a_candidate_that_is_none(monkeypatch):
    """It is refused before anything is generated."""
    monkeypatch.delattr("visattn.search.run.observe_dense")
    with pytest.raises(ValueError, match="candidates holds 'bands'; families are 'band', "):
        search_runner.run(None, candidates=("bands",))


@pytest.mark.second
def test_a_speed_that_is_not_to_be_had():
    """It says what is, and what no attention at all would give."""
    with pytest.raises(ValueError, match=r"target_speedup=9 is out of reach: .*x; skipping"):
        search_runner.run(None, candidates=("band",), target_speedup=9)


@pytest.mark.second
def test_a_layer_that_is_not_finite_stays_dense(monkeypatch):
    """And is told of; the others have their patterns."""
    broken = "blocks.1.attn1"
    own = price_stage.CandidateScorer.__call__

    def score(self, observation):
        if observation.layer == broken:
            q = torch.full_like(observation.q, torch.nan)
            observation = price_stage.Observation(**{**vars(observation), "q": q})
        own(self, observation)

    monkeypatch.setattr(price_stage.CandidateScorer, "__call__", score)
    result = search_runner.run(None, candidates=("band",))
    assert all(rule.layer != broken for rule in result.plan.rules)
    assert result.plan.rules
    assert any(broken in row["item"] for row in result.report["failures"])
    assert any(broken in note for note in result.report["notes"])


@pytest.mark.second
def test_a_plan_that_cannot_run_is_left_out(monkeypatch):
    """Here every second one."""
    own = replay.Replay.error
    count = 0

    def sometimes(self, plan, **kwargs):
        nonlocal count
        count += 1
        if count % 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(self, plan, **kwargs)

    monkeypatch.setattr(replay.Replay, "error", sometimes)
    result = search_runner.run(None, candidates=("band", "windows"))
    assert result.plan.rules
    assert {row["error"] for row in result.report["failures"]} == {
        "OutOfMemoryError: out of memory"
    }
