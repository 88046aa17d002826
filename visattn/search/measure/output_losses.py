"""The error of every candidate on every head, from sampled rows of dense generations.

The softmax of a row is computed once. A static candidate keeps some of the weights of the row; its
output is the weighted sum of the values over the kept mass. A dynamic candidate runs on the whole
call, and its output is read at the same rows. Three losses of a head are kept::

    projected   |W_h (o - o')|^2 / |sum_h W_h o|^2    W_h: its columns of the output projection
    output      |o - o'|^2 / |o|^2
    mass        the softmax mass that the candidate leaves out, the mean over rows

The search minimises the first loss; published rules use the others.
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

MASKED = 1 << 26  # elements of masked weights that are in memory at a time
Layer = tuple[str, int]  # role, number


@dataclass(frozen=True)
class CandidatePool:
    """The candidates of all heads, without Dense.

    Args:
        static: static candidates of every head, each with the name of its family.
        dynamic: dynamic candidates of every head, each with the name of its family.
        stencils: the learned stencils of each head by (role, layer); all heads of a layer have the
            same number.
    """

    static: tuple[tuple[str, Pattern], ...]
    dynamic: tuple[tuple[str, HeadPattern], ...]
    stencils: Mapping[Layer, Sequence[Sequence[Stencil]]]

    def options(self, layer: Layer, head: int) -> list[tuple[str, HeadPattern]]:
        """Return the candidates of a head with their families, in the order of the errors: static
        ones, dynamic ones, the stencils of the head, Skip."""
        learned = self.stencils[layer][head] if layer in self.stencils else ()
        stencils: list[tuple[str, HeadPattern]] = [("stencil", stencil) for stencil in learned]
        return [*self.static, *self.dynamic, *stencils, ("skip", Skip())]

    def json_values(self, layers: Collection[Layer]) -> dict[str, Any]:
        """Return the written forms of all candidates, as JSON values."""
        return {
            "static": [repr(pattern) for _, pattern in self.static],
            "dynamic": [repr(pattern) for _, pattern in self.dynamic],
            "stencils": [
                [role, number, [list(map(repr, head)) for head in self.stencils[role, number]]]
                for role, number in sorted(set(layers) & set(self.stencils))
            ],
        }


class CandidateScorer:
    """An observer that measures the losses of all candidates on a generation.

    Args:
        pool: the candidates.
        weights: function from (role, layer) to the output projection ``[out, H D]``.
        steps: the denoising steps that are read.
        grids: the tilings of the stencils.
        tiles: number of sampled query tiles, as in ``draw_rows``.
        rows_per_tile: number of sampled rows in each of these tiles.
        seed: seed of the sample.
        exact: score all rows. This is slower; the sample estimates its result.
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
        """Return what is stored of a generation: JSON values, and the losses ``[calls, H,
        candidates, 3]``, NaN for a loss that could not be computed."""
        places = [list(place) for place in self.places]
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
        """Return the losses of the candidates of every head, float64 ``[H, candidates, 3]``, in the
        order of LOSSES."""
        layer = call.place.role, call.place.number
        heads = len(call.q)
        group = heads // len(call.k)
        weights = self.weights(layer).to(call.q.device)
        gram = self._gram(layer, heads, weights)
        exact = torch.empty(heads, len(self.rows), call.v.shape[2], device=call.q.device)
        count = len(self.pool.options(layer, 0)) - 1
        sums = torch.zeros(heads, count - len(self.pool.dynamic), 3, dtype=torch.float64)
        for chunk in attention_rows(call.q, call.k, self.rows, scale=call.scale, valid=call.valid):
            for index, head in enumerate(range(chunk.heads.start, chunk.heads.stop)):
                head_weights, v = chunk.weights[index], call.v[head // group].float()
                exact[head, chunk.rows] = out = head_weights @ v
                losses_of_head = [
                    _losses(out, kept, gram[head])
                    for kept in (
                        *self._static(head_weights, v, chunk.rows),
                        *self._stencils(layer, head, head_weights, v, chunk.rows),
                    )
                ]
                if losses_of_head:
                    sums[head] += torch.cat(losses_of_head).double().cpu()
        whole = (exact.transpose(0, 1).flatten(1) @ weights.mT).double().square().sum().cpu()
        nothing = torch.zeros(1, *exact.shape[1:], device=exact.device)
        nothing = torch.cat([nothing, nothing[..., :1]], -1)
        skip = torch.stack([_losses(out, nothing, g) for out, g in zip(exact, gram, strict=True)])
        norm = exact.double().square().sum((-2, -1)).cpu()
        static = len(self.pool.static)
        sums[:, self.unfit] = torch.nan
        for head, stencils in enumerate(self.pool.stencils.get(layer, ())):
            for number, stencil in enumerate(stencils):
                if not self._fits(stencil):
                    sums[head, static + number] = torch.nan
        dynamic = self._dynamic(call, exact, gram)
        parts = [sums[:, :static], dynamic, sums[:, static:], skip.double().cpu()]
        losses = torch.cat(parts, 1)
        rows = torch.full((heads,), len(self.rows))
        return losses / torch.stack([whole.expand(heads), norm, rows], 1)[:, None]

    def _gram(self, layer: Layer, heads: int, weights: torch.Tensor) -> torch.Tensor:
        """Return ``W_h^T W_h`` of each head, ``[H, D, D]``."""
        if layer not in self._grams:
            by_head = weights.unflatten(1, (heads, -1)).transpose(0, 1)
            self._grams[layer] = by_head.mT @ by_head
        return self._grams[layer]

    def _static(
        self, weights: torch.Tensor, v: torch.Tensor, rows: slice
    ) -> Iterator[torch.Tensor]:
        """Yield the sums that static candidates keep, ``[c, r, D + 1]``, for some candidates at a
        time: of the weighted values and, in the last column, of the weights."""
        step = max(1, MASKED // weights.numel())
        counted = torch.cat([v, torch.ones_like(v[:, :1])], 1)
        for begin in range(0, len(self.masks), step):
            yield (weights * self.masks[begin : begin + step, rows]) @ counted

    def _stencils(
        self, layer: Layer, head: int, weights: torch.Tensor, v: torch.Tensor, rows: slice
    ) -> Iterator[torch.Tensor]:
        """Yield the same sums for the stencils of a head, computed from sums over tiles."""
        learned = self.pool.stencils[layer][head] if layer in self.pool.stencils else ()
        for grid, numbers in zip(self.grids, self.numbers, strict=True):
            stencils = [stencil for stencil in learned if stencil.tile == grid.tile]
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
            if bool(outside.any()):  # every stencil keeps the text
                other = weights[:, outside]
                total = total + torch.cat([other @ v[outside], other.sum(-1, keepdim=True)], -1)
            yield total

    def _fits(self, stencil: Stencil) -> bool:
        """Return whether the columns of a stencil, perhaps learned at another grid, are in this
        grid."""
        grid = next(grid for grid in self.grids if grid.tile == stencil.tile)
        return max(stencil.columns, default=0) < grid.count.numel

    def _dynamic(
        self, call: AttentionSample, exact: torch.Tensor, gram: torch.Tensor
    ) -> torch.Tensor:
        """Return the sums of the dynamic candidates, ``[H, E, 3]``: NaN for a candidate that cannot
        run, and for the mass, which is not known."""
        sums = torch.full((len(call.q), len(self.pool.dynamic), 3), torch.nan, dtype=torch.float64)
        q, k, v = (x[None] for x in (call.q, call.k, call.v))
        rows = self.rows.to(q.device)
        for number, (family, pattern) in enumerate(self.pool.dynamic):
            if pattern in self._broken:
                continue
            try:
                output = sparse_attention(
                    q,
                    k,
                    v,
                    pattern,
                    call.layout,
                    text_lengths=call.text_lengths,
                    scale=call.scale,
                )
            except Exception as error:  # Triton raises errors of its own types
                self._broken.add(pattern)
                self.failures[f"{family}: {pattern}"] = " ".join(str(error).split())[:300]
                continue
            difference = exact - output[0][:, rows].float()
            projected = ((difference @ gram) * difference).sum((-2, -1))
            sums[:, number, 0] = projected.double().cpu()
            sums[:, number, 1] = difference.square().sum((-2, -1)).double().cpu()
        return sums


def _losses(out: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the sums over rows of ``|W (o - o')|^2``, ``|o - o'|^2`` and the dropped mass,
    ``[c, 3]``.

    Args:
        out: exact outputs ``[r, D]``.
        kept: what candidates keep, ``[c, r, D + 1]``, as ``_static`` yields it.
        gram: ``W^T W`` of the head, ``[D, D]``.
    """
    mass = kept[..., -1:]
    difference = out - kept[..., :-1] / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.stack(
        [
            ((difference @ gram) * difference).sum((-2, -1)),
            difference.square().sum((-2, -1)),
            (1 - mass).sum((-2, -1)),
        ],
        1,
    )
