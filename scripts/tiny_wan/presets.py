"""Sizes, steps and batches of a training run, one for each kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, field

# Latent grids (frames, height, width); a clip has 4 × (frames − 1) + 1 frames of 8 × the size.
Grid = tuple[int, int, int]


def clip_size(grid: Grid) -> tuple[int, int, int]:
    """Return (frames, height, width) of the clip that has this latent grid."""
    return 4 * (grid[0] - 1) + 1, 8 * grid[1], 8 * grid[2]


@dataclass(frozen=True)
class Phase:
    """Shares of the grids in the steps until ``until``, a share of all steps."""

    until: float
    shares: dict[Grid, float]


@dataclass(frozen=True)
class Preset:
    """One training run. Steps can be changed when resuming; everything else belongs to the run."""

    name: str
    device: str = "cpu"
    bfloat16: bool = False
    rich: bool = False
    seed: int = 0
    workers: int = 0
    # Autoencoder
    encoder_width: int = 32
    decoder_width: int = 24
    autoencoder_steps: int = 4500
    autoencoder_batch: int = 4
    crop: tuple[int, int] = (9, 48)  # frames, height and width
    sides: tuple[int, ...] = (64, 96, 128)  # of the frames that crops are taken from
    decoder_steps: int = 800  # of the decoder alone
    decoder_batch: int = 2
    decoder_crop: tuple[int, int] = (25, 48)
    # Denoiser
    layers: int = 12
    # Heads of 64: of 32, rotary positions have one frequency for each spatial axis that tells
    # tokens apart, of a period of 6.3 of them; wider grids then look alike to it. Of 64 there are
    # three, and what is learnt on 8 x 8 tokens holds on 12 x 12.
    heads: int = 2
    head_size: int = 64
    feed_forward: int = 512
    denoiser_steps: int = 4600
    batches: dict[Grid, int] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    text_lengths: dict[int, float] = field(default_factory=lambda: {16: 0.7, 64: 0.15, 512: 0.15})
    # What is generated
    default_grid: Grid = (9, 16, 16)
    evaluation_grid: Grid = (7, 12, 12)
    evaluation_steps: int = 12
    guidance: float = 4.0

    def shares(self, progress: float) -> dict[Grid, float]:
        """Return the shares of the grids when ``progress`` of all steps is done."""
        return next((p.shares for p in self.phases if progress < p.until), self.phases[-1].shares)


CLIP, SHORT, MEDIUM, LONG, LONGEST = (5, 6, 6), (5, 8, 8), (7, 12, 12), (9, 16, 16), (17, 16, 16)
# Single frames: what an object is shows in one, at a fraction of a clip's cost.
SMALL_STILL, STILL, WIDE_STILL = (1, 5, 5), (1, 8, 8), (1, 12, 12)

CPU = Preset(
    name="cpu",
    batches={
        MEDIUM: 4, LONG: 2, SHORT: 12, CLIP: 24, SMALL_STILL: 160, STILL: 64, WIDE_STILL: 28
    },
    # First what objects look like, then how they move, then the sizes that are generated.
    phases=(
        Phase(0.445, {SMALL_STILL: 0.6, STILL: 0.15, CLIP: 0.15, SHORT: 0.1}),
        Phase(
            0.7,
            {SMALL_STILL: 0.3, STILL: 0.15, WIDE_STILL: 0.25, CLIP: 0.05, SHORT: 0.1, MEDIUM: 0.15},
        ),
        Phase(
            0.78,
            {SMALL_STILL: 0.1, STILL: 0.1, WIDE_STILL: 0.2, SHORT: 0.1, MEDIUM: 0.4, LONG: 0.1},
        ),
        Phase(
            1.0,
            {SMALL_STILL: 0.05, STILL: 0.05, WIDE_STILL: 0.35, SHORT: 0.05, MEDIUM: 0.4, LONG: 0.1},
        ),
    ),
)
GPU = Preset(
    name="gpu",
    device="cuda",
    bfloat16=True,
    rich=True,
    workers=12,
    encoder_width=64,
    decoder_width=48,
    autoencoder_steps=3000,
    autoencoder_batch=16,
    crop=(17, 64),
    decoder_steps=400,
    decoder_batch=8,
    decoder_crop=(65, 64),
    denoiser_steps=10000,
    batches={SHORT: 128, MEDIUM: 48, LONG: 24, LONGEST: 12},
    phases=(
        Phase(0.4, {SHORT: 0.8, MEDIUM: 0.2}),
        Phase(1.0, {SHORT: 0.3, MEDIUM: 0.3, LONG: 0.2, LONGEST: 0.2}),
    ),
    text_lengths={32: 0.5, 64: 0.2, 512: 0.3},
    default_grid=LONGEST,
)
# Everything once, in seconds: for the tests.
TOY = Preset(
    name="toy",
    encoder_width=8,
    decoder_width=8,
    autoencoder_steps=24,
    autoencoder_batch=2,
    crop=(5, 32),
    sides=(48,),
    decoder_steps=6,
    decoder_crop=(9, 32),
    layers=2,
    heads=2,
    head_size=16,
    feed_forward=64,
    denoiser_steps=24,
    batches={(2, 4, 4): 8, (3, 6, 6): 2, (1, 6, 6): 6},
    phases=(Phase(1.0, {(2, 4, 4): 0.6, (3, 6, 6): 0.2, (1, 6, 6): 0.2}),),
    text_lengths={16: 0.75, 32: 0.25},
    default_grid=(3, 6, 6),
    evaluation_grid=(2, 4, 4),
    evaluation_steps=2,
)
PRESETS = {preset.name: preset for preset in (CPU, GPU, TOY)}
