"""The sampler: what it makes of the calls of running pipelines, and of heads of known structure."""

import pytest
import torch
from support import tiny

from visattn import Grid, TokenLayout
from visattn.inject import Observation, apply_plan, observe
from visattn.patterns import Diagonal
from visattn.readout import (
    ANY_PASS,
    Key,
    Measures,
    Sampler,
    Tiling,
    attention_rows,
    default_tilings,
    draw_rows,
)
from visattn.readout.measures import column_mass

GRID = Grid(5, 8, 8)
LAYOUT = TokenLayout(GRID)


def observation(q, k, layout=LAYOUT, **changes):
    values = {
        "role": "transformer",
        "layer": "blocks.0.attn1",
        "number": 0,
        "step": 0,
        "steps": 4,
        "passes": ("cond",),
        "layout": layout,
        "scale": None,
    }
    return Observation(**{**values, **changes}, q=q, k=k, v=k)


def random_pair(batch=1, heads=2, layout=LAYOUT, seed=0, dim=8):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.length, dim)
    return [2 * torch.randn(shape, generator=generator) for _ in range(2)]


def direct(q, k, tiles=6, seed=0, **options):
    """The measures of one sample of a batch, without a sampler."""
    sample = draw_rows(LAYOUT, default_tilings(GRID), tiles=tiles, seed=seed)
    return Measures(sample, **options)(attention_rows(q, k, sample.tokens), len(q))


# ---- known heads


def planted():
    """Queries and keys of five heads: in the frame, at the same place, in columns, nearby,
    everywhere; ``scale`` is 1."""
    t, h, w = (axis.float() for axis in GRID.coordinates(torch.arange(GRID.numel)))
    one, none = torch.ones_like(t), torch.zeros_like(t)
    column = torch.zeros_like(t)
    column[[3, 77, 140, 200, 319]] = 12.0

    def near(*axes):
        """``q @ k`` is minus the squared distance, up to a number that depends on ``q`` alone."""
        pad = 3 - len(axes)
        q = [*(6 * axis for axis in axes), *(-3 * one for _ in axes), *[none] * (2 * pad)]
        k = [*axes, *(axis**2 for axis in axes), *[none] * (2 * pad)]
        return torch.stack(q, 1), torch.stack(k, 1)

    constant = torch.stack([one, *[none] * 5], 1), torch.stack([column, *[none] * 5], 1)
    flat = torch.zeros(GRID.numel, 6), torch.zeros(GRID.numel, 6)
    pairs = (near(t), near(h, w), constant, near(t, h, w), flat)
    q, k = (torch.stack([pair[side] for pair in pairs])[None] for side in range(2))
    return q, k


def test_known_heads_are_told_apart():
    sampler = Sampler(steps=[0])
    sampler(observation(*planted(), scale=1.0))
    spatial, temporal, columns, local, dense = (line.shares for line in sampler.table())
    chance = sampler.chance
    assert spatial.frame > 0.85 and spatial.tile_share < 0.35
    assert temporal.same_place > 0.6 and temporal.frame < 0.35 and temporal.tile_share < 0.4
    assert columns.columns > 0.95 and columns.tile_share < 0.5
    assert local.window > 0.9 and local.tile_share < 0.6
    for name in ("frame", "same_place", "window", "columns", "tile_share"):
        assert getattr(dense, name) == pytest.approx(getattr(chance, name), abs=1e-6)
    for name in ("frame", "same_place", "window"):
        assert getattr(columns, name) == pytest.approx(getattr(chance, name), abs=0.1)
    assert spatial.columns < 0.1 and temporal.columns < 0.1 and local.columns < 0.1


def test_the_best_tiling_has_the_shape_of_the_head():
    sampler = Sampler(tilings=[Tiling((1, 8, 8)), Tiling((5, 2, 2)), Tiling((2, 4, 8))])
    sampler(observation(*planted(), scale=1.0))
    spatial, temporal, *_ = (line.shares for line in sampler.table())
    assert (spatial.tiling, temporal.tiling) == ("1x8x8", "5x2x2")
    assert spatial.tile_share == min(spatial.tile_shares.values())
    assert list(spatial.tile_shares) == ["1x8x8", "5x2x2", "2x4x8"]


# ---- means


