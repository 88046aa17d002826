"""Plans and guidance: the cond and the uncond pass, in one batch or in two calls."""

import pytest
import torch
from diffusers import FasterCacheConfig
from support import tiny
from support.planned import HEADS, KINDS, PASSED, PLAN, calls, usual, with_plan

from visattn.inject import apply_plan
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule


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
    assert torch.equal(tiny.generate(pipe), usual(kind, Plan((Rule(HEADS, pass_="uncond"),))))


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
