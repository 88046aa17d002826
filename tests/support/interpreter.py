"""Triton's interpreter without repeated work.

Triton replaces the functions of its language by interpreted ones at each launch and again at each
call of a device function. The second makes a third of the time of a small launch and changes
nothing, because the functions are replaced already.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from triton.runtime import interpreter


class NothingToRestore:
    def restore(self) -> None:
        """Leave the language as it is: the scope of the launch restores it."""


def patch_language_once_a_launch() -> None:
    """Let a launch replace Triton's language once for each module that its functions come from."""
    patch_language = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the globals of modules

    def patch_once(function: FunctionType) -> Any:
        if id(function.__globals__) in patched:
            return NothingToRestore()
        patched.add(id(function.__globals__))
        return patch_language(function)

    def launch_and_forget(self: Any, *args: object, **kwargs: object) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_and_forget
