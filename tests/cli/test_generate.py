"""``visattn generate`` on tiny real pipelines: what it makes and what it records."""

import json
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models import WanTransformer3DModel
from support import tiny
from support.cli import GENERATE, SIZE, good, made, run

from visattn.generation import (
    GenerationError,
    Job,
    Loading,
    Lora,
    load_pipeline,
    read_prompts,
    read_record,
    run_job,
)
from visattn.generation.cut_texts import cut_texts
from visattn.generation.job import frame_rate
from visattn.generation.loading import _dtype, pick_device
from visattn.generation.prompts import read_prompt_lines
from visattn.generation.silence_logs import quiet
from visattn.inject import apply_plan
from visattn.media.video import read_rate, read_video, to_bytes, write_video
from visattn.metrics import psnr
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule, read_plan

pytestmark = pytest.mark.usefixtures("folder")

STEPS = ["step: 1/2", "step: 2/2"]
JOB = Job("a red square", height=96, width=64, num_frames=9, num_inference_steps=2)  # of GENERATE


@pytest.fixture(scope="session")
def plain(models):
    """The frames of GENERATE, as they are stored."""
    return to_bytes(run_job(load_pipeline(Loading(str(models / "wan21"))), JOB).frames)


# ---- what it makes


@pytest.mark.parametrize("plan", ["none", "diagonal(4)"])
@pytest.mark.parametrize("model", tiny.PIPELINES)
def test_every_family_makes_its_frames(capsys, model, plan):
    argv = ["generate", "a red square", "--model", model, *SIZE, "--plan", plan, "-o", "clip"]
    code, out, err = run(capsys, *argv)
    assert (code, out.startswith("wrote clip: 9 frames of 96x64 in ")) == (0, True)
    assert out.count("\n") == 1
    assert [line.split(",")[0] for line in err.splitlines()] == STEPS
    assert read_video("clip").shape == (9, 96, 64, 3)
    record = read_record("clip")
    assert record["summary"] is None if plan == "none" else record["summary"]["layers"]
    assert record["backend_chosen"]["backend"] in ("blockwise", "triton")


def test_frames_are_those_of_the_pipeline_itself(capsys):
    good(capsys, *GENERATE, "--output", "clip", "--seed", "7")
    pipe = load_pipeline(Loading("wan"))
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 96, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    noise = torch.Generator().manual_seed(7)
    own = pipe("a red square", generator=noise, output_type="pt", **sizes).frames[0]
    assert torch.equal(to_bytes(read_video("clip")), to_bytes(own.permute(0, 2, 3, 1)))


def test_same_seed_same_frames_in_every_form(capsys, plain):
    good(capsys, *GENERATE, "--output", "a/", "--seed", "0")
    good(capsys, *GENERATE, "--output", "c", "--seed", "1")
    good(capsys, *GENERATE, "--output", "clip.mp4")
    a, c, clip = map(read_video, ("a", "c", "clip.mp4"))
    assert torch.equal(to_bytes(a), plain)
    assert not torch.equal(a, c)
    assert psnr(clip, a).clip > psnr(clip, c).clip  # an mp4 has losses
    good(capsys, *GENERATE, "--output", "clip.mp4")  # what is there is replaced
    assert torch.equal(read_video("clip.mp4"), clip)


def test_one_frame_is_a_png(capsys):
    argv = [*GENERATE, "--num-frames", "1", "--output", "still.PNG"]
    assert "1 frame of 96x64" in good(capsys, *argv)
    assert read_video("still.PNG").shape == (1, 96, 64, 3)
    assert made() == ["still.PNG", "still.PNG.json"]


def test_default_output_is_named_in_the_help(capsys):
    good(capsys, *GENERATE)
    assert made() == ["visattn.mp4", "visattn.mp4.json"]
    assert "visattn.mp4" in good(capsys, "generate", "--help")


