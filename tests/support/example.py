"""A made-up report: every part of the page, with numbers of the size that a search gives."""

import base64
import math
import random
from pathlib import Path

EVIL_PROMPT = "</script><img src=x onerror=alert(1)> & a yellow triangle"
GRID, TILE, COUNT = (7, 12, 12), (1, 4, 4), (7, 3, 3)
LAYERS, HEADS = 12, 2
PROMPTS = (
    "a red square moves right over the night",
    "a handwritten seven rises slowly over a pale green background",
    "a blue circle moves left",
    EVIL_PROMPT,
)
FAMILIES = ("stencil",) * 10 + ("top_blocks", "neighborhood", "radial", "dense", "skip", "pyramid")


def example_report(*, layers=LAYERS, heads=HEADS, phases=2, videos=None):
    """A report of kind ``search`` with every part; ``videos`` is ``[(dense, sparse), ...]`` in
    base64."""
    draw = random.Random(0)
    drawn = [_stencil(draw, n) for n in range(LAYERS * HEADS)]
    stencils = [
        {**drawn[(n * heads + h) % len(drawn)], "number": n, "head": h}
        for n in range(layers) for h in range(heads)
    ]  # fmt: skip
    return {
        "schema": "visattn.report/1",
        "kind": "search",
        "title": "tiny-wan, 1.35x end to end",
        "command": "visattn search --model assets/models/tiny-wan --target-speedup 1.35 \\\n"
        "    --prompts prompts.jsonl --budget 10m --output plans/tiny-wan",
        "model": {
            "name": "tiny-wan",
            "denoisers": {
                "transformer": {"class": "WanTransformer3DModel", "layers": layers, "heads": heads}
            },
        },
        "layout": "7x12x12",
        "grid": list(GRID),
        "settings": {
            "num_inference_steps": 12, "guidance_scale": 3.0, "height": 96, "width": 96,
            "num_frames": 25, "seed": 0, "budget": "10m", "target_speedup": 1.35, "resumed": False,
        },
        "machine": {
            "device": "x86_64", "threads": 2, "torch": "2.13.0+cpu", "triton": "3.7.1",
            "visattn": "0.1.0", "diffusers": "0.42.1", "dtype": "float32",
        },
        "headline": [
            {"label": "end to end", "value": "1.35x", "note": "predicted 1.33x"},
            {"label": "density", "value": "0.21", "note": "executed 0.26"},
            {"label": "PSNR against dense", "value": "31.2 dB", "note": "[30.1, 32.3], 60 pairs"},
            {"label": "over the best uniform plan", "value": "+1.8 dB", "note": "[1.1, 2.4]"},
            {"label": "searched in", "value": "6 min 40 s", "note": "of 10 min allowed"},
        ],
        "clips": _clips(draw, videos or [(None, None)] * len(PROMPTS)),
        "heads": [
            _head(draw, n, h, phase, layers)
            for phase in range(phases) for n in range(layers) for h in range(heads)
        ],
        "stencils": stencils,
        "front": _front(draw),
        "table": _table(draw),
        "speed": [
            {"name": name, "predicted": p, "measured": m, "low": m - 0.03, "high": m + 0.02}
            for name, p, m in (
                ("searched, 1.35x", 1.33, 1.35), ("searched, 1.6x", 1.62, 1.54),
                ("searched, 2x", 2.01, 1.83), ("stencil, 0.25", 1.41, 1.38),
                ("top_blocks(0.25)", 1.38, 1.12), ("radial(decay=0.2)", 1.44, 1.40),
            )
        ],
        "claims": [
            {"text": "At 1.35x the searched plan is at least 1 dB over the best uniform static "
             "family.", "holds": True, "figures": "1.8 dB [1.1, 2.4]", "cause": None},
            {"text": "The speedup that was predicted is met within 5 %.", "holds": True,
             "figures": "1.5 %", "cause": None},
            {"text": "Two phases are better than one.", "holds": False,
             "figures": "0.1 dB [−0.3, 0.5]",
             "cause": "The same head sees nearly the same places in early and in late steps, so "
             "that a second phase only halves the rows from which each is learned."},
            {"text": "No verdict of the scorer changes.", "holds": None, "figures": "1 of 60",
             "cause": "Sixty pairs are too few to tell one change from none."},
        ],
        "stability": [
            {"name": "same pattern by half of the prompts", "value": 0.83, "note": "chance 0.25"},
            {"name": "same pattern by half of the steps", "value": 0.77, "note": "chance 0.25"},
            {"name": "error by the other half's choice", "value": "+2.1 %", "note": ""},
        ],
        "failures": [
            {"item": "xattention(0.9), uniform", "error": "ValueError: blocks of 8 do not divide "
             "into antidiagonals of 16"},
        ],
        "notes": [
            "Blocks of 8 tokens flatter patterns that choose by pooled scores.",
            "The guard was off, so that plans run as they are.",
        ],
        "time": [
            {"stage": "read attention", "seconds": 81.2},
            {"stage": "learn stencils", "seconds": 9.8},
            {"stage": "error of every pattern on every head", "seconds": 164.0},
            {"stage": "assign", "seconds": 0.7}, {"stage": "videos", "seconds": 121.4},
            {"stage": "measure speed", "seconds": 23.0},
        ],
        "plan": {"schema": "visattn.plan/1", "rules": [{"layer": f"blocks.{n}.attn1", "head": h,
                 "pattern": _written(draw)} for n in range(layers) for h in range(heads)]},
    }


