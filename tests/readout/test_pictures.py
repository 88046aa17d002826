"""The pictures of heads: what their pixels show, and that every layout can be drawn."""

import pytest
import torch

from visattn import Grid, TokenLayout
from visattn.draw.heat import RAMP, heat_picture, legend, top_of
from visattn.draw.palette import PAPER, QUERY
from visattn.draw.pattern_picture import MARGIN
from visattn.inject import Observation
from visattn.readout import Sampler
from visattn.readout.detail import _frames, draw_detail
from visattn.readout.overview import by_distance, draw_overview, percent, seen_around, shared_keys


def near(grid, weights):
    """Queries and keys ``[L, 6]`` of a head that looks nearby, the more so the larger the weights
    of the axes; with scale 1."""
    axes = [
        axis.float() * weight
        for axis, weight in zip(grid.coordinates(torch.arange(grid.numel)), weights, strict=True)
    ]
    one = torch.ones(grid.numel)
    q = torch.stack([*(2 * axis for axis in axes), *(-one for _ in axes)], 1)
    return q, torch.stack([*axes, *(axis**2 for axis in axes)], 1)


def read(layout, heads, layers=1, **options):
    """A sampler that has read layers of heads with these weights."""
    sampler = Sampler(keep_query=True, tiles=3, **options)
    start, grid = layout.grids[0]
    for number in range(layers):
        q, k = torch.zeros(2, 1, len(heads), layout.length, 6)
        for head, weights in enumerate(heads):
            inside = slice(start, start + grid.numel)
            q[0, head, inside], k[0, head, inside] = near(grid, weights)
        path = f"blocks.{number}.attn1"
        sampler(
            Observation("transformer", path, number, 0, 1, ("cond",), q[:], k, k, layout, scale=1.0)
        )
    return sampler


SPATIAL, TEMPORAL, LOCAL, DENSE = (4.0, 0.0, 0.0), (0.0, 2.0, 2.0), (2.0, 2.0, 2.0), (0.0,) * 3
GRID = Grid(5, 8, 6)


def test_colours_follow_the_logarithm():
    values = torch.tensor([[0.0, 1.0, 10.0], [100.0, 1e9, torch.nan]])
    picture = heat_picture(values, 2, 1, 1)
    pixels = [picture.getpixel((x, y)) for y in range(2) for x in range(3)]
    middle = RAMP[round(253 / 2)]
    assert pixels == [RAMP[0], RAMP[0], middle, RAMP[253], RAMP[253], PAPER]
    light = [sum(color) for color in RAMP[:254]]
    assert light == sorted(light, reverse=True)


@pytest.mark.parametrize(
    ("values", "power"),
    [([0.5, 1.0], 1), ([3.0, 9.0], 1), ([1.0, 150.0], 2), ([9e8], 5), ([], 1), ([torch.nan], 1)],
)
def test_the_scale_ends_at_a_power_of_ten(values, power):
    assert top_of(torch.tensor(values)) == power
    assert legend(power).width > 400


def test_percent():
    words = [percent(share) for share in (0.0, 0.0004, 0.004, 0.04, 0.295, 1.0)]
    assert words == ["0 %", "<0.1 %", "0.4 %", "4 %", "30 %", "100 %"]


def test_what_is_drawn_of_known_heads():
    sampler = read(TokenLayout(GRID), [SPATIAL, TEMPORAL, LOCAL, DENSE])
    (key,) = sampler.seen()
    spatial, temporal, local, dense = seen_around(sampler, key)
    assert spatial.shape == (5, 15, 11)
    assert spatial[2, 7, 5] == pytest.approx(5, rel=0.01)  # its frame alone
    assert spatial[0].nan_to_num(0).max() < 0.1
    assert temporal[:, 7, 5].min() > 20 and temporal[2, 7, 9].nan_to_num(0) < 0.1
    assert local[2, 7, 5] > 30 > 3 > local[0, 7, 5]
    assert dense.nan_to_num(1) == pytest.approx(torch.ones(5, 15, 11), abs=1e-4)
    assert float(by_distance(sampler, key)[0, 4]) == pytest.approx(1, rel=0.01)
    assert by_distance(sampler, key)[3] * 5 == pytest.approx(torch.ones(9), abs=1e-4)
    assert shared_keys(sampler, key)[3] == pytest.approx(torch.ones(8, 6), abs=1e-4)


