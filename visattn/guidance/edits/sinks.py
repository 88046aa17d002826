"""Move attention from sinks to the other image tokens."""

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
    """Multiply the attention weights of sinks by ``p``, and give the difference to the other image
    tokens in proportion to their weights (visual attention redistribution, Kang et al. 2025, arXiv
    2503.03321). Text tokens that are no sinks keep their weights, and rows still sum to 1.

    For a row that gives the weight ``a`` to sinks and ``b`` to the other image tokens, this is a
    bias of the logits: ``log p`` for sinks and ``log(1 + (1 - p) a / b)`` for the other image
    tokens. As ``a / b`` differs from row to row and head to head, the edit computes ``O <- p O +
    (1 - p) (t O_text + (1 - t) O_image)``. ``O_text`` is the attention to the text tokens that are
    no sinks, ``t`` their weight, and ``O_image`` the attention to the other image tokens alone. The
    last one is an additional attention with the pattern of the plan (dynamic patterns choose for
    it separately).

    A row that sees no other image token gives the weight to its own token. The paper detects sinks
    by channels of the hidden states of a language model; here the caller names them.

    Args:
        sinks: whether a key is a sink, text or image, bool ``[Lk]``, or ``[b, Lk]`` for each sample
            of a pass, or a function of a call's State that returns this.
        scale: ``p``, from 0 (sinks have no weight) to 1 (nothing changes).

    The other arguments are those of ``Edit``; ``attention`` must be ``self``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, ``sinks`` has another
            shape or names the whole image, or ``BorrowKeys`` edits the same layer.

    Example:
        >>> import torch
        >>> from visattn.guidance import RedistributeSinks, steer
        >>> def first_key(state):
        ...     return torch.arange(state.k.shape[2]) == 0
        >>> with steer(pipe, RedistributeSinks(sinks=first_key, scale=0.5)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        allowed = "from 0 to 1; 1 changes nothing"
        check_number("RedistributeSinks", "scale", self.scale, allowed, lambda p: 0 <= p <= 1)
        if self.attention != "self":
            raise ValueError(
                "RedistributeSinks(attention='cross') is not possible: the keys of cross-attention "
                "are text; use attention='self'"
            )

    @property
    def needs_lse(self) -> bool:  # type: ignore[override]
        return self.scale != 1

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.scale == 1:
            return
        if state.borrowed:
            raise ValueError(
                f"RedistributeSinks cannot be combined with BorrowKeys, which gives "
                f"{state.call.layer} additional keys; leave one of them out of the layer"
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
        """Return whether a key is a sink, bool ``[b or 1, Lk]``."""
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
                f"RedistributeSinks(sinks=...) names all image tokens of {state.call.layer}; leave "
                "some out, which get the weight"
            )
        return sinks

    def _text(
        self, state: State, text: torch.Tensor, sinks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``t O_text``, ``[b, H, Lq, D]``, and ``t``, ``[b, H, Lq]``."""
        keys = text.nonzero()[:, 0]
        kept = ~sinks[:, None, None, keys]
        assert state.lse is not None
        share = torch.zeros_like(state.lse)

        def weights(rows: slice, stream: Stream) -> torch.Tensor:
            kept_weights = token_weights(state, keys, rows, stream) * kept
            share[:, :, rows] = kept_weights.sum(-1)
            return kept_weights

        return weighed_values(state, keys, self.stream, weights), share

    def _image(self, state: State, left_out: torch.Tensor) -> torch.Tensor:
        """Return ``O_image``, ``[b, H, Lq, D]``."""
        table = torch.tensor([[0.0, -torch.inf]])
        rows = torch.zeros(1, state.q.shape[2], dtype=torch.int64)
        heads = torch.ones(state.q.shape[1], dtype=torch.bool)
        other = State(state.call, state.part, state.pass_, state.q, state.k, state.v)
        other.biases = [*state.biases, Bias(table, rows, left_out.to(torch.int64), heads)]
        other.gains = state.gains
        return attend(other, needs_lse=False, again=True)[0]


def _wrong_sinks(given: object) -> str:
    return (
        f"RedistributeSinks(sinks={given!r}) must be a bool tensor with a value for each key, or a "
        "function of the call that returns one"
    )
