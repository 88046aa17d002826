"""Prompts of regions: each attention call of tiny pipelines against dense attention under the mask
written out, and whole generations at both ends of the base ratio."""

import functools

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from guidance.test_compose import Tensors
from support import tiny, tiny_images
from support.allocations import check_linear, joint_state

import visattn
from visattn.attention.backends.reference import pattern_mask
from visattn.guidance import PAG, RegionMask, ScaleHeads, regional
from visattn.guidance.composition.regional import MixBase, RegionBits
from visattn.guidance.edits.steer import apply_edits
from visattn.patterns import Dense, Neighborhood
from visattn.plan import Plan, Rule

KINDS = {"wan21": "cross", "wan22": "cross", "cogvideox": "self", "flux": "self", "sd3": "self"}
BATCHED = ("cogvideox", "sd3")  # whose guidance doubles the batch
BASE, REGIONS = "a square moves right", ("a red square", "a blue circle moves left")
NEAR = Neighborhood((1, 3, 3))
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def pipeline(kind):
    return (tiny.PIPELINES | tiny_images.IMAGES)[kind]()


def masks():
    """Two regions of 6 x 4 tokens that overlap, and a background."""
    masks = torch.zeros(2, 6, 4, dtype=torch.bool)
    masks[0, :4, :2] = masks[1, 2:, 1:3] = True
    assert (masks[0] & masks[1]).any()
    assert not masks.any(0).all()
    return masks


def settings(kind, **options):
    """As ``generate`` has them, for a call of ``regional``."""
    pipe = pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    size = tiny.SHAPE if kind in tiny.PIPELINES else tiny_images.SHAPE
    return {
        "negative_prompt": "blue circle",
        "num_inference_steps": 2,
        "true_cfg_scale" if kind == "flux" else "guidance_scale": 3.0,
        "max_sequence_length": 10,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **size,
        **options,
    }


def generate(kind, regions, **options):
    return regional(pipeline(kind), BASE, regions, **settings(kind, **options))[0]


def plain(kind, **options):
    return pipeline(kind)(**settings(kind, **options))[0]


