"""The small parts: steps, prompts, budgets, intervals, teams."""

import math

import pytest
import torch

from visattn.runtime.processes import Processes, ProcessGroup
from visattn.search.arguments import read_budget, split_prompts
from visattn.search.measure import replay
from visattn.search.measure.output_projection import output_weights
from visattn.search.measure.recorded_attention import spread_steps
from visattn.search.measure.statistics import interval
from visattn.tasks.result_store import ResultStore, key_of
from visattn.tasks.runner import Task, TaskRunner, Unfinished


def test_steps_are_spread():
    assert spread_steps(12, 4) == (1, 4, 7, 10)
    assert spread_steps(3, 4) == (0, 1, 2)
    assert spread_steps(1, 1) == (0,)


def test_every_second_prompt_is_held_out():
    used, unseen = split_prompts(["a", "b", "c"], None, [5], 3)
    assert used == [("a", 5), ("c", 5)]
    assert unseen == [("b", 1005), ("b", 1006), ("b", 1007)]


def test_one_prompt_alone_has_other_seeds():
    used, unseen = split_prompts(["a", "a"], None, [0, 1], 2)
    assert used == [("a", 0)]
    assert unseen == [("a", 1001), ("a", 1002)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text", None, [0], 1), "list of texts"),
        (([], None, [0], 1), "prompts is empty"),
        ((["a"], None, [], 1), "seeds is empty"),
        ((["a"], ["a"], [0], 1), "is in prompts too"),
        ((["a"], [], [0], 1), "held_out is empty"),
        ((["a"], None, [-1], 1), "at least 0"),
    ],
)
def test_wrong_prompts_are_refused(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        split_prompts(*arguments)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5 h", 5400), (7, 7), (None, math.inf)]
)
def test_budgets(text, seconds):
    assert read_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-1m", "1d", 0, True])
def test_wrong_budgets_are_refused(text):
    with pytest.raises(ValueError, match="must be a time"):
        read_budget(text)


