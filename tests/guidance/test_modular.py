"""The guider for modular pipelines, on the modular Wan pipeline of diffusers (its blocks after the
text encoder), against ``visattn.guide`` on the classic one and against its formula."""

import functools
import threading
from dataclasses import replace

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from support import tiny
from support.planned import Stop, traces

from visattn import guide
from visattn.guidance import (
    NAG,
    PAG,
    SEG,
    SLG,
    STG,
    CFGZeroStar,
    HeadSet,
    S2Guidance,
    SoftPAG,
    TemperatureGuidance,
    TokenPerturbation,
)
from visattn.guidance.modular import PerturbedGuidance, SoftPerturbedGuidance
from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Dense, Diagonal
from visattn.plan import Plan, Rule

HEADS = {"blocks.1.attn1": {0: 1.0, 2: 0.4}}
G, W, STEPS = 3.0, 2.5, 3
WHOLE = {"scale": W, "start": 0, "stop": 1.0}
OTHERS = {
    "PAG": PAG(layers=(1,), **WHOLE),
    "SEG": SEG(layers=(1,), **WHOLE),
    "SEG, finite": SEG(layers=(0, 2), sigma=0.7, **WHOLE),
    "SLG": SLG(blocks=1, **WHOLE),
    "STG, attention": STG(blocks=(1, 2), what="attention", **WHOLE),
    "STG": STG(blocks=2, **WHOLE),
    "temperature": TemperatureGuidance(layers="blocks.1.attn1", temperature=3.0, **WHOLE),
    "tokens": TokenPerturbation(blocks=(0, 1), share=0.5, seed=3, **WHOLE),
    "S2": S2Guidance(share=0.4, seed=1, **WHOLE),
    "SoftPAG": SoftPAG(HEADS, scale=W, policy="image_rows", target="uniform"),
}
others = pytest.mark.parametrize("own", OTHERS.values(), ids=OTHERS)


def guider(**options):
    given = {"guidance_scale": G, "perturbed_scale": W, "heads": HEADS, **options}
    return SoftPerturbedGuidance(**given)


@functools.cache
def embeds():
    prompts = "a red square moves right", "blue circle"
    with torch.no_grad():
        return tiny.wan21().encode_prompt(*prompts, max_sequence_length=10)


def modular(own):
    blocks = {"denoise": WanCoreDenoiseStep(), "decode": WanVaeDecoderStep()}
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    parts = tiny.wan21()
    pipe.update_components(
        transformer=parts.transformer, scheduler=parts.scheduler, vae=parts.vae, guider=own
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=STEPS):
    cond, uncond = embeds()
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output="latents",
        output_type="pt",
        **tiny.SHAPE,
    )


@functools.cache
def plain(scale=G):
    return generate(modular(ClassifierFreeGuidance(guidance_scale=scale)))


def classic(guidance=None, plan=None, **options):
    pipe = tiny.wan21()
    if plan is not None:
        apply_plan(pipe, plan)
    with guide(pipe, SoftPAG(HEADS, scale=W) if guidance is None else guidance):
        return tiny.generate(pipe, steps=STEPS, **options)


def close(x, y):
    return float((x - y).abs().max() / y.abs().max()) < 2e-6


@pytest.mark.parametrize("scale", [G, 1.0], ids=["CFG", "no CFG"])
def test_modular_pipeline_gives_what_the_classic_one_does(scale):
    found = generate(modular(guider(guidance_scale=scale)))
    assert close(found, classic(guidance_scale=scale))
    assert not close(found, plain(scale))


@pytest.mark.sampled(3)
@others
def test_every_guidance_gives_what_it_does_on_the_classic_pipeline(own):
    found = generate(modular(PerturbedGuidance(own, guidance_scale=G)))
    assert close(found, classic(own))
    assert not close(found, plain())


@others
def test_every_guidance_of_scale_0_changes_no_bit(own):
    none = PerturbedGuidance(replace(own, scale=0.0), guidance_scale=G)
    assert torch.equal(generate(modular(none)), plain())


def test_window_is_that_of_the_guidance():
    first = SLG(blocks=1, start=0, stop=1, scale=W)
    found = generate(modular(PerturbedGuidance(first, guidance_scale=G)))
    assert close(found, classic(first))
    assert not close(found, classic(OTHERS["SLG"]))
    never = SLG(blocks=1, start=0.9, stop=0.99)
    with pytest.raises(ValueError, match=r"SLG has start=0.9, stop=0.99, which select none of 3"):
        generate(modular(PerturbedGuidance(never)))
    none = PerturbedGuidance(replace(never, scale=0.0), guidance_scale=G)
    assert torch.equal(generate(modular(none)), plain())


