"""The first hour with a board: everything that only a chip can show, in order, up to the first surprise.

    python scripts/first_hour.py
    python scripts/first_hour.py --simulator ~/ttsim                    # Tenstorrent's simulator in place of a board
    python -m models.board_mock N150 scripts/first_hour.py              # the steps themselves, without kernels
    python scripts/first_hour.py --from text --target meta-llama/Llama-3.2-1B-Instruct

Kernels come first, one op or one module against torch, then programs, then whole texts. The report is one file to send
back; it is written before and after each step, so that it says where a board that hangs has stopped. Exit code: 0 all
as expected, 1 a surprise, 2 bad input.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models import simulator
from models.cli.command import INTERRUPTED, Parser, run_command
from models.cli.environment import check_writable, date, machine, versions, write_json
from models.device import check_device
from models.errors import UserError

if TYPE_CHECKING:
    from models.boards import Board
    from scripts.board_steps.steps import Step

REPORT = "first-hour.json"
# A device that hangs then ends in an error of ttnn.
TIMEOUT = ("TT_METAL_OPERATION_TIMEOUT_SECONDS", "60")
STEPS = (
    "open linear prefill rows decode cache ids sums traces text identical long pair".split()
)  # names of `steps.all_steps`, known before ttnn is imported


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", metavar="DIR", help="run on ttsim, whose library is in this directory")
    parser.add_argument("--report", metavar="FILE", default=REPORT, help="to send back (default: %(default)s)")
    parser.add_argument("--from", dest="first", choices=STEPS, default=STEPS[0], help="begin with this step")
    parser.add_argument("--to", dest="last", choices=STEPS, default=STEPS[-1], help="end with this step")
    parser.add_argument("--target", help="your own target for the last step: a directory or hub id")
    parser.add_argument("--draft", help="and its draft")
    options = parser.parse_args(argv)
    if STEPS.index(options.first) > STEPS.index(options.last):
        raise UserError(f"--from {options.first} comes after --to {options.last}: exchange them")
    if options.draft and not options.target:
        raise UserError(f"--draft {options.draft} drafts for a target: name it with --target")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Set ttnn's variables, before it is imported."""
    if options.simulator is None:
        os.environ.setdefault(*TIMEOUT)
        return
    if "ttnn" in sys.modules:
        raise UserError("--simulator: this process has a mock board already: run the script without it")
    os.environ.update(simulator.environment(options.simulator))


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What is sent back."""

    file: str
    board: "Board"
    steps: list[dict[str, Any]] = field(default_factory=list)
    not_shown: list[dict[str, str]] = field(default_factory=list)
    verdict: str = "not complete"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.about = {
            "date": date(),
            "versions": versions(),
            "machine": machine("tt", self.board, self.board.timed),
            "uname": " ".join(platform.uname()),
            "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("TT_")}
            | {"MESH_DEVICE": os.environ.get("MESH_DEVICE")},
            "tt-smi": _tt_smi() if self.board.timed else None,
            "command": sys.argv,
        }

    def write(self) -> None:
        """The file as things stand."""
        left_out = [
            {"what": f"{step['name']}: {each['what']}", "why": each["why"]}
            for step in self.steps
            for each in step.get("left_out", [])
        ]
        write_json(
            self.file,
            {"verdict": self.verdict, "steps": self.steps, "not_shown": [*self.not_shown, *left_out], **self.about},
        )


def _tt_smi() -> str | None:
    """What tt-smi tells of cards, firmware and driver; None where it is not installed."""
    if shutil.which("tt-smi") is None:
        return None
    try:
        done = subprocess.run(["tt-smi", "-s"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"tt-smi -s: {error}"
    return done.stdout


# ---- the steps ------------------------------------------------------------------------------------------------------


def try_step(step: "Step", bench: Any, report: Report) -> bool:
    """Run one step and write down what came of it; False where it surprised."""
    from models.ttnn_llama.device.mesh import first_line
    from scripts.board_steps.record import Record, Surprise

    record = Record()
    told: dict[str, Any] = {"name": step.name, "shows": step.shows, "result": "began, and did not end"}
    report.steps.append(told)
    reason = step.impossible(bench.board)
    if reason:
        told["result"] = "not shown"
        told["left_out"] = [{"what": step.shows, "why": reason}]
        print(f"{step.name:10} not shown    {reason}")
        return True
    report.write()
    surprise, remedy = None, step.remedy
    try:
        step.run(bench, record)
    except Surprise as found:
        surprise = found
    except KeyboardInterrupt:
        told |= {"result": "interrupted", **record.as_dict()}
        raise
    except Exception as error:  # ttnn raises several classes
        surprise = Surprise(step.name, "no error", " ".join(first_line(error).split()))
        told["traceback"] = traceback.format_exception(error)
        if isinstance(error, UserError) and step.name == STEPS[0]:
            remedy = "then again"  # the line has said what to do
    told |= record.as_dict()
    if surprise is None:
        told["result"] = "as expected"
        print(f"{step.name:10} as expected  {record.summary}")
        return True
    told |= {"result": "surprise", "expected": surprise.expected, "came": surprise.came, "try": remedy}
    report.verdict = f"surprise in step {step.name}: {surprise}: {remedy}"
    return False


def command(argv: Sequence[str] | None) -> int:
    options = parse(argv)
    check_writable(options.report, "--report")
    prepare(options)
    check_device("tt")

    import torch
    from loguru import logger

    from models.ttnn_llama.device.mesh import detect_board
    from scripts.board_steps.bench import Bench
    from scripts.board_steps.steps import all_steps, never_shown

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    board = detect_board()
    steps = all_steps(options.target, options.draft)
    report = Report(options.report, board, not_shown=never_shown(board))
    print(f"{board.described}, report in {options.report}")
    bench = Bench(board)
    status = 0
    with torch.no_grad():
        try:
            for step in steps:
                if not STEPS.index(options.first) <= STEPS.index(step.name) <= STEPS.index(options.last):
                    report.steps.append({"name": step.name, "shows": step.shows, "result": "not asked for"})
                    continue
                if step.name == "text":
                    bench.close()  # texts open the board themselves
                if not try_step(step, bench, report):
                    status = 1
                    break
            else:
                done = sum(step["result"] == "as expected" for step in report.steps)
                report.verdict = f"{done} of {len(steps)} steps were run, all as expected"
        except KeyboardInterrupt:
            status, report.verdict = INTERRUPTED, f"interrupted in step {report.steps[-1]['name']}"
        finally:
            report.write()
            bench.close()
    print(report.verdict)
    for each in report.not_shown:
        print(f"not shown: {each['what']}: {each['why']}")
    return status


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
