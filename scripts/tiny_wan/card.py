"""The model card."""

from __future__ import annotations

from typing import Any

from tiny_wan.captions import HELD_OUT_SHARE, WORDS
from tiny_wan.presets import Preset, clip_size
from visattn.metrics.prompt import BACKGROUNDS, COLOURS, DIGITS, DIRECTIONS, SHAPES

CARD = """\
# tiny-wan

A small text-to-video model with real attention maps, for tests, searches and demonstrations of
`visattn` on two CPU cores. It is a complete diffusers `WanPipeline`, safetensors only:

- a Wan transformer of {layers} layers, {heads} heads of {head_size}, {width} wide, patch 1 × 1 × 1;
- an `AutoencoderKLWan` that makes 16 channels of 4 frames of 8 × 8 pixels;
- a `UMT5EncoderModel` trained with the transformer, and a word-level tokenizer;
- a UniPC flow-matching scheduler with shift 3.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("{folder}")
video = pipe(
    "a red square moves left over the fog",
    num_frames={default_frames}, height={default_height}, width={default_width},
    num_inference_steps=20, guidance_scale={guidance},
).frames[0]
```

| shape | frames, height, width | tokens | steps |
|---|---|---|---|
| default | {default_size} | {default_tokens} | 20 |
| evaluation | {evaluation_size} | {evaluation_tokens} | {evaluation_steps} |

## What it was trained on
Moving scenes, drawn by `scripts/tiny_wan/` from seed {seed}:
{data}.

- Colours: {colours}.
- Shapes: {shapes}.
- Digits: {digits}.
- Directions: {directions}.
- Backgrounds: {backgrounds}.

Captions come from a small grammar: "a red square moves left over the fog", "a blue 4 glides slowly
up across the snow". The digits are real handwriting, from the set that scikit-learn ships (UCI,
"Optical Recognition of Handwritten Digits", by E. Alpaydin and C. Kaynak), narrowed to the clearly
written ones.

Held out and never trained on: {held_out:.0%} of the combinations of colour, object, direction and
background, and one in five of the digits' instances{held_out_photographs}.

## How
`python scripts/train_tiny_wan.py --preset {preset}`, which took

- {autoencoder_steps:,} steps of the autoencoder and {decoder_steps:,} of its decoder alone;
- {steps:,} steps of the denoiser and its text encoder by flow matching, {precision}, captions left
  out in one of ten; the weights are a moving average over the last steps.

{note}

## Figures
{figures}
By `python scripts/train_tiny_wan.py --preset {preset} --evaluate 100`. The scorer is
`visattn.metrics.prompt`; pairs are held-out captions with fixed seeds.

## Attention
{structure}
## What it can't do
It knows the {words} words of its grammar and nothing else: other words are read as one unknown
word. {limits}

It is a test bed: what helps or hurts it need not do so for a large model.
"""

CPU_DATA = """\
one object of one colour that travels in one direction, slowly or quickly, over a soft background"""
GPU_DATA = """\
one or two objects that travel, slowly or quickly, and may bounce back, over soft backgrounds or
photographs that pan and zoom; objects may be photographs in a coloured frame"""
CPU_LIMITS = """\
Two objects, bounces and photographs are words that it has never seen used. It often draws its
object twice or more, at the default shape above all, which is most of what the scorer counts
against it."""


def _figures(found: dict[str, Any]) -> str:
    """Return the figures as tables, or that there are none."""
    if not found:
        return "None yet.\n"
    lines = ["| clips | autoencoder, held out |", "|---|---|"]
    lines += [f"| {size} | {db:.1f} dB |" for size, db in found["autoencoder_db"].items()]
    lines += [
        "",
        "| shape | pairs | steps | colour | object | direction | background |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("evaluation", "default"):
        if name in found:
            row = found[name]
            shares = " | ".join(
                f"{row[kind]:.0%}" for kind in ("colour", "object", "direction", "background")
            )
            lines.append(f"| {name} | {row['pairs']} | {row['steps']} | {shares} |")
    return "\n".join(lines) + "\n"


def _structure(found: dict[str, Any]) -> str:
    """Return the table of heads with structure, or that there is none."""
    rows = [
        (name, found[name]["structure"]) for name in ("evaluation", "default") if name in found
    ]
    if not rows:
        return "Not measured.\n"
    sizes = list(rows[0][1]["few"])
    lines = [
        "Heads, of all, that keep 90 % of their mass in 30 % of the tiles, with the shape of tiles "
        "that suits the head, by the most tokens of a tile (`visattn inspect` shows each):",
        "",
        "| shape | " + " | ".join(f"{size} tokens" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name, own in rows:
        counts = " | ".join(f"{own['few'][size]} of {own['heads']}" for size in sizes)
        lines.append(f"| {name} | {counts} |")
    return "\n".join(lines) + "\n"


def model_card(preset: Preset, steps: int, figures: dict[str, Any], note: str) -> str:
    """Return the card's text; ``figures`` are those of an evaluation, ``note`` says how long."""
    default, evaluation = clip_size(preset.default_grid), clip_size(preset.evaluation_grid)
    tokens = [grid[0] * grid[1] * grid[2] for grid in (preset.default_grid, preset.evaluation_grid)]
    return CARD.format(
        layers=preset.layers,
        heads=preset.heads,
        head_size=preset.head_size,
        width=preset.heads * preset.head_size,
        folder="assets/models/tiny-wan",
        default_frames=default[0],
        default_height=default[1],
        default_width=default[2],
        default_size=" × ".join(map(str, default)),
        evaluation_size=" × ".join(map(str, evaluation)),
        default_tokens=f"{tokens[0]:,}",
        evaluation_tokens=f"{tokens[1]:,}",
        evaluation_steps=preset.evaluation_steps,
        guidance=preset.guidance,
        seed=preset.seed,
        data=GPU_DATA if preset.rich else CPU_DATA,
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        digits=", ".join(DIGITS),
        directions=", ".join(DIRECTIONS),
        backgrounds=", ".join(BACKGROUNDS),
        held_out=HELD_OUT_SHARE,
        held_out_photographs=", and three photographs" if preset.rich else "",
        preset=preset.name,
        autoencoder_steps=preset.autoencoder_steps,
        decoder_steps=preset.decoder_steps,
        steps=steps,
        precision="bfloat16" if preset.bfloat16 else "float32",
        note=note,
        figures=_figures(figures),
        structure=_structure(figures),
        words=len(WORDS),
        limits="" if preset.rich else CPU_LIMITS,
    )
