"""Which model runs where none was named: a real chat model if it is there or can be fetched, else the embedded pair."""

import argparse
import sys

from models.errors import UserError
from models.fetch import fetched
from models.options import DEFAULT_TARGET

CHAT_MODEL = "smollm2"
CHAT_TOKENS, TOKENS = 80, 30  # of an answer, and of code that goes on


def is_open(options: argparse.Namespace) -> bool:
    """Whether parsed flags leave the models open. A board compiles for minutes: there the small pair is the default."""
    return not (options.target or options.draft) and options.device != "tt"


def everyday_target(options: argparse.Namespace) -> str:
    """The name of the model to run. Fetches it at the first time, and says what is done on stderr."""

    def tell(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    try:
        fetched(CHAT_MODEL, tell)
    except UserError as error:
        tell(f"{error}; the small pair of this project runs instead, which writes Python")
        return DEFAULT_TARGET
    return CHAT_MODEL
