"""Guidance folded into a pipeline's own is ``u + g (c - u) + w (c - p)``, written out."""

import gc
import logging
import math
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from support import guided_pipelines as pipelines
from support import tiny, tiny_images
from support.perturbed import Written, perturbing
from support.planned import Stop, traces
from torch._dynamo.testing import CompileCounterWithBackend

from visattn import Grid, TokenLayout, guide
from visattn.generation import Job, run_job
from visattn.guidance import (
    PAG,
    SEG,
    SLG,
    STG,
    CFGZeroStar,
    HeadSet,
    S2Guidance,
    SkipBlock,
    SoftPAG,
    Temperature,
    TemperatureGuidance,
    TokenPerturbation,
    steer,
)
from visattn.inject import apply_plan, remove_plan, sparse, summary
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.plan import Plan, Rule

STEPS, W = 3, 2.5
PIPELINES = {
    **pipelines.PIPELINES,
    "distilled": lambda: tiny_images.flux(guidance_embeds=True),
}
KINDS = ("wan21", "wan22", "cogvideox", "hunyuanvideo", "flux", "sd3")
LAYOUTS = {
    **{name: tiny.layout(name) for name in ("wan21", "wan22", "cogvideox", "hunyuanvideo")},
    "flux": TokenLayout(Grid(1, 6, 4), text_before=tiny_images.TEXT),
    "sd3": TokenLayout(Grid(1, 6, 4), text_after=tiny_images.CLIP + tiny_images.TEXT),
}
PATHS = {
    **{name: tiny.paths(name) for name in ("wan21", "wan22", "cogvideox", "hunyuanvideo")},
    "flux": [f"{own}transformer_blocks.{n}.attn" for own in ("", "single_") for n in range(2)],
    "sd3": [f"transformer_blocks.{n}.attn" for n in range(3)],
}
LAYOUTS["distilled"], PATHS["distilled"] = LAYOUTS["flux"], PATHS["flux"]
BATCHED = ("cogvideox", "sd3")


def generate(pipe, guidance=True, **options):
    """Latents of a short generation."""
    return pipelines.generate(pipe, STEPS, guidance, **options)


def heads(kind):
    """Heads of the second and the last layer."""
    return {PATHS[kind][1]: {0: 1.0, 2: 0.4}, PATHS[kind][-1]: {3: 0.7}}


def guidance(kind, **options):
    return SoftPAG(HeadSet(heads(kind)), scale=W, **options)


def strengths(kind, factor=1.0):
    found = {}
    for path, own in heads(kind).items():
        found[path] = torch.zeros(4)
        for head, strength in own.items():
            found[path][head] = strength * factor
    return found


def usual(kind, role, number, call):
    """The scale of classifier-free guidance."""
    return 3.0


def written(kind, options, scale=usual, factor=1.0, uncond=lambda c, u: u):
    """What the loop gives that is written out; and how far its predictions are from plain ones."""
    guided, roles = options.get("guidance", True), set()

    def perturb(model):
        return perturbing(model, LAYOUTS[kind], strengths(kind, factor))

    def combine(c, u, p, call):
        role, number, arguments = call
        roles.add(role)
        assert (u is not None) == guided
        if u is None:
            return c + W * (c - p)
        u, g = uncond(c, u), scale(kind, role, number, arguments)
        return u + g * (c - u) + W * (c - p)

    pipe = PIPELINES[kind]()
    batched = kind in BATCHED and ("guided" if guided else "plain")
    loop = Written(pipe, batched, perturb, combine)
    found = generate(pipe, **options)
    assert len(roles) == (2 if kind == "wan22" else 1)
    return found, loop.differences


# ---- the fold


def error(found, expected):
    """As a share of the largest latent, which CogVideoX has at 38."""
    return float((found - expected).abs().max() / expected.abs().max())


def two_scales(kind, role, number, call):
    return {"transformer": 3.0, "transformer_2": 1.7}[role]


def dynamic(kind, role, number, call):
    wave = math.cos(math.pi * ((STEPS - float(call["timestep"].flatten()[0])) / STEPS) ** 5.0)
    return 1 + 3.0 * (1 - wave) / 2