def test_json_says_what_was_made(capsys):
    (item,) = json.loads(good(capsys, *GENERATE, "-o", "clip.mp4", "--json"))
    assert item.pop("seconds") > 0
    assert item == {
        "item": "",
        "status": "made",
        "error": None,
        "output": "clip.mp4",
        "record": "clip.mp4.json",
        "prompt": "a red square",
        "seed": 0,
        "frames": [9, 96, 64],
        "notes": [],
    }


def test_several_videos_have_the_seeds_that_follow(capsys):
    good(capsys, *GENERATE, "--num-videos-per-prompt", "2", "--seed", "4", "-o", "clip")
    good(capsys, *GENERATE, "--seed", "5", "-o", "own")
    assert not (Path("clip")).exists()
    assert torch.equal(read_video("clip-seed5"), read_video("own"))
    assert not torch.equal(read_video("clip-seed4"), read_video("own"))


def test_what_the_pipeline_rounds_is_said(capsys):
    out = good(capsys, *GENERATE, "--num-frames", "10", "-o", "clip")
    assert "note: num_frames is 9 instead of the requested 10\n" in out
    assert "note: diffusers: `num_frames - 1` has to be divisible by 4" in out
    assert read_record("clip")["notes"]


def test_image_to_video(capsys):
    write_video(torch.full((1, 96, 64, 3), 0.7), "first.png")
    argv = ["generate", "a red square", "--model", "i2v", *SIZE, "-o"]
    good(capsys, *argv, "white", "--image", "first.png")
    write_video(torch.full((1, 96, 64, 3), 0.2), "first.png")
    good(capsys, *argv, "black", "--image", "first.png")
    assert not torch.equal(read_video("white"), read_video("black"))
    hashes = {read_record(name)["job"]["image_sha256"] for name in ("white", "black")}
    assert len(hashes) == 2


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "option",
    [
        ["--vae-tiling"],
        ["--vae-slicing"],
        ["--attention-backend", "native"],
        ["--compile", '{"backend": "eager"}'],
        ["--device", "cpu"],
        ["--device-map", "cpu"],
        ["--dtype", "fp32"],
        ["--trust-remote-code"],
        ["--guidance-scale", "5"],
        ["--plan", "dense"],
    ],
    ids=" ".join,
)
def test_options_that_change_no_frame(capsys, plain, option):
    good(capsys, *GENERATE, "-o", "clip", *option)
    assert torch.equal(to_bytes(read_video("clip")), plain)


@pytest.mark.parametrize(
    "option",
    [
        ["--negative-prompt", "blue circle"],
        ["--guidance-scale", "2"],
        ["--num-inference-steps", "3"],
        ["--dtype", "bfloat16"],
        ["--plan", "diagonal(4)"],
    ],
    ids=" ".join,
)
def test_options_that_change_the_frames(capsys, plain, option):
    good(capsys, *GENERATE, "-o", "clip", *option)
    assert not torch.equal(to_bytes(read_video("clip")), plain)


def save_lora(folder, seed=9):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = tiny.wan_transformer(0)
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config)
    weights = get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=weights)


def test_lora_is_put_on_by_its_weight(capsys, plain):
    save_lora("lora")
    with_scale = json.dumps({"lora_id": "lora", "lora_scale": 0.0, "adapter_name": "mine"})
    good(capsys, *GENERATE, "-o", "full", "--lora", "lora")
    good(capsys, *GENERATE, "-o", "none", "--lora", with_scale)
    assert not torch.equal(to_bytes(read_video("full")), plain)
    assert torch.equal(to_bytes(read_video("none")), plain)
    assert read_record("none")["model"]["loras"][0]["lora_scale"] == 0.0


