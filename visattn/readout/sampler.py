"""An observer that takes measures of the attention of a running pipeline.

sampler = Sampler(steps=[0, 5])
with visattn.inject.observe(pipe, sampler):
    pipe(prompt)
for head in sampler.table():
    print(head.layer, head.head, head.frame, head.tile_share)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from visattn._arguments import check_count
from visattn.geometry.layout import TokenLayout, check_query
from visattn.geometry.orders import Triple
from visattn.inject import Observation
from visattn.readout.measures import AROUND, WINDOW, Measures, Tally, check_window, column_mass
from visattn.readout.sampled_rows import MAX_BYTES, RowSample, attention_rows, draw_rows
from visattn.readout.tiles import MOST_TOKENS, Tiling, default_tilings

__all__ = ["ANY_PASS", "HeadReadout", "Key", "Sampler", "Shares"]

ANY_PASS = "any"  # the name of a pass that is not known


class Key(NamedTuple):
    """An attention layer in one pass; ``number`` counts the layers of its denoiser."""

    role: str
    number: int
    layer: str
    pass_: str


@dataclass(frozen=True)
class Shares:
    """The measures of one head, each a share; ``visattn.readout.measures`` defines them.

    Args:
        frame, same_place, window, columns, text: of the mass. ``columns`` is None where it is not
            defined.
        tile_share: of the key tiles, for 90 % of the mass, with the tiling that needs least.
        tiling: the name of that tiling.
        tile_shares: the same for every tiling, by name.
    """

    frame: float
    same_place: float
    window: float
    columns: float | None
    text: float
    tile_share: float
    tiling: str
    tile_shares: dict[str, float]

    def numbers(self) -> dict[str, Any]:
        """The measures as JSON values, rounded to six places."""
        shares = {name: round(value, 6) for name, value in self.tile_shares.items()}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        return rounded | {"tile_shares": shares}


@dataclass(frozen=True)
class HeadReadout:
    """The measures of a head, as means over calls.

    Args:
        role, layer, number, head, pass_: whose attention; ``number`` is that of the layer.
        step: the denoising step; None for the mean over all that were read.
        calls: that were read; every sample of a batch is one.
        shares: the measures.
    """

    role: str
    layer: str
    number: int
    head: int
    pass_: str
    step: int | None
    calls: int
    shares: Shares

    def numbers(self) -> dict[str, Any]:
        """The measures as JSON values, rounded to six places."""
        names = ("role", "layer", "number", "head", "step", "calls")
        values = {name: getattr(self, name) for name in names}
        return values | {"pass": self.pass_} | self.shares.numbers()


@dataclass
class _Sums:
    """What is kept of a layer in one pass: sums over calls, and by step the calls and the sums of
    ``_columns_of``."""

    tally: Tally
    calls: int = 1
    query: torch.Tensor | None = None
    steps: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)


class Sampler:
    """Measures of the heads of a pipeline; give it to ``visattn.inject.observe``.

    What is measured is the softmax of the queries and keys of a layer, over all keys, whatever a
    plan has the layer compute with them. All calls are read at the same rows.

    Args:
        steps: denoising steps that are read, from 0; None reads all.
        passes: passes that are read, of ``"cond"``, ``"uncond"``; None reads all. A pass that is
            not known is read always, under the name ``ANY_PASS``.
        layers: ``(role, path)`` of the layers that are read; None reads all that are shown.
        heads: query heads that are read; None reads all.
        tilings: tiles to measure with; None takes ``default_tilings`` of the grid with
            ``tile_size``.
        tiles, rows_per_tile, seed: of the sample, as in ``draw_rows``.
        window, around: of the measures, as in ``Measures``.
        keep_query: keep the mean attention of one query whole, for pictures.
        query: its ``(t, h, w)``, and it is kept; None is the middle of the grid.
        per_step: keep the shares of each step too.
        max_bytes: of the largest tensor that is made, but for a few rows at very many tokens.

    What is kept between calls, on the CPU, does not grow with them: about 16 bytes a token for each
    head of each layer and pass, and a few numbers for each step.

    Raises:
        TypeError, ValueError: an argument is wrong. In a call, and so from the pipeline: the
            layout has no grid or is not that of the calls before, a head or the query is not there,
            the step is not known where ``steps`` or ``per_step`` need it, or attention is not
            finite.
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
                f"the denoising step of a call of {observation.role} is not known, so that steps "
                "cannot be told apart"
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

    # ---- what they are

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tilings."""
        return tuple(tiles.tiling.name for tiles in self.measures.sample.samples)

    @property
    def measures(self) -> Measures:
        """How measures are taken, with the sample.

        Raises:
            ValueError: no call was read yet.
        """
        if not self._measures:
            raise ValueError("the sampler has read no call")
        return next(iter(self._measures.values()))

    def seen(self) -> list[Key]:
        """What was read, in order."""
        return sorted(self._sums)

    def tally(self, key: Key) -> Tally:
        """All measures of a layer in one pass as means over calls; heads are those that are
        read."""
        sums = self._sums[key]
        return sums.tally.over(sums.calls)

    def query_attention(self, key: Key) -> torch.Tensor:
        """Mean attention of the query, float32 ``[H, L]``.

        Raises:
            ValueError: the sampler keeps that of no query.
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
        """A line for each head of each layer and pass, in order; with ``by_step`` one for each
        step, where column keys are chosen anew in every call.

        Raises:
            ValueError: steps were not kept apart.
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
    """Ascending distinct numbers, or a sentence that says what is wrong."""
    if not values:
        raise ValueError(f"{name} is empty; leave it out to read all")
    return tuple(sorted({check_count(name, value, 0) for value in values}))


def _columns_of(tally: Tally) -> torch.Tensor:
    """The measures of ``Shares`` as columns, float64 ``[H, 5 + tilings]``."""
    first = (tally.frame, tally.same_place, tally.window, column_mass(tally.columns), tally.text)
    return torch.cat([torch.stack(first, 1), tally.tile_shares], 1)


def _shares(values: torch.Tensor, names: tuple[str, ...]) -> Shares:
    """A line of ``_columns_of``."""
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
