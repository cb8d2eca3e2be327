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
        cards: chips of each card.
        harvested: of each chip, a bit mask of its Tensix rows (Wormhole) or columns (Blackhole).
        places: (x, y) of each chip; empty on Blackhole, whose chips do not know where they are.
        links: (chip, channel, chip, channel) of each Ethernet link between two chips.
        harvested_ethernet: of every chip, a bit mask of its channels.
        harvested_pcie: of each chip, a bit mask of its channels; empty where none is.
        on_pcie: chips of each card that are on PCIe, the first ones.
    """

    card: str
    cards: tuple[tuple[int, ...], ...]
    harvested: tuple[int, ...]
    places: tuple[tuple[int, int], ...] = ()
    links: tuple[tuple[int, int, int, int], ...] = ()
    harvested_ethernet: int = 0
    harvested_pcie: tuple[int, ...] = ()
    on_pcie: int = 1


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
        product: name that its makers sell it under, where MESH_DEVICE has another; shown beside the name.
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
    product: str = ""
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

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of worker cores on each chip, where one row (Wormhole) or column (Blackhole) dispatches."""
        harvested = max(mask.bit_count() for mask in self.wiring.harvested)
        return (13 - harvested, 10) if self.arch == "blackhole" else (8, 9 - harvested)

    @property
    def worker_cores(self) -> int:
        """Of each chip."""
        columns, rows = self.grid
        return columns * rows

    @property
    def title(self) -> str:
        """Its name, and the one that it is sold under."""
        return f"{self.name} ({self.product})" if self.product else self.name


def _links(*first: tuple[int, int, int, int], crossed: bool = False) -> tuple[tuple[int, int, int, int], ...]:
    """Both of two links each, from the first one of each: the second has the next channel, at the far end the one
    before where the links cross."""
    far = -1 if crossed else 1
    return tuple(link for a, i, b, j in first for link in ((a, i, b, j), (a, i + 1, b, j + far)))


def _wormhole(name: str, wiring: Wiring, product: str = "") -> Board:
    # n150 and n300 data sheets: 12 GB of GDDR6 at 12 GT/s on 192 bits, 288 GB/s for each chip
    chips = sum(map(len, wiring.cards))
    return Board(name, (1, chips), "wormhole_b0", 12 * 1_072_693_184, 12, 288.0, wiring, product)


def _blackhole(name: str, wiring: Wiring, product: str = "") -> Board:
    # p150 data sheet: 32 GB of GDDR6 at 16 GT/s on 256 bits, 512 GB/s. A p300 card has two such chips with 64 GB.
    chips = sum(map(len, wiring.cards))
    return Board(name, (1, chips), "blackhole", 8 * 4_277_141_376, 8, 512.0, wiring, product)


_N150 = Wiring("n150", cards=((0,),), harvested=(64,), places=((0, 0),))
_N300 = Wiring("n300", cards=((0, 1),), harvested=(65, 5), places=((0, 0), (1, 0)), links=_links((0, 8, 1, 0)))
# Four N300 cards: the chips on PCIe, 0-3, are the middle of a 4 x 2 mesh, their partners 4-7 its two ends.
_T3K = Wiring(
    "n300",
    cards=((0, 4), (1, 5), (2, 6), (3, 7)),
    harvested=(544, 513, 640, 513, 576, 513, 513, 528),
    places=((1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1), (3, 0), (3, 1)),
    links=_links(
        *((chip, 8, chip + 4, 0) for chip in range(4)),  # within a card
        *((0, 6, 2, 6), (1, 0, 3, 0), (0, 14, 1, 14), (2, 14, 3, 14), (4, 6, 5, 6), (6, 6, 7, 6)),  # between cards
    ),
)
_P150 = Wiring("p150", cards=((0,),), harvested=(192,), harvested_ethernet=288, harvested_pcie=(2,))
# Both chips of a p300 are on PCIe; on all that are sold two columns of each are off (11 x 10 worker cores).
_P300 = Wiring(
    "p300",
    cards=((0, 1),),
    harvested=(5, 260),
    links=_links((0, 2, 1, 9), crossed=True),
    harvested_ethernet=288,
    harvested_pcie=(2, 1),
    on_pcie=2,
)
# Two p300 cards, the four chips in a ring. Within a card the links are known; which channels the bridges between the
# cards use has not been published, so theirs are an assumption (ttnn needs to see two links, not which).
_P300X2 = Wiring(
    "p300",
    cards=((0, 1), (2, 3)),
    harvested=(5, 260, 5, 260),
    links=_links((0, 2, 1, 9), (2, 2, 3, 9), crossed=True) + _links((0, 6, 2, 6), (1, 6, 3, 6)),
    harvested_ethernet=288,
    harvested_pcie=(2, 1, 2, 1),
    on_pcie=2,
)

BOARDS = {
    board.name: board
    for board in (
        _wormhole("N150", _N150),
        _wormhole("N300", _N300),
        _wormhole("T3K", _T3K, "LoudBox or QuietBox"),
        _blackhole("P150", _P150),
        _blackhole("P300", _P300),
        _blackhole("P300x2", _P300X2, "QuietBox 2"),
    )
}


def board_titles() -> str:
    """All boards by name, in a message, with the names that they are sold under."""
    return ", ".join(board.title for board in BOARDS.values())


def board_named(name: str) -> Board:
    """The board of that name. Raises UserError, with the names there are, for any other."""
    if name not in BOARDS:
        raise UserError(f"unknown board {name!r}: use one of {board_titles()}")
    return BOARDS[name]


def board_of_environment(environ: Mapping[str, str]) -> Board | None:
    """The board that MESH_DEVICE names; None when it is not set. Raises UserError for an unknown name."""
    name = environ.get("MESH_DEVICE")
    if name and name not in BOARDS:
        raise UserError(f"MESH_DEVICE={name} is no known board: set one of {board_titles()}")
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