def corners(image, side):
    """Where red outlines of ``side`` pixels and one have their upper left corner."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    red = (pixels.view(image.height, image.width, 3) == torch.tensor(QUERY)).all(2)
    y, x = red[1 : -side - 1, 1 : -side - 1].nonzero().add(1).unbind(1)
    found = red[y, x + side] & red[y + side, x] & red[y + side, x + side]
    found &= ~(red[y, x - 1] | red[y - 1, x] | red[y + 1, x + 1])
    return list(zip(x[found].tolist(), y[found].tolist(), strict=True))


def test_overview_has_a_cell_for_every_head():
    heads = [SPATIAL, TEMPORAL, DENSE]
    sampler = read(TokenLayout(GRID), heads, layers=2)
    image = draw_overview(sampler, title="Title", notes=["note"])
    assert image.mode == "RGB"

    marks = corners(image, 5)
    assert len(marks) == 6
    centers = [image.getpixel((x + 2, y + 2)) for x, y in sorted(marks, key=lambda m: m[1])]
    assert centers[:3] == centers[3:]  # both layers are alike
    lights = [sum(color) for color in centers[:3]]
    assert lights[1] < lights[0] < lights[2] == sum(RAMP[0])  # one place, a frame, everything


def test_overview_has_a_section_for_every_denoiser_and_pass():
    sampler = read(TokenLayout(GRID), [LOCAL, DENSE])
    one = draw_overview(sampler, title="Title")
    q = torch.zeros(2, 2, GRID.numel, 6)
    sampler(
        Observation(
            "transformer_2",
            "blocks.0.attn1",
            0,
            0,
            1,
            ("uncond", "cond"),
            q,
            q,
            q,
            TokenLayout(GRID),
            None,
        )
    )
    assert len(sampler.seen()) == 3
    assert draw_overview(sampler, title="Title").height > one.height + 300


@pytest.mark.parametrize("filmed", [False, True], ids=["plain", "filmed"])
def test_frames_show_every_token_in_its_place(filmed):
    values = 10 ** torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    video = torch.rand(9, 32, 40, 3) if filmed else None
    image = _frames(values, (1, 2, 3), 1, video)
    scale, step = 40, 5 * 40 + 16
    top = 26 + (4 * scale + 2) * filmed
    assert image.size == (3 * step - 16, top + 4 * scale)
    for (t, h, w), value in zip(
        torch.cartesian_prod(*map(torch.arange, (3, 4, 5))), values.view(-1), strict=True
    ):
        at = (int(t) * step + int(w) * scale + 20, top + int(h) * scale + 20)
        assert image.getpixel(at) == RAMP[round(float(value.log10()) * 253)]
    ring = (step + 3 * scale + 1, 2 * scale + 20)
    assert image.getpixel((ring[0], top + ring[1])) == QUERY
    if filmed:
        assert image.getpixel((ring[0], 26 + ring[1])) == QUERY
        still = image.crop((2 * step, 26, 2 * step + 200, 26 + 160))
        mean = torch.frombuffer(bytearray(still.tobytes()), dtype=torch.uint8).view(-1, 3)
        mean = mean.float().mean(0) / 255
        assert torch.allclose(mean, video[8].mean((0, 1)), atol=0.03)


def test_large_frames_are_averaged():
    values = torch.zeros(2, 200, 3000)
    values[0, 0, 0] = 1e9
    image = _frames(values, (1, 199, 2999), 1, None)
    assert image.width <= 2248 and image.getpixel((0, 26)) == RAMP[253]


def test_detail_of_a_query():
    sampler = read(TokenLayout(GRID, text_before=3), [SPATIAL, LOCAL], query=(3, 2, 4))
    line = sampler.table()[1]
    plain = draw_detail(sampler, line, title="Title", notes=["note"])
    filmed = draw_detail(
        sampler, line, title="Title", notes=["note"], video=torch.zeros(17, 64, 48, 3)
    )
    assert plain.width == filmed.width == 2294
    assert plain.height < filmed.height
    assert {RAMP[0], RAMP[253], QUERY} <= {color for _, color in plain.getcolors(1 << 22)}


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(Grid(1, 1, 1), text_after=2),
        TokenLayout(Grid(1, 24, 24)),
        TokenLayout(Grid(100, 2, 3)),
        TokenLayout(Grid(2, 60, 3), text_before=5),
        TokenLayout(Grid(1, 70, 90)),
    ],
    ids=str,
)
def test_every_layout_can_be_drawn(layout):
    sampler = read(layout, [LOCAL, DENSE])
    image = draw_overview(sampler, title="Title " * 60, notes=["note " * 100] * 2)
    assert image.width < 3000 and image.height < 3000
    for line in sampler.table():
        detail = draw_detail(sampler, line, title="Title " * 60, notes=["note " * 100])
        assert detail.width == 2294 and detail.height < 4000


@pytest.mark.parametrize("heads", [12, 40])
def test_more_heads_are_drawn_smaller(heads):
    sampler = read(TokenLayout(Grid(3, 16, 9)), [LOCAL] * heads)
    image = draw_overview(sampler, title="Title")
    assert image.width <= max(4000 + 2 * MARGIN, 170 * heads)


def test_a_sampler_without_a_query_has_no_detail():
    sampler = Sampler()
    q, k = near(GRID, LOCAL)
    sampler(
        Observation(
            "transformer",
            "blocks.0.attn1",
            0,
            0,
            1,
            ("cond",),
            q[None, None],
            k[None, None],
            k[None, None],
            TokenLayout(GRID),
            1.0,
        )
    )
    with pytest.raises(ValueError, match="keeps no query"):
        draw_detail(sampler, sampler.table()[0], title="Title")
