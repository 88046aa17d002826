"""What visattn keeps on a denoiser that has a plan: the layers, and where the denoising is."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from visattn.attention import Backend
from visattn.inject.caught import Editor
from visattn.inject.guard import guards
from visattn.inject.layer import Layer
from visattn.inject.moment import Context, Guidance, PipeRef, passes_of, runs, step_of
from visattn.inject.observation import Observer
from visattn.layout import TokenLayout, Tokens
from visattn.patterns import HeadPattern
from visattn.pipelines.family import Family
from visattn.plan import ANY, Denoiser, Plan

__all__ = ["Attachment", "attached", "attention_layers", "cross_layers", "describe"]

ATTRIBUTE = "_visattn"
logger = logging.getLogger("visattn")


def attention_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The attention modules of a denoiser that plans speak of, by path, in order."""
    return {
        path: module for path, module in model.named_modules() if re.fullmatch(family.layers, path)
    }


def cross_layers(model: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The cross-attention modules of a denoiser by path, in order."""
    if not family.cross:
        return {}
    return {
        path: module for path, module in model.named_modules() if re.fullmatch(family.cross, path)
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


def _nothing() -> None:
    """What a weak reference gives whose object is gone."""


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
        self.model, self.role, self.family = model, role, family
        self.plan, self.backend, self.pipe = plan, backend, PipeRef(pipe)
        self.paths = tuple(attention_layers(model, family))
        self.cross_paths = tuple(cross_layers(model, family))
        self.tokens: Tokens = ()
        # weak: code that is compiled does not come by here, and must not find that of an old call
        self.timestep_ref: Callable[[], torch.Tensor | None] = _nothing
        self.context: Context | None = None
        self.text_length: int | None = None  # of the running call, where it says it
        self.aside = False  # whether the pipeline makes a perturbed call of its own
        self.guidance = Guidance()
        self.told: set[str] = set()
        self.observers, self.audit, self.editor = observers, audit, editor
        device = next(model.parameters()).device
        self.wanted_guard = guard
        self.guard = backend == "auto" and guards(guard, plan, device)
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        self.layers: list[Layer] = self._layers({})

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
        return Attachment(self.model, self.role, self.family, **{**own, **given})

    @property
    def idle(self) -> bool:
        """Whether there is nothing that it does."""
        return not self.plan.rules and not self.observers and self.editor is None

    def install(self) -> None:
        """Put the plan on the model."""
        setattr(self.model, ATTRIBUTE, self)
        if not self.layers and self.editor is None:
            return
        for layer in self.layers:
            layer.install()
        self.handle = self.model.register_forward_pre_hook(_begin, with_kwargs=True)
        if hasattr(type(self.model), "cache_context"):
            own = types.MethodType(_cache_context, self.model)
            self.model.cache_context = own  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            self.model.__dict__.pop("cache_context", None)
        for layer in self.layers:
            layer.remove()
        self.model.__dict__.pop(ATTRIBUTE, None)

    def watch(self) -> None:
        """Catch again what replaced processors and attention backends have let go."""
        for layer in self.layers:  # all of them first: layers may share a processor
            layer.let_go()
        for layer in self.layers:
            layer.install()

    def tell(self, text: str) -> None:
        """Log a line once."""
        if text not in self.told:
            self.told.add(text)
            logger.warning("%s: %s", self.role, text)

    @property
    def timestep(self) -> torch.Tensor | None:
        """Of the running call, where it is known."""
        return self.timestep_ref()

    @property
    def layout(self) -> TokenLayout:
        """Of the running call."""
        if not self.tokens:
            raise RuntimeError(
                f"an attention layer of {self.role} was called outside the forward of its model, "
                "so that its token layout is not known; remove_plan before calling parts of a model"
            )
        return self._checked(self.tokens)

    @functools.cached_property
    def _layouts(self) -> dict[Tokens, TokenLayout]:
        return {}

    def _checked(self, tokens: Tokens) -> TokenLayout:
        """The layout of tokens; at its first use every pattern of the plan is held against it."""
        if tokens in self._layouts:
            return self._layouts[tokens]
        layout = TokenLayout.from_tokens(tokens)
        for layer in self.layers:
            for pattern in dict.fromkeys(p for heads in layer.table.values() for p in heads):
                _check(pattern, layout, layer.path)
        made_for = self.plan.geometry
        alike = made_for == layout or (
            # of a padded text the length says nothing
            self.family.padded and made_for is not None and made_for.grids == layout.grids
        )
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

    def moments(self, batch: int) -> tuple[tuple[int, str], ...]:
        """Phase and pass of each equal part of a batch; phase -1 is a step that stays dense.

        Raises:
            ValueError: the plan depends on a step or pass that is not known.
        """
        phase: int | None = 0
        if self.plan.needs_step:
            step, steps = self.step()
            if step is None or steps is None:
                raise ValueError(
                    f"plan depends on the denoising step, and the step of this call of {self.role} "
                    "is not known; apply the plan to the pipeline that runs"
                )
            phase = self.plan.phase_at(step, steps)
        if phase is None:
            return ((-1, ANY),)
        if not self.plan.passes:
            return ((phase, ANY),)
        passes = self.passes(batch)
        if passes is None:
            raise ValueError(
                f"plan tells {' and '.join(self.plan.passes)} passes apart, and the pass of this "
                f"call of {self.role} is not known; apply the plan to the pipeline that runs, if "
                "it is one that says its passes"
            )
        return tuple((phase, pass_) for pass_ in passes)

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Take from the arguments of a call that begins what tells its step and passes."""
        self.aside = arguments.get(self.family.perturbed) is not None
        text = arguments.get("encoder_hidden_states")
        self.text_length = text.shape[1] if isinstance(text, torch.Tensor) else None
        if not torch.compiler.is_compiling():
            timestep = arguments.get("timestep")
            self.timestep_ref = _nothing
            if isinstance(timestep, torch.Tensor):
                self.timestep_ref = weakref.ref(timestep)

    def step(self) -> tuple[int | None, int | None]:
        """The denoising step and the number of steps, where they are known."""
        return step_of(self.context, self.pipe(), self.timestep, self.family.timestep_unit)

    def passes(self, batch: int) -> tuple[str, ...] | None:
        """The pass of each equal part of a batch, where it is known."""
        if self.aside:
            return ("perturbed",)
        pipe, order = self.pipe(), self.family.batch
        here = bool(order) and runs(pipe, self.timestep, self.family.timestep_unit)
        guided = self.guidance(pipe) if here else None
        passes = passes_of(self.context, guided, order)
        return None if passes is None or batch % len(passes) or self.halved(batch) else passes

    def halved(self, batch: int) -> bool:
        """Whether a cache has taken a part of the batch away since the model was called."""
        timestep = self.timestep
        return timestep is not None and timestep.ndim > 0 and len(timestep) not in (1, batch)


def _check(pattern: HeadPattern, layout: TokenLayout, path: str) -> None:
    for _, grid in layout.grids:
        try:
            pattern.check(grid)
        except ValueError as error:
            raise ValueError(
                f"plan does not fit the grid {grid} of {layout} tokens at {path}: {error}"
            ) from None


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook before a denoiser's forward; ``torch.compile`` traces it."""
    attachment: Attachment = model._visattn
    arguments = dict(zip(attachment.names, args, strict=False))
    arguments.update(kwargs)
    attachment.tokens = attachment.family.tokens(model.config, arguments)
    attachment.note(arguments)
    if not torch.compiler.is_compiling():
        attachment.watch()


@contextmanager
def _cache_context(model: Any, name: str, **details: Any) -> Iterator[None]:
    """``cache_context`` of a denoiser, by which a pipeline says where it is, listened to."""
    attachment: Attachment = model._visattn
    before = attachment.context
    attachment.context = Context(
        name, details.get("step_index"), details.get("num_inference_steps")
    )
    attachment.watch()
    try:
        with type(model).cache_context(model, name, **details):
            yield
    finally:
        attachment.context = before
