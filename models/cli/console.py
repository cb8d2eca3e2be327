"""What is shown while models go onto a board: the memory they need, and a progress bar; both on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.boards import Board
from models.ttnn_llama.weights.memory import COLUMNS, MemoryPlan, rows


def memory_table(board: Board, plans: Mapping[str, MemoryPlan]) -> Table:
    """What each model takes of a chip's DRAM."""
    title = f"DRAM per chip, planned, of the {board.dram_bytes / 1e9:.2f} GB of {board.name}"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in rows(plans):
        table.add_row(*row)
    return table


def show_memory(board: Board, plans: Mapping[str, MemoryPlan]) -> None:
    """The table on stderr, whole also where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=120)
    console.print(memory_table(board, plans))


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
