"""Biases and masks by labels of queries and keys, for regions and for the isolation of subjects."""

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
    """Add a bias to the logits by the labels of queries and keys: ``S[i, j] += table[label of query
    i, label of key j]``.

    A row that would see no key, by the table or by the sparse pattern, sees its own token and the
    text tokens that the table allows.

    Args:
        table: the biases, float ``[n, m]``, at most 1e4. Values below -1e4, such as minus infinity,
            forbid the pair.
        q_labels: labels of the queries from 0 to n - 1, integers ``[Lq]``, or ``[b, Lq]`` for each
            sample of a pass, or a function of a call's State that returns them.
        k_labels: labels of the keys from 0 to m - 1, integers ``[Lk]``, or ``[b, Lk]`` for each
            sample of a pass, or a function of a call's State that returns them.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, labels have another shape
            or are out of range.

    Example:
        >>> import torch
        >>> from visattn.guidance import LabelBias, steer
        >>> def position(state):
        ...     return torch.arange(state.q.shape[2])
        >>> table = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])  # two tokens see each other less
        >>> with steer(pipe, LabelBias(table=table, q_labels=position, k_labels=position)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        if not whole:  # rows that do not change get an additional label, without biases
            table = torch.cat([table, torch.zeros(1, table.shape[1], device=table.device)])
            limited = torch.full_like(q_labels.expand(state.q.shape[0], -1), len(table) - 1)
            for sample in chosen:
                for rows in state.rows(self.stream):
                    limited[sample, rows] = q_labels.expand(state.q.shape[0], -1)[sample, rows]
            q_labels = limited
        state.biases.append(Bias(table, q_labels, k_labels, strength > 0))

    def _labels(self, name: str, state: State, length: int, count: int) -> torch.Tensor:
        given: Labels = getattr(self, name)
        labels = given(state) if callable(given) else given
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"LabelBias({name}={labels!r}) must be a tensor of integers")
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
    """Let a query see a key only if the two have a common bit. This form covers the regions of a
    prompt with their texts, isolated subjects, and text tokens that only one region sees. A row
    that would see no key is treated as in ``LabelBias``.

    Args:
        q_bits: bit sets of the queries, integers ``[Lq]``, or ``[b, Lq]`` for each sample of a
            pass, or a function of a call's State that returns them.
        k_bits: bit sets of the keys, integers ``[Lk]``, or ``[b, Lk]`` for each sample of a pass,
            or a function of a call's State that returns them. None means those of the queries.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, bit sets have another
            shape.

    Example:
        >>> import torch
        >>> from visattn.guidance import RegionMask, steer
        >>> def frame_bit(state):  # each frame sees only itself
        ...     return 1 << torch.arange(state.q.shape[2])
        >>> with steer(pipe, RegionMask(q_bits=frame_bit)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        q_bits = _values(self.q_bits, state)
        k_bits = q_bits if self.k_bits is None else _values(self.k_bits, state)
        q_sets, q_labels = q_bits.unique(return_inverse=True)
        k_sets, k_labels = k_bits.unique(return_inverse=True)
        allowed = (q_sets[:, None] & k_sets[None]) != 0
        table = torch.zeros(allowed.shape, device=allowed.device)
        table = table.masked_fill(~allowed, -torch.inf)
        LabelBias(
            table=table,
            q_labels=q_labels,
            k_labels=k_labels,
            stream=self.stream,
            samples=self.samples,
        ).apply(state, strength)


def _values(bits: Labels, state: State) -> torch.Tensor:
    """Return the bit sets of a call, int64."""
    return (bits(state) if callable(bits) else bits).to(state.q.device, torch.int64)
