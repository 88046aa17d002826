"""What imports what: the dependency arrow, the weight of ``import visattn``, and its neighbours."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The arrow, lowest row first: a module may import modules of lower rows and of its own folder.
# A new module of visattn/ gets a place here.
ROWS = (
    {"leftovers"},
    {"_compat", "_version", "ambient", "files", "processes", "sources"},
    {"kernels"},
    {"launch", "layout"},
    {"orders", "padding"},
    {"predicates"},
    {"blockmap"},
    {"patterns"},
    {"selectors"},
    {"reference", "picture", "rows", "transposed", "view", "workspace"},
    {"cpu_rows"},
    {"bittiles", "blockwise", "draw", "flex", "video"},
    {"devicemaps"},
    {"trial"},
    {"triton_backend", "checks"},
    {"execute"},
    {"dense", "op"},
    {"attention"},
    {"cost", "plan"},
    {"pipelines"},
    {"inject"},
    {"metrics", "readout", "report"},
    {"guidance"},
    {"generation"},
    {"bench", "search"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
# A part that may import less than its row allows.
ONLY = {"pipelines": {"layout"}}
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
        ("visattn.layout", "from visattn.patterns.radial import Radial"),
        ("visattn.layout", "from visattn import patterns"),
        ("visattn.layout", "def f():\n    import visattn.attention"),
        ("visattn.layout", "from .patterns import Radial"),
        ("visattn.layout", "from visattn import Grid"),
        ("visattn.patterns.radial", "from ..attention import sparse_attention"),
        ("visattn.patterns.radial", "import visattn.selectors"),
        ("visattn.pipelines.wan", "from visattn.attention import sparse_attention"),
        ("visattn.kernels.forward", "from visattn.layout import Grid"),
        ("visattn.kernels.forward", "import numpy"),
        ("visattn.blockmap", "import visattn.something_new"),
        ("visattn.something_new", "import torch"),
    ],
)
def test_import_against_the_arrow_is_found(module, source):
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visattn.patterns.union", "from visattn.patterns.base import Pattern"),
        ("visattn.patterns.union", "from .base import Pattern\nfrom ..blockmap import BlockMap"),
        ("visattn.attention", "from visattn import reference\nimport visattn.kernels.forward"),
        ("visattn.pipelines.wan", "from visattn.layout import Grid\nimport diffusers"),
        ("visattn.kernels.forward", "import math\nimport triton.language as tl\nimport torch"),
        ("visattn.kernels.forward", "from visattn.kernels.softmax import rescale"),
        ("visattn.cli.show", "from visattn import Grid, __version__"),
        ("visattn.__init__", "from visattn.layout import Grid"),
    ],
)
def test_import_along_the_arrow_is_fine(module, source):
    assert wrong_imports(module, source) == []


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
