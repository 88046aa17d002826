"""Progress on stderr: plain lines, bars in a terminal and in a notebook, several processes."""

import sys
import types

from visattn.runtime import progress
from visattn.runtime.progress import ProgressBar, close_bars


def in_terminal(monkeypatch):
    """Let stderr, as the test has it, be a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def show(bar, *calls):
    for call in calls:
        bar(*call)


def test_lines_for_each_tenth(capsys):
    show(ProgressBar(), *(("read", done, 100, 10.0 - done / 10) for done in range(101)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "read: 0/100, 10 s left"
    assert lines[-1] == "read: 100/100"
    assert [line.split("/")[0] for line in lines] == [f"read: {n}" for n in range(0, 101, 10)]


def test_stages_that_are_small_and_time_that_is_not_known(capsys):
    show(ProgressBar("A"), ("read", 0, 1, None), ("read", 1, 1, 0.0), ("try", 1, 1, None))
    assert capsys.readouterr().err == "A, read: 0/1\nA, read: 1/1\nA, try: 1/1\n"


def test_a_line_for_each_call(capsys):
    show(ProgressBar(every=True), *(("step", done, 50, None) for done in range(1, 51)))
    assert len(capsys.readouterr().err.splitlines()) == 50


def test_a_bar_for_each_stage_of_a_terminal(capsys, monkeypatch):
    in_terminal(monkeypatch)
    bar = ProgressBar("A")
    show(bar, ("read", 0, 2, None), ("read", 2, 2, 0.0), ("try", 1, 3, None))
    err = capsys.readouterr().err
    assert err.startswith("\rA, read: ") and "2/2" in err
    assert err.count("\n") == 1  # the second stage is not done
    close_bars()
    assert capsys.readouterr().err.endswith("\n")
    close_bars()
    assert capsys.readouterr().err == ""


def test_a_stage_that_begins_anew_and_one_that_grows(capsys, monkeypatch):
    in_terminal(monkeypatch)
    bar = ProgressBar()
    show(bar, ("read", 1, 2, None), ("read", 2, 4, None))
    assert (bar.bar.n, bar.bar.total) == (2, 4)
    show(bar, ("read", 0, 4, None))
    assert bar.bar.n == 0
    close_bars()
    assert capsys.readouterr().err.count("\n") == 2


def test_several_processes_write_lines(capsys, monkeypatch):
    in_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    show(ProgressBar(), ("read", 1, 2, None))
    show(ProgressBar("line 3"), ("step", 1, 2, None))
    assert capsys.readouterr().err == "process 1, read: 1/2\nline 3, step: 1/2\n"


def test_a_notebook_has_bars(monkeypatch):
    assert not ProgressBar().draws
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress._in_notebook() and ProgressBar().draws
    shell.config = {}  # IPython in a terminal
    assert not progress._in_notebook()
