"""Edits of the attention weights of text tokens after the softmax, and of the output of heads."""

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

CHUNK = 1 << 22  # logits that are computed at a time


def text_keys(state: State, tokens: tuple[int, ...]) -> torch.Tensor:
    """Return the positions of text tokens among the keys, int64.

    Args:
        state: the call.
        tokens: indices of the text tokens, counted from 0 over all text segments of the call.

    Raises:
        ValueError: the call has no such text token.
    """
    positions = [position for first, end in state.texts for position in range(first, end)]
    for token in tokens:
        if token >= len(positions):
            where = "" if state.pass_ is None else f" in the {state.pass_} pass"
            raise ValueError(
                f"tokens has {token}, and {state.call.layer} has {len(positions)} text tokens"
                f"{where}; "
                + (
                    "use passes=('cond',) for tokens that only the prompt has"
                    if positions
                    else "for a model with cross-attention use attention='cross'"
                )
            )
    return torch.tensor([positions[token] for token in tokens], device=state.q.device)


def token_weights(
    state: State, keys: torch.Tensor, rows: slice, stream: Stream
) -> torch.Tensor:
    """Return the attention weights ``P[i, j]`` of some rows and keys.

    Args:
        state: the call, after the kernel stage.
        keys: positions of the keys, int64 ``[n]``.
        rows: the query rows.
        stream: the stream whose gains apply to the rows.

    Returns:
        The weights ``[b, H, rows, n]``, float32 (float64 for float64).
    """
    lse = state.normaliser(rows)
    q, k = logit_tensors(state, rows, stream)
    logits = q.to(lse.dtype) @ k[:, :, keys].to(lse.dtype).mT * state.call.factor
    return (logits - lse[..., None]).exp()


def weighed_values(
    state: State,
    keys: torch.Tensor,
    stream: Stream,
    weights: Callable[[slice, Stream], torch.Tensor],
) -> torch.Tensor:
    """Return ``sum_j W_ij v_j`` over some keys, computed in chunks of the rows of a stream.

    Args:
        state: the call, after the kernel stage.
        keys: positions of the keys, int64 ``[n]``.
        stream: the rows to compute.
        weights: a function of a chunk of rows, and of the stream whose gains apply to them, that
            returns ``W``, ``[b, H, rows, n]``.

    Returns:
        The sums ``[b, H, Lq, D]``, of the dtype of the output. Rows outside the stream are 0.
    """
    out = torch.zeros_like(state.out)
    v = state.v[:, :, keys]
    step = max(1, CHUNK // max(1, out.shape[0] * out.shape[1] * len(keys)))
    for gain_stream, rows in _streams(state, stream):
        for first in range(rows.start, rows.stop, step):
            chunk = slice(first, min(first + step, rows.stop))
            chunk_weights = weights(chunk, gain_stream)
            out[:, :, chunk] = (chunk_weights @ v.to(chunk_weights)).to(out.dtype)
    return out


def _streams(state: State, stream: Stream) -> list[tuple[Stream, slice]]:
    """Return the rows of a stream, each with the stream whose gains apply. Later rows overwrite
    earlier ones."""
    if stream != "all":
        return [(stream, rows) for rows in state.rows(stream)]
    all_rows: list[tuple[Stream, slice]] = [("image", rows) for rows in state.rows("all")]
    return all_rows + [("text", rows) for rows in state.rows("text")]


@dataclass(frozen=True, kw_only=True)
class ScaleTokens(Edit):
    """Scale the attention weights of text tokens: their columns of the attention map become ``s
    P_ij + w``, so ``O_i += sum_j ((s - 1) P_ij + w) v_j`` over the tokens (scaling:
    prompt-to-prompt, Hertz et al. 2022, arXiv 2208.01626; DiTCtrl, Cai et al. 2024, arXiv
    2412.18597; both, for erasing and emphasis: MotionCLR, Chen et al. 2024, arXiv 2410.18977).

    Args:
        tokens: indices of the text tokens, from 0 on.
        scale: ``s``. 1 changes nothing, 0 erases the tokens.
        add: ``w``, the same for every row, also if a mask forbids the token. Positive values
            emphasise the tokens, negative ones weaken them, 0 changes nothing.
        renormalise: whether rows sum to 1 again. The edit then adds ``log s`` to the logits.
        both_ways: whether the rows of these tokens also see the image with ``s`` times its weight,
            in joint attention (DiTCtrl).

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, the prompt has no such
            token.

    Example:
        >>> from visattn.guidance import ScaleTokens, steer
        >>> emphasis = ScaleTokens(tokens=[1], scale=1.5, attention="cross", passes=["cond"])
        >>> with steer(pipe, emphasis):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
            raise ValueError("ScaleTokens has no tokens; give indices of text tokens, from 0 on")
        check_number("ScaleTokens", "scale", self.scale, "finite; 1 changes nothing")
        check_number("ScaleTokens", "add", self.add, "finite; 0 changes nothing")
        if self.add and (self.renormalise or self.both_ways):
            raise ValueError(
                f"ScaleTokens(add={self.add!r}) cannot be combined with renormalise or both_ways; "
                "leave these out, or use scale instead of add"
            )
        if self.renormalise and self.scale < 0:
            raise ValueError(
                f"ScaleTokens(scale={self.scale!r}, renormalise=True) must be from 0 on; 1 "
                "changes nothing"
            )
        if self.both_ways and (self.renormalise or self.attention == "cross"):
            raise ValueError(
                "ScaleTokens(both_ways=True) needs joint attention and has no renormalised form; "
                "use attention='self' and renormalise=False"
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
            acc_dtype = torch.promote_types(v.dtype, torch.float32)
            new = self.add * v.to(acc_dtype).sum(2, keepdim=True).to(v.dtype)
        else:
            new = weighed_values(state, keys, self.stream, weights)
        if self.both_ways:
            self._add_token_rows(state, keys, new)
        # the edit of all rows, since rows of tokens change too
        edit = self if not self.both_ways else Edit(samples=self.samples)
        edit.change(state, "out", state.out + new, strength)

    def _bias(self, state: State, keys: torch.Tensor, strength: torch.Tensor) -> None:
        """Add the biases of the renormalised form to a call."""
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

    def _add_token_rows(self, state: State, tokens: torch.Tensor, change: torch.Tensor) -> None:
        """Add to ``change`` how the rows of the tokens change by their image keys."""
        image = state.image
        q, k = logit_tensors(state, tokens, "text")
        out, lse = dense_with_lse(q, k[:, :, image], state.v[:, :, image], state.call.factor)
        share = (lse - state.normaliser(tokens)).exp()[..., None]
        change[:, :, tokens] += ((self.scale - 1) * share * out.to(share)).to(change.dtype)


@dataclass(frozen=True, kw_only=True)
class ScaleHeads(Edit):
    """Scale the output of heads: ``O_h <- a O_h``.

    Args:
        scale: ``a``. 1 changes nothing, 0 removes the heads.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import ScaleHeads, steer
        >>> with steer(pipe, ScaleHeads(scale=1.2, layers=[1], heads=[0])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        check_number("ScaleHeads", "scale", self.scale, "finite; 1 changes nothing")

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.scale != 1:
            self.change(state, "out", state.out * self.scale, strength)
