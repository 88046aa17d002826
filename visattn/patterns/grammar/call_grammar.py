"""The written form of a pattern, read without running it: ``radial(decay=0.2, sink=True)``."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Callable

from visattn._arguments import is_number
from visattn.patterns.base.pattern import HeadPattern

MAX_LENGTH = 10_000
MAX_DEPTH = 32
MAX_INT = 2**63 - 1
# Python's parser descends into brackets, signs and operators: on the small stack of a thread a few
# hundred of them end the process, and no exception tells of it. No pattern is written with so many.
MAX_NESTED = 2 * MAX_DEPTH
SIGNS = re.compile(r"(?:-\s*){9}")
OPERATORS = re.compile(r"[^\w\s(),=.'\"-]|\b(?:not|lambda|await|if)\b")
WORDS = {"true": True, "false": False, "none": None}
LITERALS = (
    "a finite number, True, False, None, a word in quotes, a tuple of these, or a pattern, "
    "for example diagonal(64)"
)

Value = int | float | bool | str | HeadPattern | tuple["Value", ...] | None


# the dynamic patterns by name, which visattn.selectors puts here: this module knows none of them
DYNAMIC: dict[str, type[HeadPattern]] = {}


def parse_pattern(text: str, max_length: int = MAX_LENGTH) -> HeadPattern:
    """The pattern that ``text`` writes, static or dynamic.

    Args:
        text: a call with literal arguments, ``Neighborhood((2, 7, 7), stride=(1, 2, 2))``, or a
            name alone for a pattern without arguments. Names are those of ``PATTERNS`` or of the
            classes, in any case; arguments are literals or patterns, as in ``union(diagonal(64),
            stripe)``.
        max_length: characters of it at most; what a search has learned is longer than what people
            write.

    Returns:
        The pattern. ``parse_pattern(repr(pattern)) == pattern`` for every pattern.

    Raises:
        TypeError, ValueError: the text is no such form, names no pattern or parameter, or holds a
            value that the pattern refuses.
    """
    if not isinstance(text, str):
        raise TypeError(f"a pattern is written as text, not as {type(text).__name__}")
    if len(text) > max_length:
        raise ValueError(
            f"the pattern is {len(text)} characters long; at most {max_length} are allowed"
        )
    try:
        _check_nesting(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python remarks on odd literals
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(
            f"pattern {shortened(text)} is no call with literal arguments; "
            "write for example radial(decay=0.2, sink=True)"
        ) from None
    if isinstance(tree.body, (ast.Name, ast.Call)):
        try:
            return _pattern(tree.body, 1)
        except RecursionError:  # from a long operator chain, which has no brackets to count
            raise ValueError(f"pattern {shortened(text)} is nested too deep") from None
    raise ValueError(
        f"pattern {shortened(text)} is no pattern by name; "
        "write for example radial(decay=0.2, sink=True)"
    )


def _check_nesting(text: str) -> None:
    """Raise ValueError for more brackets, signs or operators than any pattern is written with."""
    depth = 0
    for bracket in re.findall(r"[()]", text):
        depth += 1 if bracket == "(" else -1
        if depth > MAX_NESTED:
            raise ValueError("too many brackets")
    if SIGNS.search(text) or len(OPERATORS.findall(text)) > MAX_NESTED:
        raise ValueError("too many operators")


def signature_of(kind: type[HeadPattern]) -> str:
    """The parameters of a pattern as they are written: ``"width"``, ``"decay=1.0, sink=False"``."""
    parts = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts.append(f"*{name}")
        elif parameter.default is parameter.empty:
            parts.append(name)
        else:
            parts.append(f"{name}={parameter.default!r}")
    return ", ".join(parts)


def shortened(text: str, limit: int = 60) -> str:
    """``text`` in quotes on one line, its end left out beyond ``limit`` characters."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def known_kinds() -> dict[str, type[HeadPattern]]:
    """All patterns by name, static and dynamic."""
    from visattn.patterns import PATTERNS  # it imports this module

    return {**PATTERNS, **DYNAMIC}


