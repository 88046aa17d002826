"""Subjects that are the same in a batch: each edit against one softmax over all keys that a sample
sees, written out."""

import functools

import pytest
import torch
from diffusers import WanTransformer3DModel
from support import tiny, tiny_images
from support.allocations import check_linear, joint_state
from support.edited import (
    DIM,
    FIRST,
    GRID,
    HEADS,
    LAST,
    VIDEO,
    attention,
    edited,
    image_of,
    tensors,
    text_of,
)

import visattn
from visattn.attention.backends.reference import pattern_mask
from visattn.guidance.composition.consistent_subjects import (
    BorrowSometimes,
    MixQueries,
    consistory,
    ir_diffusion,
    story_diffusion,
)
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.share_keys import BorrowKeys, Rotary, rotary_of
from visattn.guidance.edits.steer import apply_edits
from visattn.guidance.token_maps.subject_masks import SubjectMasks
from visattn.guidance.token_maps.token_readout import otsu, token_masks
from visattn.patterns import Neighborhood

LAYOUTS = {"video": VIDEO, "text first": FIRST, "text last": LAST}
PATTERNS = {"dense": None, "sparse": Neighborhood((1, 3, 3))}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def seen_by(layout, pattern=None, bits=None):
    """The bias of the keys of its own, 0 or minus infinity."""
    kept = torch.ones(layout.length, layout.length, dtype=torch.bool)
    if pattern is not None:
        kept &= pattern_mask(pattern, layout).reshape(kept.shape)
    if bits is not None:
        kept &= (bits[:, None] & bits) != 0
    return torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, -torch.inf)


def together(q, k, v, layout, sample, sources, bias):
    """``[H, L, D]`` of a sample whose softmax is over its own keys and those of others, which are
    given as (sample, image tokens)."""
    image = image_of(layout)
    keys = [k[s][:, image[at]] for s, at in sources]
    values = [v[s][:, image[at]] for s, at in sources]
    own = q[sample] @ k[sample].mT * DIM**-0.5 + bias
    more = [q[sample].double() @ x.double().mT * DIM**-0.5 for x in keys]
    weights = torch.cat([own, *more], -1).softmax(-1)
    return weights @ torch.cat([v[sample], *values], 1).double()


def close(found, wanted):
    assert (found.double() - wanted).abs().max() < 1e-9


def drawn(edit, samples, step, share=0.5):
    """The tokens that ``BorrowKeys`` draws, seen by what they change."""
    random = torch.Generator().manual_seed(edit.seed * 1_000_003 + step)
    return torch.rand(samples, GRID.numel, generator=random) < share


# ---- masks


def test_otsu_splits_where_the_variance_between_is_largest():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(40) * 0.2, torch.randn(25) * 0.3 + 2])[torch.randperm(65)]
    best, wanted = -1.0, None
    for cut in values.sort().values[1:]:
        low, high = values[values < cut].double(), values[values >= cut].double()
        between = len(low) * len(high) * float(high.mean() - low.mean()) ** 2
        if between > best:
            best, wanted = between, cut
    assert otsu(values) == wanted
    batch = torch.stack([values, values * 3 + 1, values.flip(0)])
    assert otsu(batch).equal(torch.stack([otsu(row) for row in batch]))
    masks = token_masks(values[:64].reshape(1, 1, 4, 4, 4), "otsu")
    assert masks.flatten().equal(values[:64] >= otsu(values[:64]))


@functools.cache
def pipeline(kind):
    return tiny.PIPELINES[kind]()


class Spy(Edit):
    """Keeps the calls as the other edits left them."""

    stage = "read"

    def apply(self, state, strength):
        SEEN.append(state)


SEEN = []
PROMPTS = ["a red square moves right", "a circle moves left", "a blue circle moves right"]


