"""Attention calls are shown as they are, and showing them changes nothing."""

import pytest
import torch
from support import tiny
from torch.nn.functional import scaled_dot_product_attention

from visattn.inject import apply_plan, observe, summary
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule

PLAN = Plan((Rule(Diagonal(2), pass_="cond"),), dense_layers=(0,))


@pytest.mark.parametrize("planned", [False, True], ids=["dense", "plan"])
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_call_is_shown_and_nothing_changes(name, planned):
    pipe = tiny.PIPELINES[name]()
    if planned:
        apply_plan(pipe, PLAN)
    before, expected = tiny.footprint(pipe), tiny.generate(pipe)
    counts = [row.sparse_calls for row in summary(pipe).layers]
    seen = []
    with observe(pipe, seen.append):
        assert torch.equal(tiny.generate(pipe), expected)
    assert tiny.footprint(pipe) == before
    assert [row.sparse_calls for row in summary(pipe).layers] == counts
    batched = "cogvideox" in name
    passes = [("uncond", "cond")] if batched else [("cond",), ("uncond",)]
    places = [(o.step, o.passes, o.number) for o in seen]
    wanted = [(s, p, n) for s in range(3) for p in passes for n in range(tiny.LAYERS)]
    assert places == wanted
    for o in seen:
        assert o.steps == 3
        assert o.layer == tiny.paths(name)[o.number]
        assert o.layout == tiny.layout(name)
        assert o.q.shape == (1 + batched, tiny.HEADS, o.layout.length, tiny.DIM)
        assert o.k.shape == o.v.shape == o.q.shape
        assert o.scale is None
        # "a red square moves right" and "blue circle", each with the token at its end
        texts = {"cond": [[6]], "uncond": [[3]]}[o.passes[0]] if name == "hunyuanvideo" else None
        assert (None if o.text_lengths is None else o.text_lengths.tolist()) == texts
    if name == "wan22":
        assert {o.role for o in seen if o.step == 0} == {"transformer"}
        assert {o.role for o in seen if o.step == 2} == {"transformer_2"}


def test_what_is_shown_is_what_is_computed():
    """The shown tensors give the layer's output."""
    pipe = tiny.wan21()
    module, outputs, seen = pipe.transformer.blocks[1].attn1, [], []
    module.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with observe(pipe, seen.append, ["blocks.1.attn1"]):
        tiny.generate(pipe)
    assert len(seen) == len(outputs) == 6
    for o, output in zip(seen, outputs, strict=True):
        heads = scaled_dot_product_attention(o.q, o.k, o.v).transpose(1, 2).flatten(2)
        with torch.no_grad():
            assert torch.allclose(module.to_out[0](heads), output, atol=1e-6)


def test_observers_nest_and_leave_on_an_exception():
    pipe = tiny.wan21()
    before, outer, inner = tiny.footprint(pipe), [], []

    def stop(observation):
        inner.append(observation)
        raise RuntimeError("seen enough")

    with (
        pytest.raises(RuntimeError, match="seen enough"),
        observe(pipe, outer.append, ["blocks.0.attn1", "blocks.1.attn1"]),
        observe(pipe, stop, ["blocks.1.attn1"]),
    ):
        tiny.generate(pipe)
    assert [o.number for o in outer] == [0, 1]
    assert [o.number for o in inner] == [1]
    assert tiny.footprint(pipe) == before


def test_unknown_layer_is_refused():
    pipe = tiny.wan21()
    with (
        pytest.raises(ValueError, match=r"layers holds 'blocks.9.attn1'"),
        observe(pipe, print, ["blocks.9.attn1"]),
    ):
        raise AssertionError("not reached")
