"""One palette: a colour is defined once, and pictures and pages take it from there."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
from PIL import Image

import visattn
from visattn.draw.palette import (
    FAMILIES,
    INK,
    PAPER,
    SPARE,
    Color,
    contrast,
    pattern_colors,
    readable_ink,
    rgb,
)
from visattn.draw.plan_picture import draw_plan
from visattn.patterns import PATTERNS, parse_pattern
from visattn.patterns.base.head_pattern import KINDS
from visattn.plan import Plan, Rule
from visattn.plan.show.plan_view import view_plan
from visattn.report import render_page

ROOT = Path(visattn.__file__).parent
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "palette.py"]
PAGES = ("#fdfdfb", "#14171a")  # the backgrounds of the page, light and dark


def definitions(source: str) -> list[int]:
    """Lines that define a colour: a string ``"#rrggbb"`` that is not the ``color`` of a class, or
    numbers of a variable of type ``Color``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            if ast.unparse(node.target) == "color":
                continue
            numbers = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
            if "Color" in ast.unparse(node.annotation) and numbers:
                lines.append(node.lineno)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines += [node.lineno] * bool(re.fullmatch("#[0-9a-fA-F]{6}", node.value))
    colors = {
        part.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "color" and node.value
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant)
    }
    return sorted(set(lines) - colors)


def test_a_colour_is_defined_once():
    assert {
        str(path): lines for path in SOURCES if (lines := definitions(path.read_text("utf-8")))
    } == {}
    colors = [kind.color for kind in KINDS.values() if "color" in vars(kind)]
    assert len({*colors, *SPARE}) == len(colors) + len(SPARE)


def test_definitions_are_found():
    source = 'A: Color = (1, 2, 3)\nB = {"x": "#12ab34"}\nclass C:\n    color: T = "#12ab34"\n'
    assert definitions(source) == [1, 2]


def test_every_pattern_has_a_family_and_a_colour():
    for name, kind in KINDS.items():
        assert re.fullmatch("#[0-9a-f]{6}", vars(kind)["color"]), name
        assert kind.family in FAMILIES, name


def lab(color: Color) -> tuple[float, float, float]:
    """The colour in CIELAB, where a distance of about 2.3 is just visible."""
    linear = [x / 3294.6 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in color]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.0888)
    x, y, z = (
        sum(a * b for a, b in zip(row, linear, strict=True)) / most
        for row, most in zip(rows, white, strict=True)
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def distance(first: str, second: str) -> float:
    pairs = zip(lab(rgb(first)), lab(rgb(second)), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) ** 0.5


def test_colours_are_distinguishable_in_light_and_dark():
    colors = {name: kind.color for name, kind in KINDS.items()}
    assert all(distance(a, b) > 3 for a, b in itertools.combinations(colors.values(), 2))
    static = [colors[name] for name in PATTERNS]
    assert all(distance(a, b) > 8 for a, b in itertools.combinations(static, 2))
    for color in colors.values():
        assert all(contrast(rgb(page), rgb(color)) > 1.3 for page in PAGES)
        assert contrast(readable_ink(rgb(color)), rgb(color)) > 4.1
    assert readable_ink(PAPER) == INK and readable_ink(INK) == PAPER


def test_the_page_has_the_backgrounds_that_are_tested():
    (style,) = re.findall("--paper: light-dark\\((#\\w+), (#\\w+)\\)", render_page(
        {"schema": "visattn.report/1", "kind": "compare", "title": "a"}
    ))
    assert style == PAGES


@pytest.mark.parametrize("name", ["radial", "neighborhood", "halo", "top_blocks", "dense"])
def test_picture_and_page_show_the_same_colour(name):
    kind = KINDS[name]
    head = {"role": "a", "layer": "b", "number": 0, "head": 0, "phase": 0, "family": name}
    report = {"schema": "visattn.report/1", "kind": "search", "title": "a", "heads": [head]}
    assert f".f0{{background:{kind.color};" in render_page(report)
    pattern = parse_pattern(kind.example)
    picture: Image.Image = draw_plan(view_plan(Plan((Rule(pattern),))), title="a")
    assert rgb(kind.color) in {color for _, color in picture.getcolors(1 << 24)}


def test_names_without_a_colour_get_a_spare_one_behind_the_others():
    colors = pattern_colors(["made up", "other", "radial", "stencil"])
    assert list(colors) == ["stencil", "radial", "made up", "other"]
    assert [colors["made up"], colors["other"]] == list(SPARE[:2])
