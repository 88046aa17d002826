"""Blocks that are skipped and tokens that are shuffled, in every order in which blocks give text
and image, against blocks that hooks change by hand."""

from collections import namedtuple
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel, SD3Transformer2DModel
from support import guided_pipelines as pipelines
from support import tiny, tiny_images
from support.guided_pipelines import generate
from support.perturbed import Written
from support.planned import traces

import visattn
from visattn.guidance import (
    SLG,
    STG,
    S2Guidance,
    ShuffleTokens,
    SkipBlock,
    SkipRandomBlocks,
    TokenPerturbation,
)
from visattn.pipelines.families import FAMILIES


def cogvideox_2b():
    """CogVideoX as of 2B: positions are added to the patches, and blocks get none."""
    pipe = tiny.cogvideox()
    config = {**pipe.transformer.config, "use_rotary_positional_embeddings": False}
    torch.manual_seed(3)
    pipe.transformer = CogVideoXTransformer3DModel.from_config(config).eval()
    return pipe


PIPELINES = {
    **pipelines.PIPELINES,
    "cogvideox 2b": cogvideox_2b,
    "sd3.5": lambda: tiny_images.sd3(dual=(0, 1)),
}
IMAGES = ("flux", "sd3", "sd3.5")
BATCHED = ("cogvideox", "cogvideox 2b", "sd3", "sd3.5")  # uncond and cond in one call
ORDERED = ("wan21", "wan22", "cogvideox", "cogvideox15", "flux")
UNORDERED = ("cogvideox 2b", "sd3", "sd3.5")
# a block: the pipeline, its number over all stacks, its path, and what gets its output
PLACES = {
    "wan21": ("wan21", 1, "blocks.1", "blocks.2"),
    "cogvideox": ("cogvideox", 1, "transformer_blocks.1", "transformer_blocks.2"),
    "flux double": ("flux", 0, "transformer_blocks.0", "transformer_blocks.1"),
    "flux last double": ("flux", 1, "transformer_blocks.1", "single_transformer_blocks.0"),
    "flux single": ("flux", 2, "single_transformer_blocks.0", "single_transformer_blocks.1"),
    "flux last single": ("flux", 3, "single_transformer_blocks.1", "norm_out"),
    "sd3": ("sd3", 1, "transformer_blocks.1", "transformer_blocks.2"),
    "sd3 last": ("sd3", 2, "transformer_blocks.2", "norm_out"),
    "sd3.5": ("sd3.5", 1, "transformer_blocks.1", "transformer_blocks.2"),
}
# as many image tokens as text has
EQUAL = {
    "cogvideox": {"height": 80, "width": 32, "num_frames": 1},
    "flux": {"height": 20, "width": 8},
    "sd3": {"height": 44, "width": 8},
    "sd3.5": {"height": 44, "width": 8},
}
Seen = namedtuple("Seen", "image text image_out text_out")


def outputs(kind, out):
    """The image and text tokens that a block gives."""
    if not isinstance(out, tuple):
        return out, None
    return out if kind.startswith("cogvideox") else out[::-1]


def record(pipe, kind, path):
    """What a block itself gets and gives, call by call; edits are outside of it."""
    seen = []

    def hook(_, args, kwargs, out):
        image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append(Seen(image, kwargs.get("encoder_hidden_states"), *outputs(kind, out)))

    pipe.transformer.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    return seen


def tagged(kind, number, batch, pass_):
    """Which rows of a call are of a pass, bool ``[batch]``."""
    if kind in BATCHED:
        first = torch.arange(batch) < batch // 2
        return first if pass_ == "uncond" else ~first
    return torch.full((batch,), ("cond", "uncond")[number % 2] == pass_)


def put_back(image, order):
    """``image[:, i]`` goes to the place ``order[i]``."""
    out = torch.empty_like(image)
    out[:, order] = image
    return out


def paths_of(model):
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [f"{name}.{n}" for name in names for n in range(len(getattr(model, name, ())))]


def skipped(_, args, kwargs, out):
    """A hook that skips a block of Flux or SD3."""
    return None if out[0] is None else kwargs["encoder_hidden_states"], kwargs["hidden_states"]


