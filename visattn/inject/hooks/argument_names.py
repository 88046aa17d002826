"""The names of the arguments that a model may be given by position."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["argument_names", "named_arguments"]


def argument_names(kind: type) -> tuple[str, ...]:
    """Names of the positional arguments of ``kind.forward``. Where it is replaced by a function
    that takes any (``*args``), they are those of the source of the class, or of a class that it
    derives from; none where no source is known."""
    for base in kind.__mro__:
        if "forward" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())
        if all(one.kind is not one.VAR_POSITIONAL for one in parameters):
            return tuple(one.name for one in parameters[1:])
        names = _written(base)
        if names is not None:
            return names
    return ()


def named_arguments(
    names: Sequence[str], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        TypeError: the names of those by position are not known.
    """
    if len(args) > len(names):
        raise TypeError(
            f"{kind} was called with {len(args)} arguments by position, and its forward names "
            f"{len(names) or 'none'}; call it with names, such as hidden_states=..."
        )
    return dict(zip(names, args, strict=False)) | kwargs


def _written(kind: type) -> tuple[str, ...] | None:
    """The same by the source of a class; None where it has none, or takes any too."""
    try:
        own = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):  # a text in an indented class may not be
        return None
    for node in own.body if isinstance(own, ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and not node.args.vararg:
            return tuple(one.arg for one in node.args.args[1:])
    return None