def test_means_over_calls_and_samples_of_a_batch():
    sampler = Sampler(seed=3, tiles=4, per_step=True)
    parts = []
    for step in range(3):
        q, k = random_pair(batch=2, seed=step)
        sampler(observation(q, k, step=step))
        parts += [direct(q[n], k[n], tiles=4, seed=3) for n in range(2)]
    (key,) = sampler.seen()
    assert key == Key("transformer", 0, "blocks.0.attn1", "cond")
    mean = sampler.tally(key)
    for name in ("frame", "same_place", "window", "text", "columns", "tile_shares", "around"):
        wanted = sum(getattr(part, name) for part in parts) / 6
        assert torch.allclose(getattr(mean, name), wanted, atol=1e-6), name
    for number, own in enumerate(mean.offsets):
        assert torch.allclose(own, sum(part.offsets[number] for part in parts) / 6, atol=1e-6)
    lines = sampler.table()
    assert [(line.head, line.calls, line.step) for line in lines] == [(0, 6, None), (1, 6, None)]
    assert lines[1].shares.window == pytest.approx(float(mean.window[1]))
    assert lines[1].shares.columns == pytest.approx(float(column_mass(mean.columns)[1]))
    by_step = sampler.table(by_step=True)
    assert [(line.head, line.step, line.calls) for line in by_step] == [
        (head, step, 2) for head in range(2) for step in range(3)
    ]
    own = sum(float(part.window[1]) for part in parts[2:4]) / 2
    assert by_step[4].shares.window == pytest.approx(own)
    assert sum(line.shares.frame for line in by_step[:3]) / 3 == pytest.approx(
        lines[0].shares.frame
    )


def test_memory_does_not_grow_with_calls():
    sampler = Sampler()

    def kept():
        (key,) = sampler.seen()
        return sum(tensor.numel() for tensor in sampler.tally(key).tensors())

    sampler(observation(*random_pair()))
    before = kept()
    for step in range(1, 4):
        sampler(observation(*random_pair(seed=step), step=step))
    assert kept() == before
    assert 4 * before < 2 * LAYOUT.length * 40  # of two heads, with the windows of the pictures
    assert not sampler._sums[sampler.seen()[0]].steps


def test_grouped_keys_are_those_of_their_heads():
    q, k = random_pair(heads=6)
    k = k[:, :3]
    sampler, some = Sampler(), Sampler(heads=[3, 1, 3])
    for own in (sampler, some):
        own(observation(q, k))
    wanted = direct(q[0], k[0].repeat_interleave(2, 0))
    lines = sampler.table()
    assert [line.shares.window for line in lines] == pytest.approx(wanted.window.tolist())
    assert [line.head for line in some.table()] == [1, 3]
    for line in some.table():
        assert line.shares.window == pytest.approx(lines[line.head].shares.window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype):
    q, k = (x.to(dtype) for x in random_pair())
    sampler = Sampler()
    sampler(observation(q, k))
    wanted = direct(q[0].float(), k[0].float())
    assert [line.shares.frame for line in sampler.table()] == pytest.approx(
        wanted.frame.tolist(), abs=1e-5
    )


def test_the_query_is_kept_whole():
    layout = TokenLayout(Grid(2, 3, 4), text_before=3)
    q, k = random_pair(layout=layout)
    sampler = Sampler(query=(1, 2, 0), heads=[1])
    for step in range(2):
        sampler(observation(q, k * (1 + step), layout, step=step))
    row = 3 + (1 * 3 + 2) * 4
    logits = q[0, 1, row] @ k[0, 1].T * 8**-0.5
    wanted = (logits.softmax(-1) + (2 * logits).softmax(-1)) / 2
    assert torch.allclose(sampler.query_attention(sampler.seen()[0])[0], wanted, atol=1e-6)


# ---- running pipelines


def numbers(sampler):
    return [line.numbers() for line in sampler.table()]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_layer_head_and_pass_of_a_pipeline(name):
    pipe = tiny.PIPELINES[name]()
    expected = tiny.generate(pipe)
    sampler = Sampler(per_step=True)
    with observe(pipe, sampler):
        assert torch.equal(tiny.generate(pipe), expected)
    lines = sampler.table()
    roles = ["transformer", "transformer_2"][: 2 if name == "wan22" else 1]
    assert [(x.role, x.number, x.pass_, x.head) for x in lines] == [
        (role, number, pass_, head)
        for role in roles
        for number in range(tiny.LAYERS)
        for pass_ in ("cond", "uncond")
        for head in range(tiny.HEADS)
    ]
    assert all(x.layer == tiny.paths(name)[x.number] for x in lines)
    steps = {x.step for x in sampler.table(by_step=True)}
    assert steps == {0, 1, 2}
    for line in lines:
        shares = line.shares
        assert 0 < shares.frame < 1 and 0 < shares.window < 1
        assert (shares.text > 0) == ("wan" not in name)
    text = 10 / sampler.layout.length if "wan" not in name else 0
    assert sampler.chance.text == pytest.approx(text)


