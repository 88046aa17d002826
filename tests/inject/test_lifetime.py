"""A plan through the life of a pipeline: saved, copied, cast, reconfigured, shared, interrupted and
thrown away."""

import copy
import functools
import gc
import threading
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXVideoToVideoPipeline,
    FasterCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from visattn.inject import apply_plan, remove_plan, sparse, summary
from visattn.inject.op import _LAYERS
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.plan import Plan, Rule

HEADS = (Diagonal(2), Dense(), Neighborhood((1, 3, 3)), Diagonal(7))
PLAN = Plan((Rule(HEADS),))
OTHER = Plan((Rule(Diagonal(1)),))
# by the step, by the pass, by both
STEPPED = Plan((Rule(HEADS, phase=0), Rule(Diagonal(1), phase=1)), phases=(0.5,))
PASSED = Plan((Rule(HEADS, pass_="cond"),))
VARIED = Plan((Rule(HEADS, pass_="cond"), Rule(Diagonal(1), phase=1)), phases=(0.5,))
KINDS = ("wan21", "cogvideox")


def roles_of(pipe):
    found = {role: getattr(pipe, role, None) for role in ("transformer", "transformer_2")}
    return {role: model for role, model in found.items() if model is not None}


def attention(model):
    return [module for path, module in model.named_modules() if path.endswith("attn1")]


def traces(pipe):
    """What a plan could leave on a pipeline: classes, attributes, hooks and processors."""
    seen = {"pipe": (type(pipe), set(vars(pipe)))}
    for role, model in roles_of(pipe).items():
        for path, module in model.named_modules():
            own = vars(module)
            hooks = {key: dict(value) for key, value in own.items() if "_hooks" in key}
            seen[role, path] = type(module), list(own), hooks, own.get("forward")
            if "processor" in own:
                its = own["processor"]
                seen[role, path, "processor"] = type(its), list(vars(its)), id(its), dict(vars(its))
    return seen


def calls(pipe):
    """Dense and sparse calls of every layer so far."""
    rows = {(row.role, row.layer): row for row in summary(pipe).layers}
    return [(row.dense_calls, row.sparse_calls) for row in rows.values()]


def with_plan(kind, plan, **options):
    """What a new pipeline gives with a plan; with None, without us."""
    pipe = tiny.PIPELINES[kind]()
    if plan is not None:
        apply_plan(pipe, plan)
    return tiny.generate(pipe, **options)


@functools.cache
def usual(kind, plan, **options):
    """The same, computed once."""
    return with_plan(kind, plan, **options)


