"""Weight that sinks draw, given to the rest of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_number
from visattn.guidance.edits.bias import Bias
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.kernel import attend
from visattn.guidance.edits.key_weights import token_weights, weighed_values
from visattn.guidance.edits.label_bias import Labels
from visattn.guidance.edits.state import State, Stream

__all__ = ["RedistributeSinks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RedistributeSinks(Edit):
    """Sinks weigh ``p`` times as much, and what they lose goes to the other image tokens by their
    weights (visual attention redistribution, Kang et al. 2025, arXiv 2503.03321). Text that is no
    sink weighs what it did, and rows sum to 1.

    Where a row gives ``a`` to sinks and ``b`` to the other image tokens, this is a bias of its
    logits: ``log p`` for sinks and ``log(1 + (1 - p) a / b)`` for those others. As ``a / b`` is
    another number in each row and head, it is made as ``O <- p O + (1 - p) (t O_text + (1 - t)
    O_image)``: ``O_text`` is the attention to the text that is no sink, which weighs ``t``, and
    ``O_image`` that to the others alone, which is computed besides, within the plan's pattern (a
    dynamic one chooses for it anew).

    Args:
        sinks: which keys are sinks, text or image, bool ``[Lk]``, or ``[b, Lk]`` for each sample of
            a pass, or a function of the call (a State) that gives them.
        scale: ``p``, from 0, where sinks weigh nothing, to 1, which changes nothing.

    A row that sees no other image token gives the weight to its own. The paper finds sinks by
    channels of the hidden states of a language model, which are not looked for here.

    Source:
        Kang et al. (2025), "See What You Are Told: Visual Attention Sink in Large Multimodal
        Models", arXiv 2503.03321.
    Default:
        paper.
    Differences:
        - Sinks are given by the caller; the paper finds them by channels of a language model.
    """

    sinks: Labels
    scale: float
    stage: ClassVar[str] = "lerp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.sinks) and not isinstance(self.sinks, torch.Tensor):
            raise TypeError(_wrong_sinks(self.sinks))
        allowed = "from 0 to 1; 1 is no change"
        check_number("RedistributeSinks", "scale", self.scale, allowed, lambda own: 0 <= own <= 1)
        if self.attention != "self":
            raise ValueError(
                "RedistributeSinks(attention='cross') is not possible: the keys of cross-attention "
                "are text; take attention='self'"
            )

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        return self.scale != 1

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.scale == 1:
            return
        if state.borrowed:
            raise ValueError(
                f"RedistributeSinks: {state.call.layer} has borrowed keys, which are neither its "
                "text nor its image; leave the layer out of BorrowKeys"
            )
        text = torch.zeros(state.k.shape[2], dtype=torch.bool, device=state.k.device)
        for first, end in state.texts:
            text[first:end] = True
        sinks = self._sinks(state, text)
        if bool(sinks.any()):
            new, share = self._text(state, text, sinks)
            new = new + (1 - share[..., None]).to(new) * self._image(state, text | sinks)
            self.change(state, "out", new, strength.double() * (1 - self.scale))

    def _sinks(self, state: State, text: torch.Tensor) -> torch.Tensor:
        """Which keys are sinks, bool ``[b or 1, Lk]``."""
        given = self.sinks(state) if callable(self.sinks) else self.sinks
        if not isinstance(given, torch.Tensor):
            raise TypeError(_wrong_sinks(given))
        sinks = given.to(text.device)
        samples, length = state.k.shape[0], state.k.shape[2]
        if sinks.dtype != torch.bool or sinks.shape not in ((length,), (samples, length)):
            raise ValueError(
                f"RedistributeSinks(sinks=...) has the shape {list(sinks.shape)} and the dtype "
                f"{sinks.dtype}; it must be bool, and {state.call.layer} has {length} keys in "
                f"{samples} samples"
            )
        sinks = sinks.reshape(-1, length)
        if bool((sinks | text).all(1).any()):
            raise ValueError(
                f"RedistributeSinks(sinks=...) has all of the image of {state.call.layer}; leave "
                "some of it to have their weight"
            )
        return sinks

    def _text(
        self, state: State, text: torch.Tensor, sinks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``t O_text``, ``[b, H, Lq, D]``, and ``t``, ``[b, H, Lq]``."""
        keys = text.nonzero()[:, 0]
        kept = ~sinks[:, None, None, keys]
        assert state.lse is not None
        share = torch.zeros_like(state.lse)

        def weights(rows: slice, stream: Stream) -> torch.Tensor:
            found = token_weights(state, keys, rows, stream) * kept
            share[:, :, rows] = found.sum(-1)
            return found

        return weighed_values(state, keys, self.stream, weights), share

    def _image(self, state: State, left_out: torch.Tensor) -> torch.Tensor:
        """``O_image``, ``[b, H, Lq, D]``."""
        table = torch.tensor([[0.0, -torch.inf]])
        rows = torch.zeros(1, state.q.shape[2], dtype=torch.int64)
        heads = torch.ones(state.q.shape[1], dtype=torch.bool)
        other = State(state.call, state.part, state.pass_, state.q, state.k, state.v)
        other.biases = [*state.biases, Bias(table, rows, left_out.to(torch.int64), heads)]
        other.gains = state.gains
        return attend(other, needs_lse=False, again=True)[0]


def _wrong_sinks(given: object) -> str:
    return (
        f"RedistributeSinks(sinks={given!r}) must be a bool tensor that says of each key whether "
        "it is a sink, or a function of the call that gives one"
    )