def test_lora_is_put_on_both_denoisers_or_on_the_one_that_is_named(capsys):
    """Wan 2.2 has two; LoRAs for it often come as two files."""
    save_lora("high", 9)
    save_lora("low", 10)
    out = good(capsys, *GENERATE, "--model", "wan22", "-o", "clip", "--lora", "high")
    note = "lora 'high' is on transformer and transformer_2; its key 'role' selects one"
    assert f"note: {note}\n" in out and read_record("clip")["notes"] == [note]
    both = load_pipeline(Loading("wan22", loras=(Lora("high", 0.5),)))
    files = {"transformer": Lora("high", 0.5, role="transformer")}
    files["transformer_2"] = Lora.read(
        '{"lora_id": "low", "lora_scale": 2, "role": "transformer_2", "adapter_name": "mine"}'
    )
    apart = load_pipeline(Loading("wan22", loras=tuple(files.values())))
    bare = tiny.wan22()

    def weight(pipe, role):
        """The first query projection with its active adapters merged into it."""
        return getattr(pipe, role).blocks[0].attn1.to_q(torch.eye(tiny.HEADS * tiny.DIM))

    def delta(pipe, role):
        return weight(pipe, role) - weight(bare, role)

    with torch.no_grad():
        one, other = delta(both, "transformer"), delta(both, "transformer_2")
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(delta(apart, "transformer"), one, atol=1e-6, rtol=1e-4)
        save = load_pipeline(Loading("wan22", loras=(Lora("low", 2.0),)))
        low = delta(save, "transformer_2")
        torch.testing.assert_close(delta(apart, "transformer_2"), low, atol=1e-6, rtol=1e-4)
        assert not torch.allclose(low, one, atol=1e-3)


def test_an_empty_negative_prompt_without_guidance_is_none(capsys):
    good(capsys, *GENERATE, "-o", "clip", "--guidance-scale", "1", "--negative-prompt", " ")
    good(capsys, *GENERATE, "-o", "none", "--guidance-scale", "1")
    assert torch.equal(read_video("clip"), read_video("none"))


def test_second_denoiser_has_a_guidance_scale_of_its_own(capsys):
    argv = [*GENERATE, "--model", "wan22", "-o"]
    good(capsys, *argv, "same", "--guidance-scale", "5", "--guidance-scale-2", "5")
    good(capsys, *argv, "none", "--guidance-scale", "5")
    # the passes of random weights are nearly equal: a small scale changes less than 1/255
    good(capsys, *argv, "other", "--guidance-scale", "5", "--guidance-scale-2", "1e6")
    same, none, other = map(read_video, ("same", "none", "other"))
    assert torch.equal(same, none) and not torch.equal(same, other)
    assert read_record("other")["settings"]["guidance_scale_2"] == 1e6


# ---- what it records


@pytest.mark.parametrize("plan", ["none", "radial(decay=0.2)"])
def test_record_is_enough_to_make_the_frames_again(capsys, plan):
    good(
        capsys, *GENERATE, "-o", "clip", "--seed", "3", "--plan", plan, "--negative-prompt", "blue"
    )
    record = json.loads(Path("clip.json").read_text())
    assert record == read_record("clip")
    job = Job(**{key: value for key, value in record["job"].items() if key != "image_sha256"})
    loading = Loading(**{**record["model"], "loras": ()})
    pipe = load_pipeline(loading)
    if record["plan"] is not None:
        apply_plan(pipe, Plan.from_json(json.dumps(record["plan"])), backend=record["backend"])
    again = run_job(pipe, job)
    assert torch.equal(to_bytes(again.frames), to_bytes(read_video("clip")))
    write_video(again.frames, "again")
    for name in os.listdir("clip"):
        assert Path("again", name).read_bytes() == Path("clip", name).read_bytes()


