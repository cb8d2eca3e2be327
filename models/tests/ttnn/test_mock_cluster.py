"""The mock boards: what switches them on, what they are, and that nothing else is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.board_mock import cluster
from models.boards import BOARDS, MOCK_VARIABLE
from models.errors import UserError

ROOT = Path(__file__).parents[3]

OPEN = """
import sys
from models.board_mock import cluster
from models.boards import BOARDS
if len(sys.argv) > 1:
    cluster.activate(sys.argv[1])
import ttnn
shape = BOARDS[cluster.mock_board()].mesh_shape
options = {}
if shape != (1, 1):
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D)
    options["dispatch_core_config"] = ttnn.DispatchCoreConfig(ttnn.DispatchCoreType.WORKER)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(*shape), **options)
x = ttnn.zeros((1, 1, 32, 32), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
if shape != (1, 1):
    ttnn.all_reduce(x)
grid = mesh.compute_with_storage_grid_size()
print(ttnn.get_arch_name(), ttnn.get_num_devices(), tuple(mesh.shape), (grid.x, grid.y), list(ttnn.silu(x).shape))
ttnn.close_mesh_device(mesh)
"""


def python(program, *arguments, home, **variables):
    """A process of Python without any setting of ttnn, started."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory where no mock was ever made."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.once
@pytest.mark.parametrize(
    "board, expected",
    [
        ("N150", "wormhole_b0 1 (1, 1) (8, 8)"),
        ("N300", "wormhole_b0 2 (1, 2) (8, 7)"),
        ("T3K", "wormhole_b0 8 (1, 8) (8, 7)"),
        ("P150", "blackhole 1 (1, 1) (11, 10)"),
        ("P150-12x10", "blackhole 1 (1, 1) (12, 10)"),
        ("P150-13x10", "blackhole 1 (1, 1) (13, 10)"),
        ("P300", "blackhole 2 (1, 2) (11, 10)"),
        ("P300x2", "blackhole 4 (1, 4) (11, 10)"),
    ],
)
def test_board_opens_whole_and_runs_an_operation_quietly(board, expected, home):
    run = python(OPEN, board, home=home)
    stdout, stderr = run.communicate(timeout=120)
    assert stdout == f"{expected} [1, 1, 32, 32]\n", stderr
    columns, rows = map(int, re.search(r"\((\d+), (\d+)\)$", expected).groups())
    assert cluster.board_of(board).worker_cores == columns * rows
    assert stderr == ""


@pytest.mark.once
def test_environment_switches_a_process_that_knows_nothing_of_the_mock(home, tmp_path):
    variables = cluster.environment("N150", tmp_path)
    stdout, stderr = python(OPEN, home=home, **variables).communicate(timeout=120)
    assert stdout.startswith("wormhole_b0 1"), stderr


@pytest.mark.once
def test_processes_that_make_the_runtime_root_at_once_all_succeed(tmp_path):
    runs = [python(OPEN, "N150", home=tmp_path) for _ in range(3)]
    outputs = [run.communicate(timeout=240) for run in runs]
    assert [stdout for stdout, _ in outputs] == ["wormhole_b0 1 (1, 1) (8, 8) [1, 1, 32, 32]\n"] * 3, outputs
    assert not [path for path in tmp_path.rglob("*") if re.search(r"\.\d+$", path.name)]  # half-written files


@pytest.mark.once
def test_what_the_user_set_for_the_log_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(cluster.LOG_LEVEL_VARIABLE, raising=False)
    assert cluster.environment("N150", tmp_path)[cluster.LOG_LEVEL_VARIABLE] == "error"
    monkeypatch.setenv(cluster.LOG_LEVEL_VARIABLE, "debug")
    assert cluster.environment("N150", tmp_path)[cluster.LOG_LEVEL_VARIABLE] == "debug"


def test_the_grid_of_a_board_is_the_one_that_its_mock_has(mesh_opener):
    """A simulator is given this grid, where it would have more cores."""
    grid = mesh_opener.open().compute_with_storage_grid_size()
    assert (grid.x, grid.y) == BOARDS[cluster.mock_board()].grid


@pytest.mark.once
def test_environment_changes_nothing_in_this_process(tmp_path):
    before = dict(os.environ)
    cluster.environment("T3K", tmp_path)
    assert dict(os.environ) == before


@pytest.mark.once
def test_mock_is_known_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(MOCK_VARIABLE, raising=False)
    assert not cluster.is_mock() and cluster.mock_board() is None
    for name, value in cluster.environment("T3K", tmp_path).items():
        monkeypatch.setenv(name, value)
    assert cluster.is_mock() and cluster.mock_board() == "T3K"


@pytest.mark.once
def test_unknown_board_names_the_known_ones():
    with pytest.raises(UserError, match=r"unknown board 'N151': use one of N150, N300, T3K .*, P150, P300, P300x2"):
        cluster.environment("N151")


@pytest.mark.once
def test_missing_ttnn_is_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ttnn is not installed"):
        cluster.environment("N150", tmp_path)


@pytest.mark.once
def test_cluster_needs_nothing_but_the_standard_library(home):
    program = "import sys, models.board_mock.cluster; print({'ttnn', 'torch', 'loguru'} & set(sys.modules))"
    assert python(program, home=home).communicate(timeout=60)[0] == "set()\n"


@pytest.mark.once
def test_activate_after_the_import_of_ttnn_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ttnn", sys)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="before the first import of ttnn"):
        cluster.activate("N150", tmp_path)
    assert dict(os.environ) == before


@pytest.mark.once
def test_runtime_root_only_links_into_the_package(tmp_path):
    package = Path(cluster.importlib.util.find_spec("ttnn").submodule_search_locations[0])
    before = {path.name: path.stat().st_mtime_ns for path in package.iterdir()}
    cluster.environment("N150", tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in package.iterdir()} == before
    assert (tmp_path / "tt_metal").readlink() == package / "tt_metal"


@pytest.mark.once
def test_home_that_cannot_hold_the_runtime_root_is_avoided(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    fallback = tmp_path / "temporary"
    fallback.mkdir()
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(fallback))
    for home in (tmp_path / "file", tmp_path / "a b"):  # not a directory; a blank, where ttnn builds shell commands
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert Path(cluster.environment("N150")["TT_METAL_RUNTIME_ROOT"]).is_relative_to(fallback)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Path(cluster.environment("N150")["TT_METAL_RUNTIME_ROOT"]).is_relative_to(tmp_path / "cache")


@pytest.mark.once
def test_unusable_arguments_of_the_runner_are_one_line(home):
    for arguments, expected in (
        (["N150"], "error: usage: python -m models.board_mock"),
        (["N151", __file__], "error: unknown board 'N151'"),
        (["N150", "no_such_script.py"], "error: no such script: no_such_script.py"),
    ):
        run = python("import runpy; runpy.run_module('models.board_mock', run_name='__main__')", *arguments, home=home)
        _, stderr = run.communicate(timeout=60)
        assert run.returncode == 2 and stderr.startswith(expected) and stderr.count("\n") == 1
