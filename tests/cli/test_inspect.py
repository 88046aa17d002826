"""``visattn inspect`` on tiny real pipelines: what it prints and draws, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support import tiny
from support.cli import SHAPE, good, made, refused

from visattn.draw.palette import QUERY
from visattn.generation import Job, Loading, load_pipeline, run_job
from visattn.inject import observe
from visattn.readout import Sampler

pytestmark = pytest.mark.usefixtures("folder")

SIZE = [*SHAPE, "--num-inference-steps", "3"]
PROMPT = "a red square"
BASE = ["inspect", PROMPT, "--model", "wan21", *SIZE]


def numbers(capsys, *argv):
    """The JSON of a command."""
    return json.loads(good(capsys, *argv, "--json"))


# ---- what it prints


def test_table_has_a_line_for_every_head(capsys):
    out = good(capsys, *BASE)
    lines = out.splitlines()
    assert lines[0] == "3x6x4, 72 tokens, 72 queries read"
    assert lines[1] == "steps 0, 1, 2 of 3, pass cond"
    names = ["layer", "head", "frame", "place", "window", "columns", "tiles", "shape"]
    assert lines[3].split() == names
    table = [line.split() for line in lines[4 : 5 + tiny.LAYERS * tiny.HEADS]]
    heads = [(str(n), str(h)) for n in range(tiny.LAYERS) for h in range(tiny.HEADS)]
    assert [tuple(row[:2]) for row in table[:-1]] == heads
    assert table[-1][0] == "uniform"
    assert {line.rindex("  ") for line in lines[4:17]} == {lines[3].rindex("  ")}
    assert re.search(r"\n\d+ of 12 heads hold 90 % of their mass in 30 % of the tiles", out)
    assert out.isascii()
    assert max(map(len, lines)) <= 100
    assert made() == []


def test_numbers_are_those_of_the_sampler(capsys):
    found = numbers(capsys, *BASE, "--seed", "3", "--step", "0", "2")
    sampler = Sampler(steps=[0, 2], passes=["cond"], per_step=True)
    pipe = load_pipeline(Loading("wan21"))
    job = Job(PROMPT, seed=3, height=96, width=64, num_frames=9, num_inference_steps=3)
    with observe(pipe, sampler):
        run_job(pipe, job)
    assert found["uniform"] == sampler.chance.numbers()
    assert len(found["heads"]) == 12
    for own, line in zip(found["heads"], sampler.table(), strict=True):
        steps = own.pop("steps")
        assert {**own, "step": None} == line.numbers()
        assert [step["step"] for step in steps] == found["steps"] == [0, 2]
    by_step = [line.shares.numbers() for line in sampler.table(by_step=True)]
    again = numbers(capsys, *BASE, "--seed", "3", "--step", "2", "0", "2")
    assert [step for own in again["heads"] for step in own["steps"]] == [
        {**shares, "step": step, "calls": 1}
        for shares, step in zip(by_step, [0, 2] * 12, strict=True)
    ]
    del found["seconds"], again["seconds"]
    for own in again["heads"]:
        del own["steps"]
    assert found == again
    assert found["job"]["prompt"] == PROMPT
    assert found["model"]["model"] == "wan21"
    assert (found["layout"], found["tokens"], found["window"]) == ("3x6x4", 72, [3, 5, 5])
    assert all(count["sampled"] <= count["of_sequence"] for count in found["tiles"].values())


def test_what_is_read_can_be_chosen(capsys):
    argv = ["--layer", "0", "blocks.2.attn1", "--head", "1", "3", "--step", "1", "--pass", "all"]
    argv += ["--window", "1,3,3", "--tile-size", "8", "--samples", "2"]
    found = numbers(capsys, *BASE, *argv)
    whose = [(x["number"], x["pass"], x["head"], x["calls"]) for x in found["heads"]]
    passes, heads = ("cond", "uncond"), (1, 3)
    assert whose == [(n, p, h, 1) for n in (0, 2) for p in passes for h in heads]
    assert (found["steps"], found["window"], found["tile_size"]) == ([1], [1, 3, 3], 8)
    assert all(count["sampled"] == 2 for count in found["tiles"].values())
    assert found["query_rows"] < 72
    out = good(capsys, *BASE, *argv)
    assert "transformer uncond     2    3 " in out
    assert "step 1 of 3, pass cond, uncond" in out


def test_two_denoisers_have_layers_of_their_own(capsys):
    argv = ["inspect", PROMPT, "--model", "wan22", *SIZE]
    found = numbers(capsys, *argv, "--layer", "1", "--head", "0")
    assert [x["role"] for x in found["heads"]] == ["transformer", "transformer_2"]
    found = numbers(capsys, *argv, "--layer", "transformer_2.blocks.1.attn1", "--head", "0")
    assert [x["role"] for x in found["heads"]] == ["transformer_2"]
    assert 0 not in found["steps"]


def test_text_has_a_column_where_it_is_attended(capsys):
    argv = ["inspect", PROMPT, "--model", "cogvideox", *SIZE, "--layer", "0"]
    out = good(capsys, *argv)
    assert " text " in out and "mass in text tokens" in out
    found = numbers(capsys, *argv, "--pass", "uncond")
    assert found["layout"].startswith("text(")
    assert all(x["text"] > 0 and x["pass"] == "uncond" for x in found["heads"])


@pytest.mark.parametrize("extra", [["--plan", "dense"], ["--compile", '{"backend": "eager"}']])
def test_options_that_change_nothing(capsys, extra):
    own = [*BASE, "--layer", "1", "--num-inference-steps", "1"]
    assert numbers(capsys, *own)["heads"] == numbers(capsys, *own, *extra)["heads"]


def test_a_plan_is_seen_in_the_layers_that_follow(capsys):
    plain, planned = (
        numbers(capsys, *BASE, "--step", "0", "--plan", plan) for plan in ("none", "diagonal(2)")
    )
    assert plain["heads"][:4] == planned["heads"][:4]
    assert plain["heads"][4:] != planned["heads"][4:]
    assert planned["plan"] == "diagonal(2)"


# ---- what it draws


def test_all_heads_are_drawn(capsys):
    out = good(capsys, *BASE, "--output", "heads.PNG", "--step", "1")
    assert out.endswith("\nwrote heads.PNG\n")
    assert made() == ["heads.PNG"]
    with Image.open("heads.PNG") as image:
        assert image.format == "PNG"
        assert image.width < 2294


def test_one_head_is_drawn_with_its_query(capsys):
    argv = [*BASE, "--step", "1", "--layer", "2", "--head", "3", "--output", "head.png"]
    found = numbers(capsys, *argv)
    assert len(found["heads"]) == 1
    with Image.open("head.png") as image:
        assert image.width == 2294
        middle = image.copy()
    good(capsys, *argv, "--query", "0,0,0")
    with Image.open("head.png") as image:
        assert image.tobytes() != middle.tobytes()
        assert QUERY in {color for _, color in image.getcolors(1 << 22)}


# ---- what it refuses


def own(*extra):
    return [*BASE, *extra]


ONE = ["--layer", "0", "--head", "0"]
PNG = ["--output", "a.png"]
BAD = {
    "no prompt": (["inspect", "--model", "wan21"], "PROMPT"),
    "missing model": (["inspect", PROMPT, "--model", "no-such"], "is no folder"),
    "layer too far": (own("--layer", "3"), "'3' does not exist.* layers 0 to 2"),
    "negative layer": (own("--layer", "-1"), "'-1' does not exist"),
    "unknown layer": (own("--layer", "blocks.0.attn2"), "'blocks.0.attn2' does not exist"),
    "one layer unknown": (own("--layer", "0", "x\ny"), "does not exist"),
    "layer of no denoiser": (own("--layer", "transformer_2.blocks.0.attn1"), "does not exist"),
    "no layer": (own("--layer"), "expected at least one"),
    "head too far": (own("--head", "4"), "--head 4 does not exist.* heads 0 to 3"),
    "negative head": (own("--head", "-1"), "heads=-1"),
    "head no number": (own("--head", "first"), "invalid int"),
    "step too far": (own("--step", "3"), "--step 3 does not exist; the steps are 0 to 2"),
    "negative step": (own("--step", "-1"), "--step -1 does not exist"),
    "step that is no more": (own("--step", "2", "--num-inference-steps", "2"), "0 to 1"),
    "unknown pass": (own("--pass", "both"), "invalid choice"),
    "window of two": (own("--window", "3,5"), "three odd"),
    "even window": (own("--window", "3,4,5"), "odd"),
    "empty window": (own("--window", "0,1,1"), "window=0"),
    "window no numbers": (own("--window", "3;5;5"), "--window"),
    "query without a picture": (own(*ONE, "--query", "0,0,0"), "--query is for the picture"),
    "query of many heads": (own(*PNG, "--query", "0,0,0"), "--query is for the picture"),
    "query outside": (own(*ONE, *PNG, "--query", "3,0,0"), r"\(3, 0, 0\) is outside grid 3x6x4"),
    "query of two": (own(*ONE, *PNG, "--query", "1,2"), "--query '1,2'"),
    "negative query": (own(*ONE, *PNG, "--query", "0,-1,0"), "--query"),
    "two passes of one head": (own(*ONE, *PNG, "--pass", "all"), "choose a pass"),
    "query of two denoisers": (
        ["inspect", PROMPT, "--model", "wan22", *SIZE, *ONE, *PNG, "--query", "0,0,0"],
        "such as transformer.blocks.0.attn1",
    ),
    "no tiles": (own("--samples", "0"), "tiles=0"),
    "no tile size": (own("--tile-size", "0"), "tile_size=0"),
    "pass that is not run": (own("--pass", "uncond", "--guidance-scale", "1"), "pass uncond"),
    "no png": (own("--output", "a.jpg"), "must end in .png"),
    "output in no folder": (own("--output", "no/a.png"), "No such file"),
    "output is a folder": (own("--output", "folder.png"), "is a folder"),
    "null byte": (own("--output", "a\0.png"), "null"),
    "plan that is none": (own("--plan", "no-plan.json"), "no-plan.json"),
    "plan for another grid": (own("--plan", "diagonal(99999)", *PNG), "does not fit the grid"),
    "no frames": (own("--num-frames", "0"), "num_frames=0"),
    "shortened option": (own("--lay", "0"), "--lay"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_wrong_input_is_one_line_and_exit_code_2(argv, words, capsys):
    Path("folder.png").mkdir()
    *steps, line = refused(capsys, *argv)
    assert all(step.startswith("step: ") for step in steps)
    assert re.search(words, line), line