def test_record_holds_all_that_made_it_and_no_secret(capsys):
    good(capsys, *GENERATE, "-o", "clip.mp4", "--plan", "diagonal(4)", "--token", "hf_secret_token")
    text = Path("clip.mp4.json").read_text()
    assert "hf_secret" not in text
    record = json.loads(text)
    assert record["schema"] == "visattn.generation/1"
    assert (record["job"]["prompt"], record["job"]["seed"]) == ("a red square", 0)
    assert record["model"]["model"] == "wan"
    assert record["settings"]["guidance_scale"] == 5.0  # the pipeline's own default
    assert record["settings"]["max_sequence_length"] == 512
    assert record["pipeline"]["class"] == "WanPipeline"
    assert record["pipeline"]["scheduler"]["config"]["flow_shift"] == 3.0
    assert record["pipeline"]["parts"]["transformer"]["dtype"] == "float32"
    assert record["device"] == "cpu" or record["device"].startswith("cuda")
    assert record["plan"]["patterns"] == ["Diagonal(width=4)"]
    assert record["backend"] == "auto"
    layers = record["summary"]["layers"]
    assert [row["sparse_calls"] for row in layers] == [4] * tiny.LAYERS  # 2 steps of 2 passes
    assert {"visattn", "python", "torch", "diffusers", "transformers"} <= set(record["versions"])
    assert record["seconds"]["generate"] > 0 < record["seconds"]["load"]
    assert len(record["seconds"]["steps"]) == 1
    size = {"name": "clip.mp4", "frames": 9, "height": 96, "width": 64}
    assert size.items() <= record["output"].items()


def test_a_model_with_padded_text_and_true_guidance(capsys):
    own = ["generate", "a red square", "--model", "hunyuanvideo", *SIZE, "-o", "clip.mp4"]
    guidance = ["--negative-prompt", "a blue circle", "--true-cfg-scale", "2"]
    good(capsys, *own, *guidance, "--plan", "diagonal(4)")
    record = json.loads(Path("clip.mp4.json").read_text())
    settings = {"true_cfg_scale": 2.0, "guidance_scale": 6.0, "negative_prompt": "a blue circle"}
    assert settings.items() <= record["settings"].items()
    layers = record["summary"]["layers"]
    assert [row["sparse_calls"] for row in layers] == [4] * tiny.LAYERS  # 2 steps of 2 passes


# ---- a file of prompts


def prompts(*lines):
    Path("prompts.jsonl").write_text("\n".join(lines) + "\n")
    return ["generate", "--prompts", "prompts.jsonl", "--model", "wan", *SIZE, "-o", "all"]


def test_prompts_are_made_one_by_one(capsys):
    argv = prompts(
        '{"prompt": "a red square"}',
        "",
        '{"prompt": "blue circle", "seed": 3, "output": "more/circle"}',
        '{"prompt": "still", "num_frames": 1, "guidance_scale": null}',
    )
    code, out, err = run(capsys, *argv, "--seed", "1")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "wrote all/0001.mp4",
        "wrote all/more/circle",
        "wrote all/0004.png",
    ]
    assert err.splitlines()[0].startswith("line 1, step: 1/2")
    assert len(err.splitlines()) == 6
    good(capsys, *GENERATE, "--seed", "1", "-o", "own.mp4")
    assert torch.equal(read_video("all/0001.mp4"), read_video("own.mp4"))
    argv = ["generate", "blue circle", "--model", "wan", *SIZE, "--seed", "3", "-o", "circle"]
    good(capsys, *argv)
    assert torch.equal(read_video("all/more/circle"), read_video("circle"))


def test_failing_items_are_told_at_the_end(capsys):
    argv = prompts(
        '{"prompt": "a red square", "output": "a.png"}',
        '{"prompt": "trunc',
        '["prompt"]',
        '{"prompt": "a", "sed": 1}',
        '{"seed": 1}',
        '{"prompt": "a", "height": 95}',
        '{"prompt": "a", "num_frames": "9"}',
        '{"prompt": "a", "image": "missing.png"}',
        '{"prompt": "a", "output": "../a"}',
        '{"prompt": "a", "output": "/tmp/a"}',
        '{"prompt": "a", "output": 3}',
        '{"prompt": "a", "output": "a.gif"}',
        '{"prompt": "a red square", "output": "good"}',
        '{"prompt": "a", "output": "good"}',
    )
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out.startswith("wrote all/good: 9 frames")
    steps, errors = err.splitlines()[:2], err.splitlines()[2:]
    assert steps == [f"line 13, {step}" for step in STEPS]
    numbers = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14)
    assert [line.split(": ")[2] for line in errors] == [f"line {n}" for n in numbers]
    assert all(line.startswith("visattn: error: ") for line in errors)
    assert "unknown key 'sed'" in errors[3]
    assert sorted(os.listdir("all")) == ["good", "good.json"]
    code, out, _ = run(capsys, *argv, "--json", "--skip-existing")
    rows = json.loads(out)
    assert code == 1
    assert [row["status"] for row in rows].count("kept") == 1
    assert sum(row["error"] is not None for row in rows) == 13


