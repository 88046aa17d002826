"""Dynamic patterns in pipelines: chosen per pass, kept between steps where they may be, and never
from another generation."""

import pytest
import tiny
import torch
from planned import KINDS, with_plan

from visattn.execute import BackendUnavailable
from visattn.inject import apply_plan, observe, remove_plan, sparse, summary
from visattn.inject.attachment import attached
from visattn.patterns import Dense, Diagonal
from visattn.plan import Plan, Rule
from visattn.selectors import Jenga, Memory, Pyramid, Rectified, Reuse, TopBlocks

TOP = TopBlocks(0.3, block=8)
HEADS = (TOP, Dense(), Diagonal(3), Pyramid((0.1, 0.3, 0.5, 0.7), block=8))
PLAN = Plan((Rule(HEADS),))
KEPT = Plan((Rule((Reuse(TOP, 100), Dense(), Diagonal(3), Reuse(HEADS[3], 100))),))
OFTEN = Plan((Rule((Reuse(TOP, 1), Dense(), Diagonal(3), Reuse(HEADS[3], 1))),))


def memories(pipe):
    layers = attached(pipe.transformer).layers
    return [memory for layer in layers for memory in layer.memories.values()]


@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_backends_agree_on_a_generation(kind):
    outs = []
    for backend in ("blockwise", "reference"):
        pipe = tiny.PIPELINES[kind]()
        apply_plan(pipe, PLAN, backend=backend)
        outs.append(tiny.generate(pipe))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-4)
    dense = with_plan(kind, None)
    assert (outs[0] - dense).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_kept_between_steps_of_a_pass(kind):
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, KEPT)
    kept = tiny.generate(pipe, steps=4)
    found = memories(pipe)
    # Wan calls once for each pass, CogVideoX once for both
    assert len(found) == tiny.LAYERS * (2 if kind == "wan21" else 1)
    assert all((own.made, own.reused) == (2, 6) for own in found)
    apply_plan(pipe, OFTEN)
    often = tiny.generate(pipe, steps=4)
    assert all((own.made, own.reused) == (8, 0) for own in memories(pipe))
    apply_plan(pipe, PLAN)
    assert torch.equal(often, tiny.generate(pipe, steps=4))
    assert not torch.equal(kept, often)


@pytest.mark.parametrize("kind", KINDS)
def test_no_choice_of_another_generation_is_used(kind):
    """Another prompt, size, number of steps and back: as in a new pipeline each time."""
    pipe = tiny.PIPELINES[kind]()
    apply_plan(pipe, KEPT)
    for options in (
        {},
        {"prompt": "blue circle"},
        {"height": 64},
        {"steps": 2},
        {"guidance_scale": 1.0},
        {},
    ):
        found = tiny.generate(pipe, **options)
        assert torch.equal(found, with_plan(kind, KEPT, **options)), options


def test_passes_are_kept_apart():
    """A plan for one pass chooses for that pass alone; both passes choose differently."""
    pipe = tiny.wan21()
    seen = {}

    def watch(observation):
        seen.setdefault(observation.passes, []).append(observation.q.clone())

    apply_plan(pipe, Plan((Rule(TOP, pass_="cond"),)))
    with observe(pipe, watch):
        tiny.generate(pipe, steps=2)
        rows = summary(pipe).layers
    assert set(seen) == {("cond",), ("uncond",)}
    assert all(row.sparse_calls == 2 and row.dense_calls == 2 for row in rows)
    split = tiny.cogvideox()
    rules = Rule(Reuse(TOP, 100), pass_="cond"), Rule(Diagonal(3), pass_="uncond")
    apply_plan(split, Plan(rules))
    tiny.generate(split, steps=3)
    own = [m for m in memories(split) if m.made]
    assert len(own) == tiny.LAYERS and all((m.made, m.reused) == (1, 2) for m in own)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_pipeline_chooses_too(kind):
    torch._dynamo.reset()
    pipe = tiny.PIPELINES[kind]()
    expected = with_plan(kind, KEPT)
    apply_plan(pipe, KEPT)
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert (tiny.generate(pipe) - expected).abs().max() < 2e-5
    assert all(own.reused for own in memories(pipe))
    remove_plan(pipe)
    assert (tiny.generate(pipe) - with_plan(kind, None)).abs().max() < 2e-5
    torch._dynamo.reset()


