"""The summary of a pipeline with a plan: its numbers by hand, and its table."""

import json

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from support import tiny

from visattn import Grid, TokenLayout
from visattn.attention import choose_backend
from visattn.inject import apply_plan, observe, remove_plan, summary
from visattn.inject.models.denoisers import attention_layers, known_denoisers
from visattn.patterns import Dense, Diagonal, Skip
from visattn.plan import Plan, Rule

HEADS = (Dense(), Diagonal(3), Skip(), Skip())
PLAN = Plan((Rule(HEADS), Rule(Skip(), layer="blocks.2.attn1", pass_="uncond")), dense_layers=(0,))


def test_summary_without_a_plan():
    assert str(summary(tiny.wan21())) == "no layer has a plan: all attention is dense"
    assert summary(tiny.wan21()).numbers()["layers"] == []


def test_numbers_of_a_summary():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    before = summary(pipe)
    assert (before.layout, before.attention_share, before.layers[0].density) == (None, None, None)
    tiny.generate(pipe)
    numbers = summary(pipe).numbers()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["layout"] == "3x6x4"
    assert numbers["dense_layers"] == 1
    rows = {(row["layer"], row["pass"]): row for row in numbers["layers"]}
    assert set(rows) == {(f"blocks.{n}.attn1", p) for n in (1, 2) for p in ("any", "uncond")}
    row = rows["blocks.1.attn1", "any"]
    kept = 72 + 2 * (71 + 70 + 69)  # |p_q - p_k| <= 3
    assert row["density"] == pytest.approx((1 + kept / 72**2) / 4)
    assert row["patterns"] == {"Skip()": 2, "Dense()": 1, "Diagonal(width=3)": 1}
    assert (row["sparse_calls"], row["dense_calls"], row["reason"]) == (6, 0, None)
    assert rows["blocks.2.attn1", "uncond"]["density"] == 0
    share = numbers["attention_share"]
    weights = sum(
        m.weight.numel() for m in pipe.transformer.modules() if type(m).__name__ == "Linear"
    )
    attention = 3 * 2 * 72**2 * 64
    assert share == pytest.approx(attention / (attention + 72 * weights))


def test_a_call_chooses_its_backend_once(monkeypatch):
    """Also where a batch has two passes with different patterns."""
    pipe = tiny.cogvideox()
    calls = []

    def counted(*args):
        calls.append(args)
        return choose_backend(*args)

    monkeypatch.setattr("visattn.attention.choice.choose_backend", counted)
    monkeypatch.setattr("visattn.inject.layers.layer.choose_backend", counted)
    rules = Rule((Dense(), Diagonal(3)) * 2), Rule(Diagonal(1), pass_="uncond")
    apply_plan(pipe, Plan(rules), guard=False)
    calls.clear()
    tiny.generate(pipe, steps=1)
    sparse_calls = {row.layer: row.sparse_calls for row in summary(pipe).layers}
    assert len(calls) == sum(sparse_calls.values()) > 0


def test_share_of_attention_where_the_configuration_names_no_heads():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    tiny.generate(pipe, steps=1)
    expected = summary(pipe).attention_share
    model = pipe.transformer
    sizes = {"patch_size": model.config.patch_size}
    model._internal_dict = FrozenDict(sizes)
    assert summary(pipe).attention_share == expected
    for layer in attention_layers(model, known_denoisers(pipe)["transformer"][1]).values():
        del layer.inner_dim
    assert summary(pipe).attention_share == expected  # by the projection of the queries
    layer.to_q = torch.nn.Identity()
    found = summary(pipe)
    assert (found.attention_share, found.most_speedup) == (None, None)
    assert len(found.layers) == 4


def test_layers_that_are_observed_alone_have_no_row():
    pipe = tiny.wan21()
    with observe(pipe, lambda _: None):
        tiny.generate(pipe, steps=1)
        assert summary(pipe).layers == ()


def test_table_of_a_summary():
    pipe = tiny.wan22()
    apply_plan(pipe, Plan((Rule(HEADS),), geometry=TokenLayout(Grid(3, 6, 4))))
    text = str(summary(pipe))
    assert text.startswith("plan on 6 of 6 attention layers, backend auto, tokens 3x6x4\n")
    assert "  always  " in text
    assert "transformer.blocks.0.attn1 and 2 more" in text
    assert "2 p1 + 1 p2 + 1 p3" in text
    assert "p3 = Diagonal(width=3)" in text
    remove_plan(pipe)
    assert summary(pipe).layers == ()


def test_table_of_phases_passes_and_the_backend_that_ran():
    pipe = tiny.wan21()
    apply_plan(pipe, Plan((Rule(HEADS, phase=1), Rule(Skip(), pass_="uncond")), phases=(0.5,)))
    assert summary(pipe).ran == ()
    tiny.generate(pipe)
    assert summary(pipe).ran == ("blockwise",)
    text = str(summary(pipe))
    assert text.startswith("plan on 3 of 3 attention layers, backend auto (blockwise ran), ")
    for words in ("  phase 1  ", "  phase 0 uncond  ", "  phase 1 uncond  "):
        assert words in text
    assert "always" not in text