@pytest.fixture(autouse=True)
def active_backend():
    """The process-wide backend is the user's: no test leaves it changed, and we never change it."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


# ---- no trace


@pytest.mark.parametrize("plan", [VARIED, Plan()], ids=["varied", "empty"])
@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_no_trace_is_left(kind, plan):
    pipe = tiny.PIPELINES[kind]()
    tiny.generate(pipe)
    before = traces(pipe)
    names, active = list(AttentionBackendName), _AttentionBackendRegistry._active_backend
    apply_plan(pipe, plan)
    remove_plan(pipe)
    assert traces(pipe) == before  # never run
    apply_plan(pipe, plan)
    tiny.generate(pipe)
    remove_plan(pipe)
    assert traces(pipe) == before
    with sparse(pipe, PLAN):
        tiny.generate(pipe)
    assert traces(pipe) == before
    assert _AttentionBackendRegistry._active_backend is active
    assert list(AttentionBackendName) == names


def test_refused_plan_leaves_the_pipeline_as_it_was():
    pipe = tiny.wan22()
    tiny.generate(pipe)
    before = traces(pipe)
    for rule in (Rule(Diagonal(1), layer="blocks.9.attn1"), Rule((Diagonal(1),) * 3)):
        with pytest.raises(ValueError, match="plan is for another model"):
            apply_plan(pipe, Plan((Rule(HEADS), rule)))
        assert traces(pipe) == before
    apply_plan(pipe, PLAN)
    before = traces(pipe)
    with pytest.raises(ValueError, match="plan is for another model"):
        apply_plan(pipe, Plan((Rule(HEADS), Rule(Diagonal(1), layer="blocks.9.attn1"))))
    assert traces(pipe) == before


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


class Stop(Exception):
    pass


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


def test_numbers_of_layers_lie_on_the_cpu():
    """Whatever the default device is, or compiled layers would wait for it."""
    pipe = tiny.wan21()
    with torch.device("meta"):
        apply_plan(pipe, PLAN)
    numbers = [module._visattn_layer.number for module in attention(pipe.transformer)]
    assert {number.device.type for number in numbers} == {"cpu"}
    assert torch.equal(tiny.generate(pipe), usual("wan21", PLAN))


# ---- cast, another scheduler, another size, another plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("kind", ["wan22", "cogvideox"])
def test_pipeline_is_cast(kind, dtype):
    cast = tiny.PIPELINES[kind]().to(dtype)
    dense = tiny.generate(cast)
    apply_plan(cast, VARIED)
    expected = tiny.generate(cast)
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    tiny.generate(pipe)
    pipe.to(dtype)
    found = tiny.generate(pipe)
    assert torch.equal(found, expected) and found.isfinite().all()
    assert not torch.equal(found, dense)
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_scheduler_is_replaced(kind):
    def replaced(pipe):
        if kind == "wan21":
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
        return pipe

    early = replaced(tiny.PIPELINES[kind]())
    apply_plan(early, VARIED)
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    tiny.generate(pipe)
    assert torch.equal(tiny.generate(replaced(pipe), steps=4), tiny.generate(early, steps=4))


@pytest.mark.parametrize("kind", ["wan21", "cogvideox15"])
def test_second_resolution_and_back(kind):
    small, large = {}, {"height": 64, "width": 48, "num_frames": 17}
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    first = tiny.generate(pipe, **small)
    assert torch.equal(tiny.generate(pipe, **large), usual(kind, VARIED, **large))
    assert torch.equal(tiny.generate(pipe, **small), first)


def test_resolution_that_the_plan_does_not_fit_is_refused():
    pipe = tiny.wan21()
    plan = Plan((Rule(Neighborhood((3, 5, 3))),))
    apply_plan(pipe, plan)
    first = tiny.generate(pipe)
    with pytest.raises(ValueError, match=r"plan does not fit the grid 3x4x6 .*blocks\.0\.attn1"):
        tiny.generate(pipe, height=64, width=96)
    assert torch.equal(tiny.generate(pipe), first)


@pytest.mark.parametrize("kind", ["wan22", "cogvideox"])
def test_plan_is_changed(kind):
    pipe = tiny.PIPELINES[kind]()
    for plan in (PLAN, VARIED, Plan((Rule(HEADS),), dense_layers=(0,)), OTHER, PLAN):
        apply_plan(pipe, plan)
        assert torch.equal(tiny.generate(pipe), usual(kind, plan))
    rows = {row.layer for row in summary(pipe).layers}
    assert len(rows) == tiny.LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_steps_changes_between_calls(kind):
    plan = Plan((Rule(HEADS),), dense_steps=(0.25, 1))
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, plan)
    before = 0
    for steps, some in ((4, 2), (7, 4), (2, 0), (4, 2)):
        assert torch.equal(tiny.generate(pipe, steps=steps), usual(kind, plan, steps=steps))
        per_step = 2 if kind == "wan21" else 1
        assert calls(pipe)[0][1] - before == some * per_step
        before = calls(pipe)[0][1]


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


# ---- guidance


def test_passes_of_one_batch_are_those_of_two_calls():
    pipe = tiny.cogvideox()
    apply_plan(pipe, PASSED)
    tiny.generate(pipe)
    model = pipe.transformer.double()
    torch.manual_seed(0)
    video = torch.randn(2, 3, 4, 12, 8, dtype=torch.float64)
    text = torch.randn(2, 10, 16, dtype=torch.float64)
    rotary = pipe._prepare_rotary_positional_embeddings(96, 64, 3, torch.device("cpu"))

    def call(name, half):
        with torch.no_grad(), model.cache_context(name):
            return model(
                video[half],
                text[half],
                pipe._current_timestep.expand(len(video[half])),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]

    pipe._current_timestep = pipe.scheduler.timesteps[1]
    both = call("cond_uncond", slice(0, 2))
    apart = torch.cat([call("uncond", slice(0, 1)), call("cond", slice(1, 2))])
    torch.testing.assert_close(both, apart)
    assert calls(pipe)[0][0] >= 1  # the uncond pass is dense
    wrong = torch.cat([call("cond", slice(0, 1)), call("uncond", slice(1, 2))])
    assert not torch.allclose(both, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_off(kind):
    """All there is is the cond pass."""
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, Plan((Rule(HEADS, pass_="cond"),)))
    assert torch.equal(
        tiny.generate(pipe, guidance_scale=1.0), usual(kind, PLAN, guidance_scale=1.0)
    )
    apply_plan(pipe, Plan((Rule(HEADS, pass_="uncond"),)))
    dense = usual(kind, None, guidance_scale=1.0)
    assert torch.equal(tiny.generate(pipe, guidance_scale=1.0), dense)
    assert torch.equal(
        tiny.generate(pipe), usual(kind, Plan((Rule(HEADS, pass_="uncond"),)))
    )


def test_dynamic_guidance():
    """At some steps its scale is exactly 1, and both passes still run: here after the step at
    timestep 100, where (20 - 100) / 20 is an even number."""
    options = {"steps": 20, "use_dynamic_cfg": True}
    scales = []

    def callback(pipe, step, timestep, tensors):
        scales.append(pipe.guidance_scale)
        return tensors

    pipe = tiny.cogvideox()
    apply_plan(pipe, Plan((Rule(HEADS, pass_="cond"), Rule(HEADS, pass_="uncond"))))
    found = tiny.generate(pipe, callback_on_step_end=callback, **options)
    assert 1.0 in scales[:-1]
    assert torch.equal(found, usual("cogvideox", PLAN, **options))
    apply_plan(pipe, Plan((Rule(HEADS, pass_="uncond"),)))
    tiny.generate(pipe, **options)
    assert [sparse for _, sparse in calls(pipe)] == [20] * tiny.LAYERS


@pytest.mark.parametrize("prompts", [1, 2])
def test_cache_that_takes_a_part_of_the_batch(prompts):
    """FasterCache leaves out the uncond pass at some steps: what is left could be either."""
    pipe = tiny.cogvideox()
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=100,
            spatial_attention_timestep_skip_range=(-1, 0),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 1000),
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BFCHW",
        )
    )
    options = {"prompt": ["a red square"] * prompts, "negative_prompt": ["blue"] * prompts}
    apply_plan(pipe, PASSED)
    with pytest.raises(ValueError, match="the pass of this call of transformer is not known"):
        tiny.generate(pipe, **options)
    apply_plan(pipe, PLAN)
    assert tiny.generate(pipe, **options).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_several_prompts(kind):
    """The passes are halves of the batch, in whatever number the prompts are."""
    options = {
        "prompt": ["a red square", "blue circle moves left", "a circle"],
        "negative_prompt": ["a", "blue", "circle"],
    }
    noise = torch.randn(3, *((4, 3) if kind == "wan21" else (3, 4)), 12, 8)
    plan = Plan((Rule(HEADS, pass_="cond"), Rule(Diagonal(1), pass_="uncond")))
    all_three = with_plan(kind, plan, latents=noise, **options)
    for n in range(3):
        one = {key: value[n] for key, value in options.items()}
        alone = with_plan(kind, plan, latents=noise[n : n + 1], **one)
        torch.testing.assert_close(all_three[n : n + 1], alone)


# ---- attention backends and processors


class Counting:
    """Counts the calls of an attention backend of diffusers."""

    def __init__(self, monkeypatch, name):
        self.calls = 0
        own = _AttentionBackendRegistry._backends[name]

        def counted(*args, **kwargs):
            self.calls += 1
            return own(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)


MATH = AttentionBackendName._NATIVE_MATH
UNCOND_DENSE = Plan((Rule(HEADS[:1] * 4, pass_="cond"),))  # 3 steps: as many dense calls as sparse


@pytest.mark.parametrize("way", ["before", "after", "context", "reset"])
def test_dense_calls_run_the_backend_of_the_user(way, monkeypatch):
    pipe = tiny.wan21()
    cross, own = 2 * 3 * tiny.LAYERS, 3 * tiny.LAYERS
    if way == "before":
        pipe.transformer.set_attention_backend("_native_math")
    tiny.generate(pipe)
    before = traces(pipe)
    apply_plan(pipe, UNCOND_DENSE)
    if way in ("after", "reset"):
        pipe.transformer.set_attention_backend("_native_math")
    if way == "reset":
        pipe.transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    active = _AttentionBackendRegistry._active_backend
    math, native = Counting(monkeypatch, MATH), Counting(monkeypatch, AttentionBackendName.NATIVE)
    if way == "context":
        with attention_backend("_native_math"):
            tiny.generate(pipe)
            assert _AttentionBackendRegistry._active_backend is MATH
    else:
        tiny.generate(pipe)
    assert calls(pipe) == [(3, 3)] * tiny.LAYERS
    counts = (math.calls, native.calls)
    assert counts == ((0, cross + own) if way == "reset" else (cross + own, 0))
    assert _AttentionBackendRegistry._active_backend is active
    remove_plan(pipe)
    assert _AttentionBackendRegistry._active_backend is active
    left = {id(m.processor): m.processor._attention_backend for m in attention(pipe.transformer)}
    asked = MATH if way in ("before", "after") else None
    assert list(left.values()) == [asked] * tiny.LAYERS
    if way in ("before", "context"):
        assert traces(pipe) == before
    if way == "before":
        pipe.transformer.reset_attention_backend()
        assert all(m.processor._attention_backend is None for m in attention(pipe.transformer))


def test_backend_is_nothing_to_choose_by_name():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    with pytest.raises(ValueError, match="not registered"), attention_backend("visattn"):
        pass
    with pytest.raises(ValueError, match="must be one of"):
        pipe.transformer.set_attention_backend("visattn")


def test_backend_set_between_the_passes_of_a_step():
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)

    def callback(pipe, step, timestep, tensors):
        pipe.transformer.set_attention_backend("native")
        return tensors

    found = tiny.generate(pipe, callback_on_step_end=callback)
    assert torch.equal(found, usual("wan21", PLAN))
    assert calls(pipe) == [(0, 6)] * tiny.LAYERS


def fresh(kind):
    return WanAttnProcessor() if kind == "wan21" else CogVideoXAttnProcessor2_0()


@pytest.mark.parametrize("shared", [False, True], ids=["fresh", "one for all"])
@pytest.mark.parametrize("when", ["before", "after", "while it runs"])
@pytest.mark.parametrize("kind", KINDS)
def test_processors_are_replaced(kind, when, shared):
    pipe = tiny.PIPELINES[kind]()
    dense = tiny.generate(pipe)
    model = pipe.transformer

    def replace(*_):
        one = fresh(kind)
        new = {name: one if shared else fresh(kind) for name in model.attn_processors}
        model.set_attn_processor(one if shared else new)
        return {}

    options = {}
    old = dict(model.attn_processors)
    old_state = {name: dict(vars(processor)) for name, processor in old.items()}
    if when == "before":
        replace()
    clean = {name: dict(vars(processor)) for name, processor in model.attn_processors.items()}
    apply_plan(pipe, PLAN)
    if when == "after":
        replace()
    if when == "while it runs":
        options["callback_on_step_end"] = replace
    assert torch.equal(tiny.generate(pipe, **options), usual(kind, PLAN))
    assert calls(pipe) == [(0, 6 if kind == "wan21" else 3)] * tiny.LAYERS
    remove_plan(pipe)
    left = {name: dict(vars(processor)) for name, processor in model.attn_processors.items()}
    assert left == clean
    assert torch.equal(tiny.generate(pipe), dense)
    # and what was replaced is as it was
    assert {name: dict(vars(processor)) for name, processor in old.items()} == old_state
    model.set_attn_processor(dict(old))
    assert torch.equal(tiny.generate(pipe), dense)


def test_processor_of_layers_and_cross_attention_keeps_its_backend(monkeypatch):
    """One processor for all modules, with a backend that is not the active one."""
    pipe = tiny.wan21()
    processor = WanAttnProcessor()
    processor._attention_backend = MATH
    pipe.transformer.set_attn_processor(processor)
    apply_plan(pipe, UNCOND_DENSE)
    math, native = Counting(monkeypatch, MATH), Counting(monkeypatch, AttentionBackendName.NATIVE)
    tiny.generate(pipe)
    assert (math.calls, native.calls) == (2 * 3 * tiny.LAYERS + 3 * tiny.LAYERS, 0)
    assert calls(pipe) == [(3, 3)] * tiny.LAYERS
    remove_plan(pipe)
    assert vars(processor) == {"_attention_backend": MATH}


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections_of_cogvideox_replace_processors(when):
    pipe = tiny.cogvideox()
    plain = tiny.generate(pipe)
    if when == "before":
        pipe.transformer.fuse_qkv_projections()
    apply_plan(pipe, PLAN)
    if when == "after":
        pipe.transformer.fuse_qkv_projections()
    processors = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert processors == {"FusedCogVideoXAttnProcessor2_0"}
    torch.testing.assert_close(tiny.generate(pipe), usual("cogvideox", PLAN))
    assert calls(pipe) == [(0, 3)] * tiny.LAYERS
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.generate(pipe), usual("cogvideox", PLAN))
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), plain)


class OwnWay:
    """A processor that computes attention itself."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def test_processor_that_cannot_be_reached_is_said(caplog):
    pipe = tiny.wan21()
    apply_plan(pipe, PLAN)
    first = pipe.transformer.blocks[0].attn1
    before = first.processor
    first.processor = OwnWay()
    tiny.generate(pipe)
    assert "OwnWay" in caplog.text
    assert [row.reason is None for row in summary(pipe).layers] == [False, True, True]
    first.processor = before
    assert torch.equal(tiny.generate(pipe), usual("wan21", PLAN))
    remove_plan(pipe)


