"""``visattn bench pipeline``: the models it builds, what it checks, measures and refuses."""

from __future__ import annotations

import json
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny
from support.cli import ROOT, good, refused, run

from visattn import Grid, TokenLayout
from visattn.bench import SHAPES, WrongResult
from visattn.bench import measure_pipeline as pipeline
from visattn.bench.architectures import ARCHITECTURES, Architecture, build, skeleton, step_inputs
from visattn.bench.denoising_step import AttentionClock, Denoising, watch
from visattn.bench.measure_pipeline import StepTime, time_step
from visattn.cli import bench_pipeline
from visattn.generation import default_model, shape_of
from visattn.inject.layers import layer, mixed_heads
from visattn.patterns import Dense, Neighborhood
from visattn.pipelines.families import FAMILIES
from visattn.plan import Plan, Rule
from visattn.selectors import Agent, TopBlocks

# Parameters, and tokens at the size that they are used at. The hub holds 5.68 GB of float32 weights
# of Wan 1.3B; the others are next to their names' 14B, 2B and 5B, to the three digits that were
# known when this was written.
PUBLISHED = {
    "wan2.1-1.3b": (1.42e9, SHAPES["wan-1.3b-480p"].layout),
    "wan2.1-14b": (14.3e9, SHAPES["wan-14b-720p"].layout),
    "cogvideox-2b": (1.69e9, TokenLayout(Grid(13, 30, 45), text_before=226)),
    "cogvideox-5b": (5.57e9, TokenLayout(Grid(13, 30, 45), text_before=226)),
    "cogvideox1.5-5b": (5.57e9, SHAPES["cogvideox1.5"].layout),
    "hunyuanvideo": (12.8e9, SHAPES["hunyuan-720p"].layout),
}
PART = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
WAN = Architecture(
    "WanTransformer3DModel",
    64,
    96,
    9,
    5,
    PART | {"ffn_dim": 32, "text_dim": 16, "freq_dim": 16, "in_channels": 4, "out_channels": 4},
    steps=10,
)
COGVIDEOX = Architecture(
    "CogVideoXTransformer3DModel",
    64,
    96,
    9,
    5,
    PART | {"text_embed_dim": 16, "time_embed_dim": 16, "use_rotary_positional_embeddings": True},
    steps=10,
)
HUNYUANVIDEO = Architecture(
    "HunyuanVideoTransformer3DModel",
    64,
    96,
    9,
    5,
    PART
    | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    | {"rope_axes_dim": (4, 6, 6), "pooled_projection_dim": 8},
    steps=10,
)
LAYOUTS = {
    "wan": TokenLayout(Grid(3, 4, 6)),
    "cogvideox": TokenLayout(Grid(3, 4, 6), text_before=5),
    "hunyuanvideo": TokenLayout(Grid(3, 4, 6), text_after=5),
}
SMALL = {"wan": WAN, "cogvideox": COGVIDEOX, "hunyuanvideo": HUNYUANVIDEO}
LOCAL = Neighborhood((3, 3, 3))
PART_OF_HUNYUANVIDEO = ("--model", "hunyuanvideo", "--layers", "1", "--num-frames", "9")
PART_OF_HUNYUANVIDEO += ("--height", "64", "--width", "64")
PRESET = str(ROOT / "assets" / "plans" / "presets" / "hunyuanvideo-radial")


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_sizes(name: str) -> None:
    """All parameters; and one layer, on ``meta``, takes a step of the size that the model is used
    at, with the tokens that its family says."""
    architecture = ARCHITECTURES[name]
    parameters, layout = PUBLISHED[name]
    whole = skeleton(architecture)
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(parameters, rel=0.005)
    assert all(p.is_meta for p in whole.parameters())
    model = skeleton(architecture, layers=1).to("meta")
    calls = step_inputs(architecture, model, torch.zeros((), device="meta"))
    for _, arguments in calls:
        assert (
            TokenLayout.from_tokens(FAMILIES[architecture.model].tokens(model.config, arguments))
            == layout
        )
        with torch.no_grad():
            out = model(**arguments, return_dict=False)[0]
        assert out.shape == arguments["hidden_states"].shape
    passes = 1 if name == "hunyuanvideo" else 2  # the guidance is an embedded input
    assert sum(len(arguments["hidden_states"]) for _, arguments in calls) == passes