FOLDS = {
    "wan21": ("wan21", {}, usual),
    "wan21, no CFG": ("wan21", {"guidance": False}, usual),
    "wan22, two scales": ("wan22", {"guidance_scale_2": 1.7}, two_scales),
    "wan22, no CFG": ("wan22", {"guidance": False, "guidance_scale_2": 5.0}, usual),
    "cogvideox": ("cogvideox", {}, usual),
    "cogvideox, no CFG": ("cogvideox", {"guidance": False}, usual),
    "cogvideox, dynamic": ("cogvideox", {"use_dynamic_cfg": True}, dynamic),
    "hunyuanvideo, true CFG": ("hunyuanvideo", {}, usual),
    "hunyuanvideo, distilled": ("hunyuanvideo", {"guidance": False, "guidance_scale": 5.0}, usual),
    "flux, true CFG": ("flux", {}, usual),
    "flux, no CFG": ("flux", {"guidance": False}, usual),
    "flux, distilled": ("distilled", {"guidance": False, "guidance_scale": 5.0}, usual),
    "sd3": ("sd3", {}, usual),
    "sd3, no CFG": ("sd3", {"guidance": False}, usual),
    "sd3, two images": ("sd3", {"num_images_per_prompt": 2}, usual),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FOLDS)
def test_fold_equals_the_loop_written_out(name):
    kind, options, scale = FOLDS[name]
    expected, differences = written(kind, options, scale)
    pipe = PIPELINES[kind]()
    with guide(pipe, guidance(kind)):
        found = generate(pipe, **options)
    assert error(found, expected) < 2e-6
    assert min(differences) > 1e-3  # every prediction was moved
    assert (generate(pipe, **options) - expected).abs().max() > 1e-2


def test_sd3_with_its_own_skip_layer_guidance():
    """It adds to the slope in its steps, as ``c`` is in it twice."""
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.8}
    plain = tiny_images.sd3()

    def combine(c, u, p, call):
        _, number, arguments = call
        found = u + 3 * (c - u) + W * (c - p)
        if not 0.01 * STEPS < number < 0.8 * STEPS:
            return found
        skipped = loop.call(plain.transformer, {**arguments, "skip_layers": [1]})
        return found + 2.8 * (c - skipped)

    def perturb(model):
        return perturbing(model, LAYOUTS["sd3"], strengths("sd3"))

    loop = Written(plain, "guided", perturb, combine)
    expected = generate(plain, **options)
    pipe = tiny_images.sd3()
    with guide(pipe, guidance("sd3")):
        assert error(generate(pipe, **options), expected) < 2e-6
    assert error(generate(pipe, **options), expected) > 1e-3


# each with the joint model that it is tried on beside Wan
GUIDANCES = {
    "PAG": (PAG(layers=[1], scale=W), "cogvideox"),
    "PAG of all": (PAG(policy="all", scale=W), "sd3"),
    "SEG": (SEG(scale=W), "flux"),
    "SEG, finite": (SEG(layers=1, sigma=1.0, scale=W), "sd3"),
    "SLG": (SLG(blocks=(1, 2), start=1, stop=1.0, scale=W), "sd3"),
    "STG of attention": (STG(blocks=1, what="attention", scale=W), "cogvideox"),
    "STG of blocks": (STG(blocks=2, scale=W), "flux"),
    "temperature": (TemperatureGuidance(temperature=3.0, scale=W), "cogvideox"),
    "token perturbation": (TokenPerturbation(blocks=(0, 2), scale=W), "flux"),
    "S2": (S2Guidance(share=0.4, scale=W), "flux"),
}
PERTURBED = [(kind, name) for name, (_, joint) in GUIDANCES.items() for kind in ("wan21", joint)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "name"), PERTURBED)
def test_fold_of_each_guidance_equals_the_loop_written_out(kind, name):
    """The perturbed prediction is that of an untouched denoiser with the guidance's own edits."""
    own, pipe = GUIDANCES[name][0], PIPELINES[kind]()

    def combine(c, u, p, call):
        used = own.active(call[1], STEPS)
        return u + 3 * (c - u) + (W * (c - p) if used else 0)

    # of the pipeline, so that the steps are known, by which tokens and blocks are drawn
    loop = Written(pipe, kind in BATCHED and "guided", lambda _: steer(pipe, own.edits()), combine)
    expected = generate(pipe)
    pipe = PIPELINES[kind]()
    with guide(pipe, own):
        found = generate(pipe)
    assert error(found, expected) < 1e-5
    moved = [difference > 1e-3 for difference in loop.differences]
    assert moved == [own.active(step, STEPS) for step in range(STEPS)]


