"""Whether heads that HeadHunter finds on some prompts help on others: the small model in few steps
with little or no classifier-free guidance, where the scorer agrees with about half of the objects.

    python scripts/measure_head_search.py --log scores.jsonl --json assets/bench/head-search.json

The search maximises how much nearer the outline of what is seen is to the object that is asked for
than to any other, which says more per clip than the verdict; what is told of held-out prompts is
the verdict, paired, with 95 % intervals. It takes about half an hour on a CPU and goes on from its
log.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import sys
import time
from pathlib import Path

import torch

import visattn
from visattn.generation import Loading, default_model, load_pipeline
from visattn.generation.prompts import model_prompts
from visattn.guidance import SoftPAG, guide, search_heads
from visattn.metrics.prompt import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    OBJECTS,
    object_margin,
    score_prompt,
)
from visattn.search.measure.statistics import interval

CALL = {
    "height": 96,
    "width": 96,
    "num_frames": 25,
    "num_inference_steps": 6,
    "guidance_scale": 1.0,
}


def training_prompts(count: int, held_out: set[str]) -> list[str]:
    """Captions that are not held out, the same for the same count."""
    every = [
        f"a {colour} {thing} moves {way} over the {ground}"
        for colour, thing, way, ground in itertools.product(
            COLOURS, OBJECTS, DIRECTIONS, BACKGROUNDS
        )
    ]
    return random.Random(0).sample([one for one in every if one not in held_out], count)


def margin(frames: torch.Tensor, prompt: str) -> float:
    """The objective of the search."""
    return object_margin(frames.permute(0, 3, 1, 2), prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", default="head-search.jsonl", help="scores as they are found")
    parser.add_argument("--json", default="head-search.json")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--scale", type=float, default=2.0, help="of the perturbed guidance")
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"])
    parser.add_argument("--guidance-scale", type=float, default=CALL["guidance_scale"])
    parser.add_argument("--seeds", type=int, default=2, help="of each held-out prompt")
    options = parser.parse_args()
    call = CALL | {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    pipe = load_pipeline(Loading(model=str(default_model())))
    pipe.set_progress_bar_config(disable=True)
    found = model_prompts(default_model())
    assert found is not None
    used, held_out = found
    train = training_prompts(options.prompts, {*held_out, *used})
    begin = time.monotonic()
    heads = search_heads(
        pipe,
        margin,
        train,
        seeds=(7,),
        k=options.top_k,
        rounds=options.rounds,
        scale=options.scale,
        call=call,
        resume=options.log,
        progress=lambda *told: print(*told, flush=True),
    )
    searched = time.monotonic() - begin

    def clip(prompt: str, seed: int) -> tuple[float, float, float]:
        noise = torch.Generator().manual_seed(seed)
        frames = pipe(prompt, **call, generator=noise, output_type="pt").frames[0].float()
        verdict = score_prompt(frames, prompt)
        return verdict.mean, (verdict.object + verdict.direction) / 2, object_margin(frames, prompt)

    names = ("scorer", "object and direction", "margin")
    pairs = [(prompt, 500 + seed) for prompt in held_out for seed in range(options.seeds)]
    plain = [clip(*pair) for pair in pairs]
    with guide(pipe, SoftPAG(heads)):
        guided = [clip(*pair) for pair in pairs]
    out = {
        "call": call,
        "heads": {path: dict(own) for path, own in heads.layers.items()},
        "rounds": options.rounds,
        "top_k": options.top_k,
        "scale": options.scale,
        "training_prompts": train,
        "held_out_clips": len(pairs),
        "provenance": dict(heads.provenance),
        "seconds": round(searched, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": " ".join(["python", "scripts/measure_head_search.py", *sys.argv[1:]]),
        "versions": {"visattn": visattn.__version__, "torch": torch.__version__},
        "held_out": {},
    }
    for n, name in enumerate(names):
        gain = interval([b[n] - a[n] for a, b in zip(plain, guided, strict=True)])
        mean = [sum(own[n] for own in kind) / len(pairs) for kind in (plain, guided)]
        out["held_out"][name] = {"plain": mean[0], "guided": mean[1], "gain": list(gain)}
        print(f"{name}: plain {mean[0]:.3f}, guided {mean[1]:.3f}, gain {gain}")
    Path(options.json).write_text(json.dumps(out, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
