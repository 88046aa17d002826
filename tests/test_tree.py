"""The shape of the tree: sizes of files and folders, unique module names, the root's files."""

import ast
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The most lines of a Python file, by top folder.
MOST_LINES = {"visattn": 400, "kernels": 650, "pipelines": 400}
MOST_FILES = 20  # of one folder
# The only files that lie in visattn/ itself.
ROOT_FILES = {
    "__init__.py",
    "__main__.py",
    "_arguments.py",
    "_atomic.py",
    "_compat.py",
    "_version.py",
    "flex.py",
    "py.typed",
}


def files_by_folder() -> dict[str, list[Path]]:
    """Return the files of each folder of the package, by the folder's path from the root."""
    folders = {}
    for top in MOST_LINES:
        for folder, names, files in os.walk(ROOT / top):  # does not follow the symlinks
            names[:] = [name for name in names if name != "__pycache__"]
            path = Path(folder)
            folders[path.relative_to(ROOT).as_posix()] = [path / file for file in sorted(files)]
    return folders


FOLDERS = files_by_folder()
MODULES = [file for files in FOLDERS.values() for file in files if file.suffix == ".py"]


def long_files(most: dict[str, int]) -> set[str]:
    """Return the modules with more lines than ``most`` allows in their top folder."""
    paths = {file: file.relative_to(ROOT) for file in MODULES}
    return {
        path.as_posix()
        for file, path in paths.items()
        if len(file.read_text(encoding="utf-8").splitlines()) > most[path.parts[0]]
    }


def full_folders(most: int) -> set[str]:
    """Return the folders with more than ``most`` files."""
    return {folder for folder, files in FOLDERS.items() if len(files) > most}


def shared_names(modules: list[Path]) -> set[str]:
    """Return the file names that several modules have, without ``__init__``."""
    names = Counter(module.stem for module in modules if module.stem != "__init__")
    return {name for name, count in names.items() if count > 1}


def test_no_file_is_too_long():
    assert long_files(MOST_LINES) == set()


def test_no_folder_is_too_full():
    assert full_folders(MOST_FILES) == set()


def test_module_names_are_unique():
    assert shared_names(MODULES) == set()


def test_the_root_of_the_package_holds_folders():
    assert {file.name for file in FOLDERS["visattn"]} - ROOT_FILES == set()


@pytest.mark.parametrize("folder", ["visattn", "visattn/patterns", "kernels", "pipelines"])
def test_every_folder_is_walked_once(folder):
    assert FOLDERS[folder]
    assert not {"visattn/kernels", "visattn/pipelines"} & set(FOLDERS)


def test_faults_are_found():
    assert "visattn/__init__.py" in long_files(dict.fromkeys(MOST_LINES, 1))
    assert full_folders(0) == {folder for folder, files in FOLDERS.items() if files}
    modules = [Path("a/x.py"), Path("b/x.py"), Path("a/__init__.py"), Path("b/__init__.py")]
    assert shared_names(modules) == {"x"}


def test_every_test_file_says_what_it_tests():
    files = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    missing = [path for path in files if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert missing == []


def test_support_lists_its_modules():
    folder = ROOT / "tests" / "support"
    text = (folder / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:\.txt)?` \| .+ \|$", text, re.MULTILINE)
    files = [path.stem for path in folder.iterdir() if path.suffix in (".py", ".txt")]
    assert listed == sorted(files)
