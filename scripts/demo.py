"""Generate a dense video and one by the searched plan with the command line, compare them, and look
inside.

    python scripts/demo.py        (make demo)

The model is the small one of assets/models/tiny-wan. Everything goes to out/demo.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import visattn  # noqa: E402
from visattn.cli import main as visattn_command  # noqa: E402
from visattn.generation import default_model, shape_of  # noqa: E402

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch  # noqa: E402
from diffusers import WanPipeline  # noqa: E402

OUT = Path("out/demo")
PLANS = ROOT / "assets" / "plans"
PROMPT = "a green triangle moves left over the snow"
SEED = 1014
PLAN = "auto"  # the searched plan of the model: assets/plans/tiny-wan
PYTHON = f"""\
>>> visattn.apply_plan(pipe, {PLAN!r})
>>> video = pipe({PROMPT!r}).frames[0]
>>> print(visattn.summary(pipe))"""


def commands() -> list[str]:
    """The command lines of the demo."""
    generate = f"generate '{PROMPT}' --seed {SEED}"
    return [
        f"{generate} --output {OUT}/dense.mp4",
        f"{generate} --plan '{PLAN}' --output {OUT}/sparse.mp4",
        f"compare {OUT}/dense.mp4 {OUT}/sparse.mp4 --output {OUT}/side-by-side.mp4",
        f"show {shlex.quote(str(PLANS / 'tiny-wan'))} --output {OUT}/plan.png",
        f"inspect '{PROMPT}' --shape evaluation --output {OUT}/heads.png",
        f"compare '{PROMPT}' --seed {SEED} --plan none --plan-b {PLAN} --output {OUT}/receipt.html",
    ]


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for command in commands():
        print(f"$ visattn {command}", flush=True)
        code = visattn_command(shlex.split(command))
        if code:
            return code
        print(flush=True)
    print(f"In Python, one step of the same:\n\n{PYTHON}")
    pipe = WanPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    visattn.apply_plan(pipe, PLAN)
    shape = {**shape_of(default_model()), "num_inference_steps": 1}
    pipe(PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="latent", **shape)
    print(visattn.summary(pipe))
    print(f"\nThe receipt of the search:       {PLANS / 'tiny-wan' / 'report.html'}")
    print(f"The receipt of these two videos: {(OUT / 'receipt.html').resolve()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
