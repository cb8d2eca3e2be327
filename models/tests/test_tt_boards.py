"""Boards and the check for one, where neither a board nor ttnn is needed."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loguru import logger

from models import device
from models.boards import BOARDS, MOCK_VARIABLE, board_named, board_of_environment
from models.errors import UserError
from models.ttnn_llama.device import mesh

ROOT = Path(__file__).parents[2]


@pytest.fixture
def warnings():
    """What is logged as a warning during the test; the warning about ttnn's version may come again."""
    lines = []
    handler = logger.add(lines.append, level="WARNING", format="{message}")
    device._warn_of_another_ttnn.cache_clear()
    yield lines
    device._warn_of_another_ttnn.cache_clear()
    logger.remove(handler)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with the pinned ttnn and an empty device directory, which is returned; off the mock."""
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: device.TTNN_VERSION)
    monkeypatch.setattr(device, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv(MOCK_VARIABLE, raising=False)
    return tmp_path


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------ boards
@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_every_chip_of_a_board_is_on_a_card_and_linked_to_the_others(board):
    wiring, chips = board.wiring, set(range(board.chips))
    assert sorted(chip for card in wiring.cards for chip in card) == sorted(chips)
    assert len(wiring.harvested) == board.chips and len(wiring.harvested_pcie) in (0, board.chips)
    assert len(set(wiring.places)) == len(wiring.places) and len(wiring.places) in (0, board.chips)
    reached = {0}
    for _ in chips:
        reached |= {chip for a, _, b, _ in wiring.links if reached & {a, b} for chip in (a, b)}
    assert reached == chips
    ends = [end for a, a_channel, b, b_channel in wiring.links for end in ((a, a_channel), (b, b_channel))]
    assert len(set(ends)) == len(ends)  # no channel has two links


def test_a_board_is_a_mock_where_ttnn_would_open_one(monkeypatch):
    class Ttnn:
        get_num_devices = staticmethod(lambda: 2)
        get_arch_name = staticmethod(lambda: "wormhole_b0")

    monkeypatch.setitem(sys.modules, "ttnn", Ttnn)
    for environ in ({}, {"MESH_DEVICE": "N300"}):
        monkeypatch.delenv(MOCK_VARIABLE, raising=False)
        board = mesh.detect_board(environ)
        assert (board, board.medium, board.timed, board.traces) == (BOARDS["N300"], "silicon", True, True)
        monkeypatch.setenv(MOCK_VARIABLE, "N300.yaml")
        board = mesh.detect_board(environ)
        assert (board, board.medium, board.timed, board.traces) == (BOARDS["N300"], "mock", False, False)


def test_a_board_knows_its_chips():
    chips = {"N150": 1, "N300": 2, "T3K": 8, "P150": 1, "P300": 2, "P300x2": 4}
    assert {name: board.chips for name, board in BOARDS.items()} == chips


@pytest.mark.parametrize(("chips", "name"), [(1, "P150"), (2, "P300"), (4, "P300x2")])
def test_blackhole_chips_are_known_by_their_number(monkeypatch, chips, name):
    class Ttnn:
        get_num_devices = staticmethod(lambda: chips)
        get_arch_name = staticmethod(lambda: "blackhole")

    monkeypatch.setitem(sys.modules, "ttnn", Ttnn)
    assert mesh.detect_board({}) == BOARDS[name]
    assert BOARDS[name].dram_bytes == BOARDS["P150"].dram_bytes and BOARDS[name].dram_gb_per_s == 512


def test_an_unknown_board_is_refused_with_the_names_there_are():
    assert board_named("N300").chips == 2
    with pytest.raises(UserError) as caught:
        board_named("TG")
    assert all(word in one_line(caught) for word in ("'TG'", "N150", "N300", "T3K", "P300", "P300x2 (QuietBox 2)"))


def test_mesh_device_names_the_board_and_may_be_unset():
    assert board_of_environment({"MESH_DEVICE": "T3K"}) is BOARDS["T3K"]
    assert board_of_environment({}) is None
    assert board_of_environment({"MESH_DEVICE": ""}) is None
    with pytest.raises(UserError, match=r"MESH_DEVICE=N9000.*N150, N300, T3K .*, P150, P300, P300x2 \(QuietBox 2\)"):
        board_of_environment({"MESH_DEVICE": "N9000"})


def test_the_target_gets_every_chip_or_the_power_of_two_beside_the_drafts():
    assert [mesh.target_chips(board) for board in BOARDS.values()] == [1, 2, 8, 1, 2, 4]
    assert mesh.target_chips(BOARDS["N300"], own_chip_for_draft=True) == 1
    apart = {name: mesh.target_chips(BOARDS[name], own_chip_for_draft=True) for name in ("T3K", "P300", "P300x2")}
    assert apart == {"T3K": 4, "P300": 1, "P300x2": 2}


@pytest.mark.parametrize("name", ["N150", "P150"])
def test_one_chip_cannot_be_parted_between_target_and_draft(name):
    with pytest.raises(UserError) as caught:
        mesh.target_chips(BOARDS[name], own_chip_for_draft=True)
    assert all(word in one_line(caught) for word in (name, "2 chips", "N300", "T3K", "P300x2 (QuietBox 2)"))


def test_of_an_error_of_ttnn_the_message_is_shown():
    fatal = RuntimeError("TT_FATAL @ /a/b.cpp:159: n <= m\ninfo:\nRequested 16, found 1.\nmore\nbacktrace:\n --- lib")
    assert mesh.first_line(fatal) == "Requested 16, found 1"
    assert mesh.first_line(RuntimeError("\nPlain words\nand more")) == "Plain words"
    assert (
        mesh.first_line(RuntimeError("TT_THROW @ /a/b.cpp:3\ninfo:\nbacktrace:\n --- lib")) == "TT_THROW @ /a/b.cpp:3"
    )
    assert mesh.first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("sfpi not found at /a/sfpi or /opt/tenstorrent/sfpi", "scripts/install_sfpi.py"),
        ("No chips detected in the cluster", "tt-smi -ls"),
        ("Fabric Router Sync: Timeout after 10000 ms", "tt-smi -r"),
    ],
)
def test_an_error_of_ttnn_is_one_line_with_what_helps_against_it(monkeypatch, said, remedy):
    class Ttnn:
        @staticmethod
        def get_num_devices():
            raise RuntimeError(f"TT_FATAL @ /a/b.cpp:129: condition\ninfo:\n{said}\nbacktrace:\n --- lib.so")

    monkeypatch.setitem(sys.modules, "ttnn", Ttnn)
    with pytest.raises(UserError) as caught:
        mesh.detect_board({})
    assert said in one_line(caught) and remedy in one_line(caught)
    assert ("tt-smi -r`" in one_line(caught)) == (remedy == "tt-smi -r")


@pytest.mark.parametrize("found", [(3, "blackhole"), (32, "wormhole_b0"), (2, "quasar")])
def test_chips_that_form_no_known_board_are_not_guessed_about(monkeypatch, found):
    class Ttnn:
        get_num_devices = staticmethod(lambda: found[0])
        get_arch_name = staticmethod(lambda: found[1])

    monkeypatch.setitem(sys.modules, "ttnn", Ttnn)
    with pytest.raises(UserError) as caught:
        mesh.detect_board({})
    assert f"found {found[0]} {found[1]} chips" in one_line(caught) and "MESH_DEVICE" in one_line(caught)


def test_boards_and_device_need_no_ttnn_and_no_torch():
    code = (
        "import sys; sys.modules['ttnn'] = sys.modules['torch'] = None\n"
        "import models.device, models.ttnn_llama.device.mesh as mesh\n"
        "from models.errors import UserError\n"
        "try: mesh.detect_board({})\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ttnn cannot be loaded")


# ------------------------------------------------------------------------------------------------ check_device
def test_without_a_board_tt_names_the_cpu_and_check_board(machine):
    with pytest.raises(UserError) as caught:
        device.check_device("tt", {"MESH_DEVICE": "N300"})
    message = one_line(caught)
    assert "no Tenstorrent board" in message and str(machine) in message
    assert "--device cpu" in message and "scripts/check_board.py" in message


def test_without_ttnn_tt_says_what_to_install_and_where_it_can_be(machine, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        device.check_device("tt", {})
    assert all(word in one_line(caught) for word in (f"pip install ttnn=={device.TTNN_VERSION}", "3.10 or 3.12", "cpu"))


def test_a_board_is_accepted_in_silence(machine, warnings):
    (machine / "0").touch()
    device.check_device("tt", {})
    device.check_device("tt", {"MESH_DEVICE": "N300"})
    assert warnings == []


def test_a_mock_board_is_accepted(machine, monkeypatch):
    monkeypatch.setenv(MOCK_VARIABLE, "N300.yaml")
    device.check_device("tt", {})


def test_an_unknown_mesh_device_is_refused_on_a_mock_board_too(machine, monkeypatch):
    monkeypatch.setenv(MOCK_VARIABLE, "N300.yaml")
    with pytest.raises(UserError, match="MESH_DEVICE=TG"):
        device.check_device("tt", {"MESH_DEVICE": "TG"})


def test_another_ttnn_is_warned_about_once_with_both_versions(machine, warnings, monkeypatch):
    (machine / "0").touch()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.70.0")
    device.check_device("tt", {})
    device.check_device("tt", {})
    assert len(warnings) == 1
    assert "0.70.0" in warnings[0] and device.TTNN_VERSION in warnings[0]


def test_a_ttnn_without_a_version_is_warned_about(machine, warnings, monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    (machine / "0").touch()
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    device.check_device("tt", {})
    assert "unknown version" in warnings[0]


def test_the_ttnn_that_is_expected_is_the_one_that_is_pinned():
    pinned = re.search(r'"ttnn==([^;"]+)', (ROOT / "pyproject.toml").read_text())
    assert pinned.group(1) == device.TTNN_VERSION


def test_a_single_model_is_not_loaded_onto_a_board():
    from models.loading import OpenedModel, load_model

    with pytest.raises(UserError, match="load_model puts a model on cpu or cuda"):
        load_model(OpenedModel("somewhere", None, None, 0.0), device="tt")
