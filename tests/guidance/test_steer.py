"""Edits on pipelines: they reach the calls that they name and no other, and leave no trace."""

import math
import re

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from support import planned, tiny
from support.allocations import check_linear
from support.edited import edited, tensors

import visattn
from visattn import Grid, TokenLayout
from visattn.attention.backends.reference import pattern_mask
from visattn.guidance import (
    BlurQueries,
    BorrowKeys,
    HeadSet,
    LabelBias,
    Perturb,
    RedistributeSinks,
    RegionMask,
    ReplaceQueries,
    ScaleHeads,
    ScaleTokens,
    ShareKV,
    ShuffleTokens,
    SkipBlock,
    SkipRandomBlocks,
    Temperature,
)
from visattn.guidance.composition.consistent_subjects import MixQueries
from visattn.inject import observe, summary
from visattn.inject.attachment import attached
from visattn.patterns import Dense, Neighborhood
from visattn.plan import Plan, Rule
from visattn.selectors import Reuse, TopBlocks

STEPS = 4
KINDS = ("wan21", "cogvideox")
NEAR = Plan((Rule(Neighborhood((1, 3, 3))),))


def path(kind, number):
    return f"{'blocks' if 'wan' in kind else 'transformer_blocks'}.{number}.attn1"


def by_hand(kind, scale, layers, heads, steps, passes):
    """A generation in which a hook on the output projection scales heads."""
    pipe = tiny.PIPELINES[kind]()
    model, called = pipe.transformer, []
    model.register_forward_pre_hook(lambda *_: called.append(None) or None)
    apart = "wan" in kind

    def hook(_, args):
        step = (len(called) - 1) // (2 if apart else 1)
        if step not in steps:
            return None
        x = args[0].clone().unflatten(-1, (tiny.HEADS, tiny.DIM))
        if apart:
            if ("cond", "uncond")[(len(called) - 1) % 2] in passes:
                x[:, :, heads] *= scale
        else:
            for at, name in enumerate(("uncond", "cond")):
                if name in passes:
                    x[at, :, heads] *= scale
        return (x.flatten(-2),)

    for number in layers:
        model.get_submodule(path(kind, number)).to_out[0].register_forward_pre_hook(hook)
    return tiny.generate(pipe, steps=STEPS)


SCOPES = {
    "everything": ({}, (0, 1, 2), [0, 1, 2, 3], range(4), ("cond", "uncond")),
    "a layer": ({"layers": 1}, (1,), [0, 1, 2, 3], range(4), ("cond", "uncond")),
    "the last": ({"layers": [-1], "heads": [0, 3]}, (2,), [0, 3], range(4), ("cond", "uncond")),
    "a pass": ({"heads": 2, "passes": ("uncond",)}, (0, 1, 2), [2], range(4), ("uncond",)),
    "from a step": ({"start": 1}, (0, 1, 2), [0, 1, 2, 3], (1, 2, 3), ("cond", "uncond")),
    "a share": (
        {"start": 0.25, "stop": 0.75},
        (0, 1, 2),
        [0, 1, 2, 3],
        (1, 2),
        ("cond", "uncond"),
    ),
    "all at once": (
        {"layers": [0, 2], "heads": [1], "passes": "cond", "start": 2, "stop": 3},
        (0, 2),
        [1],
        (2,),
        ("cond",),
    ),
}


# layers and steps are found alike; passes are halves of a batch in CogVideoX
REACHED = [("wan21", name) for name in SCOPES] + [
    ("cogvideox", name) for name in ("everything", "a pass", "all at once")
]


@pytest.mark.parametrize(("kind", "name"), REACHED)
def test_an_edit_reaches_what_it_names(kind, name):
    scope, layers, heads, steps, passes = SCOPES[name]
    pipe = tiny.PIPELINES[kind]()
    with visattn.steer(pipe, ScaleHeads(scale=3.0, **scope)):
        found = tiny.generate(pipe, steps=STEPS)
    wanted = by_hand(kind, 3.0, layers, heads, steps, passes)
    # a pass that is edited apart from the other is attended in a batch of its own
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not found.equal(planned.usual(kind, None, steps=STEPS))