def test_every_architecture_is_in_the_table_above() -> None:
    assert set(ARCHITECTURES) == {*PUBLISHED, "tiny-wan"}
    own, shape = ARCHITECTURES["tiny-wan"], shape_of(default_model())
    assert (own.height, own.width, own.num_frames) == (
        shape["height"],
        shape["width"],
        shape["num_frames"],
    )
    assert own.steps == shape["num_inference_steps"]


def test_weights_are_drawn_from_the_seed() -> None:
    model = build(WAN, dtype=torch.bfloat16)
    again, other = build(WAN, dtype=torch.bfloat16), build(WAN, dtype=torch.bfloat16, seed=1)
    block = model.blocks[0]
    weight = block.ffn.net[2].weight
    assert torch.equal(weight, again.blocks[0].ffn.net[2].weight)
    assert not torch.equal(weight, other.blocks[0].ffn.net[2].weight)
    assert float(weight.float().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((block.attn1.norm_q.weight == 1).all()) and bool((block.attn1.to_q.bias == 0).all())
    assert weight.dtype == torch.bfloat16
    assert block.scale_shift_table.dtype == torch.float32  # diffusers keeps it
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_a_step_is_checked_and_timed(kind: str) -> None:
    model = build(SMALL[kind])
    alone = SimpleNamespace(transformer=model)
    before = tiny.footprint(alone)
    found = time_step(SMALL[kind], model, LOCAL, repeats=3)
    assert tiny.footprint(alone) == before
    layout = LAYOUTS[kind]
    assert found.tokens == str(layout) and found.layers == 2
    assert (found.calls, found.step, found.steps) == ({"wan": 2}.get(kind, 1), 5, 10)
    assert found.density == pytest.approx(LOCAL.density(layout))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    for own in (found.dense, found.planned, found.dense_attention, found.planned_attention):
        assert len(own.samples) == 3 and min(own.samples) > 0
    assert max(found.share.samples) < 1
    assert all(
        a < b for a, b in zip(found.planned_attention.samples, found.planned.samples, strict=True)
    )
    ratios = [a / b for a, b in zip(found.dense.samples, found.planned.samples, strict=True)]
    assert found.speedup.samples == pytest.approx(ratios)
    kept = 1 - found.share.median * (1 - found.density)
    assert found.predicted == pytest.approx(1 / kept)
    assert found.dense_peak is None and found.planned_peak is None and found.notes == ()
    json.dumps(found.numbers())


def density(kind: str, plan: Plan) -> float | None:
    return time_step(SMALL[kind], build(SMALL[kind]), plan, repeats=1).density


@pytest.mark.parametrize("kind", SMALL)
def test_density_is_that_of_the_step(kind: str) -> None:
    """The mean over heads, layers and passes; the middle of ten steps is 5."""
    own = LOCAL.density(LAYOUTS[kind])
    assert density(kind, Plan((Rule((LOCAL, Dense())),))) == pytest.approx((own + 1) / 2)
    assert density(kind, Plan((Rule(LOCAL),), dense_layers=(0,))) == pytest.approx((own + 1) / 2)
    of_cond = own if kind == "hunyuanvideo" else (own + 1) / 2  # which has no other pass
    assert density(kind, Plan((Rule(LOCAL, pass_="cond"),))) == pytest.approx(of_cond)
    assert density(kind, Plan((Rule(LOCAL, phase=1),), phases=(0.5,))) == pytest.approx(own)
    assert density(kind, Plan((Rule(LOCAL, phase=0),), phases=(0.5,))) == 1
    assert density(kind, Plan((Rule(LOCAL),), dense_steps=(6, 0))) == 1


def test_density_of_dynamic_patterns() -> None:
    found = density("wan", Plan((Rule(TopBlocks(0.25, block=9)),)))
    assert found is not None and 0.2 < found < 0.3
    unknown = time_step(WAN, build(WAN), Agent((1, 2, 2)), repeats=1)
    assert unknown.density is None and unknown.predicted is None


def test_the_clock_counts_every_attention_call_once() -> None:
    denoising = Denoising(WAN, build(WAN))
    for plan in (None, Plan((Rule(LOCAL),), dense_layers=(0,))):
        clock = AttentionClock(denoising.device)
        clock._now = iter(range(100)).__next__  # type: ignore[method-assign]
        with torch.no_grad():
            clock.run(denoising, watch(denoising, plan, clock.around))
        assert clock.sums == [4]  # two layers, two passes, and nothing between begin and end


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it is timed")

    monkeypatch.setattr(pipeline, "take_turns", never)
    right = mixed_heads.attention_by
    with monkeypatch.context() as patch:
        patch.setattr(mixed_heads, "attention_by", lambda *given: (2 * right(*given)[0], None))
        with pytest.raises(WrongResult, match=r"Neighborhood.* differs from exact attention by"):
            time_step(WAN, build(WAN), LOCAL)
    plain = layer.Layer._plain

    def wrong(*given: Any) -> Any:
        own = plain(*given)
        return lambda q, k, v: own(q, k, v) * 1.001

    monkeypatch.setattr(layer.Layer, "_plain", wrong)
    with pytest.raises(WrongResult, match=r"without a plan differs by .* when its attention calls"):
        time_step(WAN, build(WAN), LOCAL)


OWN = (
    "bench",
    "pipeline",
    "--height",
    "64",
    "--width",
    "64",
    "--num-frames",
    "5",
    "--device",
    "cpu",
    "--repeats",
    "1",
)


def test_json_of_the_small_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What StepTime and GenerationTime document, of generations of three steps."""
    short = shape_of(default_model()) | {"num_inference_steps": 3}
    monkeypatch.setattr(bench_pipeline, "shape_of", lambda _: short)
    own = (*OWN, "--plan", "diagonal(9)", "--generate")
    numbers = json.loads(good(capsys, *own, "--json"))
    assert numbers["dtype"] == "float32" and numbers["repeats"] == 1
    assert numbers["diffusers"] == version("diffusers")
    model = numbers["models"]["tiny-wan"]
    assert (model["height"], model["width"], model["num_frames"], model["trained"]) == (
        64,
        64,
        5,
        True,
    )
    found = model["plans"]["diagonal(9)"]
    assert set(found["step"]) == set(StepTime.__dataclass_fields__)
    assert (
        found["step"]["tokens"] == "2x8x8" and model["all_layers"] == found["step"]["layers"] == 12
    )
    assert set(found["step"]["dense"]) == {"median", "low", "high", "samples"}
    assert found["step"]["backend"] == "blockwise"
    assert set(found["generation"]) == {"dense", "planned", "speedup"}
    assert found["generation"]["dense"]["median"] > found["step"]["dense"]["median"]


def test_fewer_layers_are_said_and_what_fails_does_not_end_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Architecture(WAN.model, 64, 64, 5, 5, WAN.config)
    monkeypatch.setitem(ARCHITECTURES, "wan2.1-1.3b", whole)
    plans = ("--plan", "diagonal(9)", "neighborhood((9, 3, 3))", "top_blocks(0.5)")
    code, text, error = run(capsys, *OWN, "--model", "wan2.1-1.3b", "--layers", "1", *plans)
    assert code == 1 and "wan2.1-1.3b, random weights, 1 of 2 layers" in text
    lines = text.splitlines()
    assert [line.split("  ")[-1] for line in lines[-2:]] == ["diagonal(9)", "top_blocks(0.5)"]
    assert error.count("\n") == 1 and "neighborhood((9, 3, 3)): plan does not fit the grid" in error


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "flux"), "invalid choice: 'flux'"),
        (("--model", "wan2.1-14b"), "--model wan2.1-14b has 57.2 GB of weights"),
        (
            ("--model", "wan2.1-1.3b", "--layers", "1"),
            "are allowed on a CPU; use --layers, a smaller",
        ),
        (("--model", "wan2.1-1.3b", "--layers", "31"), "layers=31 must be at most 30"),
        (("--layers", "2"), "--model tiny-wan: --layers is for random weights"),
        (("--layers", "0"), "--layers 0 must be at least 1"),
        (("--height", "100"), "--model tiny-wan: height=100 must be a multiple of 8"),
        (("--model", "cogvideox-5b", "--width", "72"), "width=72 must be a multiple of 16"),
        (("--num-frames", "10"), "num_frames=10 must be 1 more than a multiple of 4"),
        (("--model", "cogvideox-2b", "--generate"), "--generate needs a whole pipeline"),
        (("--plan", "none"), "--plan none is dense"),
        (
            (*PART_OF_HUNYUANVIDEO, "--plan", PRESET),
            "hunyuanvideo-radial is for 60 layers; leave --layers out",
        ),
        (("--plan", "nothing(3)"), "unknown pattern 'nothing'"),
        (("--repeats", "0"), "--repeats 0 must be at least 1"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", "pipeline", "--device", "cpu", *arguments)[-1]
