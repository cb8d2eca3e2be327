"""What scripts/benchmark.py asks of a suite, and the flags that suites have in common."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from models.cli.arguments import (
    add_drafting_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_sampling_arguments,
    integer,
)
from models.cli.command import Parser
from models.cli.settings import RunSettings, settings_of
from models.device import check_device
from models.errors import UserError
from models.speculative.drafters.registry import NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = dict[str, Any]
OUTPUT_FLAGS = ("--mode", "--html", "--no-color", "--version")  # of the demos, without a meaning here


class Progress(Protocol):
    """Where a suite tells how far it is."""

    def begin(self, steps: int, what: str) -> None: ...
    def step(self, what: str = "") -> None: ...


class Suite(Protocol):
    """One suite: made from its own flags and those left over, which all suites share; a mistake in them is a UserError.

    `measure` may be interrupted by Ctrl-C at any moment; `results` then holds what was complete. `markdown` and
    `figure` read nothing but results.
    """

    title: str
    repeats: int  # by default

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None: ...
    def prepare(self) -> None: ...
    def measure(self, progress: Progress) -> None: ...
    def results(self) -> Results: ...

    @staticmethod
    def markdown(results: Results) -> str: ...

    @staticmethod
    def figure(results: Results) -> "Figure": ...


def model_settings(suite: str, rest: Sequence[str], refused: Sequence[str] = (), **chosen: Any) -> RunSettings:
    """Settings from the flags left over; `chosen` are fields that the suite decides itself.

    UserError for flags that the suite chooses itself, for --device tt, and for whatever has no meaning.
    """
    flags = {arg.split("=", 1)[0] for arg in rest}
    for flag in (*refused, *OUTPUT_FLAGS):
        if flag in flags:
            raise UserError(f"{flag} has no meaning in the suite {suite}: leave it out")
    parser = Parser(allow_abbrev=False, add_help=False)
    add_model_arguments(parser, os.environ)
    add_prompt_arguments(parser)
    add_drafting_arguments(parser)
    add_sampling_arguments(parser)
    given = parser.parse_args(rest)
    if given.device == "tt":
        raise UserError(f"--device tt: the suite {suite} measures on cpu and cuda, on a board use the demo")
    if given.drafter == NONE:
        raise UserError(f"--drafter none drafts nothing, which is no use in the suite {suite}: leave it out")
    check_device(given.device)
    settings_of(RunSettings, given, os.environ)  # what was typed has to have a meaning by itself
    return settings_of(RunSettings, given, os.environ, **chosen)


def integers(low: int, high: int | None = None) -> Callable[[str], list[int]]:
    """argparse type: whole numbers in [low, high] with commas between them; sorted, each once."""
    one = integer(low, high)
    return lambda text: sorted({one(part) for part in text.split(",")})


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """argparse type: some of the known names with commas between them, in their own order."""

    def parse(text: str) -> list[str]:
        wanted = [part.strip() for part in text.split(",")]
        for name in wanted:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known: choose from {', '.join(known)}")
        return [name for name in known if name in wanted]

    return parse
