"""Attention of known structure, and what a search makes of it without a pipeline."""

import torch

from visattn.geometry.layout import Grid, TokenLayout
from visattn.inject import Observation
from visattn.patterns import Dense, Skip
from visattn.plan import Denoiser
from visattn.search.candidates.learned_stencils import Learner, learned, stencils_of
from visattn.search.candidates.static import LEVELS, members, static_families
from visattn.search.measure.latency import HeadLatency, LayerLatency
from visattn.search.measure.output_losses import CandidatePool, CandidateScorer
from visattn.search.solve.price_table import PriceTable, losses_of
from visattn.tasks.result_store import StoredResult

GRID = Grid(4, 8, 8)
LAYOUT = TokenLayout(GRID)
BLOCK = 16
LEVELS_OF_STENCILS = (0.03, 0.06, 0.1, 0.15, 0.25, 0.4)
PROMPTS = 4
LOUD = 16  # of the diffuse head, whose outputs are means of many values and so small


def offsets_of(tile, grid=GRID):
    """Relative tile offsets of every pair of tokens, int64 ``[L, L, 3]``."""
    places = torch.stack(grid.coordinates(torch.arange(grid.numel)), 1) // torch.tensor(tile)
    return places[None] - places[:, None]


def structures(prompt):
    """Unnormalised weights ``[L, L]`` by name; that of ``moving`` depends on the prompt."""
    far = offsets_of((1, 1, 1))
    t, h, w = far.unbind(-1)
    line = torch.arange(GRID.numel)
    raster = (line[None] - line[:, None]).abs()
    tiles = offsets_of((1, 4, 4))
    several = torch.zeros(GRID.numel, GRID.numel)
    for offset in ((0, 0, 0), (2, 0, 0), (-1, 0, 1)):
        several += (tiles == torch.tensor(offset)).all(-1)
    columns = torch.zeros(GRID.numel)
    columns[:16] = 1  # two rows of frame 0
    number = torch.arange(GRID.numel).view(4, 2, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(16, 16)
    owner = torch.empty(GRID.numel, dtype=torch.long)
    owner[number.flatten()] = torch.arange(16).repeat_interleave(16)
    target = torch.randperm(16, generator=torch.Generator().manual_seed(prompt))
    moving = target[owner][:, None] == owner
    return {
        "diagonal": (raster <= 10).float(),
        "temporal": ((h == 0) & (w == 0)).float(),
        "column": columns.expand(GRID.numel, -1) + (raster == 0),
        "diffuse": torch.ones(GRID.numel, GRID.numel),
        "local": ((t.abs() <= 1) & (h.abs() <= 1) & (w.abs() <= 1)).float(),
        "several": several,
        "moving": moving.float(),
    }


NAMES = tuple(structures(0))


def observation(prompt, step=0, broken=False):
    """A call with a head for each structure: keys are unit vectors, queries logarithms."""
    weights = torch.stack(list(structures(prompt).values())) + 1e-6
    length = GRID.numel
    q = weights.log()[None]
    k = torch.eye(length).expand(1, len(NAMES), -1, -1)
    generator = torch.Generator().manual_seed(prompt)
    v = torch.randn(1, len(NAMES), length, length, generator=generator)
    v[..., 8:] = 0  # of which eight are enough
    if broken:
        q = q.clone()
        q[0, 0] = torch.nan
    return Observation("transformer", "blocks.0", 0, step, 1, ("cond",), q, k, v, LAYOUT, 1.0)


def weights_of():
    """Output projections that keep the eight columns of every head apart."""
    length = GRID.numel
    out = torch.zeros(8 * len(NAMES), length * len(NAMES))
    for head in range(len(NAMES)):
        own = torch.eye(8) * (LOUD if NAMES[head] == "diffuse" else 1)
        out[8 * head : 8 * head + 8, head * length : head * length + 8] = own
    return {("transformer", 0): out}


def learn(prompts, **options):
    """A Learner that has seen some prompts."""
    learner = Learner({0}, BLOCK, 12, 8)
    for prompt in prompts:
        learner(observation(prompt, **options))
    return learner


def table(levels=LEVELS[1::2], dynamic=()):
    """What a search knows of the heads; a pattern takes as long as it keeps pairs, a dynamic one as
    its share says."""
    learner = learn(range(PROMPTS))
    tables = learned([StoredResult(*learner.item())], lambda step: 0)[0, "transformer", 0]
    stencils = {("transformer", 0): stencils_of(tables, learner.grids, LEVELS_OF_STENCILS)}
    static = [
        (family, pattern)
        for family, own in static_families(GRID, BLOCK).items()
        for pattern in members(own, LAYOUT, levels)
    ]
    static = list({pattern: (family, pattern) for family, pattern in static}.values())
    pool = CandidatePool(tuple(static), tuple(dynamic), stencils)
    scorer = CandidateScorer(pool, weights_of().__getitem__, {0}, learner.grids, 12, 8)
    for prompt in range(PROMPTS, 2 * PROMPTS):
        scorer(observation(prompt))
    seconds = {repr(Dense()): HeadLatency(1.0, 1.0), repr(Skip()): HeadLatency(0.0, 0.0)}
    for own in [p for _, p in static] + [p for head in stencils["transformer", 0] for p in head]:
        seconds[repr(own)] = HeadLatency(own.density(LAYOUT), own.density(LAYOUT))
    for _, own in dynamic:
        seconds[repr(own)] = HeadLatency(own.keep, own.keep)
    return PriceTable(
        pool=pool,
        times=LayerLatency(seconds, len(NAMES), True),
        calls=losses_of([StoredResult(*scorer.item())], lambda step: 0),
        heads={("transformer", 0): len(NAMES)},
        paths={("transformer", 0): "blocks.0"},
        runs={(0, "transformer"): 1},
        generation=float(len(NAMES)) + 1,
        layout=LAYOUT,
        denoisers={"transformer": Denoiser("WanTransformer3DModel", 1, len(NAMES))},
    )
