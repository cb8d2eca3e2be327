"""A simulator in place of a board: which variables it needs, and what is refused; no simulator and no ttnn is used."""

import importlib.util
from types import SimpleNamespace

import pytest

from models import device, simulator
from models.boards import BOARDS, MOCK_VARIABLE, as_found, medium
from models.errors import UserError

WH, BH = "libttsim_wh.so", "libttsim_bh.so"


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A directory that stands for ttnn's package, with both chips' descriptors."""
    package = tmp_path / "ttnn"
    descriptors = package / "tt_metal/soc_descriptors"
    descriptors.mkdir(parents=True)
    for name, arch in (("wormhole_b0_80_arch", "WORMHOLE_B0"), ("blackhole_140_arch", "BLACKHOLE")):
        (descriptors / f"{name}.yaml").write_text(f"grid:\narch_name: {arch}\n")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return package


@pytest.fixture
def directory(tmp_path, wheel):
    """A directory for a simulator's files."""
    path = tmp_path / "sim"
    path.mkdir()
    return path


def refusal(directory, environ=None):
    with pytest.raises(UserError) as caught:
        simulator.environment(str(directory), environ or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("library", "asked", "board", "grid"),
    [(WH, None, "N150", "7,7"), (WH, "N150", "N150", "7,7"), (BH, None, "P150", "10,9"), (BH, "P150", "P150", "10,9")],
)
def test_the_library_decides_the_board_and_the_grid_is_the_boards(directory, library, asked, board, grid):
    (directory / library).touch()
    variables = simulator.environment(str(directory), {"MESH_DEVICE": asked} if asked else {})
    assert variables["MESH_DEVICE"] == board
    assert variables["TT_METAL_CORE_GRID_OVERRIDE_TODEPRECATE"] == grid
    assert variables["TT_METAL_SLOW_DISPATCH_MODE"] == variables["TT_METAL_DISABLE_SFPLOADMACRO"] == "1"


def test_where_both_chips_are_there_mesh_device_chooses(directory):
    for library in (WH, BH):
        (directory / library).touch()
    for asked, library in ((None, WH), ("N150", WH), ("P150", BH)):
        variables = simulator.environment(str(directory), {"MESH_DEVICE": asked} if asked else {})
        assert variables["TT_METAL_SIMULATOR"].endswith(library)


@pytest.mark.parametrize(("library", "arch"), [(WH, "WORMHOLE_B0"), (BH, "BLACKHOLE")])
def test_a_missing_descriptor_is_taken_from_the_wheel_and_nothing_is_written_beside_the_library(
    directory, library, arch
):
    (directory / library).write_text("the library")
    file = simulator.Path(simulator.environment(str(directory), {})["TT_METAL_SIMULATOR"])
    assert file.read_text() == "the library"
    assert f"arch_name: {arch}\n" in (file.parent / "soc_descriptor.yaml").read_text()
    assert [path.name for path in directory.iterdir()] == [library]


def test_a_descriptor_beside_the_library_is_used(directory):
    (directory / WH).touch()
    (directory / "soc_descriptor.yaml").write_text("arch_name: WORMHOLE_B0\n")
    assert simulator.environment(str(directory), {})["TT_METAL_SIMULATOR"] == str(directory / WH)


def test_a_descriptor_of_another_chip_is_refused(directory):
    (directory / WH).touch()
    for text, named in (("arch_name: BLACKHOLE\n", "blackhole"), ("", "no chip")):
        (directory / "soc_descriptor.yaml").write_text(text)
        message = refusal(directory)
        assert named in message and "wormhole_b0" in message and "remove it" in message


def test_what_is_missing_is_named(directory, wheel, monkeypatch):
    assert "no such directory" in refusal(directory / "nowhere")
    message = refusal(directory)
    assert WH in message and BH in message and simulator.RELEASES in message
    (directory / WH).touch()
    message = refusal(directory, {"MESH_DEVICE": "P150"})
    assert BH in message and WH not in message
    for path in (wheel / "tt_metal/soc_descriptors").iterdir():
        path.unlink()
    assert "wormhole_b0_80_arch.yaml is missing" in refusal(directory)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "ttnn is not installed" in refusal(directory)


def test_a_board_of_several_chips_is_refused(directory):
    (directory / WH).touch()
    message = refusal(directory, {"MESH_DEVICE": "T3K"})
    assert all(word in message for word in ("T3K", "8 chips", "N150", "P150"))


# ---------------------------------------------------------------------------------------- boards as they are found
@pytest.mark.parametrize(
    ("variables", "made_of", "timed", "traces"),
    [
        ({}, "silicon", True, True),
        ({"TT_METAL_SLOW_DISPATCH_MODE": "1"}, "silicon", True, False),
        ({"TT_METAL_SIMULATOR": "a.so", "TT_METAL_SLOW_DISPATCH_MODE": "1"}, "simulator", False, False),
        ({"TT_METAL_SIMULATOR": "a.so"}, "simulator", False, True),
        ({"TT_METAL_SIMULATOR": "a.so", MOCK_VARIABLE: "N300.yaml"}, "simulator", False, True),  # a cluster of chips
        ({MOCK_VARIABLE: "N300.yaml"}, "mock", False, False),
    ],
)
def test_a_board_is_what_the_variables_of_ttnn_make_it(variables, made_of, timed, traces):
    board = as_found(BOARDS["N150"], variables)
    assert (medium(variables), board.medium, board.timed, board.traces) == (made_of, made_of, timed, traces)
    assert board.described == ("N150" if made_of == "silicon" else f"{made_of} of an N150")


def test_a_simulator_is_accepted_as_a_device_and_a_missing_one_is_named(wheel, directory, monkeypatch):
    monkeypatch.setattr(device, "DEVICE_FILES", directory / "none")
    monkeypatch.setattr(device, "_warn_of_another_ttnn", lambda: None)
    monkeypatch.setenv("TT_METAL_SIMULATOR", str(directory / WH))
    with pytest.raises(UserError, match=f"TT_METAL_SIMULATOR=.*{WH}: there is no such file"):
        device.check_device("tt", {})
    (directory / WH).touch()
    device.check_device("tt", {})