def _clips(draw, videos):
    return [
        {
            "prompt": prompt, "seed": seed, "dense": dense, "sparse": sparse,
            "dense_label": "dense", "sparse_label": "searched, 1.35x",
            "metrics": [
                {"name": "PSNR", "value": 29 + 4 * draw.random(), "unit": "dB", "dense": None},
                {"name": "SSIM", "value": 0.93 + 0.05 * draw.random(), "unit": "", "dense": None},
                {"name": "flicker", "value": 0.02 + 0.002 * draw.random(), "unit": "",
                 "dense": 0.0211},
            ],
            "verdict": {"dense": "red square, right", "sparse": "red square, right"},
            "seconds": {"dense": 8.12, "sparse": 6.01},
        }
        for seed, (prompt, (dense, sparse)) in enumerate(zip(PROMPTS, videos, strict=False))
    ]


def _written(draw):
    offsets = ", ".join(
        f"({draw.randint(-6, 6)}, {draw.randint(-2, 2)}, {draw.randint(-2, 2)})" for _ in range(60)
    )
    return f"stencil((1, 4, 4), ({offsets}))"


def _head(draw, number, head, phase, layers):
    family = draw.choice(FAMILIES)
    density = {"dense": 1.0, "skip": 0.0}.get(family, min(1, draw.lognormvariate(-1.5, 0.5)))
    return {
        "role": "transformer", "layer": f"blocks.{number}.attn1", "number": number, "head": head,
        "phase": phase, "family": family, "density": density, "executed": min(1, density * 1.2),
        "pattern": _written(draw) if family == "stencil" else f"{family}({density:.2f})",
        "error": 0.0 if family == "dense" else 10 ** draw.uniform(-4, -1), "seconds": 0.011,
        "reason": "predicted to take longer than dense attention" if family == "dense" else None,
        "stability": None if family == "skip" else {
            "prompts": draw.uniform(0.6, 1), "steps": draw.uniform(0.5, 1)
        },
    }  # fmt: skip


def _stencil(draw, number):
    across, near, far = draw.uniform(0.5, 4), draw.uniform(0.4, 1.6), draw.uniform(0, 0.4)
    around = [range(1 - n, n) for n in COUNT]
    mass = [
        [[math.exp(-abs(t) / across - (y * y + x * x) / near) + far * math.exp(-abs(t)) / 9
          for x in around[2]] for y in around[1]] for t in around[0]
    ]
    whole = sum(map(sum, (row for plane in mass for row in plane)))
    mass = [[[x / whole for x in row] for row in plane] for plane in mass]
    order = sorted(
        ((mass[t + COUNT[0] - 1][y + COUNT[1] - 1][x + COUNT[2] - 1], (t, y, x))
         for t in around[0] for y in around[1] for x in around[2]), reverse=True
    )
    query = [3, 5, 6]
    attention = [
        [[(math.exp(-abs(t - 3) / across - ((y - 5) ** 2 + (x - 6) ** 2) / 9 / near)
           + (0.3 if t == 0 and y < 4 and 4 <= x < 8 else 0)) * draw.uniform(0.4, 1) / 90
          for x in range(GRID[2])] for y in range(GRID[1])] for t in range(GRID[0])
    ]
    return {
        "role": "transformer", "tile": list(TILE),
        "count": list(COUNT), "mass": mass, "columns": [1] if number % 3 == 0 else [],
        "kept": [list(offset) for _, offset in order[: draw.randint(20, 70)]],
        "attention": attention, "query": query,
    }


