"""The view of a pattern, its picture and its text, against the token rule and the block map."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from visattn import Grid, Segment, TokenLayout
from visattn.attention.backends.reference import pattern_mask
from visattn.draw.canvas import cells_picture, save_png, wrapped
from visattn.draw.palette import EMPTY, KEPT, QUERY
from visattn.draw.pattern_picture import CLASS_COLORS, draw_view, frames_picture, mask_picture
from visattn.draw.pattern_view import axis_samples, order_name, view_pattern, view_text
from visattn.geometry.orders import HilbertOrder
from visattn.patterns import Block, Diagonal, Halo, Neighborhood, Radial, Skip, Stripe, Union

ROOT = Path(__file__).resolve().parents[2]
SMALL = TokenLayout(Grid(4, 5, 6), text_before=3, text_after=9)
LAYOUTS = {
    "one token": TokenLayout(Grid(1, 1, 1)),
    "one frame": TokenLayout(Grid(1, 9, 7), text_after=5),
    "text": SMALL,
    "several grids": TokenLayout(segments=[Grid(2, 3, 4), Segment("prefix", 2), Grid(1, 20, 40)]),
    "no grid": TokenLayout(segments=[Segment("text", 5)]),
    "many frames": TokenLayout(Grid(200, 1, 2)),
    "large frame": TokenLayout(Grid(1, 70, 1300)),
}


def colors(image):
    return {color for _, color in image.getcolors(1 << 20)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pattern", [Union(Diagonal(0.1), Stripe()), Skip()], ids=["union", "skip"])
def test_every_layout_can_be_seen(pattern, layout):
    view = view_pattern(pattern, layout, 128, 64)
    image = draw_view(view)
    assert image.mode == "RGB"
    assert image.width == 2294
    assert 600 < image.height < 3200
    text = view_text(view)
    assert text.isascii()
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert ("Q" in text.splitlines()[-1] or "query" in text) and repr(pattern) in text
    json.dumps(view.numbers())


def test_mask_picture_is_the_rule_in_whole_pixels():
    pattern = Neighborhood((3, 3, 3))
    picture = mask_picture(view_pattern(pattern, SMALL, 16, 16), 300)
    mask = pattern_mask(pattern, SMALL)
    assert picture.size == (2 * SMALL.length, 2 * SMALL.length)
    drawn = torch.tensor(
        [
            [picture.getpixel((2 * k + 1, 2 * q)) == KEPT for k in range(len(mask))]
            for q in range(40)
        ]
    )
    assert torch.equal(drawn, mask[:40])
    assert colors(picture) == {KEPT, EMPTY}


def test_sampled_mask_is_the_rule_at_pixel_centres():
    layout = TokenLayout(Grid(3, 20, 30), text_after=11)
    view = view_pattern(Diagonal(200), layout)
    places = axis_samples(layout.length, 64)
    assert torch.equal(view.mask(64), pattern_mask(Diagonal(200), layout)[places][:, places])


@pytest.mark.parametrize(("limit", "exact"), [(512, True), (7, False)])
def test_block_sample_is_the_status(limit, exact):
    view = view_pattern(Neighborhood((3, 3, 3)), SMALL, 16, 8)
    status = view.block_map.status()
    rows, columns = (axis_samples(count, limit) for count in status.shape)
    assert torch.equal(view.blocks(limit), status[rows][:, columns])
    assert torch.equal(view.blocks(limit), status) == exact
    counts = torch.bincount(status.flatten(), minlength=5).tolist()
    assert list(view.counts().values()) == counts[1:]


def test_axis_samples_hold_the_kept_place():
    assert axis_samples(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert axis_samples(100, 4).tolist() == [12, 37, 62, 87]
    for keep in (0, 24, 25, 99):
        places = axis_samples(100, 4, keep)
        assert keep in places
        assert places.tolist() == sorted(set(places.tolist()))


@pytest.mark.parametrize("query", [None, (0, 0, 0), (3, 4, 5), (2, 0, 5)])
def test_query_sees_its_row_of_the_mask(query):
    view = view_pattern(Neighborhood((3, 3, 3)), SMALL, query=query)
    t, h, w = query or (2, 2, 3)
    assert view.query == 3 + (t * 5 + h) * 6 + w
    assert torch.equal(view.seen, pattern_mask(view.pattern, SMALL)[view.query])
    grid = view.grid_view(0, 9, 9, 9)
    assert grid.query == (t, h, w)
    assert torch.equal(grid.seen.flatten(), view.seen[3:-9])
    assert int(grid.seen.sum()) == 27
    sampled = view.grid_view(0, 2, 2, 2)
    assert bool(sampled.seen[sampled.query])
    assert QUERY in colors(frames_picture(view, 0, 600, 200)[0])


def test_picture_shows_the_classes_that_occur():
    view = view_pattern(Neighborhood((3, 3, 3)), TokenLayout(Grid(4, 5, 6), text_before=16), 16, 16)
    used = colors(draw_view(view))
    counts = view.counts()
    assert counts["partial"]
    assert counts["text"]
    for name, count in counts.items():
        # the legend and the strip along the text use their colours too
        assert (CLASS_COLORS[name] in used) == (count > 0 or name in ("full", "text"))


def test_numbers_of_a_known_pattern():
    numbers = view_pattern(Block((2, 2, 2)), TokenLayout(Grid(2, 4, 4)), 8, 8).numbers()
    assert numbers["density"] == 0.25
    assert numbers["sparsity"] == 0.75
    assert numbers["block_density"] == 0.25
    visited = {"visited": 4, "full": 4, "text": 0, "short": 0, "partial": 0}
    assert numbers["blocks"] == {"query": 4, "key": 4, **visited}
    assert numbers["query"] == {"token": 26, "place": (1, 2, 2), "keys_seen": 8}
    assert numbers["orders"] == {"query": ["boxes 2x2x2"], "key": ["boxes 2x2x2"]}


def test_text_shows_the_block_map_and_the_query():
    text = view_text(view_pattern(Diagonal(4), TokenLayout(Grid(2, 2, 4)), 4, 4, query=(0, 1, 1)))
    lines = text.splitlines()
    begin = lines.index("block map, rows are queries") + 2
    assert lines[begin : begin + 4] == ["  ##++....", "  ++##++..", "  ..++##++", "  ....++##"]
    assert lines[-2:] == ["  .###  ##..", "  #Q##  ...."]
    assert "q" in view_text(view_pattern(Skip(), TokenLayout(Grid(2, 2, 4)))).splitlines()[-1]


def test_order_name_of_an_order_without_parameters():
    assert order_name(HilbertOrder()) == "Hilbert curve"


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_nothing_grows_with_the_square_of_the_tokens():
    layout = TokenLayout(Grid(21, 45, 80), text_before=77)
    with Largest() as largest:
        view = view_pattern(Radial(), layout, 128, 128)
        draw_view(view)
        view_text(view)
    assert 0 < largest.elements < layout.length**2 // 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "radial"}, "pattern='radial' must be a pattern"),
        ({"layout": Grid(1, 2, 3)}, "must be a TokenLayout"),
        ({"block_q": 0}, "block_q=0"),
        ({"block_k": 5000}, "block_k=5000"),
        ({"layout": TokenLayout(Grid(100, 100, 100)), "block_q": 16}, "block pairs"),
        ({"partial": "some"}, "partial='some'"),
        ({"query": (4, 0, 0)}, "query=(4, 0, 0) is outside grid 4x5x6"),
        ({"query": (-1, 0, 0)}, "query=-1"),
        ({"query": (0.5, 0, 0)}, "query=0.5"),
        ({"query": 3}, "query=3 must be three integers"),
        ({"query": (0, 0, 0), "layout": LAYOUTS["no grid"]}, "has no grid"),
        ({"pattern": Diagonal(500)}, "width=500"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        view_pattern(**{"pattern": Radial(), "layout": SMALL, **arguments})
    assert words in str(caught.value)


def test_wrapped_text_fits():
    lines = wrapped("word " * 100, 20, 300, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("word ...")
    assert wrapped("short", 20, 300, 3) == ["short"]


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image = cells_picture(torch.eye(3, dtype=torch.uint8), (EMPTY, KEPT), 2, 4)
    assert image.size == (12, 6)
    target = tmp_path / "a.png"
    target.write_text("old")
    save_png(image, target)
    assert Image.open(target).size == (12, 6)
    with pytest.raises(ValueError, match="must end in"):
        save_png(image, tmp_path / "a.jpg")

    def fail(self, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=r"a\.png"):
        save_png(image, target)
    assert os.listdir(tmp_path) == ["a.png"]


def gallery_script():
    spec = importlib.util.spec_from_file_location(
        "draw_patterns", ROOT / "scripts/draw_patterns.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gallery_is_drawn_small_and_the_same_again(tmp_path):
    script = gallery_script()
    for name in ("a.png", "b.png"):
        save_png(script.gallery(), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert len(first) < 400_000
    with Image.open(script.GALLERY) as committed:
        assert committed.size == script.gallery().size, "run make gallery"


def test_gallery_wants_an_example_of_every_pattern(monkeypatch):
    script = gallery_script()
    monkeypatch.delattr(Halo, "example")
    with pytest.raises(ValueError, match="halo"):
        script.gallery()
    monkeypatch.setattr(Halo, "example", "block(3)", raising=False)
    with pytest.raises(ValueError, match="halo"):
        script.gallery()
