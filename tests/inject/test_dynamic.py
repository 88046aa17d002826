"""Dynamic patterns in pipelines: chosen per pass, kept between steps where they may be, and never
from another generation."""

import pytest
import torch
from support import tiny
from support.planned import KINDS, with_plan

from visattn.attention.choice import BackendUnavailable
from visattn.inject import apply_plan, observe, remove_plan, sparse, summary
from visattn.inject.attachment import attached
from visattn.patterns import Dense, Diagonal
from visattn.plan import Plan, Rule
from visattn.selectors import Agent, Jenga, Pyramid, Reuse, SkipList, TopBlocks

TOP = TopBlocks(0.3, block=8)
HEADS = (TOP, Dense(), Diagonal(3), Pyramid((0.1, 0.3, 0.5, 0.7), block=8))
PLAN = Plan((Rule(HEADS),))
KEPT = Plan((Rule((Reuse(TOP, 100), Dense(), Diagonal(3), Reuse(HEADS[3], 100))),))
OFTEN = Plan((Rule((Reuse(TOP, 1), Dense(), Diagonal(3), Reuse(HEADS[3], 1))),))


def memories(pipe):
    layers = attached(pipe.transformer).layers
    return [memory for layer in layers for memory in layer.memories.values()]


@pytest.mark.second
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


@pytest.mark.sampled(2)
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


@pytest.mark.second
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
    with pytest.raises(BackendUnavailable, match="no kernel for Agent"):
        apply_plan(pipe, Plan((Rule(Agent()),)), backend="triton")
    assert tiny.footprint(pipe) == before


def test_what_is_not_finite_is_said_once(caplog):
    pipe = tiny.wan21()
    layer = pipe.transformer.blocks[1].attn1
    apply_plan(pipe, Plan((Rule(TOP, layer="blocks.1.attn1"),)))
    with torch.no_grad():
        layer.norm_k.weight[0] = torch.nan
    tiny.generate(pipe)
    lines = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(lines) == 1 and "blocks.1.attn1: scores of its blocks" in lines[0]
    assert "dense" not in lines[0]  # its calls are sparse ones
    assert summary(pipe).layers[0].dense_calls == 0
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


def test_phases_with_other_heads_choose_for_themselves():
    """A choice of two heads is not that of two others, nor of four."""
    kept = Reuse(TopBlocks(2, block=8), every=9)
    phases = ((kept, kept, Dense(), Dense()), (Dense(), kept, kept, kept))
    plan = Plan(tuple(Rule(own, phase=n) for n, own in enumerate(phases)), phases=(0.5,))
    anew = TopBlocks(2, block=8)
    pipe = tiny.wan21()
    apply_plan(pipe, plan)
    found = tiny.generate(pipe, steps=2)
    assert all((own.made, own.reused) == (1, 0) for own in memories(pipe))
    rules = tuple(
        Rule(tuple(anew if head is kept else head for head in own), phase=n)
        for n, own in enumerate(phases)
    )
    apply_plan(pipe, Plan(rules, phases=(0.5,)))
    assert torch.equal(tiny.generate(pipe, steps=2), found)


def test_audit_says_what_was_missed():
    pipe = tiny.wan21()
    heads = (TOP, Diagonal(3), Dense(), TopBlocks(1.0, block=8))
    plan = Plan((Rule(heads, layer="blocks.0.attn1"),))
    expected = with_plan("wan21", plan)
    apply_plan(pipe, plan, audit=16)
    assert torch.allclose(tiny.generate(pipe), expected, atol=1e-4)  # with LSE it rounds otherwise
    row = summary(pipe).layers[0]
    assert 0.05 < row.dropped < 1 and 0.01 < row.error < 2
    assert "dropped" in str(summary(pipe)) and summary(pipe).numbers()["layers"][0]["error"] > 0
    with sparse(pipe, Plan((Rule(TopBlocks(1.0, block=8)),)), audit=16):
        tiny.generate(pipe)
        row = summary(pipe).layers[0]
    assert row.dropped < 1e-5 and row.error < 1e-4
    with sparse(pipe, plan):
        tiny.generate(pipe)
        assert summary(pipe).layers[0].error is None
        assert "dropped" not in str(summary(pipe))
    with pytest.raises(ValueError, match="audit=-1"):
        apply_plan(pipe, plan, audit=-1)


def test_skip_list_grows_within_a_generation_and_not_across():
    pipe = tiny.wan21()
    apply_plan(pipe, Plan((Rule(SkipList(0.06, block=8)),)))
    first = tiny.generate(pipe)
    density = summary(pipe).layers[0].block_density
    assert 0.1 < density < 0.95
    assert torch.equal(tiny.generate(pipe), first)
    assert summary(pipe).layers[0].block_density == density


def test_written_plans_hold_dynamic_patterns(tmp_path):
    PLAN.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == PLAN
    pipe = tiny.wan21()
    with sparse(pipe, "jenga(0.4, 0.2, 8)"):
        found = tiny.generate(pipe)
    assert torch.equal(found, with_plan("wan21", Plan((Rule(Jenga(0.4, 0.2, 8)),))))
