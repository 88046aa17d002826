"""Detector guidance: logits of subjects inside and outside their masks, as dense attention has
them."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from support import tiny
from support.allocations import check_linear, joint_state
from support.planned import OTHER

import visattn
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.steer import apply_edits
from visattn.guidance.token_maps.detector import DetectorGuidance, largest_subject
from visattn.guidance.token_maps.token_readout import frame_minmax

KINDS = {"wan21": "cross", "cogvideox": "self"}
SUBJECTS = (1, (2, 3))
TOKENS, OF = [1, 2, 3], [0, 1, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spy(Edit):
    """Keeps what calls were and gave."""

    seen: list = field(default_factory=list)
    stage: ClassVar[str] = "read"

    def apply(self, state, strength):
        self.seen.append(
            {
                "call": state.call,
                "pass": state.pass_,
                "image": state.image,
                "keys": [state.texts[0][0] + token for token in TOKENS],
                **{name: getattr(state, name).double() for name in ("q", "k", "v", "out")},
            }
        )


@functools.cache
def pipeline(kind):
    return tiny.PIPELINES[kind]()


def masks(seed=0):
    torch.manual_seed(seed)
    return (torch.rand(1, 2, 3, 6, 4) > 0.6).float()


def run(kind, guidance, steps=2, **options):
    pipe, spy = pipeline(kind), Spy(attention=KINDS[kind])
    with visattn.steer(pipe, [*guidance.edits(), spy]):
        out = tiny.generate(pipe, steps=steps, **options)
    return out, spy.seen


def expected(one, uncond, soft, bias, strength=None):
    """A conditional call densely, ``[b, H, Lq, D]``, and the logits that it changes."""
    factor, keys, image = one["call"].factor, one["keys"], one["image"]
    logits = one["q"] @ one["k"].mT * factor
    plain = logits.clone()
    own = logits[:, :, image][..., keys]
    other = uncond["q"][:, :, image] @ uncond["k"][:, :, keys].mT * factor
    m = soft.flatten(2)[:, OF].mT[:, None].double()
    weight = 1 if strength is None else strength[:, None, None]
    mixed = own + weight * (m * (own + bias) + (1 - m) * other - own)
    for n, key in enumerate(keys):
        logits[:, :, image, key] = mixed[..., n]
    return logits.softmax(-1) @ one["v"], logits - plain


def uncond_of(kind, seen, one):
    """The tensors that the unconditional logits of a call are made of."""
    other = [
        own for own in seen if own["pass"] == "uncond" and own["call"].layer == one["call"].layer
    ]
    if kind == "cogvideox":
        return next(own for own in other if own["call"].step == one["call"].step)
    before = next(own for own in other if own["call"].step == one["call"].step - 1)
    return {"q": one["q"], "k": before["k"]}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_change_inside_the_masks_and_tokens_alone(kind):
    own = masks()
    guidance = DetectorGuidance(
        SUBJECTS, masks=own, attention=KINDS[kind], start=1, sigma=0.0, bias=0.7
    )
    _, seen = run(kind, guidance)
    cond = [one for one in seen if one["pass"] == "cond"]
    assert len(cond) == 2 * tiny.LAYERS
    for one in cond:
        if one["call"].step == 0:
            plain = (one["q"] @ one["k"].mT * one["call"].factor).softmax(-1) @ one["v"]
            torch.testing.assert_close(one["out"], plain, atol=1e-6, rtol=1e-5)
            continue
        out, change = expected(one, uncond_of(kind, seen, one), own, 0.7)
        torch.testing.assert_close(one["out"], out, atol=1e-6, rtol=1e-5)
        inside = change[:, :, one["image"]][..., one["keys"]]
        m = own.flatten(2)[:, OF].mT[:, None].bool().expand_as(inside)
        torch.testing.assert_close(inside[m], torch.full_like(inside[m], 0.7))
        change[:, :, one["image"], one["keys"][0] : one["keys"][-1] + 1] = 0
        assert not change.any()


def test_text_keys_of_cross_attention_stay_from_step_to_step():
    guidance = DetectorGuidance(SUBJECTS, masks=masks(), start=1)
    _, seen = run("wan21", guidance)
    for layer in {one["call"].layer for one in seen}:
        keys = [one["k"] for one in seen if one["call"].layer == layer and one["pass"] == "uncond"]
        assert torch.equal(keys[0], keys[1])


def test_strengths_of_heads_and_soft_masks():
    strengths = torch.tensor([1.0, 0.0, 0.5, 0.0])
    own = masks() * 0.6
    guidance = DetectorGuidance(
        SUBJECTS,
        masks=own,
        attention="self",
        start=1,
        sigma=0.0,
        layers=[1],
        heads={0: 1.0, 2: 0.5},
    )
    _, seen = run("cogvideox", guidance)
    one = next(
        own
        for own in seen
        if own["pass"] == "cond" and own["call"].step == 1 and own["call"].number == 1
    )
    out, _ = expected(one, uncond_of("cogvideox", seen, one), own, 0.7, strengths)
    torch.testing.assert_close(one["out"], out, atol=1e-6, rtol=1e-5)


def test_masks_are_blurred_early():
    own = torch.zeros(1, 2, 3, 6, 4)
    own[:, 0, :, 2:4, 1:3] = own[:, 1, :, 4:, 3:] = 1
    seen = {}
    guidance = DetectorGuidance(SUBJECTS, masks=own, start=1, sigma=1.0, blur_stop=0.5)
    original = guidance.mask

    def spied(state):
        seen[state.call.step] = original(state)
        return seen[state.call.step]

    guidance.mask = spied
    run("wan21", guidance, steps=4)
    sharp = own.flatten(2)[:, OF]
    assert torch.equal(seen[2], sharp)
    assert torch.equal(seen[3], sharp)
    torch.testing.assert_close(seen[1].sum(), sharp.sum(), atol=5.0, rtol=0)
    assert 0 < float(seen[1][0, 0, 8]) < 1
    assert float(seen[1].max()) <= 1


def test_a_detector_gets_the_maps_of_the_step_before_and_is_asked_again():
    calls = []

    def detector(maps, state):
        calls.append((state.call.step, maps))
        found = torch.zeros_like(maps)
        if state.call.step > 1:  # nothing is found the first time
            found[:, :, :, :3] = 1
        return found

    guidance = DetectorGuidance(SUBJECTS, detector=detector, start=1, every=0.5, sigma=0.0)
    run("wan21", guidance, steps=6)
    assert [step for step, _ in calls] == [1, 2, 5]
    assert all(maps.shape == (1, 2, 3, 6, 4) for _, maps in calls)


def test_a_subject_that_is_nowhere_is_left_alone():
    pipe = pipeline("wan21")
    guidance = DetectorGuidance(SUBJECTS, masks=torch.zeros(1, 2, 3, 6, 4), start=1)
    out, _ = run("wan21", guidance)
    torch.testing.assert_close(out, tiny.generate(pipe, steps=2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_of_its_own_is_the_thresholded_readout(kind):
    guidance = DetectorGuidance(SUBJECTS, attention=KINDS[kind], threshold=0.4, sigma=0.0)
    steps = []
    original = guidance.detector

    def spied(maps, state):
        found = original(maps, state)
        steps.append(state.call.step)
        scaled = frame_minmax(maps)
        assert torch.equal(found, largest_subject(maps, 0.4))
        assert not (found[:, 0] & found[:, 1]).any()
        assert (scaled[found] >= 0.4).all()
        return found

    guidance.detector = spied
    out, _ = run(kind, guidance, steps=3)
    assert steps[0] == 1
    assert not torch.equal(out, tiny.generate(pipeline(kind), steps=3))


def test_with_a_sparse_plan_the_guided_logits_are_those_that_are_kept():
    pipe = pipeline("cogvideox")
    guidance = DetectorGuidance(SUBJECTS, masks=masks(), attention="self", start=1, sigma=0.0)
    with visattn.sparse(pipe, OTHER):
        plain = tiny.generate(pipe, steps=2)
        out, seen = run("cogvideox", guidance)
    one = next(own for own in seen if own["pass"] == "cond" and own["call"].step == 1)
    layout = one["call"].layout
    (rule,) = OTHER.rules
    at = torch.arange(layout.length)
    kept = rule.heads[0].allows(at[:, None], at, layout)
    _, change = expected(one, uncond_of("cogvideox", seen, one), masks(), 0.7)
    logits = one["q"] @ one["k"].mT * one["call"].factor + change
    dense = logits.masked_fill(~kept, -torch.inf).softmax(-1) @ one["v"]
    torch.testing.assert_close(one["out"], dense, atol=1e-6, rtol=1e-5)
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbed_pass_is_guided_too(kind):
    pipe, spy = pipeline(kind), Spy(attention=KINDS[kind], passes=("perturbed",))
    own = masks()
    guidance = DetectorGuidance(SUBJECTS, masks=own, attention=KINDS[kind], start=1, sigma=0.0)
    soft = visattn.SoftPAG({1: [0, 2]}, strength=0.5)
    with visattn.steer(pipe, [*guidance.edits(), spy]), visattn.guide(pipe, soft):
        tiny.generate(pipe, steps=2)
    one = next(o for o in spy.seen if o["call"].step == 1 and o["call"].number == 2)
    keys = torch.zeros_like(one["k"])
    keys[:, :, one["keys"]] = guidance.keys[one["call"].layer].double()
    out, _ = expected(one, {"q": one["q"], "k": keys}, own, 0.7)
    torch.testing.assert_close(one["out"], out, atol=1e-6, rtol=1e-5)


def test_memory_is_linear():
    def make(tokens):
        state = joint_state(tokens, passes=("uncond", "cond"))
        guidance = DetectorGuidance(
            SUBJECTS, masks=torch.ones(1, 2, 1, tokens // 64, 64), attention="self", sigma=2.0
        )
        edits = [edit for edit in guidance.edits() if "cond" in edit.passes]
        return lambda: apply_edits(state, [(edit, torch.ones(1)) for edit in edits])

    check_linear(make)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="give only one of them"):
        DetectorGuidance((1,), masks=torch.ones(1, 1, 3, 6, 4), detector=lambda maps, state: maps)
    with pytest.raises(ValueError, match=r"must be \[samples or 1, 2 subjects"):
        DetectorGuidance((1, 2), masks=torch.ones(1, 1, 3, 6, 4))
    with pytest.raises(ValueError, match="a token twice"):
        DetectorGuidance((1, (1, 2)))
    wrong = DetectorGuidance((1,), masks=torch.ones(1, 1, 3, 6, 5), start=1)
    with pytest.raises(ValueError, match="masks of subjects have the shape"):
        run("wan21", wrong)
    alone = DetectorGuidance((1,), masks=torch.ones(1, 1, 3, 6, 4), start=1)
    with pytest.raises(ValueError, match="run with classifier-free guidance"):
        run("wan21", alone, guidance_scale=1.0)
