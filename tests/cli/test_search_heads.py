"""``visattn search-heads`` and ``visattn generate --guidance``: from prompts to heads, to frames
and a record that makes them again."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from support.cli import made, refused, run

from visattn.cli.search_heads import default_objective
from visattn.generation import Job, Loading, default_model, load_pipeline, read_record, run_job
from visattn.guidance import HeadSet, SkipBlock, SoftPAG, caption_score
from visattn.guidance.registry import GUIDANCES
from visattn.media.video import read_video, to_bytes

pytestmark = pytest.mark.usefixtures("folder")

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "1"]
CAPTION = "a red square moves right over the fog"
PLAIN = ["search-heads", "--model", "wan", *SMALL, "-o", "heads.json"]
SEARCH = [*PLAIN, CAPTION, "--objective", "scorer"]
MINE = ["--objective", "mine:red", "--candidates", "{0: [1], 1: None}"]
GUIDED = ["generate", "a red square", "--model", "wan", *SMALL, "-o", "clip"]

SCORES = '''
calls = []

def red(frames, prompt):
    calls.append(prompt)
    return frames[..., 0].mean()

def wrong(frames, prompt):
    raise KeyError("nothing seen")

number = 3
'''


@pytest.fixture
def scores(folder):
    """A module of the working folder."""
    Path("mine.py").write_text(SCORES)
    Path("broken.py").write_text("import no_such_module")
    yield
    sys.modules.pop("mine", None)


def searched(capsys, *argv):
    """stdout of a search that succeeds, with nothing but progress on stderr."""
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    line = r"(without the heads|round \d of \d|the set): \d+/\d+(, \d+ s left)?"
    assert err and all(re.fullmatch(line, own) for own in err.splitlines()), err
    return out


@pytest.mark.usefixtures("scores")
def test_search_writes_heads_that_generate_takes(capsys):
    out = searched(capsys, *SEARCH, *MINE, "--rounds", "2", "--seeds", "0-1", "--scale", "5")
    found = HeadSet.load("heads.json")
    assert (len(found), found.scale, found.objective) == (2, 5.0, "mine:red")
    assert found.provenance["pairs"] == [[CAPTION, 0], [CAPTION, 1]]
    lines = out.splitlines()
    for number, row in enumerate(found.provenance["rounds"], 1):
        layer, head, score = row["added"][0]
        assert lines[number - 1].startswith(f"round {number}: {layer}:{head} ({score:.4f}); mean")
    assert lines[-2:] == [
        "wrote heads.json",
        "use: --guidance \"SoftPAG(heads='heads.json')\"",
    ]
    before = Path("heads.jsonl").read_bytes()
    assert before.count(b"\n") == 1 + 2 * (1 + 5 + 4)
    sys.modules["mine"].calls.clear()
    again = searched(capsys, *SEARCH, *MINE, "--rounds", "2", "--seeds", "0,1", "--scale", "5")
    assert (again, sys.modules["mine"].calls) == (out, [])  # all of it is in the log
    assert Path("heads.jsonl").read_bytes() == before
    code, _, err = run(capsys, *GUIDED, "--guidance", "SoftPAG(heads='heads.json')")
    assert code == 0, err
    [text] = read_record("clip")["job"]["guidance"]
    assert text.startswith("SoftPAG(heads={'blocks.") and "scale=5.0" in text


def test_search_by_the_scorer_as_json(capsys):
    argv = [*SEARCH, "--candidates", "{2: [0, 1]}", "--keep", "{1: {3: 0.5}}"]
    argv += ["--json", "--resume", "my.log"]
    value = json.loads(searched(capsys, *argv, "--batch", "2", "--plan", "diagonal(4)"))
    assert (value["output"], value["log"]) == ("heads.json", "my.log")
    assert value["heads"] == json.loads(Path("heads.json").read_text())
    found = HeadSet.load("heads.json")
    assert found.layers["blocks.1.attn1"] == {3: 0.5}
    assert [own for own in found if own[0] == "blocks.2.attn1"]
    assert found.objective == "visattn.guidance.head_search.objectives:caption_score"
    assert made() == ["heads.json", "my.log"]


@pytest.mark.usefixtures("scores")
def test_candidates_that_fail_are_told_and_the_rest_is_written(capsys, monkeypatch):
    from visattn.guidance.head_search.batched_trials import BatchedTrials

    frames = BatchedTrials.frames

    def limited(self, sets, prompt, seed):
        if any(own.get("blocks.1.attn1", {}).get(2) for own in sets):
            raise torch.OutOfMemoryError("out of memory")
        return frames(self, sets, prompt, seed)

    monkeypatch.setattr(BatchedTrials, "frames", limited)
    code, out, err = run(capsys, *SEARCH, *MINE)
    assert code == 1
    assert "wrote heads.json" in out
    last = err.splitlines()[-1]
    assert last == "visattn: error: blocks.1.attn1:2: out of memory: out of memory"
    assert Path("heads.json").exists()


WRONG = {
    "no output": (["search-heads", CAPTION, "--model", "wan"], "required: --output"),
    "output no json": ([*SEARCH, "-o", "heads"], "must end in .json"),
    "output in no folder": ([*SEARCH, "-o", "no/heads.json"], "in a folder that does not exist"),
    "output over a file": ([*SEARCH, "-o", "other.json"], "exists and is no head set"),
    "no prompts": (PLAIN, "has no visattn_prompts"),
    "prompts twice": ([*SEARCH, "--prompts", "p.txt"], "not both"),
    "no caption": (
        [*PLAIN, "hello", "--objective", "scorer"],
        "fails without any candidate.*caption='hello'",
    ),
    "seed": ([*SEARCH, "--seed", "3"], "use --seeds"),
    "seeds": ([*SEARCH, "--seeds", "3-1"], "--seeds '3-1'"),
    "seeds text": ([*SEARCH, "--seeds", "a"], "--seeds 'a'"),
    "rounds": ([*SEARCH, "--rounds", "0"], "--rounds 0"),
    "too many": ([*SEARCH, "--rounds", "2", "--top-k", "9"], "more than the 12 candidates"),
    "strength": ([*SEARCH, "--strength", "2"], "strength=2.0"),
    "scale": ([*SEARCH, "--scale", "0"], "perturbs nothing"),
    "policy": ([*SEARCH, "--policy", "text"], "invalid choice"),
    "policies": ([*SEARCH, "--policy", "ii_renorm", "--target", "uniform"], "targets are value"),
    "candidates": ([*SEARCH, "--candidates", "3"], "--candidates: heads '3' must be layers"),
    "candidate": ([*SEARCH, "--candidates", "{7: [1]}"], "names the layer 7"),
    "former candidates": (
        [*SEARCH, "--candidates", "3:2,5;7:*"],
        r"the form of older versions; write \{3: \[2, 5\], 7: None\}",
    ),
    "keep no dict": ([*SEARCH, "--keep", "{3: [1]"], "--keep: heads .* no call with literal"),
    "keep strength": ([*SEARCH, "--keep", "{3: {1: 2}}"], "strength 2 in layer 3"),
    "keep": ([*SEARCH, "--keep", "{0: [9]}"], "keep names head 9"),
    "objective needed": (
        [*PLAIN, CAPTION],
        "--objective is needed: model 'wan' names no scorer; give MODULE:FUNCTION as in mine.sc",
    ),
    "objective": ([*SEARCH, "--objective", "mine"], "must be scorer, or MODULE:FUNCTION"),
    "no objective": ([*SEARCH, "--objective", "mine:blue"], "cannot be imported: AttributeError"),
    "no module": ([*SEARCH, "--objective", "no_such:f"], "cannot be imported: ModuleNotFound"),
    "module broken": ([*SEARCH, "--objective", "broken:f"], "cannot be imported: ModuleNotFound"),
    "objective no function": ([*SEARCH, "--objective", "mine:number"], "is no function"),
    "objective fails": ([*SEARCH, "--objective", "mine:wrong"], "KeyError: 'nothing seen'"),
    "log of another": ([*SEARCH, "--resume", "other.json"], "is no log of a search"),
    "log nowhere": ([*SEARCH, "--resume", "no/log"], "does not exist"),
    "image": ([*SEARCH, "--image", "a.png"], "--image cannot be used in a search of heads"),
    "model": ([*SEARCH, "--model", "no-such"], "is no folder"),
    "odd height": ([*SEARCH, "--height", "33"], "divisible"),
}


def test_objective_is_that_of_the_scorer_that_the_model_names(tmp_path):
    assert default_objective(default_model()) is caption_score
    shapes = tmp_path / "visattn_shapes.json"
    shapes.write_text('{"scorer": "captions"}')
    assert default_objective(str(tmp_path)) is caption_score
    shapes.write_text('{"scorer": "os:system"}')
    with pytest.raises(ValueError, match="names the scorer 'os:system'; it must be captions"):
        default_objective(str(tmp_path))
    for model in (str(tmp_path / "no-such"), "user/model"):
        with pytest.raises(ValueError, match=r"--objective is needed: model .* names no scorer"):
            default_objective(model)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, argv, words):
    Path("other.json").write_text('{"mine": 1}')
    Path("p.txt").write_text(CAPTION)
    [line] = refused(capsys, *argv)
    assert re.search(words, line), line
    assert Path("other.json").read_text() == '{"mine": 1}'


# ---- generate


def test_list_names_every_guidance_with_an_example(capsys):
    code, out, err = run(capsys, "generate", "--list-guidance")
    assert (code, err) == (0, "")
    for name, own in GUIDANCES.items():
        assert f"{name}: {own.summary()}\n    --guidance \"{own.example}\"\n" in out
    code, out, _ = run(capsys, "generate", "--list-guidance", "--json")
    assert [own["name"] for own in json.loads(out)] == list(GUIDANCES)


TWO = (
    "SoftPAG(heads={1: [0, 2], 2: {3: 0.5}}, scale=4)",
    "SkipBlock(blocks=[1], passes=['uncond'], start=0)",
)


def test_record_is_enough_to_make_guided_frames_again(capsys):
    argv = [part for text in TWO for part in ("--guidance", text)]
    assert run(capsys, *GUIDED, *argv)[0] == 0
    clip = to_bytes(read_video("clip"))
    record = read_record("clip")
    job = Job(**record["job"])
    assert job.guidance == (
        SoftPAG({1: [0, 2], 2: {3: 0.5}}, scale=4.0),
        SkipBlock(blocks=(1,), passes=("uncond",)),
    )
    assert job.record()["guidance"] == record["job"]["guidance"]
    pipe = load_pipeline(Loading(**{**record["model"], "loras": ()}))
    assert torch.equal(to_bytes(run_job(pipe, job).frames), clip)
    plain = to_bytes(run_job(pipe, Job(**{**record["job"], "guidance": ()})).frames)
    assert not torch.equal(plain, clip)
    for text in TWO:  # each has its part in it
        own = Job(**{**record["job"], "guidance": text})
        assert not torch.equal(to_bytes(run_job(pipe, own).frames), clip)
    kept = [*GUIDED, *argv, "--skip-existing"]
    assert run(capsys, *kept)[1] == "kept clip\n"
    former = [  # as older versions wrote it
        "softpag:heads=1:0,2;2:3@0.5,strength=1.0,policy=all,target=value,scale=4.0,start=0,stop=1.0",
        "slg-uncond:blocks=1,start=0,stop=1.0",
    ]
    written = json.loads(Path("clip.json").read_text())
    written["job"]["guidance"] = former
    Path("clip.json").write_text(json.dumps(written))
    assert Job(**read_record("clip")["job"]).guidance[0] == job.guidance[0]
    assert run(capsys, *kept)[1] == "kept clip\n"
    assert run(capsys, *kept, "--guidance", "SEG(layers=[0])")[1].startswith("wrote clip")


def test_lines_of_a_file_have_guidance_of_their_own(capsys):
    Path("p.jsonl").write_text(
        '{"prompt": "a", "output": "plain", "guidance": []}\n'
        '{"prompt": "a", "output": "one", "guidance": "PAG(layers=[2])"}\n'
        '{"prompt": "a", "output": "usual"}\n'
        '{"prompt": "a", "output": "bad", "guidance": ["pagg()"]}\n'
    )
    argv = ["generate", "--prompts", "p.jsonl", "--model", "wan", *SMALL, "-o", "all"]
    code, out, err = run(capsys, *argv, "--guidance", "SEG(layers=[1])")
    assert code == 1 and out.count("wrote") == 3
    assert "line 4: guidance 'pagg()': unknown guidance 'pagg'" in err.splitlines()[-1]
    texts = [read_record(f"all/{name}")["job"]["guidance"] for name in ("plain", "one", "usual")]
    assert [[own.split("(")[0] for own in each] for each in texts] == [[], ["PAG"], ["SEG"]]


BAD_GUIDANCE = {
    "pagg": "unknown guidance 'pagg', did you mean 'PAG'",
    "SoftPAG(strength=2)": "strength=2",
    "softpag:strength=0.5": "older versions; write SoftPAG(strength=0.5)",
    "SoftPAG(heads='no.json')": "no.json' is no file",
    "SoftPAG(heads={9: [0]})": "names layer 9; there are 3",
    "SoftPAG(heads={0: [7]})": "names head 7",
    "SoftPAG(heads='far.json')": "heads are of another model",
    "SLG(blocks=[7])": "names block 7",
    "SLG(blocks=[1], start=5, stop=9)": "has changed no attention call",
}


@pytest.mark.parametrize(("text", "words"), BAD_GUIDANCE.items(), ids=BAD_GUIDANCE)
def test_wrong_guidance_is_one_line_and_leaves_nothing(capsys, text, words):
    HeadSet({"blocks.0.attn1": {0: 1.0}}, size=(30, 12)).save("far.json")
    line = refused(capsys, *GUIDED, "--guidance", text)[-1]
    assert words in line
