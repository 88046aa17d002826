"""The base of everything that a head may run, and the registry of these classes by name."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import ClassVar, TypeVar

from visattn.geometry.layout import Grid, Traceable

__all__ = ["KINDS", "HeadPattern", "KindsOf", "unregister"]

KINDS: dict[str, type[HeadPattern]] = {}  # every pattern class by name, static and dynamic
K = TypeVar("K", bound="HeadPattern")


class HeadPattern(Traceable, ABC):
    """Base of what a head may run, static or dynamic; each subclass is a frozen dataclass.

    A class that sets ``name`` is registered when it is defined: it can be written in plans, and is
    drawn, searched and tested with the others. ``register=False`` as a class argument keeps a class
    out of the registry.

    Two patterns are equal when their written forms are equal: 1 counts tokens, 1.0 is a fraction.

    Attributes:
        name: the name in plans and on the command line.
        family: the group of patterns that share a hue in pictures.
        color: ``"#rrggbb"``, for pictures; a class without its own gets a spare one.
        before: values of parameters that plans of schema 1 imply.

    Example:
        >>> from visattn.patterns import Diagonal, HeadPattern
        >>> isinstance(Diagonal(64), HeadPattern)
        True
        >>> Diagonal(1) == Diagonal(1.0)
        False
    """

    name: ClassVar[str]
    family: ClassVar[str] = "others"
    color: ClassVar[str]
    before: ClassVar[Mapping[str, object]] = {}

    def __init_subclass__(cls, *, register: bool = True) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if register and isinstance(name, str):
            other = KINDS.get(name)
            if other is not None and _address(other) != _address(cls):
                raise ValueError(
                    f"name={name!r} of {_address(cls)} is the name of {_address(other)}; choose "
                    "another"
                )
            KINDS[name] = cls  # a class that a notebook defines again replaces the first

    @cached_property
    def _written(self) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadPattern) and self._written == other._written

    def __hash__(self) -> int:
        return hash(self._written)

    def check(self, grid: Grid) -> None:
        """Raise ValueError when a size does not fit the grid."""


class KindsOf(Mapping[str, type[K]]):
    """The registered subclasses of a class, by name, in the order of their definition.

    The mapping is live: classes that are defined later appear in it.

    Args:
        base: the class.
    """

    def __init__(self, base: type[K]) -> None:
        self.base = base

    def __getitem__(self, name: str) -> type[K]:
        kind = KINDS[name]
        if not issubclass(kind, self.base):
            raise KeyError(name)
        return kind

    def __iter__(self) -> Iterator[str]:
        return (name for name, kind in KINDS.items() if issubclass(kind, self.base))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def unregister(kind: type[HeadPattern]) -> None:
    """Remove a class from the registry.

    Args:
        kind: a registered class.

    Raises:
        ValueError: the class is not registered.
    """
    if KINDS.get(kind.name) is not kind:
        raise ValueError(f"{_address(kind)} is not registered")
    del KINDS[kind.name]


def _address(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
