"""``visattn show`` with a plan: text, JSON, pictures, differences, and what is refused."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from support.cli import good, refused

from visattn import Grid, TokenLayout
from visattn.cli.show_plan import layer_paths
from visattn.draw.palette import PAPER, rgb
from visattn.draw.plan_picture import draw_plan
from visattn.patterns import PATTERNS, Dense, Diagonal, Neighborhood, Radial, Skip, SlidingTile
from visattn.pipelines.families import FAMILIES
from visattn.plan import Denoiser, Plan, Rule
from visattn.plan.show.columns import aligned, cell
from visattn.plan.show.plan_view import view_plan
from visattn.plan.show.terminal import plan_text
from visattn.selectors import TopBlocks

GRID = TokenLayout(Grid(3, 8, 8), text_before=4)
LAYERS = [f"blocks.{n}.attn1" for n in range(5)]
PATHS = {"transformer": LAYERS}
A, B = Diagonal(8), Neighborhood((3, 5, 5))
PLAN = Plan(
    rules=(
        Rule(A),
        Rule((A, B, Dense(), B), LAYERS[2]),
        Rule(Skip(), LAYERS[3], pass_="uncond"),
        Rule(B, LAYERS[3], phase=1),
    ),
    dense_layers=(0,),
    dense_steps=(0.2, 1),
    phases=(0.5,),
    geometry=GRID,
    model="some/model",
    denoisers={"transformer": Denoiser("WanTransformer3DModel", 5, 4)},
    evidence={"psnr": list(range(100)), "heads": {str(n): n for n in range(20)}},
    provenance={"kind": "search", "seed": 3},
)

COLORS = {name: rgb(kind.color) for name, kind in PATTERNS.items()}


@pytest.fixture
def saved(alone):
    PLAN.save_pretrained("plan")
    replace(PLAN, rules=(*PLAN.rules, Rule(Skip(), LAYERS[4]))).save_pretrained("other")
    return alone


def test_text_of_a_plan(capsys, saved):
    for name in ("plan", "plan/visattn_plan.json"):
        lines = [" ".join(line.split()) for line in good(capsys, "show", name).splitlines()]
        a, b = (f"{pattern.density(GRID):.3f}" for pattern in (A, B))
        mean = f"{(A.density(GRID) + 2 * B.density(GRID) + 1) / 4:.3f}"
        for line in (
            "model some/model",
            "denoisers transformer: WanTransformer3DModel with 5 layers of 4 heads",
            "geometry text(4) + 3x8x8, 196 tokens",
            "dense layers 0",
            "dense steps the first 20% of the steps and the last 1",
            "phases 2, split at 50% of the steps",
            "transformer.blocks.0.attn1 always 1.000 all dense",
            f"transformer.blocks.1.attn1 always {a} all p1",
            f"transformer.blocks.2.attn1 always {mean} p1: 0; p2: 1, 3; dense: 2",
            f"transformer.blocks.3.attn1 phase 0 other passes {a} all p1",
            "phase 0 uncond 0.000 all skip",
            f"phase 1 {b} all p2",
            f"p1 = Diagonal(width=8), density {a}",
            "evidence",
            "and 8 more; --json has them",
            "kind: search",
            "seed: 3",
        ):
            assert line in lines
        assert any(line.endswith("... (100 values)") for line in lines)


def test_equal_neighbours_stand_in_one_line():
    plan = replace(PLAN, rules=(Rule(A),), phases=())
    lines = plan_text(view_plan(plan, paths=PATHS)).splitlines()
    rows = [line.split("  ")[0] for line in lines if line.startswith("transformer.")]
    assert rows == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1 and 3 more"]


def test_mean_density_counts_layers_passes_and_phases():
    a, b, skip = (own.density(GRID) for own in (A, B, Skip()))
    second = (a + 2 * b + 1) / 4
    third = ((a + skip) / 2 + b) / 2
    assert view_plan(PLAN, paths=PATHS).density == pytest.approx((1 + a + second + third + a) / 5)
    third = 0.9 * (a + skip) / 2 + 0.1 * b
    later = replace(PLAN, phases=(0.9,))
    assert view_plan(later, paths=PATHS).density == pytest.approx((1 + a + second + third + a) / 5)


def test_another_grid_keeps_the_text(capsys, saved):
    numbers = json.loads(good(capsys, "show", "plan", "--grid", "4x8x8", "--json"))
    assert numbers["tokens"] == [["text", 4], ["grid", 4, 8, 8]]
    assert numbers["patterns"]["p1"]["density"] == round(
        A.density(TokenLayout(Grid(4, 8, 8), text_before=4)), 6
    )
    assert "at text(4) + 4x8x8" in good(capsys, "show", "plan", "--grid", "4x8x8")
    numbers = json.loads(good(capsys, "show", "plan", "--text-after", "7", "--json"))
    assert numbers["tokens"] == [["grid", 3, 8, 8], ["text", 7]]


def test_json_of_a_plan(capsys, saved):
    numbers = json.loads(good(capsys, "show", "plan", "--json"))
    assert Plan.from_json(json.dumps(numbers["plan"])) == PLAN
    assert numbers["density"] == round(view_plan(PLAN, paths=PATHS).density, 6)
    rows = numbers["layers"]
    assert [row["layer"] for row in rows] == LAYERS[:3] + [LAYERS[3]] * 3 + LAYERS[4:]
    assert rows[2]["heads"] == ["p1", "p2", "dense", "p2"]
    assert (rows[4]["phase"], rows[4]["pass"]) == (0, "uncond")
    assert numbers["patterns"]["p2"] == {
        "pattern": repr(B), "density": round(B.density(GRID), 6), "misfit": None
    }


def test_difference_of_two_plans(capsys, saved):
    assert good(capsys, "show", "plan", "--diff", "plan") == "the same\n"
    text = good(capsys, "show", "plan", "--diff", "other")
    change = f"always  {A.density(GRID):.3f} -> 0.000  all 4  p1 -> skip"
    assert f"transformer.blocks.4.attn1  {change}" in text
    numbers = json.loads(good(capsys, "show", "plan", "--diff", "other", "--json"))
    assert numbers["same"] is False
    assert numbers["changes"][0]["layers"] == [LAYERS[4]]
    assert "p1 -> p2" in good(capsys, "show", "radial", "--diff", "radial(0.2)", "--grid", "3x8x8")


def test_what_is_not_known_is_said(capsys, saved):
    Plan((Rule(A), Rule(B, "x.9"), Rule(B, "x.10"))).save_pretrained("small")
    text = good(capsys, "show", "small")
    assert "not known without a layout, which --grid gives" in text
    assert text.index("x.9") < text.index("x.10") < text.index("other layers")
    text = good(capsys, "show", "small", "--grid", "3x8x8")
    assert "does not say how many layers" in text
    Plan((Rule(TopBlocks(0.25)),), geometry=GRID).save_pretrained("dynamic")
    assert "choose what they see at run time" in good(capsys, "show", "dynamic")
    wide = Diagonal(999)
    Plan((Rule(wide),), geometry=GRID).save_pretrained("misfit")
    text = good(capsys, "show", "misfit")
    assert "does not fit p1" in text
    assert "p1 = Diagonal(width=999), does not fit: width=999 must be below" in text


def test_layers_without_known_paths_have_numbers():
    plan = replace(PLAN, rules=(Rule(A),), phases=())
    view = view_plan(plan)
    assert [row.layer for row in view.rows] == ["0", "1", "2", "3", "4"]
    assert view.density == pytest.approx((1 + 4 * A.density(GRID)) / 5)
    assert "transformer, layer 1 and 3 more" in plan_text(view)
    assert view_plan(PLAN).density is None  # it names paths, and which numbers they have is unknown


@pytest.mark.parametrize("kind", FAMILIES)
def test_paths_of_every_family_are_known(kind):
    plan = Plan(denoisers={"transformer_2": Denoiser(kind, 3, 4)})
    if len(FAMILIES[kind].blocks) > 1:  # how many blocks each stack has, a plan does not say
        assert layer_paths([plan]) == {}
        return
    [(role, paths)] = layer_paths([plan]).items()
    assert role == "transformer_2"
    assert len(set(paths)) == 3
    assert layer_paths([Plan(denoisers={"unet": Denoiser("Other", 3, 4)})]) == {}


def test_a_plan_that_names_all_layers_of_two_stacks_is_shown_in_their_order():
    kind = "HunyuanVideoTransformer3DModel"
    paths = [f"{own}transformer_blocks.{n}.attn" for own in ("", "single_") for n in (2, 10)]
    rules = [Rule(Diagonal(2 + n), layer=path) for n, path in enumerate(reversed(paths))]
    denoisers = {"transformer": Denoiser(kind, 4, 2)}
    plan = Plan(tuple(rules), denoisers=denoisers, geometry=GRID)
    assert layer_paths([plan]) == {"transformer": paths}
    view = view_plan(plan, paths=layer_paths([plan]))
    assert view.density is not None
    text = plan_text(view)
    assert "other layers" not in text
    assert [text.index(path) for path in paths] == sorted(text.index(path) for path in paths)
    assert layer_paths([replace(plan, rules=plan.rules[1:])]) == {}


def test_nothing_of_a_file_controls_the_terminal(capsys, saved):
    evil = "\x1b[2J\r\u202e\n"
    own = {evil: evil, "b": {evil: [evil]}}
    plan = Plan((Rule(A, layer=f"a{evil}"),), model=evil, provenance=own)
    plan.save_pretrained("evil")
    PLAN.save_pretrained("plain")
    for argv in (["evil"], ["plain", "--diff", "evil"]):
        assert all(line.isprintable() for line in good(capsys, "show", *argv).splitlines())


def test_picture_has_a_cell_for_every_head(capsys, saved):
    assert good(capsys, "show", "plan", "--output", "plan.png") == "wrote plan.png\n"
    with Image.open("plan.png") as picture:
        picture.load()
        colors = {color for _, color in picture.getcolors(1 << 24)}
    for family in ("dense", "skip", "diagonal", "neighborhood"):
        assert COLORS[family] in colors
    assert COLORS["radial"] not in colors


def areas(view):
    """Pixels of each family's colour."""
    counts = {c: n for n, c in draw_plan(view, title="x").getcolors(1 << 24)}
    return {name: counts.get(color, 0) for name, color in COLORS.items()}


