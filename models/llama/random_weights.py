"""Random weights for models of any size: to time them without a download."""

import zlib
from collections.abc import Iterator, Mapping

import torch

from models.llama.config import LlamaConfig

STD = 0.02  # of a fresh Llama's matrices
BLOCK = 2**22 - 3  # numbers drawn; prime, so that no two rows of a matrix begin at the same place
_RESIDUAL = ("o_proj.weight", "down_proj.weight")


class RandomWeights(Mapping[str, torch.Tensor]):
    """Hugging Face names -> seeded tensors of the configuration's shapes, each made when it is asked for.

    A tensor depends on the seed, its name, its shape and the number of layers alone. Matrices are pieces of one block
    of N(0, 0.02) numbers that begin at places of their own: four times as quick as drawing each number, and no row is
    there twice. Those that add to the residual stream are scaled by 1/sqrt(2 layers), as in a fresh model; norm weights
    are one.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        self._shapes = config.tensor_shapes()
        self._dtype = getattr(torch, config.dtype)
        self._residual_scale = (2 * config.num_hidden_layers) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.empty(BLOCK).normal_(std=STD, generator=generator)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        flat = torch.empty(shape, dtype=self._dtype).view(-1)
        block = self._block * self._residual_scale if name.endswith(_RESIDUAL) else self._block
        block = block.to(self._dtype).roll(-(zlib.crc32(name.encode()) % BLOCK))
        for piece in flat.split(BLOCK):
            piece.copy_(block[: len(piece)])
        return flat.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
