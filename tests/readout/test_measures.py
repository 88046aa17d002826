"""The measures against their definitions, written out over a full softmax."""

import math

import pytest
import torch

from visattn import Grid, Segment, TokenLayout
from visattn.readout import Measures, Tiling, attention_rows, draw_rows
from visattn.readout.measures import column_mass, smallest_share, uniform_rows

LAYOUTS = {
    "odd": (TokenLayout(Grid(3, 5, 4)), 0),
    "text after": (TokenLayout(Grid(3, 5, 4), text_after=7), 0),
    "text before": (TokenLayout(Grid(2, 3, 7), text_before=9), 0),
    "one frame": (TokenLayout(Grid(1, 6, 7), 2, 3), 0),
    "tall": (TokenLayout(Grid(2, 9, 3)), 0),
    "only time": (TokenLayout(Grid(9, 1, 1)), 0),
    "one token": (TokenLayout(Grid(1, 1, 1), text_after=3), 0),
    "second grid": (
        TokenLayout(segments=[Grid(2, 2, 3), Segment("prefix", 2), Grid(3, 3, 4)]),
        1,
    ),
}
TILINGS = (Tiling((1, 3, 2)), Tiling((2, 2, 3)), Tiling(5), Tiling((4, 1, 1)))
WINDOW, AROUND = (3, 1, 5), (3, 5, 21)
HEADS = 2


def places(layout):
    """Segment, kind and ``(t, h, w)`` of every token."""
    out = []
    for number, part in enumerate(layout.segments):
        if part.grid is None:
            out += [(number, part.kind, None)] * part.length
        else:
            t, h, w = (range(n) for n in part.grid.shape)
            out += [(number, "grid", (a, b, c)) for a in t for b in h for c in w]
    return out