def allowed(call, image, own, base):
    """Which rows see which keys, bool ``[Lq, Lk]``: by the sets of a token's regions. ``base``:
    all rows of the image are as the base prompt has them."""
    frames = call.layout.grids[0][1].frames
    regions = [
        {n for n in range(2) if own[n].flatten()[place]} or {"background"}
        for place in range(own[0].numel())
    ] * frames
    first, end = call.kv_layout.texts[0]
    each = end // 3
    texts = [("base", 0, 1)[number // each] for number in range(end)]

    def sees(query, key):
        if query[0] == "text" and query[1] != "base":
            return key == query or (key[0] == "image" and query[1] in key[1])
        if query[0] == "text" or base:
            return key[0] == "image" or key[1] == "base"
        if key[0] == "image":
            return bool(query[1] & key[1])
        return key[1] in query[1] or (key[1] == "base" and "background" in query[1])

    tokens = {image.start + n: ("image", frozenset(of)) for n, of in enumerate(regions)}
    words = {first + n: ("text", of) for n, of in enumerate(texts)}
    keys = words if call.kind == "cross" else tokens | words
    queries = tokens if call.kind == "cross" else keys
    return torch.tensor(
        [[sees(queries[i], keys[j]) for j in sorted(keys)] for i in sorted(queries)]
    )


def masked(own, mask, factor):
    assert mask.any(1).all()  # no row without keys
    return (own["q"] @ own["k"].mT * factor).masked_fill(~mask, -torch.inf).softmax(-1) @ own["v"]


def wanted(call, pass_, image, own, regions, ratio, inside, pattern=None):
    mask = allowed(call, image, regions, base=not inside)
    dense = pattern is None or call.kind == "cross"
    near = True if dense else pattern_mask(pattern, call.layout)
    out = masked(own, mask & near, call.factor)
    if inside and ratio:
        base = masked(own, allowed(call, image, regions, base=True) & near, call.factor)
        out[:, :, image] = (1 - ratio) * out[:, :, image] + ratio * base[:, :, image]
    return out


def watched(kind, plan=None, **options):
    """What each call of a generation was given, and gave."""
    pipe, spy = pipeline(kind), Tensors(name="after", attention=KINDS[kind])
    with visattn.sparse(pipe, plan or Dense(), backend="blockwise"), visattn.steer(pipe, [spy]):
        generate(kind, list(zip(REGIONS, masks(), strict=True)), **options)
    return spy.seen


def check(kind, seen, ratio=0.0, layers=None, steps=(0, 1), pattern=None):
    """All calls against the definition; the numbers of those with regions."""
    found = set()
    for call, pass_, image, own in seen:
        if pass_ == "uncond" and kind not in BATCHED:  # a call of its own, with its own text
            every = torch.ones(own["q"].shape[2], own["k"].shape[2], dtype=torch.bool)
            if pattern is not None and call.kind != "cross":
                every &= pattern_mask(pattern, call.layout)
            expected = masked(own, every, call.factor)
        else:
            inside = pass_ != "uncond" and (layers is None or call.number in layers)
            inside = inside and call.step in steps
            grid = call.layout.grids[0][1]
            assert grid.shape[1:] == (6, 4)
            expected = wanted(call, pass_, image, own, masks(), ratio, inside, pattern)
            if inside:
                found.add((call.number, call.step, pass_))
        torch.testing.assert_close(own["out"], expected, atol=1e-5, rtol=1e-4)
    return found


@kinds
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_calls_equal_dense_attention_under_the_mask(kind, ratio):
    seen = watched(kind, base_ratio=ratio)
    found = check(kind, seen, ratio)
    assert len(found) == 2 * len({call.number for call, *_ in seen})


@kinds
def test_elsewhere_only_the_base_prompt_is_seen(kind):
    seen = watched(kind, base_ratio=0.3, layers=[1, -1], start=1)
    last = max(call.number for call, *_ in seen)
    assert check(kind, seen, 0.3, layers=(1, last), steps=(1,)) == {
        (number, 1, "cond") for number in (1, last)
    }


@kinds
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_masks_are_within_a_plan(kind, ratio):
    plan = Plan((Rule(NEAR),))
    check(kind, watched(kind, plan, base_ratio=ratio), ratio, pattern=NEAR)


# ---- whole generations


@kinds
@pytest.mark.parametrize("scale", [3.0, 1.0], ids=["guided", "unguided"])
def test_base_ratio_of_one_is_the_base_prompt_alone(kind, scale):
    regions = list(zip(REGIONS, masks(), strict=True))
    guidance = {"true_cfg_scale" if kind == "flux" else "guidance_scale": scale}
    usual = plain(kind, prompt=BASE, **guidance)
    found = generate(kind, regions, base_ratio=1.0, **guidance)
    torch.testing.assert_close(found, usual, atol=1e-4, rtol=1e-4)
    other = generate(kind, regions, **guidance)
    assert (other - found).abs().max() > 1e-2
    assert plain(kind, prompt=BASE, **guidance).equal(usual)  # nothing is left behind


@kinds
def test_region_of_everything_is_its_prompt_alone(kind):
    """But for the pooled text of the base prompt."""
    pipe, text = pipeline(kind), REGIONS[1]
    given = {"prompt": text}
    if kind == "flux":
        own, other = (pipe.encode_prompt(x, None, max_sequence_length=10) for x in (text, BASE))
        given = {"prompt_embeds": own[0], "pooled_prompt_embeds": other[1]}
    elif kind == "sd3":
        own, other = (
            pipe.encode_prompt(x, None, None, negative_prompt="blue circle", max_sequence_length=10)
            for x in (text, BASE)
        )
        names = [f"{sign}{kind}prompt_embeds" for kind in ("", "pooled_") for sign in SIGNS]
        given = dict(zip(names, (own[0], own[1], other[2], own[3]), strict=True))
        given["negative_prompt"] = None
    found = generate(kind, [(text, torch.ones(3, 2))])
    torch.testing.assert_close(found, plain(kind, **given), atol=1e-4, rtol=1e-4)


SIGNS = ("", "negative_")


@kinds
def test_several_images_are_those_of_one(kind):
    regions = list(zip(REGIONS, masks(), strict=True))
    shape = generate(kind, regions).shape
    noise = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))
    what = "videos" if kind in tiny.PIPELINES else "images"
    both = generate(kind, regions, latents=noise, base_ratio=0.2, **{f"num_{what}_per_prompt": 2})
    for number in range(2):
        one = generate(kind, regions, latents=noise[number : number + 1], base_ratio=0.2)
        torch.testing.assert_close(both[number : number + 1], one, atol=1e-4, rtol=1e-4)


def test_frames_of_a_video_may_have_masks_of_their_own():
    mask = torch.zeros(3, 6, 4)
    mask[1, :, 2:] = 1
    spy = Tensors(name="after", attention="cross")
    with visattn.steer(pipeline("wan21"), [spy]):
        generate("wan21", [(REGIONS[0], mask)], num_inference_steps=1)
    for call, pass_, _, own in spy.seen:
        if pass_ == "cond":
            keys = torch.arange(20) >= 10
            rows = mask.flatten().bool()
            expected = masked(own, rows[:, None] == keys, call.factor)
            torch.testing.assert_close(own["out"], expected, atol=1e-5, rtol=1e-4)


def with_positions(learned):
    """CogVideoX with positions that are added to its tokens: to its grid as in 2B, or learned ones,
    to its text too."""
    parts = pipeline("cogvideox").components
    own = parts["transformer"].config
    config = {key: value for key, value in own.items() if not key.startswith("_")}
    for kind in ("rotary", "learned"):
        config[f"use_{kind}_positional_embeddings"] = learned
    torch.manual_seed(6)
    model = CogVideoXTransformer3DModel(**config)
    if learned:
        model.patch_embed.pos_embedding.normal_()
    return CogVideoXPipeline(**{**parts, "transformer": model.eval()})


