"""``steer``: apply edits to the attention calls and blocks of a pipeline or denoiser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from visattn._arguments import in_window
from visattn.guidance.edits.block_edits import BlockEdit, BlockSwitch, edit_blocks
from visattn.guidance.edits.edit import STAGES, Edit
from visattn.guidance.edits.kernel import attend
from visattn.guidance.edits.state import State
from visattn.guidance.head_set import HeadSet
from visattn.inject.apply import editing
from visattn.inject.attachment import attached
from visattn.inject.editor import AttentionCall, Editor
from visattn.inject.hooks.class_swap import add_handler, remove_handler
from visattn.inject.hooks.turn import Gate
from visattn.inject.models.denoisers import (
    attention_layers,
    cross_layers,
    describe,
    known_denoisers,
)
from visattn.inject.observation import Observation

__all__ = [
    "Placed",
    "Steering",
    "apply_edits",
    "check_switches",
    "check_touched",
    "enter",
    "place",
    "steer",
]


# an edit, and the strengths of its heads, [H] or [samples, H], by the path of the layer
Placed = tuple[Edit, dict[str, torch.Tensor]]


class Entry(NamedTuple):
    """An edit of a steering.

    Attributes:
        steering: the steering that the edit belongs to.
        number: index of the edit in the steering.
        edit: the edit.
        strengths: strengths of the heads, by the path of the layer.
    """

    steering: Steering
    number: int
    edit: Edit
    strengths: dict[str, torch.Tensor]


@dataclass
class Steering:
    """The edits of one denoiser. It is the editor of the attention calls: it takes a call, and
    returns the edited attention.

    Args:
        edits: each edit with the strengths of its heads by layer.
        before: the previous editor of the denoiser. If it is a steering, its edits are applied
            first.
        on: whether the edits are applied now.
    """

    edits: list[Placed]
    before: Editor | None = None
    on: bool = True
    touched: Counter[int] = field(default_factory=Counter)  # changed calls, by index of the edit

    def __post_init__(self) -> None:
        earlier = self.before.entries if isinstance(self.before, Steering) else []
        later = [Entry(self, n, edit, where) for n, (edit, where) in enumerate(self.edits)]
        self.entries: list[Entry] = [*earlier, *later]
        self.paths = frozenset(path for entry in self.entries for path in entry.strengths)

    @contextmanager
    def reading_only(self, steering: Steering) -> Iterator[None]:
        """Inside the ``with`` block, only one steering reads attention: edits of the stage ``read``
        of other steerings are left out.

        Args:
            steering: this one, or one whose edits are applied before.
        """
        entries = self.entries
        self.entries = [e for e in entries if e.steering is steering or e.edit.stage != "read"]
        try:
            yield
        finally:
            self.entries = entries

    def wants(self, call: Observation) -> bool:
        """Return whether any edit applies to a call."""
        return any(self._active(call))

    def _active(self, call: Observation) -> list[list[Entry]]:
        """Return the edits of each pass of the batch.

        Args:
            call: the attention call.

        Raises:
            ValueError: an edit is limited to some passes or steps, and the pass or step of the call
                is not known.
        """
        of_layer = [e for e in self.entries if e.steering.on and call.layer in e.strengths]
        now = [entry for entry in of_layer if _in_time(entry.edit, call)]
        passes: tuple[str | None, ...] = call.passes or (None,)
        if call.passes is None and any(entry.edit.passes for entry in now):
            wanted = sorted({name for entry in now for name in entry.edit.passes or ()})
            raise ValueError(
                f"an edit is limited to the {' and '.join(wanted)} pass, and the pass of this call "
                f"of {call.role} is not known; steer the pipeline that runs, if visattn knows its "
                "passes"
            )
        return [[e for e in now if not e.edit.passes or pass_ in e.edit.passes] for pass_ in passes]

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        passes: tuple[str | None, ...] = call.passes or (None,)
        active = self._active(call)
        if not any(active):
            return None
        outs = []
        groups = call.q.shape[1] // call.k.shape[1]
        tensors = [call.q, *(x.repeat_interleave(groups, 1) for x in (call.k, call.v))]
        if groups == 1:
            tensors = [call.q, call.k, call.v]
        chunks = zip(*(x.chunk(len(passes)) for x in tensors), passes, active, strict=True)
        for number, (q, k, v, pass_, entries) in enumerate(chunks):
            state = State(call, number, pass_, q, k, v)
            _check_streams([entry.edit for entry in entries], state)
            outs.append(apply_edits(state, [(e.edit, e.strengths[call.layer]) for e in entries]))
            for entry in entries:
                entry.steering.touched[entry.number] += 1
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def apply_edits(state: State, active: Sequence[tuple[Edit, torch.Tensor]]) -> torch.Tensor:
    """Compute the edited attention of one pass.

    Args:
        state: one pass of an attention call.
        active: the edits, each with the strengths of its heads, ``[H]`` or ``[b, H]``.

    Returns:
        The output ``[b, H, Lq, D]``.
    """
    for stage in STAGES:
        if stage == "kernel":
            state.out, state.lse = attend(state, any(edit.needs_lse for edit, _ in active))
        for edit, strength in active:
            if edit.stage == stage:
                edit.apply(state, strength)
    return state.out


def _check_streams(edits: Sequence[Edit], state: State) -> None:
    for edit in edits:
        if edit.stream == "text" and not state.rows("text"):
            raise ValueError(
                f"{type(edit).__name__}(stream='text'): {state.call.layer} has no text queries; "
                "leave stream out"
            )


def _in_time(edit: Edit, call: Observation) -> bool:
    if edit.start == 0 and edit.stop == 1.0 and isinstance(edit.stop, float):
        return True
    if call.step is None or call.steps is None:
        raise ValueError(
            f"{type(edit).__name__} is limited to some steps, and the step of this call of "
            f"{call.role} is not known; steer the pipeline that runs"
        )
    return in_window(edit.start, edit.stop, call.step, call.steps)


def place(pipe: Any, edits: Sequence[Edit]) -> dict[str, list[Placed]]:
    """Find the layers and heads that edits apply to.

    Args:
        pipe: a pipeline or a denoiser.
        edits: the edits.

    Returns:
        The edits with the strengths of their heads, by the role of the denoiser.

    Raises:
        ValueError: the pipeline has no such role, layer, head or kind of attention, or a HeadSet
            was made for another model.
    """
    known = known_denoisers(pipe)
    out: dict[str, list[Placed]] = {role: [] for role in known}
    for edit in edits:
        if edit.role != "any" and edit.role not in known:
            raise ValueError(
                f"{type(edit).__name__}(role={edit.role!r}): {type(pipe).__name__} has "
                f"{', '.join(known)}"
            )
        for role, (model, family) in known.items():
            if edit.role not in ("any", role):
                continue
            find = cross_layers if edit.attention == "cross" else attention_layers
            layers = find(model, family)
            if isinstance(edit.layers, HeadSet):
                edit.layers.fits({role: describe(model, family)})
            if not layers:
                raise ValueError(
                    f"{type(edit).__name__}(attention='cross'): {family.name} has no "
                    "cross-attention; its text is part of the sequence, so use attention='self'"
                )
            heads = next(iter(layers.values())).heads
            out[role].append((edit, dict(edit.place(tuple(layers), heads).strengths)))
    return out


@contextmanager
def steer(pipe: Any, edits: Sequence[Edit | BlockEdit] | Edit | BlockEdit) -> Iterator[None]:
    """Edit the attention of a pipeline inside a ``with`` block. After the block, also after an
    error, the pipeline computes what it did before. Inside the block only one thread or asyncio
    task at a time may run the denoiser; a second one raises an error.

    Args:
        pipe: a diffusers pipeline or one of its denoisers, compiled or not, with a plan or without.
            Pairs that a pattern of the plan drops stay dropped.
        edits: one or several edits of ``visattn.guidance``. Edits of the same stage are applied in
            the given order, after those of an outer ``steer``.

    Returns:
        A context manager, which yields None.

    Raises:
        TypeError: an item of ``edits`` is not an edit.
        ValueError: an edit names a layer, head, block or role that the pipeline does not have; or,
            at the end of the block, an edit was never applied.

    Example:
        >>> from visattn import steer
        >>> from visattn.guidance import Perturb, ScaleHeads
        >>> with steer(pipe, [ScaleHeads(scale=1.2, layers=[0]), Perturb(layers=[-1])]):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)
    """
    listed = list(edits) if isinstance(edits, Sequence) else [edits]
    for edit in listed:
        if not isinstance(edit, (Edit, BlockEdit)):
            raise TypeError(
                f"edits has {edit!r}; it must have edits of visattn.guidance, such as "
                "Perturb(layers=[3]) (give guidances such as SoftPAG to visattn.guide)"
            )
    attention_edits = [edit for edit in listed if isinstance(edit, Edit)]
    block_edits = [edit for edit in listed if isinstance(edit, BlockEdit)]
    placed = place(pipe, attention_edits)
    with ExitStack() as stack:
        steerings = enter(stack, pipe, placed)
        switches = edit_blocks(stack, pipe, block_edits)
        yield
        check_touched(attention_edits, steerings.values())
        check_switches(block_edits, switches)


def enter(
    stack: ExitStack,
    pipe: Any,
    placed: Mapping[str, list[Placed]],
    on: bool = True,
) -> dict[str, Steering]:
    """Put edits on a pipeline until the stack is closed. Until then only one thread or asyncio task
    at a time may run the pipeline.

    Args:
        stack: closing it takes the edits off the pipeline.
        pipe: a pipeline or a denoiser.
        placed: the edits by the role of the denoiser.
        on: whether the edits are applied from the start.

    Returns:
        The steering of each denoiser by its role.
    """
    steerings = {}
    known = known_denoisers(pipe)
    for role, (model, _) in known.items():
        attachment = attached(model)
        if attachment is not None:
            attachment.turn.check()
        before = None if attachment is None else attachment.editor
        steerings[role] = Steering(placed.get(role, []), before, on)
    stack.enter_context(editing(pipe, steerings))
    if callable(pipe) and not isinstance(pipe, torch.nn.Module):
        attachments = [attached(model) for model, _ in known.values()]
        gate = Gate([each.turn for each in attachments if each is not None])
        add_handler(pipe, gate)
        stack.callback(remove_handler, pipe, gate)
    return steerings


def check_touched(edits: Sequence[Edit], steerings: Any) -> None:
    """Check that each edit was applied.

    Args:
        edits: the edits that were placed.
        steerings: the steerings that applied them.

    Raises:
        ValueError: an edit changed no call.
    """
    applied = {
        id(edit)
        for steering in steerings
        for n, (edit, _) in enumerate(steering.edits)
        if steering.touched[n]
    }
    for edit in edits:
        if id(edit) not in applied:
            raise ValueError(_untouched(edit))


def check_switches(edits: Sequence[BlockEdit], switches: Sequence[BlockSwitch]) -> None:
    """Check that each block edit was applied.

    Args:
        edits: the edits that were placed.
        switches: one switch for each edit.

    Raises:
        ValueError: an edit changed no call.
    """
    for edit, switch in zip(edits, switches, strict=True):
        if not switch.touched:
            raise ValueError(_untouched(edit))


def _untouched(edit: object) -> str:
    return (
        f"{type(edit).__name__} has changed no attention call: the pipeline did not run, or no "
        "call matched the edit's passes and steps"
    )
