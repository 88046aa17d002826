"""Bounds by tiles, against the published table of NATTEN's simulator (arXiv 2504.16922)."""

import pytest

from visattn.geometry.layout import Grid
from visattn.patterns import Neighborhood, SlidingTile
from visattn.search.cost import end_to_end, tile_bounds

VIDEO, IMAGE, WORLD = Grid(30, 48, 80), Grid(1, 256, 256), Grid(16, 44, 80)
HUNYUAN, COSMOS, FLUX = 0.607, 0.587, 0.518  # published attention shares
# window, stride -> worst, mean, published end to end, of HunyuanVideo
PUBLISHED = {
    ((18, 24, 24), (1, 1, 1)): (3.27, 5.24, 1.73),
    ((18, 24, 24), (2, 1, 1)): (3.60, 5.45, 1.78),
    ((18, 24, 24), (1, 1, 8)): (5.45, 7.69, 1.99),
    ((18, 24, 24), (2, 1, 8)): (6.00, 8.00, 2.02),
    ((18, 24, 24), (1, 8, 8)): (9.09, 10.26, 2.17),
    ((18, 24, 24), (2, 8, 8)): (10.00, 10.67, 2.20),
    ((18, 24, 24), (16, 8, 8)): (11.11, 11.11, 2.23),
}


@pytest.mark.parametrize(("window", "stride"), PUBLISHED)
def test_video_table(window, stride):
    found = tile_bounds(Neighborhood(window, stride), VIDEO, (4, 8, 8), (2, 8, 8))
    worst, mean, whole = PUBLISHED[window, stride]
    assert found.worst == pytest.approx(worst, abs=0.005)
    assert found.mean == pytest.approx(mean, abs=0.005)
    assert end_to_end(found.worst, HUNYUAN) == pytest.approx(whole, abs=0.011)


@pytest.mark.parametrize(
    ("stride", "worst", "whole"),
    [((1, 1), 6.10, 1.76), ((16, 1), 8.53, 1.84), ((16, 16), 10.24, 1.88)],
)
def test_image_table(stride, worst, whole):
    pattern = Neighborhood((1, 80, 80), (1, *stride))
    found = tile_bounds(pattern, IMAGE, (1, 16, 16), (1, 16, 8))
    assert found.worst == pytest.approx(worst, abs=0.005)
    assert end_to_end(found.worst, FLUX) == pytest.approx(whole, abs=0.011)


def test_wide_windows_and_dense_steps():
    """HunyuanVideo 30 x 40 x 40, and Cosmos with 12 of 35 steps dense."""
    found = tile_bounds(Neighborhood((30, 40, 40), (1, 32, 8)), VIDEO, (4, 8, 8), (2, 8, 8))
    assert end_to_end(found.worst, HUNYUAN) == pytest.approx(1.55, abs=0.011)
    found = tile_bounds(Neighborhood((16, 32, 48), (1, 8, 16)), WORLD, (8, 4, 8), (4, 4, 8))
    sparse = end_to_end(found.worst, COSMOS)
    assert end_to_end(sparse, 23 / 35) == pytest.approx(1.28, abs=0.021)


def test_aligned_windows_cost_their_density():
    pattern = SlidingTile((6, 8, 8), (3, 3, 3))
    found = tile_bounds(pattern, VIDEO, (6, 8, 8), (6, 8, 8))
    assert found.mean == found.worst == pytest.approx(1 / pattern.density(_layout(VIDEO)))


def _layout(grid):
    from visattn.geometry.layout import TokenLayout

    return TokenLayout(grid)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="is dilated along axis 2"):
        tile_bounds(Neighborhood((1, 3, 3), 1, (1, 1, 2)), IMAGE, (1, 16, 16), (1, 16, 8))
    with pytest.raises(ValueError, match=r"share=1\.5"):
        end_to_end(2.0, 1.5)
    with pytest.raises(ValueError, match="speedup=0"):
        end_to_end(0, 0.5)