def nothing(_, args, kwargs, out):
    """A hook that gives zero in place of what attention gave."""
    return tuple(x if x is None else x * 0 for x in out) if isinstance(out, tuple) else out * 0


@contextmanager
def by_hand(model, changes):
    """Inside, there are hooks before modules, or none, and after them, by path."""
    with ExitStack() as stack:
        for path, (before, after) in changes.items():
            module = model.get_submodule(path)
            if before is not None:
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def shuffle(kind, order):
    """Hooks that shuffle the image tokens of a block and put them back; ``order(length)``."""

    def before(_, args, kwargs):
        if "hidden_states" in kwargs:
            image = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": image[:, order(image.shape[1])]}
        return (args[0][:, order(args[0].shape[1])], *args[1:]), kwargs

    def after(_, args, kwargs, out):
        image, text = outputs(kind, out)
        image = put_back(image, order(image.shape[1]))
        if not isinstance(out, tuple):
            return image
        return (image, text) if kind.startswith("cogvideox") else (text, image)

    return before, after


def away(found, usual):
    return float((found - usual).abs().max() / usual.abs().max())


# ---- skipped blocks


def check_skipped(pipe, place, pass_, **options):
    kind, number, path, after = PLACES[place]
    own, following = record(pipe, kind, path), record(pipe, kind, after)
    with visattn.steer(pipe, SkipBlock(blocks=number, passes=pass_)):
        generate(pipe, **options)
    assert len(own) == (3 if kind in BATCHED else 6)
    for n, (block, then) in enumerate(zip(own, following, strict=True)):
        rows = tagged(kind, n, len(block.image), pass_)
        assert not block.image.equal(block.image_out)
        assert then.image[rows].equal(block.image[rows])
        assert then.image[~rows].equal(block.image_out[~rows])
        if then.text is not None:
            assert not block.text.equal(block.text_out)
            assert then.text[rows].equal(block.text[rows])
            assert then.text[~rows].equal(block.text_out[~rows])
    return own


@pytest.mark.parametrize("pass_", ["cond", "uncond"])
@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_block_gives_what_it_got_in_the_rows_of_the_pass(place, pass_):
    kind = PLACES[place][0]
    check_skipped(PIPELINES[kind](), place, pass_)


@pytest.mark.parametrize("place", ["flux double", "flux single", "sd3"])
def test_a_skipped_block_of_several_images(place):
    kind = PLACES[place][0]
    own = check_skipped(PIPELINES[kind](), place, "uncond", num_images_per_prompt=2)
    assert len(own[0].image) == (4 if kind == "sd3" else 2)


@pytest.mark.parametrize("place", [name for name, own in PLACES.items() if own[0] in EQUAL])
def test_a_skipped_block_whose_text_is_as_long_as_its_image(place):
    kind = PLACES[place][0]
    own = check_skipped(PIPELINES[kind](), place, "uncond", **EQUAL[kind])
    assert own[0].image.shape == own[0].text.shape


@pytest.mark.parametrize(
    ("place", "base"),
    [
        ("flux double", FluxTransformer2DModel),
        ("flux single", FluxTransformer2DModel),
        ("sd3", SD3Transformer2DModel),
    ],
)
def test_the_order_of_outputs_does_not_hang_on_the_name_of_a_class(place, base):
    """Text and image of equal length were mixed up in a class derived from the model's."""
    kind = PLACES[place][0]
    pipe = PIPELINES[kind]()
    pipe.transformer.__class__ = type("Derived", (base,), {})
    check_skipped(pipe, place, "uncond", **EQUAL[kind])


PARTS = {
    ("flux double", "attention"): ("attn",),
    ("flux single", "attention"): ("attn",),
    ("sd3", "attention"): ("attn",),
    ("sd3 last", "attention"): ("attn",),
    ("sd3.5", "attention"): ("attn",),
    ("flux double", "feedforward"): ("ff", "ff_context"),
    ("sd3", "feedforward"): ("ff", "ff_context"),
    ("sd3 last", "feedforward"): ("ff",),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("place", "what"), PARTS)
