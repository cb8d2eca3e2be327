"""Every test starts from the same seeds, offline, and without settings from the user's shell."""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from loguru import logger

from models.board_mock import cluster
from models.boards import BOARDS, medium

BOARD = os.environ.get("MESH_DEVICE")  # tt-metal's way to say which board a test runs on
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test never waits for a network
os.environ.pop("MESH_DEVICE", None)  # the demos honour it, the tests choose their own devices
COUNTS = os.environ.pop("TEST_COUNTS", None)  # a directory for `tally`'s sums; pytest that a test runs adds nothing
os.environ["HF_MODEL"] = "tiny"  # and models: none is fetched by default


def pytest_addoption(parser):
    parser.addoption(
        "--board",
        choices=list(BOARDS),
        default=BOARD if BOARD in BOARDS else "N150",
        help="Tenstorrent board of the ttnn tests (default: MESH_DEVICE, else N150)",
    )


def pytest_report_header(config):
    if not cluster.is_installed():
        return "board: none, ttnn is not installed"
    made_of = medium() if cluster.has_board() else "mock, numbers from golden functions"
    return f"board: {config.getoption('--board')} ({made_of})"


_COUNTED: Counter = Counter()


@pytest.fixture
def tally(request):
    """A counter of what a test has tried ("cases tried", "faults survived", ..): its sums end the run's output.

    Where the environment names a directory, TEST_COUNTS, they are left there too: scripts/test.sh adds up its parts.
    """
    counted: Counter = Counter()
    yield counted
    request.node.user_properties += [(f"tally {what}", count) for what, count in counted.items()]


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and "fault" in report.keywords:
        _COUNTED["faults survived"] += 1
    if report.when == "teardown":  # of tests in other processes too, where a plugin runs them there
        for what, count in report.user_properties:
            if what.startswith("tally "):
                _COUNTED[what.removeprefix("tally ")] += count


def pytest_terminal_summary(terminalreporter):
    if _COUNTED and COUNTS:
        lines = [f"{what}:{count}\n" for what, count in _COUNTED.items()]
        Path(COUNTS, f"{os.getpid()}.counts").write_text("".join(lines))
    if _COUNTED:
        terminalreporter.write_line(", ".join(f"{what}: {count:,}" for what, count in sorted(_COUNTED.items())))


@pytest.fixture(autouse=True, scope="session")
def padding_is_free():
    """Rows are padded alike on every machine, and layers are torch's: nothing is measured to decide it.

    `test_calibration.py` measures, and tests of compiled layers ask for them.
    """
    from models import loading
    from models.options import FREE_ROWS
    from models.torch_llama.calibration import ROWS, Calibration

    costs = {rows: 1.0 if rows <= FREE_ROWS else 1.1 for rows in ROWS}
    free = Calibration(1.0, costs, dict.fromkeys(ROWS, 0.0), "2026-01-01")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "calibrate", lambda *_: free)
        patch.setattr(loading, "compiles", lambda *_: False)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Seed torch, random and numpy before each test, so that none depends on the tests that ran before it."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def own_log():
    """A command sets where the log goes: the stream of one test, closed after it, is never the next one's."""
    yield
    logger.remove()
    logger.add(sys.__stderr__)


@pytest.fixture(scope="module")
def one_thread():
    """For modules of very small models, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