PLANS = (  # name, kind, speed, psnr, pattern
    ("searched, 1.2x", "searched", 1.2, 34.0, None),
    ("searched, 1.35x", "searched", 1.33, 31.2, None),
    ("searched, 1.6x", "searched", 1.62, 28.6, None),
    ("searched, 2x", "searched", 2.01, 25.7, None),
    ("stencil, 0.25", "uniform static", 1.41, 28.9, "stencil, learned per head"),
    ("neighborhood, 0.25", "uniform static", 1.42, 25.6, "neighborhood((0.5, 0.7, 0.7))"),
    ("radial, 0.25", "uniform static", 1.44, 25.3, "radial(decay=0.2)"),
    ("raster band, 0.25", "uniform static", 1.43, 23.7, "diagonal(126)"),
    ("sliding_tile, 0.4", "uniform static", 1.24, 27.5, "sliding_tile((1, 4, 4), (5, 3, 3))"),
    ("top_blocks(0.25)", "uniform dynamic", 1.38, 29.5, 'top_blocks(0.25, rest="pooled")'),
    ("pyramid()", "uniform dynamic", 1.3, 30.4, "pyramid()"),
    ("Sparse-vDiT's rule", "published rule", 1.46, 24.1, None),
    ("SVG's choice", "published rule", 1.4, 24.9, "online_choice(...)"),
    ("random assignment", "random", 1.35, 23.1, None),
    ("oracle's blocks, 0.25", "oracle", 1.39, 32.6, None),
    ("dense", "dense", 1.0, None, "dense()"),
)  # fmt: skip


def _front(draw):
    return [
        {"name": name, "kind": kind, "speed": speed, "measured": None if kind == "oracle" else
         speed * draw.uniform(0.93, 1.02), "error": 0.0 if psnr is None else 10 ** (-psnr / 18),
         "psnr": psnr, "psnr_low": psnr and psnr - 1.1, "psnr_high": psnr and psnr + 1.1,
         "chosen": name == "searched, 1.35x", "pattern": pattern}
        for name, kind, speed, psnr, pattern in PLANS
    ]  # fmt: skip


def _table(draw):
    rows = []
    for row in _front(draw):
        psnr = row["psnr"]
        against = None if psnr is None or row["chosen"] else 31.2 - psnr
        rows.append({
            **{key: row[key] for key in ("name", "kind", "pattern", "error", "measured", "psnr",
                                         "psnr_low", "psnr_high")},
            "predicted": row["speed"], "density": 0.33 / row["speed"] ** 2,
            "executed": 0.4 / row["speed"] ** 2, "against": against,
            "against_low": None if against is None else against - 1.3,
            "against_high": None if against is None else against + 1.3,
            "ssim": psnr and 1 - 10 ** (-psnr / 21), "flicker": 0.0208,
            "flips": "1 of 60" if row["chosen"] else "0 of 60",
            "note": "chooses at every step" if row["kind"] == "uniform dynamic" else None,
        })  # fmt: skip
    return rows


def example_videos(folder: Path, count: int = len(PROMPTS)):
    """Pairs of small mp4 files in base64: a square that moves, and the same with some noise."""
    import torch

    from visattn.media.video import write_video

    pairs = []
    noise = torch.Generator().manual_seed(0)
    for seed in range(count):
        frames = torch.full((25, 96, 96, 3), 0.12)
        frames += torch.linspace(0, 0.25, 96)[None, :, None, None] * torch.tensor([0.4, 0.7, 1])
        for n, frame in enumerate(frames):
            at, up = (8 + 2 * n, 36) if seed % 2 == 0 else (36, 60 - 2 * n)
            frame[up : up + 26, at : at + 26] = torch.eye(3)[seed % 3] * 0.6 + 0.25
        rough = torch.rand(frames.shape, generator=noise).sub(0.5).mul(0.12)
        pair = []
        for name, video in (("dense", frames), ("sparse", (frames + rough).clamp(0, 1))):
            write_video(video, folder / f"{name}.mp4", fps=8)
            pair.append(base64.b64encode((folder / f"{name}.mp4").read_bytes()).decode())
        pairs.append(tuple(pair))
    return pairs
