"""The words of the package: plain technical English in what people read, and names that say what a
variable holds."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from test_imports import MODULES, part_of

# Names that say the place of a value in a sentence and not what it holds.
EMPTY_NAMES = {"at", "found", "own", "said", "told", "wide"}
# Constructions that a reader has to decode; CONTRIBUTING says what to write in their place.
CONSTRUCTIONS = (
    r"to the bit\b",
    r"\b(is|are|was|were) held to\b",
    r"\btold apart\b",
    r"\bsaid once\b",
    r"\bof so many\b",
    r"\b(is|are|be) had\b",
    r"\b(goes|go) on\b",
    r"\bby turns\b",
    r"\bnone is made\b",
    r"\bmakes? of\b",
    r"\bbeside\b",
    r"\bstands?\b(?!-)",
    r"\bin place of\b",
)
PATTERN = re.compile("|".join(CONSTRUCTIONS), re.IGNORECASE)
KERNEL_DECORATORS = {"gluon.jit", "triton.jit"}
# Parameters of public classes, ``(class, parameter)``: their names stay as they are.
PUBLIC_NAMES = Path(__file__).parent / "support" / "public_names.txt"
PUBLIC_PARAMETERS = {
    (signature[1], name)
    for signature in re.finditer(r"\.(\w+)\((.*)\)", PUBLIC_NAMES.read_text(encoding="utf-8"))
    for name in signature[2].split(", ")
}
PARTS = sorted(set(map(part_of, MODULES)))


def files_of(part: str) -> list[Path]:
    return sorted(path for module, path in MODULES.items() if part_of(module) == part)


def empty_names(source: str) -> list[str]:
    """Return ``line: name`` for each variable or parameter with a name of EMPTY_NAMES.

    The fields of a class that are its public parameters are not among them, and neither are the
    names inside compiled kernels, whose code is recorded in the compile matrix.
    """
    lines = []
    tree = ast.parse(source)
    compiled = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and not KERNEL_DECORATORS.isdisjoint(map(ast.unparse, node.decorator_list))
        for inner in ast.walk(node)
    }
    public = {
        id(field.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if (node.name, field.target.id) in PUBLIC_PARAMETERS
    }
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
        stored = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
        if stored and name in EMPTY_NAMES and id(node) not in public | compiled:
            lines.append(f"{node.lineno}: {name}")
    return lines


def read_by_people(source: str) -> list[tuple[int, str]]:
    """Return the comments and the strings of a source, with their first lines."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def constructions(source: str) -> list[str]:
    """Return ``line: words`` for each construction in what people read."""
    return [
        f"{line + text[: match.start()].count(chr(10))}: {match[0]}"
        for line, text in read_by_people(source)
        for match in PATTERN.finditer(re.sub(r"[ \t]+", " ", text))
    ]


@pytest.mark.parametrize("part", PARTS)
def test_words(part):
    lines = [
        f"{path.name}:{line}"
        for path in files_of(part)
        for source in [path.read_text(encoding="utf-8")]
        for line in (*empty_names(source), *constructions(source))
    ]
    assert lines == []


def test_what_is_to_be_found_is_found():
    assert empty_names("own = 1\ndef f(wide): pass\nfor at in []: pass\nx.own = own") == [
        "1: own",
        "3: at",
        "2: wide",
    ]
    assert empty_names("class ASA:\n    own: bool = True\n    at: int = 0\nown: int = 1") == [
        "4: own",
        "3: at",
    ]
    kernels = "@triton.jit\ndef f(at): own = at\n@gluon.jit\ndef g(at): pass\nown = 1"
    assert empty_names(kernels) == ["5: own"]
    assert empty_names("@jit\ndef f(at): pass\n@other.jit\ndef g(own): pass") == [
        "2: at",
        "4: own",
    ]
    assert constructions('x = 1  # equal to the bit\ny = "a row beside it"') == [
        "1: to the bit",
        "2: beside",
    ]
    assert constructions("beside = stands") == []
