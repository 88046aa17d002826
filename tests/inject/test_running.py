"""Steps and passes of pipelines that do not say them, and of batches whose guidance changes."""

import logging

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from support import tiny, tiny_images, variants
from support.planned import Stop, traces

from visattn.guidance import SEG, guide
from visattn.inject import apply_plan, observe, remove_plan, sparse, summary
from visattn.inject.hooks.run_state import Batch, passes_in
from visattn.inject.layers import denoising_state
from visattn.patterns import Dense, Diagonal
from visattn.plan import Plan, Rule

PASSED = Plan((Rule(Diagonal(2), pass_="cond"), Rule(Dense(), pass_="uncond")))
STEPPED = Plan((Rule(Diagonal(2)),), dense_steps=(3, 0))
BOTH = ("uncond", "cond")


def moments(pipe, generate, layer=0):
    """Step, passes and batch of each call of a layer."""
    seen = []

    def look(call):
        if call.number == layer:
            seen.append((call.step, call.passes, len(call.q)))

    with observe(pipe, look):
        generate()
    return seen


def passes(pipe, generate, layer=0):
    return [own for _, own, _ in moments(pipe, generate, layer)]


@pytest.mark.parametrize("name", variants.PIPELINES)
def test_step_and_pass_of_pipelines_that_do_not_say_them(name):
    pipe = variants.PIPELINES[name]()
    clean = traces(pipe)
    for guided in (False, True) if name not in variants.UNGUIDED else (False,):
        found = moments(pipe, lambda guided=guided: variants.generate(name, pipe, guided))
        steps = range(variants.FIRST.get(name, 0), variants.STEPS)
        each = ("cond", "uncond") if guided else ("cond",)
        assert found == [(step, (pass_,), 1) for step in steps for pass_ in each]
    assert {key: traces(pipe)[key][0] for key in clean} == {key: clean[key][0] for key in clean}


def test_plans_and_guidance_on_a_pipeline_that_does_not_say_where_it_stands():
    """Dense in all steps but the last, dense in the unconditional pass, and guided."""
    name = "flux img2img"
    pipe = variants.PIPELINES[name]()
    dense = variants.generate(name, pipe, True)
    calls = pipe.transformer.transformer_blocks[0].attn
    with sparse(pipe, STEPPED):
        assert not torch.equal(variants.generate(name, pipe, True), dense)
        assert calls._visattn_layer.sparse_calls == 2 == calls._visattn_layer.dense_calls
    with sparse(pipe, PASSED):
        assert not torch.equal(variants.generate(name, pipe, True), dense)
        assert calls._visattn_layer.sparse_calls == 2 == calls._visattn_layer.dense_calls
    with guide(pipe, SEG(layers=[0], scale=2.0)):
        assert not torch.equal(variants.generate(name, pipe, True), dense)
    assert type(pipe) is FluxImg2ImgPipeline
    assert torch.equal(variants.generate(name, pipe, True), dense)


def test_pipeline_that_does_not_run_is_not_asked():
    """Two pipelines share the denoiser and the scheduler; the plan is on the one, the other runs,
    whatever guidance the first one had, and inside its call as well."""
    pipe = tiny_images.sd3()
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    assert other.scheduler is pipe.scheduler
    tiny_images.generate(pipe, guidance=False)
    options = {"image": variants.IMAGE, "strength": 0.5, "height": 24, "width": 16}
    apply_plan(pipe, PASSED)
    match = "StableDiffusion3Pipeline is not the pipeline that runs; apply the plan to the pipeline"
    with pytest.raises(ValueError, match=match):
        tiny_images.generate(other, **options)

    def callback(own, step, timestep, tensors):
        tiny_images.generate(inside, **options)
        return tensors

    inside = StableDiffusion3Img2ImgPipeline.from_pipe(other)
    apply_plan(inside, PASSED)
    apply_plan(pipe, PASSED)
    with observe(inside, lambda _: None), pytest.raises(ValueError, match="is not the pipeline"):
        tiny_images.generate(pipe, callback_on_step_end=callback)
    remove_plan(pipe)
    assert type(inside) is StableDiffusion3Img2ImgPipeline
    assert type(pipe) is StableDiffusion3Pipeline


