"""What visattn keeps on a denoiser that has a plan: the layers, and where the denoising is."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from visattn.attention import Backend
from visattn.geometry.layout import TokenLayout, Tokens
from visattn.inject.editor import Editor
from visattn.inject.hooks.argument_names import argument_names, named_arguments
from visattn.inject.hooks.call_state import CallState, Held, States, Told
from visattn.inject.hooks.class_swap import add_handler, remove_handler
from visattn.inject.hooks.denoiser_methods import follow_checkpointing, put_methods, take_methods
from visattn.inject.hooks.recent import Recent
from visattn.inject.hooks.run_state import (
    Context,
    PipeRef,
    pass_named,
    passes_in,
    runs,
    step_of,
)
from visattn.inject.hooks.running import Announced, is_stock, run_of, says_where
from visattn.inject.hooks.turn import Turn
from visattn.inject.hooks.weak import Weak
from visattn.inject.layers.all_dense import judge_steps, judge_unguided
from visattn.inject.layers.compiled_layer import Begun, begin_call, not_a_graph, register_attachment
from visattn.inject.layers.guard import guards
from visattn.inject.layers.head_groups import DENSE
from visattn.inject.layers.layer import Layer
from visattn.inject.models.parallel import check_dispatch, check_whole
from visattn.inject.models.wrappers import bare
from visattn.inject.observation import Observer
from visattn.patterns import HeadPattern
from visattn.pipelines.family import Family
from visattn.plan import ANY, Denoiser, Plan

__all__ = ["Attachment", "attached", "attention_layers", "cross_layers", "describe"]

ATTRIBUTE = "_visattn"
SAID = "_visattn_passes"  # what stands in for a pipeline says its passes by
PASSED_BY = (
    "it was never called when its model ran; a plan is passed by where a block calls the forward "
    "or the processor of its attention by itself"
)
logger = logging.getLogger("visattn")


def attention_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The attention modules of a denoiser that plans speak of, by path, in order.

    Raises:
        ValueError: it has none.
    """
    found = {
        bare(path): module
        for path, module in model.named_modules()
        if re.fullmatch(family.layers, bare(path))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layer with a path like {family.layers!r}, "
            f"where {family.name} has its own, so that a plan or edit has nothing to be on"
        )
    return found


