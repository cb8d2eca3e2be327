"""What the steps work on: the board, its chips as one mesh, and a model of one layer."""

import contextlib
from dataclasses import dataclass
from functools import cached_property

import torch
import ttnn

from models.boards import BOARDS, MOCK, SILICON, SIMULATOR, Board
from models.ttnn_llama.device.mesh import open_mesh
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import CheckpointSource
from scripts.board_steps.reference import Weights, noise, one_layer

PRECISION = "performance"  # what models run in unless a user says otherwise
CONTEXT = 1088  # of the one-layer model
TRACE_BYTES = 16_000_000


@dataclass(frozen=True)
class Effort:
    """How often, and how much, by what the board is made of."""

    cache_repeats: int
    sums: int
    replayed_sums: int
    replays: int
    tokens: int  # of a text
    long_prompts: tuple[int, ...]
    after_long: int  # tokens of a text after a long prompt


EFFORTS = {
    SILICON: Effort(50, 100, 1000, 50, 150, (400, 1000), 16),
    SIMULATOR: Effort(50, 0, 0, 0, 4, (400,), 2),
    MOCK: Effort(2, 4, 0, 0, 5, (400, 1000), 1),
}


class Bench:
    """Opens the mesh when it is first asked for; `close` gives it back, and the next step that asks opens it anew."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.effort = EFFORTS[board.medium]
        self._stack = contextlib.ExitStack()

    @cached_property
    def mesh(self) -> ttnn.MeshDevice:
        """All chips of the board."""
        traces = TRACE_BYTES if self.board.traces else 0
        return self._stack.enter_context(open_mesh(self.board, trace_region_bytes=traces)).target

    @cached_property
    def weights(self) -> Weights:
        """Of one layer of a 1B."""
        return Weights(one_layer("1B"))

    @cached_property
    def model(self) -> TtnnLlama:
        """The one-layer 1B on the board; its programs can be captured where there are traces."""
        runner = Runner(self.mesh, trace=self.board.traces)
        self._stack.callback(runner.release)
        source = CheckpointSource(self.weights, self.mesh, precision_named(PRECISION))
        return TtnnLlama(
            self.weights.config,
            self.mesh,
            source,
            precision=precision_named(PRECISION),
            max_seq_len=CONTEXT,
            runner=runner,
        )

    def layout(self, size: str) -> Layout:
        """Of one layer of a published size."""
        return Layout(one_layer(size), self.mesh, precision_named(PRECISION), CONTEXT)

    def hidden(self, rows: int, seed: int = 1) -> torch.Tensor:
        """Seeded hidden states of the one-layer model."""
        return noise(rows, self.weights.config.hidden_size, seed)

    def put(self, values: torch.Tensor) -> ttnn.Tensor:
        """[n, width] in bf16 tiles [1, 1, n, width] on every chip."""
        return ttnn.from_torch(
            values[None, None].bfloat16(),
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=self.mesh,
            mesh_mapper=ttnn.ReplicateTensorToMesh(self.mesh),
        )

    def close(self) -> None:
        """Close what is open. A second call does nothing."""
        for name in ("model", "mesh"):
            self.__dict__.pop(name, None)
        self._stack.close()


def one_chip_board(board: Board) -> Board:
    """A board of one chip of that kind."""
    return next(other for other in BOARDS.values() if other.chips == 1 and other.arch == board.arch)


def on_chips(tensor: ttnn.Tensor) -> list[torch.Tensor]:
    """What each chip holds of a device tensor."""
    return [ttnn.to_torch(part) for part in ttnn.get_device_tensors(tensor)]


def joined_columns(tensor: ttnn.Tensor) -> torch.Tensor:
    """[n, width] in fp32 of a tensor [1, 1, n, width / chips], whose columns the chips share."""
    return torch.cat(on_chips(tensor), -1)[0, 0].float()


def rows_of(tensor: ttnn.Tensor) -> torch.Tensor:
    """[n, width] in fp32 of a tensor [1, 1, n, width] that is the same on all chips."""
    return on_chips(tensor)[0][0, 0].float()
