"""A progress bar for loading weights onto a board."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def loading_bar(quiet: bool, timed: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function (role, tensors done, tensors in all, name) that moves a bar for each role; on stderr, then gone.
    ``timed`` shows seconds too."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()] + [TimeElapsedColumn()] * timed
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not sys.stderr.isatty()) as progress:
        tasks = {}

        def moved(role: str, done: int, total: int, name: str) -> None:
            if role not in tasks:
                tasks[role] = progress.add_task(f"loading {role}", total=total)
            progress.update(tasks[role], completed=done)

        yield moved
