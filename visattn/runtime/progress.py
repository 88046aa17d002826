"""Denoising steps on stderr: one line that is written over in a terminal, else a line a step, as
also with several processes."""

from __future__ import annotations

import sys

from visattn.runtime.processes import processes

__all__ = ["StepLine"]


class StepLine:
    """Shows steps as they are done, and nothing before the first.

    Args:
        label: what the steps belong to, as in ``line 3``; empty for the only generation.
    """

    def __init__(self, label: str) -> None:
        self.prefix = f"{label}: " if label else ""
        self.over = sys.stderr.isatty() and processes().world == 1

    def __call__(self, done: int, total: int, seconds: float) -> None:
        line = f"{self.prefix}step {done}/{total}, {seconds:.1f} s"
        if self.over:
            sys.stderr.write(f"\x1b[K{line}" + ("\n" if done == total else "\r"))
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
