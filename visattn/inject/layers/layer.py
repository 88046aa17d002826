"""One attention layer with a plan: what it runs at a call, and the call."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention import AttentionSpec, attention_by, choose_backend, sparse_attention
from visattn.geometry.layout import TokenLayout
from visattn.inject.editor import AttentionCall, Editor, Kind
from visattn.inject.hooks.class_swap import add_class, remove_class
from visattn.inject.hooks.recent import Recent
from visattn.inject.hooks.weak import Weak
from visattn.inject.layers.compiled_layer import Call, not_a_graph, register_layer
from visattn.inject.layers.decision import Decision, Guard
from visattn.inject.layers.edited_kernel import EditedKernel
from visattn.inject.layers.head_groups import DENSE, HeadGroups, Heads, Plain
from visattn.inject.layers.interception import (
    ATTRIBUTE,
    Intercepted,
    hook,
    own_backend,
    stock_attention,
    unhook,
)
from visattn.inject.layers.text_padding import Padding, text_lengths_of
from visattn.inject.observation import Observation
from visattn.plan import ANY
from visattn.runtime.torch_settings import cast_for_attention, plain_torch
from visattn.selectors import Memory
from visattn.selectors.audit import audit

if TYPE_CHECKING:
    from visattn.inject.attachment import Attachment

__all__ = ["Layer"]

MEMORIES = 64  # of a layer; texts of many lengths would have as many

Moments = tuple[tuple[int, str], ...]


class Layer:
    """An attention module that a plan has something for.

    Args:
        attachment: of its denoiser.
        path, module: of the attention module.
        heads: how many query heads it has.
        table: what they run, by phase and pass.
    """

    def __init__(
        self,
        attachment: Attachment,
        path: str,
        module: Any,
        heads: int,
        table: dict[tuple[int, str], Heads],
    ) -> None:
        self._attachment, self.path, self._module = Weak(attachment), path, Weak(module)
        self.heads, self.table = heads, table
        self.begun = attachment.begun
        self.processor = module.processor
        self.observers = [own for own, paths in attachment.observers if path in paths]
        self.editor: Editor | None = None
        self.cross = path in attachment.cross_paths
        self.through_sdpa = False
        self.sparse_calls = self.dense_calls = 0
        self.ran: set[str] = set()  # the backends of its sparse calls
        # of the last call that did not run, or did not choose, as the plan has it
        self.reason: str | None = None
        self._said: set[str] = set()
        self.memories: dict[tuple[object, ...], Memory] = {}
        self.latest: tuple[object, ...] = ()  # what keys of the last call's memories begin with
        self._guard = Guard()
        self._split: Recent[tuple[Moments, TokenLayout], tuple[HeadGroups, ...]] = Recent()
        self.number = register_layer(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a layer is another layer."""
        self.__dict__.update(state)
        self.memories = {}
        register_layer(self, self.number)

    @property
    def attachment(self) -> Attachment:
        """Of its denoiser."""
        return self._attachment()

    @property
    def module(self) -> Any:
        """The attention module."""
        return self._module()

    # ---- putting it on the module, and taking it off

    def install(self) -> None:
        """Catch the attention of the module; where that is done already, look whether it still
        holds: processors and their backends are changed by other calls too."""
        setattr(self.module, ATTRIBUTE, self)
        add_class(self.module, Intercepted)
        self.processor = self.module.processor
        # a processor that dispatches without a backend of its own ends in torch's attention too
        self.through_sdpa = not hasattr(self.processor, "_attention_backend")
        if not self.through_sdpa:
            hook(self.processor)

    def let_go(self) -> None:
        """Leave a processor that the module no longer has as it was."""
        if self.processor is not self.module.processor:
            unhook(self.processor)

    def remove(self) -> None:
        """Leave the module as it was."""
        unhook(self.processor)
        unhook(self.module.processor)  # another one, which modules may share
        self.module.__dict__.pop(ATTRIBUTE, None)
        remove_class(self.module, Intercepted)

    def tell(self, reason: str) -> None:
        """Note why a call is dense where the plan has something sparse; say it once."""
        which = f"some calls of {self.path} stay" if self.sparse_calls else f"{self.path} stays"
        self._say(reason, f"{which} dense: {reason}")

    def _say(self, reason: str, sentence: str) -> None:
        self.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            self.attachment.tell(sentence)

    def warn(self, memory: Memory) -> None:
        """Say once that there was nothing to choose by."""
        if memory.broken is not None and bool(memory.broken):
            reason = "scores of its blocks were not finite, so that all of them are kept"
            self._say(reason, f"{self.path}: {reason}")

    def look(self) -> None:
        """After a call of the module: whether its attention has ever been caught."""
        if not self.sparse_calls + self.dense_calls:
            kind = type(self.module.processor).__name__
            self.tell(f"{kind} calls no attention that can be caught")

    # ---- running it

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        parallel: Any = None,
    ) -> torch.Tensor:
        """The attention of the layer, tensors as ``call.heads_first`` says, in and out."""
        if self.of_image(key, call):
            return self._plain(call, parallel)(query, key, value)
        layout = self.attachment.layout
        lengths = self.lengths(query, call)
        given = query, key, value
        query, key, value = cast_for_attention(*given)
        for observer in self.observers:
            with plain_torch():
                observer(self._observation(query, key, value, call, lengths))
        decision = self._decided(query, key, call, parallel, lengths is not None)
        parts = decision.parts
        if self.editor is not None:
            edited = self._edited(query, key, value, call, parallel, lengths, parts)
            if edited is not None:
                return edited if call.heads_first else edited.transpose(1, 2)
        if parts is None:
            self.dense_calls += 1
            with decision.timed(query):
                return self._plain(call, parallel)(*given)
        if not call.heads_first:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))

        count = len(parts)
        chunks = (x.chunk(count) for x in (query, key, value))
        texts = [None] * count if lengths is None else lengths.chunk(count)
        owns = [heads_first(self._plain(one, parallel), one) for one in call.parts(count)]
        memories = self.memories_of(parts, query.shape[0])
        with decision.timed(query):
            outs = [
                self.mixed(q, k, v, part, layout, text, call.scale, own, memory)
                for q, k, v, part, text, own, memory in zip(
                    *chunks, parts, texts, owns, memories, strict=True
                )
            ]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
        for memory in memories:
            if memory.broken is not None and memory.broken.device.type == "cpu":
                self.warn(memory)  # on another device reading waits: the summary does
        self._count(parts, query)
        return out if call.heads_first else out.transpose(1, 2)

    def of_image(self, key: torch.Tensor, call: Call) -> bool:
        """Whether this is cross-attention to an image, which some models have beside that to
        text."""
        length = key.shape[2 if call.heads_first else 1]
        return self.cross and self.attachment.call.text_length not in (None, length)

    def lengths(self, query: torch.Tensor, call: Call) -> torch.Tensor | None:
        """Valid tokens of each text of a call, int64 ``[B, texts]``; None where all are."""
        if self.cross or not self.attachment.family.masks_text_padding:
            return None
        return text_lengths_of(call, self.attachment.layout, query.shape[0])

    def _edited(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        parallel: Any,
        lengths: torch.Tensor | None,
        parts: tuple[HeadGroups, ...] | None,
    ) -> torch.Tensor | None:
        """What the editor makes of a call, ``[B, H, L, D]``, or None; it sees no padding."""
        assert self.editor is not None
        if lengths is not None:  # to be read, and copied by
            seen = self._observation(query, key, value, call, lengths)
            if not self.editor.wants(seen):
                return None
        whole = (query, key, value)
        if not call.heads_first:
            whole = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        own = heads_first(self._plain(call, parallel), call)
        call = call._replace(heads_first=True)
        if lengths is None:
            return self._by_editor(*whole, call, own, parts, None)
        padding = Padding(self.attachment.layout, lengths, self.path)
        q, k, v = map(padding.cut, whole)
        state = self.attachment.call
        before, state.tokens = state.tokens, padding.tokens
        try:
            parts = self._decided(q, k, call, parallel, True).parts
            edited = self._by_editor(q, k, v, call, own, parts, padding)
        finally:
            state.tokens = before
        return None if edited is None else padding.back(edited)

    def _by_editor(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        own: Plain,
        parts: tuple[HeadGroups, ...] | None,
        padding: Padding | None,
    ) -> torch.Tensor | None:
        """The same of tensors ``[B, H, L, D]`` without a padding; ``own``: their attention without
        us, and with the padding."""
        assert self.editor is not None
        caught = self._caught(query, key, value, call, own, parts, padding)
        with plain_torch():
            edited = self.editor(caught)
        if edited is not None:
            self._count(parts, edited)
        return edited

    def _count(self, parts: tuple[HeadGroups, ...] | None, tensor: torch.Tensor) -> None:
        """Note a call for the summary."""
        if parts is None:
            self.dense_calls += 1
            return
        self.sparse_calls += 1
        chosen = choose_backend(self.attachment.backend, tensor).backend
        if any(part.kernels for part in parts):
            self.ran.add(chosen)
        if any(part.products for part in parts):  # which are plain products on every backend
            self.ran.add("blockwise" if chosen == "triton" else chosen)

    def _caught(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        plain: Plain,
        parts: tuple[HeadGroups, ...] | None,
        padding: Padding | None,
    ) -> AttentionCall:
        """The call as an editor sees it, heads first."""
        seen = self._observation(query, key, value, call, None)
        layout, keys = seen.layout, seen.k.shape[2]
        kind: Kind = "cross" if self.cross else "joint" if layout.texts else "self"
        own = TokenLayout.from_tokens((("text", keys),)) if self.cross else layout
        batch, _, _, dim = seen.q.shape
        factor = dim**-0.5 if call.scale is None else call.scale
        return AttentionCall(
            **vars(seen),
            kind=kind,
            kv_layout=own,
            factor=factor,
            sparse=parts is not None,
            kernel=EditedKernel(self, call, plain, parts, layout, dim, batch, factor, padding),
            masked=(call.mask is not None and padding is None) or call.causal,
        )

    def _observation(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        lengths: torch.Tensor | None,
    ) -> Observation:
        tensors = (query, key, value)
        q, k, v = tensors if call.heads_first else (x.transpose(1, 2) for x in tensors)
        attachment = self.attachment
        step, steps = attachment.step()
        return Observation(
            role=attachment.role,
            layer=self.path,
            number=(attachment.cross_paths if self.cross else attachment.paths).index(self.path),
            step=step,
            steps=steps,
            passes=attachment.passes(q.shape[0], call.mask is not None),
            q=q,
            k=k,
            v=v,
            layout=attachment.layout,
            scale=call.scale,
            text_lengths=lengths,
        )

    def _plain(self, call: Call, parallel: Any) -> Plain:
        """Attention as it would be without us, tensors as ``call.heads_first`` says."""
        if self.through_sdpa:
            return self.by_torch(call)
        stock = stock_attention(own_backend(self.module.processor), parallel)
        return functools.partial(stock, **_arguments(call))

    def by_torch(self, call: Call) -> Plain:
        """torch's attention, heads first."""
        return functools.partial(scaled_dot_product_attention, **_arguments(call))

    def _decided(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        call: Call,
        parallel: Any,
        padded: bool,
    ) -> Decision:
        """What the heads run in each equal part of the batch; padded: the call's mask is that of
        padding alone."""
        if self.cross:
            return Decision(None)
        axis = 2 if call.heads_first else 1
        length, keys, heads = query.shape[axis], key.shape[axis], query.shape[3 - axis]
        layout = self.attachment.layout
        moments = self.attachment.moments(query.shape[0], call.mask is not None)
        parts = self._at(moments, layout)
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
            reason = f"it has {length} queries and {keys} keys where {layout} is expected"
        elif heads != self.heads:
            reason = f"it has {heads} heads where the plan has {self.heads}"
        if reason is not None:
            self.tell(reason)
            return Decision(None)
        if not self.attachment.guard or not _can_measure(query):
            return Decision(parts)
        return self._guard.decide(self, parts, query, layout)

    def _at(self, moments: Moments, layout: TokenLayout) -> tuple[HeadGroups, ...] | None:
        """The parts of a batch at the moments of its parts, one where they are alike; None where
        the plan has nothing but dense heads. Worked out once."""
        found = self._split.get((moments, layout))
        if found is None:
            all_dense = (DENSE,) * self.heads
            chosen = [
                next((heads for key in keys if (heads := self.table.get(key))), all_dense)
                for keys in map(_keys, moments)
            ]
            own = {heads: HeadGroups(heads, layout) for heads in chosen}
            found = tuple(own[heads] for heads in (chosen[:1] if len(own) == 1 else chosen))
            self._split[moments, layout] = found
        return found if any(part.sparse for part in found) else None

    def memories_of(
        self, parts: tuple[HeadGroups, ...], batch: int, first: int = 0, whole: int | None = None
    ) -> list[Memory]:
        """What the dynamic patterns of each part of a batch remember: by size, by pass as far as it
        is known, by the heads that have them, and by who calls. ``first``: the number of the first
        part; ``whole``: the size of the batch where these are not all of it."""
        if not any(part.dynamic for part in parts) and not self.attachment.audit:
            return [Memory() for _ in parts]
        attachment = self.attachment
        step, steps = attachment.step()
        passes, slot = attachment.passes(whole or batch), attachment.call.slot
        found = []
        for number, part in enumerate(parts, first):
            key = (batch, attachment.layout, passes, number, len(parts), part.heads, slot)
            if key not in self.memories and len(self.memories) >= MEMORIES:
                self.memories.pop(next(iter(self.memories)))
            memory = self.memories.setdefault(key, Memory())
            self.latest = key[:2]
            memory.begin(None if passes is None else step, steps)
            found.append(memory)
        return found

    def mixed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        part: HeadGroups,
        layout: TokenLayout,
        lengths: torch.Tensor | None,
        scale: float | None,
        own: Plain,
        memory: Memory,
    ) -> torch.Tensor:
        """Dense heads by the user's own attention, the others by ours; ``[B, H, L, D]``."""
        if not part.sparse:
            return own(q, k, v)
        backend = self.attachment.backend

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> torch.Tensor:
            if torch.compiler.is_compiling():  # after a graph break
                return sparse_attention(
                    q, k, v, heads, layout, text_lengths=lengths, scale=scale, backend=backend
                )
            rows = self.attachment.audit
            with_lse = rows > 0 and not part.products  # which have none
            spec = AttentionSpec(heads, layout, None, lengths, scale, backend, with_lse)
            out, lse = attention_by(q, k, v, spec, memory)
            if rows:
                factor = q.shape[3] ** -0.5 if scale is None else scale
                with torch.no_grad():
                    own = audit(q, k, v, out, lse, layout, lengths, factor, rows, memory.step or 0)
                memory.audited = (heads, own)
            return out

        if not part.dense or k.shape[1] != q.shape[1]:  # grouped keys are not split by query head
            return run(q, k, v, part.heads)
        dense, sparse = part.indices(q.device)
        out = torch.empty_like(q)
        out[:, dense] = own(q[:, dense], k[:, dense], v[:, dense])
        out[:, sparse] = run(q[:, sparse], k[:, sparse], v[:, sparse], part.patterns)
        return out


