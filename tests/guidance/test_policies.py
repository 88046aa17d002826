"""What the policies of the tokens and the targets do to an attention call, against attention with
the whole map in float64: with the text in front (CogVideoX, Flux) and behind (SD3)."""

import pytest
import torch
from support import tiny, tiny_images
from support.perturbed import perturbed_attention

from visattn import guide
from visattn.guidance import PAG, SEG, SoftPAG, steer
from visattn.guidance.edits.steer import Steering
from visattn.inject import observe

KINDS = {"cogvideox": tiny, "flux": tiny_images, "sd3": tiny_images}
POLICIES = [(policy, "value") for policy in ("all", "image_rows", "ii_identity", "ii_renorm")]
TARGETS = [(policy, target) for policy in POLICIES[:2] for target in ("uniform", "mean_query")]
CASES = [*POLICIES, *((policy, target) for (policy, _), target in TARGETS)]
STRENGTHS = torch.tensor([1.0, 0.0, 0.35, 0.0])
LAYER = 1


def pipeline(kind):
    return {"cogvideox": tiny.cogvideox, **tiny_images.IMAGES}[kind]()


def generate(kind, pipe, **options):
    return KINDS[kind].generate(pipe, steps=1, **options)


def softpag(policy, target="value", layer=LAYER, **options):
    heads = {n: u for n, u in enumerate(STRENGTHS.tolist()) if u}
    return SoftPAG({layer: heads}, policy=policy, target=target, **options)


@pytest.fixture
def calls(monkeypatch):
    """Every call that is edited, with what it gives."""
    found, own = [], Steering.__call__

    def spy(steering, call):
        out = own(steering, call)
        if out is not None:
            found.append((call, out))
        return out

    monkeypatch.setattr(Steering, "__call__", spy)
    return found


def plain(call):
    """The call as it is without edits, part by part of its batch."""
    count = len(call.passes or (None,))
    parts = zip(*(x.chunk(count) for x in (call.q, call.k, call.v)), strict=True)
    return torch.cat([call.kernel(n, *part)[0] for n, part in enumerate(parts)])


def text_rows(layout):
    rows = torch.zeros(layout.length, dtype=torch.bool)
    for first, length in layout.texts:
        rows[first : first + length] = True
    return rows


@pytest.mark.parametrize(("policy", "target"), CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_equals_the_dense_map(kind, policy, target, calls):
    pipe = pipeline(kind)
    with guide(pipe, softpag(policy, target)):
        generate(kind, pipe)
    [(call, out)] = calls  # of the perturbed pass alone
    assert call.passes == ("perturbed",) and call.number == LAYER
    expected = perturbed_attention(
        call.q, call.k, call.v, call.layout, STRENGTHS, policy=policy, target=target
    )
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 1e-5
    own = plain(call)
    untouched = STRENGTHS == 0
    assert torch.equal(out[:, untouched], own[:, untouched])
    text = text_rows(call.layout)
    starts = {"cogvideox": 0, "flux": 0, "sd3": 24}
    assert int(text.nonzero()[0]) == starts[kind]
    if policy != "all":
        assert torch.equal(out[:, :, text], own[:, :, text])
    else:
        assert not torch.allclose(out[:, 0, text], own[:, 0, text], atol=1e-3)
    assert not torch.allclose(out[:, 0, ~text], own[:, 0, ~text], atol=1e-3)
    if (policy, target) == ("all", "value"):
        assert torch.equal(out[:, 0], call.v[:, 0])  # strength 1


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_are_untouched(kind):
    """The layers before see what they see without; and those of the other passes too."""
    pipe, seen = pipeline(kind), []

    def keep(call):
        seen.append((call.passes, call.number, call.q.clone(), call.v.clone()))

    with observe(pipe, keep):
        generate(kind, pipe)
        without, seen[:] = list(seen), []
        with guide(pipe, softpag("all"), reuse_prefix=False):
            generate(kind, pipe)
    ordinary = [row for row in seen if row[0] != ("perturbed",)]
    perturbed = [row for row in seen if row[0] == ("perturbed",)]
    assert [row[:2] for row in ordinary] == [row[:2] for row in without]
    for own, other in zip(ordinary, without, strict=True):
        assert torch.equal(own[2], other[2]) and torch.equal(own[3], other[3])
    cond = [row for row in without if "cond" in row[0]]
    assert [row[1] for row in perturbed] == [row[1] for row in cond]
    for own, other in zip(perturbed, cond, strict=True):
        part = slice(None) if len(other[0]) == 1 else slice(len(own[2]), None)
        same = own[1] <= LAYER
        assert torch.allclose(own[2], other[2][part], atol=1e-5) == same
        if len(other[0]) == 1:
            assert torch.equal(own[2], other[2]) == same


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_batch_is_edited_where_edits_are_for_one_pass(kind, calls):
    """Steered without guidance's own pass: the conditional rows of a batch, or its call."""
    pipe = pipeline(kind)
    edits = [
        type(edit)(**{**vars(edit), "passes": ("cond",)}) for edit in softpag("image_rows").edits()
    ]
    with steer(pipe, edits):
        generate(kind, pipe)
    [(call, out)] = calls
    u = {pass_: STRENGTHS * (pass_ == "cond") for pass_ in call.passes}
    parts = zip(*(x.chunk(len(u)) for x in (call.q, call.k, call.v, out, plain(call))), strict=True)
    for (q, k, v, edited, own), (pass_, strengths) in zip(parts, u.items(), strict=True):
        expected = perturbed_attention(q, k, v, call.layout, strengths, policy="image_rows")
        assert (edited - expected).abs().max() < 1e-5
        assert torch.equal(edited, own) == (pass_ == "uncond")


def test_strength_one_hides_values_that_are_not_finite():
    """A head that is wholly replaced may hold anything, as one that was never computed."""
    from visattn.guidance.edits.state import State

    class Call:
        kind = "self"

    state = object.__new__(State)
    state.call, state.q = Call(), torch.zeros(1, 2, 3, 4)
    state.out = torch.full((1, 2, 3, 4), torch.nan)
    [edit] = SoftPAG({0: [0]}).edits()
    edit.change(state, "out", torch.ones(1, 2, 3, 4), torch.tensor([1.0, 0.0]))
    assert bool((state.out[:, 0] == 1).all()) and bool(state.out[:, 1].isnan().all())


def test_without_text_tokens_the_policies_are_the_identity():
    pipe, found = tiny.wan21(), []
    for policy in ("all", "ii_identity", "ii_renorm"):
        with guide(pipe, softpag(policy)):
            found.append(tiny.generate(pipe, steps=1))
    assert found[1].equal(found[0])
    assert found[2].equal(found[0])
    with pytest.raises(ValueError, match="targets are value, uniform and mean_query"):
        softpag("ii_renorm", "uniform")


@pytest.mark.parametrize("kind", KINDS)
def test_pag_and_seg_are_policies_and_targets(kind):
    """PAG has image rows keep the text's logits and their own, as that of SD3 in diffusers; SEG's
    limit is the mean query of all image tokens."""
    pipe = pipeline(kind)
    found = []
    for own in (
        PAG(layers=LAYER),
        SoftPAG({LAYER: None}, policy="ii_identity"),
        SEG(layers=LAYER),
        SoftPAG({LAYER: None}, policy="image_rows", target="mean_query"),
    ):
        with guide(pipe, own):
            found.append(generate(kind, pipe))
    assert torch.equal(found[0], found[1])
    assert (found[2] - found[3]).abs().max() < 1e-5
    assert (found[0] - found[2]).abs().max() > 1e-3
