"""Two prompts in sequence on the small model: what sharing of keys and values keeps at the seam.

    python scripts/long_video.py --pairs 100 --json assets/bench/long_video.json

Each pair is "a <colour> <object> moves left over the <background>" and the same to the right, at
the evaluation shape: one video by ``generate_sequence``, with sharing (DiTCtrl) and without it,
from the same noise and with the same blending. The scorer reads the frames that only the first and
only the last segment made. Figures of a video:

- colour, object: whether what it reads in the last part is what it reads in the first;
- both: whether both are;
- asked: share of the words (colour, object, direction, background) that the two parts show of their
  prompts;
- turned: whether the parts move to the left and to the right;
- jump: mean squared difference of neighbouring frames where the segments overlap, in thousandths;
- seam, peak: mean and largest of these over the mean of the others, which a jump elsewhere lowers.

Differences are those of the pairs, with 95 % intervals by Student's t.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import visattn  # noqa: E402
from visattn.generation import default_model, shape_of  # noqa: E402

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from PIL import Image  # noqa: E402

from visattn.draw.canvas import save_png, write  # noqa: E402
from visattn.draw.palette import GREY, PAPER  # noqa: E402
from visattn.guidance import ShareSettings, generate_sequence  # noqa: E402
from visattn.metrics.prompt import (  # noqa: E402
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    PICTURE,
    read_scene,
    score_prompt,
)
from visattn.search.measure.statistics import interval  # noqa: E402

FIGURES = ("colour", "object", "both", "asked", "turned", "jump", "seam", "peak")
OPTIONS = ("seed", "overlap", "transitions", "layers", "start", "stop", "masks")
CALL = ("num_inference_steps", "guidance_scale")  # the rest is that of the shape
PER_LATENT = 4  # frames
TILE, TEXT = 72, 22  # pixels of the picture


def prompts_of(count: int) -> list[tuple[str, str]]:
    """Pairs of prompts, of scenes in an order that is fixed."""
    objects = [name for name in OBJECTS if name != PICTURE]
    scenes = list(itertools.product(COLOURS, objects, BACKGROUNDS))
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = []
    for number in range(count):
        colour, name, ground = scenes[order[number % len(order)]]
        left, right = (
            f"a {colour} {name} moves {way} over the {ground}" for way in ("left", "right")
        )
        pairs.append((left, right))
    return pairs


def figures(video: torch.Tensor, pair: tuple[str, str], own: int, common: int) -> dict[str, float]:
    """The figures of a video ``[F, 3, H, W]`` in [0, 1], of whose latent frames ``own`` are one
    segment's at each end and ``common`` are in two."""
    seam = PER_LATENT * (own - 1) + 1  # the first frame of the overlap
    end = len(video) - PER_LATENT * own
    parts = video[:seam], video[end:]
    first, last = (read_scene(part).things[0] for part in parts)
    scores = [score_prompt(part, prompt) for part, prompt in zip(parts, pair, strict=True)]
    jump = (video[1:] - video[:-1]).square().mean((1, 2, 3))
    inside = torch.zeros(len(jump), dtype=torch.bool)
    inside[seam - 1 : end] = True
    rest = float(jump[~inside].mean())
    colour = first.colour is not None and first.colour == last.colour
    name = first.object is not None and first.object == last.object
    return {
        "colour": float(colour),
        "object": float(name),
        "both": float(colour and name),
        "asked": sum(score.mean for score in scores) / 2,
        "turned": float((first.direction, last.direction) == ("left", "right")),
        "jump": 1e3 * float(jump[inside].mean()),
        "seam": float(jump[inside].mean()) / rest,
        "peak": float(jump[inside].max()) / rest,
    }


def summed(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean, low and high of each figure."""
    return {
        name: [round(x, 4) for x in interval([row[name] for row in rows])] for name in FIGURES
    }


def compare(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """The figures of all pairs, and a picture of the first."""
    pipe = WanPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    shape = shape_of(default_model(), "evaluation")
    shape |= {name: getattr(args, name) for name in CALL if getattr(args, name) is not None}
    length = (shape["num_frames"] - 1) // PER_LATENT + 1
    layers = None if args.layers is None else range(-args.layers, 0)
    shared = ShareSettings(layers=layers, start=args.start, stop=args.stop)
    arms = {"shared": shared, "blended": None}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    strips = []
    for number, pair in enumerate(prompts_of(args.pairs)):
        for name, share in arms.items():
            video = generate_sequence(
                pipe,
                pair,
                overlap=args.overlap,
                transitions=args.transitions,
                share=share,
                masks=[pair[0].split()[2]] * 2 if args.masks and share else None,
                generator=torch.Generator().manual_seed(args.seed + number),
                output_type="pt",
                **shape,
            ).frames[0]
            rows[name].append(figures(video, pair, length - args.overlap, args.overlap))
            if number < args.drawn:
                strips.append((f"{name}: {' / '.join(pair)}", video))
        said = ", ".join(
            f"{figure} {rows['shared'][-1][figure]:.2f}/{rows['blended'][-1][figure]:.2f}"
            for figure in FIGURES
        )
        print(f"{number + 1} of {args.pairs}: {said}", flush=True)
    pairs = list(zip(rows["shared"], rows["blended"], strict=True))
    value = {
        "model": "assets/models/tiny-wan",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "visattn": visattn.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "command": " ".join(["python", "scripts/long_video.py", *sys.argv[1:]]),
        "settings": {name: getattr(args, name) for name in OPTIONS} | shape,
        "pairs": args.pairs,
        "means": {name: summed(own) for name, own in rows.items()},
        "differences": summed([{name: a[name] - b[name] for name in FIGURES} for a, b in pairs]),
        "rows": [{"shared": a, "blended": b} for a, b in pairs],
    }
    return value, drawn(strips)


def drawn(strips: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """A frame of each latent frame of a video in a row, its prompts under it."""
    columns = max((len(video) - 1) // PER_LATENT + 1 for _, video in strips)
    out = Image.new("RGB", (columns * TILE, len(strips) * (TILE + TEXT)), PAPER)
    for row, (text, video) in enumerate(strips):
        top = row * (TILE + TEXT)
        for column, frame in enumerate(video[::PER_LATENT]):
            pixels = (frame.float().permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((TILE, TILE))
            out.paste(tile, (column * TILE, top))
        write(out, 4, top + TILE + 2, text, 13, GREY)
    return out


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = ShareSettings()
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first pair's noise")
    parser.add_argument("--overlap", type=int, default=3, help="latent frames, of 7")
    parser.add_argument("--transitions", type=int, default=0)
    parser.add_argument("--layers", type=int, help="how many of the last layers share")
    parser.add_argument("--start", type=float, default=own.start)
    parser.add_argument("--stop", type=float, default=own.stop)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--masks", action="store_true", help="share by the subject's masks")
    parser.add_argument("--drawn", type=int, default=4, help="pairs in the picture")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--picture", type=Path, help="where the picture goes, a PNG file")
    args = parser.parse_args()
    with torch.no_grad():
        value, picture = compare(args)
    for name in FIGURES:
        shared, blended = (value["means"][arm][name][0] for arm in ("shared", "blended"))
        more, low, high = value["differences"][name]
        print(f"{name}: {shared:.3f} and {blended:.3f}, {more:+.3f} [{low:+.3f}, {high:+.3f}]")
    if args.json is not None:
        args.json.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if args.picture is not None:
        save_png(picture, args.picture)


if __name__ == "__main__":
    main()
