"""The arguments of one attention call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.geometry.layout import Tokens

__all__ = ["Call", "Plain", "heads_first", "keyword_arguments", "torch_attention"]

# Attention of q, k, v as the pipeline computes it without visattn.
Plain: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Call(NamedTuple):
    """The arguments of an attention call other than q, k and v.

    Attributes:
        mask: attention mask; None: none.
        dropout: probability.
        causal: whether a query sees no later keys.
        scale: factor of the logits; None: ``D ** -0.5``.
        grouped: whether several query heads share a key head.
        heads_first: whether the tensors are ``[B, H, L, D]``; otherwise ``[B, L, H, D]``.
        tokens: the tokens of the sequence; empty: those that the call of the denoiser began with.
    """

    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool
    heads_first: bool
    tokens: Tokens = ()

    def parts(self, count: int) -> list[Call]:
        """Return the arguments for ``count`` equal parts of the batch."""
        if self.mask is None or self.mask.shape[0] == 1:
            return [self] * count
        return [self._replace(mask=mask) for mask in self.mask.chunk(count)]


def heads_first(plain: Plain, call: Call) -> Plain:
    """Return ``plain``, whose tensors are as in ``call``, as a function of ``[B, H, L, D]``."""
    if call.heads_first:
        return plain

    def transposed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return transposed


def keyword_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments under the names that torch and diffusers give them."""
    return {
        "attn_mask": call.mask,
        "dropout_p": call.dropout,
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": call.grouped,
    }


def torch_attention(call: Call) -> Plain:
    """Return torch's attention with the arguments of a call; it takes ``[B, H, L, D]``."""
    return functools.partial(scaled_dot_product_attention, **keyword_arguments(call))
