"""An attention call of one pass while it is edited: the stages in their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from visattn.attention import merge_attention
from visattn.attention.dense_attention import dense_with_lse
from visattn.guidance.edits.bias import Bias, biased, rescued, rowless
from visattn.guidance.edits.edit import STAGES, Edit, Stream
from visattn.inject.editor import AttentionCall

__all__ = ["Borrowed", "State", "attend", "logit_tensors", "run"]

Active = Sequence[tuple[Edit, torch.Tensor]]


class Borrowed(NamedTuple):
    """Keys that some samples have beside their own.

    Attributes:
        samples: int64 ``[n]``, whose queries see them.
        k, v: ``[n, H, Lk, D]``.
        strength: of the heads, ``[H]``; the bias ``log strength`` goes to their logits.
    """

    samples: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    strength: torch.Tensor


@dataclass
class State:
    """One pass of an attention call.

    Attributes:
        call: as it was caught; part: which of the equal parts of its batch this is, ``pass_``
            whose pass, None where that is not known.
        q, k, v: ``[b, H, L, D]``, changed by the stages before the kernel.
        biases, borrowed: what the stages before the kernel ask it for.
        gains: factors of the logits of some keys, ``(first key, end, factor [b or 1, H])``, for the
            rows of a stream.
        out: ``[b, H, Lq, D]`` after the kernel, and ``lse`` ``[b, H, Lq]`` where an edit needs it.
    """

    call: AttentionCall
    part: int
    pass_: str | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    biases: list[Bias] = field(default_factory=list)
    borrowed: list[Borrowed] = field(default_factory=list)
    gains: list[tuple[Stream, int, int, torch.Tensor]] = field(default_factory=list)
    out: torch.Tensor = field(init=False)
    lse: torch.Tensor | None = None

    @property
    def image(self) -> slice:
        """The rows of the image or video."""
        return image_rows(self.call)

    @property
    def texts(self) -> tuple[tuple[int, int], ...]:
        """First and end of the text segments among the keys."""
        return tuple((start, start + n) for start, n in self.call.kv_layout.texts)

    def normaliser(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """``lse`` of some rows, by which weights are ``exp(logit - lse)``: 0 in rows that have no
        key at all, as of heads that a plan skips."""
        assert self.lse is not None
        own = self.lse[:, :, rows]
        return own.masked_fill(own == -torch.inf, torch.inf)

    def rows(self, stream: Stream) -> list[slice]:
        """The query rows of a stream, as slices."""
        if stream == "all":
            return [slice(0, self.q.shape[2])]
        if stream == "image":
            return [self.image]
        texts = self.call.layout.texts if self.call.kind != "cross" else ()
        return [slice(start, start + n) for start, n in texts]

    def samples(self, edit: Edit) -> list[int]:
        """The samples of the pass that an edit is for."""
        every = range(self.q.shape[0])
        if edit.samples is None:
            return list(every)
        for sample in edit.samples:
            if sample not in every:
                raise ValueError(
                    f"{type(edit).__name__} is for sample {sample}, and a pass of this call has "
                    f"{len(every)}, from 0 on; give as many prompts"
                )
        return list(edit.samples)

    def source(self, edit: Edit, number: int) -> int:
        """The number of a sample that an edit takes something from.

        Raises:
            ValueError: the pass has no such sample.
        """
        if not 0 <= number < self.q.shape[0]:
            raise ValueError(
                f"{type(edit).__name__} takes from sample {number}, and a pass of "
                f"{self.call.layer} has {self.q.shape[0]}, from 0 on; give as many prompts"
            )
        return number

    def change(
        self, name: str, new: torch.Tensor, edit: Edit, strength: torch.Tensor
    ) -> None:
        """Move a tensor ``[b, H, Lq, D]`` of the call towards another by the strength of each head:
        in the rows and samples of an edit, and nowhere else. At strength 1 it is the other one,
        whatever it was."""
        old = getattr(self, name)
        weight = strength.expand(len(old), -1)
        samples = torch.tensor(self.samples(edit))[:, None]
        heads = weight.any(0).nonzero()[None, :, 0]  # others are not gone through
        if not samples.numel() or not heads.numel():
            return
        own = weight[samples, heads].to(device=old.device, dtype=old.dtype)[..., None, None]
        samples, heads = samples.to(old.device), heads.to(old.device)
        out = old.clone()
        for rows in self.rows(edit.stream):
            mine, other = (x[samples, heads, rows] for x in (old, new.expand_as(old)))
            moved = torch.where(own == 1, other, torch.lerp(mine, other, own))
            out[samples, heads, rows] = torch.where(own == 0, mine, moved)
        setattr(self, name, out)


def image_rows(call: AttentionCall) -> slice:
    """The query rows of the first grid of a call."""
    start, grid = call.layout.grids[0]
    return slice(start, start + grid.numel)


def run(state: State, active: Active) -> torch.Tensor:
    """The edited attention of one pass, ``[b, H, Lq, D]``."""
    for stage in STAGES:
        if stage == "kernel":
            state.out, state.lse = attend(state, [edit for edit, _ in active])
        for edit, strength in active:
            if edit.stage == stage:
                edit.apply(state, strength)
    return state.out


def attend(
    state: State, edits: Iterable[Edit], again: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a call as the edits before it have made it; again: a further one, beside
    that of the call."""
    needs = any(edit.needs_lse for edit in edits) or bool(state.borrowed)
    needs = needs or (state.call.sparse and not _same_gains(state))  # which tells skipped heads
    out, lse = _own(state, state.k, needs, _gained(state, "image"), again)
    if state.call.kind != "cross":
        _text_rows(state, out, lse)
    for one in state.borrowed:
        n = one.samples
        other, other_lse = dense_with_lse(state.q[n], one.k, one.v, state.call.factor)
        assert lse is not None
        bias = one.strength.to(other_lse).log().reshape(1, -1, 1)
        merged, total = merge_attention([out[n], other], [lse[n], other_lse + bias])
        chosen = (one.strength.to(out.device)[None, :, None] > 0) & (lse[n] > -torch.inf)
        out[n] = torch.where(chosen[..., None], merged, out[n])
        lse[n] = torch.where(chosen, total, lse[n])
    return out, lse


