"""Offline search: which attention each head of a pipeline needs.

``visattn.search(pipe, prompts)`` is ``visattn.search.search(pipe, prompts)``: the package may be
called, as its name is that of the function too. What it needs is imported at first use.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visattn.search.api import SearchResult, search
    from visattn.search.run import Settings

__all__ = ["SearchResult", "Settings", "search"]

HOMES = {"SearchResult": "api", "search": "api", "Settings": "run"}


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> "SearchResult":
        return self.search(*args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module 'visattn.search' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"visattn.search.{HOMES[name]}"), name)


sys.modules[__name__].__class__ = _Callable
