"""What a search keeps is found again by the same search alone: one change, another key."""

from types import SimpleNamespace

import pytest
import torch
from support import tiny

from visattn.metrics.caption_scorer import caption_scorer
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule
from visattn.search import request as requests
from visattn.search.arguments import Settings
from visattn.search.measure.target import SearchTarget
from visattn.search.request import SearchRequest, runner_of
from visattn.search.stages.observe import observe_dense
from visattn.search.stages.plan_errors import PlanErrors
from visattn.search.stages.validate import step_speedups, validate
from visattn.tasks.result_store import key_of

CALL = {"height": 96, "width": 64, "num_frames": 9, "num_inference_steps": 3}
PLAN = Plan((Rule((Diagonal(4),)),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.wan21()


class Asked(Exception):
    """The key of the first task of a stage."""


def keys(pipe, call=CALL, prompts=(("a", 0),), steps=(0,), scorer=caption_scorer, pairs=1):
    """Of the stages, by name, without running them."""
    target = SearchTarget(pipe, call, None)
    runner = runner_of(target)
    settings = Settings(pairs=pairs)
    request = SearchRequest(
        target, prompts, [("b", 1000)], runner, settings=settings, scorer=scorer
    )
    runner.do = lambda stage, tasks, **_: raised(key_of(stage, [runner.about, tasks[0][0]]))
    replay = SimpleNamespace(
        calls=[SimpleNamespace(role="transformer", name=n, step=n, passes=None) for n in steps]
    )
    found = {}
    for name, stage in {
        "dense": lambda: observe_dense(request),
        "errors": lambda: PlanErrors([(request, replay)])([PLAN], "plans"),
        "steps": lambda: step_speedups(request, None, replay, {"plan": PLAN}),
        "validate": lambda: validate(request, {"plan": PLAN}),
    }.items():
        with pytest.raises(Asked) as key:
            stage()
        found[name] = str(key.value)
    return found


def raised(key):
    raise Asked(key)


def other_scorer(frames, prompt):
    return {}


def test_keys_of_several_processes_are_the_same(pipe, monkeypatch):
    first = keys(pipe)
    assert len(set(first.values())) == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    for index in (0, 1):
        own = torch.device("cpu", index)
        monkeypatch.setattr(SearchTarget, "device", property(lambda self, own=own: own))
        assert keys(pipe) == first


def test_one_change_is_another_key(pipe, monkeypatch):
    first = keys(pipe)
    all_ = set(first)

    def changed(**given):
        found = keys(pipe, **given)
        return {name for name in all_ if found[name] != first[name]}

    assert changed() == set()
    assert changed(call=CALL | {"num_inference_steps": 4}) == all_
    assert changed(prompts=(("a", 1),)) == {"errors", "steps"}
    assert changed(steps=(0, 1)) == {"errors", "steps"}
    assert changed(scorer=other_scorer) == changed(scorer=None) == {"validate"}
    with monkeypatch.context() as patch:
        patch.setattr(requests, "versions", lambda names: dict.fromkeys(names, "9"))
        assert changed() == all_
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        patch.setattr(SearchTarget, "device", property(lambda self: torch.device("cuda", 1)))
        assert changed() == all_
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", tiny.wan22().scheduler)
        assert changed() == all_
