"""Ctrl-C, SIGTERM and SIGHUP: always noted, and raised as KeyboardInterrupt only where that loses nothing.

A raised KeyboardInterrupt can be swallowed (in an import, in a destructor) and can cut a step in two. So a run holds
signals back and looks for them between tokens. Quick to import: commands catch signals before anything else.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
KEYBOARD = 128 + signal.SIGINT  # the exit code of a command that Ctrl-C has ended


class _Noted:
    """first: the signal that came first, if any did. count: how many came. patience: how many of those after `since`
    are only noted."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = self.since = self.patience = 0


_noted = _Noted()


def leave_at_once() -> None:
    """Until a command has begun, a signal ends the process with one line: there is nothing yet that could be lost."""
    _install(_leave)


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """While a command runs, signals are noted and raised as KeyboardInterrupt. Those that are ignored stay ignored
    (nohup, jobs in the background); where signals cannot be caught, as in a thread, nothing changes."""
    global _noted
    before, _noted = _noted, _Noted()
    handlers = _install(_note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _noted = before


@contextlib.contextmanager
def held(patience: int) -> Iterator[None]:
    """Inside, so many signals are only noted, for `check` to find; one more raises."""
    outer = _noted.patience
    _noted.patience, _noted.since = patience, _noted.count
    try:
        yield
    finally:
        _noted.patience, _noted.since = outer, _noted.count


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come."""
    if _noted.first is not None:
        raise KeyboardInterrupt


def exit_code(code: int) -> int:
    """A command's exit code, or that of the signal that came meanwhile: 130 for Ctrl-C, 143 for SIGTERM."""
    return code if _noted.first is None else 128 + _noted.first


def _install(handler: Callable[[int, FrameType | None], object]) -> dict[int, Handler]:
    """What handled the signals before, for those that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in CAUGHT}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _note(number: int, frame: FrameType | None) -> None:
    _noted.count += 1
    if _noted.first is None:
        _noted.first = number
    if _noted.count - _noted.since > _noted.patience:
        raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)
