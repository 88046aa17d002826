"""Read the attention weights of text tokens out of attention calls."""

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
    """The attention of image tokens to text tokens in one layer and pass, as ``ReadTokens`` reads
    it.

    Args:
        layer: path of the layer.
        step: index of the denoising step. None if it is not known.
        pass_: name of the pass. None if it is not known.
        grid: grid of the image or video tokens.
        samples: indices of the samples that were read.
        batch: number of samples of the pass.
        columns: attention weights of the tokens, ``[samples, image tokens, tokens]``, float32
            (float64 for float64).
        real: attention weight of all real tokens, ``[samples, image tokens]``. None if
            ``ReadTokens(real=...)`` was not given.

    Example:
        >>> from visattn.guidance import ReadTokens, steer
        >>> readings = []
        >>> with steer(pipe, ReadTokens(tokens=[1], sink=readings.append, attention="cross")):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
        >>> readings[0].layer, readings[0].step, readings[0].pass_
        ('blocks.0.attn2', 0, 'cond')
        >>> readings[0].columns.shape
        torch.Size([1, 2, 1])
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
    """Read how strongly image tokens attend to text tokens: columns of the attention map ``P``, as
    a mean over the heads weighted by their strengths. The outputs of the model do not change, and
    the map is not stored.

    In joint attention the columns are normalised as in the kernel, in cross-attention over all text
    keys.

    Args:
        tokens: indices of the text tokens, from 0 on. A group of several indices is one column, the
            sum of its tokens. With ``attention="cross"`` these are the keys of cross-attention,
            otherwise the text tokens in the sequence.
        sink: a function that gets a Reading for each layer and pass, such as a ``TokenReadout``.
        real: indices of all real tokens of the prompt, without padding and special tokens
            (``real_tokens`` finds them). Their sum is then read too.
        exact: whether to normalise as in dense attention in layers that run sparse. Otherwise the
            columns are normalised over the keys that the pattern keeps, and are too large by a
            factor that differs from row to row.
        gradient: whether the columns are differentiable. They are then those of dense attention,
            and memory stays of the order of the inputs. The sink may end the forward pass by
            raising an exception of its own.

    The other arguments are those of ``Edit``; ``stream`` must be ``all``.

    Raises:
        TypeError: ``sink`` is not callable, or another argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, the prompt has no such
            token.

    Example:
        >>> from visattn.guidance import ReadTokens, TokenReadout, steer
        >>> readout = TokenReadout()
        >>> with steer(pipe, ReadTokens(tokens=[1], sink=readout, attention="cross")):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
        >>> readout.maps().shape  # samples, tokens, frames, height, width
        torch.Size([1, 1, 2, 1, 1])
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
                f"ReadTokens(stream={self.stream!r}) must be all; it reads the image rows only"
            )
        if not callable(self.sink):
            raise TypeError(
                f"ReadTokens(sink={self.sink!r}) must be a function of a Reading; give a "
                "TokenReadout"
            )
        groups = groups_of("ReadTokens(tokens=...)", self.tokens)
        object.__setattr__(self, "tokens", groups)
        if self.real is not None:
            real = as_indices("ReadTokens(real=...)", self.real)
            object.__setattr__(self, "real", tuple(dict.fromkeys(real)))
            if not real:
                raise ValueError("ReadTokens(real=()) names no token; leave real out instead")

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
            columns = token_columns(q, k, keys, groups, weights, factor)
        else:
            columns = columns_by_lse(
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
            columns[..., :count],
            None if self.real is None else columns[..., count],
        )
        self.sink(reading)

    def _groups(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of the tokens among the keys, and the coefficient of each of them in
        each column, ``[keys, columns]``."""
        listed: list[tuple[int, ...]] = [*self.tokens]  # type: ignore[list-item]
        if self.real is not None:
            listed.append(tuple(self.real))
        distinct = tuple(sorted({token for group in listed for token in group}))
        groups = torch.zeros(len(distinct), len(listed))
        for column, group in enumerate(listed):
            groups[[distinct.index(token) for token in group], column] = 1
        return text_keys(state, distinct), groups

    def _lse(
        self, state: State, q: torch.Tensor, k: torch.Tensor, chosen: list[int]
    ) -> torch.Tensor:
        """Return the log-sum-exp of the image rows, ``[samples, H, image tokens]``."""
        if state.call.kind != "cross" and not (self.exact and state.call.sparse):
            return state.normaliser(state.image)[chosen]
        if state.call.kind != "cross":
            _refuse_borrowed(state)
        return dense_with_lse(q, k, k, state.call.factor)[1]


def groups_of(name: str, tokens: TextTokens) -> tuple[tuple[int, ...], ...]:
    """Return text tokens as groups of indices, one for each column.

    Args:
        name: name of the argument, for error messages.
        tokens: indices, or groups of indices.

    Raises:
        TypeError: an index is no integer.
        ValueError: there is no token, a group is empty, or an index is negative.
    """
    items = [tokens] if isinstance(tokens, int) else tokens
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or not items:
        raise ValueError(
            f"{name} is {tokens!r}; it must be indices of text tokens, from 0 on, or groups of them"
        )
    groups = tuple(tuple(dict.fromkeys(as_indices(name, item))) for item in items)
    if not all(groups):
        raise ValueError(f"{name} has an empty group; leave it out")
    return groups


def _refuse_borrowed(state: State) -> None:
    if state.borrowed:
        raise ValueError(
            f"ReadTokens(exact=True or gradient=True): {state.call.layer} has borrowed keys, which "
            "these options leave out; leave the layer out of BorrowKeys, or the options out"
        )
