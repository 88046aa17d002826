"""AttentionSpec: the description of an attention call: everything except q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout
from visattn.patterns import HeadPattern, Pattern

__all__ = ["AttentionSpec", "Choice", "wants_gradients"]


class Choice(NamedTuple):
    """The backend that computes a call, and why it was chosen.

    Args:
        backend: its name: one of ``BACKENDS`` other than ``"auto"``.
        reason: one phrase, for logs and reports.

    Example:
        >>> import torch
        >>> from visattn.attention import choose_backend
        >>> choose_backend("auto", torch.randn(1, 8, 64, 32))
        Choice(backend='blockwise', reason='plain torch runs on device type cpu')
    """

    backend: str
    reason: str


@dataclass(frozen=True)
class AttentionSpec:
    """The description of an attention call. Hashable. Comparison ignores the text lengths, which
    are values on a device.

    Attributes:
        patterns: one per query head.
        layout: tokens of the queries.
        kv_layout: tokens of the keys; None: those of ``layout``.
        text_lengths: valid tokens of each text segment of the keys, ``[B, text segments]``; None:
            all are valid.
        scale: factor of the logits; None: ``D ** -0.5``. ``checks.check_call`` fills it in.
        backend: as the caller named it, ``"auto"`` included.
        return_lse: whether the LSE is needed.
        choice: the backend that runs; None until ``choice.resolve`` has chosen it.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.attention import AttentionSpec
        >>> from visattn.patterns import Dense, Neighborhood
        >>> layout = TokenLayout(Grid(4, 8, 8))
        >>> spec = AttentionSpec((Dense(), Neighborhood((3, 5, 5))), layout)
        >>> spec.key_layout == layout
        True
    """

    patterns: tuple[HeadPattern, ...]
    layout: TokenLayout
    kv_layout: TokenLayout | None = None
    text_lengths: torch.Tensor | None = field(default=None, compare=False, repr=False)
    scale: float | None = None
    backend: str = "auto"
    return_lse: bool = False
    choice: Choice | None = None

    @property
    def key_layout(self) -> TokenLayout:
        """Tokens of the keys."""
        return self.kv_layout or self.layout

    @property
    def factor(self) -> float:
        """Factor of the logits of a checked call."""
        assert self.scale is not None, "check_call fills in the scale"
        return self.scale

    @property
    def chosen(self) -> str:
        """Name of the backend that runs a resolved call."""
        assert self.choice is not None, "resolve chooses the backend"
        return self.choice.backend

    @property
    def static_patterns(self) -> tuple[Pattern, ...]:
        """The patterns, where all are static.

        Raises:
            NotImplementedError: one is dynamic: ``torch.compile`` asks for its gradients.
        """
        static = tuple(item for item in self.patterns if isinstance(item, Pattern))
        if len(static) < len(self.patterns):
            raise NotImplementedError(
                "gradients of dynamic patterns are computed without torch.compile only"
            )
        return static


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether autograd will differentiate what is computed from these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