def test_a_skipped_part_is_as_if_it_gave_zero_in_the_rows_of_the_pass(place, what):
    kind, number, path, _ = PLACES[place]
    pipe, other = PIPELINES[kind](), PIPELINES[kind]()
    with visattn.steer(pipe, SkipBlock(blocks=number, what=what, passes="uncond")):
        found = generate(pipe)
    for name in PARTS[place, what]:
        calls = []

        def zero(_, args, out, calls=calls):
            single = not isinstance(out, tuple)
            new = [x if x is None else x.clone() for x in ((out,) if single else out)]
            for x in (x for x in new if x is not None):
                x[tagged(kind, len(calls), len(x), "uncond")] = 0
            calls.append(None)
            return new[0] if single else tuple(new)

        other.transformer.get_submodule(f"{path}.{name}").register_forward_hook(zero)
    assert found.equal(generate(other))
    assert away(found, generate(PIPELINES[kind]())) > 1e-3


def test_a_part_that_a_block_does_not_have_is_refused():
    pipe = tiny_images.flux()
    edit = SkipBlock(blocks=2, what="feedforward")
    with pytest.raises(ValueError, match="no such module"), visattn.steer(pipe, edit):
        generate(pipe)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_random_blocks_are_skipped_where_they_are_drawn_and_nowhere_else(kind):
    pipe, edit = PIPELINES[kind](), SkipRandomBlocks(share=0.4, seed=2, passes="cond")
    paths = paths_of(pipe.transformer)
    seen = {path: record(pipe, kind, path) for path in paths}
    with visattn.steer(pipe, edit):
        generate(pipe, steps=4)
    drawn = [edit.drawn(paths, step) for step in range(4)]
    assert len(set(map(frozenset, drawn))) > 1
    for path, after in pairwise(paths):
        for n, (block, then) in enumerate(zip(seen[path], seen[after], strict=True)):
            rows = tagged(kind, n, len(block.image), "cond")
            rows &= path in drawn[n // (1 if kind in BATCHED else 2)]
            for got, gave, passed in (
                (block.image, block.image_out, then.image),
                (block.text, block.text_out, then.text),
            ):
                assert passed[rows].equal(got[rows])
                assert passed[~rows].equal(gave[~rows])


# ---- guided, against the loop written out


def check_loop(kind, one, changes):
    """Guidance gives what the loop gives in which each pass is computed in full; ``changes(step)``:
    the hooks of the perturbed one. It is not what there is without guidance."""
    pipe, other = PIPELINES[kind](), PIPELINES[kind]()
    with visattn.guide(pipe, one):
        found = generate(pipe)

    def perturb(model):
        return by_hand(model, changes(loop.number))

    def combine(c, u, p, call):
        return u + 3.0 * (c - u) + one.scale * (c - p)

    loop = Written(other, "guided" if kind in BATCHED else False, perturb, combine)
    assert away(found, generate(other)) < 1e-5
    assert away(found, generate(PIPELINES[kind]())) > 1e-2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["slg", "stg", "s2"])
def test_guidance_by_skipped_blocks_is_that_of_the_loop(kind, name):
    paths, window = paths_of(PIPELINES[kind]().transformer), {"start": 0, "stop": 1.0, "scale": 2.5}
    ones = {
        "slg": SLG(blocks=[1, 2], **window),
        "stg": STG(blocks=[1, 2], what="attention", **window),
        "s2": S2Guidance(share=0.5, seed=1, **window),
    }
    draws = SkipRandomBlocks(share=0.5, seed=1)

    def changes(step):
        if name == "stg":
            return {f"{path}.attn": (None, nothing) for path in paths[1:3]}
        skips = draws.drawn(paths, step) if name == "s2" else paths[1:3]
        return dict.fromkeys(skips, (None, skipped))

    check_loop(kind, ones[name], changes)


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_guidance_by_shuffled_tokens_is_that_of_the_loop_and_does_something(kind):
    edit = ShuffleTokens(blocks=[1, 2], share=0.7, seed=5)
    paths = paths_of(PIPELINES[kind]().transformer)[1:3]

    def order(path, step):
        return lambda length: edit.order(length, path, step)

    one = TokenPerturbation(blocks=[1, 2], share=0.7, seed=5, scale=2.5)
    check_loop(kind, one, lambda step: {p: shuffle(kind, order(p, step)) for p in paths})


# ---- shuffled tokens


