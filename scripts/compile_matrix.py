"""Compile every row of the launch tables for its target, with no GPU, and write what it takes.

    python scripts/compile_matrix.py --jobs 2 --output assets/tables/compile_matrix.json
    python scripts/compile_matrix.py --family selection      # the other families' rows are kept

There are four families, each a module of ``compiled``: ``forward`` and ``backward``, every row of
the launch tables in every variant of the masks (predicate kinds, orders, text lengths, split rows),
``hopper``, the forward kernel of that architecture, and ``selection``, the kernels of dynamic
patterns. The table holds registers, shared memory, stack,
spilled instructions inside and outside the loop over full blocks, and matrix instructions, and the
hash of the kernels of each family. Nothing in it is a timing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compiled import backward, forward, hopper, selection
from compiled.resources import compile_row
from compiled.rows import Row

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
TABLE = ROOT / "assets" / "tables" / "compile_matrix.json"
STACK_LIMIT = 64  # bytes of a thread, on NVIDIA, in 16-bit types
FAMILIES: dict[str, Any] = {
    "forward": forward,
    "hopper": hopper,
    "backward": backward,
    "selection": selection,
}


def source_hashes() -> dict[str, str]:
    """Hash of the code that each family compiles: the kernels and the constants of its files, not
    their words nor how they are launched, which each row of the table says."""
    found = {}
    for family, module in FAMILIES.items():
        digest = hashlib.sha256()
        for name in module.SOURCES:
            digest.update(name.encode() + compiled_code(KERNELS / f"{name}.py").encode())
        found[family] = digest.hexdigest()[:16]
    return found


def compiled_code(path: Path) -> str:
    """The functions of a file that Triton compiles, and the values that they may name."""
    parts = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            if isinstance(node.body[0], ast.Expr):  # its docstring
                del node.body[0]
            parts.append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            parts.append(node)
    return "\n".join(ast.unparse(node) for node in parts)


def _job(row: Row) -> dict[str, Any]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    try:
        return compile_row(row, FAMILIES[row.family])
    except (CompilationError, PTXASError, RuntimeError, subprocess.CalledProcessError) as error:
        return row.place() | {"error": str(error)[:300]}


def explore(jobs: list[Row], workers: int) -> list[dict[str, Any]]:
    """Compile many rows in parallel processes; a row that does not compile has its error."""
    os.environ.pop("TRITON_INTERPRET", None)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(_job, jobs):
            rows.append(row)
            for text in broken_limits(row):
                print(f"{len(rows)} of {len(jobs)}: {_place(row)}: {text}", flush=True)
    return rows


def broken_limits(row: dict[str, Any]) -> list[str]:
    """What a row must hold and does not."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    broken = []
    if row["shared"] > row["shared_limit"]:
        broken.append(f"shared memory {row['shared']} > {row['shared_limit']}")
    loops = FAMILIES[row["family"]].loops_of(row["variant"])
    if row["target"].startswith("sm_") and row["dtype"] != "float32":
        if loops is not None and row["loops"] != loops:
            broken.append(f"{row['loops']} loops with matrix products, expected {loops}")
        if row["spills_full_loop"]:
            broken.append(f"{row['spills_full_loop']} spills in the loop over full blocks")
        if row["stack"] > STACK_LIMIT:
            broken.append(f"stack {row['stack']} > {STACK_LIMIT}")
    return broken


def _summary(rows: list[dict[str, Any]]) -> str:
    """The worst of each target and dtype."""
    lines = ["target  dtype     rows  registers  stack  spills: full loop  elsewhere  shared KiB"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["dtype"]), []).append(row)
    for (target, dtype), group in groups.items():
        worst = {
            name: max(row.get(name) or 0 for row in group)
            for name in ("registers", "stack", "spills_full_loop", "spills_elsewhere", "shared")
        }
        loop = "-" if group[0].get("spills_full_loop") is None else worst["spills_full_loop"]
        limit = group[0].get("shared_limit", 0) >> 10
        lines.append(
            f"{target:7} {dtype:9} {len(group):4} {worst['registers']:10} {worst['stack']:6} "
            f"{loop:>18} {worst['spills_elsewhere']:10} {worst['shared'] / 1024:7.1f} / {limit}"
        )
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("family", "target", "dtype", "dim", "variant"))


def _write(path: Path, rows: list[dict[str, Any]], version: str, hashes: dict[str, str]) -> None:
    head = {
        "triton": version,
        "source_hashes": hashes,
        "limits": {"stack_16_bit_nvidia": STACK_LIMIT, "spills_full_loop_16_bit_nvidia": 0},
    }
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--output", type=Path, default=TABLE, help="the table, JSON")
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="only these; default: all")
    parser.add_argument("--family", choices=FAMILIES, help="only this one; default: all")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing: is the table fresh and within limits"
    )
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # with it Triton compiles nothing
    sys.path.insert(0, str(ROOT))
    if options.check:
        table = json.loads(options.output.read_text())
        rows, fresh = table["rows"], table["source_hashes"] == source_hashes()
        if not fresh:
            print("stale: the kernels changed; run python scripts/compile_matrix.py")
    else:
        import triton

        from visattn.kernels.targets import TARGETS

        fresh, targets = True, options.targets or list(TARGETS)
        started = source_hashes()
        families = [options.family] if options.family else list(FAMILIES)
        jobs = [
            row for name in families for target in targets for row in FAMILIES[name].rows_of(target)
        ]
        rows, hashes = explore(jobs, options.jobs), dict(started)
        if options.family:  # the other families' rows are as they were
            table = json.loads(options.output.read_text())
            rows += [row for row in table["rows"] if row["family"] != options.family]
            hashes = table["source_hashes"] | {options.family: started[options.family]}
            rows.sort(key=lambda row: list(FAMILIES).index(row["family"]))
        if source_hashes() != started:
            print("the kernels changed while they were compiled: nothing is written")
            return 1
        _write(options.output, rows, triton.__version__, hashes)
    print(_summary(rows))
    failures = [f"{_place(row)}: {text}" for row in rows for text in broken_limits(row)]
    print("\n".join(failures) if failures else "all limits hold")
    return int(bool(failures) or not fresh)


if __name__ == "__main__":
    raise SystemExit(main())