def test_an_error_of_any_type_ends_one_item_alone(capsys, monkeypatch):
    forward = WanTransformer3DModel.forward

    def broken(self, *args, **options):
        monkeypatch.setattr(WanTransformer3DModel, "forward", forward)
        raise NameError("name 'ftfy' is not defined")

    monkeypatch.setattr(WanTransformer3DModel, "forward", broken)
    code, out, err = run(capsys, *prompts('{"prompt": "a"}', '{"prompt": "a", "output": "b"}'))
    assert (code, out.startswith("wrote all/b: ")) == (1, True)
    told = "visattn: error: line 1: WanPipeline failed: NameError: name 'ftfy' is not defined"
    assert err.splitlines()[-1] == told

    def refused(*args, **options):
        raise AssertionError("of a library")

    monkeypatch.setattr("visattn.cli.generate.read_one_plan", refused)
    code, out, err = run(capsys, *GENERATE)
    assert (code, out) == (2, "")
    assert err == "visattn: error: AssertionError: of a library (VISATTN_DEBUG=1 shows where)\n"
    monkeypatch.setenv("VISATTN_DEBUG", "1")
    code, _, err = run(capsys, *GENERATE)
    assert (code, err.splitlines()[0]) == (2, "Traceback (most recent call last):")
    assert err.endswith("\nvisattn: error: AssertionError: of a library\n")


LONG = "x" * 10**6
ODD_LINES = {  # a line, and the words about it
    '{"prompt": null}': "it has no prompt",
    '{"prompt": 3}': "prompt=3 must be text",
    '{"prompt": "\\ud800"}': "no Unicode character",
    '{"prompt": "a", "negative_prompt": "\\udfff"}': "no Unicode character",
    '{"prompt": "a", "prompt": "b"}': "it holds the key 'prompt' twice",
    '{"prompt": "a", "seed": true}': "seed=True must be an integer",
    '{"prompt": "a", "fps": NaN}': "it holds NaN",
    '{"prompt": "a", "guidance": 5}': "guidance",
    '{"prompt": "a", "output": ["a"]}': "must be the name",
    '{"prompt": "a", "output": "a\\u001b[31m.png"}': "must be a name of printable characters",
    '{"prompt": "a", "output": "a\\nb.png"}': "must be a name of printable characters",
    '{"prompt": "a", "output": "link/a.png"}': "is a link that leads out of the output folder",
    f'{{"prompt": "a", "output": "{LONG}"}}': "too long",
    f'{{"prompt": "a", "{LONG}": 1}}': "it has the unknown key 'xxx",
    f'{{"prompt": "a", "image": "{LONG}"}}': "too long",
    f'{{"prompt": "a", "fps": "{LONG}"}}': "must be a number",
}


def test_odd_lines_are_told_in_a_line_each(capsys):
    Path("away").mkdir()
    Path("all").mkdir()
    Path("all/link").symlink_to("../away")
    code, out, err = run(capsys, *prompts(*ODD_LINES), "--num-frames", "1")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [
        f"line {n}" for n in range(1, len(ODD_LINES) + 1)
    ]
    for line, words in zip(lines, ODD_LINES.values(), strict=True):
        assert words in line and len(line) < 2100 and line.isprintable(), line[:300]
    assert os.listdir("away") == [] and os.listdir("all") == ["link"]


