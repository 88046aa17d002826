"""Compile every row of the launch table for its target, with no GPU, and write what it takes.

    python scripts/compile_matrix.py --jobs 2 --output assets/tables/compile_matrix.json
    python scripts/compile_matrix.py --family selection      # the other family's rows are kept

There are two families. ``forward``: each row of ``visattn.kernels.targets.LAUNCHES`` is compiled in
every variant of the masks (predicate kinds, orders, text lengths, split rows). ``selection``: the
kernels of dynamic patterns, as ``compiled/selection.py`` says. The table holds registers, shared
memory, stack, spilled instructions inside and outside the loop over full blocks, and matrix
instructions, and the hash of the sources of each family. Nothing in it is a timing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compiled.selection import TYPES, Row, kernel_of, rows_of, type_of

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
TABLE = ROOT / "assets" / "tables" / "compile_matrix.json"
STACK_LIMIT = 64  # bytes of a thread, on NVIDIA, in 16-bit types
KINDS = {"none": 0, "axis": 1, "strided": 2, "band": 3, "radial": 4, "label": 5, "bits": 6}
# The variants of a row: the predicate kinds of the two slots. All flags are on, since a flag that
# is off only takes code away.
VARIANTS = [
    "none",
    "axis",
    "strided",
    "band",
    "radial",
    "label",
    "bits",
    "axis+radial",
    "band+label",
]
CORE = (64, 128)  # head sizes of every variant; the others have those that take most registers
FEWER = ["none", "strided", "radial", "bits"]
PADDED = {40: ("float16", "sm_80"), 80: ("float16", "gfx942"), 96: ("bfloat16", "sm_90")}
MATRIX = re.compile(r"\b(UTC\w*MMA|HGMMA|QGMMA|HMMA|IMMA|DMMA|v_mfma_\w+)")
SPILL = re.compile(r"\b(STL|LDL)\b")


# the files of each family, and what both launch by
FAMILIES = {
    "forward": ("forward", "masks", "permute", "targets"),
    "selection": ("levels", "pooled", "queries", "select", "summary", "targets"),
}


def source_hashes() -> dict[str, str]:
    """Hash of everything that the compiled code of each family depends on."""
    found = {}
    for family, names in FAMILIES.items():
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode() + (KERNELS / f"{name}.py").read_bytes())
        found[family] = digest.hexdigest()[:16]
    return found


def _arguments(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[dict[str, str],
dict[Any, Any]]:
    """Types of the arguments by name, and which are divisible by 16, as a launch would find
    them."""
    element = TYPES[dtype]
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{element}")
    pointers |= dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32")
    pointers["columns"] = "*i16"
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("stride_"):
            signature[name] = "i32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("heads", "length_q", "length_k", "num_k", "grids", "parts", "texts"):
            signature[name] = "i32"
        else:
            signature[name] = pointers.get(name, "*i32")
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, attributes


def compile_row(
    target_name: str,
    dtype: str,
    dim: int,
    launch: tuple[int, int, int, int],
    variant: str,
    flags: bool = True,
) -> dict[str, Any]:
    """Compile one variant of the forward kernel; returns its resources."""
    import triton

    from visattn.kernels.forward import _forward_kernel

    block_q, block_k, warps, stages = launch
    first, _, second = variant.partition("+")
    constants = {
        "DIM": dim,
        "BLOCK_M": block_q,
        "BLOCK_N": block_k,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "KIND_A": KINDS[first],
        "KIND_B": KINDS[second or "none"],
        "Q_ORDERED": flags,
        "K_ORDERED": flags,
        "LENGTHS": flags,
        "SPLIT": flags,
        "IEEE": dtype == "float32",
    }
    signature, attributes = _arguments(_forward_kernel, dtype, constants)
    place = {"family": "forward", "target": target_name, "dtype": dtype, "dim": dim}
    place |= {"variant": variant, "block": [block_q, block_k], "warps": warps, "stages": stages}
    return place | _compiled(_forward_kernel, signature, attributes, constants, place)


def compile_selection(row: Row) -> dict[str, Any]:
    """Compile one kernel of the dynamic patterns; returns its resources."""
    kernel = kernel_of(row.kernel)
    signature, attributes = {}, {}
    for number, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in row.constants else type_of(name, row.dtype)
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[(number,)] = [["tt.divisibility", 16]]
    place = {"family": "selection", "target": row.target, "dtype": row.dtype, "dim": row.dim}
    place |= {"variant": row.variant, "warps": row.warps, "stages": row.stages}
    return place | _compiled(kernel, signature, attributes, row.constants, place)


def _compiled(
    kernel: Any,
    signature: dict[str, str],
    attributes: dict[Any, Any],
    constants: dict[str, Any],
    place: dict[str, Any],
) -> dict[str, Any]:
    """Compile a kernel for a target; what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from visattn.kernels.targets import TARGETS

    target = TARGETS[place["target"]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": place["warps"], "num_stages": place["stages"]},
    )
    found = {"shared": compiled.metadata.shared, "shared_limit": target.shared_bytes}
    return found | (_nvidia(compiled) if target.backend == "cuda" else _amd(compiled))


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "stack": stack} | _loops(sass)


