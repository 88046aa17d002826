"""Plans together with the attention backends and processors of diffusers."""

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from support import tiny
from support.planned import HEADS, KINDS, PLAN, attention, calls, traces, usual

from visattn.inject import apply_plan, remove_plan, summary
from visattn.plan import Plan, Rule

MATH = AttentionBackendName._NATIVE_MATH
UNCOND_DENSE = Plan((Rule(HEADS[:1] * 4, pass_="cond"),))  # 3 steps: as many dense calls as sparse


@pytest.fixture(autouse=True)
def active_backend():
    """The process-wide backend is the user's: no test leaves it changed, and we never change it."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


class Counting:
    """Counts the calls of an attention backend of diffusers."""

    def __init__(self, monkeypatch, name):
        self.calls = 0
        own = _AttentionBackendRegistry._backends[name]

        def counted(*args, **kwargs):
            self.calls += 1
            return own(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)


@pytest.mark.parametrize("way", ["before", "after", "context", "reset"])
def test_dense_calls_run_the_backend_of_the_user(way, monkeypatch):
    pipe = tiny.wan21()
    cross, own = 2 * 3 * tiny.LAYERS, 3 * tiny.LAYERS
    if way == "before":
        pipe.transformer.set_attention_backend("_native_math")
    tiny.generate(pipe)
    before = traces(pipe)
    apply_plan(pipe, UNCOND_DENSE)
    if way in ("after", "reset"):
        pipe.transformer.set_attention_backend("_native_math")
    if way == "reset":
        pipe.transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    active = _AttentionBackendRegistry._active_backend
    math, native = Counting(monkeypatch, MATH), Counting(monkeypatch, AttentionBackendName.NATIVE)
    if way == "context":
        with attention_backend("_native_math"):
            tiny.generate(pipe)
            assert _AttentionBackendRegistry._active_backend is MATH
    else:
        tiny.generate(pipe)
    assert calls(pipe) == [(3, 3)] * tiny.LAYERS
    counts = (math.calls, native.calls)
    assert counts == ((0, cross + own) if way == "reset" else (cross + own, 0))
    assert _AttentionBackendRegistry._active_backend is active
    remove_plan(pipe)
    assert _AttentionBackendRegistry._active_backend is active
    left = {id(m.processor): m.processor._attention_backend for m in attention(pipe.transformer)}
    asked = MATH if way in ("before", "after") else None
    assert list(left.values()) == [asked] * tiny.LAYERS
    if way in ("before", "context"):
        assert traces(pipe) == before
    if way == "before":
        pipe.transformer.reset_attention_backend()
        assert all(m.processor._attention_backend is None for m in attention(pipe.transformer))


def test_backend_is_nothing_to_choose_by_name():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    with pytest.raises(ValueError, match="not registered"), attention_backend("visattn"):
        pass
    with pytest.raises(ValueError, match="must be one of"):
        pipe.transformer.set_attention_backend("visattn")


def test_backend_set_between_the_passes_of_a_step():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)

    def callback(pipe, step, timestep, tensors):
        pipe.transformer.set_attention_backend("native")
        return tensors

    found = tiny.generate(pipe, callback_on_step_end=callback)
    assert torch.equal(found, usual("wan21", PLAN))
    assert calls(pipe) == [(0, 6)] * tiny.LAYERS


def fresh(kind):
    return WanAttnProcessor() if kind == "wan21" else CogVideoXAttnProcessor2_0()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "one for all"])
@pytest.mark.parametrize("when", ["before", "after", "while it runs"])
@pytest.mark.parametrize("kind", KINDS)
def test_processors_are_replaced(kind, when, shared):
    pipe = tiny.PIPELINES[kind]()
    dense = tiny.generate(pipe)
    model = pipe.transformer

    def replace(*_):
        one = fresh(kind)
        new = {name: one if shared else fresh(kind) for name in model.attn_processors}
        model.set_attn_processor(one if shared else new)
        return {}

    options = {}
    old = dict(model.attn_processors)
    old_state = {name: dict(vars(processor)) for name, processor in old.items()}
    if when == "before":
        replace()
    clean = {name: dict(vars(processor)) for name, processor in model.attn_processors.items()}
    apply_plan(pipe, PLAN)
    if when == "after":
        replace()
    if when == "while it runs":
        options["callback_on_step_end"] = replace
    assert torch.equal(tiny.generate(pipe, **options), usual(kind, PLAN))
    assert calls(pipe) == [(0, 6 if kind == "wan21" else 3)] * tiny.LAYERS
    remove_plan(pipe)
    left = {name: dict(vars(processor)) for name, processor in model.attn_processors.items()}
    assert left == clean
    assert torch.equal(tiny.generate(pipe), dense)
    # and what was replaced is as it was
    assert {name: dict(vars(processor)) for name, processor in old.items()} == old_state
    model.set_attn_processor(dict(old))
    assert torch.equal(tiny.generate(pipe), dense)


def test_processor_of_layers_and_cross_attention_keeps_its_backend(monkeypatch):
    """One processor for all modules, with a backend that is not the active one."""
    pipe = tiny.wan21()
    processor = WanAttnProcessor()
    processor._attention_backend = MATH
    pipe.transformer.set_attn_processor(processor)
    apply_plan(pipe, UNCOND_DENSE)
    math, native = Counting(monkeypatch, MATH), Counting(monkeypatch, AttentionBackendName.NATIVE)
    tiny.generate(pipe)
    assert (math.calls, native.calls) == (2 * 3 * tiny.LAYERS + 3 * tiny.LAYERS, 0)
    assert calls(pipe) == [(3, 3)] * tiny.LAYERS
    remove_plan(pipe)
    assert vars(processor) == {"_attention_backend": MATH}


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections_of_cogvideox_replace_processors(when):
    pipe = tiny.cogvideox()
    plain = tiny.generate(pipe)
    if when == "before":
        pipe.transformer.fuse_qkv_projections()
    apply_plan(pipe, PLAN)
    if when == "after":
        pipe.transformer.fuse_qkv_projections()
    processors = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert processors == {"FusedCogVideoXAttnProcessor2_0"}
    torch.testing.assert_close(tiny.generate(pipe), usual("cogvideox", PLAN))
    assert calls(pipe) == [(0, 3)] * tiny.LAYERS
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.generate(pipe), usual("cogvideox", PLAN))
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), plain)


class OwnWay:
    """A processor that computes attention itself."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_processor_that_cannot_be_reached_is_said(caplog):
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    first = pipe.transformer.blocks[0].attn1
    before = first.processor
    first.processor = OwnWay()
    tiny.generate(pipe)
    assert "OwnWay" in caplog.text
    assert [row.reason is None for row in summary(pipe).layers] == [False, True, True]
    first.processor = before
    assert torch.equal(tiny.generate(pipe), usual("wan21", PLAN))
    remove_plan(pipe)
