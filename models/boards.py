"""The boards that models run on: how many chips, how they are wired, how much memory each has and how fast it is.

The only table of boards: models, plans, the planner and mocks read it. Importable where ttnn is not installed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from models.errors import UserError

# Where the draft runs: on all chips beside the target, or on a chip of its own.
PLACEMENTS = ("shared", "own-chip")
# What a board is made of: of the others the clock says nothing about a chip.
SILICON, SIMULATOR, MOCK = "silicon", "simulator", "mock"
# ttnn's own variables: a simulator's library that it runs kernels on; a file whose cluster it opens instead of the
# driver's (beside a simulator, the simulator's); and how it sends programs to cores: slowly, it has no traces.
SIMULATOR_VARIABLE = "TT_METAL_SIMULATOR"
MOCK_VARIABLE = "TT_METAL_MOCK_CLUSTER_DESC_PATH"
SLOW_DISPATCH_VARIABLE = "TT_METAL_SLOW_DISPATCH_MODE"


@dataclass(frozen=True)
class Wiring:
    """How the chips of a system are mounted and linked, as ttnn's cluster descriptors say it.

    What is harvested, switched off for a defect, is that of one system: others of its kind have other rows off, and as
    many.

    Args:
        card: kind of each card, such as "n150".
        cards: chips of each card; the first one is on PCIe.
        harvested_rows: of each chip, a bit mask of its Tensix rows.
        places: (x, y) of each chip; empty where no chip has a neighbour.
        links: (chip, channel, chip, channel) of the first of two Ethernet links between two chips.
        harvested_ethernet, harvested_pcie: of every chip, bit masks of its channels.
    """

    card: str
    cards: tuple[tuple[int, ...], ...]
    harvested_rows: tuple[int, ...]
    places: tuple[tuple[int, int], ...] = ()
    links: tuple[tuple[int, int, int, int], ...] = ()
    harvested_ethernet: int = 0
    harvested_pcie: int = 0


@dataclass(frozen=True)
class Board:
    """One system as tt-metal names it in MESH_DEVICE.

    Args:
        name: in MESH_DEVICE.
        mesh_shape: rows, columns of chips.
        arch: "wormhole_b0" or "blackhole", as ttnn.get_arch_name() says it.
        dram_bytes: per chip, what ttnn's allocator can give out when no trace region is reserved.
        dram_banks: per chip; a DRAM-sharded matrix has one shard in each.
        dram_gb_per_s: per chip, published.
        wiring: of its chips.
        grid: columns and rows of worker cores on each chip, beside those that dispatch programs.
        medium: SILICON, SIMULATOR or MOCK.
        traces: whether captured programs can be replayed.
    """

    name: str
    mesh_shape: tuple[int, int]
    arch: str
    dram_bytes: int
    dram_banks: int
    dram_gb_per_s: float
    wiring: Wiring
    grid: tuple[int, int]
    medium: str = field(default=SILICON, compare=False)
    traces: bool = field(default=True, compare=False)

    @property
    def chips(self) -> int:
        """How many it has."""
        rows, columns = self.mesh_shape
        return rows * columns

    @property
    def timed(self) -> bool:
        """Whether its clock says something about a chip."""
        return self.medium == SILICON

    @property
    def described(self) -> str:
        """Its name, with what stands for it where that is no silicon."""
        article = "an" if self.name.startswith("N") else "a"
        return self.name if self.medium == SILICON else f"{self.medium} of {article} {self.name}"


def _wormhole(name: str, wiring: Wiring, grid: tuple[int, int]) -> Board:
    # n150 and n300 data sheets: 12 GB of GDDR6 at 12 GT/s on 192 bits, 288 GB/s for each chip
    chips = sum(map(len, wiring.cards))
    return Board(name, (1, chips), "wormhole_b0", 12 * 1_072_693_184, 12, 288.0, wiring, grid)


_N150 = Wiring("n150", cards=((0,),), harvested_rows=(64,), places=((0, 0),))
_N300 = Wiring("n300", cards=((0, 1),), harvested_rows=(65, 5), places=((0, 0), (1, 0)), links=((0, 8, 1, 0),))
# Four N300 cards: the chips on PCIe, 0-3, are the middle of a 4 x 2 mesh, their partners 4-7 its two ends.
_T3K = Wiring(
    "n300",
    cards=((0, 4), (1, 5), (2, 6), (3, 7)),
    harvested_rows=(544, 513, 640, 513, 576, 513, 513, 528),
    places=((1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1), (3, 0), (3, 1)),
    links=(
        *((chip, 8, chip + 4, 0) for chip in range(4)),  # within a card
        *((0, 6, 2, 6), (1, 0, 3, 0), (0, 14, 1, 14), (2, 14, 3, 14), (4, 6, 5, 6), (6, 6, 7, 6)),  # between cards
    ),
)
_P150 = Wiring("p150", cards=((0,),), harvested_rows=(192,), harvested_ethernet=288, harvested_pcie=2)

BOARDS = {
    board.name: board
    for board in (
        _wormhole("N150", _N150, (8, 8)),
        _wormhole("N300", _N300, (8, 7)),
        _wormhole("T3K", _T3K, (8, 7)),  # TT-LoudBox and TT-QuietBox
        # 32 GB at 16 GT/s on 256 bits
        Board("P150", (1, 1), "blackhole", 8 * 4_277_141_376, 8, 512.0, _P150, (11, 10)),
    )
}


def board_named(name: str) -> Board:
    """The board of that name. Raises UserError, with the names there are, for any other."""
    if name not in BOARDS:
        raise UserError(f"unknown board {name!r}: use one of {', '.join(BOARDS)}")
    return BOARDS[name]


def board_of_environment(environ: Mapping[str, str]) -> Board | None:
    """The board that MESH_DEVICE names; None when it is not set. Raises UserError for an unknown name."""
    name = environ.get("MESH_DEVICE")
    if name and name not in BOARDS:
        raise UserError(f"MESH_DEVICE={name} is no known board: set one of {', '.join(BOARDS)}")
    return BOARDS[name] if name else None


def medium(environ: Mapping[str, str] = os.environ) -> str:
    """What the board of a process with this environment is made of; ttnn reads the same variables."""
    if environ.get(SIMULATOR_VARIABLE):
        return SIMULATOR
    return MOCK if environ.get(MOCK_VARIABLE) else SILICON


def is_mock(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a process with this environment has a mock board."""
    return medium(environ) == MOCK


def as_found(board: Board, environ: Mapping[str, str] = os.environ) -> Board:
    """The board as a process with this environment has it."""
    made_of = medium(environ)
    return replace(board, medium=made_of, traces=made_of != MOCK and not environ.get(SLOW_DISPATCH_VARIABLE))