def cross_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The cross-attention modules of a denoiser by path, in order."""
    if not family.cross:
        return {}
    return {
        bare(path): module
        for path, module in model.named_modules()
        if re.fullmatch(family.cross, bare(path))
    }


def describe(model: torch.nn.Module, family: Family) -> Denoiser:
    """What a denoiser is, as plans record it."""
    layers = attention_layers(model, family)
    kind = next(k.__name__ for k in type(model).__mro__ if k.__name__ in family.models)
    return Denoiser(kind, len(layers), next(iter(layers.values())).heads)


def attached(model: torch.nn.Module) -> Attachment | None:
    """The attachment of a denoiser, if it has a plan."""
    found = model.__dict__.get(ATTRIBUTE)
    assert found is None or isinstance(found, Attachment)
    return found


class Attachment:
    """A plan on a denoiser.

    Args:
        model: the denoiser; role: its name in its pipeline; family: what it is.
        plan: checked to fit it; backend: of ``sparse_attention``.
        pipe: the pipeline that it is part of, if any.
        observers: each with the paths of the layers whose calls it is shown.
        audit: query rows of a head whose exact attention is computed beside.
        editor: computes some calls in its own way.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        role: str,
        family: Family,
        plan: Plan,
        backend: Backend,
        pipe: object | None,
        observers: tuple[tuple[Observer, frozenset[str]], ...] = (),
        audit: int = 0,
        guard: bool | None = None,
        editor: Editor | None = None,
    ) -> None:
        self._model, self.role, self.family = Weak(model), role, family
        self.plan, self.backend, self.pipe = plan, backend, PipeRef(pipe)
        self.paths = tuple(attention_layers(model, family))
        self.cross_paths = tuple(cross_layers(model, family))
        self.states, self.begun = States(), Begun()
        self.turn = Turn(role)  # of those that run it while it is edited
        self.latest: Tokens = ()  # of the last call, whoever made it
        self.announced, self.announcing = Announced(), PipeRef()
        self.told: set[str] = set()
        self.observers, self.audit, self.editor = observers, audit, editor
        device = next(model.parameters()).device
        self.wanted_guard = guard
        self.guard = backend == "auto" and guards(guard, plan, device)
        self.names = argument_names(type(model))
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.looked = False  # for layers that a call of the model passes by
        self.layers: list[Layer] = self._layers({})
        self.number = register_attachment(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of an attachment is another one."""
        self.__dict__.update(state)
        register_attachment(self, self.number)

    @property
    def model(self) -> torch.nn.Module:
        """The denoiser."""
        return self._model()

    def _layers(self, had: dict[str, Layer]) -> list[Layer]:
        """The layers that there is something for; those that there were stay what they are."""
        edited = frozenset() if self.editor is None else self.editor.paths
        shown = edited.union(*(paths for _, paths in self.observers))
        found = []
        for number, (path, module) in enumerate(attention_layers(self.model, self.family).items()):
            table = self.plan.table(self.role, number, self.paths, module.heads)
            if table or path in shown:
                found.append(had.get(path) or Layer(self, path, module, module.heads, table))
        for path, module in cross_layers(self.model, self.family).items():
            if path in edited:
                found.append(had.get(path) or Layer(self, path, module, module.heads, {}))
        for layer in found:
            layer.editor = self.editor if layer.path in edited else None
        return found

    def edit(self, editor: Editor | None) -> None:
        """Have another editor, or none, from the next call on."""
        self.remove()
        self.editor = editor
        self.layers = self._layers({layer.path: layer for layer in self.layers})
        if not self.idle:
            self.install()

    def changed(self, **given: Any) -> Attachment:
        """The same with other arguments."""
        own: dict[str, Any] = {
            "plan": self.plan,
            "backend": self.backend,
            "pipe": self.pipe(),
            "observers": self.observers,
            "audit": self.audit,
            "guard": self.wanted_guard,
            "editor": self.editor,
        }
        new = Attachment(self.model, self.role, self.family, **{**own, **given})
        new.turn = self.turn
        return new

    @property
    def idle(self) -> bool:
        """Whether there is nothing that it does."""
        return not self.plan.rules and not self.observers and self.editor is None

    def install(self) -> None:
        """Put the plan on the model."""
        setattr(self.model, ATTRIBUTE, self)
        put_methods(self.model)
        if not self.layers and self.editor is None:
            return
        for layer in self.layers:
            layer.install()
        self.handles = [
            self.model.register_forward_pre_hook(_begin, with_kwargs=True),
            self.model.register_forward_hook(_end, always_call=True),
        ]
        pipe = self.pipe()
        if pipe is not None and not says_where(pipe, bool(self.family.cfg_batch_order)):
            add_handler(pipe, self.announced)
            self.announcing = PipeRef(pipe)

    @property
    def work(self) -> tuple[object, ...]:
        """What decides on the attention of a call, besides the call itself."""
        return self.plan, self.backend, self.wanted_guard, self.editor

    def held(self, batch: int) -> CallState:
        """The state of the running call, as it is to be when a part of the call runs again."""
        state, size = self.call, self._size(batch)
        held = Held(*self.step(), self._passes(size), size)
        return dataclasses.replace(state, held=state.held or held)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        pipe = self.announcing()
        if pipe is not None:
            remove_handler(pipe, self.announced)
            self.announcing = PipeRef()
        for layer in self.layers:
            layer.remove()
        take_methods(self.model)
        self.model.__dict__.pop(ATTRIBUTE, None)

    def watch(self) -> None:
        """Catch again what replaced processors and attention backends have let go."""
        for layer in self.layers:  # all of them first: layers may share a processor
            layer.let_go()
        for layer in self.layers:
            layer.install()

    def end(self) -> None:
        """A call of the denoiser has ended: what its layers do from now on is not part of it."""
        self.call.tokens = ()
        self.look()

    def look(self) -> None:
        """After the first call of the model: whether its layers were called."""
        for layer in () if self.looked else self.layers:
            if layer.table and not layer.sparse_calls + layer.dense_calls and not layer.reason:
                layer.tell(PASSED_BY)
        self.looked = True

    def tell(self, text: str) -> None:
        """Log a line once."""
        if text not in self.told:
            self.told.add(text)
            logger.warning("%s: %s", self.role, text)

    @property
    def call(self) -> CallState:
        """The state of the call that runs in this thread or task."""
        return self.states.here()

    @property
    def context(self) -> Context | None:
        """What the pipeline says of the running call."""
        return self.call.context

    @context.setter
    def context(self, context: Context | None) -> None:
        state = self.call
        state.context, state.step, state.runs = context, None, None

    @property
    def timestep(self) -> torch.Tensor | None:
        """Of the running call, where it is known."""
        return self.call.timestep_ref()

    @property
    def layout(self) -> TokenLayout:
        """Of the running call."""
        tokens = self.call.tokens
        if not tokens:
            raise RuntimeError(
                f"an attention layer of {self.role} was called outside the forward of its model, "
                "so that its token layout is not known; remove_plan before calling parts of a "
                "model, and let blocks run again in the backward by enable_gradient_checkpointing "
                "or torch's checkpoint_wrapper"
            )
        return self._checked(tokens)

    @functools.cached_property
    def _layouts(self) -> Recent[Tokens, TokenLayout]:
        return Recent()

    def _checked(self, tokens: Tokens) -> TokenLayout:
        """The layout of tokens; at its first use every pattern of the plan is held against it."""
        known = self._layouts.get(tokens)
        if known is not None:
            return known
        layout = TokenLayout.from_tokens(tokens)
        for layer in self.layers:
            each = {id(heads): heads for heads in layer.table.values()}.values()  # many are one
            for pattern in dict.fromkeys(p for heads in each for p in heads):
                _check(pattern, layout, layer.path, self.plan.geometry)
        made_for = self.plan.geometry
        alike = made_for == layout
        if self.family.masks_text_padding and made_for is not None:
            alike = made_for.grids == layout.grids  # the length of a padded text does not matter
        if made_for is not None and not alike:
            logger.warning(
                "%s: the plan was made at %s and runs at %s: fractions in its patterns follow the "
                "grid, token counts stay",
                self.role,
                made_for,
                layout,
            )
        self._layouts[tokens] = layout
        return layout

    def moments(self, batch: int, masked: bool = False) -> tuple[tuple[int, str], ...]:
        """Phase and pass of each equal part of a batch; phase -1 is a step that stays dense.
        ``masked``: whether the call has a mask.

        Raises:
            ValueError: the plan depends on a step or pass that is not known.
        """
        phase: int | None = 0
        if self.plan.needs_step:
            step, steps = self.step()
            if step is None or steps is None:
                raise ValueError(
                    "plan depends on the denoising step, and "
                    + self.unknown("step", "a plan without dense_steps and phases")
                )
            judge_steps(self, step, steps)
            phase = self.plan.phase_at(step, steps)
        if phase is None:
            return ((-1, ANY),)
        if not self.plan.passes:
            return ((phase, ANY),)
        passes = self.passes(batch, masked)
        if passes is None:
            raise ValueError(
                f"plan tells {' and '.join(self.plan.passes)} passes apart, and "
                + self.unknown("pass", "a plan without passes in its rules")
            )
        if passes == ("cond",):
            judge_unguided(self)
        return tuple((phase, pass_) for pass_ in passes)

    @functools.cached_property
    def sparse_moments(self) -> frozenset[tuple[int, str]]:
        """The phases and passes in which some layer has a pattern that is not dense."""
        return frozenset(
            moment
            for layer in self.layers
            for moment, heads in layer.table.items()
            if any(head != DENSE for head in heads)
        )

    def unknown(self, what: str, instead: str, act: str = "apply the plan to") -> str:
        """Why a step or pass is not known, and what to do: ``act`` the right pipeline, or use
        something else instead."""
        pipe, why = self.pipe(), f"the {what} of this call of {self.role} is not known: "
        if pipe is None:
            return f"{why}no pipeline is known that runs it; {act} the pipeline that runs"
        name = type(pipe).__name__
        if not self._runs(pipe):
            return f"{why}{name} is not the pipeline that runs; {act} the pipeline that runs"
        return f"{why}{name} does not say it here; use {instead}"

    def told_by(self, arguments: Mapping[str, Any]) -> Told:
        """What the arguments of a call that begins tell."""
        own = (arguments.get("timestep"), arguments.get("encoder_hidden_states"))
        timestep, text = (x if isinstance(x, torch.Tensor) else None for x in own)
        return timestep, text, arguments.get(self.family.perturbed_argument) is not None

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Take from the arguments of a call that begins what tells its step and passes."""
        self.take(self.told_by(arguments))

    def take(self, told: Told) -> CallState:
        """Note what the arguments of a call that begins have told."""
        state, pipe, text = self.call, self.pipe(), told[1]
        state.note(told)
        run = None if pipe is None else run_of(pipe)
        if text is not None and run is not None and state.context is None:
            state.calls.note(run, pipe.scheduler, text)
        return state

    def begin(self, tokens: Tokens, told: Told) -> CallState:
        """A call of the denoiser begins in this thread or task."""
        if self.editor is not None:
            self.turn.check()
        state = self.take(told)
        state.tokens = self.latest = tokens
        return state

    def step(self) -> tuple[int | None, int | None]:
        """The denoising step and the number of steps, where they are known."""
        state, unit = self.call, self.family.timestep_unit
        if state.held is not None:
            return state.held.step, state.held.steps
        if state.step is None:
            state.step = step_of(state.context, self.pipe(), self.timestep, unit)
        return state.step

    def _runs(self, pipe: Any) -> bool:
        """Whether a pipeline is the one that makes the running call."""
        state = self.call
        if state.runs is None:
            state.runs = runs(pipe, self.timestep, self.family.timestep_unit)
        return state.runs

    def passes(self, batch: int, masked: bool = False) -> tuple[str, ...] | None:
        """The pass of each equal part of the batch of an attention call, where it is known.
        ``masked``: whether the call has a mask."""
        if self.call.aside:
            return ("perturbed",)
        held = self.call.held
        size = self._size(batch) if held is None else held.size
        passes = self._passes(size) if held is None else held.passes
        return None if passes is None else passes_in(passes, size, batch, masked)

    def _size(self, batch: int) -> int:
        """Samples of the denoiser's batch, of which a cache may compute a part."""
        timestep = self.timestep
        several = timestep is not None and timestep.ndim and len(timestep) != 1
        return len(timestep) if timestep is not None and several else batch

    def _passes(self, size: int) -> tuple[str, ...] | None:
        """The passes in a batch of the denoiser."""
        named = pass_named(self.context) or getattr(self.pipe(), SAID, None)
        return named or self._unnamed(size)

    def _unnamed(self, size: int) -> tuple[str, ...] | None:
        """The passes in a batch of ``size`` samples to which the pipeline gives no name."""
        pipe, order = self.pipe(), self.family.cfg_batch_order
        if pipe is None or not self._runs(pipe):
            return None
        named = None if self.context is None else self.context.name
        if order:
            known = named == "cond_uncond" or is_stock(pipe)
            return self.call.batch(pipe, order, size) if known else None
        run = run_of(pipe)
        if run is None or named is not None or not is_stock(pipe):
            return None
        if not run.guided():
            return ("cond",)
        state = self.call
        pass_ = state.calls.pass_of(run, state.text_ref(), self.family.calls)
        return None if pass_ is None else (pass_,)


def _check(
    pattern: HeadPattern, layout: TokenLayout, path: str, made_for: TokenLayout | None
) -> None:
    for _, grid in layout.grids:
        try:
            pattern.check(grid)
        except ValueError as error:
            made = (
                ""
                if made_for is None or made_for == layout
                else f"; it was made at {made_for}: generate at that size, or make a plan for this "
                "one with visattn search"
            )
            raise ValueError(
                f"plan does not fit the grid {grid} of {layout} tokens at {path}: {error}{made}"
            ) from None


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook before a denoiser's forward. ``torch.compile`` traces it inside a compiled function
    that calls the denoiser."""
    attachment: Attachment = model._visattn
    if attachment.observers or attachment.editor is not None:
        check_whole(model, attachment.role)
    check_dispatch(model, attachment.role)
    arguments = named_arguments(attachment.names, type(model).__name__, args, kwargs)
    tokens = attachment.family.tokens(model.config, arguments)
    told = attachment.told_by(arguments)
    if torch.compiler.is_compiling():
        begin_call(attachment, tokens, told)
        return
    if attachment.editor is not None:
        attachment.turn.call()
    attachment.begin(tokens, told)
    attachment.begun.clear()
    follow_checkpointing(model)
    attachment.watch()


not_a_graph(_begin)


def _end(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """The hook after it, which has no output where the forward has ended by an error."""
    if torch.compiler.is_compiling():
        return
    attachment: Attachment = model._visattn
    attachment.turn.done()
    if output is not None:
        attachment.end()


not_a_graph(_end)
