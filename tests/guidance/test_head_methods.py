"""ZeroTuning, VHR and VAR: weights and outputs of chosen heads, against the map written out."""

import functools
import math

import pytest
import torch
from guidance.test_compose import Tensors
from support import tiny, tiny_images
from support.edited import FIRST, LAST, VIDEO, edited, image_of, logits, softmax, tensors, text_of
from support.guided_pipelines import generate

import visattn
from visattn.attention.backends.reference import pattern_mask
from visattn.guidance import (
    BorrowKeys,
    LabelBias,
    RedistributeSinks,
    RegionMask,
    ScaleHeads,
    ScaleTokens,
    Temperature,
)
from visattn.patterns import Neighborhood

HEADS = [1, 3]  # that are changed
LAYOUTS = {"video": VIDEO, "text first": FIRST, "text last": LAST}
NEAR = Neighborhood((1, 3, 3))
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
patterns = pytest.mark.parametrize("pattern", [None, NEAR], ids=["dense", "sparse"])


# ---- in pipelines


@functools.cache
def pipeline(kind):
    return (tiny.PIPELINES | tiny_images.IMAGES)[kind]()


def watched(kind, attention, *edits):
    """The calls of a step, with what they were given and gave."""
    spy = Tensors(name="after", attention=attention)
    with visattn.steer(pipeline(kind), [*edits, spy]):
        generate(pipeline(kind), steps=1)
    return spy.seen


def check(kind, attention, edit, dense):
    """Chosen heads are what ``dense`` makes of the map, others as they were; in the first layer,
    whose inputs are those of a usual generation, to the bit."""
    usual, others = watched(kind, attention), [n for n in range(tiny.HEADS) if n not in HEADS]
    found = watched(kind, attention, edit)
    assert len(found) == len(usual)
    for (call, _, _, before), (*_, own) in zip(usual, found, strict=True):
        weights = (own["q"] @ own["k"].mT * call.factor).softmax(-1)
        plain = weights @ own["v"]
        wanted = plain.clone()
        wanted[:, HEADS] = dense(call, weights, own["v"])[:, HEADS]
        assert (wanted - plain).abs().max() > 1e-3
        torch.testing.assert_close(own["out"], wanted, atol=1e-5, rtol=1e-4)
        if call.number == 0:
            assert own["out"][:, others].equal(before["out"][:, others])


def first_key(state):
    return (torch.arange(state.k.shape[2]) == 0).to(torch.int64)


def any_query(state):
    return torch.zeros(state.q.shape[2], dtype=torch.int64)


@pytest.mark.parametrize("gamma", [0.2, 6.0])
@pytest.mark.parametrize(
    ("kind", "attention", "what"),
    [
        ("wan21", "cross", "token"),
        ("wan21", "self", "key"),
        ("cogvideox", "self", "token"),
        ("cogvideox", "self", "key"),
    ],
)
def test_zerotuning_is_a_bias_of_the_first_key(kind, attention, what, gamma):
    """Its weight times gamma, and rows renormalised (Han et al. 2025, arXiv 2505.11739)."""
    given = {"attention": attention, "heads": HEADS}
    if what == "token":
        edit = ScaleTokens(tokens=(0,), scale=gamma, renormalise=True, **given)
    else:
        table = torch.tensor([[0.0, math.log(gamma)]])
        edit = LabelBias(table=table, q_labels=any_query, k_labels=first_key, **given)

    def dense(_, weights, v):
        weights = weights.clone()
        weights[..., 0] *= gamma
        return weights / weights.sum(-1, keepdim=True) @ v

    check(kind, attention, edit, dense)


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "sd3"])
def test_vhr_scales_the_output_of_heads(kind):
    """By 2 (He et al. 2024, arXiv 2412.13949)."""
    edit = ScaleHeads(scale=2.0, heads=HEADS)
    check(kind, "self", edit, lambda _, weights, v: 2 * (weights @ v))


def sinks_of(state):
    """Two image tokens, and the first text token where text is part of the sequence."""
    sinks = torch.zeros(state.k.shape[2], dtype=torch.bool)
    sinks[[state.image.start + 1, state.image.start + 8]] = True
    for first, _ in state.texts:
        sinks[first] = True
    return sinks


