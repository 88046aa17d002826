"""The guidances and edits that have a text form: their list, reading their texts, and applying
several of them to one pipeline."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from visattn.guidance import edits, guiders
from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.steer import steer
from visattn.guidance.former_form import in_present_form, written_heads
from visattn.guidance.guiders.guide import guide
from visattn.guidance.guiders.soft_pag import SoftPAG
from visattn.guidance.head_set import HeadSet
from visattn.guidance.written_form import Writable, guidance_text
from visattn.patterns.grammar.call_grammar import CallGrammar
from visattn.plan.json_format import brief, shown

__all__ = [
    "GUIDANCES",
    "guided",
    "listed_guidances",
    "parse_guidance",
    "parse_guidances",
    "parse_heads",
    "present_text",
]

MAX_LENGTH = 1_000_000  # of a text; heads of a large model with strengths are long


class _Guidances(Mapping[str, type[Writable]]):
    """The classes that have a text form, by name. A class is listed as soon as it is defined. The
    classes of visattn are in the files of ``guidance.edits`` and ``guidance.guiders``, which are
    imported when the list is needed."""

    def _classes(self) -> dict[str, type[Writable]]:
        _load()
        classes, unvisited = dict[str, type[Writable]](), [Writable]
        while unvisited:
            kind = unvisited.pop()
            unvisited += kind.__subclasses__()
            if vars(kind).get("example"):
                classes[kind.__name__] = kind
        return {name: classes[name] for name in sorted(classes, key=str.lower)}

    def __getitem__(self, name: str) -> type[Writable]:
        return self._classes()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes())

    def __len__(self) -> int:
        return len(self._classes())


GUIDANCES = _Guidances()
GRAMMAR: CallGrammar[Writable] = CallGrammar(
    noun="guidance",
    example="SoftPAG(heads={3: [0]}, strength=0.5)",
    kinds=lambda: GUIDANCES,
    literals="a finite number, True, False, None, a word in quotes, or a list or dict of these",
    containers=True,
)


@functools.cache
def _load() -> None:
    """Import every file of edits and guiders."""
    for package in (edits, guiders):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def parse_guidance(text: str) -> Any:
    """Read a guidance or edit from its text form. Nothing in the text is evaluated.

    Args:
        text: a call with literal arguments, ``SoftPAG(heads={3: [0]}, strength=0.5)``, or only a
            name. Names are those of ``GUIDANCES``, in upper or lower case; ``heads`` may be the
            path or hub id of a head set, in quotes.

    Returns:
        The guidance, for ``guide``, or the edit, for ``steer``.

    Raises:
        TypeError: ``text`` is no text.
        ValueError: there is no such guidance or parameter, or a value is out of range.

    Example:
        >>> from visattn.guidance import parse_guidance
        >>> parse_guidance("SEG(layers=[3], sigma=2.0)").sigma
        2.0
    """
    if not isinstance(text, str):
        raise TypeError(f"guidance={shown(text)} must be text, as in {GRAMMAR.example!r}")
    present = in_present_form(text)
    if present is not None:
        raise ValueError(f"guidance {shown(text)} has the form of older versions; write {present}")
    try:
        return GRAMMAR.parse(text, MAX_LENGTH)
    except (TypeError, ValueError, OSError) as error:
        message = brief(error)
        raise ValueError(
            message if shown(text) in message else f"guidance {shown(text)}: {message}"
        ) from None


def present_text(text: str) -> str:
    """Return a guidance text in the form of this version.

    Args:
        text: a guidance text of a record, perhaps of an older version.

    Raises:
        ValueError: ``text`` has the former form, and cannot be read.
    """
    present = in_present_form(text)
    return text if present is None else guidance_text(parse_guidance(present))


def parse_heads(text: str) -> HeadSet | dict[Any, Any]:
    """Read heads by layer, or a head set.

    Args:
        text: a dict ``{3: [2, 5], 7: {1: 0.5}, 8: None}``, or the file, folder or hub id of a head
            set.

    Returns:
        Heads by layer, as of SoftPAG, or the head set.

    Raises:
        ValueError: the text is neither, or has the form of older versions.
    """
    present = written_heads(text)
    if present is not None:
        raise ValueError(f"heads {shown(text)} have the form of older versions; write {present}")
    if not text.lstrip().startswith("{"):
        try:
            return HeadSet.from_pretrained(text)
        except OSError as error:
            raise ValueError(
                f"heads {shown(text)} must be layers with heads, as in {{3: [2, 5], 7: None}}, or "
                f"a file, folder or hub id of a head set ({brief(error)})"
            ) from None
    try:
        (heads,) = GRAMMAR.read(f"heads({text})", MAX_LENGTH).args
        SoftPAG(heads)  # type: ignore[arg-type]  # checks the heads
    except (TypeError, ValueError) as error:
        raise ValueError(f"heads {shown(text)}: {brief(error)}") from None
    assert isinstance(heads, dict)
    return heads


def parse_guidances(value: str | Iterable[Any] | None) -> tuple[Any, ...]:
    """Read one or several guidances.

    Args:
        value: texts or guidances, one or several; None is none.

    Returns:
        The guidances.

    Raises:
        TypeError: a guidance has no text form.
        ValueError: as ``parse_guidance``.
    """
    if value is None:
        return ()
    items = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    guidances = tuple(parse_guidance(each) if isinstance(each, str) else each for each in items)
    for guidance in guidances:
        guidance_text(guidance)
    return guidances


def listed_guidances() -> list[dict[str, Any]]:
    """Return names, summaries, examples and parameters of the guidances as JSON values."""
    return [
        {
            "name": name,
            "summary": kind.summary(),
            "example": kind.example,
            "parameters": kind.parameters(),
        }
        for name, kind in GUIDANCES.items()
    ]


@contextmanager
def guided(pipe: Any, guidances: Sequence[Any]) -> Iterator[None]:
    """Guide and steer a pipeline inside a ``with`` block.

    Args:
        pipe: as for ``guide``.
        guidances: guidances and edits. ``steer`` gets the edits, ``guide`` the others.

    Raises:
        TypeError: as ``guide`` and ``steer``.
        ValueError: as ``guide`` and ``steer``.

    Example:
        >>> from visattn.guidance import PAG, EnhanceVideo, guided
        >>> with guided(pipe, [PAG(layers=[1]), EnhanceVideo(weight=4)]):
        ...     frames = pipe("a cat", height=32, width=32, num_frames=5,
        ...                   num_inference_steps=1, output_type="latent").frames
    """
    steered = [each for each in guidances if isinstance(each, (Edit, BlockEdit))]
    others = [each for each in guidances if not isinstance(each, (Edit, BlockEdit))]
    with ExitStack() as stack:
        if steered:
            stack.enter_context(steer(pipe, steered))
        if others:
            stack.enter_context(guide(pipe, others))
        yield