def kind_of(name: str) -> type[HeadPattern] | None:
    """The pattern class of a name, in any case; None for an unknown one."""
    kinds = known_kinds()
    by_class = {kind.__name__.lower(): kind for kind in kinds.values()}
    return kinds.get(name.lower()) or by_class.get(name.lower())


def _known_kind(name: str) -> type[HeadPattern]:
    kind = kind_of(name)
    if kind is not None:
        return kind
    kinds = known_kinds()
    close = difflib.get_close_matches(name.lower(), kinds, n=1)
    if close:
        raise ValueError(f"unknown pattern {shortened(name)}, did you mean {close[0]!r}?")
    raise ValueError(
        f"unknown pattern {shortened(name)}; choices are {', '.join(sorted(kinds))}"
    )


def _pattern(node: ast.Name | ast.Call, depth: int) -> HeadPattern:
    if depth > MAX_DEPTH:
        raise ValueError(f"the pattern is nested deeper than the {MAX_DEPTH} levels allowed")
    name = node if isinstance(node, ast.Name) else node.func
    if not isinstance(name, ast.Name):
        raise ValueError(
            f"{shortened(ast.unparse(name))} names no pattern; write the name alone, as in radial()"
        )
    kind = _known_kind(name.id)
    positional: list[Value] = []
    named: dict[str, Value] = {}
    if isinstance(node, ast.Call):
        positional = [_value(item, name.id, depth + 1) for item in node.args]
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(
                    f"** in {name.id} is no literal; write each parameter as name=value"
                )
            if keyword.arg in named:
                raise TypeError(f"{name.id} is given {keyword.arg} twice")
            named[keyword.arg] = _value(keyword.value, f"{keyword.arg} of {name.id}", depth + 1)
    _check_parameters(name.id, kind, len(positional), named)
    make: Callable[..., HeadPattern] = kind
    return make(*positional, **named)


def _check_parameters(
    name: str, kind: type[HeadPattern], given: int, named: dict[str, Value]
) -> None:
    """Raise TypeError unless the arguments fit the parameters of the pattern."""
    parameters = inspect.signature(kind).parameters
    choices = f"its parameters are {signature_of(kind)}" if parameters else "it has no parameters"
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    by_name = [] if many else list(parameters)
    for unknown in named:
        if unknown not in by_name:
            close = difflib.get_close_matches(unknown, by_name, n=1)
            guess = f", did you mean {close[0]!r}?" if close else ";"
            raise TypeError(f"{name} has no parameter {shortened(unknown)}{guess} {choices}")
    if many:
        return
    if given > len(by_name):
        raise TypeError(f"{name} is given {given} values; {choices}")
    for twice in by_name[:given]:
        if twice in named:
            raise TypeError(f"{name} is given {twice} twice, by place and by name; {choices}")
    for missing in by_name[given:]:
        if missing not in named and parameters[missing].default is inspect.Parameter.empty:
            raise TypeError(f"{name} needs the parameter {missing!r}; {choices}")


def _value(node: ast.expr, where: str, depth: int) -> Value:
    """The value of an argument: a literal or a pattern."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the pattern is nested deeper than the {MAX_DEPTH} levels allowed")
    if isinstance(node, ast.Constant):
        literal = node.value
        if isinstance(literal, int) and literal > MAX_INT:
            raise ValueError(f"{where} holds an integer beyond the largest allowed, {MAX_INT}")
        if literal is None or isinstance(literal, (bool, int, float, str)):
            return literal
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if is_number(number):
            value = _value(node.operand, where, depth + 1)
            assert isinstance(value, (int, float))
            return -value
    elif isinstance(node, ast.Tuple):
        return tuple(_value(item, where, depth + 1) for item in node.elts)
    elif isinstance(node, ast.Call):
        return _pattern(node, depth)
    elif isinstance(node, ast.Name):
        if node.id.lower() in WORDS:
            return WORDS[node.id.lower()]
        kind = kind_of(node.id)
        needed = inspect.signature(kind).parameters.values() if kind else ()
        if kind and all(p.default is not inspect.Parameter.empty for p in needed):
            return _pattern(node, depth)
    source = shortened(ast.unparse(node))
    raise ValueError(f"{where} holds {source}, which is no literal; write {LITERALS}")
