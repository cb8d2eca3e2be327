"""The exceptions that stand for a user's mistake, and what counts as text."""

import re

_OPTION = re.compile(r"\[(\w+)(=False)?\]")


class UserError(Exception):
    """Something the user can put right: one line that names what is wrong, the value, and the remedy.

    Command lines print it as ``error: ...`` on stderr and exit with code 2; it never shows a traceback.

    Args:
        text: the message; what other programs and files add to it may have several lines, which become one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()) if len(text.splitlines()) > 1 else text)


def is_text(value: str) -> bool:
    """Whether a string is Unicode text. Half a surrogate pair, from bytes or JSON that hold none, is not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_words(error: BaseException) -> str:
    """What was raised, as one line that keeps neither the error nor its frames alive."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class NotFinite(UserError):
    """A target whose numbers are NaN or infinite: nothing that it says means anything."""


class OptionError(UserError):
    """An option that has no meaning, or not with another one.

    Args:
        text: the message, in which options stand in brackets: ``[tree_nodes]``, ``[trace=False]``. The message names
            them as Python does; `as_flags` as a command line does.
    """

    def __init__(self, text: str) -> None:
        super().__init__(_OPTION.sub(lambda match: match[1] + (match[2] or ""), text))
        self.as_flags = _OPTION.sub(_flag, text)


def _flag(match: re.Match) -> str:
    return ("--no-" if match[2] else "--") + match[1].replace("_", "-")
