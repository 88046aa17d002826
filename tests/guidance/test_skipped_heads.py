"""Edits of attention under plans that skip heads: what is skipped stays 0, other heads are what
they are without it, and nothing is lost to numbers that are not finite."""

import pytest
import torch
from guidance.test_compose import Tensors
from support.guided_pipelines import generate, pipeline

import visattn
from visattn.guidance import (
    BorrowKeys,
    DetectorGuidance,
    EnhanceVideo,
    LabelBias,
    Perturb,
    RedistributeSinks,
    RegionMask,
    ScaleHeads,
    ScaleTokens,
    Temperature,
)
from visattn.patterns import Dense, Diagonal, Skip
from visattn.plan import Plan, Rule

REST = (Dense(), Diagonal(9), Diagonal(30))
SKIPPING, OTHER = (Plan((Rule((own, *REST)),)) for own in (Skip(), Diagonal(5)))


def halves(state):
    return torch.arange(state.k.shape[2]) % 2


def sinks(state):
    return torch.arange(state.k.shape[2]) == state.image.start + 3


TABLE = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
OF_WEIGHTS = {
    "bias": LabelBias(table=TABLE, q_labels=halves, k_labels=halves),
    "bias of another head": LabelBias(table=TABLE, q_labels=halves, k_labels=halves, heads=[1]),
    "mask": RegionMask(q_bits=lambda state: 1 + halves(state)),
    "temperature": Temperature(temperature=2.0),
    "temperature of the text": Temperature(temperature=2.0, keys="text", stream="image"),
    "tokens": ScaleTokens(tokens=(1, 2), scale=2.0),
    "tokens both ways": ScaleTokens(tokens=(1, 2), scale=2.0, both_ways=True),
    "tokens renormalised": ScaleTokens(tokens=(1, 2), scale=2.0, renormalise=True),
    "sinks": RedistributeSinks(sinks=sinks, scale=0.5),
    "borrowed keys": BorrowKeys(sources=(1,), samples=(0,)),
    "gain": EnhanceVideo(weight=9.0),
    "heads": ScaleHeads(scale=2.0),
}
TARGETS = ("value", "mean", "mean_query", "self_and_text", "self_for_image")


def outputs(kind, plan, edit):
    """Of the first layer in the passes of a step, whose inputs no plan has changed."""
    pipe, spy = pipeline(kind), Tensors(name="after", attention="self")
    with visattn.sparse(pipe, plan), visattn.steer(pipe, [edit, spy]):
        latents = generate(pipe, steps=1, prompt=["a red square"] * 2, negative_prompt=None)
    assert latents.isfinite().all()
    return torch.cat([own["out"] for call, _, _, own in spy.seen if call.number == 0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize("kind", ["cogvideox", "hunyuanvideo"])
def test_skipped_head_stays_nothing_and_others_are_edited(kind, name):
    found, usual = (outputs(kind, plan, OF_WEIGHTS[name]) for plan in (SKIPPING, OTHER))
    assert (found[:, 0] == 0).all()
    assert (usual[:, 0] != 0).any()
    torch.testing.assert_close(found[:, 1:], usual[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_skipped_head_is_moved_to_what_is_a_target(target):
    """A perturbation is of its output, which is 0 where there is no attention."""
    found = outputs("cogvideox", SKIPPING, Perturb(target=target, heads=[0, 2]))
    assert found[:, 0].isfinite().all() and (found[:, 0] != 0).any()


def test_detector_guidance_leaves_what_is_skipped():
    pipe, spy = pipeline("cogvideox"), Tensors(name="after", attention="self")
    own = DetectorGuidance((1,), masks=torch.ones(1, 1, 3, 6, 4), attention="self", start=0)
    with visattn.sparse(pipe, SKIPPING), visattn.steer(pipe, [*own.edits(), spy]):
        assert generate(pipe, steps=1).isfinite().all()
    first = [own["out"] for call, _, _, own in spy.seen if call.number == 0]
    assert first and all((own[:, 0] == 0).all() for own in first)
