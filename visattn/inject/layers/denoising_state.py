"""The state of one denoiser: the tokens, the step and the passes of the running call."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch

from visattn.attention import Backend
from visattn.geometry.layout import TokenLayout, Tokens
from visattn.inject.hooks.call_state import CallInputs, CallState, Held, States
from visattn.inject.hooks.recent import Recent
from visattn.inject.hooks.run_state import (
    Context,
    PipeRef,
    pass_named,
    passes_in,
    runs,
    step_of,
)
from visattn.inject.hooks.running import is_stock, run_of
from visattn.inject.layers.all_dense import why_steps_dense, why_unguided_dense
from visattn.inject.layers.compiled_layer import Begun
from visattn.inject.layers.head_groups import DENSE, Heads
from visattn.patterns import HeadPattern
from visattn.pipelines.family import Family
from visattn.plan import ANY, Plan

__all__ = ["DenoisingState"]

# attribute with the passes, on an object that replaces a pipeline
PASSES_OF_STAND_IN = "_visattn_passes"
logger = logging.getLogger("visattn")


class DenoisingState:
    """What the layers of a denoiser need to know of the running call and of the plan.

    Args:
        role: the name of the denoiser in its pipeline.
        family: its family.
        plan: a plan that fits it.
        backend: the backend of sparse attention.
        pipe: the pipeline that it is part of; None: it has none.
        audit: query rows of a head for which exact attention is also computed.
        guard: whether heads that are predicted to be slower than dense ones run dense.
        tables: the patterns of the heads, by path of the layer, then by phase and pass.
    """

    def __init__(
        self,
        role: str,
        family: Family,
        plan: Plan,
        backend: Backend,
        pipe: object | None,
        audit: int,
        guard: bool,
        tables: Mapping[str, Mapping[tuple[int, str], Heads]],
    ) -> None:
        self.role, self.family, self.plan, self.backend = role, family, plan, backend
        self.pipe, self.audit, self.guard, self.tables = PipeRef(pipe), audit, guard, tables
        self.states, self.begun = States(), Begun()
        self.latest: Tokens = ()  # tokens of the last call of any thread
        self.sparse_ran = False  # whether a layer has computed sparse attention
        self._logged: set[str] = set()

    def tell(self, text: str) -> None:
        """Log a line once.

        Args:
            text: the line.
        """
        if text not in self._logged:
            self._logged.add(text)
            logger.warning("%s: %s", self.role, text)

    @property
    def call(self) -> CallState:
        """The state of the call that runs in this thread or task."""
        return self.states.here()

    @property
    def context(self) -> Context | None:
        """What the pipeline passed to ``cache_context`` for the running call."""
        return self.call.context

    @context.setter
    def context(self, context: Context | None) -> None:
        state = self.call
        state.context, state.step, state.runs = context, None, None

    @property
    def timestep(self) -> torch.Tensor | None:
        """The timestep of the running call; None if it is not known."""
        return self.call.timestep_ref()

    # ---- a call of the denoiser

    def inputs_of(self, arguments: Mapping[str, Any]) -> CallInputs:
        """Return the arguments of a call that determine its step and passes.

        Args:
            arguments: the arguments of the forward of the denoiser, by name.
        """
        tensors = (arguments.get("timestep"), arguments.get("encoder_hidden_states"))
        timestep, text = (x if isinstance(x, torch.Tensor) else None for x in tensors)
        return timestep, text, arguments.get(self.family.perturbed_argument) is not None

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Begin a call: derive its step and passes from its arguments, by name."""
        self.take(self.inputs_of(arguments))

    def take(self, inputs: CallInputs) -> CallState:
        """Begin a call: derive its step and passes from ``inputs_of`` its arguments."""
        state, pipe, text = self.call, self.pipe(), inputs[1]
        state.note(inputs)
        run = None if pipe is None else run_of(pipe)
        if text is not None and run is not None and state.context is None:
            state.calls.note(run, pipe.scheduler, text)
        return state

    def held(self, batch: int) -> CallState:
        """Return the state of the running call, for a part of the call that runs again later.

        Args:
            batch: samples of the part.
        """
        state, size = self.call, self._size(batch)
        held = Held(*self.step(), self._passes(size), size)
        return dataclasses.replace(state, held=state.held or held)

    # ---- tokens

    @property
    def layout(self) -> TokenLayout:
        """The layout of the running call."""
        tokens = self.call.tokens
        if not tokens:
            raise RuntimeError(
                f"an attention layer of {self.role} was called outside the forward of its model, "
                "so its token layout is not known; call remove_plan before calling parts of a "
                "model; to run blocks again in the backward, use enable_gradient_checkpointing or "
                "torch's checkpoint_wrapper"
            )
        return self.layout_of(tokens)

    @functools.cached_property
    def _layouts(self) -> Recent[Tokens, TokenLayout]:
        return Recent()

    def layout_of(self, tokens: Tokens) -> TokenLayout:
        """Return the layout of tokens. At the first use of a layout every pattern of the plan is
        checked against it.

        Args:
            tokens: the tokens of a call.

        Raises:
            ValueError: a pattern does not fit the grid.
        """
        known = self._layouts.get(tokens)
        if known is not None:
            return known
        layout = TokenLayout.from_tokens(tokens)
        for path, table in self.tables.items():
            # many phases and passes share one tuple
            tuples = {id(heads): heads for heads in table.values()}.values()
            for pattern in dict.fromkeys(p for heads in tuples for p in heads):
                _check(pattern, layout, path, self.plan.geometry)
        made_for = self.plan.geometry
        same = made_for == layout
        if self.family.masks_text_padding and made_for is not None:
            same = made_for.grids == layout.grids  # the length of a padded text does not matter
        if made_for is not None and not same:
            logger.warning(
                "%s: the plan was made at %s and runs at %s: fractions in its patterns follow the "
                "grid, token counts do not change",
                self.role,
                made_for,
                layout,
            )
        self._layouts[tokens] = layout
        return layout

    # ---- steps and passes

    def moments(self, batch: int, masked: bool = False) -> tuple[tuple[int, str], ...]:
        """Return the phase and the pass of each equal part of a batch; phase -1 is a dense
        step.

        Args:
            batch: samples of the attention call.
            masked: whether the call has a mask.

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
            self._check_steps(step, steps)
            phase = self.plan.phase_at(step, steps)
        if phase is None:
            return ((-1, ANY),)
        if not self.plan.passes:
            return ((phase, ANY),)
        passes = self.passes(batch, masked)
        if passes is None:
            raise ValueError(
                f"plan has rules for the passes {' and '.join(self.plan.passes)}, and "
                + self.unknown("pass", "a plan without passes in its rules")
            )
        if passes == ("cond",):
            self._check_unguided()
        return tuple((phase, pass_) for pass_ in passes)

    @functools.cached_property
    def sparse_moments(self) -> frozenset[tuple[int, str]]:
        """The phases and passes in which some layer has a pattern that is not dense."""
        return frozenset(
            moment
            for table in self.tables.values()
            for moment, heads in table.items()
            if any(head != DENSE for head in heads)
        )

    def _check_steps(self, step: int, steps: int) -> None:
        """At the first step of a run, log if the plan keeps all of its steps dense."""
        state = self.call
        last, state.last = state.last, (step, steps)
        first = last is None or steps != last[1] or step < last[0]
        if first and callable(self.pipe()):
            reason = why_steps_dense(self.plan, self.sparse_moments, step, steps)
            if reason is not None:
                self.tell(reason)

    def _check_unguided(self) -> None:
        """If the conditional pass is the only one, log if the plan keeps it dense."""
        pipe = self.pipe()
        if callable(pipe) and not self.sparse_ran:
            doubled = bool(self.family.cfg_batch_order)
            reason = why_unguided_dense(pipe, self.plan, self.sparse_moments, doubled)
            if reason is not None:
                self.tell(reason)

    def unknown(self, what: str, instead: str, act: str = "apply the plan to") -> str:
        """Return the reason why a step or pass is not known, and the remedy.

        Args:
            what: ``"step"`` or ``"pass"``.
            instead: a plan to use instead.
            act: what the user should do with the pipeline that runs.
        """
        pipe, problem = self.pipe(), f"the {what} of this call of {self.role} is not known: "
        if pipe is None:
            return f"{problem}no pipeline is known that runs it; {act} the pipeline that runs"
        name = type(pipe).__name__
        if not self._runs(pipe):
            return f"{problem}{name} is not the pipeline that runs; {act} the pipeline that runs"
        return f"{problem}{name} does not expose it; use {instead}"

    def step(self) -> tuple[int | None, int | None]:
        """Return the denoising step and the number of steps; None for what is not known."""
        state, unit = self.call, self.family.timestep_unit
        if state.held is not None:
            return state.held.step, state.held.steps
        if state.step is None:
            state.step = step_of(state.context, self.pipe(), self.timestep, unit)
        return state.step

    def passes(self, batch: int, masked: bool = False) -> tuple[str, ...] | None:
        """Return the pass of each equal part of the batch of an attention call, if it is known.

        Args:
            batch: samples of the call.
            masked: whether the call has a mask.
        """
        if self.call.aside:
            return ("perturbed",)
        held = self.call.held
        size = self._size(batch) if held is None else held.size
        passes = self._passes(size) if held is None else held.passes
        return None if passes is None else passes_in(passes, size, batch, masked)

    def _runs(self, pipe: Any) -> bool:
        """Return whether a pipeline is the one that makes the running call."""
        state = self.call
        if state.runs is None:
            state.runs = runs(pipe, self.timestep, self.family.timestep_unit)
        return state.runs

    def _size(self, batch: int) -> int:
        """Return the samples of the denoiser's batch. A cache may compute only a part of it."""
        timestep = self.timestep
        per_sample = timestep is not None and timestep.ndim and len(timestep) != 1
        return len(timestep) if timestep is not None and per_sample else batch

    def _passes(self, size: int) -> tuple[str, ...] | None:
        """Return the passes in a batch of the denoiser."""
        named = pass_named(self.context) or getattr(self.pipe(), PASSES_OF_STAND_IN, None)
        return named or self._unnamed(size)

    def _unnamed(self, size: int) -> tuple[str, ...] | None:
        """Return the passes in a batch of ``size`` samples that the pipeline does not name."""
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
    """Raise ValueError unless a pattern fits all grids of a layout."""
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