def test_cross_attention_is_reached():
    pipe = tiny.PIPELINES["wan21"]()
    edit = ScaleTokens(tokens=(1,), scale=5.0, attention="cross", layers=[1])
    with visattn.steer(pipe, edit):
        one = tiny.generate(pipe)
    with visattn.steer(pipe, ScaleTokens(tokens=(1,), scale=1.0, attention="cross")):
        assert tiny.generate(pipe).equal(planned.usual("wan21", None))
    assert not one.equal(planned.usual("wan21", None))


@pytest.mark.parametrize("kind", KINDS)
def test_no_edits_and_edits_of_nothing_change_no_bit(kind):
    pipe = tiny.PIPELINES[kind]()
    for edits in ([], [ScaleHeads(scale=1.0)], [Perturb(heads=0.0)], [Temperature(temperature=1)]):
        with visattn.steer(pipe, edits):
            found = tiny.generate(pipe)
        assert found.equal(planned.usual(kind, None))


@pytest.mark.parametrize("kind", KINDS)
def test_edits_leave_no_trace(kind):
    pipe = tiny.PIPELINES[kind]()
    tiny.generate(pipe, steps=1)
    before = planned.traces(pipe)

    def stop(*_):
        raise planned.Stop

    edits = [ScaleHeads(scale=2.0), SkipBlock(blocks=1), BlurQueries(sigma=1.0, layers=[2])]
    with visattn.steer(pipe, edits):
        tiny.generate(pipe)
    assert planned.traces(pipe) == before
    with pytest.raises(planned.Stop), visattn.steer(pipe, edits):
        tiny.generate(pipe, callback_on_step_end=stop)
    assert planned.traces(pipe) == before
    broken = LabelBias(table=torch.zeros(1, 1), q_labels=stop, k_labels=torch.zeros(1), layers=[1])
    with pytest.raises(planned.Stop), visattn.steer(pipe, broken):
        tiny.generate(pipe)
    assert planned.traces(pipe) == before
    assert tiny.generate(pipe).equal(planned.usual(kind, None))


def test_steering_inside_steering():
    pipe = tiny.PIPELINES["wan21"]()
    outer, inner = ScaleHeads(scale=2.0, heads=[0]), Perturb(heads={1: 0.5})
    with visattn.steer(pipe, [outer, inner]):
        wanted = tiny.generate(pipe)
    with visattn.steer(pipe, outer):
        alone = tiny.generate(pipe)
        with visattn.steer(pipe, inner):
            assert tiny.generate(pipe).equal(wanted)
        assert tiny.generate(pipe).equal(alone)