def test_names_of_a_command_line_are_shown_without_control_characters(capsys):
    out = good(capsys, *GENERATE, "--num-frames", "1", "-o", "a\x1b[31m\u202eb.png")
    assert out.startswith("wrote a\\x1b[31m\\u202eb.png: 1 frame")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_prompts_of_every_marked_encoding(capsys, encoding):
    text = '{"prompt": "café \u2028 a"}\r\n\r\n{"prompt": "b"}\r\n'
    Path("p.jsonl").write_bytes(text.encode(encoding))
    items = read_prompts("p.jsonl", "all", {})
    assert [(own.label, own.job.prompt) for own in items] == [
        ("line 1", "café \u2028 a"),
        ("line 3", "b"),
    ]
    Path("p.txt").write_bytes("café \u2028 a\r\n\rb\n".encode(encoding))
    assert read_prompt_lines("p.txt") == ["café \u2028 a", "b"]
    plan = Plan((Rule(Diagonal(4)),))
    Path("plan.json").write_bytes(plan.to_json().encode(encoding))
    assert read_plan("plan.json") == plan


def test_nothing_is_printed_when_all_items_fail(capsys):
    code, out, err = run(capsys, *prompts('{"prompt": "a", "height": 95}', "{}"))
    assert (code, out) == (1, "")
    assert err.count("\n") == 2
    assert made() == ["prompts.jsonl"]


def test_skip_existing_keeps_what_the_same_options_made(capsys, monkeypatch):
    argv = prompts('{"prompt": "a", "output": "one"}', '{"prompt": "a", "output": "two.mp4"}')
    argv += ["--num-frames", "1"]
    good(capsys, *argv)
    before = Path("all/two.mp4").stat().st_mtime_ns
    with monkeypatch.context() as patch:  # the model is not even loaded
        patch.setattr("visattn.generation.batch.load_pipeline", None)
        out = good(capsys, *argv, "--skip-existing")
    assert out == "kept all/one\nkept all/two.mp4\n"
    shutil.rmtree("all/one")
    Path("all/two.mp4.json").unlink()
    assert good(capsys, *argv, "--skip-existing").count("wrote") == 2
    assert Path("all/two.mp4").stat().st_mtime_ns > before
    for other in (["--seed", "1"], ["--plan", "diagonal(4)"]):
        assert good(capsys, *argv, "--skip-existing", *other).count("wrote") == 2
    good(capsys, *GENERATE, "-o", "clip")
    assert good(capsys, *GENERATE, "-o", "clip", "--skip-existing") == "kept clip\n"


def interrupt_at(monkeypatch, call):
    """A Ctrl-C in the call of that number of the transformer, from 1."""
    forward, calls = WanTransformer3DModel.forward, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(WanTransformer3DModel, "forward", interrupted)


@pytest.mark.parametrize(("call", "steps"), [(1, 0), (4, 1)])
def test_interrupt_leaves_no_file(capsys, monkeypatch, call, steps):
    interrupt_at(monkeypatch, call)
    code, out, err = run(capsys, *GENERATE, "-o", "clip.mp4", "--plan", "diagonal(4)")
    assert (code, out) == (130, "")
    assert err.count("\n") == steps
    assert made() == []


def test_interrupted_batch_goes_on_where_it_stopped(capsys, monkeypatch):
    lines = [f'{{"prompt": "a", "seed": {n}, "output": "{n}"}}' for n in range(3)]
    argv = prompts(*lines)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)  # in the second video
        assert run(capsys, *argv)[:2] == (130, "")
    assert sorted(os.listdir("all")) == ["0", "0.json"]
    first = Path("all/0.json").read_bytes()
    out = good(capsys, *argv, "--skip-existing")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "kept all/0",
        "wrote all/1",
        "wrote all/2",
    ]
    assert Path("all/0.json").read_bytes() == first


