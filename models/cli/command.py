"""What every command line of the project does alike: short errors, exit codes, a reader that goes away."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from models.cli import interrupts
from models.cli.text import visible
from models.errors import OptionError, UserError

USER_ERROR = 2
INTERRUPTED = interrupts.KEYBOARD
BROKEN_PIPE = 141  # what a shell reports for a program that lost its reader


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run_command(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code: its own, 2 for a mistake of the user's, 130 for Ctrl-C, 143 for SIGTERM,
    141 without a reader. Mistakes are one line on stderr, signals print `interrupted` there."""
    open_standard_streams()
    with interrupts.caught():
        try:
            return interrupts.exit_code(command())
        except UserError as error:
            tell(f"error: {one_line(error)}")
            return interrupts.exit_code(USER_ERROR)
        except KeyboardInterrupt:
            tell(interrupted)
            return interrupts.exit_code(INTERRUPTED)
        except BrokenPipeError:
            discard_stdout()
            return interrupts.exit_code(BROKEN_PIPE)
        except OSError as error:  # a full disk under stdout, a file that went away
            tell(f"error: {visible(str(error))}")
            discard_stdout()
            return interrupts.exit_code(USER_ERROR)


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr one that leads nowhere.

    Else the next file that is opened would take its number, and what is printed would end in that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def tell(line: str) -> None:
    """A line on stderr, if it takes one."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def one_line(error: UserError) -> str:
    """A mistake in one line, with options named as flags."""
    return visible(" ".join((error.as_flags if isinstance(error, OptionError) else str(error)).split()))


def discard_stdout() -> None:
    """Send what is still buffered nowhere, so that Python's own flush at exit does not complain."""
    _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