# ---- ConsiStory


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_consistory_is_one_softmax_with_the_masked_tokens_of_the_anchors(kind):
    SEEN.clear()
    joint = "cross" if kind == "wan21" else "self"
    words = [(2,), (1,), (2,)]
    edits = consistory(words, attention=joint, layers=[1, 2], seed=3)
    reads = Spy(attention=joint, start=1, stop=2, passes=("cond",))
    with visattn.steer(pipeline(kind), [*edits, reads, Spy(layers=[1, 2], start=2)]):
        tiny.generate(pipeline(kind), prompt=PROMPTS)
    earlier = [state for state in SEEN if state.call.step == 1]
    maps = torch.zeros(3, 72)
    for state in earlier:
        own = state.q[:, :, state.image] @ state.k.mT * state.call.factor
        # in joint attention the borrowed keys are in the normaliser too
        lse = own.logsumexp(-1) if kind == "wan21" else state.lse[..., state.image]
        own = (own - lse[..., None]).exp()
        for sample, (word,) in enumerate(words):
            maps[sample] += own[sample, :, :, state.texts[0][0] + word].mean(0) / len(earlier)
    masks = maps >= otsu(maps)[:, None]
    random = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    masks &= torch.rand(3, 72, generator=random) < 0.5
    checked = [state for state in SEEN if state.call.step == 2]
    assert len(earlier) == 3
    assert len(checked) == 4  # layers and passes
    for state in checked:
        q, k, v, image = state.q, state.k, state.v, state.image
        for sample in range(3):
            others = [s for s in (0, 1) if s != sample]
            keys = [k[sample], *(k[s][:, image][:, masks[s]] for s in others)]
            values = [v[sample], *(v[s][:, image][:, masks[s]] for s in others)]
            weights = (q[sample] @ torch.cat(keys, 1).mT * state.call.factor).softmax(-1)
            wanted = weights @ torch.cat(values, 1)
            torch.testing.assert_close(state.out[sample], wanted, atol=1e-5, rtol=1e-4)


def test_consistory_needs_the_step_before():
    pipe, edits = pipeline("wan21"), consistory([(1,)] * 2, attention="cross", start=0)
    with pytest.raises(ValueError, match="no readout"), visattn.steer(pipe, edits):
        tiny.generate(pipe, prompt=PROMPTS[:2])


def test_queries_are_mixed_with_those_of_the_twins():
    tokens = [(1,), (2,)]
    edits = [e for e in consistory(tokens, attention="cross", twins=True) if e.stage == "query"]
    assert [(edit.source, edit.samples) for edit in edits] == [(2, (0,)), (3, (1,))]
    q, k, v = tensors(VIDEO, batch=4)
    for step, share in ((0, 0.9), (2, 0.859), (4, 0.818)):
        mixed = q.clone()
        mixed[:2] = q[:2] + share * (q[2:] - q[:2])
        found = edited(edits, q, k, v, VIDEO, step=step, steps=50)
        assert (found - attention(mixed, k, v, VIDEO)).abs().max() < 1e-6  # strengths are float32


