"""``visattn compare``: two outputs, or two plans on a tiny real pipeline."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers.models import WanTransformer3DModel
from support import tiny
from support.cli import SIZE, made, refused, run

from visattn.generation import Job, Loading, load_pipeline, run_job
from visattn.inject import sparse
from visattn.media.video import read_video, write_video
from visattn.metrics import compare_frames
from visattn.patterns import Diagonal

pytestmark = pytest.mark.usefixtures("folder")

PAIR = ["compare", "a red square", "--model", "wan", *SIZE, "--plan-b", "diagonal(4)"]


@pytest.fixture
def clips(folder):
    """Two clips as folders, a and b, [4, 32, 24, 3]."""
    a = torch.rand(4, 32, 24, 3, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1 * torch.rand(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    write_video(a, "a")
    write_video(b, "b")
    return read_video("a"), read_video("b")


def test_two_outputs(capsys, clips):
    code, out, err = run(capsys, "compare", "a", "b", "--json", "--per-frame")
    assert (code, err) == (0, "")
    numbers = json.loads(out)
    assert (numbers.pop("a"), numbers.pop("b")) == ({"path": "a"}, {"path": "b"})
    size = {name: numbers.pop(name) for name in ("frames", "height", "width")}
    assert size == {"frames": 4, "height": 32, "width": 24}
    assert numbers == compare_frames(clips[1], clips[0]).numbers(per_frame=True)
    code, out, _ = run(capsys, "compare", "a", "b", "--per-frame")
    lines = out.splitlines()
    assert lines[:3] == ["A  a", "B  b", "4 frames of 32x24, B against A"]
    assert lines[3] == f"PSNR       {numbers['psnr']:.2f} dB"
    assert lines[4] == f"SSIM       {numbers['ssim']:.4f}"
    assert len(lines) == 8 + 4
    assert lines[8].split() == ["0", *re.findall(r"\S+", lines[8])[1:4], "-", "-"]
    assert "per_frame" not in json.loads(run(capsys, "compare", "a", "b", "--json")[1])


def test_equal_outputs_are_null_in_json_and_inf_in_text(capsys, clips):
    _, out, _ = run(capsys, "compare", "a", "a", "--json")
    assert json.loads(out)["psnr"] is None
    assert json.loads(out)["ssim"] == 1
    assert "PSNR       inf dB\n" in run(capsys, "compare", "a", "a")[1]


def test_outputs_of_different_forms(capsys, clips):
    write_video(clips[0], "a.mp4")
    write_video(clips[0][:1], "a.png")
    write_video(clips[0][:1], "first")
    assert run(capsys, "compare", "a", "a.mp4")[0] == 0
    assert "flicker    -, A -, ratio -" in run(capsys, "compare", "a.png", "first")[1]


def test_output_is_a_page(capsys, clips):
    """With both clips, what they were called, and the figures."""
    code, _, err = run(capsys, "compare", "a", "b", "-o", "page.html")
    assert (code, err) == (0, "")
    page = Path("page.html").read_text()
    assert page.count("data:video/mp4") == 2 or page.count("AAAAIGZ0eXBpc29t") == 2
    assert "b against a" in page
    assert "Receipt of a comparison" in page


def test_output_is_a_report_or_both_side_by_side(capsys, clips):
    code, out, _ = run(capsys, "compare", "a", "b", "--json", "-o", "report.json")
    assert code == 0
    assert Path("report.json").read_text() == out
    run(capsys, "compare", "a", "b", "-o", "both")
    assert torch.equal(read_video("both"), torch.cat(clips, 2))
    run(capsys, "compare", "a", "b", "-o", "both.mp4", "--fps", "8")
    assert read_video("both.mp4").shape == (4, 32, 48, 3)


def test_two_plans_start_from_the_same_noise(capsys):
    """The numbers are those of frames before any encoding."""
    code, out, err = run(capsys, *PAIR, "--json", "--seed", "3")
    assert code == 0
    words = err.splitlines()
    assert words == ["A, step: 1/2", "A, step: 2/2", "B, step: 1/2", "B, step: 2/2"]
    numbers = json.loads(out)
    pipe = load_pipeline(Loading("wan"))
    job = Job("a red square", height=96, width=64, num_frames=9, num_inference_steps=2, seed=3)
    dense = run_job(pipe, job)
    with sparse(pipe, Diagonal(4)):
        other = run_job(pipe, job)
    expected = compare_frames(other.frames, dense.frames).numbers()
    assert {name: numbers[name] for name in expected} == expected
    assert 0 < numbers["max_error"] < 1
    assert numbers["a"]["summary"] is None
    assert len(numbers["b"]["summary"]["layers"]) == tiny.LAYERS
    assert (numbers["a"]["plan"], numbers["b"]["plan"]) == ("none", "diagonal(4)")
    assert all(numbers[side]["seconds"] > 0 for side in "ab")
    assert numbers["seed"] == 3
    assert made() == []


def test_same_plan_twice_is_the_same_to_the_bit(capsys):
    for plan in ("none", "diagonal(4)"):
        argv = [*PAIR[:-1], plan, "--plan", plan]
        code, out, _ = run(capsys, *argv, "--json")
        assert code == 0
        assert json.loads(out)["max_error"] == 0
    out = run(capsys, *PAIR, "--plan", "dense")[1]
    assert re.search(r"A  dense: \d+\.\d\d s, \d+\.\d{3} s a step\nB  diagonal\(4\): ", out)


def test_interrupt_leaves_no_file(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(WanTransformer3DModel, "forward", interrupted)
    assert run(capsys, *PAIR, "-o", "both.mp4") == (130, "", "")
    assert made() == []


BAD = {
    "nothing": (["compare"], "required"),
    "one output": (["compare", "a"], "two outputs"),
    "three outputs": (["compare", "a", "b", "a"], "two outputs"),
    "missing output": (["compare", "a", "no"], "no"),
    "missing mp4": (["compare", "a", "no.mp4"], "no.mp4"),
    "unknown kind": (["compare", "a", "text.txt"], "must end in"),
    "no video": (["compare", "a", "text.mp4"], "text.mp4"),
    "no image": (["compare", "a", "text.png"], "text.png"),
    "empty folder": (["compare", "a", "none"], "no PNG"),
    "other size": (["compare", "a", "wide"], "4 frames of 32x24 and 4 frames of 32x26"),
    "other length": (["compare", "a", "short"], "4 frames of 32x24 and 3 frames"),
    "too small": (["compare", "small", "small"], "smaller than the window"),
    "option of generating": (["compare", "a", "b", "--seed", "1"], "--seed is for generating"),
    "plan alone": (["compare", "a", "b", "--plan", "dense"], "--plan is for generating"),
    "no second plan": ([*PAIR[:-2]], "--plan-b"),
    "two prompts": ([*PAIR, "b"], "unrecognized arguments|one prompt"),
    "unknown plan": ([*PAIR[:-1], "radiall(1)"], "radiall"),
    "plan for another grid": ([*PAIR, "--plan", "diagonal(99999)"], "does not fit the grid"),
    "no frames": ([*PAIR, "--num-frames", "0"], "num_frames=0"),
    "report in no folder": (["compare", "a", "b", "-o", "no/r.json"], "does not exist"),
    "report over a folder": (["compare", "a", "b", "-o", "dir.json"], "is a folder"),
    "wrong suffix": (["compare", "a", "b", "-o", "r.txt"], "must end in"),
    "png of several frames": (["compare", "a", "b", "-o", "r.png"], "one frame"),
    "video in no folder": ([*PAIR, "-o", "no/both.mp4"], "No such file"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_wrong_input_is_one_line_and_exit_code_2(argv, words, capsys, clips):
    write_video(torch.rand(4, 32, 26, 3), "wide")
    write_video(clips[0][:3], "short")
    write_video(torch.rand(1, 8, 8, 3), "small")
    for name in ("text.txt", "text.mp4", "text.png"):
        Path(name).write_text("hello")
    os.mkdir("none")
    os.mkdir("dir.json")
    (line,) = refused(capsys, *argv)
    assert re.search(words, line), line
