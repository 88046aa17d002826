"""A search of a tiny pipeline in a process of its own, with seconds that are made up: what it finds
depends on nothing that differs between two runs.

    python tests/support/search_runner.py FOLDER
    python tests/support/search_runner.py FOLDER --kills 10

With ``--kills`` a run in one go is compared with one that is killed so many times, at random
moments, and begun again each time.
"""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import visattn  # noqa: E402

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch  # noqa: E402
from support import tiny  # noqa: E402

from visattn.patterns import Dense, Pattern  # noqa: E402
from visattn.search import Settings  # noqa: E402
from visattn.search.measure import clip_quality as validate  # noqa: E402
from visattn.search.measure import target as subject  # noqa: E402
from visattn.search.measure.latency import HeadLatency  # noqa: E402
from visattn.search.measure.replay import Replay  # noqa: E402
from visattn.search.stages import price as price_stage  # noqa: E402

CALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3}
PROMPTS = ["a red square moves right", "a blue circle moves left", "a red circle", "a blue square"]
SETTINGS = Settings(steps=2, tiles=2, rows=4, replays=4, pairs=2, pictures=1)


def made_up(patterns, q, k, v, layout, dense_attention):
    """A layer takes a twentieth of a second, and a pattern as much of it as it keeps pairs."""
    found = {repr(Dense()): HeadLatency(0.0125, 0.05)}
    failures = {}
    for pattern in patterns:
        try:
            density = pattern.density(layout) if isinstance(pattern, Pattern) else 2.0
        except ValueError as error:  # it is of another grid
            failures[repr(pattern)] = str(error)
            continue
        found[repr(pattern)] = HeadLatency(0.0125 * density, 0.05 * density)
    return found, failures


def timeless(run):
    """A generation that takes two seconds."""

    @functools.wraps(run)
    def call(*args, **kwargs):
        return replace(run(*args, **kwargs), seconds=2.0, step_seconds=(0.5,))

    return call


def make_up_seconds(setattr_=setattr):
    """Let nothing be timed."""
    setattr_(price_stage, "measure", made_up)
    setattr_(subject, "run_job", timeless(subject.run_job))
    setattr_(validate, "run_job", timeless(validate.run_job))
    setattr_(Replay, "seconds", lambda self, plan, **kwargs: 0.5 if plan is None else 0.4)


def run(
    folder,
    progress=None,
    candidates=("band", "windows", "stencil"),
    make=tiny.wan21,
    call=CALL,
    **options,
):
    """The result of the search of a pipeline that is made here."""
    torch.manual_seed(0)
    return visattn.search(
        make(),
        PROMPTS,
        call=call,
        resume=folder,
        settings=SETTINGS,
        candidates=candidates,
        progress=progress,
        model="tiny",
        **({"target_speedup": 1.2} | options),
    )


def brightness(frames, prompt):
    """An objective that is told on stdout."""
    print("judged", flush=True)
    return float(frames.mean())


def run_heads(folder):
    """The heads of the first layer that a search for them finds."""
    torch.manual_seed(0)
    return visattn.search_heads(
        tiny.wan21(),
        brightness,
        PROMPTS[:1],
        candidates={0: None},
        call={"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1},
        resume=folder / "heads.jsonl",
    )


def start(folder, **environment):
    """Both searches in another process, which prints lines of progress and then what it found."""
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def plan_of(lines):
    """The plan that a run has printed."""
    (own,) = [line for line in lines if line.startswith("plan ")]
    return json.loads(own.removeprefix("plan "))


def heads_of(lines):
    """The heads that a run has printed."""
    (own,) = [line for line in lines if line.startswith("heads ")]
    return json.loads(own.removeprefix("heads "))


def finish(process):
    """The lines of a run that comes to its end."""
    lines = process.communicate()[0].splitlines()
    if process.returncode:
        raise RuntimeError(f"the search ended with {process.returncode}")
    return lines


def kept(folder):
    """How many results a folder holds; whatever else lies there is half a file."""
    return len(list(Path(folder).glob("*.safetensors")))


def killed(folder, kills, lines, seed=0):
    """The lines of the last run, after ``kills`` that were killed at random lines.

    Args:
        lines: of a run in one go.
    """
    draw = random.Random(seed)
    for _ in range(kills):
        process = start(folder)
        for _ in range(draw.randint(1, max(1, (lines - kept(folder)) // 2))):
            process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
    return finish(start(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, metavar="N")
    args = parser.parse_args()
    if args.kills is not None:
        whole = finish(start(args.folder / "whole"))
        rest = killed(args.folder / "killed", args.kills, len(whole))
        assert plan_of(rest) == plan_of(whole), "another plan"
        assert kept(args.folder / "killed") == kept(args.folder / "whole"), "other results"
        print(f"after {args.kills} kills the plan is the same, to the bit")
        return
    make_up_seconds()
    torch.set_num_threads(1)
    own = torch.device("cpu", int(os.environ.get("LOCAL_RANK", 0)))  # one for each process
    subject.SearchTarget.device = property(lambda self: own)
    result = run(args.folder, progress=lambda *line: print("task", *line[:3], flush=True))
    print("plan", result.plan.to_json().replace("\n", " "), flush=True)
    print("heads", run_heads(args.folder).to_json().replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