def test_picture_has_a_map_for_each_phase_and_pass_that_differs():
    plan = replace(PLAN, rules=(Rule(A),), phases=())
    one = areas(view_plan(plan, paths=PATHS))
    assert one["diagonal"] > 3 * one["dense"] > 0
    same = replace(plan, phases=(0.5,))
    assert areas(view_plan(same, paths=PATHS)) == one
    heights = [
        draw_plan(view_plan(own, paths=PATHS), title="x").height
        for own in (
            plan,
            replace(same, rules=(Rule(A), Rule(B, phase=1))),
            replace(plan, rules=(Rule(A), Rule(B, pass_="cond"), Rule(Skip(), pass_="uncond"))),
        )
    ]
    assert heights[0] < heights[1] < heights[2]


def test_pictures_of_odd_plans():
    heads = tuple(Diagonal(n) for n in range(40))
    pictures = [
        Plan((Rule(Radial()),)),
        Plan((Rule(TopBlocks(0.5)), Rule(SlidingTile(2, 3), "x")), geometry=GRID),
        replace(PLAN, rules=(Rule(heads),), denoisers={"unet": Denoiser("Other", 70, 40)}),
        replace(PLAN, rules=(Rule(A),), denoisers={"unet": Denoiser("Other", 3, 300)}),
    ]
    for plan in pictures:
        picture = draw_plan(view_plan(plan), title="a\nb" * 300)
        assert picture.width <= 4400
        assert picture.getpixel((0, 0)) == PAPER
    with pytest.raises(ValueError, match="a picture shows at most"):
        draw_plan(
            view_plan(replace(PLAN, denoisers={"unet": Denoiser("Other", 1000, 1000)}, rules=())),
            title="x",
        )


