"""Dynamic patterns in the small model, whose passes, prompts and sizes want different blocks."""

import pytest
import torch
from support.cli import ROOT

from visattn.inject import apply_plan, observe, remove_plan
from visattn.inject.attachment import attached
from visattn.selectors import Reuse, TopBlocks

MODEL = ROOT / "assets" / "models" / "tiny-wan"
TOP = TopBlocks(0.2, score="representative", rest="pooled", block=16)
KEPT = Reuse(TOP, every=9)
OTHERS = (
    {},
    {"prompt": "a green four moves up over the sand"},
    {"side": 96},
    {"num_frames": 5},
    {"steps": 2},
    {"guidance_scale": 1.0},
    {},
)


def load():
    from diffusers import WanPipeline

    own = WanPipeline.from_pretrained(MODEL)
    own.set_progress_bar_config(disable=True)
    return own


def latents(pipe, prompt="a red square moves right over the fog", side=64, steps=3, **options):
    call = {"num_frames": 9, "guidance_scale": 4.0, "num_inference_steps": steps, **options}
    generator = torch.Generator().manual_seed(0)
    out = pipe(prompt, height=side, width=side, generator=generator, output_type="latent", **call)
    return out.frames


def memories(pipe):
    return [
        memory for layer in attached(pipe.transformer).layers for memory in layer.memories.values()
    ]


@pytest.fixture(scope="module")
def expected():
    """What a new pipeline with the plan makes of each."""
    out = []
    for options in OTHERS[:-1]:
        pipe = load()
        apply_plan(pipe, KEPT)
        out.append(latents(pipe, **options))
    return [*out, out[0]]


def test_no_choice_outlives_its_generation(expected):
    pipe = load()
    apply_plan(pipe, KEPT)
    for options, known in zip(OTHERS, expected, strict=True):
        assert torch.equal(latents(pipe, **options), known), options
    remove_plan(pipe)
    assert torch.equal(latents(pipe), latents(load()))


def test_passes_choose_for_themselves(expected):
    """Once each and kept; what one chooses is not what the other does."""
    pipe = load()
    apply_plan(pipe, KEPT)
    assert torch.equal(latents(pipe), expected[0])
    layers = len(pipe.transformer.blocks)
    assert len(memories(pipe)) == 2 * layers
    assert all((own.made, own.reused) == (1, 2) for own in memories(pipe))
    calls = []
    with observe(pipe, calls.append):
        assert torch.equal(latents(pipe), expected[0])
    first = {}
    for call in calls:
        if call.step == 0:
            own = TOP.select(call.q, call.k, call.v, call.layout, call.q.shape[3] ** -0.5)
            first.setdefault(call.layer, []).append(own.levels)
    assert len(first) == layers
    differ = [(a != b).float().mean().item() for a, b in first.values()]
    assert max(differ) > 0.02
    apply_plan(pipe, TOP)  # anew at every step: other blocks
    assert not torch.equal(latents(pipe), expected[0])


@pytest.mark.second
def test_compiled_chooses_as_eager(expected):
    torch._dynamo.reset()
    pipe = load()
    apply_plan(pipe, KEPT)
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    for options, known in zip(OTHERS[:3], expected[:3], strict=True):
        found = latents(pipe, **options)
        assert (found - known).abs().max() < 1e-3 * known.abs().max(), options
    torch._dynamo.reset()
