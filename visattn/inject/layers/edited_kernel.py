"""The attention that an editor computes with changed tensors, at one intercepted call."""

from __future__ import annotations

import functools

import torch

from visattn.attention import AttentionSpec, attention_by
from visattn.attention.dense_attention import dense_with_lse
from visattn.geometry.layout import TokenLayout
from visattn.inject.layers.call import Call, Plain, torch_attention
from visattn.inject.layers.denoising_state import DenoisingState
from visattn.inject.layers.head_groups import HeadGroups
from visattn.inject.layers.memories import Memories
from visattn.inject.layers.mixed_heads import mixed_attention
from visattn.inject.layers.text_padding import Padding
from visattn.runtime.torch_settings import callers_autocast
from visattn.selectors import Memory

__all__ = ["EditedKernel"]


class EditedKernel:
    """The ``Kernel`` of a layer at one call.

    Args:
        path: path of the layer.
        denoising: the state of the denoiser.
        memories: the memories of the layer.
        call: the arguments of the call.
        plain: what the pipeline computes without visattn, for ``[B, H, L, D]``.
        parts: the patterns of the heads in each part of the batch; None: all heads are dense.
        layout: layout of the queries.
        dim: size of the heads.
        batch: samples of the call.
        factor: factor of the logits.
        padding: the padding that was removed from the tensors and that the mask excludes; None: no
            padding was removed.
    """

    def __init__(
        self,
        path: str,
        denoising: DenoisingState,
        memories: Memories,
        call: Call,
        plain: Plain,
        parts: tuple[HeadGroups, ...] | None,
        layout: TokenLayout,
        dim: int,
        batch: int,
        factor: float,
        padding: Padding | None,
    ) -> None:
        self.path, self.denoising, self.memories = path, denoising, memories
        self.call, self.plain, self.parts, self.layout = call, plain, parts, layout
        self.dim, self.batch, self.factor, self.padding = dim, batch, factor, padding
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
        denoising, layout, factor = self.denoising, self.layout, self.factor
        memory = Memory()
        if not again:
            (memory,) = self.memories.of(
                (planned,), denoising, layout, q.shape[0], part, self.batch
            )
        backend = denoising.backend
        if not lse:
            plain, rows = self._dense_only, denoising.audit
            return mixed_attention(
                q, k, v, planned, layout, None, factor, plain, memory, backend, rows
            ), None
        spec = AttentionSpec(
            planned.heads, layout, scale=factor, backend=backend, return_lse=True
        )
        return attention_by(q, k, v, spec, memory)

    def _part(self, part: int, heads: tuple[int, ...] | None) -> HeadGroups | None:
        """Return what some heads run in a part of the batch; None if all of them are dense."""
        if self.parts is None:
            return None
        groups = self.parts[part if len(self.parts) > 1 else 0]
        if heads is not None:
            groups = _groups_of(groups, heads, self.layout)
        return groups if groups.sparse else None

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not lse:
            return self._dense_only(q, k, v), None
        if (self.call.mask is not None and self.padding is None) or self.call.causal:
            raise ValueError(
                f"an edit of {self.path} needs the log-sum-exp of its logits, which is not "
                "computed for a call with an attention mask; leave the layer out of the edit"
            )
        return dense_with_lse(q, k, v, self.factor)

    def _dense_only(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return attention by the backend of the pipeline. If the edit made the heads larger, torch
        computes it, as quantizing backends do not accept them."""
        plain = self.plain
        if q.shape[3] != self.dim:
            plain = torch_attention(self.call._replace(scale=self.factor))
        plain = plain if self.padding is None else self.padding.around(plain)
        with self.autocast():
            return plain(q, k, v)


@functools.lru_cache(maxsize=4096)
def _groups_of(part: HeadGroups, heads: tuple[int, ...], layout: TokenLayout) -> HeadGroups:
    """Return the groups of some heads of a part."""
    return HeadGroups(tuple(part.heads[n] for n in heads), layout)
