"""A plan on a denoiser: its layers, and the hooks of the denoiser."""

from __future__ import annotations

from typing import Any

import torch

from visattn.attention import Backend
from visattn.geometry.layout import Tokens
from visattn.inject.editor import Editor
from visattn.inject.hooks.argument_names import argument_names, named_arguments
from visattn.inject.hooks.call_state import CallInputs, CallState
from visattn.inject.hooks.class_swap import add_handler, remove_handler
from visattn.inject.hooks.denoiser_methods import follow_checkpointing, put_methods, take_methods
from visattn.inject.hooks.run_state import PipeRef
from visattn.inject.hooks.running import Announced, says_where
from visattn.inject.hooks.turn import Turn
from visattn.inject.hooks.weak import Weak
from visattn.inject.layers.compiled_layer import begin_call, register_attachment
from visattn.inject.layers.denoising_state import DenoisingState
from visattn.inject.layers.guard import guards
from visattn.inject.layers.layer import Layer
from visattn.inject.models.denoisers import attention_layers, cross_layers
from visattn.inject.models.parallel import check_dispatch, check_whole
from visattn.inject.observation import Observer
from visattn.pipelines.family import Family
from visattn.plan import Plan
from visattn.runtime.private_names import never_compile_alone

__all__ = ["Attachment", "attached"]

ATTRIBUTE = "_visattn"
NOT_CALLED = (
    "it was never called when its model ran; a plan has no effect if a block calls the forward "
    "or the processor of its attention directly"
)


def attached(model: torch.nn.Module) -> Attachment | None:
    """Return the attachment of a denoiser; None: it has no plan, observer or editor."""
    attachment = model.__dict__.get(ATTRIBUTE)
    assert attachment is None or isinstance(attachment, Attachment)
    return attachment


class Attachment(DenoisingState):
    """A plan on a denoiser, with its observers and its editor.

    Args:
        model: the denoiser.
        role: its name in its pipeline.
        family: its family.
        plan: a plan that fits it.
        backend: the backend of sparse attention.
        pipe: the pipeline that it is part of; None: it has none.
        observers: the observers, each with the paths of the layers that it observes.
        audit: query rows of a head for which exact attention is also computed.
        guard: whether heads that are predicted to be slower than dense ones run dense; None: yes,
            unless the environment variable ``VISATTN_GUARD`` is 0.
        editor: computes some calls instead of the layers.
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
        modules = attention_layers(model, family)
        self.paths, self.cross_paths = tuple(modules), tuple(cross_layers(model, family))
        tables = {
            path: plan.table(role, number, self.paths, module.heads)
            for number, (path, module) in enumerate(modules.items())
        }
        guarded = backend == "auto" and guards(guard, plan, next(model.parameters()).device)
        super().__init__(role, family, plan, backend, pipe, audit, guarded, tables)
        self._model, self.wanted_guard = Weak(model), guard
        self.observers, self.editor = observers, editor
        self.turn = Turn(role)  # which thread or task runs the denoiser while it is edited
        self.announced, self.announcing = Announced(), PipeRef()
        self.names = argument_names(type(model))
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.looked = False  # whether the layers that were never called have been reported
        self.layers: list[Layer] = self._layers({})
        self.number = register_attachment(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy. It gets its own number."""
        self.__dict__.update(state)
        register_attachment(self, self.number)

    @property
    def model(self) -> torch.nn.Module:
        """The denoiser."""
        return self._model()

    def _layers(self, former: dict[str, Layer]) -> list[Layer]:
        """Return the layers with a plan, observer or editor. Those in ``former`` are reused."""
        edited = frozenset() if self.editor is None else self.editor.paths
        shown = edited.union(*(paths for _, paths in self.observers))
        layers = []
        for index, (path, module) in enumerate(attention_layers(self.model, self.family).items()):
            table = self.tables[path]
            if table or path in shown:
                observers = [observer for observer, paths in self.observers if path in paths]
                layers.append(
                    former.get(path) or Layer(self, path, index, module, table, observers)
                )
        for index, (path, module) in enumerate(cross_layers(self.model, self.family).items()):
            if path in edited:
                layers.append(
                    former.get(path) or Layer(self, path, index, module, {}, [], cross=True)
                )
        for layer in layers:
            layer.editor = self.editor if layer.path in edited else None
        return layers

    def edit(self, editor: Editor | None) -> None:
        """Change the editor from the next call on.

        Args:
            editor: the new editor; None removes the present one.
        """
        self.remove()
        self.editor = editor
        self.layers = self._layers({layer.path: layer for layer in self.layers})
        if not self.idle:
            self.install()

    def changed(self, **arguments: Any) -> Attachment:
        """Return a copy with other arguments, which is not installed."""
        present: dict[str, Any] = {
            "plan": self.plan,
            "backend": self.backend,
            "pipe": self.pipe(),
            "observers": self.observers,
            "audit": self.audit,
            "guard": self.wanted_guard,
            "editor": self.editor,
        }
        new = Attachment(self.model, self.role, self.family, **{**present, **arguments})
        new.turn = self.turn
        return new

    @property
    def idle(self) -> bool:
        """Whether it has no plan, no observer and no editor."""
        return not self.plan.rules and not self.observers and self.editor is None

    def install(self) -> None:
        """Install the plan on the model."""
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
        """The settings, other than the call itself, that decide how a call is computed."""
        return self.plan, self.backend, self.wanted_guard, self.editor

    def remove(self) -> None:
        """Restore the model to its state before ``install``."""
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
        """Intercept processors and attention backends that were replaced."""
        for layer in self.layers:  # release all of them first, as layers may share a processor
            layer.let_go()
        for layer in self.layers:
            layer.install()

    def end(self) -> None:
        """End a call of the denoiser. Later calls of its layers do not belong to it."""
        self.call.tokens = ()
        self.look()

    def look(self) -> None:
        """Log, after the first call of the model, which of its layers were not called."""
        for layer in () if self.looked else self.layers:
            if layer.table and not layer.sparse_calls + layer.dense_calls and not layer.reason:
                layer.tell(NOT_CALLED)
        self.looked = True

    def begin(self, tokens: Tokens, inputs: CallInputs) -> CallState:
        """Begin a call of the denoiser in this thread or task.

        Args:
            tokens: the tokens of its attention.
            inputs: the arguments that determine its step and passes.
        """
        if self.editor is not None:
            self.turn.check()
        state = self.take(inputs)
        state.tokens = self.latest = tokens
        return state


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a call, before the forward of the denoiser. ``torch.compile`` traces this hook inside a
    compiled function that calls the denoiser."""
    attachment: Attachment = model._visattn
    if attachment.observers or attachment.editor is not None:
        check_whole(model, attachment.role)
    check_dispatch(model, attachment.role)
    arguments = named_arguments(attachment.names, type(model).__name__, args, kwargs)
    tokens = attachment.family.tokens(model.config, arguments)
    inputs = attachment.inputs_of(arguments)
    if torch.compiler.is_compiling():
        begin_call(attachment, tokens, inputs)
        return
    if attachment.editor is not None:
        attachment.turn.call()
    attachment.begin(tokens, inputs)
    attachment.begun.clear()
    follow_checkpointing(model)
    attachment.watch()


never_compile_alone(_begin)


def _end(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """End a call, after the forward of the denoiser; ``output`` is None after an error."""
    if torch.compiler.is_compiling():
        return
    attachment: Attachment = model._visattn
    attachment.turn.done()
    if output is not None:
        attachment.end()


never_compile_alone(_end)
