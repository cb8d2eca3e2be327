"""Opening and closing a board through real ttnn, on the mock of the board under test (`--board`).

`mesh_cases.py` is a process of its own; each test here looks at one of its cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.board_mock import cluster
from models.boards import BOARDS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def board(pytestconfig):
    return BOARDS[pytestconfig.getoption("--board", None) or "N150"]


@pytest.fixture(scope="module")
def run(board):
    """The finished process, and its cases by name."""
    done = subprocess.run(
        [sys.executable, "-m", "models.tests.ttnn.mesh_cases"],
        cwd=ROOT,
        env={**os.environ, **cluster.environment(board.name)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout, done.stderr[-2000:]
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def cases(run):
    return run[1]


@pytest.fixture
def whole(board):
    """The calls that open and close all of the board."""
    shape = board.mesh_shape
    if board.chips == 1:
        return [f"open_mesh_device {shape}", f"close_mesh_device {shape}"]
    return [
        "set_fabric_config FABRIC_1D",
        f"open_mesh_device {shape}",
        f"close_mesh_device {shape}",
        "set_fabric_config DISABLED",
    ]


def test_the_process_that_opened_and_closed_the_board_ends_cleanly(run):
    done, _ = run
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_whole_board_works_and_is_closed_and_can_be_opened_again(board, cases, whole):
    for name in ("whole", "whole again"):
        assert cases[name]["error"] is None
        assert cases[name]["result"] == [[board.chips, [1, 1, 32, 64]]]
        assert cases[name]["calls"] == whole


def test_the_boards_memory_is_what_ttnn_can_allocate(board, cases):
    assert cases["memory"]["result"] == [board.dram_banks, board.dram_bytes]


def test_the_board_is_detected_and_mesh_device_may_choose_a_smaller_one(board, cases):
    found = cases["found"]
    assert found["board"] == board.name
    for name, other in BOARDS.items():
        if other.arch != board.arch:
            assert f"MESH_DEVICE={name} is a {other.arch}, found {board.arch}" in found[name]
        elif other.chips > board.chips:
            assert f"MESH_DEVICE={name} needs {other.chips} chips, found {board.chips}" in found[name]
        else:
            assert found[name] == name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("raises", "ValueError"),
        ("ctrl-c in the body", "KeyboardInterrupt"),
        ("ctrl-c while opening", "KeyboardInterrupt"),
        ("ctrl-c while closing", "KeyboardInterrupt"),
        ("closing fails", "UserError"),
        ("both fail", "ValueError"),
        ("other banks", "UserError"),
    ],
)
def test_the_board_is_closed_whatever_happens(cases, whole, name, kind):
    assert cases[name]["kind"] == kind, cases[name]["error"]
    assert cases[name]["calls"] == whole


def test_ctrl_c_while_opening_keeps_the_block_from_running(cases):
    assert cases["ctrl-c while opening"]["result"] is None
    assert cases["ctrl-c while closing"]["result"] is not None


def test_an_error_while_closing_is_reported_but_never_hides_the_blocks_own(run):
    done, cases = run
    assert "closing went wrong: reset the board with `tt-smi -r`" in cases["closing fails"]["error"]
    assert cases["both fail"]["error"] == "the body's own"
    logged = [line for line in done.stderr.splitlines() if "closing went wrong" in line and "tt-smi -r" in line]
    assert len(logged) == 1


def test_what_ttnn_says_while_opening_is_passed_on_in_one_line_with_the_reset_command(board, cases):
    error = cases["too large"]["error"]
    assert "4xT3K could not be opened" in error
    assert f"requires 32 devices, but only {board.chips} devices are available" in error
    assert error.endswith("reset the board with `tt-smi -r` and run the command again")
    assert "\n" not in error and "backtrace" not in error
    # the mesh never came to be; the fabric was on already
    closed = [call for call in cases["too large"]["calls"] if call.startswith(("close", "set_fabric_config DIS"))]
    assert closed == ["set_fabric_config DISABLED"]


def test_a_chip_that_is_not_the_boards_is_refused(board, cases):
    assert f"P100 has 7 DRAM banks a chip, the chip found has {board.dram_banks}" in cases["other banks"]["error"]


def test_the_draft_can_have_a_chip_of_its_own_and_children_close_before_the_parent(board, cases, whole):
    if board.chips == 1:
        assert "needs 2 chips" in cases["own chip"]["error"]
        assert cases["own chip"]["calls"] == []
        return
    target = {2: 1, 4: 2, 8: 4}[board.chips]
    assert cases["own chip"]["error"] is None
    assert cases["own chip"]["result"] == [[target, [1, 1, 32, 64]], [1, [1, 1, 32, 64]]]
    expected = [*whole[:2], f"close_mesh_device (1, {target})", "close_mesh_device (1, 1)", *whole[2:]]
    assert cases["own chip"]["calls"] == expected
    assert cases["own chip raises"]["error"] == "the body's own"
    assert cases["own chip raises"]["calls"] == expected