def _loops(sass: str) -> dict[str, Any]:
    """Spills inside the first loop with matrix products (that of full blocks), and elsewhere."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    loops = natural_loops(code)
    spills = {address for address, text in code if SPILL.search(text)}
    products = {address: m[1] for address, text in code if (m := MATRIX.search(text))}
    full = next((loop for loop in loops if loop & products.keys()), set())
    return {
        "loops": sum(bool(loop & products.keys()) for loop in loops),
        "spills_full_loop": len(spills & full) if full else None,
        "spills_elsewhere": len(spills - full),
        "matrix": sorted(set(products.values())),
    }


def natural_loops(code: list[tuple[int, str]]) -> list[set[int]]:
    """The outermost loops of a listing, as sets of addresses, by the address of their head.

    A jump back is a loop only when its target dominates it: a wait that was moved out of line also
    jumps back, into the middle of the code that it came from.
    """
    addresses = [address for address, _ in code]
    after = dict(zip(addresses, [*addresses[1:], None], strict=True))
    follows: dict[int, list[int]] = {}
    for address, text in code:
        jump = re.search(r"\bBRA\b[^`]*?(0x[0-9a-f]+)", text)
        ends = re.match(r"(@!?U?P\w+ )?(BRA|EXIT|RET|BRX|JMP)\b", text)
        through = after[address] if not ends or ends[1] else None
        targets = [int(jump[1], 16)] if jump and ends and ends[2] == "BRA" else []
        follows[address] = targets + ([through] if through is not None else [])
    starts = {code[0][0]}
    for address, targets in follows.items():
        if targets != [after[address]]:
            starts.update(targets)
    block_of: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    current = code[0][0]
    for address, _ in code:
        current = address if address in starts else current
        block_of[address] = current
        members.setdefault(current, []).append(address)
    edges = {block: follows[rows[-1]] for block, rows in members.items()}
    sources: dict[int, list[int]] = {block: [] for block in members}
    for block, targets in edges.items():
        for target in targets:
            sources[block_of[target]].append(block)
    order = sorted(members)
    dominators = {block: set(order) for block in order} | {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [dominators[source] for source in sources[block]]
            new = {block} | (set.intersection(*known) if known else set())
            changed |= new != dominators[block]
            dominators[block] = new
    loops: dict[int, set[int]] = {}
    for block, targets in edges.items():
        for head in targets:
            if head in dominators[block]:
                body, open_ = {head}, [block]
                while open_:
                    own = open_.pop()
                    if own not in body:
                        body.add(own)
                        open_ += sources[own]
                loops.setdefault(head, set()).update(body)
    outer = [
        body
        for head, body in sorted(loops.items())
        if not any(head != other and head in around for other, around in loops.items())
    ]
    return [{address for block in body for address in members[block]} for body in outer]


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"\.vgpr_count"),
        "stack": number(r"\.private_segment_fixed_size"),
        "spills_elsewhere": number(r"\.vgpr_spill_count"),
        "matrix": sorted(set(re.findall(r"v_mfma_\w+", text))),
    }


def _job(job: tuple[Any, ...]) -> dict[str, Any]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    try:
        return compile_selection(job) if isinstance(job, Row) else compile_row(*job)
    except (CompilationError, PTXASError, RuntimeError, subprocess.CalledProcessError) as error:
        names = ("target", "dtype", "dim", "launch", "variant")
        place = job._asdict() if isinstance(job, Row) else dict(zip(names, job, strict=False))
        family = "selection" if isinstance(job, Row) else "forward"
        return place | {"family": family, "error": str(error)[:300]}


def explore(jobs: list[tuple[Any, ...]], workers: int) -> list[dict[str, Any]]:
    """Compile many rows in parallel processes; a row that does not compile has its error."""
    os.environ.pop("TRITON_INTERPRET", None)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(_job, jobs):
            rows.append(row)
            for text in broken_limits(row):
                print(f"{len(rows)} of {len(jobs)}: {_place(row)}: {text}", flush=True)
    return rows


def jobs_of(targets: list[str]) -> list[tuple[Any, ...]]:
    """What the table has of some targets: arguments of ``compile_row``."""
    from visattn.kernels.targets import LAUNCHES

    jobs: list[tuple[Any, ...]] = []
    for target in targets:
        for dtype in TYPES:
            for size, launch in LAUNCHES[target][4 if dtype == "float32" else 2].items():
                settings = (launch.block_q, launch.block_k, launch.warps, launch.stages)
                for dim in [size, *(d for d, at in PADDED.items() if at == (dtype, target))]:
                    if size // 2 < dim <= size:
                        variants = VARIANTS if dim in CORE and dtype != "float32" else FEWER
                        jobs += [(target, dtype, dim, settings, variant) for variant in variants]
    return jobs


def broken_limits(row: dict[str, Any]) -> list[str]:
    """What a row must hold and does not."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    broken = []
    if row["shared"] > row["shared_limit"]:
        broken.append(f"shared memory {row['shared']} > {row['shared_limit']}")
    forward = row["family"] == "forward"
    if row["target"].startswith("sm_") and row["dtype"] != "float32":
        if forward and row["loops"] != 2:
            broken.append(f"{row['loops']} loops with matrix products, expected 2")
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


def _write(
    path: Path, rows: list[dict[str, Any]], version: str, hashes: dict[str, str]
) -> None:
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
    parser.add_argument("--family", choices=FAMILIES, help="only this one; default: both")
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
        jobs: list[Any] = jobs_of(targets) if "forward" in families else []
        if "selection" in families:
            jobs += [row for target in targets for row in rows_of(target)]
        rows, hashes = explore(jobs, options.jobs), dict(started)
        if options.family:  # the other family's rows are as they were
            table = json.loads(options.output.read_text())
            rows += [row for row in table["rows"] if row["family"] != options.family]
            other = next(name for name in FAMILIES if name != options.family)
            hashes[other] = table["source_hashes"][other]
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
