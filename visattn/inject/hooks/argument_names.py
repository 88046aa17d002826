"""The names of the arguments that a model takes by position."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["argument_names", "named_arguments"]


def argument_names(kind: type) -> tuple[str, ...]:
    """Return the names of the positional arguments of ``kind.forward``.

    If a function with ``*args`` replaces it, the names are read from the source of the class or of
    a base class. Without a source there are none.
    """
    for base in kind.__mro__:
        if "forward" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())
        if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters):
            return tuple(parameter.name for parameter in parameters[1:])
        names = _names_in_source(base)
        if names is not None:
            return names
    return ()


def named_arguments(
    names: Sequence[str], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Args:
        names: names of the positional arguments of the forward.
        kind: class name of the model.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.

    Raises:
        TypeError: there are more positional arguments than names.
    """
    if len(args) > len(names):
        raise TypeError(
            f"{kind} was called with {len(args)} arguments by position, and its forward names "
            f"{len(names) or 'none'}; call it with names, such as hidden_states=..."
        )
    return dict(zip(names, args, strict=False)) | kwargs


def _names_in_source(kind: type) -> tuple[str, ...] | None:
    """Return the names by the source of a class; None without a source, or if it has ``*args``."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):  # unindented strings in a class prevent the dedent
        return None
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and not node.args.vararg:
            return tuple(argument.arg for argument in node.args.args[1:])
    return None
