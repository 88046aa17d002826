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

from visattn.kernels.targets import BACKWARD, LAUNCHES, TARGETS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_matrix.py"
AFRESH = [  # family, target, dtype, head size, variant
    ("forward", "sm_90", "bfloat16", 128, "axis"),
    ("forward", "sm_80", "float16", 64, "none"),
    ("forward", "gfx942", "float16", 64, "none"),
    ("backward", "sm_90", "bfloat16", 64, "dq none"),
    ("selection", "sm_90", "bfloat16", 64, "pyramid"),
    ("selection", "sm_90", "bfloat16", 128, "select count"),
]
COMPILE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from compile_matrix import FAMILIES, compile_row
rows = []
for family, *place in json.loads(sys.argv[3]):
    for row in FAMILIES[family].rows_of(place[0]):
        if list(row[1:5]) == place:
            rows.append(compile_row(row, FAMILIES[family]))
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
ROWS: dict[str, dict[tuple[str, str, int, str], dict[str, Any]]] = {
    family: {
        (row["target"], row["dtype"], row["dim"], row["variant"]): row
        for row in TABLE["rows"]
        if row["family"] == family
    }
    for family in matrix.FAMILIES
}


def test_table_is_of_these_kernels() -> None:
    assert TABLE["source_hashes"] == matrix.source_hashes(), (
        "the kernels or launch settings changed: run python scripts/compile_matrix.py, "
        "which writes assets/tables/compile_matrix.json"
    )


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("family", list(matrix.FAMILIES))
def test_every_row_holds_the_limits(family: str, target: str) -> None:
    expected = {row[1:5]: row for row in matrix.FAMILIES[family].rows_of(target)}
    rows = {place: row for place, row in ROWS[family].items() if place[0] == target}
    assert set(rows) == set(expected)
    broken = {place: matrix.broken_limits(row) for place, row in rows.items()}
    assert not {place: texts for place, texts in broken.items() if texts}
    for place, row in rows.items():
        assert row.items() >= expected[place].place().items()  # launched as it was compiled
        assert row["shared"] <= TARGETS[target].shared_bytes
        assert row["spills_elsewhere"] >= 0  # reported in every row
        if family != "selection" and target != "gfx942" and row["dtype"] != "float32":
            assert row["stack"] <= 64
            assert row["spills_full_loop"] == 0
            assert row["matrix"]


@pytest.mark.parametrize(("family", "table"), [("forward", LAUNCHES), ("backward", BACKWARD)])
def test_every_launch_is_in_the_table(family: str, table: dict[str, Any]) -> None:
    backward = family == "backward"
    for target, launches in table.items():
        for dtype in ("bfloat16", "float32") if backward else ("float16", "bfloat16", "float32"):
            for size in launches[4 if dtype == "float32" else 2]:
                all_kinds = size in (64, 128) and dtype != "float32"
                count = sum(place[:3] == (target, dtype, size) for place in ROWS[family])
                expected = 9 if all_kinds else 4
                if backward:
                    of_levels = 9 if all_kinds else 0
                    expected = 2 * (2 if dtype == "float32" else expected) + of_levels
                assert count == expected
    assert {dim for _, _, dim, _ in ROWS[family]} >= ({96} if backward else {40, 80, 96})


@pytest.mark.second
def test_rows_compiled_afresh_agree(tmp_path: Path) -> None:
    import triton

    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}, this is {triton.__version__}")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    folders = [str(SCRIPT.parent), str(SCRIPT.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *folders, json.dumps(AFRESH)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(AFRESH)
    for row in found:
        place = tuple(row[name] for name in ("target", "dtype", "dim", "variant"))
        known = ROWS[row["family"]][place]
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
    from compiled.resources import natural_loops  # beside the script

    loops = natural_loops(listing)
    products = [loop for loop in loops if loop & {0x30, 0x70}]
    wait = {0xB0, 0xC0, 0xD0}
    assert products == [{0x10, 0x20, 0x30, 0x40, 0x50} | wait, {0x70, 0x80}]
    assert {0x30} not in loops
