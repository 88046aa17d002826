"""Whether the perturbed pass of a guidance should run the sparse patterns of the conditional one.

    python scripts/measure_shared_patterns.py --json assets/bench/shared-patterns.json

The small model generates with SoftPAG and dense attention at its evaluation shape. On the inputs of
the conditional calls of some steps, the conditional prediction ``c`` and the perturbed one ``p``
are computed again, sparse: with the patterns of the searched plan for both (shared), with those for
``c`` and dense attention for ``p``, and with those for ``c`` and one pattern for all heads for
``p``. Told is the error of ``c - p`` and of ``c + w (c - p)``, relative to the dense ones.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import visattn

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch

from visattn.generation import Loading, default_model, load_pipeline
from visattn.generation.prompts import model_prompts
from visattn.guidance import Perturb, SoftPAG, guide, steer
from visattn.inject import sparse
from visattn.search.measure.statistics import interval

PLAN = Path(__file__).resolve().parents[1] / "assets" / "plans" / "tiny-wan-evaluation"
CALL = {"height": 96, "width": 96, "num_frames": 25, "num_inference_steps": 12}
OTHERS = {"dense": None, "halo": "halo((1, 6, 6), (2, 6, 6))", "band": "diagonal(128)"}
SCALE = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="shared-patterns.json")
    parser.add_argument("--prompts", type=int, default=4)
    options = parser.parse_args()
    pipe = load_pipeline(Loading(model=str(default_model())))
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    prompts = model_prompts(default_model())
    assert prompts is not None
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number, prompt in enumerate(prompts[1][: options.prompts]):
        for layer in (2, 6, 10):
            edit = Perturb(layers=[layer])
            for given in conditional_inputs(pipe, prompt, number, layer)[1::4]:
                collect(model, given, edit, errors)
    out: dict[str, Any] = {"plan": PLAN.name, "call": CALL, "scale": SCALE, "errors": {}}
    for (name, what), values in errors.items():
        found = interval(values)
        out["errors"].setdefault(name, {})[what] = list(found)
        print(f"{name:8} {what:10} {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]")
    shared = errors["shared", "c - p"]
    for name in OTHERS:
        gain = interval([b - a for a, b in zip(shared, errors[name, "c - p"], strict=True)])
        out["errors"][name]["c - p, more than shared"] = list(gain)
        print(f"{name:8} more than shared {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")
    out["versions"] = {"visattn": visattn.__version__, "torch": torch.__version__}
    Path(options.json).write_text(json.dumps(out, indent=1) + "\n")


def conditional_inputs(pipe: Any, prompt: str, seed: int, layer: int) -> list[dict[str, Any]]:
    """What the denoiser is given in the conditional calls of a dense guided generation."""
    found: list[dict[str, Any]] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(dict(kwargs))

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    noise = torch.Generator().manual_seed(seed)
    with guide(pipe, SoftPAG({layer: None}, scale=SCALE)):
        pipe(prompt, **CALL, guidance_scale=1.0, generator=noise, output_type="latent")
    handle.remove()
    return found[::2]  # each has its perturbed call after it


@torch.no_grad()
def collect(
    model: Any, given: dict[str, Any], edit: Perturb, errors: dict[tuple[str, str], list[float]]
) -> None:
    def run(plan: Any, perturbed: bool) -> torch.Tensor:
        if plan is not None:
            with sparse(model, plan, guard=False):
                return run(None, perturbed)
        if perturbed:
            with steer(model, edit):
                return run(None, False)
        out = model(**given)
        return out[0] if isinstance(out, tuple) else out.sample

    c, p, sparse_c = run(None, False), run(None, True), run(PLAN, False)
    passes = {"shared": run(PLAN, True), **{k: run(v, True) for k, v in OTHERS.items()}}
    wanted = c + SCALE * (c - p)
    for name, other in passes.items():
        difference = (sparse_c - other - (c - p)).norm() / (c - p).norm()
        whole = (sparse_c + SCALE * (sparse_c - other) - wanted).norm() / wanted.norm()
        errors[name, "c - p"].append(float(difference))
        errors[name, "prediction"].append(float(whole))


if __name__ == "__main__":
    main()
