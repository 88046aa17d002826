"""Faults that a user of the command line could meet."""

from __future__ import annotations

import contextlib
import io
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
    """The folder of a tiny pipeline of ``tests/tiny.py``, saved in the working folder."""
    import tiny

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
    import tiny
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

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
    assert code == 2 and "not looked at" in err and "nag:" in err, err
    return "a negative prompt without guidance is refused, with two remedies"


CASES = (
    Case("image-to-video of Wan dies of a missing ftfy", cleans_prompts),
    Case("an error of an unforeseen type ends a batch", any_error_is_a_line),
    Case("a LoRA for Wan 2.2 is on one of two denoisers", lora_is_on_both),
    Case("a negative prompt without guidance is ignored", negative_prompt_is_not_ignored),
)
