"""What the heads of a layer run at a call, by the plan and the guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from visattn.cost import DenseAttention
from visattn.geometry.layout import TokenLayout
from visattn.inject.hooks.recent import Recent
from visattn.inject.layers.first_calls import Watch
from visattn.inject.layers.guard import measure_again, worthwhile
from visattn.inject.layers.head_groups import HeadGroups
from visattn.inject.layers.stock_attention import dense_attention

__all__ = ["Decision", "Guard"]


class GuardedLayer(Protocol):
    """What the guard needs of a layer; ``Layer`` implements it.

    Attributes:
        path: path of its module.
    """

    path: str

    @property
    def module(self) -> Any:
        """The attention module."""

    def tell(self, reason: str) -> None:
        """Record why calls are dense although the plan has sparse heads, and log it once."""

    def log(self, text: str) -> None:
        """Log a line once."""


class Decision(NamedTuple):
    """What the heads of a layer run at calls of one kind.

    Attributes:
        parts: the patterns in each equal part of the batch; None: all heads are dense.
        watch: times the calls, to compare them with the prediction; None: there is no prediction.
    """

    parts: tuple[HeadGroups, ...] | None
    watch: Watch | None = None

    def timed(self, query: torch.Tensor) -> AbstractContextManager[None]:
        """Time the attention of a call inside the block."""
        return nullcontext() if self.watch is None else self.watch.call(query.device)


class Guard:
    """The decisions of a layer. Each is computed once, and again if calls contradict it. A copy
    starts without decisions."""

    def __init__(self) -> None:
        self._decisions: Recent[tuple[object, ...], Decision] = Recent()

    def __deepcopy__(self, memo: object) -> Guard:
        return Guard()

    def decide(
        self,
        layer: GuardedLayer,
        parts: tuple[HeadGroups, ...],
        query: torch.Tensor,
        layout: TokenLayout,
    ) -> Decision:
        """Return the parts with dense heads instead of those that would be slower."""
        dense = dense_attention(layer.module)
        key = (parts, layout, query.device, query.dtype, query.shape, dense.name)
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._decisions[key] = _predicted(layer, parts, query, layout, dense, False)
        elif decision.watch is not None and decision.watch.contradicts:
            decision = _contradicted(layer, decision.watch, parts, query, layout, dense)
            self._decisions[key] = decision
        return decision


def _predicted(
    layer: GuardedLayer,
    parts: tuple[HeadGroups, ...],
    query: torch.Tensor,
    layout: TokenLayout,
    dense: DenseAttention,
    last: bool,
) -> Decision:
    """Decide by the calibration of the device; ``last``: it has been measured again already."""
    one_part = query[: max(1, len(query) // len(parts))]
    tell = layer.log
    verdicts = {part: worthwhile(part.heads, one_part, layout, tell, dense) for part in parts}
    guarded = {part: HeadGroups(verdict.heads, layout) for part, verdict in verdicts.items()}
    sparse = any(part.sparse for part in guarded.values())
    if not sparse:
        layer.tell("none of its heads would be faster than dense attention")
    limits = [verdicts[part].limit for part in parts]
    known = [limit for limit in limits if limit is not None]
    watch = Watch(sum(known), sparse, last) if len(known) == len(limits) else None
    return Decision(tuple(guarded[part] for part in parts) if sparse else None, watch)


def _contradicted(
    layer: GuardedLayer,
    watch: Watch,
    parts: tuple[HeadGroups, ...],
    query: torch.Tensor,
    layout: TokenLayout,
    dense: DenseAttention,
) -> Decision:
    """Decide again, because the first calls took longer than predicted. The device is measured
    again, once in a process. If calls contradict that measurement too, the layer runs dense."""
    times = f"{1e3 * min(watch.seconds):.3g} ms, but at most {1e3 * watch.limit:.3g} ms"
    if not watch.last:
        if measure_again(query, dense):
            layer.log(
                f"{layer.path}: calls take {times} was predicted; the device has been measured "
                "again"
            )
        return _predicted(layer, parts, query, layout, dense, True)
    if watch.sparse:
        layer.tell(f"its sparse calls take {times} is predicted for dense ones")
    return Decision(None)
