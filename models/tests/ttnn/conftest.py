"""Boards for the ttnn tests: silicon where there is some, else ttnn's mock of `--board`.

Without ttnn the tests of this directory are skipped. On a mock they run with zeros for values unless they ask for the
fixture `shadow`.
"""

import pytest

from models.board_mock import cluster
from models.boards import BOARDS
from models.ttnn_llama.device.mesh import L1_SMALL_BYTES

MISSING = None if cluster.is_installed() else "ttnn is not installed"  # why the tests cannot run


class Uncollected(pytest.Module):
    def collect(self):
        pytest.skip(f"{MISSING}: its wheels are for CPython 3.12 and 3.10 on x86-64 Linux")


def pytest_pycollect_makemodule(module_path, parent):
    return Uncollected.from_parent(parent, path=module_path) if MISSING else None


def _mocked(board):
    """The mock's variables set; `undo` of the result restores what was there."""
    patch = pytest.MonkeyPatch()
    for name, value in cluster.environment(board).items():
        patch.setenv(name, value)
    return patch


def pytest_configure(config):
    """Import ttnn under the mock's variables, before a test module does; then put them away."""
    global MISSING
    if MISSING:
        return
    cluster.quieten()
    patch = pytest.MonkeyPatch() if cluster.has_board() else _mocked(config.getoption("--board"))
    try:
        import ttnn  # noqa: F401
    except ImportError as error:
        MISSING = f"ttnn does not import ({error})"
    finally:
        patch.undo()


@pytest.fixture(scope="package", autouse=True)
def mock_environment(pytestconfig):
    """The mock's variables while tests of this directory run, and only then: others start processes of their own."""
    patch = pytest.MonkeyPatch() if cluster.has_board() else _mocked(pytestconfig.getoption("--board"))
    yield
    patch.undo()


class MeshOpener:
    """Keeps one mesh open from test to test; another shape or other parameters take its place."""

    def __init__(self, board):
        self.board, self.board_shape = board, BOARDS[board].mesh_shape
        self._mesh, self._key = None, None

    def open(self, shape=None, parameters=None):
        """A mesh of `shape` (default: the whole board), with `open_mesh_device` options and `fabric_config`."""
        import ttnn

        shape = tuple(shape or self.board_shape)
        if shape[0] * shape[1] > self.board_shape[0] * self.board_shape[1]:
            pytest.skip(f"mesh {shape[0]}x{shape[1]}: this board has {self.board_shape[0]}x{self.board_shape[1]}")
        found = f"{ttnn.get_arch_name()} x {ttnn.get_num_devices()}"
        wanted = f"{BOARDS[self.board].arch} x {self.board_shape[0] * self.board_shape[1]}"
        if found != wanted:  # only on silicon
            pytest.skip(f"--board {self.board} is {wanted}, this machine has {found}")
        key = (shape, repr(sorted((parameters or {}).items())))
        if key == self._key:
            return self._mesh
        self.close()
        options = dict(parameters or {})
        fabric = options.pop("fabric_config", ttnn.FabricConfig.FABRIC_1D if shape != (1, 1) else None)
        if fabric in (None, False):
            fabric = ttnn.FabricConfig.DISABLED
        elif fabric is True:
            fabric = ttnn.FabricConfig.FABRIC_1D
        if self.board_shape != (1, 1):
            # The default, Ethernet cores, reports more worker cores on a mock of these boards than it has.
            options.setdefault("dispatch_core_config", ttnn.DispatchCoreConfig(ttnn.DispatchCoreType.WORKER))
            options.setdefault("l1_small_size", L1_SMALL_BYTES)
        ttnn.set_fabric_config(fabric)
        try:
            self._mesh = ttnn.open_mesh_device(ttnn.MeshShape(*shape), **options)
        except Exception:
            ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)
            raise
        self._key = key
        return self._mesh

    def close(self):
        """Close the mesh and what was cut out of it."""
        import ttnn

        if self._mesh is not None:
            for submesh in self._mesh.get_submeshes():
                ttnn.close_mesh_device(submesh)
            ttnn.close_mesh_device(self._mesh)
            self._mesh, self._key = None, None
            ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


@pytest.fixture(scope="package")
def mesh_opener(mock_environment, pytestconfig):
    opener = MeshOpener(pytestconfig.getoption("--board"))
    yield opener
    opener.close()


@pytest.fixture
def device_params(request):
    """Options of `open_mesh_device`, and `fabric_config`; by indirect parameter, as in tt-metal's tests."""
    return getattr(request, "param", {})


@pytest.fixture
def mesh_device(request, mesh_opener, device_params):
    """An open mesh: the board's whole, or by indirect parameter its shape or its number of devices.

    It stays open for the next test. For submeshes use `fresh_mesh_device`.
    """
    shape = getattr(request, "param", None)
    return mesh_opener.open((1, shape) if isinstance(shape, int) else shape, device_params)


@pytest.fixture
def fresh_mesh_device(request, mesh_opener):
    """An open mesh of this test alone. ttnn cannot close a mesh that did work itself and has submeshes that did."""
    mesh_opener.close()
    yield request.getfixturevalue("mesh_device")
    mesh_opener.close()


@pytest.fixture
def shadow():
    """The module `models.board_mock.shadow`, with shadow values for the tensors of this test; mock boards only."""
    if not cluster.is_mock():
        pytest.skip("shadow values are for a mock board")
    from models.board_mock import shadow

    with shadow.shadowed():
        yield shadow


@pytest.fixture
def put(mesh_device, shadow):
    """put(x, ...) is from_torch onto the mesh, replicated."""
    import torch
    import ttnn

    integers = (ttnn.int32, ttnn.uint32)

    def put(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, memory_config=ttnn.DRAM_MEMORY_CONFIG):
        if x.dtype == torch.int64:
            dtype, layout, x = dtype if dtype in integers else ttnn.int32, ttnn.ROW_MAJOR_LAYOUT, x.int()
        return ttnn.from_torch(x, dtype=dtype, layout=layout, device=mesh_device, memory_config=memory_config)

    return put


@pytest.fixture
def same(shadow):
    """same(tensor, expected): shape as ttnn says, values on every device and as read back."""
    import torch
    import ttnn

    def same(tensor, expected, tolerance=2**-7):
        assert list(tensor.shape) == list(expected.shape)
        for value in shadow.value(tensor):
            torch.testing.assert_close(value.float(), expected.float(), rtol=tolerance, atol=tolerance)
        read = ttnn.to_torch(ttnn.get_device_tensors(tensor)[0])
        torch.testing.assert_close(read.float(), expected.float(), rtol=tolerance, atol=tolerance)

    return same


@pytest.fixture(scope="module")
def mesh(mesh_opener):
    """All chips of the board, for a file's tests."""
    from models.tests.ttnn.model_fixtures import board

    with board(mesh_opener) as mesh:
        yield mesh
