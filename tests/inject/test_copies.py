"""A plan on a pipeline that is saved, copied, shares its denoiser, or runs beside another."""

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from support import tiny
from support.planned import (
    KINDS,
    OTHER,
    PASSED,
    PLAN,
    STEPPED,
    VARIED,
    Stop,
    attention,
    roles_of,
    traces,
    usual,
)

from visattn.inject import apply_plan, remove_plan, summary

# ---- saved and copied


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["wan22", "cogvideox"])
def test_saved_pipeline_holds_no_plan(kind, tmp_path):
    pipe = tiny.PIPELINES[kind]()
    tiny.generate(pipe)  # the tokenizer keeps how it was called last
    pipe.save_pretrained(tmp_path / "without")
    apply_plan(pipe, VARIED)
    tiny.generate(pipe)
    pipe.save_pretrained(tmp_path / "with")
    assert files(tmp_path / "with") == files(tmp_path / "without")
    loaded = type(pipe).from_pretrained(tmp_path / "with")
    assert summary(loaded).layers == ()
    # loaded weights lie elsewhere in memory, so that other kernels may run on the CPU
    twin = type(pipe).from_pretrained(tmp_path / "without")
    assert torch.equal(tiny.generate(loaded), tiny.generate(twin))


@pytest.mark.parametrize("kind", ["wan22", "cogvideox"])
def test_copied_pipeline_has_a_plan_of_its_own(kind):
    pipe = tiny.PIPELINES[kind]()
    dense, varied = usual(kind, None), usual(kind, VARIED)
    apply_plan(pipe, VARIED)
    assert torch.equal(tiny.generate(pipe), varied)
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.generate(twin), varied)
    # the copy's own scheduler says the step, and the copy's own guidance the pass
    assert torch.equal(tiny.generate(twin, steps=4), usual(kind, VARIED, steps=4))
    numbers = [
        int(module._visattn_layer.number)
        for one in (pipe, twin)
        for model in roles_of(one).values()
        for module in attention(model)
    ]
    assert len(set(numbers)) == len(numbers)
    apply_plan(twin, OTHER)
    assert torch.equal(tiny.generate(pipe), varied)
    assert torch.equal(tiny.generate(twin), usual(kind, OTHER))
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), dense)
    assert torch.equal(tiny.generate(twin), usual(kind, OTHER))
    remove_plan(twin)
    assert torch.equal(tiny.generate(twin), dense)
    untouched = tiny.PIPELINES[kind]()
    tiny.generate(untouched)
    expected = {key: value[:2] for key, value in traces(untouched).items()}
    for one in (pipe, twin):
        assert {key: value[:2] for key, value in traces(one).items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_copy_outlives_its_original(kind):
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    twin = copy.deepcopy(pipe)
    del pipe
    gc.collect()
    assert torch.equal(tiny.generate(twin), usual(kind, VARIED))


@pytest.mark.parametrize("kind", KINDS)
def test_copied_denoiser_has_a_plan_of_its_own(kind):
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, PLAN)
    expected = tiny.generate(pipe)
    other = tiny.PIPELINES[kind]()
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(tiny.generate(other), expected)
    remove_plan(pipe)
    assert torch.equal(tiny.generate(other), expected)
    apply_plan(pipe, OTHER)
    assert torch.equal(tiny.generate(other), expected)
    remove_plan(other)
    assert torch.equal(tiny.generate(pipe), usual(kind, OTHER))
    assert torch.equal(tiny.generate(other), usual(kind, None))


def test_copied_denoiser_does_not_look_at_the_pipeline_of_its_original():
    """CogVideoX says the step nowhere but in its pipeline."""
    pipe = tiny.cogvideox()
    apply_plan(pipe, STEPPED)
    tiny.generate(pipe)
    other = tiny.cogvideox()
    other.transformer = copy.deepcopy(pipe.transformer)
    with pytest.raises(ValueError, match="the step of this call of transformer is not known"):
        tiny.generate(other)
    apply_plan(other, STEPPED)
    assert torch.equal(tiny.generate(other), tiny.generate(pipe))


# ---- a denoiser in another pipeline


@pytest.mark.parametrize("plan", [PLAN, STEPPED, PASSED, VARIED], ids=["", "step", "pass", "both"])
def test_plan_follows_the_denoiser_into_another_wan_pipeline(plan):
    pipe = tiny.wan21()
    apply_plan(pipe, plan)
    new = WanPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    fresh = tiny.wan21()
    fresh.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    apply_plan(fresh, plan)
    assert torch.equal(tiny.generate(new, steps=4), tiny.generate(fresh, steps=4))
    assert torch.equal(tiny.generate(pipe), usual("wan21", plan))
    remove_plan(new)
    assert torch.equal(tiny.generate(pipe), usual("wan21", None))