WRONG = {
    "word that is nothing": (["radiall"], "did you mean 'radial'"),
    "word far from everything": (["qqqq"], "'qqqq' is no pattern, and no file, folder or hub id"),
    "auto": (["auto"], "is no pattern, and no file"),
    "none": (["none"], "is no pattern, and no file"),
    "missing file": (["missing.json"], "is no file, no folder and no hub id"),
    "folder without a plan": (["empty"], "holds no visattn_plan.json"),
    "query of a plan": (["plan", "--query", "1,1,1"], "--query is for patterns"),
    "block of a plan": (["plan", "--block", "64"], "--block is for patterns"),
    "policy of a plan": (["plan", "--partial", "drop"], "--partial is for patterns"),
    "picture of a difference": (["plan", "--diff", "other", "--output", "a.png"], "no picture"),
    "difference to nothing": (["plan", "--diff", "qqqq"], "'qqqq' is no pattern"),
    "difference of nothing": (["--diff", "plan"], "give a pattern"),
    "query of a difference": (["radial", "--diff", "plan", "--query", "1,1,1"], "--query"),
    "huge grid": (["plan", "--grid", "9999x9999x9999"], "at most 4194304"),
    "bad grid": (["plan", "--grid", "3"], "--grid '3' must be"),
    "damaged": (["damaged.json"], "plan 'damaged.json' is not JSON"),
    "no png": (["plan", "--output", "a.jpg"], "must end in .png"),
    "list and plan": (["plan", "--list"], "--list takes no"),
}


@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line(argv, words, capsys, saved):
    (saved / "empty").mkdir()
    (saved / "damaged.json").write_text(PLAN.to_json()[:-30])
    [line] = refused(capsys, "show", *argv)
    assert words in line


def test_long_patterns_are_no_file_names(capsys):
    text = f"union({', '.join(['diagonal(8)'] * 40)})"
    assert "density" in good(capsys, "show", text)


def test_numbers_in_tables_are_aligned_to_the_right():
    table = [("n", "share", "name"), ("10", cell(0.5), "a"), ("9", cell(None), "bcd")]
    assert aligned(table, numbers=2) == [
        " n  share  name",
        "10  0.500  a",
        " 9      -  bcd",
    ]
    assert aligned(table, numbers=3)[1] == "10  0.500     a"
    assert aligned(table)[2] == "9   -      bcd"
