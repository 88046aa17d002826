"""A plan through the life of a pipeline: cast, reconfigured, interrupted and thrown away."""

import gc
import weakref

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from support import tiny
from support.planned import (
    HEADS,
    KINDS,
    OTHER,
    PLAN,
    STEPPED,
    VARIED,
    Stop,
    attention,
    calls,
    traces,
    usual,
)

from visattn.inject import apply_plan, remove_plan, sparse, summary
from visattn.inject.attachment import attached
from visattn.inject.hooks import recent
from visattn.inject.layers.compiled_layer import _LAYERS
from visattn.patterns import Diagonal, Neighborhood
from visattn.plan import Plan, Rule

# ---- no trace


@pytest.mark.sampled(3)
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


def test_sizes_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(recent, "MOST", 3)
    model = tiny.wan_transformer(0, layers=1)
    apply_plan(model, OTHER)

    def run(width):
        shape = (1, 4, 2, 4, 2 * width)
        text, step = torch.zeros(1, 3, 16), torch.tensor([500])
        with torch.no_grad():
            return model(torch.ones(shape), step, text, return_dict=False)[0]

    first = run(1)
    for width in range(2, 9):
        run(width)
    own = attached(model)
    assert len(own._layouts) == len(own.layers[0]._split) == 3
    assert torch.equal(run(1), first)
    assert own.layers[0].sparse_calls == 9


# ---- another dtype, device, scheduler, size or plan


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


def test_numbers_of_layers_lie_on_the_cpu():
    """Whatever the default device is, or compiled layers would wait for it."""
    pipe = tiny.wan21()
    with torch.device("meta"):
        apply_plan(pipe, PLAN)
    numbers = [module._visattn_layer.number for module in attention(pipe.transformer)]
    assert {number.device.type for number in numbers} == {"cpu"}
    assert torch.equal(tiny.generate(pipe), usual("wan21", PLAN))


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


@pytest.mark.sampled(3)
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
