"""The attention of a caught call, which an editor asks for with tensors of its own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from visattn.attention import AttentionSpec, attention_by
from visattn.attention.dense_attention import dense_with_lse
from visattn.geometry.layout import TokenLayout
from visattn.inject.layers.compiled_layer import Call
from visattn.inject.layers.head_groups import HeadGroups, Plain
from visattn.inject.layers.text_padding import Padding
from visattn.runtime.torch_settings import callers_autocast
from visattn.selectors import Memory

if TYPE_CHECKING:
    from visattn.inject.layers.layer import Layer

__all__ = ["EditedKernel"]


class EditedKernel:
    """``Kernel`` of a layer at one call.

    Args:
        layer: whose call it is; call: its arguments; own: what the pipeline runs without us, heads
            first; parts: what the plan has for it; layout: of its queries.
        dim: of its heads; batch: of it; factor: of its logits; padding: that its tensors are
            without, and that its mask is of.
    """

    def __init__(
        self,
        layer: Layer,
        call: Call,
        own: Plain,
        parts: tuple[HeadGroups, ...] | None,
        layout: TokenLayout,
        dim: int,
        batch: int,
        factor: float,
        padding: Padding | None,
    ) -> None:
        self.layer, self.call, self.own, self.parts = layer, call, own, parts
        self.layout, self.dim, self.batch, self.factor = layout, dim, batch, factor
        self.padding = padding
        self.autocast = callers_autocast()

    def __call__(
        self,
        part: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: tuple[int, ...] | None = None,
        lse: bool = False,
        again: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        planned = self._part(part, heads)
        if planned is None:
            return self._dense(q, k, v, lse)
        layer, layout, factor = self.layer, self.layout, self.factor
        if again:
            memory = Memory()
        else:
            memory = layer.memories_of((planned,), q.shape[0], part, self.batch)[0]
        if not lse:
            own = self._dense_only
            return layer.mixed(q, k, v, planned, layout, None, factor, own, memory), None
        backend = layer.attachment.backend
        spec = AttentionSpec(
            planned.heads, layout, scale=factor, backend=backend, return_lse=True
        )
        return attention_by(q, k, v, spec, memory)

    def _part(self, part: int, heads: tuple[int, ...] | None) -> HeadGroups | None:
        """What some heads run in a part of the batch; None where all of it is dense."""
        if self.parts is None:
            return None
        own = self.parts[part if len(self.parts) > 1 else 0]
        if heads is not None:
            own = _chosen(own, heads, self.layout)
        return own if own.sparse else None

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not lse:
            return self._dense_only(q, k, v), None
        if (self.call.mask is not None and self.padding is None) or self.call.causal:
            raise ValueError(
                f"an edit of {self.layer.path} needs the normaliser of its softmax, which there is "
                "not for a call with an attention mask; leave the layer out of the edit"
            )
        return dense_with_lse(q, k, v, self.factor)

    def _dense_only(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """By the pipeline's own backend; by torch where the tensors are wider than its own, which
        backends that quantise would not stand."""
        plain = self.own
        if q.shape[3] != self.dim:
            plain = self.layer.by_torch(self.call._replace(scale=self.factor))
        plain = plain if self.padding is None else self.padding.around(plain)
        with self.autocast():
            return plain(q, k, v)


@functools.lru_cache(maxsize=4096)
def _chosen(part: HeadGroups, heads: tuple[int, ...], layout: TokenLayout) -> HeadGroups:
    """Some heads of a part."""
    return HeadGroups(tuple(part.heads[n] for n in heads), layout)
