"""A grammar of calls with literal arguments: ``radial(decay=0.2, sink=True)``.

Text is parsed with Python's ``ast`` and never evaluated. Patterns are written in this grammar, and
so is anything else that a name and arguments make, for example a guidance.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from visattn._arguments import is_number

__all__ = ["Call", "CallGrammar", "Value", "Word", "quoted", "signature_of"]

MAX_LENGTH = 10_000
MAX_DEPTH = 32
MAX_INT = 2**63 - 1
# Python's parser recurses into brackets, signs and operators. On the small stack of a thread, a few
# hundred of them crash the process without an exception. No valid text has so many.
MAX_NESTED = 2 * MAX_DEPTH
SIGNS = re.compile(r"(?:-\s*){9}")
OPERATORS = re.compile(r"[^\w\s(),=.'\"-]|\b(?:not|lambda|await|if)\b")
BRACKETS = re.compile(r"[\[\]{}:]")  # of lists and dicts, where the grammar has them
QUOTED = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"")  # words in quotes
CONSTANTS = {"true": True, "false": False, "none": None}

T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    """A name without brackets, where an argument is expected."""

    text: str


@dataclass(frozen=True)
class Call:
    """A name with its arguments.

    Attributes:
        name: the name as it is written.
        args: the positional arguments.
        kwargs: the keyword arguments, in the order of the text.
    """

    name: str
    args: tuple[Value, ...]
    kwargs: dict[str, Value]


Literal = int | float | bool | str | None
Value = Literal | Word | Call | tuple["Value", ...] | list["Value"] | dict[int | str, "Value"]


@dataclass(frozen=True)
class CallGrammar(Generic[T]):
    """Reads texts in which a name and literal arguments make an object.

    Args:
        noun: what a text describes, for error messages: ``"pattern"``.
        example: a valid text, for error messages.
        kinds: returns what each name makes: a class or a function, called with the arguments.
        literals: what an argument may be, for error messages.
        containers: whether lists ``[1, 2]`` and dicts ``{3: [0]}`` are allowed as arguments.
    """

    noun: str
    example: str
    kinds: Callable[[], Mapping[str, Callable[..., T]]]
    literals: str
    containers: bool = False

    def parse(self, text: str, max_length: int = MAX_LENGTH) -> T:
        """Return the object that ``text`` describes.

        Args:
            text: a call with literal arguments, or a name alone.
            max_length: most characters of the text.

        Raises:
            TypeError: ``text`` is no string, or a parameter is unknown, missing or given twice.
            ValueError: the text is not in the grammar, or has an unknown name. What a class raises
                for a wrong value is passed on.
        """
        return self.build(self.read(text, max_length))

    def read(self, text: str, max_length: int = MAX_LENGTH) -> Call:
        """Return the name and the arguments of ``text``; a name alone is a call without arguments.

        Names and parameters are not looked up here.

        Args:
            text: a call with literal arguments, or a name alone.
            max_length: most characters of the text.

        Raises:
            TypeError: ``text`` is no string, or has an argument twice.
            ValueError: the text is not in the grammar.
        """
        if not isinstance(text, str):
            raise TypeError(f"the {self.noun} must be text, not {type(text).__name__}")
        if len(text) > max_length:
            raise ValueError(
                f"the {self.noun} is {len(text)} characters long; at most {max_length} are allowed"
            )
        lone = re.search("[\ud800-\udfff]", text)
        if lone:
            raise ValueError(
                f"{self.noun} {quoted(text)} contains {lone[0]!r}, which is no Unicode character; "
                "pass text in UTF-8"
            )
        try:
            self._check_nesting(text)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's warnings about odd literals
                node = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(
                f"{self.noun} {quoted(text)} is no call with literal arguments; "
                f"write for example {self.example}"
            ) from None
        if isinstance(node, (ast.Name, ast.Call)):
            try:
                return self._call(node, 1)
            except RecursionError:  # a long chain of operators, which has no brackets to count
                raise ValueError(f"{self.noun} {quoted(text)} is nested too deep") from None
        raise ValueError(
            f"{self.noun} {quoted(text)} does not start with a name; "
            f"write for example {self.example}"
        )

    def build(self, call: Call) -> T:
        """Return the object that a call describes, with the calls in its arguments built first.

        Args:
            call: what ``read`` returns.

        Raises:
            TypeError, ValueError: as ``parse``.
        """
        kind = self._known_kind(call.name)
        args = [self._built(value, call.name) for value in call.args]
        kwargs = {
            name: self._built(value, f"{name} of {call.name}")
            for name, value in call.kwargs.items()
        }
        check_parameters(call.name, kind, len(args), kwargs)
        return kind(*args, **kwargs)

    def find(self, name: str) -> Callable[..., T] | None:
        """Return the class or function with a name, in any case; None for an unknown name."""
        kinds = self.kinds()
        by_class = {getattr(kind, "__name__", "").lower(): kind for kind in kinds.values()}
        return kinds.get(name.lower()) or by_class.get(name.lower())

    def _known_kind(self, name: str) -> Callable[..., T]:
        kind = self.find(name)
        if kind is not None:
            return kind
        kinds = self.kinds()
        by_lower = {known.lower(): known for known in kinds}
        close = difflib.get_close_matches(name.lower(), by_lower, n=1)
        if close:
            guess = by_lower[close[0]]
            raise ValueError(f"unknown {self.noun} {quoted(name)}, did you mean {guess!r}?")
        raise ValueError(
            f"unknown {self.noun} {quoted(name)}; choices are {', '.join(sorted(kinds))}"
        )

    def _built(self, value: Value, where: str) -> object:
        """The value of an argument, its calls and words replaced by what they describe."""
        if isinstance(value, Call):
            return self.build(value)
        if isinstance(value, tuple):
            return tuple(self._built(item, where) for item in value)
        if isinstance(value, list):
            return [self._built(item, where) for item in value]
        if isinstance(value, dict):
            return {key: self._built(item, where) for key, item in value.items()}
        if isinstance(value, Word):
            kind = self.find(value.text)
            parameters = inspect.signature(kind).parameters.values() if kind else ()
            if kind and all(p.default is not inspect.Parameter.empty for p in parameters):
                return self.build(Call(value.text, (), {}))
            raise self._no_literal(where, value.text)
        return value

    def _check_nesting(self, text: str) -> None:
        """Raise ValueError for more brackets, signs or operators than any valid text has."""
        if "'''" not in text and '"""' not in text:
            text = QUOTED.sub("''", text)  # what is in quotes is not nested
        depth = 0
        for bracket in re.findall(r"[()\[\]{}]", text):
            depth += 1 if bracket in "([{" else -1
            if depth > MAX_NESTED:
                raise ValueError("too many brackets")
        operators = BRACKETS.sub("", text) if self.containers else text
        if SIGNS.search(text) or len(OPERATORS.findall(operators)) > MAX_NESTED:
            raise ValueError("too many operators")

    def _no_literal(self, where: str, source: str) -> ValueError:
        return ValueError(
            f"{where} holds {quoted(source)}, which is no literal; write {self.literals}"
        )

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(
                f"the {self.noun} is nested deeper than the {MAX_DEPTH} levels allowed"
            )

    def _call(self, node: ast.Name | ast.Call, depth: int) -> Call:
        self._check_depth(depth)
        callee = node if isinstance(node, ast.Name) else node.func
        if not isinstance(callee, ast.Name):
            raise ValueError(
                f"{quoted(ast.unparse(callee))} is no name of a {self.noun}; write the name alone, "
                f"as in {self.example}"
            )
        name = callee.id
        if isinstance(node, ast.Name):
            return Call(name, (), {})
        args = tuple(self._value(item, name, depth + 1) for item in node.args)
        kwargs: dict[str, Value] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(f"** in {name} is no literal; write each parameter as name=value")
            if keyword.arg in kwargs:
                raise TypeError(f"{name} is given {keyword.arg} twice")
            kwargs[keyword.arg] = self._value(keyword.value, f"{keyword.arg} of {name}", depth + 1)
        return Call(name, args, kwargs)

    def _value(self, node: ast.expr, where: str, depth: int) -> Value:
        """The value of an argument."""
        self._check_depth(depth)
        if isinstance(node, ast.Constant):
            literal = node.value
            if isinstance(literal, int) and literal > MAX_INT:
                raise ValueError(f"{where} holds an integer above the largest allowed, {MAX_INT}")
            if literal is None or isinstance(literal, (bool, int, float, str)):
                return literal
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = node.operand.value if isinstance(node.operand, ast.Constant) else None
            if is_number(number):
                value = self._value(node.operand, where, depth + 1)
                assert isinstance(value, (int, float))
                return -value
        elif isinstance(node, ast.Tuple):
            return tuple(self._value(item, where, depth + 1) for item in node.elts)
        elif isinstance(node, ast.Call):
            return self._call(node, depth)
        elif isinstance(node, ast.Name):
            lower = node.id.lower()
            return CONSTANTS[lower] if lower in CONSTANTS else Word(node.id)
        elif self.containers and isinstance(node, ast.List):
            return [self._value(item, where, depth + 1) for item in node.elts]
        elif self.containers and isinstance(node, ast.Dict):
            return self._dict(node, where, depth)
        raise self._no_literal(where, ast.unparse(node))

    def _dict(self, node: ast.Dict, where: str, depth: int) -> Value:
        values: dict[int | str, Value] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            key = self._value(key_node, where, depth + 1) if key_node else None
            if isinstance(key, bool) or not isinstance(key, (int, str)):
                raise ValueError(
                    f"{where} has the key {quoted(ast.unparse(key_node or node))}; keys are "
                    "integers or words in quotes"
                )
            if key in values:
                raise ValueError(f"{where} has the key {key!r} twice")
            values[key] = self._value(value_node, where, depth + 1)
        return values


