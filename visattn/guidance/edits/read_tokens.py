"""What image tokens attend to text tokens with, read out of attention calls (P8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import as_indices
from visattn.attention.dense_attention import dense_with_lse
from visattn.geometry.layout import Grid
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import logit_tensors
from visattn.guidance.edits.key_weights import text_keys
from visattn.guidance.edits.map_columns import columns_by_lse, token_columns
from visattn.guidance.edits.state import State

__all__ = ["ReadTokens", "Reading", "TextTokens"]

TextTokens = Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """What a layer gave in one pass.

    Args:
        layer: its path; step: of the denoising loop, None where it is not known; pass_: whose.
        grid: of the image or video tokens.
        samples: numbers of the samples that were read, of the ``batch`` samples of the pass.
        columns: ``[samples, image tokens, tokens]``, float32 (float64 for float64).
        real: what they attend to all real tokens with, ``[samples, image tokens]``; None where
            these were not named.
    """

    layer: str
    step: int | None
    pass_: str | None
    grid: Grid
    samples: tuple[int, ...]
    batch: int
    columns: torch.Tensor
    real: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadTokens(Edit):
    """Read out what image tokens attend to text tokens with: columns of ``P``, the mean over heads
    by their strengths. Nothing that is computed changes, and no map is made.

    Args:
        tokens: numbers of the text tokens, from 0; several numbers in brackets are one column, the
            sum of theirs. With ``attention="cross"`` tokens are those of the cross-attention, else
            of the text that is part of the sequence.
        real: numbers of all real tokens of the prompt, without padding and begin or end
            (``real_tokens`` finds them); their sum is then read too.
        sink: is called with a Reading for each layer and pass, such as a ``TokenReadout``.
        exact: in layers that run sparse, have the normaliser of dense attention computed; else it
            is that of the kept keys, and columns are larger by one over the mass of these, which
            differs from row to row.
        gradient: columns can be differentiated, memory still that of the inputs; they are then
            those of dense attention. The sink may end the forward by an exception of its own.

    In joint attention the normaliser is that of the kernel, in cross-attention of all text keys.
    """

    tokens: TextTokens
    sink: Callable[[Reading], None]
    real: Sequence[int] | None = None
    exact: bool = False
    gradient: bool = False
    stage: ClassVar[str] = "read"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream != "all":
            raise ValueError(
                f"ReadTokens(stream={self.stream!r}) must be all: it reads the rows of the image"
            )
        if not callable(self.sink):
            raise TypeError(
                f"ReadTokens(sink={self.sink!r}) must be called with readings; give a TokenReadout"
            )
        groups = groups_of("ReadTokens(tokens=...)", self.tokens)
        object.__setattr__(self, "tokens", groups)
        if self.real is not None:
            real = as_indices("ReadTokens(real=...)", self.real)
            object.__setattr__(self, "real", tuple(dict.fromkeys(real)))
            if not real:
                raise ValueError("ReadTokens(real=()) names no token; None leaves it out")

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        return self.attention == "self" and not self.gradient

    def apply(self, state: State, strength: torch.Tensor) -> None:
        keys, groups = self._groups(state)
        chosen = self.samples_in(state)
        weights = strength / strength.sum().clamp_min(1e-12)
        q, k = logit_tensors(state, state.image, "image")
        q, k = (q, k) if len(chosen) == len(q) else (q[chosen], k[chosen])
        factor = state.call.factor
        if self.gradient:
            _refuse_borrowed(state)
            found = token_columns(q, k, keys, groups, weights, factor)
        else:
            found = columns_by_lse(
                q, k, self._lse(state, q, k, chosen), keys, groups, weights, factor
            )
        count = len(self.tokens)
        reading = Reading(
            state.call.layer,
            state.call.step,
            state.pass_,
            state.call.layout.grids[0][1],
            tuple(chosen),
            state.q.shape[0],
            found[..., :count],
            None if self.real is None else found[..., count],
        )
        self.sink(reading)

    def _groups(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys that are read, and what each counts for in the columns."""
        listed: list[tuple[int, ...]] = [*self.tokens]  # type: ignore[list-item]
        if self.real is not None:
            listed.append(tuple(self.real))
        every = tuple(sorted({token for group in listed for token in group}))
        groups = torch.zeros(len(every), len(listed))
        for column, group in enumerate(listed):
            groups[[every.index(token) for token in group], column] = 1
        return text_keys(state, every), groups

    def _lse(
        self, state: State, q: torch.Tensor, k: torch.Tensor, chosen: list[int]
    ) -> torch.Tensor:
        """The normaliser of the rows of the image, ``[samples, H, image tokens]``."""
        if state.call.kind != "cross" and not (self.exact and state.call.sparse):
            return state.normaliser(state.image)[chosen]
        if state.call.kind != "cross":
            _refuse_borrowed(state)
        return dense_with_lse(q, k, k, state.call.factor)[1]


def groups_of(name: str, tokens: TextTokens) -> tuple[tuple[int, ...], ...]:
    """Text tokens as groups of numbers, one for each column."""
    items = [tokens] if isinstance(tokens, int) else tokens
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or not items:
        raise ValueError(
            f"{name} is {tokens!r}; it must be numbers of text tokens, from 0 on, or tuples of them"
        )
    groups = tuple(tuple(dict.fromkeys(as_indices(name, item))) for item in items)
    if not all(groups):
        raise ValueError(f"{name} has a group without tokens; leave it out")
    return groups


def _refuse_borrowed(state: State) -> None:
    if state.borrowed:
        raise ValueError(
            f"ReadTokens(exact=True or gradient=True): {state.call.layer} has borrowed keys, which "
            "are not in its dense normaliser; leave the layer out of BorrowKeys, or read as usual"
        )
