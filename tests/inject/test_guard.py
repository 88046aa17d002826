"""The guard: heads predicted to be slower than dense attention run dense, which is said."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from support import tiny

import visattn.inject.layers.first_calls as watch
import visattn.inject.layers.guard as guard
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
        def own(device, dtype, head_size, dense_attention):
            asked.append((torch.device(device).type, dtype, head_size, dense_attention.name))
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
    assert set(asked) == {("cpu", torch.float32, 16, "native")}
    said = [line for line in caplog.messages if "Diagonal(width=3) runs dense" in line]
    assert len(said) == 1
    assert "guard=False or VISATTN_GUARD=0 runs it anyway" in said[0]
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


def test_it_is_compared_with_the_backend_that_the_pipeline_runs(calibrated):
    """The one of its processors, or the one that is active in the process."""
    from diffusers.models.attention_dispatch import attention_backend

    pipe = tiny.wan21()
    asked = calibrated(SLOW)
    apply_plan(pipe, Diagonal(3), guard=True)
    with attention_backend("_native_math"):
        tiny.generate(pipe)
    assert {name for *_, name in asked} == {"_native_math"}
    asked.clear()
    pipe.transformer.set_attention_backend("_native_math")
    tiny.generate(pipe)  # decided already
    assert not asked
    pipe.transformer.set_attention_backend("native")
    tiny.generate(pipe)
    assert {name for *_, name in asked} == {"native"}


def test_dense_attention_of_a_backend_is_what_is_timed(monkeypatch):
    """It is called with tensors of the calibration, heads first."""
    from diffusers.models import attention_dispatch

    from visattn.inject.layers.stock_attention import dense_attention

    pipe = tiny.wan21()
    pipe.transformer.set_attention_backend("_native_math")
    own = dense_attention(pipe.transformer.blocks[0].attn1)
    assert own.name == "_native_math"
    q, k, v = torch.randn(3, 1, 4, 24, 16)
    seen = []
    real = attention_dispatch._AttentionBackendRegistry._backends["_native_math"]

    def run(*args, **kwargs):
        seen.append(kwargs["query"].shape)
        return real(*args, **kwargs)

    monkeypatch.setitem(
        attention_dispatch._AttentionBackendRegistry._backends, own_name(own.name), run
    )
    out = own.run(q, k, v)
    assert seen == [(1, 24, 4, 16)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(out, expected, atol=1e-6)


def own_name(name):
    """A backend of diffusers by its name."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(name)


@pytest.fixture
def one_second_calls(monkeypatch):
    """The clock of the watch goes on by a second at each look."""
    clock = iter(range(10**9))
    monkeypatch.setattr(watch.time, "thread_time", lambda: float(next(clock)))


def run_calls(pipe, count):
    """Generations until every layer has had so many calls."""
    for _ in range(count):
        tiny.generate(pipe)


def test_calls_that_contradict_the_file_have_the_device_measured_again(
    calibrated, one_second_calls, monkeypatch, caplog
):
    """A file that was made on a busy machine has dense attention too slow."""
    pipe = tiny.wan21()
    dense = tiny.generate(pipe)
    wrong = replace(FAST, dense=1e-8)  # much less than the second that calls take
    calibrated(wrong)
    measured = []

    def again(*args):
        measured.append(args)
        calibrated(SLOW)
        return True

    monkeypatch.setattr(guard, "measured_again", again)
    apply_plan(pipe, Diagonal(3), guard=True)
    with caplog.at_level(logging.WARNING, "visattn"):
        run_calls(pipe, watch.CALLS + 1)
    assert measured
    assert {row.reason for row in summary(pipe).layers} == {
        "none of its heads would be faster than dense attention"
    }
    assert torch.equal(tiny.generate(pipe), dense)
    assert any("the device has been measured again" in line for line in caplog.messages)


def test_calls_that_contradict_a_second_measurement_run_dense(
    calibrated, one_second_calls, monkeypatch
):
    pipe = tiny.wan21()
    dense = tiny.generate(pipe)
    calibrated(replace(FAST, dense=1e-8))
    monkeypatch.setattr(guard, "measured_again", lambda *_: False)
    apply_plan(pipe, Diagonal(3), guard=True)
    run_calls(pipe, 2 * watch.CALLS + 1)
    assert torch.equal(tiny.generate(pipe), dense)
    for row in summary(pipe).layers:
        assert "its sparse calls take 1e+03 ms" in row.reason, row


def test_calls_that_hold_are_not_measured_again(calibrated, monkeypatch):
    pipe = tiny.wan21()
    calibrated(FAST)  # which has dense attention take a millisecond a pair
    monkeypatch.setattr(guard, "measured_again", lambda *_: pytest.fail("it was measured again"))
    apply_plan(pipe, Diagonal(3), guard=True)
    run_calls(pipe, watch.CALLS + 1)
    assert all(row.dense_calls == 0 for row in summary(pipe).layers)


class Event:
    """An event of a GPU, on a stream of which the work takes a second at each look."""

    clock = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.stream, self.time = stream, next(self.clock)

    def query(self):
        return True

    def elapsed_time(self, end):
        assert end.stream == self.stream
        return 1e3 * (end.time - self.time)


def test_calls_on_another_gpu_than_the_current_one_are_timed_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    own = watch.Watch(0.5, True, False)
    for _ in range(watch.CALLS + 1):
        assert not own.contradicts
        with own.call(torch.device("cuda:1")):
            pass
    assert own.contradicts and own.seconds == [1.0] * watch.CALLS


def test_copy_of_a_model_decides_for_itself(calibrated):
    pipe = tiny.wan21()
    calibrated(FAST)
    apply_plan(pipe, Diagonal(3), guard=True)
    tiny.generate(pipe)
    other = copy.deepcopy(pipe.transformer)
    layers = [model._visattn.layers[0] for model in (pipe.transformer, other)]
    assert [bool(layer._guard._decisions) for layer in layers] == [True, False]
