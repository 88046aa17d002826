"""Grids, segments and layouts."""

from __future__ import annotations

import pytest
import torch

from visattn import Grid, Segment, TokenLayout
from visattn.geometry.layout import check_text_lengths, valid_keys


def test_grid_is_row_major() -> None:
    grid = Grid(2, 3, 4)
    t, h, w = grid.coordinates(torch.arange(24))
    assert torch.equal((t * 3 + h) * 4 + w, torch.arange(24))
    assert (int(t.max()), int(h.max()), int(w.max())) == (1, 2, 3)
    assert grid.permuted((1, 2, 0)) == Grid(3, 4, 2) and str(grid) == "2x3x4"


def test_layouts_compare_by_value_and_hash() -> None:
    short = TokenLayout(Grid(2, 3, 4), text_before=5, text_after=6)
    long = TokenLayout(segments=[Segment("text", 5), Grid(2, 3, 4), Segment("text", 6)])
    assert short == long and hash(short) == hash(long) and len({short, long}) == 1
    assert short != TokenLayout(Grid(2, 3, 4), text_before=6, text_after=5)


def test_layout_places_its_segments() -> None:
    layout = TokenLayout(
        segments=[Segment("prefix", 2), Grid(1, 2, 2), Segment("text", 3), Grid(2, 1, 1)]
    )
    assert layout.length == 11 and layout.starts == (0, 2, 6, 9)
    assert layout.grids == ((2, Grid(1, 2, 2)), (9, Grid(2, 1, 1)))
    assert layout.texts == ((6, 3),)
    assert str(layout) == "prefix(2) + 1x2x2 + text(3) + 2x1x1"


def test_text_lengths_are_clamped_and_make_a_key_mask() -> None:
    layout = TokenLayout(segments=[Segment("text", 2), Grid(1, 1, 1), Segment("text", 3)])
    lengths = check_text_lengths(torch.tensor([[1, 9], [-4, 2]]), layout, 2)
    assert lengths.tolist() == [[1, 3], [0, 2]]
    assert valid_keys(lengths, layout).int().tolist() == [[1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Grid(0, 1, 1), "frames=0 must be at least 1"),
        (lambda: Grid(1, -2, 1), "height=-2 must be at least 1"),
        (lambda: Grid(1, 1, 2.0), "width=2.0 must be an integer"),
        (lambda: Grid(True, 1, 1), "frames=True must be an integer"),
        (lambda: Grid(1, 1, float("nan")), "width=nan must be an integer"),
        (lambda: TokenLayout(), "either grid= or segments="),
        (lambda: TokenLayout(Grid(1, 1, 1), segments=[Grid(1, 1, 1)]), "either grid= or segments="),
        (lambda: TokenLayout(Grid(1, 1, 1), text_before=-1), "text_before=-1 must be at least 0"),
        (lambda: TokenLayout(Grid(1, 1, 1), text_after=1.5), "text_after=1.5 must be an integer"),
        (lambda: TokenLayout(segments=[Grid(1, 1, 1)], text_after=3), "text_after=3 go with grid="),
        (lambda: TokenLayout(segments=[]), r"segments=\(\) is empty"),
        (lambda: TokenLayout(segments=[7]), "segments holds 7"),
        (lambda: Segment("image", 3), "kind='image' must be"),
        (lambda: Segment("text", 0), "length=0 must be at least 1"),
        (lambda: Segment("grid", 3), "grid=None must be given"),
        (lambda: Segment("grid", 3, Grid(1, 2, 2)), "length=3 must be the 4 tokens"),
    ],
)
def test_bad_sizes_get_one_sentence(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