def redistributed(weights, sinks, image, scale):
    """Sinks scaled, and what they lose given to the other image tokens by their weights."""
    rest = image & ~sinks
    lost = (1 - scale) * (weights * sinks).sum(-1, keepdim=True)
    given = lost * weights * rest / (weights * rest).sum(-1, keepdim=True)
    return torch.where(sinks, scale * weights, weights) + given


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "sd3"])
def test_var_in_a_pipeline(kind):
    edit = RedistributeSinks(sinks=sinks_of, scale=0.6, heads=HEADS)

    def dense(call, weights, v):
        (start, grid), texts = call.layout.grids[0], call.layout.texts
        image, sinks = torch.zeros(2, call.layout.length, dtype=torch.bool)
        image[start : start + grid.numel] = True
        sinks[[start + 1, start + 8, *(first for first, _ in texts)]] = True
        return redistributed(weights, sinks, image, 0.6) @ v

    check(kind, "self", edit, dense)


# ---- redistributed sinks in a call


def marked(layout):
    """Which tokens are of the image, and sinks of two samples, bool ``[Lk]`` and ``[2, Lk]``."""
    image = torch.zeros(layout.length, dtype=torch.bool)
    image[image_of(layout)] = True
    sinks = torch.zeros(2, layout.length, dtype=torch.bool)
    sinks[0, image_of(layout)[[1, 8, 23]]] = sinks[1, image_of(layout)[[5, 6]]] = True
    if layout.texts:
        sinks[0, text_of(layout)[[0, 3]]] = sinks[1, text_of(layout)[2]] = True
    return image, sinks


@layouts
@patterns
@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_sinks_give_their_weight_to_the_image(layout, pattern, scale):
    """Which is a bias of groups of logits, another one in each row: rows still sum to 1."""
    q, k, v = tensors(layout)
    image, sinks = marked(layout)
    weights, groups = softmax(q, k, layout, pattern), sinks[:, None, None]
    wanted = redistributed(weights, groups, image, scale)
    torch.testing.assert_close(wanted.sum(-1), torch.ones(weights.shape[:3], dtype=torch.float64))
    rest = image & ~groups
    a, b = ((weights * own).sum(-1, keepdim=True) for own in (groups, rest))
    more = (1 + (1 - scale) * a / b).log() * rest
    bias = torch.where(groups, math.log(scale) if scale else -math.inf, more)
    torch.testing.assert_close(softmax(q, k, layout, pattern, bias), wanted)
    edit = RedistributeSinks(sinks=sinks, scale=scale, heads=[0, 2])
    found, plain = (edited(own, q, k, v, layout, pattern) for own in (edit, []))
    torch.testing.assert_close(found[:, [0, 2]], (wanted @ v)[:, [0, 2]], atol=1e-9, rtol=0)
    assert (found - plain)[:, [0, 2]].abs().amax((1, 2, 3)).min() > 1e-2
    assert found[:, 1].equal(plain[:, 1])


@patterns
def test_strengths_and_streams_of_redistributed_sinks(pattern):
    q, k, v = tensors(FIRST)
    image, sinks = marked(FIRST)
    edit = RedistributeSinks(
        sinks=sinks[0], scale=0.2, heads={0: 0.5, 1: 1.0}, stream="image", samples=(1,)
    )
    weights = softmax(q, k, FIRST, pattern)
    wanted = weights.clone()
    for head, scale in ((0, 0.6), (1, 0.2)):
        own = redistributed(weights[1, head], sinks[0], image, scale)
        wanted[1, head, image] = own[image]
    found, plain = (edited(own, q, k, v, FIRST, pattern) for own in (edit, []))
    torch.testing.assert_close(found, wanted @ v, atol=1e-9, rtol=0)
    assert found[0].equal(plain[0])
    assert found[:, :, ~image].equal(plain[:, :, ~image])


