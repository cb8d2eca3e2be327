"""What came of the checks, for a terminal and as JSON."""

import argparse
import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from models.boards import Board
from models.cli.console import Terminal, memory_table
from models.ttnn_llama.weights import memory
from scripts.board_check.checks import Check, Usage
from scripts.board_check.question import Question

NOTE = (
    "This tells whether ttnn accepts every call and whether memory suffices. "
    "It tells nothing about speed, about what kernels compute, or about hangs."
)


@contextlib.contextmanager
def ttnn_silenced() -> Iterator[Terminal]:
    """Send the process's stdout and stderr nowhere, for what ttnn's C++ prints; yields a console on the real stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    faulthandler.enable(err)  # a crash within ttnn is not to be silent
    try:
        with open(os.devnull, "w") as nowhere, open(out, "w", encoding=sys.stdout.encoding, closefd=False) as screen:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield Terminal(file=screen, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        faulthandler.disable()
        os.close(out)
        os.close(err)


def line(check: Check) -> str:
    if check.legal:
        return f"legal      {check.what}  ({check.seconds:.1f} s)"
    at = f" ({check.where})" if check.where else ""
    return f"NOT LEGAL  {check.what}: {check.op or 'refused'}{at}: {check.reason}"


def show_plans(console: Console, board: Board, plans: dict[str, memory.MemoryPlan]) -> None:
    console.print(memory_table(board, plans))


def show_usage(console: Console, usages: dict[str, Usage], checks: list[Check]) -> None:
    columns = ("chips of", "DRAM kept", "running, at most", "of", "L1 at most", "of")
    table = Table(*columns, title="memory in use, per chip and per core", title_justify="left")
    for name, used in usages.items():
        own = [check for check in checks if len(usages) == 1 or check.what.startswith(name)]
        running, per_core = (max(getattr(c, field) for c in own) for field in ("dram_while_running", "l1_per_core"))
        table.add_row(
            name,
            *(f"{size / 1e9:.2f} GB" for size in (used.dram_kept, running, used.dram)),
            *(f"{size / 1e6:.2f} MB" for size in (per_core, used.l1_per_core)),
        )
    console.print(table)


def write_results(
    options: argparse.Namespace,
    asked: Question,
    plans: dict[str, memory.MemoryPlan],
    checks: list[Check],
    usages: dict[str, Usage],
    verdict: str,
) -> None:
    from models.cli.environment import versions, write_json

    parts = ("weights", "kv_cache", "activations", "traces", "total")
    planned = {name: {part: getattr(plan, part) for part in parts} for name, plan in plans.items()}
    results = {
        "board": options.mesh,
        "legal": verdict.startswith("LEGAL"),
        "verdict": verdict,
        "proved": NOTE,
        "planned_bytes_per_chip": planned,
        "checks": [asdict(check) for check in checks],
        "memory_in_use": {name: asdict(usage) for name, usage in usages.items()},
        "versions": versions(),
        "settings": vars(options),
    }
    write_json(options.json, results)
