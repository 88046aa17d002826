"""What imports what: the dependency arrow, the weight of ``import visattn``, and its neighbours."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]



def read_rows(text: str) -> tuple[set[str], ...]:
    """Return the rows of the table below the heading "The arrow" of CONTRIBUTING, lowest first."""
    section = text.split("## The arrow", 1)[1].split("\n## ", 1)[0]
    lines = [line.split("|") for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(cells[1]) for cells in lines] == list(range(1, len(lines) + 1))
    return tuple(set(re.findall(r"`(\w+)`", cells[2])) for cells in lines)


ROWS = read_rows((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
# A part that may import less than its row allows.
ONLY = {"pipelines": {"geometry", "runtime"}}
# What the kernels may import from outside, besides the standard library.
KERNEL_NEEDS = {"torch", "triton"}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for top, prefix in (("visattn", ()), ("kernels", ("visattn",)), ("pipelines", ("visattn",))):
        for folder, _, files in os.walk(ROOT / top):  # does not follow the symlinks
            for file in files:
                path = Path(folder, file)
                if path.suffix == ".py":
                    parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
                    found[".".join(parts)] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """Return the entry of ROWS that ``module`` belongs to."""
    return [*module.split("."), "__init__"][1]


def imported(module: str, source: str) -> set[str]:
    """Return the dotted names that ``source`` imports, at any depth, as the code of ``module``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            # `from visattn import x`: a part of the package, or a name that its __init__ holds
            names.update(
                f"{base}.{alias.name}" if base == "visattn" and alias.name in RANK else base
                for alias in node.names
            )
    return names


def wrong_imports(module: str, source: str) -> list[str]:
    """Return a line for each import in ``source`` that goes against the arrow."""
    part = part_of(module)
    if part not in RANK:
        return [f"{module}: {part!r} has no place in ROWS"]
    wrong = []
    for name in sorted(imported(module, source)):
        top = name.split(".")[0]
        if top != "visattn":
            fine = part != "kernels" or top in KERNEL_NEEDS or top in sys.stdlib_module_names
        elif (target := part_of(name)) == part:
            fine = True
        elif part in ONLY:
            fine = target in ONLY[part]
        else:
            fine = target in RANK and RANK[target] < RANK[part]
        if not fine:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_every_part_has_one_place():
    assert len(RANK) == sum(map(len, ROWS))
    assert {part_of(module) for module in MODULES} == set(RANK)


def test_arrow_holds():
    assert "visattn.__init__" in MODULES
    wrong = [
        line
        for module, path in sorted(MODULES.items())
        for line in wrong_imports(module, path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visattn.geometry.layout", "from visattn.patterns.radial import Radial"),
        ("visattn.geometry.layout", "from visattn import patterns"),
        ("visattn.geometry.layout", "def f():\n    import visattn.attention"),
        ("visattn.geometry.layout", "from ..patterns import Radial"),
        ("visattn.geometry.layout", "from visattn import Grid"),
        ("visattn.patterns.radial", "from ..attention import sparse_attention"),
        ("visattn.patterns.radial", "import visattn.selectors"),
        ("visattn.pipelines.wan", "from visattn.attention import sparse_attention"),
        ("visattn.kernels.forward", "from visattn.geometry.layout import Grid"),
        ("visattn.kernels.forward", "import numpy"),
        ("visattn.blocks.block_map", "import visattn.something_new"),
        ("visattn.something_new", "import torch"),
    ],
)
def test_import_against_the_arrow_is_found(module, source):
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visattn.patterns.union", "from visattn.patterns.base import Pattern"),
        ("visattn.patterns.union", "from .base import Pattern\nfrom ..blocks import BlockMap"),
        ("visattn.attention.spec", "from visattn import blocks\nimport visattn.kernels.forward"),
        ("visattn.pipelines.wan", "from visattn.geometry.layout import Grid\nimport diffusers"),
        ("visattn.kernels.forward", "import math\nimport triton.language as tl\nimport torch"),
        ("visattn.kernels.forward", "from visattn.kernels.softmax import rescale"),
        ("visattn.cli.show", "from visattn import Grid, __version__"),
        ("visattn.__init__", "from visattn.geometry.layout import Grid"),
    ],
)
def test_import_along_the_arrow_is_fine(module, source):
    assert wrong_imports(module, source) == []


