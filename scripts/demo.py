"""Generate a dense and a sparse video with the command line, and compare them.

    python scripts/demo.py        (make demo)

The model is a small Wan text-to-video pipeline with random weights, built here: its videos are
noise, and what a plan does to them says nothing of a trained model. Everything goes to out/demo.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import visattn  # noqa: E402
from visattn.cli import main as visattn_command  # noqa: E402

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from tiny_wan import parts  # noqa: E402
from tiny_wan.presets import PRESETS  # noqa: E402

OUT = Path("out/demo")
MODEL = OUT / "random-wan"
SIZE = "--height 128 --width 128 --num-frames 33 --num-inference-steps 6 --seed 1"  # 9x16x16 tokens
PLAN = "neighborhood((3, 1.0, 1.0))"  # the frame before, the own and the next
PROMPT = "a red square moves right"
PYTHON = f"""\
>>> visattn.apply_plan(pipe, {PLAN!r})
>>> video = pipe({PROMPT!r}).frames[0]
>>> print(visattn.summary(pipe))"""


def build_model() -> None:
    """Write a pipeline with random weights."""
    torch.manual_seed(0)
    preset = PRESETS["cpu"]
    transformer = parts.build_transformer(preset)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)  # what is trained begins at zero
    pipe = parts.build_pipeline(
        parts.build_autoencoder(preset), transformer, parts.build_text_encoder()
    )
    parts.save_pipeline(pipe, MODEL)


def commands() -> list[str]:
    """The command lines of the demo."""
    generate = f"generate '{PROMPT}' --model {MODEL} {SIZE}"
    return [
        f"{generate} --output {OUT}/dense",
        f"{generate} --plan '{PLAN}' --output {OUT}/sparse",
        f"compare {OUT}/dense {OUT}/sparse --output {OUT}/side-by-side.mp4",
        f"show '{PLAN}' --grid 9x16x16 --output {OUT}/plan.png",
    ]


def main() -> int:
    build_model()
    print(f"{MODEL}: a Wan pipeline with random weights. Its videos are noise.\n", flush=True)
    for command in commands():
        print(f"$ visattn {command}", flush=True)
        code = visattn_command(shlex.split(command))
        if code:
            return code
        print(flush=True)
    print(f"In Python, one step of the same:\n\n{PYTHON}")
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    visattn.apply_plan(pipe, PLAN)
    pipe(PROMPT, height=128, width=128, num_frames=33, num_inference_steps=1, output_type="latent")
    print(visattn.summary(pipe))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
