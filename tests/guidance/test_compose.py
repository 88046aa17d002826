"""PrimeComposer: logits of an object overwritten by those of a reference, as a dense toy has
them."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from support import tiny
from support.allocations import check_linear, joint_state

import visattn
from visattn.guidance.composition.prime_composer import (
    ComposeObject,
    prime_composer,
    region_constrained,
)
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.steer import apply_edits

KINDS = {"wan21": "cross", "cogvideox": "self"}
PROMPTS = {
    "prompt": ["a red square moves right", "a blue circle moves left"],
    "negative_prompt": ["", ""],
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors(Edit):
    """Keeps the tensors of calls as they come, or what they gave."""

    seen: list = field(default_factory=list)
    name: str = "before"

    @property
    def stage(self):
        return "query" if self.name == "before" else "read"

    def apply(self, state, strength):
        own = {name: getattr(state, name).double().clone() for name in ("q", "k", "v")}
        if self.name == "after":
            own["out"] = state.out.double()
        self.seen.append((state.call, state.pass_, state.image, own))


@functools.cache
def pipeline(kind):
    return tiny.PIPELINES[kind]()


def object_mask():
    mask = torch.zeros(3, 6, 4, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    return mask


def run(kind, edits, steps=2):
    before, after = Tensors(name="before"), Tensors(name="after")
    with visattn.steer(pipeline(kind), [before, *edits, after]):
        out = tiny.generate(pipeline(kind), steps=steps, **PROMPTS)
    return out, list(zip(before.seen, after.seen, strict=True))


def reference(call, image, own, to, origin, rows):
    """The logits of sample 0 with those of sample 1 in the columns and rows of the object."""
    q, k = own["q"][0], own["k"][0]
    q_ref, k_ref = own["q"][1][:, origin], own["k"][1][:, origin]
    logits = q @ k.mT
    logits[:, :, to] = q @ k_ref.mT
    if rows:
        row = q_ref @ k.mT
        row[:, :, to] = q_ref @ k_ref.mT
        logits[:, to] = row
    return logits * call.factor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_overwritten_logits_equal_those_of_a_dense_toy(kind, rows, moved):
    mask = object_mask()
    other = mask.roll(2, 1) if moved else None
    edit = ComposeObject(
        source=1, samples=(0,), mask=mask, source_mask=other, rows=rows, passes=("cond",), stop=1
    )
    _, seen = run(kind, [edit])
    for (call, pass_, image, own), (*_, after) in seen:
        to = mask.flatten().nonzero()[:, 0] + image.start
        origin = to if other is None else other.flatten().nonzero()[:, 0] + image.start
        expected = (own["q"] @ own["k"].mT * call.factor).softmax(-1) @ own["v"]
        if pass_ == "cond" and call.step == 0:  # the window
            logits = reference(call, image, own, to, origin, rows)
            plain = expected[0].clone()
            expected[0] = logits.softmax(-1) @ own["v"][0]  # the values are its own
            assert not torch.allclose(plain, expected[0])
        torch.testing.assert_close(after["out"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_region_sees_the_tokens_of_the_object(kind):
    mask, attention = object_mask(), KINDS[kind]
    spy = Tensors(name="after", attention=attention)
    edit = region_constrained((1, 2), mask, attention=attention, samples=(0,))
    with visattn.steer(pipeline(kind), [edit, spy]):
        tiny.generate(pipeline(kind), steps=1, **PROMPTS)
    for call, pass_, image, own in spy.seen:
        logits = own["q"] @ own["k"].mT * call.factor
        if pass_ == "cond":
            text = call.kv_layout.texts[0][0]
            outside = (~mask.flatten()).nonzero()[:, 0] + image.start
            for token in (1, 2):
                logits[0, :, outside, text + token] = -torch.inf
        expected = logits.softmax(-1) @ own["v"]
        torch.testing.assert_close(own["out"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_prime_composer_is_both_in_their_windows(kind):
    edits = prime_composer(1, (0,), object_mask(), tokens=(1, 2), attention=KINDS[kind], stop=0.5)
    plain = tiny.generate(pipeline(kind), steps=4, **PROMPTS)
    with visattn.steer(pipeline(kind), edits):
        out = tiny.generate(pipeline(kind), steps=4, **PROMPTS)
    assert not torch.allclose(out[0], plain[0])
    # the reference is what it was, but for the rounding of a larger head size
    torch.testing.assert_close(out[1], plain[1], atol=1e-4, rtol=1e-5)
    assert [(edit.start, edit.stop) for edit in edits] == [(0, 0.5), (0, 1.0)]


def test_memory_is_linear():
    def make(tokens):
        state = joint_state(tokens, samples=2)
        mask = torch.arange(tokens) % 3 == 0
        edits = prime_composer(1, (0,), mask, tokens=(1,), attention="self")
        return lambda: apply_edits(state, [(edit, torch.ones(1)) for edit in edits])

    check_linear(make)


def test_what_cannot_be_is_refused():
    mask = object_mask()
    with pytest.raises(ValueError, match="12 tokens in mask and 72 in source_mask"):
        ComposeObject(source=1, mask=mask, source_mask=torch.ones(72))
    with pytest.raises(ValueError, match="use attention='self'"):
        ComposeObject(source=1, mask=mask, attention="cross")
    for edit, message in (
        (ComposeObject(source=2, mask=mask), "has 2 samples, from 0 on"),
        (ComposeObject(source=1, mask=mask[:2]), "mask of 48 tokens"),
        (region_constrained((1,), mask[:2]), "mask of 48 tokens"),
    ):
        with pytest.raises(ValueError, match=message), visattn.steer(pipeline("wan21"), edit):
            tiny.generate(pipeline("wan21"), steps=1, **PROMPTS)
