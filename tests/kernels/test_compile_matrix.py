"""The table of compiled kernels: it is fresh, it covers the launch table, and its limits hold."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

from visattn.kernels.targets import LAUNCHES, TARGETS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_matrix.py"
AFRESH = [
    ("sm_90", "bfloat16", 128, "axis"),
    ("sm_80", "float16", 64, "none"),
    ("gfx942", "float16", 64, "none"),
]
SELECTED = [("bfloat16", 64, "pyramid"), ("bfloat16", 128, "select count")]  # on sm_90
COMPILE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from compile_matrix import compile_row
from compile_matrix import compile_selection, rows_of
rows = [compile_row(*job) for job in json.loads(sys.argv[3])]
for row in rows_of("sm_90"):
    if list(row[1:4]) in json.loads(sys.argv[4]):
        rows.append(compile_selection(row))
print(json.dumps(rows))
"""


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = _script()
TABLE: dict[str, Any] = json.loads(matrix.TABLE.read_text())
ROWS, SELECTION = (
    {
        (row["target"], row["dtype"], row["dim"], row["variant"]): row
        for row in TABLE["rows"]
        if row["family"] == family
    }
    for family in ("forward", "selection")
)


def _settings(target: str, dtype: str, size: int) -> tuple[int, int, int, int]:
    launch = LAUNCHES[target][4 if dtype == "float32" else 2][size]
    return launch.block_q, launch.block_k, launch.warps, launch.stages


def test_table_is_of_these_kernels() -> None:
    assert TABLE["source_hashes"] == matrix.source_hashes(), (
        "the kernels or launch settings changed: run python scripts/compile_matrix.py, "
        "which writes assets/tables/compile_matrix.json"
    )


@pytest.mark.parametrize("target", list(TARGETS))
def test_limits_hold(target: str) -> None:
    rows = {place: row for place, row in ROWS.items() if place[0] == target}
    broken = {place: matrix.broken_limits(row) for place, row in rows.items()}
    assert not {place: texts for place, texts in broken.items() if texts}
    for row in rows.values():
        assert row["shared"] <= TARGETS[target].shared_bytes
        assert row["spills_elsewhere"] >= 0  # reported in every row
        if target != "gfx942" and row["dtype"] != "float32":
            assert row["stack"] <= 64
            assert row["spills_full_loop"] == 0
            assert row["matrix"]


def test_every_launch_is_in_the_table() -> None:
    for target, launches in LAUNCHES.items():
        for dtype in ("float16", "bfloat16", "float32"):
            for size in launches[4 if dtype == "float32" else 2]:
                all_kinds = size in (64, 128) and dtype != "float32"
                for variant in matrix.VARIANTS if all_kinds else matrix.FEWER:
                    row = ROWS[target, dtype, size, variant]
                    settings = (*row["block"], row["warps"], row["stages"])
                    assert settings == _settings(target, dtype, size)
    assert {dim for _, _, dim, _ in ROWS} >= {40, 80, 96}


@pytest.mark.parametrize("target", list(TARGETS))
def test_kernels_of_dynamic_patterns_hold_the_limits(target: str) -> None:
    expected = {row[:4] for row in matrix.rows_of(target)}
    rows = {place: row for place, row in SELECTION.items() if place[0] == target}
    assert set(rows) == expected
    broken = {place: matrix.broken_limits(row) for place, row in rows.items()}
    assert not {place: texts for place, texts in broken.items() if texts}
    for row in rows.values():
        assert row["spills_elsewhere"] >= 0  # reported in every row


def test_rows_compiled_afresh_agree(tmp_path: Path) -> None:
    import triton

    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}, this is {triton.__version__}")
    jobs = [(t, dtype, dim, _settings(t, dtype, dim), variant) for t, dtype, dim, variant in AFRESH]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    folders = [str(SCRIPT.parent), str(SCRIPT.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *folders, json.dumps(jobs), json.dumps(SELECTED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(AFRESH) + len(SELECTED)
    for row in found:
        place = tuple(row[name] for name in ("target", "dtype", "dim", "variant"))
        known = (ROWS if row["family"] == "forward" else SELECTION)[place]
        for name in ("shared", "stack", "spills_elsewhere", "spills_full_loop"):
            assert row.get(name) == known.get(name), (place, name)


def test_a_wait_out_of_line_is_no_loop() -> None:
    listing = [
        (0x00, "MOV R0, 0x1"),
        (0x10, "SYNCS.PHASECHK.TRYWAIT P0, [R1]"),  # head of the first loop
        (0x20, "@!P0 BRA 0xb0"),  # to the wait, out of line
        (0x30, "HGMMA.64x64x16.F32 R4, R8"),
        (0x40, "STL [R1], R4"),
        (0x50, "@P1 BRA 0x10"),
        (0x60, "MOV R2, 0x2"),
        (0x70, "HGMMA.64x64x16.F32 R4, R8"),  # the second loop, of one block
        (0x80, "@P2 BRA 0x70"),
        (0x90, "EXIT"),
        (0xA0, "BRA 0xa0"),  # the endless padding after the end
        (0xB0, "SYNCS.PHASECHK.TRYWAIT P0, [R1]"),
        (0xC0, "@!P0 BRA 0xb0"),
        (0xD0, "BRA 0x30"),  # back into the middle of the first loop
    ]
    loops = matrix.natural_loops(listing)
    products = [loop for loop in loops if loop & {0x30, 0x70}]
    wait = {0xB0, 0xC0, 0xD0}
    assert products == [{0x10, 0x20, 0x30, 0x40, 0x50} | wait, {0x70, 0x80}]
    assert {0x30} not in loops