def test_original_formulation_counts_the_scale_from_zero():
    own = guider(guidance_scale=G - 1, use_original_formulation=True)
    assert close(generate(modular(own)), classic())
    off = guider(guidance_scale=0.0, use_original_formulation=True)
    assert close(generate(modular(off)), classic(guidance_scale=1.0))


def test_no_strength_and_no_scale_change_no_bit():
    for own in (guider(perturbed_scale=0.0), guider(strength=0.0)):
        assert torch.equal(generate(modular(own)), plain())
    off = guider(enabled=False)
    assert torch.equal(generate(modular(off)), plain(1.0))


def calls_of(pipe):
    found = []
    pipe.transformer.register_forward_hook(
        lambda model, args, kwargs, out: found.append((kwargs, out[0])), with_kwargs=True
    )
    return found


def test_perturbed_pass_has_the_conditional_embeddings():
    cond, uncond = embeds()
    for scale, passes in ((G, 3), (1.0, 2)):
        pipe = modular(guider(guidance_scale=scale))
        calls = calls_of(pipe)
        generate(pipe)
        assert len(calls) == passes * STEPS
        for number in range(0, len(calls), passes):
            (first, c), (second, p), *rest = calls[number : number + passes]
            for one in (first, second):
                assert torch.equal(one["encoder_hidden_states"], cond)
                assert torch.equal(one["hidden_states"], first["hidden_states"])
            assert (c - p).abs().max() > 1e-3
            assert all(torch.equal(one["encoder_hidden_states"], uncond) for one, _ in rest)


