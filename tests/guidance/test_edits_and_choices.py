"""Edits that need attention twice, or tensors of another width, under dynamic patterns that
remember what they chose; and biases of any size."""

import pytest
import torch
from support.edited import FIRST, VIDEO, edited, image_of, logits, softmax, tensors, text_of
from support.guided_pipelines import generate, pipeline

import visattn
from visattn import TokenLayout
from visattn.guidance import (
    BorrowKeys,
    LabelBias,
    Perturb,
    RedistributeSinks,
    RegionMask,
    ReplaceMap,
    Temperature,
)
from visattn.selectors import ClusterBlocks, Reuse, TopBlocks


def halves(state):
    return 1 + torch.arange(state.k.shape[2]) % 2


def sinks(state):
    return torch.arange(state.k.shape[2]) % 4 == 0


AGAIN = {
    "sinks": RedistributeSinks(sinks=sinks, scale=0.5, heads={1: 0.0}),
    "maps": ReplaceMap(source=1, samples=(0,), heads={1: 0.0}),
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_further_attention_leaves_choices_as_they_are(name):
    """At no strength the generation is the same to the bit, whatever was computed beside."""
    pipe = pipeline("cogvideox")
    options = {"steps": 3, "prompt": ["a red square", "blue circle"], "negative_prompt": None}
    found = []
    for edits in ([], [AGAIN[name]]):
        plan = Reuse(TopBlocks(0.3, block=8), every=9)
        with visattn.sparse(pipe, plan), visattn.steer(pipe, edits):
            found.append(generate(pipe, **options))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("window", [{"start": 1}, {"stop": 1}])
def test_clusters_of_an_edit_in_a_window_of_steps(window):
    """Tensors have another width inside, so that the clusters begin anew."""
    pipe, edit = pipeline("wan21"), RegionMask(q_bits=halves, **window)
    plan = ClusterBlocks(q_clusters=4, k_clusters=6, iterations=2, warm=1)
    with visattn.sparse(pipe, plan), visattn.steer(pipe, edit):
        assert generate(pipe, steps=3).isfinite().all()


# ---- biases of any size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("least", [-5e3, -9e3, -3e4, -3e38, torch.finfo(torch.float32).min])
def test_large_biases_are_finite_and_forbid(dtype, least):
    q, k, v = (x.to(dtype) for x in tensors(VIDEO, dim=64))
    labels = torch.arange(VIDEO.length) % 2
    edit = LabelBias(table=torch.tensor([[0.0, least]]), q_labels=labels * 0, k_labels=labels)
    found = edited(edit, q, k, v, VIDEO)
    seen = (labels == 0)
    expected = logits(q.double(), k.double()).masked_fill(~seen, -torch.inf).softmax(-1)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected @ v.double(), rtol=0, atol=tolerance)


def test_large_positive_biases():
    q, k, v = (x.half() for x in tensors(VIDEO, dim=64))
    labels = torch.arange(VIDEO.length) % 2
    given = {"q_labels": labels * 0, "k_labels": labels}
    found = edited(LabelBias(table=torch.tensor([[0.0, 9e3]]), **given), q, k, v, VIDEO)
    expected = logits(q.double(), k.double()).masked_fill(labels == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.double(), expected @ v.double(), rtol=0, atol=3e-2)
    for wrong in (2e4, torch.inf):
        with pytest.raises(ValueError, match="must be at most 10000, and those below -10000"):
            LabelBias(table=torch.tensor([[0.0, wrong]]), **given)


def test_labels_that_are_none():
    q, k, v = tensors(VIDEO)
    table = torch.zeros(1, 1)
    for wrong, error, words in (
        (None, TypeError, "must be a tensor of integers"),
        (torch.tensor(0), ValueError, "has the shape"),
        (torch.zeros(1, 1, VIDEO.length), ValueError, "has the shape"),
    ):
        edit = LabelBias(table=table, q_labels=lambda _, own=wrong: own, k_labels=labels_of)
        with pytest.raises(error, match=words):
            edited(edit, q, k, v, VIDEO)


def labels_of(state):
    return torch.zeros(state.k.shape[2], dtype=torch.int64)


# ---- rows without a key, and rows of other images


def test_a_row_that_sees_nothing_is_moved_to_itself():
    """And not to the text that is forbidden."""
    q, k, v = tensors(FIRST)
    none = RegionMask(q_bits=torch.zeros(FIRST.length, dtype=torch.int64))
    edits = [none, Perturb(target="self_and_text")]
    image = image_of(FIRST)
    found = edited(edits, q, k, v, FIRST)
    torch.testing.assert_close(found[:, :, image], v[:, :, image], rtol=0, atol=1e-9)
    other = v.clone()
    other[:, :, text_of(FIRST)] += 100
    assert edited(edits, q, k, other, FIRST)[:, :, image].equal(found[:, :, image])


def test_other_images_are_not_the_image_stream():
    layout = TokenLayout.from_tokens((("text", 3), ("grid", 1, 2, 3), ("grid", 1, 2, 3)))
    q, k, v = tensors(layout)
    for keys in ("text", "image"):
        with pytest.raises(ValueError, match="belong neither to the text nor to the first image"):
            edited(Temperature(temperature=0.5, keys=keys, stream="image"), q, k, v, layout)
    plain, found = edited([], q, k, v, layout), edited(
        Temperature(temperature=0.5, keys="text"), q, k, v, layout
    )
    assert (found - plain).abs().amax((0, 1, 3)).min() > 0  # all rows
    half = edited(Temperature(temperature=0.5, stream="image"), q, k, v, layout)
    assert half[:, :, 9:].equal(plain[:, :, 9:])
    assert softmax(q, k, layout).shape[-1] == 15


def test_keys_of_text_are_not_borrowed():
    with pytest.raises(ValueError, match="it borrows image tokens"):
        BorrowKeys(sources=(1,), attention="cross")
    q, k, v = tensors(FIRST)
    wrong = torch.full((2, len(image_of(FIRST))), 2)
    with pytest.raises(ValueError, match=r"the dtype torch\.int64; it must be bool"):
        edited(BorrowKeys(sources=(1,), tokens=wrong), q, k, v, FIRST)
