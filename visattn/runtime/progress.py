"""Progress of long work on stderr: a bar in a terminal or a notebook, else plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from visattn.runtime.processes import processes

__all__ = ["Progress", "ProgressBar", "close_bars"]

# Called as work proceeds, with the name of the stage, the number of finished parts, the number of
# all parts, and the estimated seconds that are left (None: not known).
Progress = Callable[[str, int, int, float | None], None]

_BARS: WeakSet[Any] = WeakSet()


class ProgressBar:
    """Shows the progress of work in stages. Its instances are ``Progress`` functions.

    In a terminal and in a notebook each stage has a tqdm bar. Elsewhere, and if several processes
    run, each stage writes about ten lines.

    Args:
        label: the name of the work, such as ``line 3``. Without a label, the output of several
            processes begins with the number of the process.
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
    """Close the bars of interrupted work, so that later output starts on a new line."""
    for bar in list(_BARS):
        bar.close()


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this process, by the same test as ``tqdm.auto``."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
