"""Compiling a row for its target, and what the code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiled.rows import Row

MATRIX = re.compile(r"\b(UTC\w*MMA|HGMMA|QGMMA|HMMA|IMMA|DMMA|v_mfma_\w+)")
SPILL = re.compile(r"\b(STL|LDL)\b")


def compile_row(row: Row, family: Any) -> dict[str, Any]:
    """Compile a row of a family's module for its target; its place in the table and what it
    takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from visattn.kernels.targets import TARGETS

    kernel = family.kernel_of(row.kernel)
    signature, attributes = {}, {}
    for number, name in enumerate(kernel.arg_names):
        own = "constexpr" if name in row.constants else family.type_of(name, row)
        signature[name] = own
        if own.startswith("*") or name.startswith("stride_"):  # as a launch would find them
            attributes[(number,)] = [["tt.divisibility", 16]]
    target = TARGETS[row.target]
    source = getattr(family, "Source", ASTSource)
    compiled = triton.compile(
        source(kernel, signature, row.constants, attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": row.warps, "num_stages": row.stages},
    )
    found = {"shared": compiled.metadata.shared, "shared_limit": target.shared_bytes}
    loops = getattr(family, "loops_in", _loops)
    found |= _nvidia(compiled, loops) if target.backend == "cuda" else _amd(compiled)
    return row.place() | found


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _nvidia(compiled: Any, loops: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "stack": stack} | loops(sass)


def code_of(sass: str) -> list[tuple[int, str]]:
    """Addresses and instructions of a listing."""
    return [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]


def _loops(sass: str) -> dict[str, Any]:
    """Spills inside the first loop with matrix products (that of full blocks), and elsewhere."""
    code = code_of(sass)
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
