"""Which kind of pattern suits which head: the error of every pattern at equal executed blocks.

    python scripts/head_errors.py

The small model generates densely at its evaluation shape. At some steps the queries, keys and
values of every layer are kept, and each pattern, fitted to the same share of executed key blocks,
computes them again; the error of a head is ``|W (o - o')|^2 / |W o|^2`` with its columns ``W`` of
the output projection. Stencils are learned, and shares fitted, on other prompts than the ones that
are reported. A pattern that cannot execute so little is measured at its least and is no candidate
(kind ``over``). SkipList and Reuse are left out: what they keep depends on the steps before. Writes
assets/tables/head_errors.json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import visattn  # noqa: E402
from visattn.generation import default_model, shape_of  # noqa: E402

# visattn mends a torchvision that does not fit, which diffusers would import
# isort: split
import torch  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from head_table.drawing import draw  # noqa: E402
from head_table.families import (  # noqa: E402
    BLOCK,
    ORACLE,
    dynamic_families,
    is_static,
    static_families,
)
from head_table.measure import (  # noqa: E402
    Result,
    fit,
    measured,
    record,
    stencils,
    with_stencils,
    without_counts,
)

from visattn.draw.canvas import save_png  # noqa: E402
from visattn.selectors import Selector  # noqa: E402

TABLE = ROOT / "assets" / "tables" / "head_errors.json"
LEARN = ("a blue circle moves up over the snow", "a yellow two moves left over the night")
REPORT = ("a red square moves right over the fog", "a green four moves down over the sand")
STEPS = (1, 5, 9)  # of 12
POOLED = "top blocks + pooled"
CANDIDATES = ("static", "dynamic")


def row(name: str, kind: str, pattern: str, results: list[Result]) -> dict[str, Any]:
    """A line of the table."""
    values = torch.stack([found.error for found in results])
    return {
        "name": name,
        "kind": kind,
        "pattern": pattern,
        "executed": round(sum(found.executed for found in results) / len(results), 4),
        "mean": round(float(values.mean()), 5),
        "errors": [[round(x, 5) for x in layer] for layer in values.tolist()],
    }


def best(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The name of the best candidate for each head of each layer."""
    own = [line for line in rows if line["kind"] in CANDIDATES]
    which = torch.tensor([line["errors"] for line in own]).argmin(0)
    return [[own[n]["name"] for n in layer] for layer in which.tolist()]


def compare(density: float) -> dict[str, Any]:
    """The table."""
    pipe = WanPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    shape = shape_of(default_model(), "evaluation")
    learn = record(pipe, LEARN, STEPS, shape)
    report = record(pipe, REPORT, STEPS, shape)
    own = stencils(learn, density)
    results = [with_stencils(mine, calls) for mine, calls in zip(own, report, strict=True)]
    rows = [row("stencil, learned", "static", "one for each head", results)]
    for name, family in (static_families() | dynamic_families(density)).items():
        pattern, fits = fit(family, density, learn)
        kind = "static" if is_static(pattern) else "dynamic"
        kind = "oracle" if name == ORACLE else kind if fits else "over"
        rows.append(row(name, kind, repr(pattern), [measured(pattern, calls) for calls in report]))
        say(rows[-1])
        if name == POOLED:
            assert isinstance(pattern, Selector)
            results = [without_counts(pattern, calls) for calls in report]
            rows.append(row(f"{POOLED}, without + ln n", "check", repr(pattern), results))
            say(rows[-1])
    rows.sort(key=lambda line: (line["kind"] != "oracle", line["mean"]))
    return {
        "model": "assets/models/tiny-wan",
        "command": f"python scripts/head_errors.py --density {density}",
        "versions": {"visattn": visattn.__version__, "torch": torch.__version__},
        "layout": str(report[0].seen[0].layout),
        "block": BLOCK,
        "density": density,
        "steps": STEPS,
        "prompts": {"learned on": LEARN, "reported": REPORT},
        "error": "|W (o - o')|^2 / |W o|^2 of each head, mean over calls",
        "best": best(rows),
        "rows": rows,
    }


def say(line: dict[str, Any]) -> None:
    print(f"{line['name']}: {line['mean']:.4f} at {line['executed']:.3f}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.25, help="executed share of the blocks")
    parser.add_argument("--output", type=Path, default=TABLE)
    args = parser.parse_args()
    with torch.no_grad():
        value = compare(args.density)
    args.output.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    save_png(draw(value), args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
