"""One attention layer with a plan: chooses what its heads run at a call, and computes the call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from visattn.attention import choose_backend
from visattn.geometry.layout import TokenLayout
from visattn.inject.editor import AttentionCall, Editor, Kind
from visattn.inject.hooks.recent import Recent
from visattn.inject.layers.call import (
    Call,
    Plain,
    heads_first,
    keyword_arguments,
    torch_attention,
)
from visattn.inject.layers.compiled_layer import register_layer
from visattn.inject.layers.decision import Decision, Guard
from visattn.inject.layers.denoising_state import DenoisingState
from visattn.inject.layers.edited_kernel import EditedKernel
from visattn.inject.layers.head_groups import DENSE, HeadGroups, Heads
from visattn.inject.layers.intercepted_module import InterceptedModule
from visattn.inject.layers.interception import original_backend, stock_attention
from visattn.inject.layers.memories import Memories
from visattn.inject.layers.mixed_heads import mixed_attention
from visattn.inject.layers.text_padding import Padding, text_lengths_of
from visattn.inject.observation import Observation, Observer
from visattn.plan import ANY
from visattn.runtime.private_names import never_compile_alone
from visattn.runtime.torch_settings import cast_for_attention, plain_torch

__all__ = ["Layer"]

Moments = tuple[tuple[int, str], ...]


class Layer(InterceptedModule):
    """An attention module with a plan, an observer or an editor.

    Args:
        denoising: the state of its denoiser.
        path: path of the attention module.
        index: index of the layer among the layers of its kind.
        module: the attention module.
        table: the patterns of its heads, by phase and pass.
        observers: the observers of its calls.
        cross: whether it is cross-attention.
    """

    def __init__(
        self,
        denoising: DenoisingState,
        path: str,
        index: int,
        module: Any,
        table: Mapping[tuple[int, str], Heads],
        observers: list[Observer],
        cross: bool = False,
    ) -> None:
        super().__init__(denoising, path, module)
        self.index, self.heads, self.table = index, module.heads, table
        self.begun = denoising.begun
        self.observers, self.cross = observers, cross
        self.editor: Editor | None = None
        self.memories = Memories()
        self._guard = Guard()
        self._split: Recent[tuple[Moments, TokenLayout], tuple[HeadGroups, ...]] = Recent()
        self.number = register_layer(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy. It has its own memories."""
        self.__dict__.update(state)
        self.memories = Memories()
        register_layer(self, self.number)

    # ---- a call

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        parallel: Any = None,
    ) -> torch.Tensor:
        """Return the attention of a call, in the layout of the query.

        Args:
            query: ``[B, H, L, D]`` if ``call.heads_first``, else ``[B, L, H, D]``.
            key: likewise.
            value: likewise.
            call: the other arguments.
            parallel: the context parallelism of the processor.
        """
        if self.of_image(key, call):
            return self._plain(call, parallel)(query, key, value)
        denoising = self.denoising
        layout = denoising.layout_of(call.tokens) if call.tokens else denoising.layout
        lengths = self._text_lengths(query, call, layout)
        uncast = query, key, value
        query, key, value = cast_for_attention(*uncast)
        for observer in self.observers:
            with plain_torch():
                observer(self._observation(query, key, value, call, layout, lengths))
        decision = self._decided(query, key, call, layout, parallel, lengths is not None)
        parts = decision.parts
        if self.editor is not None:
            edited = self._edited(query, key, value, call, layout, parallel, lengths, parts)
            if edited is not None:
                return edited if call.heads_first else edited.transpose(1, 2)
        if parts is None:
            self.dense_calls += 1
            with decision.timed(query):
                return self._plain(call, parallel)(*uncast)
        if not call.heads_first:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))

        count = len(parts)
        chunks = (x.chunk(count) for x in (query, key, value))
        texts = [None] * count if lengths is None else lengths.chunk(count)
        plains = [heads_first(self._plain(part, parallel), part) for part in call.parts(count)]
        memories = self.memories.of(parts, denoising, layout, query.shape[0])
        backend, rows = denoising.backend, denoising.audit
        choice = choose_backend(backend, query)
        with decision.timed(query):
            outs = [
                mixed_attention(
                    q, k, v, part, layout, text, call.scale, plain, memory, backend, rows, choice
                )
                for q, k, v, part, text, plain, memory in zip(
                    *chunks, parts, texts, plains, memories, strict=True
                )
            ]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
        for memory in memories:
            if memory.broken is not None and memory.broken.device.type == "cpu":
                self.warn(memory)  # reading another device waits: the summary does it
        self._count_sparse(parts, choice.backend)
        return out if call.heads_first else out.transpose(1, 2)

    def of_image(self, key: torch.Tensor, call: Call) -> bool:
        """Return whether a call is cross-attention to an image, which some models have in addition
        to that to text.

        Args:
            key: the key of the call.
            call: its other arguments.
        """
        length = key.shape[2 if call.heads_first else 1]
        return self.cross and self.denoising.call.text_length not in (None, length)

    def lengths(self, query: torch.Tensor, call: Call) -> torch.Tensor | None:
        """Return the valid tokens of each text of a call, int64 ``[B, texts]``; None: all.

        Args:
            query: the query of the call.
            call: its other arguments.
        """
        return self._text_lengths(query, call, self.denoising.layout)

    def _text_lengths(
        self, query: torch.Tensor, call: Call, layout: TokenLayout
    ) -> torch.Tensor | None:
        if self.cross or not self.denoising.family.masks_text_padding:
            return None
        return text_lengths_of(call, layout, query.shape[0])

    def _edited(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        layout: TokenLayout,
        parallel: Any,
        lengths: torch.Tensor | None,
        parts: tuple[HeadGroups, ...] | None,
    ) -> torch.Tensor | None:
        """Return what the editor computes for a call, ``[B, H, L, D]``, or None. The editor gets
        tensors without padding."""
        assert self.editor is not None
        # removing the padding reads the lengths from the device: only for calls that are edited
        if lengths is not None and not self.editor.wants(
            self._observation(query, key, value, call, layout, lengths)
        ):
            return None
        tensors = (query, key, value)
        if not call.heads_first:
            tensors = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        plain = heads_first(self._plain(call, parallel), call)
        call = call._replace(heads_first=True)
        if lengths is None:
            return self._by_editor(*tensors, call, layout, plain, parts, None)
        padding = Padding(layout, lengths, self.path)
        unpadded = self.denoising.layout_of(padding.tokens)
        q, k, v = map(padding.cut, tensors)
        parts = self._decided(q, k, call, unpadded, parallel, True).parts
        edited = self._by_editor(q, k, v, call, unpadded, plain, parts, padding)
        return None if edited is None else padding.back(edited)

    def _by_editor(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        layout: TokenLayout,
        plain: Plain,
        parts: tuple[HeadGroups, ...] | None,
        padding: Padding | None,
    ) -> torch.Tensor | None:
        """Return what the editor computes for tensors ``[B, H, L, D]`` without padding.

        ``plain`` is the attention of the pipeline, for tensors with padding.
        """
        assert self.editor is not None
        attention_call = self._attention_call(
            query, key, value, call, layout, plain, parts, padding
        )
        with plain_torch():
            edited = self.editor(attention_call)
        if edited is None:
            return None
        if parts is None:
            self.dense_calls += 1
        else:
            self._count_sparse(parts, choose_backend(self.denoising.backend, edited).backend)
        return edited

    def _count_sparse(self, parts: tuple[HeadGroups, ...], backend: str) -> None:
        """Count a call with sparse heads, and the backend that computed it, for the summary."""
        self.sparse_calls += 1
        self.denoising.sparse_ran = True
        if any(part.kernels for part in parts):
            self.ran.add(backend)
        if any(part.products for part in parts):  # matrix products, the same on every backend
            self.ran.add("blockwise" if backend == "triton" else backend)

    def _attention_call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        layout: TokenLayout,
        plain: Plain,
        parts: tuple[HeadGroups, ...] | None,
        padding: Padding | None,
    ) -> AttentionCall:
        """Return the call as it is passed to an editor."""
        observation = self._observation(query, key, value, call, layout, None)
        num_keys = observation.k.shape[2]
        kind: Kind = "cross" if self.cross else "joint" if layout.texts else "self"
        kv_layout = TokenLayout.from_tokens((("text", num_keys),)) if self.cross else layout
        batch, _, _, dim = observation.q.shape
        factor = dim**-0.5 if call.scale is None else call.scale
        kernel = EditedKernel(
            self.path,
            self.denoising,
            self.memories,
            call,
            plain,
            parts,
            layout,
            dim,
            batch,
            factor,
            padding,
        )
        return AttentionCall(
            **vars(observation),
            kind=kind,
            kv_layout=kv_layout,
            factor=factor,
            sparse=parts is not None,
            kernel=kernel,
            masked=(call.mask is not None and padding is None) or call.causal,
        )

    def _observation(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        layout: TokenLayout,
        lengths: torch.Tensor | None,
    ) -> Observation:
        tensors = (query, key, value)
        q, k, v = tensors if call.heads_first else (x.transpose(1, 2) for x in tensors)
        denoising = self.denoising
        step, steps = denoising.step()
        return Observation(
            role=denoising.role,
            layer=self.path,
            number=self.index,
            step=step,
            steps=steps,
            passes=denoising.passes(q.shape[0], call.mask is not None),
            q=q,
            k=k,
            v=v,
            layout=layout,
            scale=call.scale,
            text_lengths=lengths,
        )

    def _plain(self, call: Call, parallel: Any) -> Plain:
        """Return the attention of the pipeline without visattn. ``call.heads_first`` gives the
        layout of its tensors."""
        if self.through_sdpa:
            return torch_attention(call)
        stock = stock_attention(original_backend(self.module.processor), parallel)
        return functools.partial(stock, **keyword_arguments(call))

    def _decided(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        call: Call,
        layout: TokenLayout,
        parallel: Any,
        padded: bool,
    ) -> Decision:
        """Return what the heads run in each equal part of the batch.

        ``padded``: the mask of the call excludes padding and nothing else.
        """
        if self.cross:
            return Decision(None)
        axis = 2 if call.heads_first else 1
        length, keys, heads = query.shape[axis], key.shape[axis], query.shape[3 - axis]
        moments = self.denoising.moments(query.shape[0], call.mask is not None)
        parts = self._planned(moments, layout)
        if parts is None:
            return Decision(None)
        reason = None
        if call.mask is not None and not padded:
            reason = "it is given an attention mask"
        elif call.causal or call.dropout:
            reason = "it is causal or has dropout"
        elif parallel is not None:
            reason = "context parallelism splits its sequence"
        elif length != layout.length or keys != layout.length:
            reason = f"it has {length} queries and {keys} keys, but {layout} is expected"
        elif heads != self.heads:
            reason = f"it has {heads} heads, but the plan has {self.heads}"
        if reason is not None:
            self.tell(reason)
            return Decision(None)
        if not self.denoising.guard or not _can_measure(query):
            return Decision(parts)
        return self._guard.decide(self, parts, query, layout)

    def _planned(self, moments: Moments, layout: TokenLayout) -> tuple[HeadGroups, ...] | None:
        """Return what the plan has for each part of a batch, one entry if all parts are the same;
        None if all heads are dense."""
        parts = self._split.get((moments, layout))
        if parts is None:
            all_dense = (DENSE,) * self.heads
            planned = [
                next((heads for key in keys if (heads := self.table.get(key))), all_dense)
                for keys in map(_keys, moments)
            ]
            groups = {heads: HeadGroups(heads, layout) for heads in planned}
            parts = tuple(groups[heads] for heads in (planned[:1] if len(groups) == 1 else planned))
            self._split[moments, layout] = parts
        return parts if any(part.sparse for part in parts) else None


never_compile_alone(Layer.attend)  # it runs after a graph break before the attention


def _keys(moment: tuple[int, str]) -> tuple[tuple[int, str], ...]:
    """Return the keys of the table that apply to a moment, in order of priority. A perturbed pass
    runs the patterns of the conditional one, unless the plan has patterns for it."""
    phase, pass_ = moment
    conditional = ((phase, "cond"),) if pass_ == "perturbed" else ()
    return (moment, *conditional, (phase, ANY))


def _can_measure(query: torch.Tensor) -> bool:
    """Return whether a call can be timed; one that is traced or captured cannot."""
    if torch.compiler.is_compiling() or query.device.type not in ("cpu", "cuda"):
        return False
    return query.device.type == "cpu" or not torch.cuda.is_current_stream_capturing()
