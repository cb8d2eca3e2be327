"""Random weights straight into memory: to time models of any size without a file."""

import zlib
from collections.abc import Iterator, Mapping

import torch

from models.llama.config import LlamaConfig

STD = 0.02
BLOCK = 2**22


class RandomWeights(Mapping[str, torch.Tensor]):
    """Hugging Face names -> seeded tensors of the configuration's shapes, each made when it is asked for.

    Matrices are pieces of one block of N(0, 0.02) numbers that begin at places of their own: quick to make, and as
    good as any for timing, where only the memory they take counts. Norm weights are one.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        self._shapes = config.tensor_shapes()
        self._dtype = getattr(torch, config.dtype)
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.empty(BLOCK).normal_(std=STD, generator=generator).to(self._dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        flat = torch.empty(shape, dtype=self._dtype).view(-1)
        block = self._block.roll(-(zlib.crc32(name.encode()) % BLOCK))
        for piece in flat.split(BLOCK):
            piece.copy_(block[: len(piece)])
        return flat.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
