"""What cannot be done is refused in one sentence before anything is touched, and what has to stay
dense says so once."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from support import tiny, variants

from visattn import Grid, TokenLayout
from visattn.attention.choice import BackendUnavailable
from visattn.guidance import SEG, guide
from visattn.inject import apply_plan, denoisers, observe, remove_plan, sparse, summary
from visattn.inject.models.denoisers import known_denoisers
from visattn.patterns import Dense, Diagonal, Neighborhood, Radial
from visattn.pipelines.families import FAMILIES
from visattn.plan import Denoiser, Plan, Rule

HEADS = (Diagonal(2),) * tiny.HEADS


@pytest.fixture(scope="module")
def pipe():
    return tiny.wan21()


@pytest.fixture(autouse=True)
def untouched(pipe):
    yield
    assert type(pipe.transformer.blocks[0].attn1).__mro__[1] is torch.nn.Module
    assert summary(pipe).layers == ()


OTHER = "plan is for another model"
BAD_PLANS = {
    "head count": (Plan((Rule(HEADS[:3]),)), f"{OTHER}: it gives 3 heads"),
    "layer": (Plan((Rule(Dense(), layer="layers.1.attn"),)), f"{OTHER}: it names the layer"),
    "layer beyond": (Plan((Rule(Dense(), layer="blocks.3.attn1"),)), "blocks.0.attn1 to blocks.2"),
    "role": (Plan((Rule(Dense(), role="transformer_2"),)), f"{OTHER}: it has a rule for"),
    "class": (Plan(denoisers={"transformer": Denoiser("Other", 3, 4)}), f"{OTHER}: its trans"),
    "layers": (Plan(denoisers={"transformer": Denoiser("WanTransformer3DModel", 30, 4)}), OTHER),
    "denoiser": (Plan(denoisers={"unet": Denoiser("UNet", 3, 4)}), f"{OTHER}: it is made for unet"),
    "dense layer": (Plan(dense_layers=(3,)), "dense_layers holds 3"),
    "no plan": (3, "must be a Plan"),
    "none": (None, "remove_plan"),
    "pattern": ("radiall(1)", "radiall"),
    "file": ("missing.json", "no file"),
    "auto": ("auto", "plan='auto'"),
}


@pytest.mark.parametrize(("plan", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_plan_that_does_not_fit_is_refused(pipe, plan, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message) as caught:
        apply_plan(pipe, plan)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, TypeError, OSError)), sparse(pipe, plan):
        raise AssertionError("not reached")


def test_backend_that_cannot_run_is_refused(pipe, monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' must be one of"):
        apply_plan(pipe, Radial(), backend="cuda")
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendUnavailable, match="needs a CUDA or ROCm GPU"):
            apply_plan(pipe, Radial(), backend="triton")


def test_model_of_no_known_family_is_refused():
    unet = UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(ValueError, match=r"UNet2DModel; plans can be applied to .*WanTransformer"):
        apply_plan(unet, Radial())
    with pytest.raises(ValueError, match=r"call visattn\.sparse_attention where it computes"):
        apply_plan(unet, Radial())
    with pytest.raises(ValueError, match="has no denoiser under transformer, transformer_2 or"):
        apply_plan(DDPMScheduler(), Radial())


@pytest.mark.parametrize("act", [
    lambda pipe: apply_plan(pipe, Diagonal(2)),
    lambda pipe: observe(pipe, lambda _: None).__enter__(),
    lambda pipe: guide(pipe, SEG(layers=[0])).__enter__(),
    denoisers,
])
def test_model_of_a_family_that_has_none_of_its_layers_is_refused(act, monkeypatch):
    other = replace(known_denoisers(tiny.wan21())["transformer"][1], layers=r"layers\.\d+\.attn")
    monkeypatch.setitem(FAMILIES, "WanTransformer3DModel", other)
    match = r"WanTransformer3DModel has no attention layer with a path like .*which models of Wan"
    with pytest.raises(ValueError, match=match):
        act(tiny.wan21())


def test_plan_of_another_size_says_for_which_it_was_made(pipe):
    made_for = TokenLayout(Grid(9, 16, 16))
    plan = Plan((Rule(Neighborhood((9, 3, 3))),), geometry=made_for)
    match = r"does not fit the grid 3x6x4 .*; it was made at 9x16x16: .* with visattn search$"
    with sparse(pipe, plan, guard=False), pytest.raises(ValueError, match=match):
        tiny.generate(pipe, steps=1)


# ---- plans under which nothing is sparse


@pytest.mark.parametrize(
    ("plan", "steps", "words"),
    [
        (Plan((Rule(Diagonal(2)),), dense_steps=(12, 0)), 4,
         r"nothing sparse runs, as dense_steps=\(12, 0\) of the plan keep all 4 steps dense; use"),
        (Plan((Rule(Diagonal(2), phase=1),), phases=(0.5,), dense_steps=(0, 0.5)), 4,
         "and the phases of the plan keep all 4 steps dense"),
        (Plan((Rule(Diagonal(2)),), dense_layers=(0, 1, 2)), 1, "all heads of all layers dense"),
        (Plan((Rule(Dense()),)), 1, "all heads of all layers dense"),
    ],
)
def test_plan_under_which_nothing_is_sparse_says_so_once(pipe, plan, steps, words, caplog):
    with caplog.at_level("WARNING", "visattn"), sparse(pipe, plan, guard=False):
        tiny.generate(pipe, steps=steps)
        tiny.generate(pipe, steps=steps)
        assert sum(row.sparse_calls for row in summary(pipe).layers) == 0
    (record,) = caplog.records
    assert re.search(words, record.getMessage())


@pytest.mark.parametrize("make", [tiny.wan21, tiny.cogvideox])
def test_plan_of_the_unconditional_pass_alone_without_guidance_says_so_once(make, caplog):
    other = make()
    apply_plan(other, Plan((Rule(Diagonal(2), pass_="uncond"),)), guard=False)
    with caplog.at_level("WARNING", "visattn"):
        tiny.generate(other, steps=1)
        assert caplog.records == []
        apply_plan(other, Plan((Rule(Diagonal(2), pass_="uncond"),)), guard=False)
        tiny.generate(other, steps=2, guidance_scale=1.0)
    (record,) = caplog.records
    assert "guidance is off and the plan keeps all heads of the cond" in record.getMessage()
    remove_plan(other)


@pytest.mark.parametrize("plan", [
    Plan((Rule(Diagonal(2)),), dense_steps=(1, 1)),
    Plan((Rule(Diagonal(2), phase=1),), phases=(0.5,)),
    Plan((Rule(Diagonal(2), layer="blocks.2.attn1"),), dense_steps=(0, 2)),
    Plan(),
])
def test_plan_under_which_something_is_sparse_says_nothing(pipe, plan, caplog):
    with caplog.at_level("WARNING", "visattn"), sparse(pipe, plan, guard=False):
        tiny.generate(pipe, steps=3)
        tiny.generate(pipe, steps=4)
    assert caplog.records == []


def test_dense_steps_count_over_the_whole_schedule(caplog):
    """Image-to-image of strength 0.5 runs steps 2 and 3 of 4."""
    name = "flux img2img"
    pipe = variants.PIPELINES[name]()
    for dense_steps, dense, sparse_ in (((2, 0), 0, 2), ((3, 0), 1, 1), ((4, 0), 2, 0)):
        with caplog.at_level("WARNING", "visattn"):
            plan = Plan((Rule(Diagonal(2)),), dense_steps=dense_steps)
            with sparse(pipe, plan, guard=False):
                variants.generate(name, pipe, False)
                row = summary(pipe).layers[0]
        assert (row.dense_calls, row.sparse_calls) == (dense, sparse_)
    (record,) = caplog.records
    assert "keep steps 2 to 3 of 4 dense" in record.getMessage()


@pytest.mark.parametrize("plan", [Plan((Rule(Dense()), Rule(Neighborhood((1, 3, 9)))))])
def test_plan_that_does_not_fit_the_grid_is_refused_in_the_first_step(pipe, plan):
    apply_plan(pipe, plan)
    steps = []
    with pytest.raises(ValueError, match=r"plan does not fit the grid 3x6x4 .* at blocks.0.attn1"):
        tiny.generate(pipe, callback_on_step_end=lambda *a: steps.append(a) or {})
    assert steps == []
    tiny.generate(pipe, width=144)  # and a grid that it fits is another matter
    remove_plan(pipe)


def test_another_grid_is_announced_once(pipe, caplog):
    plan = Plan((Rule(Neighborhood((1.0, 0.5, 2))),), geometry=TokenLayout(Grid(21, 30, 52)))
    apply_plan(pipe, plan)
    assert "21x30x52" in str(summary(pipe))
    with caplog.at_level(logging.WARNING, "visattn"):
        tiny.generate(pipe)
        tiny.generate(pipe)
    assert [r.getMessage() for r in caplog.records] == [
        "transformer: the plan was made at 21x30x52 and runs at 3x6x4: fractions in its patterns "
        "follow the grid, token counts do not change"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "visattn"):
        tiny.generate(pipe, num_frames=13)
    assert "runs at 4x6x4" in caplog.text
    remove_plan(pipe)


def test_plan_without_a_known_step_is_refused():
    """A denoiser alone, in a loop of the user's own."""
    model = tiny.wan_transformer(0)
    inputs = {
        "hidden_states": torch.zeros(1, 4, 3, 12, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.zeros(1, 10, 16),
    }
    apply_plan(model, Plan((Rule(HEADS),), dense_steps=(1, 0)))
    with pytest.raises(ValueError, match="plan depends on the denoising step"):
        model(**inputs)
    with model.cache_context("cond", step_index=1, num_inference_steps=4):
        model(**inputs)
    assert [row.sparse_calls for row in summary(model).layers] == [1] * tiny.LAYERS
    apply_plan(model, Plan((Rule(HEADS, pass_="cond"),)))
    with pytest.raises(ValueError, match="rules for the passes cond, and"):
        model(**inputs)
    with model.cache_context("uncond"):
        model(**inputs)
    apply_plan(model, Plan((Rule(HEADS),)))
    model(**inputs)


def test_attention_outside_the_model_is_refused():
    model = tiny.wan_transformer(0)
    apply_plan(model, Plan((Rule(HEADS),)))
    with pytest.raises(RuntimeError, match="outside the forward of its model"):
        model.blocks[0].attn1(torch.zeros(1, 72, 64))
    remove_plan(model)
    model.blocks[0].attn1(torch.zeros(1, 72, 64))


def test_what_stays_dense_says_so_once(caplog):
    """A mask reaches the layers, as from a processor of the user's own."""
    pipe = tiny.wan21()
    expected = tiny.generate(pipe)
    own = type(pipe.transformer.blocks[0].attn1.processor)

    class WithMask(own):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, *rest):
            if encoder_hidden_states is None:
                mask = torch.ones(1, 1, 1, hidden_states.shape[1], dtype=torch.bool)
                return super().__call__(attn, hidden_states, None, mask, *rest)
            return super().__call__(attn, hidden_states, encoder_hidden_states, mask, *rest)

    pipe.transformer.set_attn_processor(WithMask())
    masked = tiny.generate(pipe)
    assert torch.allclose(masked, expected, atol=1e-5)
    apply_plan(pipe, Plan((Rule(HEADS),), dense_layers=(0,)))
    with caplog.at_level(logging.WARNING, "visattn"):
        assert torch.equal(tiny.generate(pipe), masked)
    assert [r.getMessage() for r in caplog.records] == [
        f"transformer: blocks.{n}.attn1 stays dense: it is given an attention mask" for n in (1, 2)
    ]
    row = summary(pipe).layers[0]
    assert (row.sparse_calls, row.dense_calls) == (0, 6)
    assert row.reason == "it is given an attention mask"
    assert "it is given an attention mask" in str(summary(pipe))


