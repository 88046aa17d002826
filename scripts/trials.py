"""Run one small case for every fault that was found by trying the product from outside.

    python scripts/trials.py                 all cases
    python scripts/trials.py --only WORD     the cases whose name has the word
    python scripts/trials.py --list          their names

Each case prints one line: whether it holds, its name and what was seen. The last line says how many
of them hold. The exit code is 0 only where all of them do. No case needs a GPU or a network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # new threads of Python have as many, too
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trial_cases.case import Case  # noqa: E402

from visattn._compat import ensure_torchvision  # noqa: E402
from visattn.runtime.temporary_files import temporary_folder  # noqa: E402


def named_cases() -> dict[str, Case]:
    """All cases by name: the file that they are in and their fault."""
    found: dict[str, Case] = {}
    for path in sorted((ROOT / "scripts" / "trial_cases").glob("*.py")):
        if path.stem in ("__init__", "case"):
            continue
        for case in importlib.import_module(f"trial_cases.{path.stem}").CASES:
            name = f"{path.stem}: {case.fault}"
            assert name not in found, f"two cases are named {name!r}"
            found[name] = case
    return found


def run_case(case: Case) -> tuple[bool, str]:
    """Whether a case holds, and one line on what was seen."""
    before = Path.cwd()
    quiet = io.StringIO()
    with temporary_folder() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                return True, case.run(folder)
        except Exception as error:  # a fault may be an exception of any type
            text = " ".join(str(error).split()) or "no message"
            return False, f"{type(error).__name__}: {text}"
        finally:
            os.chdir(before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="WORD", help="run the cases whose name has this word")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    args = parser.parse_args(argv)
    ensure_torchvision()
    chosen = {
        name: case
        for name, case in named_cases().items()
        if args.only is None or args.only.lower() in name.lower()
    }
    if args.list:
        print("\n".join(chosen))
        return 0
    from diffusers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    held = 0
    with temporary_folder() as cache, mock.patch.dict(os.environ, VISATTN_CACHE=str(cache)):
        for name, case in chosen.items():
            began = time.monotonic()
            good, seen = run_case(case)
            held += good
            seconds = time.monotonic() - began
            print(f"{'ok  ' if good else 'FAIL'} {name}: {seen} ({seconds:.1f} s)", flush=True)
    print(f"{held} of {len(chosen)}")
    return 0 if held == len(chosen) and chosen else 1


if __name__ == "__main__":
    raise SystemExit(main())
