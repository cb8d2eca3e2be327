"""The boards that models run on: how many chips, how they are wired, how much memory each has and how fast it is.

Importable where ttnn is not installed: plans and checks for a board need no board.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from models.errors import UserError

# Where the draft runs: on all chips beside the target, or on a chip of its own.
PLACEMENTS = ("shared", "own-chip")


@dataclass(frozen=True)
class Board:
    """One system as tt-metal names it in MESH_DEVICE."""

    name: str
    mesh_shape: tuple[int, int]  # rows, columns of chips
    arch: str  # "wormhole_b0" or "blackhole", as ttnn.get_arch_name() says it
    dram_bytes: int  # per chip, what ttnn's allocator can give out when no trace region is reserved
    dram_banks: int  # per chip; a DRAM-sharded matrix has one shard in each
    dram_gb_per_s: float  # per chip, published

    @property
    def chips(self) -> int:
        rows, columns = self.mesh_shape
        return rows * columns


def _wormhole(name: str, chips: int) -> Board:
    # n150 and n300 data sheets: 12 GB of GDDR6 at 12 GT/s on 192 bits, 288 GB/s for each chip
    return Board(name, (1, chips), "wormhole_b0", 12 * 1_072_693_184, 12, 288.0)


BOARDS = {
    board.name: board
    for board in (
        _wormhole("N150", 1),
        _wormhole("N300", 2),
        _wormhole("T3K", 8),  # four N300 cards, TT-LoudBox and TT-QuietBox
        Board("P150", (1, 1), "blackhole", 8 * 4_277_141_376, 8, 512.0),  # 32 GB at 16 GT/s on 256 bits
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