# ---- what changes nothing


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_and_no_scale_change_no_bit(kind):
    pipe = PIPELINES[kind]()
    plain, calls = generate(pipe), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe)
    usually = len(calls)
    with guide(pipe, SoftPAG(heads(kind), scale=0)):
        assert torch.equal(generate(pipe), plain)
    assert len(calls) == 2 * usually  # no further pass
    for options in ({}, {"reuse_prefix": False}):
        with guide(pipe, SoftPAG(heads(kind), strength=0.0, scale=W), **options):
            assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_the_conditional_embeddings_are_perturbed(kind):
    pipe, calls = PIPELINES[kind](), []
    for role in ("transformer", "transformer_2"):
        model = getattr(pipe, role, None)
        if model is not None:
            model.register_forward_hook(
                lambda model, args, kwargs, out: calls.append((kwargs, out[0].clone())),
                with_kwargs=True,
            )
    with guide(pipe, guidance(kind)):
        generate(pipe, guidance=False)
    assert len(calls) == 2 * STEPS
    for (first, c), (second, p) in zip(calls[::2], calls[1::2], strict=True):
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            assert torch.equal(first[name], second[name])
        assert (c - p).abs().max() > 1e-3


def test_denoiser_alone_is_guided_without_classifier_free_guidance():
    model = tiny.wan_transformer(0)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 12, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 10, 16),
        "return_dict": False,
    }
    with torch.no_grad():
        c = model(**inputs)[0]
        with perturbing(model, LAYOUTS["wan21"], strengths("wan21")):
            p = model(**inputs)[0]
        with guide(model, guidance("wan21")):
            torch.testing.assert_close(model(**inputs)[0], c + W * (c - p), rtol=0, atol=1e-5)
        assert torch.equal(model(**inputs)[0], c)


# ---- the prefix


def kinds_and_layers():
    return [(kind, first) for kind in KINDS if kind != "wan22" for first in range(len(PATHS[kind]))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "first"), kinds_and_layers())
def test_prefix_gives_the_bits_of_the_full_pass_and_runs_the_rest(kind, first):
    pipe, ran = PIPELINES[kind](), []
    blocks = [path.rpartition(".")[0] for path in PATHS[kind]]
    own = SoftPAG({first: [1, 2]}, scale=W)
    with guide(pipe, own, reuse_prefix=False):
        expected = generate(pipe, guidance=False)
    for path in blocks:
        pipe.transformer.get_submodule(path).register_forward_hook(
            lambda *_, path=path: ran.append(path)
        )
    with guide(pipe, own):
        assert torch.equal(generate(pipe, guidance=False), expected)
    assert ran == (blocks + blocks[first:]) * STEPS
    if first:
        with guide(pipe, own):  # and where the batch has two passes
            found = generate(pipe)
        with guide(pipe, own, reuse_prefix=False):
            if kind in BATCHED:
                torch.testing.assert_close(found, generate(pipe), rtol=0, atol=1e-5)
            else:
                assert torch.equal(found, generate(pipe))


