"""The guard: heads predicted to be slower than dense attention run dense, which is said."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch

import visattn.inject.guard as guard
from visattn.cost import Calibration, device_name
from visattn.inject import apply_plan, observe, sparse, summary
from visattn.patterns import Dense, Diagonal, Skip, Stripe
from visattn.plan import Plan, Rule
from visattn.selectors import TopBlocks

FAST = Calibration("planted", "blockwise", "float32", 16, (64, 64), 1, *([1e-12] * 6), 1e-3)
SLOW = Calibration("planted", "blockwise", "float32", 16, (64, 64), 1, *([1e-3] * 6), 1e-12)
MIXED = Plan((Rule((Dense(), Diagonal(3), Skip(), Stripe())),))


@pytest.fixture
def calibrated(monkeypatch):
    """Put a calibration in place of the measurement; gives what was asked for."""
    asked = []

    def put(found):
        def own(device, dtype, head_size):
            asked.append((torch.device(device).type, dtype, head_size))
            return found

        monkeypatch.setattr(guard, "calibration_of", own)
        return asked

    return put


def test_slow_heads_run_dense_and_are_told_once(calibrated, caplog):
    pipe = tiny.wan21()
    dense = tiny.generate(pipe)
    asked = calibrated(SLOW)
    apply_plan(pipe, Diagonal(3), guard=True)
    with caplog.at_level(logging.WARNING, "visattn"):
        assert torch.equal(tiny.generate(pipe), dense)
        tiny.generate(pipe)
    assert set(asked) == {("cpu", torch.float32, 16)}
    said = [line for line in caplog.messages if "Diagonal(width=3) runs dense" in line]
    assert len(said) == 1
    assert "guard=False or VISATTN_GUARD=0 runs it all the same" in said[0]
    found = summary(pipe)
    assert all(row.sparse_calls == 0 and row.dense_calls > 0 for row in found.layers)
    assert {row.reason for row in found.layers} == {
        "none of its heads would be faster than dense attention"
    }


def test_fast_heads_run_as_the_plan_says(calibrated):
    pipe = tiny.wan21()
    apply_plan(pipe, MIXED, guard=False)
    without = tiny.generate(pipe)
    calibrated(FAST)
    apply_plan(pipe, MIXED, guard=True)
    assert torch.equal(tiny.generate(pipe), without)
    assert all(row.dense_calls == 0 and row.reason is None for row in summary(pipe).layers)


def test_only_the_slow_pattern_runs_dense(calibrated, monkeypatch):
    pipe = tiny.wan21()
    calibrated(FAST)
    real = guard.layer_cost

    def cost(patterns, *rest, **options):
        found = real(patterns, *rest, **options)
        return found._replace(seconds=2 * found.dense) if set(patterns) == {Stripe()} else found

    monkeypatch.setattr(guard, "layer_cost", cost)
    apply_plan(pipe, MIXED, guard=True)
    found = tiny.generate(pipe)
    heads = (Dense(), Diagonal(3), Skip(), Dense())
    with sparse(pipe, Plan((Rule(heads),)), guard=False):
        assert torch.equal(tiny.generate(pipe), found)


def test_dynamic_patterns_and_explicit_backends_are_left_alone(calibrated):
    pipe = tiny.wan21()
    asked = calibrated(SLOW)
    with sparse(pipe, TopBlocks(0.5, block=16), guard=True):
        tiny.generate(pipe)
        assert all(row.dense_calls == 0 for row in summary(pipe).layers)
    asked.clear()
    with sparse(pipe, Diagonal(3), backend="blockwise", guard=True):
        tiny.generate(pipe)
        assert all(row.dense_calls == 0 for row in summary(pipe).layers)
    assert not asked


def test_the_environment_is_the_default(calibrated, monkeypatch):
    pipe = tiny.wan21()
    asked = calibrated(SLOW)
    apply_plan(pipe, Diagonal(3))  # the tests' environment has VISATTN_GUARD=0
    tiny.generate(pipe)
    assert not asked
    monkeypatch.delenv("VISATTN_GUARD")
    apply_plan(pipe, Diagonal(3))
    with observe(pipe, lambda _: None):
        tiny.generate(pipe)
    assert asked
    asked.clear()
    apply_plan(pipe, Diagonal(3), guard=False)
    with observe(pipe, lambda _: None):
        tiny.generate(pipe)
    assert not asked


def test_a_copy_of_a_guarded_pipeline_decides_for_itself(calibrated):
    import copy

    pipe = tiny.wan21()
    calibrated(SLOW)
    apply_plan(pipe, Diagonal(3), guard=True)
    first = tiny.generate(pipe)
    assert torch.equal(tiny.generate(copy.deepcopy(pipe)), first)


def test_a_plan_that_was_measured_here_is_not_guarded(calibrated, monkeypatch):
    """Unless it was measured on another device, or the guard is asked for."""
    monkeypatch.setenv("VISATTN_GUARD", "1")
    pipe = tiny.wan21()
    asked = calibrated(SLOW)
    here = device_name(torch.device("cpu"))
    for where, wanted, guarded in ((here, None, 0), (here, True, 1), ("another", None, 1)):
        plan = Plan((Rule(Diagonal(3)),), evidence={"measured_on": where})
        apply_plan(pipe, plan, guard=wanted)
        asked.clear()
        tiny.generate(pipe)
        assert bool(asked) == bool(guarded)
