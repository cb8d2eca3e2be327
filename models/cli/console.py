"""What command lines show: consoles, progress bars on stderr, the memory that models need on a board."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loguru import logger
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from models.boards import Board
from models.ttnn_llama.weights.memory import COLUMNS, MemoryPlan, rows


class Terminal(Console):
    """A console that passes on, as BrokenPipeError, that its reader has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# ---------------------------------------------------------------------------------------------------- memory on boards
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


# ------------------------------------------------------------------------------------------------------ progress bars
@contextlib.contextmanager
def loading_bar(quiet: bool, timed: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function (role, tensors done, tensors in all, name) that moves a bar for each role; on stderr, then gone.
    ``timed`` shows seconds too."""
    clocks = [TimeElapsedColumn()] if timed else []
    with _progress(MofNCompleteColumn(), *clocks, quiet=quiet, transient=True) as progress:
        tasks = {}

        def moved(role: str, done: int, total: int, name: str) -> None:
            if role not in tasks:
                tasks[role] = progress.add_task(f"loading {role}", total=total)
            progress.update(tasks[role], completed=done)

        yield moved


@contextlib.contextmanager
def writing_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that adds bytes to a bar of ``total`` on stderr; it stays when all are written."""
    with _progress(DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"writing {what}", total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def measuring_bar(quiet: bool) -> Iterator["MeasuringBar"]:
    """A bar on stderr for the steps of a measurement, then gone."""
    columns = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with _progress(*columns, quiet=quiet, transient=True, auto_refresh=False) as progress:
        yield MeasuringBar(progress)


class MeasuringBar:
    """Drawn between measurements only: a thread that refreshes it would take time from them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._drawn = progress, 0.0
        self._task: TaskID | None = None

    def begin(self, steps: int, what: str) -> None:
        """So many steps from now on."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=steps)
        self._progress.refresh()

    def step(self, what: str = "") -> None:
        """One step is done."""
        assert self._task is not None, "begin comes first"
        self._progress.update(self._task, advance=1, description=what or None)
        if time.monotonic() - self._drawn > 0.2:
            self._progress.refresh()
            self._drawn = time.monotonic()


@contextlib.contextmanager
def stage_bars() -> Iterator["StageBars"]:
    """A bar on stderr for each stage of a long job, with the time left; a line a minute where that is no terminal."""
    with _progress(TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True)) as progress:
        yield StageBars(progress)


class StageBars:
    """Moved by the share of a stage that is done."""

    QUIET_S = 60.0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, float]] = {}  # time and share where a stage was found
        self._told = 0.0

    def moved(self, stage: str, share: float, text: str) -> None:
        """`share` of a stage is done, 0 to 1; `text` says more."""
        now = time.monotonic()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0)
            self._began[stage] = now, share
        self._progress.update(self._tasks[stage], completed=share, description=f"{stage}: {text}")
        if self._progress.disable and (now - self._told >= self.QUIET_S or share >= 1):
            self._told = now
            began, first = self._began[stage]
            gained = share - first
            left = f", {(now - began) / gained * (1 - share) / 60:.0f} min left" if gained > 0 else ""
            logger.info(f"{stage} {100 * share:.1f} %: {text}{left}")


def _progress(*columns: ProgressColumn, quiet: bool = False, **options: Any) -> Progress:
    """Bars on stderr with a text before them; nothing with ``quiet`` and where stderr is no terminal."""
    off = quiet or not sys.stderr.isatty()
    first = TextColumn("{task.description}"), BarColumn()
    return Progress(*first, *columns, console=Console(stderr=True), disable=off, **options)