def tiles_of(layout, tiling):
    """A name for the tile of every token: a segment, and a place among its tiles."""
    out, before = [], {}
    for number, _, place in places(layout):
        ordinal = before[number] = before.get(number, -1) + 1
        if place is None or isinstance(tiling.tile, int):
            out.append((number, (0, 0, ordinal // tiling.size)))
        else:
            out.append((number, tuple(x // n for x, n in zip(place, tiling.tile, strict=True))))
    return out


def expected(attention, layout, sample):
    """All measures of one head from its full attention ``[L, L]``, by their definitions."""
    where, rows = places(layout), sample.tokens.tolist()
    frames, height, width = sample.grid.shape
    sums = {"frame": 0.0, "same_place": 0.0, "window": 0.0, "text": 0.0}
    axis = 0 if max(height, width) == 1 else 1 if height > width else 2
    halves, columns = ([], []), torch.full((2, layout.length), torch.nan, dtype=torch.float64)
    profile = [0.0] * (2 * frames - 1)
    sides = [2 * min(s // 2, n - 1) + 1 for s, n in zip(AROUND, sample.grid.shape, strict=True)]
    around = torch.zeros(sides, dtype=torch.float64)
    for row in rows:
        segment, _, (t, h, w) = where[row]
        halves[(t, h, w)[axis] >= sample.grid.shape[axis] / 2].append(row)
        for key, (other, kind, place) in enumerate(where):
            mass = float(attention[row, key])
            if kind == "text":
                sums["text"] += mass
            if other != segment:
                continue
            apart = [b - a for a, b in zip((t, h, w), place, strict=True)]
            sums["frame"] += mass * (apart[0] == 0)
            sums["same_place"] += mass * (apart[0] != 0 and apart[1:] == [0, 0])
            inside = all(abs(d) <= (n - 1) / 2 for d, n in zip(apart, WINDOW, strict=True))
            sums["window"] += mass * inside
            profile[apart[0] + frames - 1] += mass
            if all(abs(d) <= n // 2 for d, n in zip(apart, sides, strict=True)):
                around[tuple(d + n // 2 for d, n in zip(apart, sides, strict=True))] += mass
    for half, own in enumerate(halves):
        if own:
            columns[half] = attention[own].mean(0)
    out = {name: value / len(rows) for name, value in sums.items()}
    count = math.ceil(layout.length / 64)
    both = []
    for half in range(2):
        best = sorted(range(layout.length), key=lambda key: -columns[half, key])[:count]
        both.append(sum(float(columns[1 - half, key]) for key in best))
    out["columns"] = sum(both) / 2 if all(halves) else math.nan
    out["profile"] = torch.tensor(profile) / len(rows)
    out["around"] = around / len(rows)
    out["tile_shares"], out["offsets"] = [], []
    for tiles in sample.samples:
        own = tiles_of(layout, tiles.tiling)
        names = list(dict.fromkeys(own))
        sides = tiles.tiling.count(sample.grid).shape
        table = torch.zeros([2 * n - 1 for n in sides], dtype=torch.float64)
        shares = []
        for members, exists in zip(tiles.members, tiles.exists, strict=True):
            tokens = sample.tokens[members[exists]].tolist()
            (home,) = {own[token] for token in tokens}
            mean = attention[tokens].mean(0)
            mass = dict.fromkeys(names, 0.0)
            for key, name in enumerate(own):
                mass[name] += float(mean[key])
            held, count = 0.0, 0
            for value in sorted(mass.values(), reverse=True):
                held, count = held + value, count + 1
                if held >= 0.9 - 1e-6:
                    break
            shares.append(count / len(names))
            for (segment, place), value in mass.items():
                if segment == home[0]:
                    apart = zip(home[1], place, sides, strict=True)
                    table[tuple(b - a + n - 1 for a, b, n in apart)] += value
        out["tile_shares"].append(sum(shares) / len(shares))
        out["offsets"].append(table / len(shares))
    return out


def random_heads(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(HEADS, layout.length, 6, generator=generator) for _ in range(2))
    return 2.5 * q, k


@pytest.mark.sampled(4)
@pytest.mark.parametrize("max_bytes", [1, 10**7], ids=["in pieces", "at once"])
@pytest.mark.parametrize("tiles", [2, 1000], ids=["sampled", "all"])
@pytest.mark.parametrize(("layout", "number"), LAYOUTS.values(), ids=LAYOUTS)
def test_measures_are_their_definitions(layout, number, tiles, max_bytes):
    q, k = random_heads(layout)
    sample = draw_rows(layout, TILINGS, tiles=tiles, number=number, seed=1)
    measures = Measures(sample, window=WINDOW, around=AROUND)
    rows = attention_rows(q, k, sample.tokens, max_bytes=max_bytes)
    check(measures, measures(rows, HEADS), layout, sample, q, k)


def check(measures, tally, layout, sample, q, k):
    full = (q.double() @ k.double().transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)
    for head in range(len(q)):
        own = expected(full[head], layout, sample)
        for name in ("frame", "same_place", "window", "text"):
            assert float(getattr(tally, name)[head]) == pytest.approx(own[name], abs=2e-6), name
        columns = float(column_mass(tally.columns)[head])
        assert columns == pytest.approx(own["columns"], abs=2e-6, nan_ok=True)
        assert torch.allclose(tally.profile[head].double(), own["profile"].double(), atol=2e-6)
        assert torch.allclose(tally.around[head].double(), own["around"], atol=2e-6)
        assert tally.tile_shares[head].tolist() == pytest.approx(own["tile_shares"])
        for table, its in zip(tally.offsets, own["offsets"], strict=True):
            assert table.shape[1:] == its.shape
            assert torch.allclose(table[head].double(), its, atol=2e-6)


@pytest.mark.parametrize(("layout", "number"), LAYOUTS.values(), ids=LAYOUTS)
def test_chance_is_what_uniform_attention_measures(layout, number):
    sample = draw_rows(layout, TILINGS, tiles=3, number=number)
    measures = Measures(sample, window=WINDOW, around=AROUND)
    zero = torch.zeros(1, layout.length, 4)
    check(measures, measures.chance, layout, sample, zero, zero)
    length, grid = layout.length, sample.grid
    chance = measures.chance
    assert float(chance.frame) == pytest.approx(grid.height * grid.width / length)
    assert float(chance.same_place) == pytest.approx((grid.frames - 1) / length)
    assert float(chance.text) == pytest.approx(sum(n for _, n in layout.texts) / length)
    (chunk,) = uniform_rows(sample)
    assert float(chunk.lse[0, 0]) == pytest.approx(math.log(length))


def test_reach_is_where_uniform_attention_is():
    layout = TokenLayout(Grid(4, 5, 3), text_after=4)
    measures = Measures(draw_rows(layout, TILINGS, tiles=2), around=AROUND)
    chance = measures.chance
    assert torch.allclose(chance.around[0] * layout.length, measures.reach, atol=1e-5)
    profile = measures.profile_reach * 15
    assert torch.allclose(chance.profile[0] * layout.length, profile, atol=1e-5)


def test_offset_tables_hold_the_mass_of_the_grid():
    layout = TokenLayout(Grid(3, 5, 4), text_after=7)
    q, k = random_heads(layout)
    sample = draw_rows(layout, TILINGS, tiles=1000)
    tally = Measures(sample)(attention_rows(q, k, sample.tokens), HEADS)
    for table in tally.offsets[:1]:  # tiles of equal weight: not the runs, of which one is cut
        total = table.sum((1, 2, 3))
        assert torch.all(total < 1)
    assert torch.allclose(tally.profile.sum(1).double(), 1 - tally.text, atol=1e-6)


@pytest.mark.parametrize(
    ("mass", "share"),
    [
        ([1.0, 0, 0, 0], 0.25),
        ([0.45, 0.1, 0.45, 0], 0.5),
        ([0.3, 0.3, 0.3, 0.1], 0.75),
        ([0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.1] * 10, 0.9),
    ],
)
def test_smallest_share(mass, share):
    assert float(smallest_share(torch.tensor(mass))) == pytest.approx(share)


def test_columns_are_those_of_both_halves():
    """A head that looks at fixed keys has columns. One in which each half of the queries looks at
    keys of its own has none, though a few keys have all the mass."""
    columns = torch.zeros(2, 2, 128)
    columns[:, 0, 5] = columns[:, 0, 80] = 0.5
    columns[0, 1, 3] = columns[1, 1, 100] = 1.0
    assert column_mass(columns).tolist() == [1.0, 0.0]


def test_a_local_head_has_no_columns_however_few_tiles_are_sampled():
    grid = Grid(2, 32, 32)
    layout = TokenLayout(grid)
    place = torch.stack(grid.coordinates(torch.arange(grid.numel)), 1).float()
    q = torch.cat([2 * place, -torch.ones_like(place)], 1)[None]
    k = torch.cat([place, place**2], 1)[None]
    sample = draw_rows(layout, [Tiling((1, 4, 4))], tiles=4)
    tally = Measures(sample)(attention_rows(q, k, sample.tokens, scale=1.0), 1)
    assert float(tally.window) > 0.9
    assert float(column_mass(tally.columns)) < 0.02


@pytest.mark.parametrize("window", [(3, 5), (3, 4, 5), (0, 1, 1), 3, (1.0, 3, 3), (-1, 1, 1)])
def test_wrong_windows_are_refused(window):
    sample = draw_rows(TokenLayout(Grid(2, 2, 2)), TILINGS)
    for name in ("window", "around"):
        with pytest.raises((TypeError, ValueError), match=f"{name}="):
            Measures(sample, **{name: window})
