"""The command line: what it prints, and that wrong input prints one line and leaves nothing."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.cli import ROOT, process, refused, run

import visattn
from visattn.cli import COMMANDS, env, main
from visattn.patterns import PATTERNS, Radial, parse_pattern
from visattn.selectors import SELECTORS


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"visattn {visattn.__version__}\n", "")


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_show_prints_text(capsys):
    code, out, err = run(capsys, "show", "radial(decay=0.2)", "--grid", "4x8x8", "--block", "32")
    assert (code, err) == (0, "")
    assert out.startswith("Radial(decay=0.2,")
    assert "4x8x8, 256 tokens" in out
    assert "blocks of 32x32" in out


def test_show_json_is_sorted_and_holds_the_numbers(capsys):
    argv = ["show", "union(diagonal(5), stripe)", "--grid", "6X4", "--text-before", "3"]
    argv += ["--text-after", "1", "--block", "8x16", "--partial", "promote", "--query", "0,5,3"]
    code, out, err = run(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    numbers = json.loads(out)
    assert list(numbers) == sorted(numbers)
    assert numbers["layout"] == "text(3) + 1x6x4 + text(1)"
    assert (numbers["block_q"], numbers["block_k"]) == (8, 16)
    assert numbers["partial"] == "promote"
    assert numbers["blocks"]["partial"] == 0
    assert numbers["query"]["token"] == 26
    pattern = parse_pattern(numbers["pattern"])
    layout = visattn.TokenLayout(visattn.Grid(1, 6, 4), 3, 1)
    assert numbers["density"] == round(pattern.density(layout), 6)
    assert numbers["density"] + numbers["sparsity"] == 1


def test_show_writes_a_picture(capsys, tmp_path):
    target = tmp_path / "pattern.PNG"
    code, out, err = run(capsys, "show", "block(4)", "--grid", "8x8", "--output", str(target))
    assert (code, out, err) == (0, f"wrote {target}\n", "")
    assert os.listdir(tmp_path) == [target.name]
    with Image.open(target) as image:
        assert image.format == "PNG"
        assert image.width == 2294
    code, out, _ = run(capsys, "show", "dense", "--grid", "2x2", "--output", str(target), "--json")
    assert json.loads(out)["density"] == 1


def test_show_lists_every_pattern(capsys):
    code, out, _ = run(capsys, "show", "--list")
    assert code == 0
    names = [*PATTERNS, *SELECTORS, "agent"]
    for name in names:
        assert f"\n{name}(" in f"\n{out}"
    assert "radial(decay=1.0, sink=False, rule='block', block=128)" in out
    rows = json.loads(run(capsys, "show", "--list", "--json")[1])
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert all(row["summary"] for row in rows)


@pytest.mark.usefixtures("alone")
def test_show_says_that_a_dynamic_pattern_has_no_mask(capsys):
    [line] = refused(capsys, "show", "vsa()")
    assert "its blocks depend on the queries and keys of a call" in line


def test_env_names_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr(env, "PACKAGES", (*env.PACKAGES, "no-such-package"))
    code, text, err = run(capsys, "env")
    assert (code, err) == (0, "")
    code, out, _ = run(capsys, "env", "--json")
    info = json.loads(out)
    assert list(info) == sorted(info)
    assert info["visattn"] == visattn.__version__
    assert info["torch"]
    assert info["no-such-package"] == "not installed"
    assert "blockwise" in info["backends"]
    assert info["cpu_threads_of_torch"] >= 1
    for secret in ("hf_abcdefgh", str(Path.home()), str(ROOT), sys.prefix):
        assert secret not in text + out


BAD = {
    "no command": [],
    "unknown command": ["shaw"],
    "unknown option": ["show", "radial", "--colour", "red"],
    "shortened option": ["show", "radial", "--outp", "a.png"],
    "option with a line break": ["show", "radial", "--a\nb"],
    "no pattern": ["show"],
    "two patterns": ["show", "radial", "skip"],
    "list and pattern": ["show", "--list", "radial"],
    "unknown pattern": ["show", "radiall"],
    "pattern with a line break": ["show", "radial\n(\n"],
    "code": ["show", "__import__('os').system('touch owned')"],
    "nan": ["show", "radial(decay=nan)"],
    "refused parameter": ["show", "radial(decay=-1)"],
    "missing parameter": ["show", "diagonal"],
    "does not fit the grid": ["show", "diagonal(99999)", "--output", "a.png"],
    "grid of one number": ["show", "radial", "--grid", "16"],
    "grid of four numbers": ["show", "radial", "--grid", "1x2x3x4"],
    "empty grid": ["show", "radial", "--grid", "0x4x4"],
    "negative grid": ["show", "radial", "--grid", "4x-4x4"],
    "foreign digits": ["show", "radial", "--grid", "\u0664x\u0664"],
    "huge grid": ["show", "radial", "--grid", "99999x99999x99999"],
    "negative text": ["show", "radial", "--text-before", "-1"],
    "text no number": ["show", "radial", "--text-after", "some"],
    "no block": ["show", "radial", "--block", "0"],
    "block too large": ["show", "radial", "--block", "5000"],
    "block of three": ["show", "radial", "--block", "8x8x8"],
    "too many blocks": ["show", "radial", "--grid", "33x45x80", "--block", "1"],
    "unknown policy": ["show", "radial", "--partial", "some"],
    "empty rows": ["show", "diagonal(3)", "--partial", "drop", "--output", "a.png"],
    "query of two": ["show", "radial", "--query", "1,2"],
    "query outside": ["show", "radial", "--query", "0,0,99"],
    "no png": ["show", "radial", "--output", "a.jpg"],
    "no folder": ["show", "radial", "--output", "missing/a.png"],
    "output is a folder": ["show", "radial", "--output", "folder.png"],
    "null byte": ["show", "radial", "--output", "a\0.png"],
    "argument too many": ["env", "all"],
}


@pytest.mark.parametrize("argv", BAD.values(), ids=BAD)
def test_wrong_input_is_one_line_and_exit_code_2(argv, capsys, alone):
    (alone / "folder.png").mkdir()
    assert len(refused(capsys, *argv)) == 1


def test_interrupt_is_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "env", COMMANDS["env"]._replace(run=interrupted))
    assert run(capsys, "env") == (130, "", "")


def test_what_stdout_cannot_encode_is_escaped(tmp_path, monkeypatch):
    name = tmp_path / "\u00fcber.png"
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["show", "skip", "--grid", "2x2", "--output", str(name)]) == 0
    assert stdout.buffer.getvalue().endswith(b"\\xfcber.png\n")
    assert name.exists()


def test_wrong_input_of_a_real_process(tmp_path):
    done = process(["show", "radial(decay=nan)", "--output", "a.png"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("visattn: error: decay of radial holds 'nan'")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_closed_pipe_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = process(
            ["show", "--list"],
            tmp_path,
            capture_output=False,
            stdout=closed,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_defaults_are_those_of_the_library(capsys):
    numbers = json.loads(run(capsys, "show", "radial", "--json")[1])
    assert numbers["pattern"] == repr(Radial())
    assert numbers["block_q"] == numbers["block_k"] == 64