def test_same_seed_same_numbers_and_passes_do_not_mix():
    pipe = tiny.cogvideox()
    first, again, other, cond = Sampler(), Sampler(), Sampler(seed=1, tiles=1), Sampler()
    cond.passes = frozenset({"cond"})
    for sampler in (first, again, other, cond):
        with observe(pipe, sampler):
            tiny.generate(pipe)
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)
    assert numbers(cond) == [line for line in numbers(first) if line["pass"] == "cond"]


def test_steps_layers_and_heads_can_be_chosen():
    pipe = tiny.wan22()
    sampler = Sampler(
        steps=[2], heads=[1, 2], layers=[("transformer_2", "blocks.1.attn1")], passes=["uncond"]
    )
    with observe(pipe, sampler, ["blocks.1.attn1", "blocks.2.attn1"]):
        tiny.generate(pipe)
    assert [(x.role, x.number, x.head, x.pass_, x.calls) for x in sampler.table()] == [
        ("transformer_2", 1, head, "uncond", 1) for head in (1, 2)
    ]


def test_a_plan_does_not_hide_attention():
    """Under a plan the whole softmax is read, of the queries and keys that the plan leads to."""
    pipe = tiny.wan21()
    dense, planned = Sampler(steps=[0], passes=["cond"]), Sampler(steps=[0], passes=["cond"])
    with observe(pipe, dense):
        tiny.generate(pipe)
    apply_plan(pipe, Diagonal(2))
    with observe(pipe, planned):
        tiny.generate(pipe)
    first = [[line for line in numbers(x) if line["number"] == 0] for x in (dense, planned)]
    assert first[0] == first[1]
    assert numbers(dense) != numbers(planned)


def test_an_unknown_pass_is_read():
    sampler = Sampler(passes=["cond"])
    sampler(observation(*random_pair(), passes=None))
    assert sampler.table()[0].pass_ == ANY_PASS


def test_numbers_are_json_values():
    sampler = Sampler()
    sampler(observation(*random_pair()))
    line = sampler.table()[1].numbers()
    assert line["pass"] == "cond"
    assert (line["head"], line["step"], line["calls"]) == (1, None, 1)
    assert line["window"] == round(sampler.table()[1].shares.window, 6)
    assert set(line["tile_shares"]) == {tiling.name for tiling in default_tilings(GRID)}
    assert sampler.chance.numbers()["frame"] == 0.2


# ---- what it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": []}, "steps is empty"),
        ({"steps": [-1]}, "steps=-1"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [0.5]}, "heads=0.5"),
        ({"window": (3, 4, 5)}, "odd sides"),
        ({"around": (3, 5)}, "around="),
        ({"tiles": 0}, "tiles=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Sampler(**options)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"heads": [0, 2]}, {}, "heads holds 2; blocks.0.attn1 of transformer has heads 0 to 1"),
        ({"query": (5, 0, 0)}, {}, r"query=\(5, 0, 0\) is outside grid 5x8x8"),
        ({"query": (0, 0)}, {}, "must be three integers"),
        ({"query": (0, 0, -1)}, {}, "query=-1"),
        ({"steps": [1]}, {"step": None}, "step of a call of transformer is not known"),
        ({"per_step": True}, {"step": None}, "step of a call of transformer is not known"),
        ({"tilings": []}, {}, "at least one Tiling"),
    ],
)
def test_wrong_calls_are_refused(options, changes, words):
    sampler = Sampler(**options)
    with pytest.raises((TypeError, ValueError), match=words):
        sampler(observation(*random_pair(), **changes))
    assert sampler.seen() == []


def test_other_shapes_and_layouts_without_a_grid_are_refused():
    sampler = Sampler()
    with pytest.raises(ValueError, match="has read no call"):
        sampler.table() or sampler.chance
    sampler(observation(*random_pair()))
    other = TokenLayout(Grid(2, 3, 4))
    with pytest.raises(ValueError, match="has begun with 5x8x8 tokens and now sees 2x3x4"):
        sampler(observation(*random_pair(layout=other), other))
    with pytest.raises(ValueError, match="keeps no steps"):
        sampler.table(by_step=True)
    with pytest.raises(ValueError, match="keeps no query"):
        sampler.query_attention(sampler.seen()[0])
    text = TokenLayout(segments=[TokenLayout(GRID, 3).segments[0]])
    with pytest.raises(ValueError, match="has no grid"):
        Sampler()(observation(*random_pair(layout=text), text))


def test_attention_that_is_not_finite_is_refused():
    q, k = random_pair()
    q[0, 1, :, 0] = torch.inf
    sampler = Sampler()
    with pytest.raises(ValueError, match=r"blocks.0.attn1 of transformer at step 2 is not finite"):
        sampler(observation(q, k, step=2))
    assert sampler.seen() == []