@pytest.mark.parametrize("kind", [*ORDERED, *UNORDERED])
def test_what_is_known_of_the_order_of_tokens_is_so(kind):
    """Blocks that get their tokens shuffled, and put back, give the same up to rounding, or not."""
    pipe = PIPELINES[kind]()
    model = pipe.transformer
    usual = generate(pipe)
    order = torch.Generator().manual_seed(1)
    orders = {length: torch.randperm(length, generator=order) for length in (24, 48, 72)}
    hooks = shuffle(kind, orders.__getitem__)
    with by_hand(model, dict.fromkeys(paths_of(model), hooks)):
        change = away(generate(pipe), usual)
    ordered = FAMILIES[type(model).__name__].has_rope(model.config)
    assert ordered == (kind in ORDERED)
    assert change > 1e-3 if ordered else change < 1e-5


@pytest.mark.parametrize("kind", UNORDERED)
def test_shuffling_where_it_would_change_nothing_is_refused_before_anything_runs(kind):
    """It ran, and the guided result was the plain one."""
    pipe = PIPELINES[kind]()
    before, name = traces(pipe), type(pipe.transformer).__name__
    words = f"ShuffleTokens.*{name}.*order of tokens.*another guidance, such as SLG or PAG"
    edit, one = ShuffleTokens(blocks=0), TokenPerturbation(blocks=[0])
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=words), visattn.steer(target, edit):
            raise AssertionError("not reached")
        with pytest.raises(ValueError, match=words), visattn.guide(target, one):
            raise AssertionError("not reached")
    assert traces(pipe) == before


def test_a_denoiser_that_is_called_without_its_rotary_embedding_is_refused():
    model = tiny.cogvideox().transformer
    tensors = {
        "hidden_states": torch.randn(1, 3, 4, 12, 8),
        "encoder_hidden_states": torch.randn(1, 10, 16),
        "timestep": torch.tensor([500]),
    }
    one = TokenPerturbation(blocks=[1])
    with torch.no_grad(), pytest.raises(ValueError, match="rotary"), visattn.guide(model, one):
        model(**tensors)


SHUFFLED = [
    pytest.param(place, options, id=f"{place}{', text as long' if options else ''}")
    for place, (kind, *_) in PLACES.items()
    for options in ({}, EQUAL.get(kind))
    if kind in ORDERED and options is not None
]


@pytest.mark.parametrize(("place", "options"), SHUFFLED)
def test_shuffled_tokens_are_put_back_in_the_rows_of_the_pass(place, options):
    kind, number, path, after = PLACES[place]
    edit = ShuffleTokens(blocks=number, passes="cond", seed=4)
    plain, pipe = PIPELINES[kind](), PIPELINES[kind]()
    usual = record(plain, kind, path), record(plain, kind, after)
    own, following = record(pipe, kind, path), record(pipe, kind, after)
    generate(plain, **options)
    with visattn.steer(pipe, edit):
        generate(pipe, **options)
    first = 1 if kind in BATCHED else 2  # calls of the first step, which begin alike
    for n, (block, then) in enumerate(zip(own, following, strict=True)):
        rows = tagged(kind, n, len(block.image), "cond")
        order = edit.order(block.image.shape[1], path, n // first)
        assert not order.equal(torch.arange(len(order)))
        assert then.image[rows].equal(put_back(block.image_out[rows], order))
        assert then.image[~rows].equal(block.image_out[~rows])
        if then.text is not None:
            assert then.text.equal(block.text_out)
        if n >= first:
            continue
        before, later = usual[0][n], usual[1][n]
        assert block.image[rows].equal(before.image[rows][:, order])
        assert block.image[~rows].equal(before.image[~rows])
        assert then.image[~rows].equal(later.image[~rows])
        assert block.text is None or block.text.equal(before.text)
        if rows.any():
            assert away(then.image[rows], later.image[rows]) > 1e-4


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_orders_are_those_of_the_seed(kind):
    found = []
    for seed in (0, 0, 1):
        pipe = PIPELINES[kind]()
        with visattn.guide(pipe, TokenPerturbation(blocks=[1, 2], seed=seed)):
            found.append(generate(pipe))
    assert found[0].equal(found[1])
    assert away(found[2], found[0]) > 1e-3
    edit = ShuffleTokens(blocks=0)
    orders = [edit.order(72, path, step) for path in ("blocks.0", "blocks.1") for step in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 8
