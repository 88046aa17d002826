"""The error of every candidate on every head, from sampled rows of dense generations.

The softmax of a row is computed once. A static candidate keeps some of its weights, and its output
is their sum over the kept mass; a dynamic one chooses by the whole call, and its output is read at
the same rows. Three losses of a head are kept::

    projected   |W_h (o - o')|^2 / |sum_h W_h o|^2    W_h: its columns of the output projection
    output      |o - o'|^2 / |o|^2
    mass        the softmax's mass that is left out, the mean over rows

The first is what the search goes by; the others are what published rules go by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visattn.attention import sparse_attention
from visattn.geometry.layout import TokenLayout
from visattn.inject import Observation
from visattn.patterns import HeadPattern, Pattern, Skip, Stencil
from visattn.readout import Tiling, attention_rows, draw_rows
from visattn.search.measure.recorded_attention import AttentionSample, SamplePlace, calls_of
from visattn.search.measure.tile_grid import TileGrid

__all__ = ["LOSSES", "CandidatePool", "CandidateScorer"]

LOSSES = ("projected", "output", "mass")

MASKED = 1 << 26  # elements of masked weights that are there at a time
Layer = tuple[str, int]  # role, number


@dataclass(frozen=True)
class CandidatePool:
    """What heads may run besides Dense.

    Args:
        static, dynamic: for every head, each with the name of its family.
        stencils: by (role, layer), for each head as many as for any other.
    """

    static: tuple[tuple[str, Pattern], ...]
    dynamic: tuple[tuple[str, HeadPattern], ...]
    stencils: Mapping[Layer, Sequence[Sequence[Stencil]]]

    def options(self, layer: Layer, head: int) -> list[tuple[str, HeadPattern]]:
        """The candidates of a head with their families, in the order of the errors: static,
        dynamic, its own stencils, Skip."""
        own = self.stencils[layer][head] if layer in self.stencils else ()
        stencils: list[tuple[str, HeadPattern]] = [("stencil", stencil) for stencil in own]
        return [*self.static, *self.dynamic, *stencils, ("skip", Skip())]

    def words(self, layers: Collection[Layer]) -> dict[str, Any]:
        """What the pool is, as JSON values."""
        return {
            "static": [repr(pattern) for _, pattern in self.static],
            "dynamic": [repr(pattern) for _, pattern in self.dynamic],
            "stencils": [
                [role, number, [list(map(repr, head)) for head in self.stencils[role, number]]]
                for role, number in sorted(set(layers) & set(self.stencils))
            ],
        }


class CandidateScorer:
    """An observer that takes the errors of a pool on a generation.

    Args:
        pool: the candidates; weights: gives the output projection ``[out, H D]`` of (role, layer).
        steps: that are read; grids: the tiles of the stencils.
        tiles, rows_per_tile, seed: of the sample of rows, as ``draw_rows`` takes them.
        exact: score all rows and whole outputs, which is slower and what the sample stands for.
    """

    def __init__(
        self,
        pool: CandidatePool,
        weights: Callable[[Layer], torch.Tensor],
        steps: Collection[int],
        grids: Sequence[TileGrid],
        tiles: int,
        rows_per_tile: int,
        seed: int = 1,
        *,
        exact: bool = False,
    ) -> None:
        self.pool, self.weights, self.steps, self.grids = pool, weights, steps, grids
        self.tiles, self.rows_per_tile, self.seed, self.exact = tiles, rows_per_tile, seed, exact
        self.layout: TokenLayout | None = None
        self.places: list[SamplePlace] = []
        self.errors: list[torch.Tensor] = []
        self.failures: dict[str, str] = {}
        self._broken: set[HeadPattern] = set()  # candidates that ran out of memory or do not fit
        self._grams: dict[Layer, torch.Tensor] = {}

    def __call__(self, observation: Observation) -> None:
        for call in calls_of(observation, self.steps):
            if self.layout is None:
                self._begin(call)
            errors = self._errors(call)
            if not bool(torch.isfinite(errors[:, -1]).all()):  # of Skip
                self.failures[f"{call.layer}, step {call.place.step}, {call.place.pass_}"] = (
                    "its attention is not finite; the call is left out"
                )
                continue
            self.places.append(call.place)
            self.errors.append(errors)

    def item(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What is kept of a generation: losses ``[calls, H, candidates, 3]``, NaN where one could
        not be computed."""
        places = [list(own) for own in self.places]
        value = {"places": places, "failures": self.failures}
        return value, {"errors": torch.stack(self.errors)} if self.errors else {}

    # ---- one call

    def _begin(self, call: AttentionSample) -> None:
        self.layout, device = call.layout, call.q.device
        if self.exact:
            start, grid = call.layout.grids[0]
            self.rows = torch.arange(start, start + grid.numel)
        else:
            self.rows = draw_rows(
                call.layout,
                [Tiling(self.grids[0].tile)],
                tiles=self.tiles,
                rows_per_tile=self.rows_per_tile,
                seed=self.seed,
            ).tokens
        everything = torch.arange(call.layout.length)
        self.masks = torch.zeros(
            len(self.pool.static), len(self.rows), len(everything), dtype=torch.bool, device=device
        )
        self.unfit: list[int] = []
        for number, (family, pattern) in enumerate(self.pool.static):
            try:
                kept = pattern.allows(self.rows[:, None], everything, call.layout)
            except ValueError as error:  # chosen for another grid
                self.unfit.append(number)
                self.failures[f"{family}: {pattern}"] = str(error)
                continue
            self.masks[number] = kept.to(device)
        self.numbers = [
            grid.offset(grid.owner[self.rows][:, None], torch.arange(grid.count.numel)).to(device)
            for grid in self.grids
        ]

    def _errors(self, call: AttentionSample) -> torch.Tensor:
        """Losses of the candidates of every head, float64 ``[H, candidates, 3]``, as LOSSES names
        them."""
        layer = call.place.role, call.place.number
        heads = len(call.q)
        group = heads // len(call.k)
        weights = self.weights(layer).to(call.q.device)
        gram = self._gram(layer, heads, weights)
        exact = torch.empty(heads, len(self.rows), call.v.shape[2], device=call.q.device)
        count = len(self.pool.options(layer, 0)) - 1
        sums = torch.zeros(heads, count - len(self.pool.dynamic), 3, dtype=torch.float64)
        for chunk in attention_rows(call.q, call.k, self.rows, scale=call.scale, valid=call.valid):
            for place, head in enumerate(range(chunk.heads.start, chunk.heads.stop)):
                own, v = chunk.weights[place], call.v[head // group].float()
                exact[head, chunk.rows] = out = own @ v
                found = [
                    _losses(out, kept, gram[head])
                    for kept in (
                        *self._static(own, v, chunk.rows),
                        *self._stencils(layer, head, own, v, chunk.rows),
                    )
                ]
                if found:
                    sums[head] += torch.cat(found).double().cpu()
        whole = (exact.transpose(0, 1).flatten(1) @ weights.mT).double().square().sum().cpu()
        nothing = torch.zeros(1, *exact.shape[1:], device=exact.device)
        nothing = torch.cat([nothing, nothing[..., :1]], -1)
        skip = torch.stack([_losses(out, nothing, g) for out, g in zip(exact, gram, strict=True)])
        own_norm = exact.double().square().sum((-2, -1)).cpu()
        at = len(self.pool.static)
        sums[:, self.unfit] = torch.nan
        for head, line in enumerate(self.pool.stencils.get(layer, ())):
            for number, stencil in enumerate(line):
                if not self._fits(stencil):
                    sums[head, at + number] = torch.nan
        parts = [sums[:, :at], self._dynamic(call, exact, gram), sums[:, at:], skip.double().cpu()]
        losses = torch.cat(parts, 1)
        rows = torch.full((heads,), len(self.rows))
        return losses / torch.stack([whole.expand(heads), own_norm, rows], 1)[:, None]

    def _gram(self, layer: Layer, heads: int, weights: torch.Tensor) -> torch.Tensor:
        """``W_h^T W_h`` of each head, ``[H, D, D]``."""
        if layer not in self._grams:
            own = weights.unflatten(1, (heads, -1)).transpose(0, 1)
            self._grams[layer] = own.mT @ own
        return self._grams[layer]

    def _static(
        self, weights: torch.Tensor, v: torch.Tensor, rows: slice
    ) -> Iterator[torch.Tensor]:
        """Sums of the static candidates' kept values and, in the last column, weights: ``[c, r, D +
        1]``, some candidates at a time."""
        step = max(1, MASKED // weights.numel())
        counted = torch.cat([v, torch.ones_like(v[:, :1])], 1)
        for begin in range(0, len(self.masks), step):
            yield (weights * self.masks[begin : begin + step, rows]) @ counted

    def _stencils(
        self, layer: Layer, head: int, weights: torch.Tensor, v: torch.Tensor, rows: slice
    ) -> Iterator[torch.Tensor]:
        """The same of the head's own stencils, by sums over tiles."""
        own = self.pool.stencils[layer][head] if layer in self.pool.stencils else ()
        for grid, numbers in zip(self.grids, self.numbers, strict=True):
            stencils = [stencil for stencil in own if stencil.tile == grid.tile]
            if not stencils:
                continue
            tables = torch.stack([stencil.table(grid.count).flatten() for stencil in stencils])
            columns = torch.zeros(len(stencils), grid.count.numel, dtype=torch.bool)
            for number, stencil in enumerate(stencils):
                if self._fits(stencil):
                    columns[number, list(stencil.columns)] = True
            kept = tables.to(v.device)[:, numbers[rows]] | columns.to(v.device)[:, None]
            tokens, exists = grid.tokens.to(v.device), grid.exists.to(v.device)
            part = (weights[:, tokens] * exists).transpose(0, 1)  # [n, r, size]
            sums = torch.cat([part @ v[tokens], part.sum(-1, keepdim=True)], -1)  # [n, r, D + 1]
            total = torch.einsum("crn,nrd->crd", kept.float(), sums)
            outside = grid.owner.to(v.device) < 0
            if bool(outside.any()):  # text is always seen
                other = weights[:, outside]
                total = total + torch.cat([other @ v[outside], other.sum(-1, keepdim=True)], -1)
            yield total

    def _fits(self, stencil: Stencil) -> bool:
        """Whether a stencil that was learned at another grid has its columns in this one."""
        grid = next(grid for grid in self.grids if grid.tile == stencil.tile)
        return max(stencil.columns, default=0) < grid.count.numel

    def _dynamic(
        self, call: AttentionSample, exact: torch.Tensor, gram: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the dynamic candidates, ``[H, E, 3]``; NaN where one cannot run, and for the
        mass, which they do not say."""
        found = torch.full((len(call.q), len(self.pool.dynamic), 3), torch.nan, dtype=torch.float64)
        q, k, v = (x[None] for x in (call.q, call.k, call.v))
        rows = self.rows.to(q.device)
        for number, (family, pattern) in enumerate(self.pool.dynamic):
            if pattern in self._broken:
                continue
            try:
                every = sparse_attention(
                    q,
                    k,
                    v,
                    pattern,
                    call.layout,
                    text_lengths=call.text_lengths,
                    scale=call.scale,
                )
            except Exception as error:  # Triton has errors of types of its own
                self._broken.add(pattern)
                self.failures[f"{family}: {pattern}"] = " ".join(str(error).split())[:300]
                continue
            apart = exact - every[0][:, rows].float()
            found[:, number, 0] = ((apart @ gram) * apart).sum((-2, -1)).double().cpu()
            found[:, number, 1] = apart.square().sum((-2, -1)).double().cpu()
        return found


def _losses(out: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Sums over rows of ``|W (o - o')|^2``, ``|o - o'|^2`` and the dropped mass, ``[c, 3]``, of
    exact outputs ``[r, D]`` and of what candidates keep, ``[c, r, D + 1]``."""
    mass = kept[..., -1:]
    apart = out - kept[..., :-1] / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.stack(
        [
            ((apart @ gram) * apart).sum((-2, -1)),
            apart.square().sum((-2, -1)),
            (1 - mass).sum((-2, -1)),
        ],
        1,
    )
