"""Edits that change nothing change no bit of a generation."""

import functools

import pytest
import torch
from support.guided_pipelines import generate, pipeline

import visattn
from visattn.guidance import (
    BlurQueries,
    BorrowKeys,
    EnhanceVideo,
    LabelBias,
    Perturb,
    RegionMask,
    ReplaceQueries,
    ScaleHeads,
    ScaleTokens,
    ShareKV,
    Temperature,
)

KINDS = ("wan21", "cogvideox", "hunyuanvideo", "flux", "sd3")


def thirds(state):
    """Labels or bits of the queries, of each kind some."""
    return torch.arange(state.q.shape[2]) % 3


def halves(state):
    return torch.arange(state.k.shape[2]) % 2


def all_share(state):
    """Different bits, one of them in all."""
    return 4 + thirds(state)


NEUTRAL = {
    "bias of 0": [LabelBias(table=torch.zeros(3, 2), q_labels=thirds, k_labels=halves)],
    "bias of 0 of image rows": [
        LabelBias(table=torch.zeros(3, 2), q_labels=thirds, k_labels=halves, stream="image")
    ],
    "mask that allows all": [RegionMask(q_bits=all_share)],
    "bias of no head": [
        LabelBias(table=torch.ones(3, 2), q_labels=thirds, k_labels=halves, heads=0.0)
    ],
    "mask of no head": [RegionMask(q_bits=thirds, heads=0.0)],
    "gain of 1": [EnhanceVideo(weight=-3.0)],
    "gain of no head": [EnhanceVideo(heads=0.0)],
    "no strength": [Perturb(heads=0.0)],
    "mean query at no strength": [Perturb(target="mean_query", heads=0.0)],
    "blur of 0": [BlurQueries(sigma=0)],
    "blur of no head": [BlurQueries(sigma=2.0, heads=0.0)],
    "temperature 1": [Temperature(temperature=1)],
    "temperature of no head": [Temperature(temperature=2.0, heads=0.0)],
    "heads at scale 1": [ScaleHeads(scale=1.0)],
    "no heads scaled": [ScaleHeads(scale=2.0, heads=0.0)],
    "keys of its own": [ShareKV(source=0)],
    "keys for no head": [BorrowKeys(sources=(0,), samples=(0,), heads=0.0)],
    "queries of its own": [ReplaceQueries(source=0)],
    "all of them": [
        LabelBias(table=torch.zeros(3, 2), q_labels=thirds, k_labels=halves),
        RegionMask(q_bits=all_share),
        Perturb(heads=0.0),
        Temperature(temperature=1),
        ScaleHeads(scale=1.0),
        EnhanceVideo(weight=-3.0),
    ],
}
OF_TEXT = {
    "tokens at scale 1": lambda own: [ScaleTokens(tokens=(1, 2), scale=1.0, attention=own)],
    "renormalised at scale 1": lambda own: [
        ScaleTokens(tokens=(1,), scale=1.0, renormalise=True, attention=own)
    ],
    "tokens of no head": lambda own: [
        ScaleTokens(tokens=(1,), scale=2.0, heads=0.0, attention=own)
    ],
    "text at temperature 1": lambda own: [Temperature(temperature=1, keys="text", attention=own)],
    "text for no head": lambda own: [
        Temperature(temperature=2.0, keys="text", heads=0.0, attention=own)
    ],
}


# they need the normaliser of the softmax, which torch's attention with a mask does not give: where
# that is of padding, it is computed without
NORMALISED = ("keys for no head", "tokens of no head")


@functools.cache
def plain(kind):
    return generate(pipeline(kind), steps=1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*NEUTRAL, *OF_TEXT])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_neutral_changes_no_bit(kind, name):
    usual, pipe = plain(kind), pipeline(kind)
    text = "cross" if kind == "wan21" else "self"
    with visattn.steer(pipe, NEUTRAL[name] if name in NEUTRAL else OF_TEXT[name](text)):
        found = generate(pipe, steps=1)
    if kind == "hunyuanvideo" and name in NORMALISED:
        assert (found - usual).abs().max() < 5e-6
    else:
        assert found.equal(usual)
