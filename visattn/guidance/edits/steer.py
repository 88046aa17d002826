"""``steer``: edits on the attention of a denoiser or pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.guidance.edits.block_edits import BlockEdit, BlockSwitch, edit_blocks
from visattn.guidance.edits.edit import Edit, in_window
from visattn.guidance.edits.state import State, run
from visattn.guidance.head_set import HeadSet
from visattn.inject.apply import editing, known_denoisers
from visattn.inject.attachment import attached, attention_layers, cross_layers, describe
from visattn.inject.editor import AttentionCall, Editor
from visattn.inject.hooks.class_swap import add_handler, remove_handler
from visattn.inject.hooks.turn import Gate
from visattn.inject.observation import Observation

__all__ = ["Steering", "check_switches", "check_touched", "enter", "place", "steer"]


@dataclass
class Steering:
    """The edits of one denoiser, as what computes its attention calls.

    Args:
        edits: each with the strengths of its heads, ``[H]`` or ``[samples, H]``, by layer.
        before: the steering whose edits come before them.
        on: whether its edits are made now.
    """

    edits: list[tuple[Edit, dict[str, torch.Tensor]]]
    before: Editor | None = None
    on: bool = True
    touched: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        earlier = self.before.every if isinstance(self.before, Steering) else []
        own = [(self, n, edit, where) for n, (edit, where) in enumerate(self.edits)]
        self.every: list[Entry] = [*earlier, *own]
        self.paths = frozenset(path for *_, where in self.every for path in where)

    def wants(self, call: Observation) -> bool:
        return any(self._active(call))

    def _active(self, call: Observation) -> list[list[Entry]]:
        """What is edited of each equal part of the batch.

        Raises:
            ValueError: an edit is for some passes or steps, and that of the call is not known.
        """
        here = [entry for entry in self.every if entry[0].on and call.layer in entry[3]]
        now = [entry for entry in here if _in_time(entry[2], call)]
        passes: tuple[str | None, ...] = call.passes or (None,)
        if call.passes is None and any(edit.passes for _, _, edit, _ in now):
            raise ValueError(
                f"an edit is for the {' and '.join(_wanted(now))} pass, and the pass of this call "
                f"of {call.role} is not known; steer the pipeline that runs, if it is one that "
                "says its passes"
            )
        return [[e for e in now if not e[2].passes or pass_ in e[2].passes] for pass_ in passes]

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
        parts = zip(*(x.chunk(len(passes)) for x in tensors), passes, active, strict=True)
        for number, (q, k, v, pass_, own) in enumerate(parts):
            state = State(call, number, pass_, q, k, v)
            _check_streams([edit for _, _, edit, _ in own], state)
            outs.append(run(state, [(edit, where[call.layer]) for _, _, edit, where in own]))
            for steering, n, _, _ in own:
                steering.touched[n] += 1
        return outs[0] if len(outs) == 1 else torch.cat(outs)


# a steering, the number of an edit in it, the edit, and its strengths by layer
Entry = tuple[Steering, int, Edit, dict[str, torch.Tensor]]


def _check_streams(edits: Sequence[Edit], state: State) -> None:
    for edit in edits:
        if edit.stream == "text" and not state.rows("text"):
            raise ValueError(
                f"{type(edit).__name__}(stream='text'): {state.call.layer} has no queries of text; "
                "leave stream out"
            )


def _in_time(edit: Edit, call: Observation) -> bool:
    if edit.start == 0 and edit.stop == 1.0 and isinstance(edit.stop, float):
        return True
    if call.step is None or call.steps is None:
        raise ValueError(
            f"{type(edit).__name__} is for some steps, and the step of this call of {call.role} is "
            "not known; steer the pipeline that runs"
        )
    return in_window(edit.start, edit.stop, call.step, call.steps)


def _wanted(entries: Sequence[tuple[Any, int, Edit, Any]]) -> list[str]:
    return sorted({name for _, _, edit, _ in entries for name in edit.passes or ()})


def place(
    pipe: Any, edits: Sequence[Edit]
) -> dict[str, list[tuple[Edit, dict[str, torch.Tensor]]]]:
    """Edits on the layers that they are for, by the role of the denoiser.

    Raises:
        ValueError: there is no such role, layer or head, a model has no such attention, or heads
            are of another model.
    """
    known = known_denoisers(pipe)
    out: dict[str, list[tuple[Edit, dict[str, torch.Tensor]]]] = {role: [] for role in known}
    for edit in edits:
        if edit.role != "any" and edit.role not in known:
            raise ValueError(
                f"{type(edit).__name__} is for {edit.role}, and {type(pipe).__name__} has "
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
                    "cross-attention; its text is part of the sequence, so take attention='self'"
                )
            heads = next(iter(layers.values())).heads
            out[role].append((edit, dict(edit.place(tuple(layers), heads).strengths)))
    return out


@contextmanager
def steer(pipe: Any, edits: Sequence[Edit | BlockEdit] | Edit | BlockEdit) -> Iterator[None]:
    """Edit the attention of a pipeline inside a ``with`` block; after it the pipeline computes what
    it did before, also when there was an error. One thread or asyncio task at a time runs the
    denoiser meanwhile; another is refused.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one; compiled or not, with a plan or without.
            Edits work with the plan's patterns: what a pattern leaves out stays out.
        edits: of ``visattn.guidance``; several at one stage are made in their order, and those of
            an outer ``steer`` before them.

    Raises:
        ValueError: an edit names what there is not; on leaving, an edit that the pipeline ran past
            without ever making it.
    """
    listed = list(edits) if isinstance(edits, Sequence) else [edits]
    for edit in listed:
        if not isinstance(edit, (Edit, BlockEdit)):
            raise TypeError(
                f"edits has {edit!r}; it must be edits of visattn.guidance, such as "
                "Perturb(layers=[3]) (guidances such as SoftPAG go to visattn.guide)"
            )
    mine = [edit for edit in listed if isinstance(edit, Edit)]
    of_blocks = [edit for edit in listed if isinstance(edit, BlockEdit)]
    placed = place(pipe, mine)
    with ExitStack() as stack:
        steerings = enter(stack, pipe, placed)
        switches = edit_blocks(stack, pipe, of_blocks)
        yield
        check_touched(mine, steerings.values())
        check_switches(of_blocks, switches)


def enter(
    stack: ExitStack,
    pipe: Any,
    placed: Mapping[str, list[tuple[Edit, dict[str, torch.Tensor]]]],
    on: bool = True,
) -> dict[str, Steering]:
    """Put placed edits on a pipeline until the stack is closed; ``on``: they are made at once. One
    thread or asyncio task at a time runs it meanwhile."""
    steerings = {}
    known = known_denoisers(pipe)
    for role, (model, _) in known.items():
        own = attached(model)
        if own is not None:
            own.turn.check()
        steerings[role] = Steering(placed.get(role, []), None if own is None else own.editor, on)
    stack.enter_context(editing(pipe, steerings))
    if callable(pipe) and not isinstance(pipe, torch.nn.Module):
        every = [own.turn for model, _ in known.values() if (own := attached(model)) is not None]
        gate = Gate(every)
        add_handler(pipe, gate)
        stack.callback(remove_handler, pipe, gate)
    return steerings


def check_touched(edits: Sequence[Edit], steerings: Any) -> None:
    """Raise ValueError for an edit that no call was changed by."""
    made = {
        id(edit)
        for steering in steerings
        for n, (edit, _) in enumerate(steering.edits)
        if steering.touched[n]
    }
    for edit in edits:
        if id(edit) not in made:
            raise ValueError(_untouched(edit))


def check_switches(edits: Sequence[BlockEdit], switches: Sequence[BlockSwitch]) -> None:
    """The same for edits of blocks."""
    for edit, switch in zip(edits, switches, strict=True):
        if not switch.touched:
            raise ValueError(_untouched(edit))


def _untouched(edit: object) -> str:
    return (
        f"{type(edit).__name__} has changed no attention call: the pipeline did not run, or not "
        "the passes and steps that the edit is for"
    )