def test_only_the_blocks_from_the_first_edited_one_run_again():
    pipe, ran = modular(guider()), []
    for number, block in enumerate(pipe.transformer.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    generate(pipe)
    assert ran == [0, 1, 2, 1, 2, 0, 1, 2] * STEPS


@pytest.mark.parametrize("shared", [False, True], ids=["", "one guider"])
def test_second_request_is_refused_and_the_first_is_unharmed(shared):
    """While the first is in the midst of a step, over the same denoiser."""
    pipe = modular(guider())
    other = modular(pipe.guider if shared else guider())
    other.update_components(transformer=pipe.transformer)
    expected, calls, said = generate(pipe), [], []
    alone = generate(other)

    def second():
        try:
            generate(other)
        except RuntimeError as error:
            said.append(str(error))

    def meanwhile(*_):
        calls.append(1)
        if len(calls) == 2:
            own = threading.Thread(target=second)
            own.start()
            own.join()

    handle = pipe.transformer.blocks[2].register_forward_pre_hook(meanwhile)
    found = generate(pipe)
    handle.remove()
    assert len(said) == 1 and "another thread or asyncio task runs" in said[0], said
    assert torch.equal(found, expected)
    assert torch.equal(generate(other), alone)


def test_formula_with_rescaling():
    torch.manual_seed(0)
    c, u, p = torch.randn(3, 2, 4, 3, 6, 4).unbind()
    pred = u + G * (c - u) + W * (c - p)
    ratio = [c[n].double().std() / pred[n].double().std() for n in range(2)]
    expected = torch.stack([pred[n] * (0.3 * ratio[n] + 0.7) for n in range(2)]).float()
    found = guider(guidance_rescale=0.3).forward(c, u, p)
    torch.testing.assert_close(found.pred, expected)
    assert torch.equal(found.pred_cond, c) and torch.equal(found.pred_uncond, u)
    torch.testing.assert_close(guider().forward(c, u, p).pred, pred)
    torch.testing.assert_close(guider().forward(c, None, p).pred, c + W * (c - p))
    torch.testing.assert_close(guider().forward(c, u).pred, u + G * (c - u))


def test_window_has_its_first_step():
    for options, expected in (
        ({"perturbed_start": 0.25, "perturbed_stop": 0.75}, [2, 3, 3, 2]),
        ({"start": 0.25, "stop": 0.5}, [2, 3, 2, 2]),
    ):
        own = guider(**options)
        counts = []
        for step in range(4):
            own.set_state(step, 4, torch.tensor(1.0))
            counts.append(own.num_conditions)
            assert len(own.prepare_inputs({"x": (torch.zeros(1), torch.ones(1))})) == counts[-1]
        assert counts == expected
    window = SoftPAG(HEADS, scale=W, start=0.5, stop=0.7)
    own = guider(perturbed_start=0.5, perturbed_stop=0.7)
    assert close(generate(modular(own)), classic(window))
    with pytest.raises(ValueError, match=r"select none of 3 steps"):
        generate(modular(guider(perturbed_start=0.7, perturbed_stop=0.9)))


def test_batches_of_a_denoiser_loop_of_ones_own():
    """``prepare_inputs`` takes pairs of tensors, as pipelines that are not modular give."""
    own = guider()
    own.set_state(0, 2, torch.tensor(1.0))
    batches = own.prepare_inputs({"x": (torch.zeros(1), torch.ones(1)), "y": torch.ones(2)})
    names = [getattr(batch, own._identifier_key) for batch in batches]
    assert names == ["pred_cond", "pred_cond_skip", "pred_uncond"]
    assert [float(batch.x) for batch in batches] == [0, 0, 1]
    conditional = []
    for _ in names:
        own.prepare_models(tiny.wan_transformer(0))
        conditional.append(own.is_conditional)
    own.set_state(1, 2, torch.tensor(1.0))
    assert conditional == [True, True, False]


@pytest.mark.parametrize(
    "heads",
    [
        None,
        {1: [0, 2]},
        {"blocks.2.attn1": None, "1": {"3": 0.5}},
        HeadSet(HEADS, strength=0.5, scale=1.5, policy="image_rows"),
    ],
    ids=["all", "lists", "text", "set"],
)
def test_configuration_is_saved_and_read(heads, tmp_path):
    own = SoftPerturbedGuidance(heads=heads, perturbed_start=0.1, guidance_rescale=0.2)
    own.save_pretrained(tmp_path)
    again = SoftPerturbedGuidance.from_pretrained(tmp_path)
    assert again.config == own.config
    if not isinstance(heads, HeadSet):
        assert again.guidance == own.guidance
    else:
        assert (again.config.strength, again.config.perturbed_scale) == (0.5, 1.5)
        assert again.config.policy == "image_rows"
    edits = [sorted(map(str, one.guidance.edits())) for one in (own, again)]
    assert edits[0] == edits[1]
    assert own.new(perturbed_scale=7.0).guidance.scale == 7.0


@others
def test_configuration_of_every_guidance_is_saved_and_read(own, tmp_path):
    guider = PerturbedGuidance(own, guidance_scale=G, guidance_rescale=0.2)
    guider.save_pretrained(tmp_path)
    again = PerturbedGuidance.from_pretrained(tmp_path)
    assert again.config == guider.config
    assert type(again.guidance) is type(own)
    assert again.guidance == own
    assert again.config.guidance.startswith(f"{type(own).__name__}(")
    assert guider.new(guidance=SEG(sigma=0.5)).guidance == SEG(sigma=0.5)
    assert PerturbedGuidance("SEG(sigma=0.5)").guidance == SEG(sigma=0.5)


def test_configurations_of_older_versions_are_read():
    for config, guidance in (
        ({"name": "SEG", "sigma": 2.0, "layers": [1]}, SEG(sigma=2.0, layers=(1,))),
        ({"name": "SoftPAG", "heads": {"3": {"0": 0.5}}}, SoftPAG({3: {0: 0.5}})),
    ):
        assert PerturbedGuidance(config).guidance == guidance


def test_what_is_no_perturbed_guidance_is_refused():
    for given, kind, message in (
        (CFGZeroStar(), TypeError, "use base=ClassifierFreeZeroStarGuidance"),
        (NAG(negative_prompt="x"), TypeError, "must be one of PAG, S2Guidance, SEG, SLG, Soft"),
        ({"sigma": 1.0}, ValueError, "must have a name"),
        ({"name": "NAG", "negative_prompt": "x"}, TypeError, "must be one of PAG"),
        ({"name": "SEG", "sigme": 1.0}, TypeError, "no parameter 'sigme', did you mean 'sigma'"),
        ({"name": "SEG", "sigma": -1.0}, ValueError, "sigma=-1.0"),
        (SEG(layers=HeadSet(HEADS)), TypeError, "cannot be written as a text; give"),
        ("softpag:strength=0.5", ValueError, "older versions; write SoftPAG"),
    ):
        with pytest.raises(kind, match=message):
            PerturbedGuidance(given)
    for given, message in ((SLG(blocks=9, **WHOLE), "block 9"), (SEG(layers=9), "names layer 9")):
        with pytest.raises(ValueError, match=message):
            generate(modular(PerturbedGuidance(given)))


BASES = {
    "APG": lambda: AdaptiveProjectedGuidance(G, adaptive_projected_guidance_momentum=-0.5),
    "APG mix": lambda: AdaptiveProjectedMixGuidance(G, adaptive_projected_guidance_start_step=1),
    "CFG": lambda: ClassifierFreeGuidance(G),
    "CFG-Zero*": lambda: ClassifierFreeZeroStarGuidance(G, zero_init_steps=1),
    "tangential": lambda: TangentialClassifierFreeGuidance(G),
}
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


@bases
def test_what_another_guider_makes_of_c_and_u_is_the_base(make):
    """``base(c, u) + w (c - p)``, at each step, also of a base that remembers."""
    own, other = PerturbedGuidance(PAG(layers=(1,), **WHOLE), base=make()), make()
    c, u, p = torch.randn(3, 1, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    data = {"prompt_embeds": (c, u)}
    for step in range(STEPS):
        for one in (own, other):
            one.set_state(step, STEPS, torch.tensor(0))
            one.prepare_inputs(data)
        expected = other.forward(c, u).pred + W * (c - p)
        assert torch.equal(own.forward(c, u, p).pred, expected)


@pytest.mark.sampled(5)
@bases
def test_a_base_without_perturbation_changes_no_bit(make):
    own = PerturbedGuidance(PAG(layers=(1,), scale=0.0), base=make())
    assert torch.equal(generate(modular(own)), generate(modular(make())))
    guided = generate(modular(PerturbedGuidance(PAG(layers=(1,), **WHOLE), base=make())))
    assert not close(guided, generate(modular(make())))


def test_cfg_zero_star_is_that_of_diffusers():
    """The fold on a classic pipeline, beside their guider on the modular one."""
    theirs = ClassifierFreeZeroStarGuidance(G, zero_init_steps=1)
    assert close(classic(CFGZeroStar(zero_init=1)), generate(modular(theirs)))


@bases
def test_configuration_of_a_base_is_saved_and_read(make, tmp_path):
    own = PerturbedGuidance(PAG(layers=(1,), **WHOLE), base=make())
    own.save_pretrained(tmp_path)
    again = PerturbedGuidance.from_pretrained(tmp_path)
    assert type(again.base) is type(own.base)
    assert torch.equal(generate(modular(again)), generate(modular(own)))


def test_bases_that_are_none_are_refused():
    with pytest.raises(ValueError, match="base is AutoGuidance; it must be one of Adaptive"):
        PerturbedGuidance(PAG(), base={"name": "AutoGuidance"})
    with pytest.raises(TypeError, match="must be a guider of diffusers, or its configuration"):
        PerturbedGuidance(PAG(), base=3)
    with pytest.raises(ValueError, match="give these arguments only to base"):
        PerturbedGuidance(PAG(), guidance_scale=2.0, base=ClassifierFreeGuidance(G))


def test_bad_input_is_refused():
    for options, message in (
        ({"strength": 2.0}, "strength=2.0"),
        ({"policy": "some"}, "policy='some'"),
        ({"perturbed_stop": 2.0}, "at most 1.0"),
        ({"start": 1.5}, "between 0.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            guider(**options)
    with pytest.raises(TypeError, match="heads=3 must be a HeadSet, or heads by layer"):
        guider(heads=3)
    for heads, message in (
        ({"blocks.7.attn1": [0]}, "names the layer 'blocks.7.attn1'"),
        ({1: [9]}, "names head 9"),
        (HeadSet(HEADS, model="OtherModel"), "heads are of another model"),
    ):
        pipe = modular(guider(heads=heads))
        with pytest.raises(ValueError, match=message):
            generate(pipe)


@pytest.mark.sampled(5)
@others
def test_denoiser_is_as_it_was_after_a_generation_and_after_an_error(own):
    pipe = modular(PerturbedGuidance(own, guidance_scale=G))
    clean = traces(pipe)
    model = {key: value for key, value in clean.items() if key != "pipe"}

    def same():
        return {key: value for key, value in traces(pipe).items() if key != "pipe"} == model

    generate(pipe)
    assert same()
    for at in range(3):  # in the conditional, the perturbed, and the unconditional pass
        calls = []

        def stop(*_, calls=calls, at=at):
            calls.append(1)
            if len(calls) > at:
                raise Stop

        handle = pipe.transformer.blocks[1].attn1.to_k.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            generate(pipe)
        handle.remove()
        assert same()
    assert torch.equal(generate(pipe), generate(modular(pipe.guider.new())))


def test_plan_that_tells_passes_and_steps_apart():
    """The guider says which they are."""
    rules = Rule(Diagonal(9), pass_="cond"), Rule(Diagonal(4), pass_="uncond")
    plan = Plan(rules, dense_steps=(1, 0))
    pipe = modular(guider())
    apply_plan(pipe, plan)
    found = generate(pipe)
    assert close(found, classic(plan=plan))
    assert not close(found, classic())
    rows = summary(pipe).layers
    assert rows and all(row.sparse_calls for row in rows)
    apply_plan(pipe, Plan((Rule(Dense()),)))
    assert torch.equal(generate(pipe), generate(modular(guider())))
    remove_plan(pipe)


def test_compiled_denoiser():
    torch._dynamo.reset()
    expected = generate(modular(guider()), steps=2)
    pipe = modular(guider())
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert close(generate(pipe, steps=2), expected)
    torch._dynamo.reset()