def test_twins_are_left_as_they_are():
    pipe = pipeline("wan21")
    noise = torch.randn(2, 4, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    options = {"prompt": PROMPTS[:2] * 2, "latents": noise.repeat(2, 1, 1, 1, 1)}
    plain = tiny.generate(pipe, **options)
    with visattn.steer(pipe, consistory([(2,), (1,)], attention="cross", twins=True)):
        own = tiny.generate(pipe, **options)
    torch.testing.assert_close(own[2:], plain[2:], atol=1e-5, rtol=1e-5)
    assert (own[:2] - plain[:2]).abs().amax((1, 2, 3, 4)).min() > 1e-3


# ---- StoryDiffusion


@layouts
@patterns
def test_story_diffusion_is_one_softmax_with_drawn_tokens(layout, pattern):
    q, k, v = tensors(layout, batch=3)
    edits = story_diffusion(3, sources=2, seed=5)
    steps = {n: [e for e in edits if e.start * 10 <= n < e.stop * 10] for n in (0, 2, 6)}
    assert [len(own) for own in steps.values()] == [0, 1, 1]
    for step in (2, 6):
        sure = [BorrowSometimes(**{**vars(e), "probability": 1.0}) for e in steps[step]]
        found = edited(sure, q, k, v, layout, pattern, step=step)
        tokens = drawn(edits[0], 3, step)
        for sample in range(3):
            others = [(s, tokens[s]) for s in (0, 1) if s != sample]
            bias = seen_by(layout, pattern)
            close(found[sample], together(q, k, v, layout, sample, others, bias))


def test_story_diffusion_draws_its_calls_by_the_seed():
    q, k, v = tensors(VIDEO, batch=2)
    plain = edited([], q, k, v, VIDEO)

    def happens(seed):
        edits = story_diffusion(2, seed=seed)
        assert [(e.start, e.stop, e.probability) for e in edits] == [
            (0.1, 0.4, 0.7),
            (0.4, 1.0, 0.9),
        ]
        return [
            not edited(edit, q, k, v, VIDEO, step=step).equal(plain)
            for edit in edits
            for step in range(100)
        ]

    own = happens(1)
    assert own == happens(1)
    assert own != happens(2)
    assert 55 < sum(own[:100]) < 85
    assert 80 < sum(own[100:]) < 98


# ---- IR-Diffusion


def masks_of(seed):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(2, *GRID.shape, generator=random) < 0.4


@layouts
@patterns
def test_ir_diffusion_is_isolation_and_one_softmax_with_the_references(layout, pattern):
    q, k, v = tensors(layout, batch=4)
    references, regions = masks_of(1), masks_of(2)
    own = regions.flatten(1)
    assert (own[0] & own[1]).any()
    assert (~own[0] & ~own[1]).any()
    edits = ir_diffusion(references, regions, (2, 3), dropout=0.5, seed=4)
    found = edited(edits, q, k, v, layout, pattern, step=3)
    tokens = references.flatten(1) & drawn(edits[0], 4, 3)[:2]
    bits = torch.full((layout.length,), 3)
    image = image_of(layout)
    bits[image] = torch.where(own.any(0), own[0] * 1 + own[1] * 2, 3)
    assert bits[text_of(layout)].eq(3).all() if layout.texts else True
    bias = seen_by(layout, pattern, bits)
    for sample in (2, 3):
        others = [(0, tokens[0]), (1, tokens[1])]
        close(found[sample], together(q, k, v, layout, sample, others, bias))
    plain = edited([], q, k, v, layout, pattern)
    close(found[:2], plain[:2])


def test_subjects_do_not_see_each_other():
    q, k, v = tensors(VIDEO, batch=2)
    regions = torch.zeros(1, GRID.numel, dtype=torch.bool)
    regions[0, :8] = True
    other = torch.zeros_like(regions)
    other[0, 12:] = True
    references = torch.cat([regions, regions])
    q, k, v = tensors(VIDEO, batch=3)
    edits = ir_diffusion(references, torch.cat([regions, other]), (2,), dropout=0)
    own = edited(edits, q, k, v, VIDEO)
    k2, v2 = k.clone(), v.clone()
    k2[2, :, 12:] = 7.0
    v2[2, :, 12:] = 1e3
    changed = edited(edits, q, k2, v2, VIDEO)
    close(changed[2, :, :8], own[2, :, :8])
    assert (changed[2, :, 8:12] - own[2, :, 8:12]).abs().max() > 1


# ---- its repositioning


def rotated(raw, places, channels):
    """Keys ``[..., L, D]`` without positions at places ``[L, 3]``, by complex numbers."""
    angle = [
        places[:, axis, None] * 10000.0 ** (-torch.arange(n // 2, dtype=torch.float64) * 2 / n)
        for axis, n in enumerate(channels)
    ]
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angle, -1))
    pairs = torch.view_as_complex(raw.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def places_of(grid):
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))


def boxes(grid, *slices):
    """Masks of boxes, bool ``[boxes, *grid]``."""
    out = torch.zeros(len(slices), *grid, dtype=torch.bool)
    for mask, where in zip(out, slices, strict=True):
        mask[where] = True
    return out