# ---- interrupted


def raising(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("where", ["attention", "after attention", "callback"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_generation(kind, where):
    """With ``apply_plan`` the next one is right; after ``with sparse`` nothing is left."""
    pipe, error = tiny.PIPELINES[kind](), Stop if where == "attention" else KeyboardInterrupt
    dense = tiny.generate(pipe)
    clean = traces(pipe)

    def interrupted():
        options, module = {}, attention(pipe.transformer)[1]
        if where == "callback":
            options["callback_on_step_end"] = raising(error)
        part = module.to_k if where == "attention" else module.to_out[0]
        handle = None if where == "callback" else part.register_forward_pre_hook(raising(error))
        with pytest.raises(error):
            tiny.generate(pipe, **options)
        if handle is not None:
            handle.remove()

    apply_plan(pipe, VARIED)
    interrupted()
    assert torch.equal(tiny.generate(pipe), usual(kind, VARIED))
    interrupted()
    remove_plan(pipe)
    assert traces(pipe) == clean
    assert torch.equal(tiny.generate(pipe), dense)
    with sparse(pipe, VARIED):
        interrupted()
    assert traces(pipe) == clean
    assert torch.equal(tiny.generate(pipe), dense)
    apply_plan(pipe, OTHER)
    with sparse(pipe, VARIED):
        interrupted()
    assert torch.equal(tiny.generate(pipe), usual(kind, OTHER))


def test_interrupted_layer_does_not_answer_for_another_module():
    """One processor for all modules, and an exception between the layer and its attention."""
    pipe = tiny.wan21()
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    apply_plan(pipe, PLAN)
    expected = tiny.generate(pipe)
    handle = pipe.transformer.blocks[2].attn1.to_k.register_forward_pre_hook(raising(Stop))
    with pytest.raises(Stop):
        tiny.generate(pipe)
    handle.remove()
    before = calls(pipe)
    cross = pipe.transformer.blocks[0].attn2
    torch.manual_seed(0)
    cross(torch.randn(1, 72, 64), torch.randn(1, 10, 64))
    assert calls(pipe) == before
    assert torch.equal(tiny.generate(pipe), expected)


# ---- thrown away


@pytest.mark.parametrize("ending", ["planned", "interrupted", "removed"])
@pytest.mark.parametrize("kind", KINDS)
def test_thrown_away_pipeline_is_freed(kind, ending):
    before = set(_LAYERS)
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, VARIED)
    tiny.generate(pipe)
    own = set(_LAYERS) - before
    assert len(own) == tiny.LAYERS
    if ending == "interrupted":
        handle = attention(pipe.transformer)[1].to_k.register_forward_pre_hook(raising(Stop))
        with pytest.raises(Stop):
            tiny.generate(pipe)
        handle.remove()
    if ending == "removed":
        remove_plan(pipe)
    model, whole = weakref.ref(pipe.transformer), weakref.ref(pipe)
    del pipe
    if ending == "interrupted":
        del handle
    gc.collect()
    assert whole() is None and model() is None
    assert not own & set(_LAYERS)


def test_plan_does_not_keep_the_pipeline_alive():
    """Only the denoiser is kept, and what needs the rest is refused."""
    pipe = tiny.cogvideox()
    apply_plan(pipe, STEPPED)
    whole, model = weakref.ref(pipe), pipe.transformer
    del pipe
    gc.collect()
    assert whole() is None
    other = tiny.cogvideox()
    other.transformer = model
    with pytest.raises(ValueError, match="the step of this call of transformer is not known"):
        tiny.generate(other)


# ---- training


def example(kind):
    torch.manual_seed(1)
    if kind == "wan21":
        return {
            "hidden_states": torch.randn(2, 4, 3, 12, 8),
            "timestep": torch.tensor([500, 100]),
            "encoder_hidden_states": torch.randn(2, 10, 16),
        }
    pipe = tiny.PIPELINES[kind]()
    return {
        "hidden_states": torch.randn(2, 3, 4, 12, 8),
        "timestep": torch.tensor([500, 100]),
        "encoder_hidden_states": torch.randn(2, 10, 16),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(
            96, 64, 3, torch.device("cpu")
        ),
    }


def gradients(kind, plan, backend="auto", checkpointing=False):
    model = tiny.PIPELINES[kind]().transformer.double().train()
    batch = {k: v.double() if k.endswith("states") else v for k, v in example(kind).items()}
    if checkpointing:
        model.enable_gradient_checkpointing()
    if plan is not None:
        apply_plan(model, plan, backend=backend)
    out = model(**batch, return_dict=False)[0]
    (out**2).mean().backward()
    if plan is not None:
        rows = summary(model).layers
        assert all(row.sparse_calls == 1 + checkpointing and row.reason is None for row in rows)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_step(kind, checkpointing):
    found = gradients(kind, PLAN, checkpointing=checkpointing)
    expected = gradients(kind, PLAN, backend="reference")
    assert {k for k, v in found.items() if v is None} == {
        k for k, v in expected.items() if v is None
    }
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    dense = gradients(kind, None)
    name = next(n for n in dense if n.endswith("0.attn1.to_q.weight"))
    assert not torch.allclose(dense[name], found[name])


def test_lora_is_trained_with_a_plan():
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q", "to_v"])
    model = tiny.wan21().transformer.train()
    apply_plan(model, PLAN)
    model.add_adapter(lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        loss = (model(**example("wan21"), return_dict=False)[0] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(row.sparse_calls == 3 for row in summary(model).layers)
