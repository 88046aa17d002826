"""The pages that people read: links, paths and commands exist, examples run, words are plain."""

from __future__ import annotations

import ast
import gc
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_public_names import COMMANDS
from test_words import PATTERN

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "kernels" / "README.md",
        ROOT / "tests" / "support" / "README.md",
    )
    if path.name != "CHANGELOG.md"
)
GUIDES = sorted((ROOT / "docs" / "extend").glob("*.md"))
# Pages whose words are not tested: methods.md is written from docstrings, CONTRIBUTING lists words.
NOT_PROSE = {"methods.md", "CONTRIBUTING.md"}
FOLDERS = ("assets", "docs", "kernels", "pipelines", "scripts", "tests", "visattn")
FILE = rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`"
# What a reader of a guide writes.
NEW = re.compile(r"my_|\.ts$")


def names(pages: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in pages]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """Return the text without blocks and spans of code."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Return the relative links of a page whose file or heading is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else (path.parent / file).resolve()
        missing = not target.exists()
        if missing or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def commands(text: str) -> list[list[str]]:
    """Return the calls of ``visattn`` in the shell blocks, as words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    calls = [shlex.split(line.replace("-m visattn", "visattn"), comments=True) for line in lines]
    return [call[call.index("visattn") :] for call in calls if "visattn" in call]


def unknown_options(call: list[str]) -> list[str]:
    """Return the options of a call that its command does not have."""
    known = {}
    for line in COMMANDS:
        command, *options = re.split(r" (?=--)", line)
        known[command] = options
    command = max(
        (name for name in known if call[: len(name.split())] == name.split()), key=len, default=""
    )
    if command in ("", "visattn") and len(call) > 1 and not call[1].startswith("--"):
        return [" ".join(call[:2])]
    options = {word.partition("=")[0] for word in call if word.startswith("--")}
    return sorted(options - {*known[command], "--help"})


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_links_and_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    assert broken_links(path, text) == []
    paths = [file for file in re.findall(FILE, text) if not NEW.search(file)]
    assert [file for file in paths if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_commands_have_their_options(path):
    calls = commands(path.read_text(encoding="utf-8"))
    assert [option for call in calls for option in unknown_options(call)] == []


PROSE = [*PAGES, ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("path", PROSE, ids=names(PROSE))
def test_words_are_plain(path):
    if path.name not in NOT_PROSE:
        assert PATTERN.findall(without_code(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", PAGES, ids=names(PAGES))
def test_python_blocks_are_python_and_import_what_is_there(path):
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        imports = [
            node
            for node in ast.parse(block).body
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "visattn" in ast.unparse(node)
        ]
        exec("\n".join(map(ast.unparse, imports)), {})


@pytest.mark.parametrize("path", GUIDES, ids=names(GUIDES))
def test_examples_of_guides_run(path):
    """The blocks of a guide run one after the other; the classes that they define do not stay."""
    from support import tiny

    from visattn.patterns.base.head_pattern import KINDS, unregister

    before = set(KINDS)
    text = path.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": __name__}  # the module of the classes
    if "pipe" in text:
        namespace["pipe"] = tiny.wan21()
    try:
        for block in blocks(text, "python"):
            exec(compile(block, path.name, "exec", dont_inherit=True), namespace)
    finally:
        for name in set(KINDS) - before:
            unregister(KINDS[name])
        namespace.clear()
        gc.collect()
    assert set(KINDS) == before


def test_there_is_a_guide_for_each_kind():
    kinds = ["backend", "command", "edit", "family", "guidance", "kernel", "pattern", "selector"]
    assert [path.stem for path in GUIDES] == kinds
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"docs/extend/{kind}.md" in text for kind in kinds)


def test_faults_are_found():
    page = ROOT / "README.md"
    assert broken_links(page, "[a](none.md) [b](CHANGELOG.md) [c](#no-heading)") == [
        "none.md",
        "#no-heading",
    ]
    text = "```bash\nvisattn show x --grid 1x2x3 --grids 2  # a comment\nvisattn shows\n```\n"
    assert [unknown_options(call) for call in commands(text)] == [["--grids"], ["visattn shows"]]
    assert PATTERN.findall(without_code("equal to the bit `beside`\n```\nbeside\n```\n"))
    assert anchors("# A b-c (d)\n```\n# no\n```\n") == {"a-b-c-d"}
