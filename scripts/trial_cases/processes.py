"""Faults of several processes, and of results that are kept although what made them has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from trial_cases.case import Case
from trial_cases.cli import SIZE, command, saved

ROOT = Path(__file__).resolve().parents[2]


def each_prompt_once(folder: Path) -> str:
    lines = [json.dumps({"prompt": "a red square", "seed": n, "output": f"{n}"}) for n in range(3)]
    Path("all.jsonl").write_text("\n".join(lines))
    argv = ("generate", "--prompts", "all.jsonl", "--model", saved("wan21"), *SIZE, "-o", "out")
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *starter, "-m", "visattn", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    made = sorted(line.split(":")[0] for line in done.stdout.splitlines())
    assert done.returncode == 0 and made == [f"wrote out/{n}" for n in range(3)], done.stdout
    return "two processes of torchrun made each of three clips once"


def others_are_refused(folder: Path) -> str:
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2"}):
        code, out, err = command("compare", "a.mp4", "b.mp4", "-o", "page.html")
    assert (code, out) == (2, "") and "runs in one process" in err and err.count("\n") == 1, err
    return "visattn compare in two processes is refused in a line"


def lora_scale_is_another_pipeline(folder: Path) -> str:
    from peft import LoraConfig
    from support import tiny

    from visattn.inject.models.fingerprint import fingerprint

    pipe = tiny.wan21()
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="x")
    found = [fingerprint(pipe)]
    pipe.set_adapters(["x"], [0.1])
    found.append(fingerprint(pipe))
    pipe.transformer.disable_adapters()
    found.append(fingerprint(pipe))
    assert len(set(found)) == 3
    return "scale 1, scale 0.1 and disabled have three fingerprints"


def cache_is_refused(folder: Path) -> str:
    from diffusers import FirstBlockCacheConfig
    from support import tiny

    import visattn

    pipe = tiny.wan21()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    said = ""
    try:
        visattn.search(pipe, ["a red square"], target_speedup=1.2)
    except ValueError as error:
        said = str(error)
    assert "has a cache" in said and "disable_cache()" in said, said
    return "a search of a pipeline with a cache is refused in a sentence"


def offloaded_is_read(folder: Path) -> str:
    import accelerate
    import torch
    from support import tiny

    from visattn.inject.models.fingerprint import fingerprint

    found = set()
    for seed in (0, 0, 1):
        pipe = tiny.wan21(seed)
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
        found.add(fingerprint(pipe))
    assert len(found) == 2
    return "weights on the meta device are read from where they are"


def damaged_is_made_anew(folder: Path) -> str:
    argv = ("generate", "a red square", "--model", saved("wan21"), *SIZE, "-o", "clip.mp4")
    said = [command(*argv)[1].split()[0]]
    for path, size in (("clip.mp4", None), ("clip.mp4", 0), ("clip.mp4.json", 50)):
        if size is not None:
            os.truncate(path, size)
        said.append(command(*argv, "--skip-existing")[1].split()[0])
    assert said == ["wrote", "kept", "wrote", "wrote"], said
    return "a whole clip is kept, one cut to nothing and one with a cut record are made anew"


CASES = (
    Case("each prompt is made by every process", each_prompt_once),
    Case("other commands run several times", others_are_refused),
    Case("the scale of a LoRA is not seen", lora_scale_is_another_pipeline),
    Case("a search counts what a cache reuses", cache_is_refused),
    Case("--skip-existing keeps a damaged clip", damaged_is_made_anew),
    Case("weights that are offloaded end a search", offloaded_is_read),
)
