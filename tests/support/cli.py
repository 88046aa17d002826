"""Running the command line: what the tests of several commands share."""

import os
import re
import subprocess
import sys
from pathlib import Path

from visattn.cli import main

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ["--height", "96", "--width", "64", "--num-frames", "9"]
SIZE = [*SHAPE, "--num-inference-steps", "2"]
GENERATE = ["generate", "a red square", "--model", "wan", *SIZE]


def run(capsys, *argv):
    """The exit code, stdout and stderr of a command."""
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def good(capsys, *argv):
    """stdout of a command that succeeds, with nothing but steps on stderr."""
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert all(re.match(r"(line \d+, )?step: \d", line) for line in err.splitlines()), err
    return out


def refused(capsys, *argv):
    """The lines on stderr of a command that refuses wrong input: the last says what is wrong.
    Nothing is printed, and nothing is left behind."""
    before = made()
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err and ".part" not in err and err.endswith("\n"), err
    lines = err.splitlines()
    assert lines[-1].startswith("visattn: error: "), err
    assert made() == before
    return lines


def made():
    """What lies in the working folder, besides the models and what Python compiles."""
    assert Path.cwd() != ROOT, "use the fixture `alone`: other tests write in the root"
    found = (path for path in Path().rglob("*") if not path.is_symlink())
    return sorted(str(path) for path in found if "__pycache__" not in path.parts)


def process(argv, folder=".", **options):
    """A command as a process of its own, with Triton as users have it."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "visattn", *argv]
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run(command, cwd=folder, env=env, check=False, **options)