def test_interrupted_pipeline_does_not_run():
    pipe = variants.PIPELINES["flux img2img"]()
    apply_plan(pipe, PASSED)

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        variants.generate("flux img2img", pipe, False, callback_on_step_end=stop)
    assert pipe.transformer._visattn.passes(1) is None


class OfItsOwn(FluxImg2ImgPipeline):
    """A pipeline whose order of passes nobody knows."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_step_and_pass_are_found_out_once_in_a_call(monkeypatch):
    """FLUX gives its denoiser other timesteps than its schedule has: values are compared, for which
    a GPU is waited for."""
    pipe = variants.PIPELINES["flux img2img"]()
    asked = []

    def counted(name, own):
        return lambda *args: asked.append(name) or own(*args)

    for name in ("runs", "step_of"):
        monkeypatch.setattr(denoising_state, name, counted(name, getattr(denoising_state, name)))
    rules = Rule(Diagonal(2), pass_="cond"), Rule(Diagonal(3), pass_="uncond")
    plan = Plan(rules, dense_steps=(1, 0))
    apply_plan(pipe, plan)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(asked.copy()) or asked.clear())
    variants.generate("flux img2img", pipe, True)
    assert len(calls) > 1 and asked == []
    assert all(own == ["step_of", "runs"] for own in calls)
    assert len({row.layer for row in summary(pipe).layers}) > 1


def test_pipeline_of_unknown_order_has_steps_and_is_refused_where_passes_matter():
    pipe = OfItsOwn(**variants.PIPELINES["flux img2img"]().components)
    found = moments(pipe, lambda: variants.generate("flux img2img", pipe, False))
    assert found == [(2, None, 1), (3, None, 1)]
    apply_plan(pipe, PASSED)
    match = "OfItsOwn does not expose it; use a plan without passes"
    with pytest.raises(ValueError, match=match):
        variants.generate("flux img2img", pipe, False)


# ---- batches of another composition


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_batch_of_perturbed_attention_guidance(images, guided):
    """The layers that it is on are called apart for the perturbed samples."""
    pipe = variants.sd3_pag()
    options = {"num_images_per_prompt": images, "guidance": guided, "steps": 1}
    first = BOTH if guided else ("cond",)
    found = moments(pipe, lambda: tiny_images.generate(pipe, **options))
    assert found == [(0, (*first, "perturbed"), images * (len(first) + 1))]
    found = moments(pipe, lambda: tiny_images.generate(pipe, **options), layer=1)
    assert found == [(0, first, images * len(first)), (0, ("perturbed",), images)]
    off = moments(pipe, lambda: tiny_images.generate(pipe, pag_scale=0.0, **options), layer=1)
    assert off == [(0, first, images * len(first))]


def test_plan_under_perturbed_attention_guidance_says_which_calls_are_dense(caplog):
    """What is sparse for the conditional samples alone is what a plan of all is, but for those of
    the unconditional ones."""
    pipe = variants.sd3_pag()
    apply_plan(pipe, PASSED)
    with caplog.at_level(logging.WARNING, "visattn"):
        tiny_images.generate(pipe, num_images_per_prompt=2)
    own = [record.getMessage() for record in caplog.records]
    path = "transformer_blocks.1.attn"
    assert own == [f"transformer: some calls of {path} stay dense: it is given an attention mask"]


@pytest.mark.parametrize(
    ("passes", "size", "batch", "masked", "expected"),
    [
        (BOTH, 4, 4, False, BOTH),
        (BOTH, 4, 2, False, None),  # a cache has taken a part away
        (("cond",), 2, 2, True, ("cond",)),
        (("cond",), 2, 1, False, None),
        (("perturbed",), 2, 1, True, None),
        ((*BOTH, "perturbed"), 6, 4, False, BOTH),
        ((*BOTH, "perturbed"), 6, 2, True, ("perturbed",)),
        ((*BOTH, "perturbed"), 6, 2, False, None),
        ((*BOTH, "perturbed"), 6, 3, False, None),
        (("cond", "perturbed"), 4, 2, False, ("cond",)),
        (("cond", "perturbed"), 4, 2, True, ("perturbed",)),
    ],
)
def test_passes_in_a_call(passes, size, batch, masked, expected):
    assert passes_in(passes, size, batch, masked) == expected


# ---- guidance that changes within a run


def switch(pipe, step, timestep, tensors):
    """Ends guidance after the first step, for any number of prompts."""
    if step == 0:
        pipe._guidance_scale = 0.0
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            if name in tensors:
                tensors[name] = tensors[name].chunk(2)[1]
    return tensors


@pytest.mark.parametrize("prompts", [1, 2])
def test_guidance_of_sd3_that_ends(prompts):
    """The batch is half of what it was, which with two prompts could be of both passes."""
    options = {
        "prompt": ["a red square", "blue circle"][:prompts],
        "negative_prompt": ["a", "blue"][:prompts],
        "callback_on_step_end": switch,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    pipe = tiny_images.sd3()
    found = moments(pipe, lambda: tiny_images.generate(pipe, **options))
    rest = [(step, ("cond",), prompts) for step in (1, 2)]
    assert found == [(0, BOTH, 2 * prompts), *rest]
    with guide(pipe, SEG(layers=[0], scale=2.0)):
        assert tiny_images.generate(pipe, **options).isfinite().all()
    assert passes(pipe, lambda: tiny_images.generate(pipe)) == [BOTH] * 3  # as before


def test_diffusers_cutoff_of_guidance():
    pipe = tiny_images.sd3()
    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    options = {"callback_on_step_end": cutoff}
    found = passes(pipe, lambda: tiny_images.generate(pipe, **options))
    assert found == [BOTH, BOTH, ("cond",)]


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (tiny.wan21, [("cond",), ("uncond",)], [("cond",)]),
        (tiny.cogvideox, [BOTH], [BOTH]),  # its batch stays
        (tiny.hunyuanvideo, [("cond",), ("uncond",)], [("cond",), ("uncond",)]),
    ],
)
def test_guidance_of_video_pipelines_that_ends(make, before, after):
    pipe = make()
    options = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["latents"]}
    found = passes(pipe, lambda: tiny.generate(pipe, steps=2, **options))
    assert found == [*before, *after]


def test_guidance_of_wan_video_to_video_that_ends():
    pipe = variants.PIPELINES["wan v2v"]()
    options = {"callback_on_step_end": switch}
    found = passes(pipe, lambda: variants.generate("wan v2v", pipe, True, **options))
    assert found == [("cond",), ("uncond",), ("cond",), ("cond",), ("cond",)]


def test_text_that_a_callback_brings_is_of_no_known_pass():
    def change(pipe, step, timestep, tensors):
        tensors["prompt_embeds"] = tensors["prompt_embeds"].clone()
        return tensors

    pipe = variants.PIPELINES["wan v2v"]()
    options = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "num_inference_steps": 2,
    }
    found = passes(pipe, lambda: variants.generate("wan v2v", pipe, True, **options))
    assert found == [("cond",), ("uncond",), None, ("uncond",)]


def test_size_of_a_batch_that_no_change_of_guidance_explains():
    class Pipe:
        scheduler = tiny_images.sd3().scheduler
        _guidance_scale = 3.0

    Pipe.scheduler.set_timesteps(3)
    batch = Batch()
    assert batch(Pipe, BOTH, 4) == BOTH
    assert batch(Pipe, BOTH, 2) is None
    Pipe._guidance_scale = 1.0
    assert batch(Pipe, BOTH, 2) == ("cond",)
    assert batch(Pipe, BOTH, 4) == BOTH  # a dynamic scale moves through 1
    assert batch(Pipe, BOTH, 3) is None
