"""An attention module of a denoiser whose attention visattn intercepts."""

from __future__ import annotations

from typing import Any

from visattn.inject.hooks.class_swap import add_class, remove_class
from visattn.inject.hooks.weak import Weak
from visattn.inject.layers.denoising_state import DenoisingState
from visattn.inject.layers.interception import ATTRIBUTE, Intercepted, hook, unhook
from visattn.runtime.private_names import has_attention_backend
from visattn.selectors import Memory

__all__ = ["InterceptedModule"]


class InterceptedModule:
    """The part of a layer that intercepts its module, counts calls and logs.

    Args:
        denoising: the state of the denoiser.
        path: path of the attention module.
        module: the attention module.

    Attributes:
        through_sdpa: whether the processor calls torch's attention itself.
        sparse_calls: calls with sparse heads so far.
        dense_calls: other calls so far.
        ran: the backends of the sparse calls.
        reason: why the last call did not run, or did not choose, by the plan.
    """

    def __init__(self, denoising: DenoisingState, path: str, module: Any) -> None:
        self._denoising, self._module, self.path = Weak(denoising), Weak(module), path
        self.processor = module.processor
        self.through_sdpa = False
        self.sparse_calls = self.dense_calls = 0
        self.ran: set[str] = set()
        self.reason: str | None = None
        self._logged: set[str] = set()

    @property
    def denoising(self) -> DenoisingState:
        """The state of its denoiser."""
        return self._denoising()

    @property
    def module(self) -> Any:
        """The attention module."""
        return self._module()

    @property
    def slot(self) -> int:
        """The slot of the running thread or task."""
        return self.denoising.call.slot

    def install(self) -> None:
        """Intercept the attention of the module. Calling this again restores the interception after
        other code has changed the processor or its backend."""
        setattr(self.module, ATTRIBUTE, self)
        add_class(self.module, Intercepted)
        self.processor = self.module.processor
        # a processor without an attribute for its backend calls torch's attention in the end
        self.through_sdpa = not has_attention_backend(self.processor)
        if not self.through_sdpa:
            hook(self.processor)

    def let_go(self) -> None:
        """Restore a processor that the module no longer uses."""
        if self.processor is not self.module.processor:
            unhook(self.processor)

    def remove(self) -> None:
        """Restore the module to its state before ``install``."""
        unhook(self.processor)
        unhook(self.module.processor)  # it may be another one, which modules share
        self.module.__dict__.pop(ATTRIBUTE, None)
        remove_class(self.module, Intercepted)

    def tell(self, reason: str) -> None:
        """Record why a call is dense although the plan has sparse heads, and log it once.

        Args:
            reason: why.
        """
        which = f"some calls of {self.path} stay" if self.sparse_calls else f"{self.path} stays"
        self._note(reason, f"{which} dense: {reason}")

    def log(self, text: str) -> None:
        """Log a line once.

        Args:
            text: the line.
        """
        self.denoising.tell(text)

    def _note(self, reason: str, sentence: str) -> None:
        self.reason = reason
        if reason not in self._logged:
            self._logged.add(reason)
            self.log(sentence)

    def warn(self, memory: Memory) -> None:
        """Log once that the scores of a call were not finite.

        Args:
            memory: the memory of the call.
        """
        if memory.broken is not None and bool(memory.broken):
            reason = "scores of its blocks were not finite, so that all of them are kept"
            self._note(reason, f"{self.path}: {reason}")

    def look(self) -> None:
        """Log, after a call of the module, if its attention was not intercepted."""
        if not self.sparse_calls + self.dense_calls:
            kind = type(self.module.processor).__name__
            self.tell(f"{kind} calls no attention that visattn can intercept")
