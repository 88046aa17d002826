"""The command ``visattn``: a table of sub-commands, which read arguments and return their output.

Wrong input ends with exit code 2 and one line on stderr; nothing is printed on stdout before a
command ends. Where parts of the work failed and the rest was done, the exit code is 1 and stderr
has a line for each. An error of any type is one line; with ``VISATTN_DEBUG=1`` in the environment
its traceback is shown before it.
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
    """A sub-command: its line in the help, its arguments, what it prints, and whether several
    processes may run it at once: they share its work, or it has none."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str | Output]
    shared: bool = False


COMMANDS = {
    "generate": Command(
        "make a video from a prompt, dense or by a plan",
        generate.add_arguments,
        generate.run,
        shared=True,
    ),
    "compare": Command(
        "measure how far two outputs or two plans are apart", compare.add_arguments, compare.run
    ),
    "inspect": Command(
        "show what the attention heads of a model look at", inspect.add_arguments, inspect.run
    ),
    "search": Command(
        "find which attention each head needs: a plan, and a receipt of what it costs",
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
        "show a pattern, a plan, or what is different in another", show.add_arguments, show.run
    ),
    "bench": Command("measure on this machine", bench.add_arguments, bench.run),
    "env": Command(
        "print versions and devices, for bug reports", env.add_arguments, env.run, shared=True
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, error_line(f"{message}; see '{self.prog} --help'"))


def make_parser() -> Parser:
    """The parser of the whole command line."""
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
    """Run the command line; returns the exit code."""
    with _tidy_when_terminated():
        return _run(argv)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Inside, SIGTERM ends the command as an exception, so that no file is left that is not
    whole."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    own = threading.current_thread() is threading.main_thread()
    with suppress(ValueError):  # a process that waits for others sees no exception
        own = own and processes().world == 1
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
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
        if text:  # in one piece, between the lines of other processes
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
    except Exception as error:  # libraries raise all kinds
        debug = bool(os.environ.get(DEBUG))
        if debug:
            traceback.print_exc()
        hint = "" if debug or isinstance(error, REFUSALS) else f" ({DEBUG}=1 shows where)"
        sys.stderr.write(error_line(f"{sentence(error)}{hint}"))
        return FAILED
    return PARTLY_FAILED if failures or elsewhere else 0