def test_pipelines_that_share_a_denoiser_are_each_steered():
    """Also where the other one has the plan."""
    pipe = tiny.PIPELINES["cogvideox"]()
    other = type(pipe)(**pipe.components)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    edit = ScaleHeads(scale=2.0, heads=[0], passes="cond")
    with visattn.steer(pipe, edit):
        wanted = tiny.generate(pipe)
        with visattn.steer(other, ScaleHeads(scale=1.0, passes="uncond")):
            assert tiny.generate(other).equal(wanted)
        assert tiny.generate(pipe).equal(wanted)
    visattn.apply_plan(pipe, NEAR)
    with visattn.steer(pipe, edit):
        wanted = tiny.generate(pipe)
    with visattn.steer(other, edit):
        assert tiny.generate(other).equal(wanted)
    assert not tiny.generate(pipe).equal(wanted)
    with visattn.steer(pipe, edit):
        assert tiny.generate(pipe).equal(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_kept_between_steps_while_it_is_steered(kind):
    pipe = tiny.PIPELINES[kind]()
    visattn.apply_plan(pipe, Plan((Rule(Reuse(TopBlocks(0.4, block=8), 100)),)))
    with visattn.steer(pipe, ScaleHeads(scale=1.5)):
        tiny.generate(pipe)
    found = [m for layer in attached(pipe.transformer).layers for m in layer.memories.values()]
    assert [(own.made, own.reused) for own in found] == 6 * [(1, 2)]


def test_plans_come_and_go_while_it_is_steered():
    pipe = tiny.PIPELINES["wan21"]()
    edit = ScaleHeads(scale=2.0, heads=[0])
    with visattn.sparse(pipe, NEAR), visattn.steer(pipe, edit):
        wanted = tiny.generate(pipe)
    with visattn.steer(pipe, edit):
        dense = tiny.generate(pipe)
        with visattn.sparse(pipe, NEAR):
            assert tiny.generate(pipe).equal(wanted)
        visattn.apply_plan(pipe, NEAR)
        assert tiny.generate(pipe).equal(wanted)
        assert summary(pipe).layers[0].sparse_calls == 6
        visattn.remove_plan(pipe)
        assert tiny.generate(pipe).equal(dense)
    assert tiny.generate(pipe).equal(planned.usual("wan21", None))


@pytest.mark.parametrize("kind", KINDS)
def test_density_1_is_edited_as_dense_attention_is(kind):
    pipe = tiny.PIPELINES[kind]()
    tokens = 10 + 72 if kind == "cogvideox" else 72
    bits = 1 + torch.arange(tokens) % 3
    bits[:12] = 7
    edits = [RegionMask(q_bits=bits), Temperature(temperature=1.3, layers=[0])]
    with visattn.steer(pipe, edits):
        wanted = tiny.generate(pipe)
        with visattn.sparse(pipe, Plan((Rule(Dense()),))):
            found = tiny.generate(pipe)
        with visattn.sparse(pipe, Plan((Rule(Neighborhood((3, 6, 4))),))):
            whole = tiny.generate(pipe)
    assert not wanted.equal(planned.usual(kind, None))
    for other in (found, whole):
        assert (other - wanted).abs().max() <= 1e-5 * wanted.abs().max()


REFUSED = {
    "layer": (ScaleHeads(scale=2.0, layers=[3]), "layer 3"),
    "path": (ScaleHeads(scale=2.0, layers="blocks.9.attn1"), "blocks.9.attn1"),
    "head": (ScaleHeads(scale=2.0, heads=[4]), "head 4"),
    "block": (SkipBlock(blocks=3), "block 3"),
    "role": (ScaleHeads(scale=2.0, role="transformer_2"), "transformer_2"),
    "token": (ScaleTokens(tokens=(99,), scale=2.0, attention="cross"), "99"),
    "text of none": (ScaleTokens(tokens=(0,), scale=2.0), "attention='cross'"),
    "sample": (ShareKV(source=0, samples=(1,)), "sample 1"),
    "source": (ShareKV(source=3), "sample 3"),
    "labels": (RegionMask(q_bits=torch.ones(5, dtype=torch.int64)), "72 tokens"),
    "another source": (ReplaceQueries(source=2), "sample 2"),
    "rows of text": (ScaleHeads(scale=2.0, stream="text"), "no text queries"),
    "rows of text apart": (
        ScaleHeads(scale=2.0, stream="text", attention="cross"),
        "no text queries",
    ),
    "half a head": (ShareKV(source=0, heads=0.5), "whole heads"),
    "half a mask": (
        RegionMask(q_bits=torch.ones(72, dtype=torch.int64), heads={1: 0.5}),
        "whole heads",
    ),
    "heads of another": (Perturb(layers=HeadSet({}, model="Other")), "another model"),
    "never": (ScaleHeads(scale=2.0, start=3, stop=4), "no attention call"),
    "no pass": (ScaleHeads(scale=2.0, passes="perturbed"), "no attention call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_not_is_refused_in_a_sentence(name):
    edit, words = REFUSED[name]
    pipe = tiny.PIPELINES["wan21"]()
    tiny.generate(pipe, steps=1)
    before = planned.traces(pipe)
    with pytest.raises(ValueError, match=words), visattn.steer(pipe, edit):
        tiny.generate(pipe)
    assert planned.traces(pipe) == before


ONE_LABEL = torch.zeros(1)
WRONG = {
    "passes": (
        lambda: ScaleHeads(scale=2.0, passes=("both",)),
        "passes=('both',)) must be of cond, uncond, perturbed",
    ),
    "stream": (
        lambda: ScaleHeads(scale=2.0, stream="video"),
        "stream='video') must be all or image or text",
    ),
    "share": (
        lambda: ScaleHeads(scale=2.0, start=1.5),
        "has 1.5 for a share of the steps; it is at most 1.0",
    ),
    "start": (
        lambda: ScaleHeads(scale=2.0, start=-1),
        "start=-1, stop=1.0) must be steps",
    ),
    "attention": (
        lambda: ScaleHeads(scale=2.0, attention="joint"),
        "attention='joint') must be self or cross",
    ),
    "target": (
        lambda: Perturb(target="noise"),
        "target='noise') must be one of",
    ),
    "cross value": (
        lambda: Perturb(attention="cross"),
        "target='value') needs queries that are keys too",
    ),
    "temperature": (
        lambda: Temperature(temperature=0),
        "temperature=0) must be above 0",
    ),
    "sigma": (
        lambda: BlurQueries(sigma=-1.0),
        "sigma=-1.0) must be a number of tokens",
    ),
    "axes": (
        lambda: BlurQueries(sigma=1.0, axes="xy"),
        "axes='xy') must be some of t, h and w",
    ),
    "tokens": (
        lambda: ScaleTokens(tokens=(), scale=2.0),
        "ScaleTokens has no tokens",
    ),
    "scale": (
        lambda: ScaleTokens(tokens=(1,), scale=math.nan),
        "scale=nan) must be finite",
    ),
    "what": (
        lambda: ShareKV(source=0, what="queries"),
        "what='queries') must be both, keys or values",
    ),
    "negative source": (
        lambda: ReplaceQueries(source=-1),
        "source=...) has -1; it must be",
    ),
    "window": (
        lambda: ScaleHeads(scale=2.0, start=0.8, stop=0.2),
        "start=0.8, stop=0.2) must start before it stops",
    ),
    "no sample": (
        lambda: ScaleHeads(scale=2.0, samples=()),
        "samples=()) names no sample",
    ),
    "no number": (
        lambda: ScaleHeads(scale="2"),
        "scale='2') must be finite",
    ),
    "blurred text": (
        lambda: BlurQueries(sigma=1.0, stream="text"),
        "stream='text') must be all or image",
    ),
    "shared rows": (
        lambda: ShareKV(source=0, stream="image"),
        "ShareKV(stream='image') must be all",
    ),
    "borrowed rows": (
        lambda: BorrowKeys(sources=(0,), stream="text"),
        "BorrowKeys(stream='text') must be all",
    ),
    "target of text": (
        lambda: Perturb(target="self_and_text", stream="text"),
        "target='self_and_text', stream='text') is not possible",
    ),
    "drawn": (
        lambda: BorrowKeys(sources=(0,), share=0.0),
        "BorrowKeys(share=0.0) must be above 0 and at most 1",
    ),
    "table": (
        lambda: LabelBias(table=torch.zeros(2), q_labels=ONE_LABEL, k_labels=ONE_LABEL),
        "LabelBias(table=...) has the shape [2]",
    ),
    "blocks": (
        lambda: SkipBlock(blocks=()),
        "SkipBlock names no block",
    ),
    "part": (
        lambda: SkipBlock(blocks=0, what="norm"),
        "what='norm') must be block, attention or feedforward",
    ),
    "shuffled": (
        lambda: ShuffleTokens(blocks=0, share=2.0),
        "ShuffleTokens(share=2.0) must be above 0 and at most 1",
    ),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_guidances_and_edits_are_told_apart():
    pipe = tiny.PIPELINES["wan21"]()
    with pytest.raises(TypeError, match="guide"), visattn.steer(pipe, visattn.SoftPAG()):
        pass
    with pytest.raises(TypeError, match="steer"), visattn.guide(pipe, Perturb()):
        pass


def test_every_backend_is_edited_alike():
    """Backends of diffusers and our own: what is perturbed does not depend on who computes it."""
    pipe = tiny.PIPELINES["wan21"]()
    guidance = visattn.SoftPAG({0: [1], 2: [0, 3]}, strength=0.5)

    def guided(plan, backend="auto"):
        with visattn.sparse(pipe, plan, backend=backend), visattn.guide(pipe, guidance):
            return tiny.generate(pipe)

    dense, sparse = guided(Plan()), guided(NEAR, "reference")
    assert (dense - planned.usual("wan21", None)).abs().max() > 1e-2
    assert (sparse - dense).abs().max() > 1e-2
    assert (guided(NEAR, "blockwise") - sparse).abs().max() <= 1e-5 * sparse.abs().max()
    with attention_backend("_native_math"):
        assert (guided(Plan()) - dense).abs().max() <= 1e-5 * dense.abs().max()


# ---- blocks


def outputs(pipe, block, calls):
    """Keeps inputs and outputs of a block: image tokens, and text tokens where it has them."""

    def hook(_, args, kwargs, out):
        given = [*args[:2], *(kwargs.get(n) for n in ("hidden_states", "encoder_hidden_states"))]
        given = [x for x in given if x is not None][:2]
        calls.append((given, out if isinstance(out, tuple) else (out,)))

    return pipe.transformer.get_submodule(block).register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_block_gives_what_it_got_in_the_passes_that_are_meant(kind):
    pipe, calls = tiny.PIPELINES[kind](), []
    after = path(kind, 2).rsplit(".", 1)[0]
    outputs(pipe, after, calls)  # what the next block gets is what the skipped one gave
    before: list = []
    outputs(pipe, path(kind, 1).rsplit(".", 1)[0], before)
    with visattn.steer(pipe, SkipBlock(blocks=[1], passes=("uncond",))):
        tiny.generate(pipe)
    joint = kind == "cogvideox"
    for n, ((given, _), (got, gave)) in enumerate(zip(calls, before, strict=True)):
        for x, old, own in list(zip(given, got, gave, strict=False))[: 2 if joint else 1]:
            if joint:  # batch of uncond and cond
                assert x[0].equal(old[0])
                assert x[1].equal(own[1])
            else:
                assert x.equal(old if n % 2 else own)


@pytest.mark.parametrize("what", ["attention", "feedforward"])
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_part_is_as_if_it_gave_zero(kind, what):
    pipe, other = tiny.PIPELINES[kind](), tiny.PIPELINES[kind]()
    with visattn.steer(pipe, SkipBlock(blocks=1, what=what)):
        found = tiny.generate(pipe)
    name = "attn1" if what == "attention" else "ffn" if kind == "wan21" else "ff"
    part = other.transformer.get_submodule(path(kind, 1).rsplit(".", 1)[0] + "." + name)

    def zero(_, args, out):
        return tuple(torch.zeros_like(x) for x in out) if isinstance(out, tuple) else out * 0

    part.register_forward_hook(zero)
    assert found.equal(tiny.generate(other))


def test_parts_of_compiled_blocks_are_skipped_and_a_whole_model_is_refused():
    pipe, wanted = tiny.PIPELINES["wan21"](), {}
    edits = {what: SkipBlock(blocks=1, what=what) for what in ("attention", "feedforward")}
    for what, edit in edits.items():
        with visattn.steer(pipe, edit):
            wanted[what] = tiny.generate(pipe, steps=1)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    for what, edit in edits.items():
        with visattn.steer(pipe, edit):
            assert tiny.generate(pipe, steps=1).equal(wanted[what])
    assert tiny.generate(pipe, steps=1).equal(planned.usual("wan21", None, steps=1))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole"), visattn.steer(pipe, edit):
        raise AssertionError("not reached")
    torch._dynamo.reset()


def test_random_blocks_are_others_at_every_step():
    edit = SkipRandomBlocks(share=0.5, seed=3)
    paths = [f"blocks.{n}" for n in range(8)]
    drawn = [frozenset(edit.drawn(paths, step)) for step in range(6)]
    assert {len(one) for one in drawn} == {4}
    assert len(set(drawn)) > 3
    assert drawn == [frozenset(edit.drawn(paths, step)) for step in range(6)]
    pipe = tiny.PIPELINES["wan21"]()
    with visattn.steer(pipe, SkipRandomBlocks(share=0.4)):
        assert not tiny.generate(pipe).equal(planned.usual("wan21", None))


def test_shuffled_tokens_come_back_to_their_places():
    edit = ShuffleTokens(blocks=0, share=0.5)
    orders = [edit.order(72, f"blocks.{n}", step) for n in range(2) for step in range(3)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(72))
        assert int((order != torch.arange(72)).sum()) <= 36
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert orders[0].equal(edit.order(72, "blocks.0", 0))
    pipe, calls = tiny.PIPELINES["wan21"](), []
    outputs(pipe, "blocks.1", calls)
    with visattn.steer(pipe, ShuffleTokens(blocks=[1], passes="cond")):
        found = tiny.generate(pipe)
    (given, gave), usual = calls[0], []
    assert given[0].norm() > 0
    # a block without attention across tokens would give the same: norms of tokens are those
    other = tiny.PIPELINES["wan21"]()
    outputs(other, "blocks.1", usual)
    tiny.generate(other)
    order = ShuffleTokens(blocks=[1]).order(72, "blocks.1", 0)
    assert given[0].equal(usual[0][0][0][:, order])
    assert gave[0].shape == usual[0][1][0].shape
    assert not found.equal(planned.usual("wan21", None))


# ---- with a sparse plan


def test_edits_see_the_pattern_of_the_plan():
    """Every call under a plan with a mask, against the map of both."""
    pipe, checked = tiny.PIPELINES["wan21"](), []
    bits = 1 + torch.arange(72) % 2
    allowed = (bits[:, None] & bits) != 0
    layout = TokenLayout(Grid(3, 6, 4))
    mask = allowed & pattern_mask(Neighborhood((1, 3, 3)), layout)
    rowless = ~mask.any(1)
    mask = mask | torch.diag(rowless)
    seen = []

    def look(call):
        seen.append((call.q, call.k, call.v))

    layer = "blocks.1.attn1"
    module = pipe.transformer.get_submodule(layer)

    def hook(_, args):
        q, k, v = seen[-1]
        logits = (q.double() @ k.double().mT) * q.shape[3] ** -0.5
        wanted = logits.masked_fill(~mask, -math.inf).softmax(-1) @ v.double()
        found = args[0].unflatten(-1, (tiny.HEADS, tiny.DIM)).transpose(1, 2)
        checked.append(float((found - wanted).abs().max()))

    module.to_out[0].register_forward_pre_hook(hook)
    edit = RegionMask(q_bits=bits)
    with visattn.sparse(pipe, NEAR), visattn.steer(pipe, edit), observe(pipe, look, [layer]):
        tiny.generate(pipe)
    assert len(checked) == 6
    assert max(checked) < 1e-5


# ---- memory


def big(tokens):
    return TokenLayout(Grid(2, tokens // 128, 64), text_before=16)


MEMORY = {
    "perturb": lambda _: Perturb(heads=0.5),
    "mean query": lambda _: Perturb(target="mean_query"),
    "self and text": lambda _: Perturb(target="self_and_text"),
    "self for image": lambda _: Perturb(target="self_for_image"),
    "blur": lambda _: BlurQueries(sigma=2.0),
    "temperature": lambda _: Temperature(temperature=2.0, keys="text", stream="image"),
    "region mask": lambda n: RegionMask(q_bits=1 + torch.arange(n) % 3),
    "label bias": lambda n: LabelBias(
        table=torch.tensor([[0.0, -1.0]]),
        q_labels=torch.zeros(n, dtype=torch.int64),
        k_labels=torch.arange(n) % 2,
    ),
    "scale tokens": lambda _: ScaleTokens(tokens=(0, 3), scale=2.0, both_ways=True),
    "renormalised": lambda _: ScaleTokens(tokens=(0, 3), scale=2.0, renormalise=True),
    "shared keys": lambda _: ShareKV(source=0, samples=(1,)),
    "borrowed keys": lambda _: BorrowKeys(sources=(0,), samples=(1,), share=0.5),
    "scale heads": lambda _: ScaleHeads(scale=2.0),
    "replaced queries": lambda _: ReplaceQueries(source=1, stream="image"),
    "mixed queries": lambda _: MixQueries(source=1, samples=(0,)),
    "sinks": lambda n: RedistributeSinks(sinks=torch.arange(n) % 100 == 0, scale=0.5),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_linear(name):
    def make(tokens):
        layout = big(tokens)
        q, k, v = tensors(layout, dtype=torch.float32, heads=1, dim=8)
        edit = MEMORY[name](layout.length)
        return lambda: edited(edit, q, k, v, layout)

    check_linear(make, heads=2)