def test_kernels_that_there_are_not_are_refused_before_anything_runs():
    pipe = tiny.wan21()
    before = tiny.footprint(pipe)
    with pytest.raises(BackendUnavailable, match="no kernel for the dynamic pattern TopBlocks"):
        apply_plan(pipe, PLAN, backend="triton")
    assert tiny.footprint(pipe) == before


def test_what_is_not_finite_is_said_once(caplog):
    pipe = tiny.wan21()
    layer = pipe.transformer.blocks[1].attn1
    apply_plan(pipe, Plan((Rule(TOP, layer="blocks.1.attn1"),)))
    with torch.no_grad():
        layer.norm_k.weight[0] = torch.nan
    tiny.generate(pipe)
    lines = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(lines) == 1 and "blocks.1.attn1" in lines[0]
    assert "not finite" in summary(pipe).layers[0].reason


def test_summary_says_what_was_executed():
    pipe = tiny.wan21()
    apply_plan(pipe, Plan((Rule(TOP),)))
    assert summary(pipe).layers[0].block_density is None
    tiny.generate(pipe)
    row = summary(pipe).layers[0]
    assert 0.2 < row.block_density < 0.7
    assert "TopBlocks(keep=0.3" in str(summary(pipe))
    assert summary(pipe).ran == ("blockwise",)
    assert summary(pipe).most_speedup > 1


def test_written_plans_hold_dynamic_patterns(tmp_path):
    PLAN.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == PLAN
    pipe = tiny.wan21()
    with sparse(pipe, "jenga(0.4, 0.2, 8)"):
        found = tiny.generate(pipe)
    assert torch.equal(found, with_plan("wan21", Plan((Rule(Jenga(0.4, 0.2, 8)),))))


# ---- the memory by itself


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, 24, 4, generator=generator) for _ in range(3))


def run(pattern, steps, moved=()):
    """At which steps a new choice is made; keys move at the steps ``moved``."""
    from visattn import Grid, TokenLayout

    memory, layout, made = Memory(), TokenLayout(Grid(2, 3, 4)), []
    seed = 0
    for step in range(steps):
        seed += step in moved
        memory.begin(step, steps)
        before = memory.made
        memory.choose(pattern, *tensors(seed), layout, 0.5)
        made += [step] * (memory.made - before)
    return made


def test_when_choices_are_made():
    top = TopBlocks(2, block=4)
    assert run(top, 4) == [0, 1, 2, 3]
    assert run(Reuse(top, 3), 8) == [0, 3, 6]
    assert run(Reuse(top, at=(0.25, 0.5)), 8) == [0, 2, 4]
    assert run(Reuse(top, 100, drift=0.5), 8, moved=(3, 6)) == [0, 3, 6]
    assert run(Reuse(top, 4, drift=0.5), 8, moved=(3,)) == [0, 3, 7]


def test_a_step_that_is_not_known_chooses_anew():
    from visattn import Grid, TokenLayout

    memory, layout = Memory(), TokenLayout(Grid(2, 3, 4))
    for _ in range(3):
        memory.begin(None, None)
        memory.choose(Reuse(TopBlocks(2, block=4), 9), *tensors(0), layout, 0.5)
    assert (memory.made, memory.reused) == (3, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"at": (0.5, 0.2)}, "increasing"),
        ({"at": 0.5}, "at=0.5"),
        ({"drift": 0.0}, "drift=0.0"),
    ],
)
def test_wrong_ways_of_keeping_are_refused(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Reuse(TOP, **options)
    with pytest.raises(TypeError, match="selector="):
        Reuse(Diagonal(3))
    with pytest.raises(ValueError, match="corrects its output by values of the call"):
        Reuse(Rectified())