# ---- quiet


def test_libraries_are_quiet_and_as_before_afterwards(capsys, caplog):
    from diffusers.utils import logging as of_diffusers

    handlers = logging.getLogger("diffusers").handlers[:]
    assert of_diffusers.is_progress_bar_enabled()
    good(capsys, *GENERATE, "-o", "clip")
    assert logging.getLogger("diffusers").handlers == handlers
    assert of_diffusers.is_progress_bar_enabled()
    with quiet() as said:
        assert caplog.handler in logging.getLogger().handlers  # those of a user stay
        logging.getLogger("transformers.x").warning("two\nlines")
        logging.getLogger("transformers.x").warning("two\nlines")
        logging.getLogger("visattn.y").warning("a %s", "b")
        logging.getLogger("diffusers").info("not this")
        warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="diffusers.x")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="visattn.x")
    assert said == ["transformers: two lines", "visattn: a b"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = run(capsys, *GENERATE, "-o", "clip")
    assert code == 0
    assert err.count("\n") == 1
    assert err.startswith("\rstep: ") and "| 2/2 [" in err
    assert err.endswith("\n")


# ---- the library below


@pytest.fixture(scope="module")
def pipe():
    return tiny.wan21()


def test_result_holds_frames_before_any_encoding(pipe):
    bars = dict(getattr(pipe, "_progress_bar_config", {}))
    steps = []
    result = run_job(pipe, JOB, progress=lambda *step: steps.append(step[:3]))
    assert result.frames.shape == (9, 96, 64, 3)
    assert result.frames.dtype == torch.float32
    assert not torch.equal(result.frames, to_bytes(result.frames) / 255)
    assert steps == [("step", 1, 2), ("step", 2, 2)]
    assert 0 < sum(result.step_seconds) < result.seconds
    assert pipe._progress_bar_config == bars


def test_what_breaks_in_a_pipeline_is_one_sentence(pipe, monkeypatch):
    faults = {
        "failed: RuntimeError: two lines": RuntimeError("two\nlines"),
        "failed: IndexError": IndexError(),
        "failed: NameError: 'ftfy' is not defined": NameError("'ftfy' is not defined"),
        "failed: AssertionError$": AssertionError(),
        "failed: ModuleNotFoundError: no x": ModuleNotFoundError("no x"),
        "failed: Exception: limit": Exception("limit"),
        "out of memory: 3 GiB": torch.OutOfMemoryError("3 GiB"),
    }
    for words, fault in faults.items():

        def broken(*args, fault=fault, **options):
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(WanTransformer3DModel, "forward", broken)
            with pytest.raises(GenerationError, match=words):
                run_job(pipe, JOB)
    with monkeypatch.context() as patch:
        decode = type(pipe.vae).decode
        patch.setattr(type(pipe.vae), "decode", lambda *a, **k: (decode(*a, **k)[0] * torch.nan,))
        with pytest.raises(GenerationError, match="not finite"):
            run_job(pipe, JOB)


def test_loading_picks_device_and_dtype():
    assert pick_device("cpu") == torch.device("cpu")
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert pick_device(None) == (here or torch.device("cpu"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    wan = {"vae": ["diffusers", "AutoencoderKLWan"]}
    assert _dtype(Loading("m"), cpu, wan) == torch.float32
    assert _dtype(Loading("m"), gpu, {}) == torch.bfloat16
    assert _dtype(Loading("m"), gpu, wan) == {"default": torch.bfloat16, "vae": torch.float32}
    assert _dtype(Loading("m", device="balanced"), cpu, {}) == torch.bfloat16
    assert _dtype(Loading("m", dtype="fp16"), gpu, wan) == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
@pytest.mark.parametrize("how", ["model", "group", "sequential"])
def test_offloading_changes_no_frame(capsys, how):
    good(capsys, *GENERATE, "-o", "plain", "--plan", "diagonal(4)")
    good(capsys, *GENERATE, "-o", "other", "--plan", "diagonal(4)", "--cpu-offload", how)
    assert torch.equal(read_video("plain"), read_video("other"))


def test_token_is_shown_nowhere():
    loading = Loading("m", token="hf_secret", loras=(Lora.read('{"lora_id": "a/b"}'),))
    assert "hf_secret" not in repr(loading) + json.dumps(loading.record())
    assert loading.record()["loras"] == [
        {
            "lora_id": "a/b",
            "lora_scale": 1.0,
            "adapter_name": None,
            "weight_name": None,
            "role": None,
        }
    ]


RATES = {"wan21": 16, "wan22": 16, "cogvideox": 8, "cogvideox15": 16, "hunyuanvideo": 24}


@pytest.mark.parametrize("name", RATES)
def test_frame_rate_is_that_of_the_model(name):
    pipe = tiny.PIPELINES[name]()
    assert frame_rate(pipe) == RATES[name]
    if name == "wan22":  # the 5B
        pipe.register_to_config(expand_timesteps=True)
        assert frame_rate(pipe) == 24


def test_mp4_has_the_frame_rate_of_the_model_or_that_which_is_given(capsys):
    argv = ["generate", "a", "--model", "cogvideox", *SIZE]
    good(capsys, *argv, "-o", "own.mp4")
    good(capsys, *argv, "-o", "given.mp4", "--fps", "12.5")
    assert (read_rate("own.mp4"), read_rate("given.mp4")) == (8, 12.5)
    assert read_record("own.mp4")["settings"]["fps"] == 8
    good(capsys, "compare", "own.mp4", "given.mp4", "-o", "both.mp4")
    assert read_rate("both.mp4") == 8


LIMITS = {  # of the tokenizers that read the prompt, at the limits that these calls have
    "wan21": {"tokenizer": 512},
    "cogvideox": {"tokenizer": 226},
    "hunyuanvideo": {"tokenizer_2": 77},
    "flux": {"tokenizer": 12, "tokenizer_2": 512},
    "sd3": {"tokenizer": 12, "tokenizer_2": 12, "tokenizer_3": 256},
}


@pytest.mark.parametrize("name", LIMITS)
def test_tokens_that_are_cut_off_are_counted(name):
    from support import tiny_images

    pipe = getattr(tiny if name in tiny.PIPELINES else tiny_images, name)()
    kinds = [type(part) for part in pipe.components.values()]
    with cut_texts(pipe) as lines:
        encode(pipe, " ".join(["red"] * 5))
        assert lines == []
        encode(pipe, " ".join(["red"] * 600 + ["blue"]))
    assert [type(part) for part in pipe.components.values()] == kinds
    found = {}
    for line in lines:
        part, limit, cut = re.match(r"(\w+) takes (\d+) tokens; (\d+) more of", line).groups()
        assert int(cut) == 602 - int(limit)  # words, and the token of the end
        assert line.count("red") or int(cut) == 1
        found[part] = int(limit)
    assert LIMITS[name].items() <= found.items()


def encode(pipe, prompt):
    """The texts alone, as the pipeline's call encodes them."""
    with quiet():
        if "HunyuanVideo" in type(pipe).__name__:
            pipe._get_clip_prompt_embeds(prompt)
        elif hasattr(pipe, "text_encoder_3"):
            pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        elif hasattr(pipe, "text_encoder_2"):
            pipe.encode_prompt(prompt, None)
        else:
            limit = 512 if "Wan" in type(pipe).__name__ else 226
            pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=limit)


def test_cut_prompts_are_noted(capsys):
    prompt = " ".join(["red"] * 513)
    out = good(capsys, "generate", prompt, "--model", "wan", *SIZE, "-o", "clip")
    assert "note: tokenizer takes 512 tokens; 2 more of a text are cut off: 'red red'\n" in out
    assert len(read_record("clip")["notes"]) == 1
