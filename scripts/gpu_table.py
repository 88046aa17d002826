"""All that is asked of a GPU, in one command: speed beside dense attention, FlexAttention and
flash's gradients, denoising steps, the tests that need one, and a sanitizer.

    python scripts/gpu_table.py --seconds 540
    python scripts/gpu_table.py --only j,k --seconds 300     # the other sections' results are kept

Sections run in processes of their own, what is worth most first; one that fails or runs out of
time loses none of the others, nor what it found before. ``gpu-table.json`` is written after each
finding: rows of numbers, and for each limit the value, the limit and whether it holds. Every kernel
is checked on some rows before it is timed. The exit code is 1 where a section failed or a limit
does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from measured.running import (  # noqa: E402
    Budget,
    Send,
    apart,
    no_gpu,
    output_folder,
    read_json,
    save,
)
from measured.sections import SECTIONS, Report, small_run  # noqa: E402

from visattn._version import __version__  # noqa: E402

LEAST = 10  # seconds that a section is begun with
RESERVE = 5  # seconds kept for the end
Start = Callable[[Callable[..., None], tuple[Any, ...], float, Send], str | None]
Table = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    listed = ", ".join(f"{key} {section.title}" for key, section in sorted(SECTIONS.items()))
    parser.add_argument("--only", metavar="a,c", help=f"sections: {listed}")
    parser.add_argument("--seconds", type=float, default=540, help="in all (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: $OUT or assets/bench)")
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [key for key in wanted if key not in SECTIONS]:
        parser.error(f"--only {','.join(unknown)}: the sections are {','.join(sorted(SECTIONS))}")
    sentence = no_gpu()
    if sentence is not None:
        print(sentence, file=sys.stderr)
        return 2
    if options.small_run:
        small_run()
        return 0
    budget = Budget(options.seconds)
    path = (options.out or output_folder()) / "gpu-table.json"
    head = {
        "device": torch.cuda.get_device_name(),
        "visattn": __version__,
        "torch": torch.__version__,
    }
    before = read_json(path)
    same = all(before.get(name) == value for name, value in head.items())
    value: Table = head | {"commands": [], "sections": {}}
    if same and options.only:
        value |= {name: before[name] for name in ("commands", "sections")}
    value["commands"].append(
        " ".join(["python scripts/gpu_table.py", *(arguments or sys.argv[1:])])
    )
    run(wanted, value["sections"], budget, keep=lambda: save(path, value))
    print(summary(value["sections"]))
    ran = [value["sections"][key] for key in wanted]
    return int(any(x["ended"] != "well" or not all(m["holds"] for m in x["musts"]) for x in ran))


def run(
    wanted: Sequence[str],
    found: Table,
    budget: Budget,
    *,
    keep: Callable[[], None],
    start: Start = apart,
) -> None:
    """Run sections in the table's order into ``found``, and ``keep`` it after each finding."""
    for key, section in SECTIONS.items():
        if key not in wanted:
            continue
        own: Table = {"title": section.title, "ended": "under way", "rows": [], "musts": []}
        found[key] = own
        seconds = min(section.seconds, budget.left - RESERVE)
        if seconds < LEAST:
            own["ended"] = "not run: no time was left"
            keep()
            continue
        budget.say(f"{key}: {section.title}, at most {seconds:.0f} s")
        begin = budget.spent

        def hear(message: tuple[str, Table], key: str = key, own: Table = own) -> None:
            kind, content = message
            own[kind].append(content)
            keep()
            budget.say(f"{key}: {verdict(content) if kind == 'musts' else content['name']}")

        own["ended"] = start(section_of, (key, seconds), seconds, hear) or "well"
        own["seconds"] = round(budget.spent - begin, 1)
        keep()
        if own["ended"] != "well":
            budget.say(f"{key}: {own['ended']}")


def section_of(send: Send, key: str, seconds: float) -> None:
    """A section, in whatever process it runs; commands that it calls end a little before it."""
    SECTIONS[key].run(Report(send, 0.95 * seconds))


def verdict(must: Table) -> str:
    """A limit and whether it holds, in a line."""
    value = "none" if must["value"] is None else f"{must['value']:.4g}"
    why = f" ({must['why']})" if must.get("why") else ""
    holds = "holds" if must["holds"] else "FAILS"
    return f"{holds}  {value:>8} {must['sense']} {must['limit']:<6g} {must['what']}{why}"


def summary(found: Table) -> str:
    """All limits, and what did not run."""
    lines = [""]
    for key in (key for key in SECTIONS if key in found):
        own = found[key]
        lines.append(f"{key}. {own['title']}: {own['ended']}, {own.get('seconds', 0):.0f} s")
        lines += [f"   {verdict(must)}" for must in own["musts"]]
        for row in own["rows"]:
            if "not run" in row:
                lines.append(f"   not run: {row['name']}: {row['not run']}")
    verdicts = [must["holds"] for own in found.values() for must in own["musts"]]
    whole = sum(own["ended"] == "well" for own in found.values())
    lines.append(
        f"{sum(verdicts)} of {len(verdicts)} limits hold; {whole} of {len(found)} sections ended "
        "well"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