def test_prefix_is_not_that_of_an_earlier_call():
    """A call whose blocks cannot be reused comes after one whose blocks can."""
    model, given = tiny_images.sd3().transformer, []
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 12, 8),
        "encoder_hidden_states": torch.randn(1, 22, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    control = {"block_controlnet_hidden_states": [torch.randn(1, 24, 64)]}
    with torch.no_grad(), guide(model, SoftPAG({2: [0]})):
        model(**inputs)
        given.append(model(**inputs, **control)[0])
    with torch.no_grad(), guide(model, SoftPAG({2: [0]}), reuse_prefix=False):
        given.append(model(**inputs, **control)[0])
    assert torch.equal(*given)


@pytest.mark.parametrize(
    "edit",
    [
        Temperature(temperature=3.0, layers=[0], passes="perturbed"),
        SkipBlock(blocks=0, passes="perturbed"),
        SkipBlock(blocks=1, passes=("cond",), what="attention"),
    ],
    ids=["attention", "block", "conditional"],
)
def test_edit_of_one_of_the_two_passes_is_not_passed_by(edit):
    pipe, found = tiny.wan21(), []
    own = SoftPAG({2: [0]})
    for reuse in (True, False):
        with steer(pipe, edit), guide(pipe, own, reuse_prefix=reuse):
            found.append(generate(pipe))
        with guide(pipe, own, reuse_prefix=reuse), steer(pipe, edit):
            found.append(generate(pipe))
    assert all(torch.equal(found[0], other) for other in found[1:])
    with guide(pipe, own):
        assert not torch.equal(generate(pipe), found[0])


# ---- what is said, and what is left


def test_guidance_that_is_not_linear_is_warned_about_once(caplog):
    pipe = tiny.wan21()
    own = type(pipe)

    class Rescaling(own):  # no pipeline of ours rescales
        def __call__(self, *args, guidance_rescale=0.0, **options):
            return super().__call__(*args, **options)

    pipe.__class__ = Rescaling
    with caplog.at_level(logging.WARNING, "visattn"), guide(pipe, guidance("wan21")):
        generate(pipe)
        assert caplog.records == []
        generate(pipe, guidance_rescale=0.7)
        generate(pipe, guidance_rescale=0.7)
    assert [record.getMessage() for record in caplog.records] == [
        "guidance is approximate: guidance_rescale=0.7 scales the prediction by its standard "
        "deviation"
    ]


def test_second_scale_of_zero_is_refused():
    pipe = tiny.wan22()
    with (
        pytest.raises(ValueError, match="guidance scale of transformer_2 is 0"),
        guide(pipe, guidance("wan22")),
    ):
        generate(pipe, guidance_scale_2=0.0)


def test_guidance_that_touches_no_call_raises():
    pipe = tiny.wan21()
    generate(pipe)
    clean = traces(pipe)
    for own in (guidance("wan21", start=STEPS), SLG(blocks=1, start=STEPS, stop=STEPS + 1)):
        with pytest.raises(ValueError, match="has changed no attention call"), guide(pipe, own):
            generate(pipe)
    with pytest.raises(ValueError, match="did not run"), guide(pipe, guidance("wan21")):
        pass
    for own, message in (
        (SoftPAG({9: [0]}), "names layer 9; there are 3"),
        (SoftPAG({1: [4]}), "names head 4"),
        (SoftPAG({"blocks.9.attn1": [0]}), "names the layer 'blocks.9.attn1'"),
        (SLG(blocks=3), "names block 3"),
    ):
        with pytest.raises(ValueError, match=message), guide(pipe, own):
            raise AssertionError("not reached")
        assert traces(pipe) == clean


def test_zero_star_that_scales_nothing_raises():
    pipe = tiny.wan21()
    with (
        pytest.raises(ValueError, match="without classifier-free"),
        guide(pipe, CFGZeroStar(zero_init=0)),
    ):
        generate(pipe, guidance=False)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"zero_init=.* must be"):
            CFGZeroStar(zero_init=wrong)


def test_second_guide_is_refused_and_leaves_the_first():
    pipe = tiny.wan21()
    with guide(pipe, guidance("wan21")):
        expected = generate(pipe)
        with pytest.raises(ValueError, match="guided already"), guide(pipe, CFGZeroStar()):
            raise AssertionError("not reached")
        assert generate(pipe).equal(expected)


@pytest.mark.parametrize("kind", ["cogvideox", "sd3"])
def test_pipeline_that_shares_its_denoiser_is_guided(kind):
    pipe = PIPELINES[kind]()
    with guide(pipe, guidance(kind)):
        expected = generate(pipe)
    other = type(pipe)(**pipe.components)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    apply_plan(pipe, Plan((Rule(Dense()),)))
    with guide(other, guidance(kind)):
        assert generate(other).equal(expected)
    with guide(pipe, guidance(kind)):
        assert generate(pipe).equal(expected)


