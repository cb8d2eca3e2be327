"""What every command line of the project does alike: short errors, exit codes, a reader that goes away."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from models.cli.text import visible
from models.errors import OptionError, UserError

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a program that lost its reader


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run_command(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code: its own, 2 for a mistake of the user's, 130 for Ctrl-C, 141 without a
    reader. Mistakes are one line on stderr, Ctrl-C prints `interrupted` there."""
    try:
        return command()
    except UserError as error:
        print("error:", one_line(error), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    except OSError as error:  # a full disk under stdout, a file that went away
        print("error:", visible(str(error)), file=sys.stderr)
        discard_stdout()
        return USER_ERROR


def one_line(error: UserError) -> str:
    """A mistake in one line, with options named as flags."""
    return visible(" ".join((error.as_flags if isinstance(error, OptionError) else str(error)).split()))


def discard_stdout() -> None:
    """Send what is still buffered nowhere, so that Python's own flush at exit does not complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
