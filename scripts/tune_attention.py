"""Measure candidates of the launch tables on the GPU at hand, and say what their entries should be.

    python scripts/tune_attention.py --seconds 540
    python scripts/tune_attention.py --seconds 540 --resume     # goes on where it ended

Forward: queries and keys of a block, warps, stages, tensor descriptors; gradients: blocks, parts,
warps, stages. Each candidate runs on maps of full blocks, of mostly partial ones, and of the radial
rule, at the length of a model, and is checked on some rows before it is timed in turn with the
committed settings; one that does not compile, does not fit or is wrong is recorded with the reason.
Candidates are compiled in parallel in processes of their own, those nearest to the committed
entries first. The file ``tuning-<target>.json`` is written after each; nothing in ``kernels/`` is
changed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
import triton  # noqa: E402
from compile_matrix import source_hashes  # noqa: E402
from measured.candidates import committed, fields  # noqa: E402
from measured.running import (  # noqa: E402
    Budget,
    apart,
    no_gpu,
    output_folder,
    read_json,
    save,
)
from measured.tuning import (  # noqa: E402
    DTYPES,
    MAPS,
    Bench,
    Job,
    Reasons,
    Record,
    jobs_of,
    try_maps,
    tune,
    words,
)

from visattn.bench import SHAPES  # noqa: E402
from visattn.kernels.targets import BackwardLaunch, Launch, target_of  # noqa: E402

MARGIN = 0.02  # by which settings must be faster than the committed ones to replace them
TRIAL = 120.0  # seconds that compiling and running a candidate on all maps may take
TABLES = {"forward": ("LAUNCHES", Launch), "backward": ("BACKWARD", BackwardLaunch)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540, help="in all (default %(default)s)")
    parser.add_argument("--kind", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--head-size", nargs="+", type=int, choices=(16, 32, 64, 128, 256), default=[128, 64]
    )
    parser.add_argument("--shape", choices=SHAPES, default="wan-1.3b-480p", metavar="NAME")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--resume", action="store_true", help="keep what the file holds already")
    parser.add_argument("--output", type=Path, help="(default: tuning-<target>.json in $OUT)")
    options = parser.parse_args(arguments)
    sentence = no_gpu()
    if sentence is not None:
        print(sentence, file=sys.stderr)
        return 2
    budget = Budget(options.seconds)
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    path = options.output or output_folder() / f"tuning-{target}.json"
    bench = Bench(target, options.shape, options.heads, repeats=options.repeats)
    value = head(bench) | {"command": command(arguments), "records": []}
    if options.resume:
        try:
            value["records"] = resumed(value, read_json(path))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    jobs = jobs_of(target, options.kind, options.dtype, options.head_size)
    budget.say(f"{len(jobs)} candidates, {len(value['records'])} measured before")
    with ThreadPoolExecutor(options.workers) as pool:

        def try_out(batch: list[Job]) -> list[Reasons]:
            return list(pool.map(lambda job: trial(bench, job, budget), batch))

        left = tune(
            jobs,
            value["records"],
            budget,
            try_out=try_out,
            measure=bench.measure,
            keep=lambda: save(path, value),
            width=options.workers,
        )
    rows = summary(target, value["records"])
    save(path, value | {"summary": rows, "candidates_left": left})
    print(table(target, rows, left))
    return 0


def trial(bench: Bench, job: Job, budget: Budget) -> Reasons:
    """For each map, None or why a candidate does not run on it."""
    found: Reasons = {}
    seconds = max(1.0, min(TRIAL, budget.left))
    ended = apart(try_maps, (bench, job), seconds, lambda pair: found.update([pair]))
    return {name: found.get(name, ended) for name in MAPS}


def head(bench: Bench) -> Record:
    """What the numbers are of; a run goes on with a file only where this is equal."""
    return {
        "device": torch.cuda.get_device_name(),
        "target": bench.target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": {name: source_hashes()[name] for name in ("forward", "backward")},
        "shape": bench.shape,
        "tokens": bench.layout.length,
        "heads": bench.heads,
        "repeats": bench.repeats,
        "maps": {
            name: {"pattern": str(x), "density": x.density(bench.layout)}
            for name, x in MAPS.items()
        },
    }


def command(arguments: list[str] | None) -> str:
    return " ".join(["python scripts/tune_attention.py", *(arguments or sys.argv[1:])])


def resumed(now: Record, before: Record) -> list[Record]:
    """The records of an earlier run.

    Raises:
        ValueError: it was of something else.
    """
    own = {key: value for key, value in now.items() if key not in ("command", "records")}
    other = [key for key, value in own.items() if before and before.get(key) != value]
    if other:
        raise ValueError(f"--resume: the file is of another {', '.join(other)}; leave --resume out")
    return list(before.get("records", []))


def summary(target: str, records: list[Record]) -> list[Record]:
    """For each kind, dtype and head size: the best of each map and of all maps together (least
    geometric mean of the ratios to the committed settings), and what the entry should be."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        place = (record["kind"], record["dtype"], record["head_size"])
        groups.setdefault(place, []).append(record)
    rows = []
    for (kind, dtype, size), own in groups.items():
        before = list(fields(committed(kind, target, size, DTYPES[dtype].itemsize)))
        row: dict[str, Any] = {"kind": kind, "dtype": dtype, "head_size": size}
        row |= {"committed": before, "measured": len(own), "maps": {}}
        for name in MAPS:
            timed = [x for x in own if "ratio" in x["maps"].get(name, {})]
            if timed:
                best = min(timed, key=lambda x: x["maps"][name]["ratio"])
                found = best["maps"][name]
                row["maps"][name] = {"settings": best["settings"]} | {
                    key: found[key] for key in ("seconds", "committed_seconds", "ratio")
                }
        whole = [x for x in own if all("ratio" in x["maps"].get(name, {}) for name in MAPS)]
        if whole:
            best = min(whole, key=mean_ratio)
            keep = mean_ratio(best) > 1 - MARGIN
            row["ratio"] = mean_ratio(best)
            row["best"] = best["settings"]
            row["entry"] = before if keep else best["settings"]
        row["not_run"] = sum("skipped" in x for record in own for x in record["maps"].values())
        row["wrong"] = sum("wrong" in x for record in own for x in record["maps"].values())
        rows.append(row)
    return rows