def test_job_of_a_guided_pipeline_is_what_it_is():
    pipe = tiny.wan21()
    with guide(pipe, guidance("wan21")):
        job = Job("a", **tiny.SHAPE, num_inference_steps=1)
        assert run_job(pipe, job).frames.ndim == 4


def raising(*_):
    raise Stop


@pytest.mark.parametrize("where", ["attention", "perturbed attention", "callback"])
@pytest.mark.parametrize("kind", ["wan22", "cogvideox", "flux", "sd3"])
def test_interrupted_generation_leaves_no_trace(kind, where):
    pipe = PIPELINES[kind]()
    plain, clean = generate(pipe), traces(pipe)
    module, options, handle = pipe.transformer.get_submodule(PATHS[kind][1]), {}, None
    if where == "callback":
        options["callback_on_step_end"] = raising
    else:
        hook = raising if where == "attention" else second_time()
        handle = module.to_k.register_forward_pre_hook(hook)
    with pytest.raises(Stop), guide(pipe, [guidance(kind), CFGZeroStar(zero_init=0)]):
        generate(pipe, **options)
    if handle is not None:
        handle.remove()
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe), plain)


def second_time():
    """A hook that raises at its second call: the perturbed pass is the second one."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    return hook


def test_pipeline_that_was_guided_is_freed():
    pipe = tiny.wan21()
    with guide(pipe, guidance("wan21")):
        generate(pipe)
    whole, model = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert whole() is None and model() is None


# ---- together


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_several_guidances_add(kind):
    """For one step, in which the predictions have the same latents."""
    first, second = PATHS[kind][0], PATHS[kind][-1]
    ones = SoftPAG({first: [0]}, scale=1.5), SoftPAG({second: {1: 0.5}}, scale=W)

    def prediction(*guidances):
        pipe, found = PIPELINES[kind](), []
        own = pipe.scheduler.step

        def step(prediction, *args, **kwargs):
            found.append(prediction)
            return own(prediction, *args, **kwargs)

        pipe.scheduler.step = step
        with guide(pipe, list(guidances)) if guidances else nullcontext():
            generate(pipe)
        return found[0]

    plain, one, two = prediction(), prediction(ones[0]), prediction(ones[1])
    both = prediction(*ones)
    torch.testing.assert_close(both - plain, one + two - 2 * plain, rtol=0, atol=1e-5)
    assert (one - plain).abs().max() > 1e-3 and (two - plain).abs().max() > 1e-3


def star(c, u):
    """``s u`` with ``s = <c, u> / |u|^2``."""
    c64, u64 = c.double().flatten(1), u.double().flatten(1)
    s = (c64 * u64).sum(1) / (u64 * u64).sum(1)
    return s.to(u.dtype).reshape(-1, *[1] * (u.ndim - 1)) * u


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_cfg_zero_star_equals_its_formula_and_adds(kind):
    expected, _ = written(kind, {}, uncond=star)
    pipe = PIPELINES[kind]()
    with guide(pipe, [guidance(kind), CFGZeroStar(zero_init=0)]):
        assert error(generate(pipe), expected) < 2e-6
    expected, _ = written(kind, {}, uncond=star, factor=0.0)  # where p is c
    with guide(pipe, CFGZeroStar(zero_init=0)):
        assert error(generate(pipe), expected) < 2e-6
    given, own = [], pipe.scheduler.step

    def step(prediction, *args, **kwargs):
        given.append(bool((prediction == 0).all()))
        return own(prediction, *args, **kwargs)

    pipe.scheduler.step = step
    for first in (1, 0.3):
        with guide(pipe, [guidance(kind), CFGZeroStar(zero_init=first)]):
            generate(pipe)
    assert given == 2 * [True, False, False]


# ---- with a plan, a cache, a compiler


@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_density_1_changes_nothing(kind):
    pipe = PIPELINES[kind]()
    with guide(pipe, guidance(kind)):
        expected = generate(pipe)
    every = (1.0, 1.0, 1.0) if kind in tiny.PIPELINES else (1, 1.0, 1.0)
    for plan in (Plan((Rule(Neighborhood(every)),)), Plan((Rule(Dense(), pass_="perturbed"),))):
        apart = kind in BATCHED and "perturbed" in plan.passes  # the pass has no prefix
        with sparse(pipe, plan), guide(pipe, guidance(kind)):
            found = generate(pipe)
            assert error(found, expected) < 2e-6 if apart else torch.equal(found, expected)
    with guide(pipe, guidance(kind)), sparse(pipe, plan):
        assert torch.equal(generate(pipe), found)


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux", "sd3"])
def test_plan_is_that_of_the_conditional_pass_unless_it_says_otherwise(kind):
    """Against the loop whose three passes run the same plan, without visattn's fold."""
    pattern = (Diagonal(9), Dense(), Diagonal(4), Dense())
    pipe = PIPELINES[kind]()
    first = Plan((Rule(pattern),))
    apply_plan(pipe, first)
    with guide(pipe, SoftPAG({0: [3]}, strength=0.6, scale=W)):
        every = generate(pipe)
    apply_plan(pipe, Plan((Rule(pattern, pass_="cond"), Rule(pattern, pass_="uncond"))))
    with guide(pipe, SoftPAG({0: [3]}, strength=0.6, scale=W)):
        assert torch.equal(generate(pipe), every)
    rules = (*first.rules, Rule(Diagonal(1), pass_="perturbed"))
    apply_plan(pipe, Plan(rules))
    with guide(pipe, SoftPAG({0: [3]}, strength=0.6, scale=W)):
        assert not torch.allclose(generate(pipe), every, atol=1e-3)
    assert all(row.reason is None for row in summary(pipe).layers)
    remove_plan(pipe)


