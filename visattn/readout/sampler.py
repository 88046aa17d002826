"""An observer that measures the attention of a running pipeline.

sampler = Sampler(steps=[0, 5])
with visattn.inject.observe(pipe, sampler):
    pipe(prompt)
for head in sampler.table():
    print(head.layer, head.head, head.frame, head.tile_share)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn._arguments import check_count
from visattn.geometry.layout import TokenLayout, check_query
from visattn.geometry.orders import Triple
from visattn.inject import Observation
from visattn.readout.head_readout import HeadReadout, Key, Shares
from visattn.readout.measures import AROUND, WINDOW, Measures, Tally, check_window, column_mass
from visattn.readout.sampled_rows import MAX_BYTES, RowSample, attention_rows, draw_rows
from visattn.readout.tiles import MOST_TOKENS, Tiling, default_tilings

__all__ = ["ANY_PASS", "Sampler"]

ANY_PASS = "any"  # the name of an unknown pass


@dataclass
class _Sums:
    """Sums over the calls of a layer in one pass, and by step the sums of ``_columns_of``."""

    tally: Tally
    calls: int = 1
    query: torch.Tensor | None = None
    steps: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)


class Sampler:
    """Measures the heads of a pipeline; give it to ``visattn.inject.observe``.

    It measures the dense softmax of the queries and keys of a layer, whatever pattern a plan runs
    there. All calls are read at the same rows.

    Args:
        steps: denoising steps that are read, from 0; None reads all.
        passes: passes that are read, of ``"cond"``, ``"uncond"``; None reads all. An unknown pass
            is always read, under the name ``ANY_PASS``.
        layers: ``(role, path)`` of the layers that are read; None reads all.
        heads: query heads that are read; None reads all.
        tilings: tilings to measure; None takes ``default_tilings`` of the grid.
        tile_size: tokens of a tile of the default tilings.
        tiles: sampled tiles, as in ``draw_rows``.
        rows_per_tile: sampled rows of a tile, as in ``draw_rows``.
        seed: seed of the sample.
        window: sides of the window, as in ``Measures``.
        around: sides of the mean around the query, as in ``Measures``.
        keep_query: keep the mean attention of one query to all tokens, for pictures.
        query: place ``(t, h, w)`` of this query; implies ``keep_query``. None is the middle of the
            grid.
        per_step: also keep the shares of each step.
        max_bytes: size limit of temporary tensors in bytes.

    Memory on the CPU does not grow with the number of calls: about 16 bytes a token for each head
    of each layer and pass, and a few numbers for each step.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range. Calls of the pipeline also raise it: if the layout
            has no grid or has changed, a head or the query does not exist, the step is unknown but
            needed, or attention is not finite.

    Example:
        >>> from visattn.inject import observe
        >>> from visattn.readout import Sampler
        >>> sampler = Sampler(steps=[0])
        >>> with observe(pipe, sampler):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
        >>> sampler.table()[0].head
        0
    """

    def __init__(
        self,
        *,
        steps: Collection[int] | None = None,
        passes: Collection[str] | None = None,
        layers: Collection[tuple[str, str]] | None = None,
        heads: Sequence[int] | None = None,
        tilings: Sequence[Tiling] | None = None,
        tile_size: int = MOST_TOKENS,
        tiles: int = 6,
        rows_per_tile: int | None = None,
        seed: int = 0,
        window: Triple = WINDOW,
        around: Triple = AROUND,
        keep_query: bool = False,
        query: Triple | None = None,
        per_step: bool = False,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.steps = None if steps is None else _whole("steps", steps)
        self.heads = None if heads is None else _whole("heads", heads)
        self.passes = None if passes is None else frozenset(passes)
        self.layers = None if layers is None else frozenset(layers)
        self.window, self.around = check_window("window", window), check_window("around", around)
        self.tilings = None if tilings is None else tuple(tilings)
        self.tile_size = check_count("tile_size", tile_size, 1)
        self.tiles, self.rows_per_tile = check_count("tiles", tiles, 1), rows_per_tile
        self.seed, self.per_step = check_count("seed", seed, 0), per_step
        self.query, self.keep_query = query, keep_query or query is not None
        self.max_bytes = check_count("max_bytes", max_bytes, 1)
        self.layout: TokenLayout | None = None
        self._measures: dict[torch.device, Measures] = {}
        self._sums: dict[Key, _Sums] = {}

    # ---- taking measures

    def __call__(self, observation: Observation) -> None:
        if not self._wanted(observation):
            return
        measures = self._measures_of(observation)
        heads = list(range(observation.q.shape[1])) if self.heads is None else list(self.heads)
        if heads[-1] >= observation.q.shape[1]:
            raise ValueError(
                f"heads holds {heads[-1]}; {observation.layer} of {observation.role} has heads 0 "
                f"to {observation.q.shape[1] - 1}"
            )
        group = observation.q.shape[1] // observation.k.shape[1]
        shared = [head // group for head in heads]
        passes = observation.passes or (ANY_PASS,)
        each = observation.q.shape[0] // len(passes)
        for number in range(observation.q.shape[0]):
            pass_ = passes[min(number // each, len(passes) - 1)]
            if self.passes is None or pass_ in self.passes or pass_ == ANY_PASS:
                key = Key(observation.role, observation.number, observation.layer, pass_)
                q, k = observation.q[number, heads], observation.k[number, shared]
                self._read(key, q, k, observation.valid(number), observation, measures)

    def _wanted(self, observation: Observation) -> bool:
        place = observation.role, observation.layer
        if self.layers is not None and place not in self.layers:
            return False
        if observation.step is None and (self.steps is not None or self.per_step):
            raise ValueError(
                f"the denoising step of a call of {observation.role} is not known; the options "
                "steps and per_step need it"
            )
        return self.steps is None or observation.step in self.steps

    def _measures_of(self, observation: Observation) -> Measures:
        device, layout = observation.q.device, observation.layout
        if self.layout is None:
            self.sample = self._draw(layout)
            self.layout = layout
        elif layout != self.layout:
            raise ValueError(
                f"the sampler has begun with {self.layout} tokens and now sees {layout}; take "
                "another sampler for each shape"
            )
        if device not in self._measures:
            self._measures[device] = Measures(
                self.sample, window=self.window, around=self.around, device=device
            )
        return self._measures[device]

    def _draw(self, layout: TokenLayout) -> RowSample:
        if not layout.grids:
            raise ValueError(f"layout {layout} has no grid, so that there are no places to measure")
        grid = layout.grids[0][1]
        self.query = check_query(self.query, grid)
        return draw_rows(
            layout,
            default_tilings(grid, self.tile_size) if self.tilings is None else self.tilings,
            tiles=self.tiles,
            rows_per_tile=self.rows_per_tile,
            seed=self.seed,
        )

    def _read(
        self,
        key: Key,
        q: torch.Tensor,
        k: torch.Tensor,
        valid: torch.Tensor | None,
        observation: Observation,
        measures: Measures,
    ) -> None:
        options: dict[str, Any] = {
            "scale": observation.scale,
            "valid": valid,
            "max_bytes": self.max_bytes,
        }
        tally = measures(attention_rows(q, k, self.sample.tokens, **options), len(q))
        if not bool(torch.isfinite(tally.frame).all()):
            raise ValueError(
                f"the attention of {key.layer} of {key.role} at step {observation.step} is not "
                "finite; a wider dtype may help"
            )
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = _Sums(tally)
        else:
            sums.calls += 1
            sums.tally.add(tally)
        if self.per_step:
            assert observation.step is not None
            calls, before = sums.steps.get(observation.step, (0, torch.zeros(())))
            sums.steps[observation.step] = calls + 1, before + _columns_of(tally)
        if self.keep_query:
            row = torch.cat([c.weights[:, 0] for c in attention_rows(q, k, self._token, **options)])
            sums.query = row.cpu() if sums.query is None else sums.query + row.cpu()

    @property
    def _token(self) -> torch.Tensor:
        """The token of the query, int64 ``[1]``."""
        assert self.query is not None
        places = zip(self.query, self.sample.grid.strides, strict=True)
        return torch.tensor([self.sample.start + sum(x * s for x, s in places)])

    # ---- the results

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tilings."""
        return tuple(tiles.tiling.name for tiles in self.measures.sample.samples)

    @property
    def measures(self) -> Measures:
        """The measures, with the sample.

        Raises:
            ValueError: no call was read yet.
        """
        if not self._measures:
            raise ValueError("the sampler has read no call")
        return next(iter(self._measures.values()))

    def seen(self) -> list[Key]:
        """Return the layers and passes that were read, in order."""
        return sorted(self._sums)

    def tally(self, key: Key) -> Tally:
        """Return all measures of a layer in one pass as means over calls, for the heads read."""
        sums = self._sums[key]
        return sums.tally.over(sums.calls)

    def query_attention(self, key: Key) -> torch.Tensor:
        """Return the mean attention of the query, float32 ``[H, L]``.

        Raises:
            ValueError: the sampler keeps no query.
        """
        sums = self._sums[key]
        if sums.query is None:
            raise ValueError("the sampler keeps no query; give it keep_query=True")
        return sums.query / sums.calls

    @property
    def chance(self) -> Shares:
        """The measures of uniform attention, on the same rows."""
        return _shares(_columns_of(self.measures.chance)[0], self.names)

    def table(self, *, by_step: bool = False) -> list[HeadReadout]:
        """Return one line for each head of each layer and pass, in order.

        With ``by_step`` there is one line for each step; column keys are then chosen per call.

        Raises:
            ValueError: ``by_step`` without ``per_step=True``.
        """
        if by_step and not self.per_step:
            raise ValueError("the sampler keeps no steps; give it per_step=True")
        lines = []
        for key in self.seen():
            sums = self._sums[key]
            parts: dict[int | None, tuple[int, torch.Tensor]]
            parts = {None: (sums.calls, _columns_of(self.tally(key)))}
            if by_step:
                parts = {step: (n, total / n) for step, (n, total) in sorted(sums.steps.items())}
            heads = range(len(sums.tally.frame)) if self.heads is None else self.heads
            for place, head in enumerate(heads):
                for step, (calls, values) in parts.items():
                    shares = _shares(values[place], self.names)
                    lines.append(
                        HeadReadout(
                            key.role, key.layer, key.number, head, key.pass_, step, calls, shares
                        )
                    )
        return lines


def _whole(name: str, values: Collection[int]) -> tuple[int, ...]:
    """Return the distinct numbers, ascending; raise if one is no count or there is none."""
    if not values:
        raise ValueError(f"{name} is empty; leave it out to read all")
    return tuple(sorted({check_count(name, value, 0) for value in values}))


def _columns_of(tally: Tally) -> torch.Tensor:
    """Return the measures of ``Shares`` as columns, float64 ``[H, 5 + tilings]``."""
    first = (tally.frame, tally.same_place, tally.window, column_mass(tally.columns), tally.text)
    return torch.cat([torch.stack(first, 1), tally.tile_shares], 1)


def _shares(values: torch.Tensor, names: tuple[str, ...]) -> Shares:
    """Return the Shares of one line of ``_columns_of``."""
    frame, same_place, window, columns, text, *tiles = values.tolist()
    by_name = dict(zip(names, tiles, strict=True))
    best = min(by_name, key=lambda name: by_name[name])
    return Shares(
        frame=frame,
        same_place=same_place,
        window=window,
        columns=None if math.isnan(columns) else columns,
        text=text,
        tile_share=by_name[best],
        tiling=best,
        tile_shares=by_name,
    )