def logit_tensors(
    state: State, rows: slice | torch.Tensor, stream: Stream
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of some rows and all keys of a call, ``[b, H, L, D']``, whose products times the
    factor are the logits with their biases and with the gains of a stream's rows."""
    gained = _gained(state, stream)
    q, k = state.q[:, :, rows], state.k if gained is None else gained
    if state.biases:
        biases = [bias.rows(rows) for bias in state.biases]
        q, k, _ = biased(q, k, k, biases, state.call.factor)
    return q, k


def _own(
    state: State, k: torch.Tensor, needs: bool, gained: torch.Tensor | None, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention to the keys of the call itself."""
    keys = k if gained is None else gained
    if not state.biases:
        return state.call.kernel(state.part, state.q, keys, state.v, None, needs, again)
    q, wide_k, wide_v = biased(state.q, keys, state.v, state.biases, state.call.factor)
    sparse = state.call.sparse
    out, lse = state.call.kernel(state.part, q, wide_k, wide_v, None, needs or sparse, again)
    out = out[..., : state.v.shape[3]]
    if sparse:
        assert lse is not None
        alone = (lse < -1e4) & (lse > -torch.inf)  # rows that the plan leaves no key stay 0
    else:
        alone = rowless(state.biases, state.q)
    return rescued(state, out, lse, alone)


def _gained(state: State, stream: Stream) -> torch.Tensor | None:
    """The keys with the gains of a stream's rows."""
    own = [gain for gain in state.gains if gain[0] in ("all", stream)]
    if not own:
        return None
    k = state.k.clone()
    for _, first, end, factor in own:
        k[:, :, first:end] *= factor.to(k)[..., None, None]
    return k


def _same_gains(state: State) -> bool:
    """Whether the rows of text and image have the same gains."""
    return all(stream == "all" for stream, *_ in state.gains)


def _text_rows(state: State, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Text rows whose gains are not those of the image's, which are computed again, densely."""
    if _same_gains(state):
        return
    gained = _gained(state, "text")
    keys = state.k if gained is None else gained
    for rows in state.rows("text"):
        q, k, v = state.q[:, :, rows], keys, state.v
        alone = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
        if state.biases:
            biases = [bias.rows(rows) for bias in state.biases]
            alone = rowless(biases, q)  # which have been rescued
            q, k, v = biased(q, k, v, biases, state.call.factor)
        if lse is not None:
            alone = alone | (lse[:, :, rows] == -torch.inf)
        own, own_lse = dense_with_lse(q, k, v, state.call.factor)
        own = own[..., : state.v.shape[3]]
        out[:, :, rows] = torch.where(alone[..., None], out[:, :, rows], own)
        if lse is not None:
            lse[:, :, rows] = torch.where(alone, lse[:, :, rows], own_lse)
