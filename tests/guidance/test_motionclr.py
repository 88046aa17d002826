"""MotionCLR: words that weigh more by a sum, and maps of a source but for a word, against the map
written out in float64."""

import functools
import math

import pytest
import torch
from guidance.test_compose import PROMPTS, Tensors
from support import tiny
from support.allocations import check_linear, joint_state
from support.edited import FIRST, LAST, VIDEO, WORDS, edited, image_of, softmax, tensors, text_of

import visattn
from visattn.guidance import (
    BorrowKeys,
    LabelBias,
    ReplaceMap,
    ReplaceQueries,
    ScaleTokens,
    ShareKV,
    Temperature,
    replace_motion,
)
from visattn.guidance.edits.steer import apply_edits
from visattn.patterns import Neighborhood

NEAR = Neighborhood((1, 3, 3))
patterns = pytest.mark.parametrize("pattern", [None, NEAR], ids=["dense", "sparse"])
joint = pytest.mark.parametrize("layout", [FIRST, LAST], ids=["text first", "text last"])


def close(found, wanted, bound=1e-9):
    assert (found.double() - wanted).abs().max() < bound


# ---- emphasis


@joint
@patterns
@pytest.mark.parametrize(("scale", "add"), [(1.0, 0.3), (1.0, -0.2), (0.5, 0.3), (0.0, 0.1)])
@pytest.mark.parametrize("stream", ["all", "image", "text"])
def test_columns_get_a_sum(layout, pattern, scale, add, stream):
    q, k, v = tensors(layout)
    columns = text_of(layout)[[1, 3]]
    rows = {"all": torch.arange(layout.length), "image": image_of(layout), "text": text_of(layout)}
    weights = softmax(q, k, layout, pattern)
    at = slice(None), slice(None), rows[stream][:, None], columns
    weights[at] = weights[at] * scale + add
    edit = ScaleTokens(tokens=(1, 3), scale=scale, add=add, stream=stream)
    close(edited(edit, q, k, v, layout, pattern), weights @ v)


def test_emphasis_of_a_word_in_cross_attention_by_strength_of_heads():
    q, k, v = tensors(VIDEO, WORDS)
    weights = softmax(q, k, VIDEO)
    weights[1, 0, :, 2] += 0.4
    weights[1, 2, :, 2] += 0.1
    heads = {0: 1.0, 2: 0.25}
    edit = ScaleTokens(tokens=(2,), add=0.4, attention="cross", heads=heads, samples=(1,))
    close(edited(edit, q, k, v, VIDEO, kv_layout=WORDS), weights @ v)


# ---- replacement


def replaced(weights, tokens, rows=slice(None), source=0, samples=(2,)):
    """Columns of the source's map but for those of tokens."""
    new = weights.clone()
    for sample in samples:
        one = weights[source].clone()
        one[:, :, list(tokens)] = weights[sample][:, :, list(tokens)]
        new[sample][:, rows] = one[:, rows]
    return new


@pytest.mark.parametrize("tokens", [(), (2,), (1, 3, 6)])
def test_map_of_a_source_but_for_words_in_cross_attention(tokens):
    q, k, v = tensors(VIDEO, WORDS, batch=3)
    weights = replaced(softmax(q, k, VIDEO), tokens, samples=(1, 2))
    edit = ReplaceMap(source=0, samples=(1, 2), tokens=tokens, attention="cross")
    close(edited(edit, q, k, v, VIDEO, kv_layout=WORDS), weights @ v)


@joint
@patterns
@pytest.mark.parametrize("stream", ["all", "image"])
def test_map_of_a_source_but_for_words_in_joint_attention(layout, pattern, stream):
    q, k, v = tensors(layout, batch=3)
    rows = slice(None) if stream == "all" else image_of(layout)
    weights = softmax(q, k, layout, pattern)
    weights = replaced(weights, text_of(layout)[[1, 4]].tolist(), rows)
    edit = ReplaceMap(source=0, samples=(2,), tokens=(1, 4), stream=stream)
    close(edited(edit, q, k, v, layout, pattern), weights @ v)


def test_map_is_that_of_the_source_as_it_is_edited():
    """With biases and gains by sample, and a word that gets a sum besides."""
    q, k, v = tensors(FIRST, batch=3)
    labels = torch.zeros(3, FIRST.length, dtype=torch.int64)
    labels[0, 7:12] = 1
    table = torch.tensor([[0.0, -math.inf]])
    edits = [
        LabelBias(table=table, q_labels=torch.zeros_like(labels), k_labels=labels),
        Temperature(temperature=0.5, keys="text", stream="image", samples=(0,)),
        ReplaceMap(source=0, samples=(2,), tokens=(3,)),
        ScaleTokens(tokens=(3,), add=0.25, samples=(2,)),
    ]
    factor = torch.ones(3, 1, FIRST.length, FIRST.length, dtype=torch.float64)
    factor[0, :, 5:, :5] = 2
    logits = q @ k.mT * q.shape[3] ** -0.5 * factor
    logits = logits + table[0].double()[labels][:, None, None]
    weights = replaced(logits.softmax(-1), (3,))
    weights[2, :, :, 3] += 0.25
    close(edited(edits, q, k, v, FIRST), weights @ v)