not_a_graph(Layer.attend)  # it runs between graphs, where one ended before the attention


def _keys(moment: tuple[int, str]) -> tuple[tuple[int, str], ...]:
    """Where the table may have the heads of a moment, the first first. A perturbed pass runs what
    the conditional one does, unless the plan says otherwise."""
    phase, pass_ = moment
    like = ((phase, "cond"),) if pass_ == "perturbed" else ()
    return (moment, *like, (phase, ANY))


def heads_first(plain: Plain, call: Call) -> Plain:
    """Attention that takes and gives tensors as ``call.heads_first`` says, heads first."""
    if call.heads_first:
        return plain

    def turned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return turned


def _arguments(call: Call) -> dict[str, Any]:
    """A call's arguments besides its tensors, as torch and diffusers name them."""
    return {
        "attn_mask": call.mask,
        "dropout_p": call.dropout,
        "is_causal": call.causal,
        "scale": call.scale,
        "enable_gqa": call.grouped,
    }


def _can_measure(query: torch.Tensor) -> bool:
    """Whether this is a call that computes, and not one that is traced or captured."""
    if torch.compiler.is_compiling() or query.device.type not in ("cpu", "cuda"):
        return False
    return query.device.type == "cpu" or not torch.cuda.is_current_stream_capturing()
