"""Hidden states that a target's forwards leave on the device, for a draft head to read.

A decode or verify forward writes the states of its rows into buffers that are there for good, one for each layer that
is read (a tap), so that replaying a trace writes the same place. They last until the next such forward. A prompt's
states are the prefill's own tensors, held until a head has read them; its last row is in the buffers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import ttnn

from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.shapes import TILE

Chunks = list[list[ttnn.Tensor]]  # of a prompt: for each chunk [1, 1, m, H] of each tap


class NothingKept:
    """Of a forward whose hidden states nobody reads: no op is spent on them."""

    def keep(self, layer: int, x: ttnn.Tensor) -> None:
        """Nothing."""

    def keep_chunk(self, layer: int, x: ttnn.Tensor) -> None:
        """Nothing."""


class KeptStates:
    """The states after some layers of a model.

    Args:
        taps: the layers, in rising order: 0 the embedding, i the output of the i-th layer.
        layout: of the model.

    Attributes:
        buffers: for each tap [1, 1, 32, H], the rows of the last forward; what follows them is undefined.
        serial: counts the forwards that have written, so that who holds `Kept` states knows whether they are there.
    """

    def __init__(self, taps: Sequence[int], layout: Layout) -> None:
        self.taps = tuple(taps)
        self.serial = 0
        self.residual = layout.residual
        self.buffers = [state_buffer(layout.hidden, layout.mesh_device) for _ in self.taps]
        self._chunks: Chunks = []

    def keep(self, layer: int, x: ttnn.Tensor) -> None:
        """Of a forward of R rows: the residual stream [1, 1, R, H] after a layer."""
        if layer in self.taps:
            write_rows(x, self.buffers[self.taps.index(layer)])

    def keep_chunk(self, layer: int, x: ttnn.Tensor) -> None:
        """Of a chunk of a prompt: the residual stream [1, 1, m, H] after a layer, whose tensor stays."""
        if layer == self.taps[0]:
            self._chunks.append([])
        if layer in self.taps:
            self._chunks[-1].append(x)

    def begin(self, *, prompt: bool) -> None:
        """A forward is to come, or a prompt's: what was kept so far is gone."""
        self.serial += 1
        self._chunks = []
        self._prompt = prompt

    def keep_row(self, row: ttnn.Tensor) -> None:
        """Of the prompt's last chunk: write the row at an index [1, 1] as the buffers' first."""
        for x, buffer in zip(self._chunks[-1], self.buffers, strict=True):
            found = ttnn.embedding(row, ttnn.untilize(x, use_multicore=True), layout=ttnn.TILE_LAYOUT)
            write_rows(ttnn.interleaved_to_sharded(ttnn.unsqueeze_to_4D(found), self.residual), buffer)

    def latest(self) -> Kept:
        """What the last forward has left."""
        chunks, self._chunks = self._chunks, []
        return Kept(self, self.serial, chunks if self._prompt else None)


@dataclass
class Kept:
    """The states of one forward: `Features` of a head on the same board.

    chunks: of a prompt; None of a forward whose rows are in the buffers alone, and where they have been read.
    """

    states: KeptStates
    serial: int
    chunks: Chunks | None

    @property
    def lasting(self) -> bool:
        """Whether no other forward has written since."""
        return self.serial == self.states.serial


def state_buffer(hidden: int, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
    """[1, 1, 32, H] bf16, of zeros: a row that nobody writes is still a number."""
    return ttnn.from_torch(
        torch.zeros(1, 1, TILE, hidden),
        dtype=ttnn.bfloat16,
        layout=ttnn.TILE_LAYOUT,
        device=mesh_device,
        memory_config=ttnn.DRAM_MEMORY_CONFIG,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh_device),
    )


def write_rows(x: ttnn.Tensor, buffer: ttnn.Tensor) -> None:
    """Copy the tile of rows [1, 1, R, H] from the residual stream into a buffer [1, 1, 32, H]."""
    shape = tuple(buffer.shape)
    ttnn.to_memory_config(ttnn.reshape(x, shape, shape), ttnn.DRAM_MEMORY_CONFIG, output_tensor=buffer)


def rows_of(buffer: ttnn.Tensor, picks: ttnn.Tensor, residual: ttnn.MemoryConfig) -> ttnn.Tensor:
    """The rows [1, 1, R, H] at picks [1, R] of a buffer [1, 1, 32, H], as the residual stream."""
    found = ttnn.embedding(picks, ttnn.untilize(buffer, use_multicore=True), layout=ttnn.TILE_LAYOUT)
    return ttnn.interleaved_to_sharded(ttnn.unsqueeze_to_4D(found), residual)