def test_denoisers_of_a_pipeline():
    pipe = tiny.wan22()
    kind = Denoiser("WanTransformer3DModel", tiny.LAYERS, tiny.HEADS)
    assert denoisers(pipe) == {"transformer": kind, "transformer_2": kind}
    apply_plan(pipe, Plan((Rule(HEADS),), denoisers=denoisers(pipe)))
    with pytest.raises(ValueError, match=OTHER):
        apply_plan(tiny.wan21(), Plan((Rule(HEADS),), denoisers=denoisers(pipe)))


def test_processor_without_attention_that_can_be_caught_says_so(caplog):
    """It computes a softmax by itself."""
    pipe = tiny.wan21()
    own = type(pipe.transformer.blocks[0].attn1.processor)

    class ByHand(own):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, *rest):
            x = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(x), attn.to_v(x)
            return attn.to_out[0]((q @ k.transpose(1, 2)).softmax(-1) @ v)

    pipe.transformer.set_attn_processor(ByHand())
    expected = tiny.generate(pipe)
    apply_plan(pipe, Plan((Rule(HEADS, layer="blocks.1.attn1"),)))
    with caplog.at_level(logging.WARNING, "visattn"):
        assert torch.equal(tiny.generate(pipe), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "transformer: blocks.1.attn1 stays dense: ByHand calls no attention that visattn can "
        "intercept"
    ]


def test_a_class_on_top_of_ours_stays():
    """As some wrappers put it there; the layer is plain again all the same."""
    pipe = tiny.wan21()
    dense = tiny.generate(pipe)
    apply_plan(pipe, Plan((Rule(HEADS),)))
    sparse_latents = tiny.generate(pipe)
    module = pipe.transformer.blocks[1].attn1
    top = type("Top", (type(module),), {})
    module.__class__ = top
    assert torch.equal(tiny.generate(pipe), sparse_latents)
    remove_plan(pipe)
    assert type(module) is top
    assert torch.equal(tiny.generate(pipe), dense)
    apply_plan(pipe, Plan((Rule(HEADS),)))
    assert torch.equal(tiny.generate(pipe), sparse_latents)
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe), dense)


def test_a_derived_denoiser_is_of_the_family():
    pipe = tiny.wan21()
    pipe.transformer.__class__ = type("Derived", (type(pipe.transformer),), {})
    plan = Plan((Rule(HEADS),), denoisers={"transformer": Denoiser("WanTransformer3DModel", 3, 4)})
    apply_plan(pipe, plan)
    assert len(summary(pipe).layers) == tiny.LAYERS