@patterns
def test_whole_map_is_that_of_the_source_s_queries_and_keys(pattern):
    q, k, v = tensors(VIDEO, batch=3)
    both = [ReplaceQueries(source=0, samples=(2,)), ShareKV(source=0, samples=(2,), what="keys")]
    wanted = replaced(softmax(q, k, VIDEO, pattern), ()) @ v
    close(edited(both, q, k, v, VIDEO, pattern), wanted)
    close(edited(ReplaceMap(source=0, samples=(2,)), q, k, v, VIDEO, pattern), wanted)


# ---- what changes nothing, memory, refusals


NOTHING = {
    "no sum": ScaleTokens(tokens=(1,), add=0.0),
    "no heads": ScaleTokens(tokens=(1,), add=0.5, heads=0.0),
    "own map": ReplaceMap(source=1, samples=(1,), tokens=(1,)),
    "no heads of a map": ReplaceMap(source=0, samples=(1,), tokens=(1,), heads=0.0),
}


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@patterns
def test_edits_of_nothing_are_equal_to_the_bit(edit, dtype, pattern):
    q, k, v = tensors(FIRST, dtype=dtype)
    assert edited(edit, q, k, v, FIRST, pattern).equal(edited([], q, k, v, FIRST, pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_samples_heads_and_rows_stay_to_the_bit(dtype):
    q, k, v = tensors(FIRST, dtype=dtype)
    edits = [
        ReplaceMap(source=0, samples=(1,), tokens=(1,), heads=[2], stream="image"),
        ScaleTokens(tokens=(1,), add=0.5, samples=(1,), heads=[2], stream="image"),
    ]
    new, plain = edited(edits, q, k, v, FIRST), edited([], q, k, v, FIRST)
    assert new[0].equal(plain[0])
    assert new[1, :2].equal(plain[1, :2])
    assert new[1, 2, :5].equal(plain[1, 2, :5])
    assert not torch.allclose(new[1, 2, 5:], plain[1, 2, 5:])


EDITS = {
    "sum": ScaleTokens(tokens=(1,), add=0.5),
    "map": ReplaceMap(source=1, samples=(0,), tokens=(1,)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_memory_is_linear(edit):
    def make(tokens):
        state = joint_state(tokens, samples=2)
        return lambda: apply_edits(state, [(edit, torch.ones(1))])

    check_linear(make)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, None, "1", True])
def test_sums_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"add=.* must be finite; 0 changes nothing"):
        ScaleTokens(tokens=(1,), add=wrong)


def test_what_cannot_be_is_refused():
    for kind in ({"renormalise": True}, {"both_ways": True}):
        with pytest.raises(ValueError, match="cannot be combined with renormalise or both_ways"):
            ScaleTokens(tokens=(1,), add=0.5, **kind)
    q, k, v = tensors(FIRST)
    for edits, message in (
        (ReplaceMap(source=2, samples=(1,)), "takes from sample 2"),
        (ReplaceMap(source=0, samples=(1,), tokens=(5,)), "has 5 text tokens"),
        ([BorrowKeys(sources=(0,)), ReplaceMap(source=0)], "cannot be combined with BorrowKeys"),
    ):
        with pytest.raises(ValueError, match=message):
            edited(edits, q, k, v, FIRST)
    with pytest.raises(ValueError, match="names no token of the edited word"):
        replace_motion(0, (1,), ())


# ---- a pipeline


@functools.cache
def pipeline(kind):
    return tiny.PIPELINES[kind]()


@pytest.mark.parametrize(("kind", "attention"), [("wan21", "cross"), ("cogvideox", "self")])
def test_replaced_motion_of_a_pipeline_in_its_windows(kind, attention):
    edits = replace_motion(0, (1,), (1, 2), attention=attention, stop=1, text_stop=2)
    kinds = ("self", "cross") if attention == "cross" else ("self",)
    spies = {
        own: [Tensors(name=name, attention=own) for name in ("before", "after")] for own in kinds
    }
    befores, afters = zip(*spies.values(), strict=True)
    with visattn.steer(pipeline(kind), [*befores, *edits, *afters]):
        tiny.generate(pipeline(kind), steps=3, **PROMPTS)
    made = 0
    for own, (before, after) in spies.items():
        for (call, pass_, _, given), (*_, found) in zip(before.seen, after.seen, strict=True):
            weights = (given["q"] @ given["k"].mT * call.factor).softmax(-1)
            if pass_ == "cond" and call.step < (2 if own == "cross" else 1):
                texts = call.kv_layout.texts
                tokens = [texts[0][0] + 1, texts[0][0] + 2] if texts else []
                weights = replaced(weights, tokens, samples=(1,))
                made += 1
            torch.testing.assert_close(
                found["out"], weights @ given["v"], atol=1e-5, rtol=1e-4
            )
    assert made == (9 if attention == "cross" else 3)