def signature_of(kind: Callable[..., object]) -> str:
    """Return the parameters as they are written: ``"width"``, ``"decay=1.0, sink=False"``."""
    texts = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            texts.append(f"*{name}")
        elif parameter.default is parameter.empty:
            texts.append(name)
        else:
            texts.append(f"{name}={parameter.default!r}")
    return ", ".join(texts)


def quoted(text: str, limit: int = 60) -> str:
    """Return ``text`` in quotes on one line, cut off after ``limit`` characters."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def check_parameters(
    name: str, kind: Callable[..., object], positional: int, named: Mapping[str, object]
) -> None:
    """Raise TypeError unless the arguments fit the signature of ``kind``.

    Args:
        name: of the kind, as it is written.
        kind: the class or function to call.
        positional: number of positional arguments.
        named: the keyword arguments.
    """
    parameters = inspect.signature(kind).parameters
    choices = f"its parameters are {signature_of(kind)}" if parameters else "it has no parameters"
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    by_name = [] if variadic else list(parameters)
    for unknown in named:
        if unknown not in by_name:
            close = difflib.get_close_matches(unknown, by_name, n=1)
            guess = f", did you mean {close[0]!r}?" if close else ";"
            raise TypeError(f"{name} has no parameter {quoted(unknown)}{guess} {choices}")
    if variadic:
        return
    if positional > len(by_name):
        raise TypeError(f"{name} is given {positional} values; {choices}")
    for twice in by_name[:positional]:
        if twice in named:
            raise TypeError(f"{name} is given {twice} twice, by position and by name; {choices}")
    for missing in by_name[positional:]:
        if missing not in named and parameters[missing].default is inspect.Parameter.empty:
            raise TypeError(f"{name} needs the parameter {missing!r}; {choices}")