@pytest.mark.parametrize(
    ("learned", "size"),
    [(False, {}), (False, {"height": 80, "num_frames": 5}), (True, {})],
    ids=["added", "added at another size", "learned"],
)
def test_each_text_has_the_positions_of_a_text(learned, size):
    pipe, everything = with_positions(learned), torch.ones(3, 2)
    pipe.set_progress_bar_config(disable=True)
    for text, ratio in ((REGIONS[0], 0.0), (BASE, 1.0)):
        given = {"base_ratio": ratio, **settings("cogvideox", **size)}
        found = regional(pipe, BASE, [(REGIONS[0], everything)], **given)[0]
        alone = pipe(text, **settings("cogvideox", **size))[0]
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_positions_of_the_text_are_put_back():
    pipe, regions = with_positions(True), [(REGIONS[0], masks()[0])]
    embed = pipe.transformer.patch_embed
    before = embed.pos_embedding
    given = settings("cogvideox", callback_on_step_end=stop)
    with pytest.raises(ZeroDivisionError):
        regional(pipe, BASE, regions, **given)
    assert embed.pos_embedding is before
    assert embed.max_text_seq_length == 10
    with pytest.raises(ValueError, match="max_sequence_length=8 must be 10, the text length"):
        regional(pipe, BASE, regions, **settings("cogvideox", max_sequence_length=8))


def stop(*_):
    raise ZeroDivisionError


@kinds
def test_with_guidance_and_other_edits_around_it(kind):
    regions = list(zip(REGIONS, masks(), strict=True))
    pipe = pipeline(kind)
    alone = generate(kind, regions, base_ratio=0.2)
    with visattn.guide(pipe, PAG(layers=[1], scale=0.0)):
        assert generate(kind, regions, base_ratio=0.2).equal(alone)
    with visattn.guide(pipe, PAG(layers=[1], scale=2.0)):
        seen = watched(kind, base_ratio=0.2)
    assert {pass_ for _, pass_, *_ in seen} == {"cond", "uncond", "perturbed"}
    perturbed = "wan" not in kind  # whose text is in the calls that PAG changes
    others = [call for call in seen if not perturbed or call[0].number != 1]
    assert any(pass_ == "perturbed" for *_, pass_ in check(kind, others, 0.2))
    with visattn.steer(pipe, [ScaleHeads(scale=2.0, heads=[0])]):
        assert not torch.allclose(generate(kind, regions, base_ratio=0.2), alone)


def test_memory_is_linear():
    def make(tokens):
        state = joint_state(tokens)
        bits = RegionBits([torch.tensor([[0, 1]])], 4, frozenset({0}))
        edits = [RegionMask(q_bits=bits.queries, k_bits=bits.keys), MixBase(bits=bits, ratio=0.2)]
        return lambda: apply_edits(state, [(edit, torch.ones(1)) for edit in edits])

    check_linear(make)


# ---- refusals


REFUSED = {
    "no regions": ({"regions": []}, ValueError, "pairs of prompt and mask, at least one"),
    "no mask": ({"regions": [("a", None)]}, TypeError, r"regions\[0\] must be a prompt and its"),
    "line": ({"regions": [("a", torch.ones(3))]}, ValueError, r"shape \[3\]; it must be"),
    "values": ({"regions": [("a", torch.full((2, 2), 2.0))]}, ValueError, "outside 0 to 1"),
    "nan": ({"regions": [("a", torch.full((2, 2), torch.nan))]}, ValueError, "outside 0 to 1"),
    "nothing": ({"regions": [("a", torch.zeros(6, 4))]}, ValueError, "give a larger region"),
    "ratio": ({"base_ratio": 1.5}, ValueError, "from 0 to 1; 0 means regions alone"),
    "window": ({"start": 2, "stop": 1}, ValueError, "must start before it stops"),
    "layers": ({"layers": [9]}, ValueError, "names layer 9"),
    "list": ({"prompt": ["a"]}, TypeError, "must be one text, the base prompt"),
    "embeddings": ({"prompt_embeds": torch.ones(1)}, ValueError, "is not allowed; give the texts"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(wrong, error, message):
    given = {"prompt": BASE, "regions": [("a", torch.ones(2, 2))], **settings("wan21"), **wrong}
    before = tiny.footprint(pipeline("wan21"))
    with pytest.raises(error, match=message):
        regional(pipeline("wan21"), **given)
    assert tiny.footprint(pipeline("wan21")) == before


def test_pipelines_that_have_no_room_for_texts_are_refused():
    for pipe in (pipeline("hunyuanvideo"), pipeline("wan21").transformer):
        with pytest.raises(TypeError, match="of Wan, CogVideoX, Flux, Stable Diffusion 3: reg"):
            regional(pipe, BASE, [("a", torch.ones(2, 2))])
