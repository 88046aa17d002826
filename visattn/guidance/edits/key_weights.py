"""What keys weigh after the softmax, and gains of the output (P5, P6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import as_indices, check_number
from visattn.attention.dense_attention import dense_with_lse
from visattn.guidance.edits.bias import Bias
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import logit_tensors
from visattn.guidance.edits.state import State, Stream

__all__ = ["ScaleHeads", "ScaleTokens", "text_keys", "token_weights", "weighed_values"]

CHUNK = 1 << 22


def text_keys(state: State, tokens: tuple[int, ...]) -> torch.Tensor:
    """Positions among the keys of text tokens, which count from 0 over the text of a call.

    Raises:
        ValueError: there is no such token.
    """
    every = [place for first, end in state.texts for place in range(first, end)]
    for token in tokens:
        if token >= len(every):
            where = "" if state.pass_ is None else f" in the {state.pass_} pass"
            raise ValueError(
                f"tokens has {token}, and {state.call.layer} has {len(every)} text tokens{where}; "
                + (
                    "give passes=('cond',) for tokens that the prompt alone has"
                    if every
                    else "for a model with cross-attention give attention='cross'"
                )
            )
    return torch.tensor([every[token] for token in tokens], device=state.q.device)


def token_weights(
    state: State, keys: torch.Tensor, rows: slice, stream: Stream
) -> torch.Tensor:
    """``P[i, j]`` for some rows of a stream and keys: float32 ``[b, H, rows, keys]`` (float64 for
    float64)."""
    lse = state.normaliser(rows)
    wide = lse.dtype
    q, k = logit_tensors(state, rows, stream)
    logits = q.to(wide) @ k[:, :, keys].to(wide).mT * state.call.factor
    return (logits - lse[..., None]).exp()


def weighed_values(
    state: State,
    keys: torch.Tensor,
    stream: Stream,
    weights: Callable[[slice, Stream], torch.Tensor],
) -> torch.Tensor:
    """``sum_j W_ij v_j`` over some keys, ``[b, H, Lq, D]``, in chunks of the rows of a stream;
    other rows are 0.

    Args:
        weights: ``[b, H, rows, keys]`` of some rows and the stream whose gains they have.
    """
    out = torch.zeros_like(state.out)
    v = state.v[:, :, keys]
    step = max(1, CHUNK // max(1, out.shape[0] * out.shape[1] * len(keys)))
    for own, rows in _streams(state, stream):
        for first in range(rows.start, rows.stop, step):
            part = slice(first, min(first + step, rows.stop))
            found = weights(part, own)
            out[:, :, part] = (found @ v.to(found)).to(out.dtype)
    return out


def _streams(state: State, stream: Stream) -> list[tuple[Stream, slice]]:
    """The rows that change, with the stream whose gains they have; later ones replace earlier
    ones."""
    if stream != "all":
        return [(stream, rows) for rows in state.rows(stream)]
    every: list[tuple[Stream, slice]] = [("image", rows) for rows in state.rows("all")]
    return every + [("text", rows) for rows in state.rows("text")]


@dataclass(frozen=True, kw_only=True)
class ScaleTokens(Edit):
    """Text tokens weigh more or less: ``O_i += sum_j ((s - 1) P_ij + w) v_j`` over the tokens,
    whose columns are ``s P_ij + w`` after the softmax (scaling: prompt-to-prompt, Hertz et al.
    2022, arXiv 2208.01626; DiTCtrl, Cai et al. 2024, arXiv 2412.18597; both, as erasing and
    emphasis: MotionCLR, Chen et al. 2024, arXiv 2410.18977).

    Args:
        tokens: numbers of the text tokens.
        scale: ``s``; 1 changes nothing, 0 erases.
        add: ``w``, the same for every row, also where a mask forbids the token: above 0 emphasis,
            below 0 the opposite; 0 changes nothing.
        renormalise: rows then sum to 1 again: ``log s`` is added to the logits.
        both_ways: in joint attention the rows of these tokens also see the image by ``s`` times its
            weight (DiTCtrl).

    Source:
        Hertz et al. (2022), "Prompt-to-Prompt Image Editing with Cross-Attention Control", arXiv
        2208.01626. Cai et al. (2024), "DiTCtrl", arXiv 2412.18597. Code:
        github.com/TencentARC/DiTCtrl (commit f1348b5). Chen et al. (2024), "MotionCLR", arXiv
        2410.18977.
    Default:
        paper.
    Differences:
        none
    """

    tokens: tuple[int, ...]
    scale: float = 1.0
    add: float = 0.0
    renormalise: bool = False
    both_ways: bool = False
    example: ClassVar[str] = (
        "ScaleTokens(tokens=[2, 3], scale=1.5, attention='cross', passes=['cond'])"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = as_indices("ScaleTokens(tokens=...)", self.tokens)
        object.__setattr__(self, "tokens", tuple(dict.fromkeys(tokens)))
        if not self.tokens:
            raise ValueError("ScaleTokens has no tokens; give numbers of text tokens, from 0 on")
        check_number("ScaleTokens", "scale", self.scale, "finite; 1 is no change")
        check_number("ScaleTokens", "add", self.add, "finite; 0 is no change")
        if self.add and (self.renormalise or self.both_ways):
            raise ValueError(
                f"ScaleTokens(add={self.add!r}) is of columns as they are; leave renormalise and "
                "both_ways out, or give scale"
            )
        if self.renormalise and self.scale < 0:
            raise ValueError(
                f"ScaleTokens(scale={self.scale!r}, renormalise=True) must be from 0 on; 1 is no "
                "change"
            )
        if self.both_ways and (self.renormalise or self.attention == "cross"):
            raise ValueError(
                "ScaleTokens(both_ways=True) is for joint attention and has no renormalised form"
            )

    @property
    def stage(self) -> str:  # type: ignore[override]
        return "bias" if self.renormalise else "columns"

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        return not self.renormalise and self.scale != 1

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.scale == 1 and self.add == 0:
            return
        keys = text_keys(state, self.tokens)
        if self.renormalise:
            self._bias(state, keys, strength)
            return

        def weights(rows: slice, stream: Stream) -> torch.Tensor:
            return (self.scale - 1) * token_weights(state, keys, rows, stream) + self.add

        if self.scale == 1:
            v = state.v[:, :, keys]
            wide = torch.promote_types(v.dtype, torch.float32)
            new = self.add * v.to(wide).sum(2, keepdim=True).to(v.dtype)
        else:
            new = weighed_values(state, keys, self.stream, weights)
        if self.both_ways:
            self._rows(state, keys, new)
        edit = self if not self.both_ways else _everywhere(self)
        edit.change(state, "out", state.out + new, strength)

    def _bias(self, state: State, keys: torch.Tensor, strength: torch.Tensor) -> None:
        k_labels = torch.zeros(1, state.k.shape[2], dtype=torch.int64)
        k_labels[0, keys.cpu()] = 1
        q_labels = torch.zeros(state.q.shape[0], state.q.shape[2], dtype=torch.int64)
        for sample in self.samples_in(state):
            for rows in state.rows(self.stream):
                q_labels[sample, rows] = 1
        for value in strength.unique().tolist():
            scale = 1 + value * (self.scale - 1)
            bias = -math.inf if scale == 0 else math.log(scale)
            if bias:
                table = torch.tensor([[0.0, 0.0], [0.0, bias]])
                state.biases.append(Bias(table, q_labels, k_labels, strength == value))

    def _rows(self, state: State, tokens: torch.Tensor, add: torch.Tensor) -> None:
        """The rows of the tokens over the image's keys."""
        image = state.image
        q, k = logit_tensors(state, tokens, "text")
        own, lse = dense_with_lse(q, k[:, :, image], state.v[:, :, image], state.call.factor)
        share = (lse - state.normaliser(tokens)).exp()[..., None]
        add[:, :, tokens] += ((self.scale - 1) * share * own.to(share)).to(add.dtype)


def _everywhere(edit: ScaleTokens) -> Edit:
    return Edit(samples=edit.samples)


@dataclass(frozen=True, kw_only=True)
class ScaleHeads(Edit):
    """``O_h <- a O_h``: the output of heads is scaled.

    Args:
        scale: 1 changes nothing.

    Source:
        This project; the scaling of head outputs by "VHR" for language models is the same
        operation.
    Default:
        own.
    Differences:
        none
    """

    scale: float
    example: ClassVar[str] = "ScaleHeads(scale=1.2, layers=[3], heads=[0])"
    stage: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ScaleHeads", "scale", self.scale, "finite; 1 is no change")

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.scale != 1:
            self.change(state, "out", state.out * self.scale, strength)
