"""Faults that a user of the command line could meet."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from trial_cases.case import Case
from visattn.cli import main

SIZE = ("--height", "96", "--width", "64", "--num-frames", "9", "--num-inference-steps", "1")


def command(*argv: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def saved(name: str) -> str:
    """The folder of a tiny pipeline of ``tests/support/tiny.py``, saved in the working folder."""
    from support import tiny

    make = getattr(tiny, name)
    make().save_pretrained(name)
    return name


def cleans_prompts(folder: Path) -> str:
    from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_video2video

    for module in (pipeline_wan_i2v, pipeline_wan_video2video):
        assert module.prompt_clean("red &amp; blue") == "red & blue"
    return "Wan's image-to-video and video-to-video clean their prompts"


def any_error_is_a_line(folder: Path) -> str:
    def broken(*args: Any, **options: Any) -> Any:
        raise NameError("name 'ftfy' is not defined")

    Path("all.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    argv = ("generate", "--prompts", "all.jsonl", "--model", saved("wan21"), *SIZE, "-o", "out")
    with mock.patch("diffusers.models.WanTransformer3DModel.forward", broken):
        code, out, err = command(*argv)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (1, "", 2) and all("NameError" in x for x in lines), err
    return "a NameError is one line for each prompt"


def lora_is_on_both(folder: Path) -> str:
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from support import tiny

    from visattn.generation import Loading, Lora, load_pipeline

    model = tiny.wan_transformer(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    WanPipeline.save_lora_weights("lora", transformer_lora_layers=get_peft_model_state_dict(model))
    found = []
    for own in (Lora("lora"), Lora.read('{"lora_id": "lora", "role": "transformer_2"}')):
        pipe = load_pipeline(Loading(saved("wan22"), loras=(own,)))
        found.append(sorted(pipe.get_list_adapters()))
    assert found == [["transformer", "transformer_2"], ["transformer_2"]], found
    return "a LoRA is on both denoisers of Wan 2.2, or on the one that its role names"


def negative_prompt_is_not_ignored(folder: Path) -> str:
    argv = ("generate", "a", "--model", saved("cogvideox"), *SIZE, "-o", "out")
    code, _, err = command(*argv, "--guidance-scale", "1", "--negative-prompt", "blue")
    assert code == 2 and "ignores negative_prompt" in err and "NAG(" in err, err
    return "a negative prompt without guidance is refused, with two remedies"


def photograph_is_turned(folder: Path) -> str:
    from PIL import Image

    from visattn.media.video import read_picture

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96)).save("turned.jpg", exif=exif)
    assert read_picture("turned.jpg").size == (96, 64)
    Image.frombytes("I;16", (1, 1), bytes((0, 128))).save("wide.png")
    assert read_picture("wide.png").getpixel((0, 0)) == (128, 128, 128)
    return "a photograph is turned as its EXIF says, and 16 bits are scaled to 8"


def frame_rate_is_the_models(folder: Path) -> str:
    from visattn.media.video import read_rate

    code, _, err = command("generate", "a", "--model", saved("cogvideox"), *SIZE, "-o", "a.mp4")
    assert code == 0, err
    assert read_rate("a.mp4") == 8
    return "CogVideoX writes 8 frames a second"


ODD = {
    "a JSON array": ('[{"prompt": "a"}]', "write one JSON object"),
    "commas": ('{"prompt": "a"},', "ends in a comma"),
    "no prompt": ('{"prompt": null}', "has no prompt"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "twice"),
    "half of a pair": ('{"prompt": "\\ud800"}', "no Unicode character"),
    "an escape": ('{"prompt": "a", "output": "\\u001b[31m.png"}', "printable"),
    "a link": ('{"prompt": "a", "output": "link/a.png"}', "leads out"),
    "a long name": ('{"prompt": "a", "output": "%s"}' % ("x" * 10**6), "too long"),
}


def odd_lines_are_refused(folder: Path) -> str:
    Path("out").mkdir()
    Path("out/link").symlink_to(folder)
    for name, (line, words) in ODD.items():
        Path("odd.jsonl").write_text(f"{line}\n")
        code, out, err = command("generate", "--prompts", "odd.jsonl", *SIZE, "-o", "out")
        assert code in (1, 2) and not out and words in err, (name, err[:300])
        assert err.count("\n") == 1 and len(err) < 2100 and err[:-1].isprintable(), name
    return f"{len(ODD)} odd lines of prompts are told in a short line each"


def marks_are_no_text(folder: Path) -> str:
    from visattn.generation.prompts import read_prompt_lines

    for encoding in ("utf-8-sig", "utf-16"):
        Path("p.txt").write_bytes("a red square\r\nb".encode(encoding))
        assert read_prompt_lines("p.txt") == ["a red square", "b"]
    return "a byte order mark is no part of the first prompt"


def cut_prompts_are_noted(folder: Path) -> str:
    prompt = " ".join(["red"] * 520)
    argv = ("--model", saved("wan21"), *SIZE, "--num-frames", "1", "-o", "a.png")
    code, out, err = command("generate", prompt, *argv)
    assert code == 0 and "note: tokenizer takes 512 tokens; 9 more of a text" in out, out + err
    return "9 tokens over the limit of 512 are noted"


def kills_leave_nothing(folder: Path) -> str:
    import torch

    from visattn.media.video import check_target, write_video
    from visattn.runtime import temporary_files as leftovers

    def kill(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if not pid:
        with mock.patch("pathlib.Path.rename", kill):
            write_video(torch.rand(1, 8, 8, 3), "clip")
        os._exit(0)
    os.waitpid(pid, 0)
    (part,) = os.listdir()
    assert str(pid) in part, part
    leftovers._clear.cache_clear()
    check_target(Path("clip"))
    assert os.listdir() == []
    return "what a killed process was writing is removed by the next one"


def a_full_disk_is_told(folder: Path) -> str:
    import torch

    from visattn.media import video

    Path("part.mp4").symlink_to("/dev/full")
    with (
        mock.patch.object(video, "part_of", return_value=Path("part.mp4")),
        mock.patch.object(video, "check_writable"),
    ):
        told = ""
        try:
            video.write_video(torch.rand(2, 64, 64, 3), "a.mp4")
        except OSError as error:
            told = str(error)
    assert "No space left" in told and "a.mp4" in told, told
    return "an mp4 on a full disk says that there is no space left"


def receipts_run_one_script(folder: Path) -> str:
    from html import unescape

    from visattn.report import render_page

    page = unescape(render_page({"schema": "visattn.report/1", "kind": "compare", "title": "a"}))
    assert "script-src 'sha256-" in page and "script-src 'unsafe-inline'" not in page
    return "the policy of a receipt names the hash of its script"


CASES = (
    Case("image-to-video of Wan dies of a missing ftfy", cleans_prompts),
    Case("an error of an unforeseen type ends a batch", any_error_is_a_line),
    Case("a LoRA for Wan 2.2 is on one of two denoisers", lora_is_on_both),
    Case("a negative prompt without guidance is ignored", negative_prompt_is_not_ignored),
    Case("a photograph lies on its side", photograph_is_turned),
    Case("a video has the frame rate of another model", frame_rate_is_the_models),
    Case("an odd line of prompts", odd_lines_are_refused),
    Case("a byte order mark is part of a prompt", marks_are_no_text),
    Case("the end of a long prompt is cut without a word", cut_prompts_are_noted),
    Case("a killed process leaves files behind", kills_leave_nothing),
    Case("a full disk is told in ffmpeg's words", a_full_disk_is_told),
    Case("a receipt lets any script run", receipts_run_one_script),
)
