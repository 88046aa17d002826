"""The written form of patterns, read without running it: ``radial(decay=0.2, sink=True)``."""

from __future__ import annotations

from visattn.patterns.base.head_pattern import KINDS, HeadPattern
from visattn.patterns.grammar.call_grammar import MAX_LENGTH, CallGrammar

__all__ = ["is_pattern_name", "parse_pattern"]

GRAMMAR: CallGrammar[HeadPattern] = CallGrammar(
    noun="pattern",
    example="radial(decay=0.2, sink=True)",
    kinds=lambda: KINDS,
    literals=(
        "a finite number, True, False, None, a word in quotes, a tuple of these, or a pattern, "
        "for example diagonal(64)"
    ),
)


def parse_pattern(text: str, max_length: int = MAX_LENGTH) -> HeadPattern:
    """Return the pattern that ``text`` describes, static or dynamic.

    Args:
        text: a call with literal arguments, ``Neighborhood((2, 7, 7), stride=(1, 2, 2))``, or a
            name alone for a pattern without arguments. Names are those of ``PATTERNS`` and
            ``SELECTORS`` or of the classes, in any case; arguments are literals or patterns, as in
            ``union(diagonal(64), stripe)``.
        max_length: most characters of ``text``; patterns that a search has learned are longer than
            those that people write.

    Returns:
        The pattern. ``parse_pattern(repr(pattern)) == pattern`` for every pattern.

    Raises:
        TypeError: ``text`` is no string, or a parameter is unknown, missing or given twice.
        ValueError: ``text`` is no call with literal arguments, names no pattern, or holds a value
            that the pattern refuses.

    Example:
        >>> from visattn.patterns import parse_pattern
        >>> parse_pattern("union(diagonal(64), stripe)")
        Union(Diagonal(width=64), Stripe(first_frame=True, columns=None))
    """
    return GRAMMAR.parse(text, max_length)


def is_pattern_name(text: str) -> bool:
    """Return whether ``text`` is the name of a pattern, in any case."""
    return GRAMMAR.find(text) is not None