def to_video(pipe, prompts=1, **options):
    """Latents of a video from (the latents of) a video."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    shape = (4, 3, 12, 8) if isinstance(pipe, WanVideoToVideoPipeline) else (3, 4, 12, 8)
    settings = {
        "latents": torch.randn(prompts, *shape),
        "prompt_embeds": torch.randn(prompts, 10, 16),
        "negative_prompt_embeds": torch.randn(prompts, 10, 16),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "height": tiny.SHAPE["height"],
        "width": tiny.SHAPE["width"],
        "output_type": "latent",
        **options,
    }
    return pipe(**settings).frames


OF_VIDEOS = {"wan21": WanVideoToVideoPipeline, "cogvideox": CogVideoXVideoToVideoPipeline}


@pytest.mark.parametrize("kind", KINDS)
def test_plan_follows_the_denoiser_into_a_pipeline_of_another_class(kind):
    """One scheduler for both, so that steps are known; and the same as a plan put on it."""
    fresh = OF_VIDEOS[kind].from_pipe(tiny.PIPELINES[kind]())
    apply_plan(fresh, STEPPED)
    expected = to_video(fresh, strength=0.6)
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, STEPPED)
    new = OF_VIDEOS[kind].from_pipe(pipe)
    assert torch.equal(to_video(new, strength=0.6), expected)
    tiny.generate(pipe, steps=3)
    assert torch.equal(to_video(new, strength=0.6), expected)
    assert torch.equal(tiny.generate(pipe), usual(kind, STEPPED))


def stop_at(number):
    def callback(pipe, step, timestep, tensors):
        if step == number:
            raise Stop
        return tensors

    return callback


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_pipeline_does_not_mislead_another(kind):
    """It stays at the timestep where it stopped."""
    fresh = OF_VIDEOS[kind].from_pipe(tiny.PIPELINES[kind]())
    apply_plan(fresh, STEPPED)
    expected = to_video(fresh)
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, STEPPED)
    new = OF_VIDEOS[kind].from_pipe(pipe)
    with pytest.raises(Stop):
        tiny.generate(pipe, steps=4, callback_on_step_end=stop_at(0))
    assert torch.equal(to_video(new), expected)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("ran", [False, True])
def test_guidance_of_another_pipeline_is_not_taken_for_the_running_one(guidance, ran):
    """The plan was put on ``pipe``, and what ``new`` does with guidance it does not know: two
    prompts without guidance and one with it are the same batch."""
    pipe = tiny.cogvideox()
    apply_plan(pipe, PASSED)
    if ran:
        tiny.generate(pipe, guidance_scale=4.0 - guidance)
    new = CogVideoXVideoToVideoPipeline.from_pipe(pipe)
    prompts = 1 if guidance > 1 else 2
    options = {"prompts": prompts, "guidance_scale": guidance}
    with pytest.raises(ValueError, match=r"the pass of this call of transformer is not known"):
        to_video(new, **options)
    apply_plan(new, PASSED)
    assert torch.isfinite(to_video(new, **options)).all()


def test_other_scheduler_of_another_pipeline_is_not_taken_for_the_running_one():
    """Timesteps of the running pipeline may stand in the schedule of the other by chance."""
    pipe = tiny.cogvideox()
    apply_plan(pipe, STEPPED)
    tiny.generate(pipe, steps=2)
    scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    new = CogVideoXVideoToVideoPipeline.from_pipe(pipe, scheduler=scheduler)
    with pytest.raises(ValueError, match="the step of this call of transformer is not known"):
        to_video(new)
    apply_plan(new, STEPPED)
    fresh = CogVideoXVideoToVideoPipeline.from_pipe(
        tiny.cogvideox(), scheduler=CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    )
    apply_plan(fresh, STEPPED)
    assert torch.equal(to_video(new), to_video(fresh))


# ---- several pipelines at once


@pytest.mark.parametrize("other_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_pipeline_runs_inside_another(kind, other_kind):
    pipe, other = tiny.PIPELINES[kind](), tiny.PIPELINES[other_kind](5)
    apply_plan(pipe, VARIED)
    apply_plan(other, STEPPED)
    alone, other_alone = tiny.generate(pipe), tiny.generate(other, steps=4)
    inner = []

    def callback(pipe, step, timestep, tensors):
        inner.append(tiny.generate(other, steps=4))
        return tensors

    assert torch.equal(tiny.generate(pipe, callback_on_step_end=callback), alone)
    assert len(inner) == 3 and all(torch.equal(one, other_alone) for one in inner)


@pytest.mark.parametrize("other_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads(kind, other_kind):
    """They take their steps together."""
    pipes = tiny.PIPELINES[kind](), tiny.PIPELINES[other_kind](5)
    for pipe, plan in zip(pipes, (VARIED, STEPPED), strict=True):
        apply_plan(pipe, plan)
    alone = [tiny.generate(pipe, steps=4) for pipe in pipes]
    barrier, found = threading.Barrier(2), [None, None]

    def callback(pipe, step, timestep, tensors):
        barrier.wait(60)
        return tensors

    def run(number):
        found[number] = tiny.generate(pipes[number], steps=4, callback_on_step_end=callback)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])
