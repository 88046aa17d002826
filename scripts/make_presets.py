"""Write the presets: plans of published methods at their published settings, which nobody searched.

    python scripts/make_presets.py [--output assets/plans/presets]

One folder a preset, with a ``visattn_plan.json``; ``--plan`` and ``Plan.from_pretrained`` take the
folder. Each number is one that its authors publish, in their paper or as the default of their
scripts. There are presets for model families only that plans can be applied to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from visattn import Grid, TokenLayout
from visattn.bench.architectures import ARCHITECTURES, skeleton
from visattn.inject.models.denoisers import describe
from visattn.patterns import (
    AxisOrder,
    Diagonal,
    HeadPattern,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    SlidingTile,
    Stripe,
    Union,
)
from visattn.pipelines.families import FAMILIES
from visattn.plan import Denoiser, Plan, Rule
from visattn.plan.show.plan_view import rounded
from visattn.selectors import OnlineChoice

PRESETS_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "plans" / "presets"

RADIAL = (
    "Li et al. 2025, Radial Attention, arXiv 2506.19852; "
    "scripts of mit-han-lab/radial-attention at 72788d4"
)
SPARSE_VIDEOGEN = (
    "Xi et al. 2025, Sparse VideoGen, arXiv 2502.01776; "
    "scripts of svg-project/Sparse-VideoGen at 5ce7b01"
)
SLIDING_TILE = (
    "Zhang et al. 2025, Sliding Tile Attention, arXiv 2502.04507; "
    "hao-ai-lab/FastVideo, branch sta_do_not_delete"
)
NEIGHBORHOOD = "Hassani et al. 2025, Generalized Neighborhood Attention, arXiv 2504.16922"
WAN_21 = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
WAN_21_IMAGE = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
WAN_22 = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
HUNYUAN = "hunyuanvideo-community/HunyuanVideo"
BOTH = ("transformer", "transformer_2")


class Preset(NamedTuple):
    """A published setting.

    Args:
        model: hub id; architecture: its denoisers', a name of ARCHITECTURES; roles: of these.
        video: what it was published for, in words; grid: its latent tokens; steps: of a generation,
            where they are published.
        pattern: of every head; dense_layers, dense_steps: as in a Plan.
        source, setting: whose it is, and what they publish; note: what to know before using it.
    """

    model: str
    video: str
    grid: Grid
    steps: int | None
    pattern: HeadPattern
    dense_layers: tuple[int, ...]
    dense_steps: tuple[int | float, int | float]
    source: str
    setting: str
    note: str | None = None
    architecture: str = "wan2.1-14b"
    roles: tuple[str, ...] = ("transformer",)


def sparse_videogen_beside_text(grid: Grid, text: int, share: float) -> OnlineChoice:
    """A band in raster or in (h, w, t) order, whichever suits a head better, without a sink.

    Args:
        text: tokens that see and are seen by all, which the share includes; the width is rounded
            down to blocks of 128, and the band ends before it.
    """
    tokens = grid.numel + text
    share -= 2 * text / tokens
    width = int(tokens * (1 - (1 - share) ** 0.5)) // 128 * 128 - 1
    return OnlineChoice((Diagonal(width), MultiDiagonal(width)), rows=64)


def sparse_videogen(grid: Grid, share: float) -> OnlineChoice:
    """A band in raster or in (h, w, t) order, whichever suits a head better, and a sink of as many
    keys as a frame has, which are the first ones of the order that the band is in.

    Args:
        share: of the keys that the bands are to have; their width is rounded up to blocks of 128.
    """
    tokens, frame = grid.numel, grid.height * grid.width
    width = -(-int(tokens * (1 - (1 - share) ** 0.5)) // 128) * 128
    sink = AxisOrder(Stripe(first_frame=False, columns=((0, frame),)), "hwt")
    return OnlineChoice(
        (Union(Diagonal(width), Stripe()), Union(MultiDiagonal(width), sink)), rows=64
    )


PRESETS = {
    "wan2.1-14b-radial": Preset(
        WAN_21,
        "69 frames of 768x1280",
        Grid(18, 48, 80),
        50,
        Radial(decay=0.2, sink=True),
        dense_layers=(0,),
        dense_steps=(12, 0),
        source=RADIAL,
        setting="decay 0.2, first-frame sink, dense_layers 1, dense_timesteps 12",
    ),
    "wan2.1-14b-radial-8-steps": Preset(
        WAN_21,
        "69 frames of 768x1280",
        Grid(18, 48, 80),
        8,
        Radial(decay=0.2, sink=True),
        dense_layers=(0,),
        dense_steps=(2, 0),
        source=RADIAL,
        setting="decay 0.2, first-frame sink, dense_layers 1, dense_timesteps 2",
        note="for FusionX, which takes 8 steps",
    ),
    "wan2.1-14b-radial-4-steps": Preset(
        WAN_21,
        "69 frames of 768x1280",
        Grid(18, 48, 80),
        4,
        Radial(decay=0.2, sink=True),
        dense_layers=(0,),
        dense_steps=(1, 0),
        source=RADIAL,
        setting="decay 0.2, first-frame sink, dense_layers 1, dense_timesteps 1",
        note="for Lightx2v, which takes 4 steps",
    ),
    "wan2.1-14b-radial-161-frames": Preset(
        WAN_21,
        "161 frames of 720x1280",
        Grid(41, 45, 80),
        50,
        Radial(decay=1.0, sink=True),
        dense_layers=(0, 1),
        dense_steps=(2, 0),
        source=RADIAL,
        setting="decay 1, first-frame sink, dense_layers 2, dense_timesteps 2, at twice the length",
        note="longer videos want the authors' LoRA, whose weights are not released",
    ),
    "wan2.2-a14b-radial": Preset(
        WAN_22,
        "77 frames of 768x1280",
        Grid(20, 48, 80),
        40,
        Radial(decay=0.8, sink=True),
        dense_layers=(0,),
        dense_steps=(11, 0),
        source=RADIAL,
        setting="decay 0.8, first-frame sink, dense_layers 1, dense_timesteps 11",
        roles=BOTH,
    ),
    "wan2.1-14b-sparse-videogen": Preset(
        WAN_21,
        "81 frames of 720x1280",
        Grid(21, 45, 80),
        50,
        sparse_videogen(Grid(21, 45, 80), 0.3),
        dense_layers=(0,),
        dense_steps=(0.2, 0),
        source=SPARSE_VIDEOGEN,
        setting="sparsity 0.3, first_times_fp 0.2, first_layers_fp 0.03, num_sampled_rows 64",
        note="each head chooses between two static patterns at run time",
    ),
    "wan2.1-i2v-14b-sparse-videogen": Preset(
        WAN_21_IMAGE,
        "81 frames of 720x1280",
        Grid(21, 45, 80),
        40,
        sparse_videogen(Grid(21, 45, 80), 0.3),
        dense_layers=(0,),
        dense_steps=(0.35, 0),
        source=SPARSE_VIDEOGEN,
        setting="sparsity 0.3, first_times_fp 0.35, first_layers_fp 0.03, num_sampled_rows 64",
        note="each head chooses between two static patterns at run time",
    ),
    "hunyuanvideo-radial": Preset(
        HUNYUAN,
        "117 frames of 768x1280",
        Grid(30, 48, 80),
        50,
        Radial(decay=0.95),
        dense_layers=(),
        dense_steps=(12, 0),
        source=RADIAL,
        setting="decay 0.95, no sink, dense_layers 0, dense_timesteps 12",
        architecture="hunyuanvideo",
    ),
    "hunyuanvideo-radial-509-frames": Preset(
        HUNYUAN,
        "509 frames of 720x1280",
        Grid(128, 45, 80),
        50,
        Radial(decay=1.0),
        dense_layers=(0, 1),
        dense_steps=(2, 0),
        source=RADIAL,
        setting="decay 1, no sink, dense_layers 2, dense_timesteps 2, at four times the length",
        note="longer videos want the authors' LoRA, whose weights are not released",
        architecture="hunyuanvideo",
    ),
    "hunyuanvideo-sparse-videogen": Preset(
        HUNYUAN,
        "129 frames of 720x1280",
        Grid(33, 45, 80),
        50,
        sparse_videogen_beside_text(Grid(33, 45, 80), 256, 0.25),
        dense_layers=(0,),
        dense_steps=(0.1, 0),
        source=SPARSE_VIDEOGEN,
        setting="sparsity 0.25, first_times_fp 0.1, first_layers_fp 0.03, num_sampled_rows 64",
        note="each head chooses between two static patterns at run time",
        architecture="hunyuanvideo",
    ),
    "hunyuanvideo-sliding-tile": Preset(
        HUNYUAN,
        "117 frames of 768x1280",
        Grid(30, 48, 80),
        50,
        SlidingTile((6, 8, 8), (5, 5, 5)),
        dense_layers=(),
        dense_steps=(0, 0),
        source=SLIDING_TILE,
        setting="training-free, tiles of (6, 8, 8), window (30, 40, 40)",
        architecture="hunyuanvideo",
    ),
    "hunyuanvideo-neighborhood": Preset(
        HUNYUAN,
        "117 frames of 768x1280",
        Grid(30, 48, 80),
        50,
        Neighborhood((18, 24, 24), stride=(16, 8, 8)),
        dense_layers=(),
        dense_steps=(15, 0),
        source=NEIGHBORHOOD,
        setting="window (18, 24, 24), stride (16, 8, 8), 15 dense steps",
        architecture="hunyuanvideo",
    ),
}


def density(preset: Preset) -> float:
    """Kept share of the pairs in each head that is not dense, at the preset's geometry.

    Raises:
        ValueError: heads that choose between patterns choose between different densities.
    """
    own = preset.pattern
    patterns = own.patterns if isinstance(own, OnlineChoice) else (own,)
    layout = TokenLayout(preset.grid)
    found = {rounded(p.density(layout)) for p in patterns if isinstance(p, Pattern)}
    if len(found) != 1:
        raise ValueError(f"pattern {own!r} has the densities {sorted(map(str, found))}, not one")
    return found.pop() or 0.0


def denoiser(architecture: str) -> Denoiser:
    """What a denoiser of the real configuration is; its weights are made on ``meta``, and of one
    layer only."""
    own = ARCHITECTURES[architecture]
    one = describe(skeleton(own, layers=1), FAMILIES[own.model])
    return Denoiser(one.kind, own.layers, one.heads)


def plans() -> dict[str, Plan]:
    """The presets as plans, by name."""
    known = {name: denoiser(name) for name in {own.architecture for own in PRESETS.values()}}
    return {
        name: Plan(
            rules=(Rule(own.pattern),),
            dense_layers=own.dense_layers,
            dense_steps=own.dense_steps,
            geometry=TokenLayout(own.grid),
            model=own.model,
            denoisers=dict.fromkeys(own.roles, known[own.architecture]),
            provenance={
                "kind": "preset, unsearched",
                "source": own.source,
                "setting": own.setting,
                "video": own.video + (f", {own.steps} steps" if own.steps else ""),
                "density": density(own),
            }
            | ({} if own.note is None else {"note": own.note}),
        )
        for name, own in PRESETS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the presets.")
    parser.add_argument("--output", type=Path, default=PRESETS_FOLDER, metavar="FOLDER")
    folder = parser.parse_args().output
    for name, plan in plans().items():
        plan.save_pretrained(folder / name)
        print(f"wrote {folder / name}")


if __name__ == "__main__":
    main()
