"""One pass of an attention call while edits change it: the tensors, biases and borrowed keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from visattn.guidance.edits.bias import Bias
from visattn.inject.editor import AttentionCall

__all__ = ["Borrowed", "State", "Stream"]

Stream = Literal["all", "image", "text"]


class Borrowed(NamedTuple):
    """Keys that the queries of some samples see in addition to their own keys.

    Attributes:
        samples: the samples whose queries see them, int64 ``[n]``.
        k: keys ``[n, H, Lk, D]``.
        v: values ``[n, H, Lk, D]``.
        strength: strengths of the heads, ``[H]``. ``log strength`` is added to the logits of the
            borrowed keys.
    """

    samples: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    strength: torch.Tensor


@dataclass
class State:
    """One pass of an attention call, as an edit's ``apply`` reads and changes it.

    Attributes:
        call: the intercepted call.
        part: index of the pass among the equal parts of the call's batch.
        pass_: name of the pass. None if it is not known.
        q: queries ``[b, H, Lq, D]``. The stages before the kernel may replace them.
        k: keys ``[b, H, Lk, D]``. The stages before the kernel may replace them.
        v: values ``[b, H, Lk, D]``. The stages before the kernel may replace them.
        biases: biases that the kernel stage adds to the logits.
        borrowed: keys of other samples that the kernel stage adds.
        gains: factors of the logits of some keys for the rows of a stream, ``(stream, first key,
            end, factor [b or 1, H])``.
        out: attention output ``[b, H, Lq, D]``. The kernel stage sets it.
        lse: log-sum-exp of the logits ``[b, H, Lq]``. The kernel stage sets it if an edit needs
            it.

    Example:
        >>> from dataclasses import dataclass
        >>> from visattn.guidance import Edit, State, steer
        >>> @dataclass(frozen=True, kw_only=True)
        ... class HalveValues(Edit):
        ...     stage = "keys"
        ...     def apply(self, state: State, strength):
        ...         state.v = state.v / 2
        >>> with steer(pipe, HalveValues()):
        ...     frames = pipe("a cat", height=32, width=32, num_frames=5,
        ...                   num_inference_steps=1, output_type="latent").frames
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
        """The query rows of the image or video, which is the first grid of the call."""
        start, grid = self.call.layout.grids[0]
        return slice(start, start + grid.numel)

    @property
    def texts(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each text segment among the keys."""
        return tuple((start, start + n) for start, n in self.call.kv_layout.texts)

    def normaliser(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return ``lse`` of some rows, for weights ``exp(logit - lse)``. Rows without any key, such
        as those of heads that a plan skips, get +inf, so that their weights are 0."""
        assert self.lse is not None
        lse = self.lse[:, :, rows]
        return lse.masked_fill(lse == -torch.inf, torch.inf)

    def rows(self, stream: Stream) -> list[slice]:
        """Return the query rows of a stream as slices."""
        if stream == "all":
            return [slice(0, self.q.shape[2])]
        if stream == "image":
            return [self.image]
        texts = self.call.layout.texts if self.call.kind != "cross" else ()
        return [slice(start, start + n) for start, n in texts]
