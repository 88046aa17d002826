"""The command ``visattn``: a table of sub-commands, which read arguments and return their output.

Wrong input gives exit code 2 and one line on stderr. Output is printed only when a command ends. If
some parts of the work failed and the others were done, the exit code is 1 and stderr has one line
for each failure. Errors of all types are one line; with ``VISATTN_DEBUG=1`` in the environment the
traceback is printed before it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn

from visattn._version import __version__
from visattn.cli import bench, compare, env, generate, inspect, search, search_heads, show
from visattn.cli.output import Output, error_line, plain
from visattn.generation.errors import REFUSALS, sentence
from visattn.runtime.processes import one_process, processes
from visattn.runtime.progress import close_bars

__all__ = ["main"]

DEBUG = "VISATTN_DEBUG"  # the environment variable that shows the traceback of an error
PARTLY_FAILED, FAILED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 130, 141, 143


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        summary: the line in the help.
        add_arguments: adds the arguments to a parser.
        run: runs the command and returns its output.
        shared: whether several processes may run it together, to share its work.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str | Output]
    shared: bool = False


COMMANDS = {
    "generate": Command(
        "generate a video from a prompt, with dense attention or a plan",
        generate.add_arguments,
        generate.run,
        shared=True,
    ),
    "compare": Command(
        "measure the difference between two outputs or two plans",
        compare.add_arguments,
        compare.run,
    ),
    "inspect": Command(
        "show what the attention heads of a model look at", inspect.add_arguments, inspect.run
    ),
    "search": Command(
        "search a plan for a pipeline, and write it with a report of its speed and quality",
        search.add_arguments,
        search.run,
        shared=True,
    ),
    "search-heads": Command(
        "find the heads whose perturbation guides a pipeline best",
        search_heads.add_arguments,
        search_heads.run,
        shared=True,
    ),
    "show": Command(
        "show a pattern, a plan, or the differences of two plans", show.add_arguments, show.run
    ),
    "bench": Command("measure on this machine", bench.add_arguments, bench.run),
    "env": Command(
        "print versions and devices, for bug reports", env.add_arguments, env.run, shared=True
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, error_line(f"{message}; see '{self.prog} --help'"))


def make_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser("visattn", description="Sparse attention for image and video diffusion models.")
    parser.add_argument("--version", action="version", version=f"visattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    with _tidy_when_terminated():
        return _run(argv)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception in a ``with`` block, so that no incomplete file is left."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    can_handle = threading.current_thread() is threading.main_thread()
    with suppress(ValueError):  # a process that waits for others gets no exception
        can_handle = can_handle and processes().world == 1
    if not can_handle or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = make_parser().parse_args(argv)
        command = COMMANDS[args.command]
        if not command.shared:
            one_process(f"visattn {args.command}")
        try:
            output = command.run(args)
        finally:
            close_bars()  # before an error is written
        text, failures, elsewhere = output if isinstance(output, Output) else Output(output)
        encoding = sys.stdout.encoding or "utf-8"
        if text:  # one write, so that lines of other processes do not mix in
            whole = f"{plain(text)}\n"
            sys.stdout.write(whole.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        sys.stderr.writelines(map(error_line, failures))
    except SystemExit as stop:  # SIGTERM; or argparse: help, version, a usage error it has printed
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return PIPE_CLOSED
    except Exception as error:  # libraries raise errors of many types
        debug = bool(os.environ.get(DEBUG))
        if debug:
            traceback.print_exc()
        hint = "" if debug or isinstance(error, REFUSALS) else f" ({DEBUG}=1 shows where)"
        sys.stderr.write(error_line(f"{sentence(error)}{hint}"))
        return FAILED
    return PARTLY_FAILED if failures or elsewhere else 0
