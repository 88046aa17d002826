"""The command ``visattn``: a table of sub-commands, which read arguments and return their output.

Wrong input ends with exit code 2 and one line on stderr; nothing is printed before a command ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from visattn import __version__
from visattn.cli import env, show

__all__ = ["main"]

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class Command(NamedTuple):
    """A sub-command: its line in the help, its arguments, and what it prints."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


COMMANDS = {
    "show": Command("draw a pattern: mask, block map, density", show.add_arguments, show.run),
    "env": Command("print versions and devices, for bug reports", env.add_arguments, env.run),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, error_line(f"{message}; see '{self.prog} --help'"))


def error_line(message: str) -> str:
    """One line for stderr, whatever the message holds."""
    return f"visattn: error: {' '.join(message.split())}\n"


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
    try:
        args = make_parser().parse_args(argv)
        text = COMMANDS[args.command].run(args)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except SystemExit as stop:  # from argparse: help, version, or a usage error it has printed
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return PIPE_CLOSED
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(error_line(str(error)))
        return FAILED
    return 0
