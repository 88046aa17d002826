"""Offline search: which attention each head of a pipeline needs.

``visattn.search(pipe, prompts)`` is ``visattn.search.search(pipe, prompts)``: the package can be
called like its function. Modules are imported at first use.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visattn.search.api import search
    from visattn.search.arguments import Settings
    from visattn.search.result import SearchResult

__all__ = ["SearchResult", "Settings", "search"]

HOMES = {"SearchResult": "result", "Settings": "arguments", "search": "api"}


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> "SearchResult":
        return self.search(*args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module 'visattn.search' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"visattn.search.{HOMES[name]}"), name)


sys.modules[__name__].__class__ = _Callable