def cached(pipe, threshold):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_step_cache_keeps_the_passes_apart(kind):
    """A threshold under which nothing is reused gives what there is without a cache, which mixed
    states would not; and one under which all is reused has as many calls spared in each pass."""
    pipe = PIPELINES[kind]()
    with guide(pipe, guidance(kind), reuse_prefix=False):
        expected = generate(pipe)
        cached(pipe, 0.0)
        assert error(generate(pipe), expected) < 2e-6
        pipe.transformer.disable_cache()
    ran = []
    cached(pipe, 1e9)
    last = pipe.transformer.get_submodule(PATHS[kind][-1])
    last.register_forward_hook(lambda *_: ran.append(pipe.transformer._visattn.context.name))
    with guide(pipe, guidance(kind)):
        found = generate(pipe)
    names = {"wan21": ["cond", "perturbed", "uncond"], "flux": ["cond", "perturbed", "uncond"]}
    assert ran == names.get(kind, ["cond_uncond", "perturbed"])  # each in the first step alone
    assert (found - expected).abs().max() > 1e-3
    pipe.transformer.disable_cache()


@contextmanager
def compiled(pipe, way):
    """The denoiser compiled, and how many graphs it has."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    if way == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    elif getattr(pipe.transformer, "_repeated_blocks", None):
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
    yield counter
    torch._dynamo.reset()


@pytest.mark.second
@pytest.mark.parametrize("kind", ["wan21"])
def test_strength_does_not_compile_again(kind):
    pipe, some = PIPELINES[kind](), {"num_inference_steps": 2}
    plain, expected, counts = generate(pipe, **some), {}, []
    for strength in (0.3, 0.9):
        with guide(pipe, guidance(kind, strength=strength)):
            expected[strength] = generate(pipe, **some)
    with compiled(pipe, "blocks") as counter:
        for strength in (0.3, 0.9, 0.3):
            with guide(pipe, guidance(kind, strength=strength)):
                assert error(generate(pipe, **some), expected[strength]) < 2e-6
            counts.append(counter.frame_count)
        assert counts[0] == counts[1] == counts[2]
        assert error(generate(pipe, **some), plain) < 2e-6


@pytest.mark.second
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_model_that_is_compiled_as_a_whole_is_guided(kind):
    pipe, some = PIPELINES[kind](), {"num_inference_steps": 1}
    with guide(pipe, guidance(kind)):
        expected = generate(pipe, **some)
    with compiled(pipe, "whole"), guide(pipe, guidance(kind)):
        assert error(generate(pipe, **some), expected) < 2e-6