def test_intervals_are_those_of_student():
    """Of 1 .. 5: mean 3, standard error sqrt(0.5), t(4) = 2.776."""
    found = interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(0.5), abs=1e-3)
    assert 3 - found.low == pytest.approx(found.high - 3)
    assert interval([2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="finite"):
        interval([1.0, math.nan])


class Half(torch.nn.Module):
    """A layer that is linear and no ``Linear``, as adapters are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x):
        return self.inner(x) + 0.5 * self.inner(x)


def test_output_weights_with_and_without_an_adapter():
    plain = torch.nn.Linear(6, 4)
    module = torch.nn.Module()
    module.to_out = torch.nn.ModuleList([plain])
    assert torch.equal(output_weights(module), plain.weight)
    module.to_out = torch.nn.ModuleList([Half(plain)])
    torch.testing.assert_close(output_weights(module), 1.5 * plain.weight)
    assert torch.equal(output_weights(module, torch.nn.Linear(9, 4)), output_weights(module))
    module.to_out, module.inner_dim = None, 6  # a block of one stream, which projects all at once
    both = torch.nn.Linear(6 + 3, 4)
    assert torch.equal(output_weights(module, both), both.weight[:, :6])
    module.to_out = both  # one layer, without dropout behind
    assert torch.equal(output_weights(module), both.weight[:, :6])
    module.to_out = None
    for other in (torch.nn.Identity(), module):
        with pytest.raises(ValueError, match="no linear output projection"):
            output_weights(other)


def tasks(calls, wrong=()):
    def make(n):
        def run():
            calls.append(n)
            if n in wrong:
                raise torch.OutOfMemoryError(f"out of memory at {n}")
            return {"n": n}, {}

        return Task({"n": n}, f"task {n}", run)

    return [make(n) for n in range(4)]


def test_a_team_keeps_what_is_done_and_asks_again_what_failed(tmp_path):
    calls = []
    team = TaskRunner(ResultStore(tmp_path), "about")
    found = team.do("stage", tasks(calls, wrong={2}))
    assert [item and item.value["n"] for item in found] == [0, 1, None, 3]
    assert team.failures == {"stage: task 2": "OutOfMemoryError: out of memory at 2"}
    calls.clear()
    again = TaskRunner(ResultStore(tmp_path), "about").do("stage", tasks(calls))
    assert calls == [2]
    assert [item.value["n"] for item in again] == [0, 1, 2, 3]
    TaskRunner(ResultStore(tmp_path), "another model").do("stage", tasks(calls))
    assert sorted(calls[1:]) == [0, 1, 2, 3]

    def run():
        raise type("CompilationError", (Exception,), {})("at 3:4")  # of a type of its own

    team = TaskRunner(ResultStore(None), "about")
    team.do("stage", [Task("odd", "odd", run), *tasks(calls)])
    assert team.failures == {"stage: odd": "CompilationError: at 3:4"}


class Two(ProcessGroup):
    """The first of two processes, of which the other cannot read some results, as they are in
    memory alone where the disk is full."""

    def __init__(self, *unread):
        super().__init__(Processes(0, 2))
        self.unread = list(unread)

    def gather(self, value):
        return [value, value + self.unread if isinstance(value, list) else value]


def test_what_one_process_cannot_read_no_process_uses(tmp_path):
    """Else two processes would go on with different plans."""
    mine = tasks([])
    unread = key_of("stage", ["about", mine[2].question])
    for own in (1, 3):  # of the other process
        ResultStore(tmp_path).put(key_of("stage", ["about", mine[own].question]), {"n": own})
    team = TaskRunner(ResultStore(tmp_path), "about", group=Two(unread))
    found = team.do("stage", mine)
    assert [item and item.value["n"] for item in found] == [0, 1, None, 3]
    assert team.failures == {"stage: task 2": "a process could not read it"}


def test_two_that_share_a_folder_alone(tmp_path):
    """What another has done by then is not done again, and both go on with what was kept first."""
    calls = []
    mine = tasks(calls)

    def run():
        for own in (
            TaskRunner(ResultStore(tmp_path), "about"),
            TaskRunner(ResultStore(tmp_path), "about"),
        ):
            own.do("stage", tasks(calls))
        return {"n": "later"}, {}

    found = TaskRunner(ResultStore(tmp_path), "about").do(
        "stage", [own._replace(run=run) for own in mine]
    )
    assert [item.value["n"] for item in found] == [0, 1, 2, 3]
    assert sorted(calls) == [0, 1, 2, 3]


def test_what_is_timed_is_of_its_number_of_threads(tmp_path, monkeypatch):
    for threads, timed, anew in ((1, True, 4), (2, True, 4), (1, True, 0), (1, False, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        calls = []
        TaskRunner(ResultStore(tmp_path), "about").do("stage", tasks(calls), timed=timed)
        assert len(calls) == anew
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    TaskRunner(ResultStore(tmp_path), "about").do("stage", tasks(calls := []))
    assert calls == []


def test_a_stage_of_which_nothing_is_done_ends_the_search():
    with pytest.raises(Unfinished, match=r"stage failed for all of 4: OutOfMemoryError"):
        TaskRunner(ResultStore(None), "about").do("stage", tasks([], wrong=set(range(4))))


def test_progress_has_the_time_left(tmp_path):
    told = []
    TaskRunner(ResultStore(tmp_path), "about", lambda *line: told.append(line)).do(
        "stage", tasks([])
    )
    assert [line[:3] for line in told] == [("stage", n, 4) for n in range(5)]
    assert told[0][3] is None
    assert told[-1][3] == 0


def test_arguments_that_are_recorded_keep_their_kind():
    """Some denoisers ask whether an argument is a list."""
    given = {"shapes": [(1, 2, 3), [4]], "x": torch.ones(2), "none": None}
    tensors = {}
    found = replay._take(replay._put(replay._copied(given), tensors), tensors, torch.device("cpu"))
    assert found["shapes"] == given["shapes"]
    assert [type(own) for own in found["shapes"]] == [tuple, list]
    assert torch.equal(found["x"], given["x"])