@functools.cache
def edges() -> dict[str, set[str]]:
    """Return which modules each module imports, type-only and lazy imports too."""
    known = {name.removesuffix(".__init__"): name for name in MODULES}
    graph = {}
    for module, path in MODULES.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (names & set(known)) or {node.module or ""}
        graph[module] = {known[name] for name in found & set(known)} - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of nodes that reach one another, each sorted."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for node in graph[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return sorted(sorted(group) for group in groups if group)


def by_folder(graph: dict[str, set[str]], folder: str) -> dict[str, set[str]]:
    """Return the imports among the modules and folders that lie in ``folder``; its __init__, which
    gathers the names of all, counts as none of them."""
    depth = folder.count(".") + 2
    inside: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module.startswith(f"{folder}.") and module != f"{folder}.__init__":
            place = ".".join(module.split(".")[:depth])
            found = inside.setdefault(place, set())
            for target in targets:
                if target.startswith(f"{folder}.") and target != f"{folder}.__init__":
                    found.add(".".join(target.split(".")[:depth]))
            found.discard(place)
    return inside


def test_no_circle_of_modules():
    assert circles(edges()) == []


FOLDERS = sorted(name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_inside_a_folder(folder):
    assert circles(by_folder(edges(), folder)) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}, "g": set()}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]
    inside = by_folder({"p.x.one": {"p.y.two"}, "p.y.two": {"p.x.other"}, "p.x.other": set()}, "p")
    assert circles(inside) == [["p.x", "p.y"]]


def run_python(code: str, *, path: Path | None = None) -> str:
    """Return what ``python -c code`` prints in the repository's root, with ``path`` importable."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_torch_and_nothing_heavy():
    heavy = "diffusers transformers triton timm torchvision PIL accelerate imageio natten"
    code = f"""
import sys, visattn
assert "torch" in sys.modules
print(*sorted(set({heavy!r}.split()) & set(sys.modules)))
"""
    assert run_python(code) == ""


def test_import_loads_few_modules_of_its_own():
    """What ``import visattn`` costs is what it imports: the rest waits until a name is used."""
    lazy = "attention bench cli cost draw generation guidance inject kernels media metrics plan"
    code = f"""
import sys, visattn
own = [name for name in sys.modules if name.split(".")[0] == "visattn"]
assert len(own) <= 90, len(own)
print(*sorted(set({lazy!r}.split()) & {{name.split(".")[1] for name in own if "." in name}}))
"""
    assert run_python(code) == ""


def test_lazy_names_are_there_and_listed():
    code = """
import visattn
assert set(visattn.__all__) <= set(dir(visattn))
assert {"attention", "inject", "plan", "readout"} <= set(dir(visattn))
assert all(getattr(visattn, name) is not None for name in dir(visattn))
from visattn import *
assert sparse_attention is visattn.attention.sparse_attention
assert guidance.guide is guide and callable(search)
assert not hasattr(visattn, "no_such_name")
from visattn.patterns import parse_pattern
print(type(parse_pattern("top_blocks(0.5)")).__name__)
"""
    assert run_python(code) == "TopBlocks"


def test_timm_and_transformers_import_after_visattn():
    """A CPU torch beside PyPI's torchvision broke both (`visattn/_compat.py`)."""
    code = "import visattn, timm.layers; from transformers import T5EncoderModel; print('both')"
    assert run_python(code) == "both"


@pytest.mark.parametrize(
    ("library", "defined"),
    [
        pytest.param(b"\0libtorch_cuda.so\0", True, id="cuda-build"),
        pytest.param(b"\0libtorch_cpu.so\0", False, id="cpu-build"),
        pytest.param(None, True, id="no-library"),
    ],
)
def test_torchvision_operators_are_defined_only_where_needed(tmp_path, library, defined):
    """Defined beside a library that loads, they would make loading it abort the process."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    if library is not None:
        (package / "_C.so").write_bytes(library)
    code = """
import torch
torch.version.cuda = torch.version.hip = None
from visattn._compat import ensure_torchvision
ensure_torchvision()
ensure_torchvision()
print(*(hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")))
"""
    assert run_python(code, path=tmp_path) == f"{defined} {defined}"


def test_kernels_in_the_root_is_hugging_faces(tmp_path):
    """The root's own ``kernels`` folder comes first on the path and must not win."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(): ...\n")
    code = """
import sys
assert sys.path[0] == ""
from kernels import get_kernel
import kernels, visattn.kernels
print(kernels.__file__)
"""
    assert run_python(code, path=tmp_path) == str(package / "__init__.py")