@functools.cache
def small(kind):
    """A Wan and a Flux with heads of ``DIM`` channels, and those of their axes."""
    if kind == "wan":
        return tiny.wan21(), (8, 4, 4)
    return tiny_images.flux(), (4, 6, 6)


every_rotary = pytest.mark.parametrize("kind", ["wan", "flux"])


@every_rotary
@layouts
@patterns
def test_borrowed_keys_are_at_the_places_of_the_region(kind, layout, pattern):
    pipe, channels = small(kind)
    q, raw, v = tensors(layout, batch=4)
    image, places = image_of(layout), places_of(GRID.shape)
    k = raw.clone()
    k[:, :, image] = rotated(raw[:, :, image], places, channels)
    # as large, two rows and a column on; and from four rows to two, one column to two
    every = slice(None)
    references = boxes(GRID.shape, (every, slice(0, 2), slice(0, 2)), (0, every, 0))
    regions = boxes(GRID.shape, (every, slice(2, 4), slice(1, 3)), (1, slice(1, 3), slice(1, 3)))
    references[0, 0, 0, 1] = regions[1, 1, 1, 1] = False  # the boxes are as before
    edits = ir_diffusion(references, regions, (2, 3), seed=4, reposition=pipe)
    found = edited(edits, q, k, v, layout, pattern)
    t, y, x = places.T
    targets = [
        places + torch.tensor([0.0, 2.0, 1.0]),
        torch.stack([t + 1, 1 + (y + 0.5) / 2 - 0.5, 1 + (x + 0.5) * 2 - 0.5], 1),
    ]
    moved = k.clone()
    for subject, target in enumerate(targets):
        moved[subject, :, image] = rotated(raw[subject, :, image], target, channels)
    own = regions.flatten(1)
    bits = torch.full((layout.length,), 3)
    bits[image] = torch.where(own.any(0), own[0] * 1 + own[1] * 2, 3)
    tokens = references.flatten(1) & drawn(edits[0], 4, 0)[:2]
    for sample in (2, 3):
        others = [(0, tokens[0]), (1, tokens[1])]
        bias = seen_by(layout, pattern, bits)
        wanted = together(q, moved, v, layout, sample, others, bias)
        close(found[sample], wanted)
        assert (wanted - together(q, k, v, layout, sample, others, bias)).abs().max() > 1e-3
    close(found[:2], edited([], q, k, v, layout, pattern)[:2])


@every_rotary
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_subject_that_stays_where_it_is_changes_no_bit(kind, dtype):
    q, k, v = tensors(VIDEO, batch=3, dtype=dtype)
    masks = masks_of(3)
    plain = edited(ir_diffusion(masks, masks, (2,)), q, k, v, VIDEO)
    own = ir_diffusion(masks, masks, (2,), reposition=small(kind)[0].transformer)
    assert torch.equal(edited(own, q, k, v, VIDEO), plain)


@every_rotary
def test_places_are_those_of_the_model(kind):
    """Keys that a model has not rotated yet, rotated by hand, are its own and those borrowed."""
    pipe, channels = small(kind)
    SEEN.clear()
    raw = []
    if kind == "wan":
        grid, block, generate = (3, 6, 4), pipe.transformer.blocks[1].attn1, tiny.generate
        options, layer = {"guidance_scale": 1.0}, "blocks.1.attn1"
    else:
        grid, block = (1, 6, 4), pipe.transformer.transformer_blocks[1].attn
        generate, options = tiny_images.generate, {"guidance": False}
        layer = "transformer_blocks.1.attn"
    every = slice(None)
    references = boxes(grid, (every, slice(0, 3), slice(0, 2)))
    regions = boxes(grid, (every, slice(2, 5), slice(2, 4)))
    edits = ir_diffusion(references, regions, (1, 2), dropout=0, layers=layer, reposition=pipe)
    handle = block.norm_k.register_forward_hook(lambda _, args, out: raw.append(out))
    with visattn.steer(pipe, [*edits, Spy(layers=layer)]):
        generate(pipe, prompt=PROMPTS, steps=1, **options)
    handle.remove()
    (state,), (keys,) = SEEN, raw
    keys = keys.reshape(3, -1, tiny.HEADS, tiny.DIM).transpose(1, 2)
    places = places_of(grid)
    same = {"atol": 2e-6, "rtol": 1e-5}
    mine = rotated(keys, places, channels).float()
    torch.testing.assert_close(state.k[:, :, state.image], mine, **same)
    at = references.flatten()
    there = rotated(keys[:1, :, at], places[at] + torch.tensor([0.0, 2.0, 2.0]), channels)
    assert len(state.borrowed) == 2
    for borrowed in state.borrowed:
        torch.testing.assert_close(borrowed.k, there.float(), **same)