@patterns
def test_redistributed_sinks_among_other_edits(pattern):
    """By the weights as masks and gains of the image's rows make them."""
    q, k, v = tensors(FIRST)
    image, sinks = marked(FIRST)
    bits = 1 + torch.arange(FIRST.length) % 3
    allowed = (bits[:, None] & bits) != 0
    if pattern is not None:
        allowed = allowed & pattern_mask(pattern, FIRST)
    gain = torch.ones(FIRST.length, FIRST.length, dtype=torch.float64)
    gain[image[:, None] & ~image], gain[image[:, None] & image] = 2.0, 0.8
    weights = (logits(q, k) * gain).masked_fill(~allowed, -math.inf).softmax(-1)
    edits = [
        ScaleHeads(scale=3.0),
        RedistributeSinks(sinks=sinks, scale=0.6),
        Temperature(temperature=1 / 2.0, keys="text", stream="image"),
        Temperature(temperature=1 / 0.8, keys="image", stream="image"),
        RegionMask(q_bits=bits),
    ]
    wanted = 3 * redistributed(weights, sinks[:, None, None], image, 0.6) @ v
    found = edited(edits, q, k, v, FIRST, pattern)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


@layouts
@patterns
def test_row_that_sees_no_other_image_token_gives_the_weight_to_its_own(layout, pattern):
    q, k, v = tensors(layout)
    image, sinks = marked(layout)
    lonely, sink = image_of(layout)[[4, 8]].tolist()
    q_bits, k_bits = torch.ones(2, layout.length, dtype=torch.int64)
    q_bits[lonely], k_bits[sink], k_bits[~image] = 2, 3, 3
    edits = [
        RegionMask(q_bits=q_bits, k_bits=k_bits),
        RedistributeSinks(sinks=sinks[0], scale=0.6),
    ]
    found = edited(edits, q, k, v, layout, pattern)
    keys = torch.tensor([sink, *text_of(layout).tolist()] if layout.texts else [sink])
    weights = logits(q, k)[:, :, lonely, keys].softmax(-1)
    lost = 0.4 * (weights * sinks[0, keys]).sum(-1, keepdim=True)
    weights = torch.where(sinks[0, keys], 0.6 * weights, weights)
    wanted = (weights[..., None] * v[:, :, keys]).sum(2) + lost * v[:, :, lonely]
    torch.testing.assert_close(found[:, :, lonely], wanted, atol=1e-9, rtol=0)


@layouts
@pytest.mark.parametrize("name", ["scale of 1", "no sinks", "no head"])
def test_what_redistributes_nothing_changes_no_bit(layout, name):
    sinks = marked(layout)[1]
    given = {"scale": 1.0 if name == "scale of 1" else 0.5}
    if name == "no head":
        given["heads"] = 0.0
    edit = RedistributeSinks(sinks=sinks & (name != "no sinks"), **given)
    q, k, v = tensors(layout, dtype=torch.float32)
    assert edited(edit, q, k, v, layout).equal(edited([], q, k, v, layout))


REFUSED = {
    "numbers": (torch.ones(FIRST.length), r"dtype torch.float32; it must be bool"),
    "length": (torch.ones(3, dtype=torch.bool), r"the shape \[3\] .* has 29 keys in 2 samples"),
    "all": (torch.ones(2, FIRST.length, dtype=torch.bool), "names all image tokens of"),
}


@pytest.mark.parametrize(("sinks", "message"), REFUSED.values(), ids=REFUSED)
def test_sinks_that_cannot_be_are_refused(sinks, message):
    q, k, v = tensors(FIRST)
    with pytest.raises(ValueError, match=message):
        edited(RedistributeSinks(sinks=sinks, scale=0.5), q, k, v, FIRST)


def test_redistribution_that_cannot_be_is_refused():
    sinks = marked(FIRST)[1]
    for wrong in ((0,), 3, "first"):
        with pytest.raises(TypeError, match="must be a bool tensor with a value for each key"):
            RedistributeSinks(sinks=wrong, scale=0.5)
    with pytest.raises(TypeError, match=r"sinks=None\) must be a bool tensor"):
        edited(RedistributeSinks(sinks=lambda _: None, scale=0.5), *tensors(FIRST), FIRST)
    for scale in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must be from 0 to 1; 1 changes nothing"):
            RedistributeSinks(sinks=sinks, scale=scale)
    with pytest.raises(ValueError, match="the keys of cross-attention are text"):
        RedistributeSinks(sinks=sinks, scale=0.5, attention="cross")
    edits = [BorrowKeys(sources=(0,), samples=(1,)), RedistributeSinks(sinks=sinks, scale=0.5)]
    with pytest.raises(ValueError, match="cannot be combined with BorrowKeys"):
        edited(edits, *tensors(FIRST), FIRST)
