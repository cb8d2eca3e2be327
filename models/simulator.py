"""ttsim, Tenstorrent's simulator of a chip, in place of a board: kernels run as they are compiled for the chip.

The simulator is one library for each architecture (github.com/tenstorrent/ttsim, releases). ttnn runs on it where its
variables say so before ttnn is imported: which library, that programs are sent to cores one by one (slow dispatch, the
mode that the simulator's authors recommend) and that kernels leave out an instruction that it does not have. Slow
dispatch leaves no core for dispatching and has no traces; the grid of worker cores is set to the board's own, so that
what is tested is what boards run.

Standard library only: importable where ttnn is not installed.
"""

import atexit
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from models.boards import BOARDS, SIMULATOR_VARIABLE, SLOW_DISPATCH_VARIABLE, Board, board_of_environment
from models.errors import UserError

RELEASES = "https://github.com/tenstorrent/ttsim/releases"
DESCRIPTOR = "soc_descriptor.yaml"  # of the chip; ttnn looks for it beside the library
GRID_VARIABLE = "TT_METAL_CORE_GRID_OVERRIDE_TODEPRECATE"  # the last core's column and row
# By architecture: the library's name, the chip's descriptor in ttnn's wheel, the board of one such chip.
_LIBRARIES = {"wormhole_b0": "libttsim_wh.so", "blackhole": "libttsim_bh.so"}
_WHEEL_DESCRIPTORS = {"wormhole_b0": "wormhole_b0_80_arch.yaml", "blackhole": "blackhole_140_arch.yaml"}
_BOARDS = {"wormhole_b0": "N150", "blackhole": "P150"}


def environment(directory: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that put a process of ttnn on the simulator in a directory; makes what they point at.

    Where both architectures are there, MESH_DEVICE chooses (N150 or P150; N150 if it is not set). A chip's descriptor
    that is missing is taken from ttnn's wheel, in a temporary directory that also links to the library.

    Raises:
        UserError: no library there, not the one for MESH_DEVICE, a descriptor of another chip, or no ttnn.
    """
    library, board = _chosen(Path(directory).expanduser(), board_of_environment(environ))
    beside = library.with_name(DESCRIPTOR)
    if beside.exists():
        _check_descriptor(beside, board)
    else:
        library = _with_descriptor(library, board.arch)
    columns, rows = board.grid
    return {
        SIMULATOR_VARIABLE: str(library),
        SLOW_DISPATCH_VARIABLE: "1",
        "TT_METAL_DISABLE_SFPLOADMACRO": "1",
        GRID_VARIABLE: f"{columns - 1},{rows - 1}",
        "MESH_DEVICE": board.name,
    }


def _chosen(directory: Path, asked: Board | None) -> tuple[Path, Board]:
    """The simulator's library and the board of one chip that it stands for."""
    if not directory.is_dir():
        raise UserError(f"--simulator {directory}: no such directory: give the one that ttsim's library is in")
    if asked and asked.chips > 1:
        raise UserError(
            f"MESH_DEVICE={asked.name} has {asked.chips} chips, a simulator here one: set it to "
            f"{' or '.join(_BOARDS.values())}"
        )
    found = {arch: path for arch, name in _LIBRARIES.items() if (path := directory / name).is_file()}
    wanted = [asked.arch] if asked else list(_LIBRARIES)
    for arch in wanted:
        if arch in found:
            return found[arch].absolute(), BOARDS[_BOARDS[arch]]
    names = " or ".join(_LIBRARIES[arch] for arch in wanted)
    raise UserError(f"--simulator {directory}: no {names} in it: download it from {RELEASES}")


def _check_descriptor(file: Path, board: Board) -> None:
    match = re.search(r"^arch_name:\s*(\w+)", file.read_text(errors="replace"), re.MULTILINE)
    arch = match[1].lower() if match else "no chip"
    if arch != board.arch:
        raise UserError(
            f"{file} describes {arch}, the simulator is of a {board.arch}: remove it, and the one of ttnn's wheel is "
            "taken"
        )


def _with_descriptor(library: Path, arch: str) -> Path:
    """The library, linked beside the descriptor of ttnn's wheel in a directory that lasts as long as this process."""
    spec = importlib.util.find_spec("ttnn")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("--simulator: ttnn is not installed: it is what runs on a simulator (pip install ttnn)")
    wheel = Path(next(iter(spec.submodule_search_locations)))
    descriptor = wheel / "tt_metal/soc_descriptors" / _WHEEL_DESCRIPTORS[arch]
    if not descriptor.is_file():
        raise UserError(f"{descriptor} is missing: copy the chip's {DESCRIPTOR} from tt-metal to {library.parent}")
    directory = Path(tempfile.mkdtemp(prefix="ttsim-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / DESCRIPTOR).symlink_to(descriptor)
    linked = directory / library.name
    linked.symlink_to(library)
    return linked