def test_models_without_known_positions_and_empty_masks_are_refused():
    full = torch.ones(1, GRID.numel)
    for pipe in (tiny.cogvideox(), tiny_images.sd3().transformer):
        with pytest.raises(ValueError, match="has no rotary position embedding that visattn knows"):
            ir_diffusion(full, full, (1,), reposition=pipe)
    for masks in ((full, full * 0), (full * 0, full)):
        with pytest.raises(ValueError, match="has an empty mask"):
            ir_diffusion(*masks, (1,), reposition=small("wan")[0])
    assert rotary_of(small("flux")[0]) == Rotary((4, 6, 6), 10000.0)
    with pytest.raises(ValueError, match="keys have 8 channels"):
        rotary_of(small("wan")[0]).moved(torch.ones(1, 8), [torch.zeros(1)] * 3)


@pytest.mark.parametrize("name", ["story_diffusion", "ir_diffusion", "repositioned"])
def test_memory_is_linear_in_the_tokens(name):
    heads = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1}
    model = WanTransformer3DModel(**heads, ffn_dim=8, text_dim=8)

    def make(tokens):
        state = joint_state(tokens, samples=2)
        mask = torch.arange(tokens)[None] < tokens // 2
        own = {
            "story_diffusion": lambda: story_diffusion(2)[1:],
            "ir_diffusion": lambda: ir_diffusion(mask, mask, (1,)),
            "repositioned": lambda: ir_diffusion(mask, ~mask, (1,), reposition=model),
        }[name]()
        return lambda: apply_edits(state, [(edit, torch.ones(1)) for edit in own])

    assert check_linear(make)[-1] < 8192**2  # a map of one byte a pair


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: consistory([(1,)], attention="cross"), "anchors=2 must be from 1 to 1"),
        (lambda: consistory([(), ()], attention="cross"), "no token of any sample"),
        (lambda: consistory([(1,)] * 2, attention="cross", dropout=1.0), "dropout=1.0"),
        (lambda: story_diffusion(1), "samples=1"),
        (lambda: story_diffusion(3, share=0.0), "share=0.0"),
        (lambda: ir_diffusion(masks_of(0), masks_of(1), (1, 2)), "after the 2 references"),
        (lambda: ir_diffusion(masks_of(0), masks_of(1)[:1], (2,)), "one reference for each"),
        (lambda: ir_diffusion(masks_of(0), masks_of(1), (2,), dropout=-0.1), "dropout=-0.1"),
        (lambda: MixQueries(source=0, first=1.5), "from 0 to 1"),
        (lambda: BorrowSometimes(sources=(0,), probability=0.0), "probability=0.0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_that_do_not_fit_are_refused():
    q, k, v = tensors(VIDEO, batch=3)
    small = torch.ones(2, 5)
    with pytest.raises(ValueError, match="have 5 tokens"):
        edited(ir_diffusion(small, small, (2,)), q, k, v, VIDEO)
    subjects = SubjectMasks([(1,)] * 2, attention="cross")
    with pytest.raises(ValueError, match="a group for each"):
        edited(BorrowKeys(sources=(0,), tokens=subjects), q, k, v, VIDEO)
    assert HEADS == 3
