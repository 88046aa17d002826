"""Which queries may see which keys, by labels: regions and isolation (P4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.guidance.edits.bias import FORBIDDEN, Bias
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State

__all__ = ["LabelBias", "Labels", "RegionMask"]

Labels = torch.Tensor | Callable[[State], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelBias(Edit):
    """``S[i, j] += table[label of query i, label of key j]``.

    Args:
        table: float ``[n, m]``, at most 1e4; below -1e4, as minus infinity: the pair is not seen.
        q_labels: of the queries, whole numbers ``[Lq]``, or ``[b, Lq]`` for each sample of a pass,
            or a function of the call (a State) that gives them at each call.
        k_labels: the same of the keys.

    A row that would see no key, by the table or by what a sparse pattern leaves of it, sees its own
    token and the text that it may see.

    Source:
        This project.
    Default:
        own.
    Differences:
        none
    """

    table: torch.Tensor
    q_labels: Labels
    k_labels: Labels
    stage: ClassVar[str] = "bias"
    partial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table.ndim != 2 or bool(self.table.isnan().any()):
            raise ValueError(
                f"LabelBias(table=...) has the shape {list(self.table.shape)}; it must be "
                "[labels of queries, labels of keys], without NaN"
            )
        if bool((self.table > FORBIDDEN / 2).any()):
            raise ValueError(
                f"LabelBias(table=...) has {float(self.table.max()):g}; biases must be at most "
                f"{FORBIDDEN / 2:g}, and those below {-FORBIDDEN / 2:g} forbid the pair"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        q_labels = self._labels("q_labels", state, state.q.shape[2], self.table.shape[0])
        k_labels = self._labels("k_labels", state, state.k.shape[2], self.table.shape[1])
        table = self.table.to(torch.float32)
        table = table.masked_fill(table < -FORBIDDEN / 2, -torch.inf)
        chosen = self.samples_in(state)
        whole = len(chosen) == state.q.shape[0] and self.stream == "all"
        if not whole:  # a label of its own for the rows that nothing happens to
            table = torch.cat([table, torch.zeros(1, table.shape[1], device=table.device)])
            kept = torch.full_like(q_labels.expand(state.q.shape[0], -1), len(table) - 1)
            for sample in chosen:
                for rows in state.rows(self.stream):
                    kept[sample, rows] = q_labels.expand(state.q.shape[0], -1)[sample, rows]
            q_labels = kept
        state.biases.append(Bias(table, q_labels, k_labels, strength > 0))

    def _labels(self, name: str, state: State, length: int, count: int) -> torch.Tensor:
        given: Labels = getattr(self, name)
        labels = given(state) if callable(given) else given
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"LabelBias({name}={labels!r}) must be a tensor of whole numbers")
        labels = labels.to(state.q.device, torch.int64)
        labels = labels[None] if labels.ndim == 1 else labels
        if labels.ndim != 2 or labels.shape[1] != length or len(labels) not in (
            1,
            state.q.shape[0],
        ):
            raise ValueError(
                f"LabelBias({name}=...) has the shape {list(labels.shape)}, and {state.call.layer} "
                f"has {length} tokens there in {state.q.shape[0]} samples"
            )
        if bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"LabelBias({name}=...) has labels outside 0 to {count - 1}")
        return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionMask(Edit):
    """A query sees a key where they share a bit.

    Args:
        q_bits: of the queries, whole numbers ``[Lq]`` or ``[b, Lq]``, or a function of the call.
        k_bits: the same of the keys; None: those of the queries.

    Regions of a prompt, each with its text, isolated subjects, and tokens of a subject that only
    its region sees are such masks. A row that would see no key is treated as in ``LabelBias``.

    Source:
        This project: one form for the masks of regions, of isolated subjects and of prompts.
    Default:
        own.
    Differences:
        none
    """

    q_bits: Labels
    k_bits: Labels | None = None
    stage: ClassVar[str] = "bias"
    partial: ClassVar[bool] = False

    def apply(self, state: State, strength: torch.Tensor) -> None:
        q_bits = _of(self.q_bits, state)
        k_bits = q_bits if self.k_bits is None else _of(self.k_bits, state)
        q_kinds, q_labels = q_bits.unique(return_inverse=True)
        k_kinds, k_labels = k_bits.unique(return_inverse=True)
        allowed = (q_kinds[:, None] & k_kinds[None]) != 0
        table = torch.zeros(allowed.shape, device=allowed.device)
        table = table.masked_fill(~allowed, -torch.inf)
        LabelBias(
            table=table,
            q_labels=q_labels,
            k_labels=k_labels,
            stream=self.stream,
            samples=self.samples,
        ).apply(state, strength)


def _of(bits: Labels, state: State) -> torch.Tensor:
    return (bits(state) if callable(bits) else bits).to(state.q.device, torch.int64)
