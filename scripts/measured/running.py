"""How long runs on a GPU are kept from losing what they found: a budget of seconds, functions that
run in processes of their own, and JSON files that are always whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from visattn._atomic import write_whole

__all__ = ["ROOT", "Budget", "apart", "no_gpu", "output_folder", "read_json", "reason", "save"]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 5  # seconds that a stopped process has to end
STARTS = threading.Lock()  # multiprocessing starts one at a time
Send = Callable[[Any], None]


class Budget:
    """Seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock, self._begin = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self._clock() - self._begin

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def say(self, text: str) -> None:
        """Print a line with the time that is left."""
        print(f"[{self.spent:4.0f} s, {self.left:4.0f} s left] {text}", flush=True)


def no_gpu() -> str | None:
    """The sentence for a machine without a GPU; None with one."""
    if torch.cuda.is_available():  # true for HIP as well
        return None
    return "error: this measures on a GPU, and torch sees none here; run it on a machine with one"


def output_folder() -> Path:
    """``$OUT``, or the folder of committed measurements."""
    return Path(os.environ.get("OUT") or ROOT / "assets" / "bench")


def save(path: Path, value: Any) -> None:
    """Write JSON; at any moment the file is whole, the last or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The value of a file that ``save`` wrote; empty if there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def apart(
    function: Callable[..., None], arguments: tuple[Any, ...], seconds: float, hear: Send
) -> str | None:
    """Run ``function(send, *arguments)`` in a process of its own, and hand what it sends to
    ``hear`` at once: an illegal access on the GPU, a crash or a hang loses nothing else.

    Returns:
        None, or why it did not end well.
    """
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, function, arguments))
    with STARTS:
        context.set_forkserver_preload(["torch", "triton"])  # neither touches a GPU at import
        process.start()
    there.close()
    end = time.monotonic() + seconds
    try:
        while here.poll(max(0.0, end - time.monotonic())):
            done, value = here.recv()
            if done:
                return None if value is None else str(value)
            hear(value)
        return f"stopped after {seconds:.0f} s"
    except EOFError:
        process.join(PATIENCE)
        return f"its process ended with exit code {process.exitcode}"
    finally:
        here.close()
        process.join(0.5)
        for stop in (process.terminate, process.kill):
            if process.is_alive():
                stop()
                process.join(PATIENCE)


def _run(connection: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    ended: str | None = None
    try:
        function(lambda value: connection.send((False, value)), *arguments)
    except BaseException as error:
        ended = reason(error)
    connection.send((True, ended))
    connection.close()
