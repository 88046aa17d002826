"""How far long work is, on stderr: a bar in a terminal or a notebook, else plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from visattn.runtime.processes import processes

__all__ = ["Progress", "ProgressBar", "close_bars"]

# Called as work proceeds: the stage, how many of its parts are done, of how many, and the seconds
# that the rest will take, or None where they are not known.
Progress = Callable[[str, int, int, float | None], None]

_BARS: WeakSet[Any] = WeakSet()


class ProgressBar:
    """Shows the stages of some work. It is a ``Progress``.

    In a terminal and in a notebook each stage has a bar of tqdm. Elsewhere, and where several
    processes run, each stage writes at most ten lines.

    Args:
        label: what the work belongs to, as in ``line 3``. Several processes are numbered where
            there is none.
        every: write a line for each call.
    """

    def __init__(self, label: str = "", *, every: bool = False) -> None:
        process = processes()
        if not label and process.world > 1:
            label = f"process {process.rank}"
        self.prefix = f"{label}, " if label else ""
        self.every = every
        self.draws = process.world == 1 and (sys.stderr.isatty() or _in_notebook())
        self.bar: Any = None
        self.stage = ""
        self.tenth = -1

    def __call__(self, stage: str, done: int, total: int, seconds_left: float | None) -> None:
        is_new = stage != self.stage or (self.bar is not None and done < self.bar.n)
        self.stage = stage
        if self.draws:
            self._draw(done, total, is_new)
            return
        tenth = 10 * done // max(1, total)
        if self.every or is_new or tenth != self.tenth:
            remaining = seconds_left is not None and done < total
            time = f", {seconds_left:.0f} s left" if remaining else ""
            sys.stderr.write(f"{self.prefix}{stage}: {done}/{total}{time}\n")
            sys.stderr.flush()
        self.tenth = tenth

    def _draw(self, done: int, total: int, is_new: bool) -> None:
        from tqdm.auto import tqdm

        if is_new and self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.bar is None:
            text = f"{self.prefix}{self.stage}"
            self.bar = tqdm(desc=text, total=total, initial=done, dynamic_ncols=True)
            _BARS.add(self.bar)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()


def close_bars() -> None:
    """End the line of each bar whose work was interrupted, so that what follows has its own."""
    for bar in list(_BARS):
        bar.close()


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process, as ``tqdm.auto`` finds it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