def mean_ratio(record: Record) -> float:
    """The geometric mean of a candidate's ratios."""
    ratios = [record["maps"][name]["ratio"] for name in MAPS]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def table(target: str, rows: list[Record], left: int) -> str:
    """The summary and the entries, as text."""
    lines = ["", "kind      dtype     head  map      committed ms   best ms   ratio  best"]
    entries = []
    for row in rows:
        name, make = TABLES[row["kind"]]
        for place, best in row["maps"].items():
            lines.append(
                f"{row['kind']:<10}{row['dtype']:<10}{row['head_size']:>4}  {place:<8}"
                f"{1e3 * best['committed_seconds']:>13.3f}{1e3 * best['seconds']:>10.3f}"
                f"{best['ratio']:>8.3f}  {words(make(*best['settings']))}"
            )
        size = f"{name}[{target!r}][{DTYPES[row['dtype']].itemsize}]  {row['head_size']}"
        if "entry" not in row:
            entries.append(f"{size}: nothing ran on every map")
        elif row["entry"] == row["committed"]:
            entries.append(f"{size}: {words(make(*row['committed']))},  # as it is")
        else:
            entries.append(f"{size}: {words(make(*row['entry']))},  # {row['ratio']:.3f} of before")
        entries[-1] += f"  {row['measured']} measured, {row['not_run']} maps not run"
        entries[-1] += f", {row['wrong']} WRONG" if row["wrong"] else ""
    lines += ["", "entries of kernels/targets.py:", *entries]
    lines += [f"{left} candidates were not reached"] if left else []
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
