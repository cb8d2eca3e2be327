"""Helpers for the tests of the TT-NN model: reduced Llamas with the heads of the published ones, on the board under test.

On a mock the values come from golden functions (`models.ttnn_mock.shadow`); on silicon the same tests read the chips.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
import ttnn

from models.llama.config import LlamaConfig, named_config
from models.llama.ttnn_llama.model import TtnnLlama
from models.llama.ttnn_llama.precision import precision_named
from models.llama.ttnn_llama.runner import Runner
from models.llama.ttnn_llama.weights import CheckpointSource
from models.tests.llama_fixtures import random_tensors
from models.ttnn_mock import cluster

SIZES = ("1B", "3B", "8B")  # D=64 Q:KV 4:1, D=128 3:1, D=128 4:1
VOCAB = 1024


@contextlib.contextmanager
def board(mesh_opener) -> Iterator[ttnn.MeshDevice]:
    """The whole board, open for a module's tests; on a mock with shadow values for all that they make."""
    mesh = mesh_opener.open()
    if not cluster.is_mock():
        yield mesh
        return
    from models.ttnn_mock import shadow

    with shadow.shadowed():
        yield mesh


def reduced(size: str, chips: int, layers: int = 4, **overrides) -> LlamaConfig:
    """A published Llama made small: its head_dim, queries per KV head, rope and tying, but 2 KV heads (8 on 8 chips).

    Rope scaling begins at 64 positions, so that it acts within a test's texts.
    """
    full = named_config(size)
    group = full.num_attention_heads // full.num_key_value_heads
    kv_heads = max(2, chips)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 2 * group * full.head_dim,
        "intermediate_size": 1280,
        "num_hidden_layers": layers,
        "num_attention_heads": group * kv_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rope_scaling": dataclasses.replace(full.rope_scaling, original_max_position_embeddings=64),
        "bos_token_id": None,
        "eos_token_ids": (),
    }
    return dataclasses.replace(full, **{**sizes, **overrides})


class Weights(dict):
    """Tensors by their Hugging Face names, and the config that they are for: what `CheckpointSource` reads."""

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, torch.Tensor]):
        super().__init__(tensors)
        self.config = config

    @classmethod
    def random(cls, config: LlamaConfig, seed: int = 0) -> "Weights":
        """Larger than Hugging Face's initial ones, see `random_tensors`; in bf16 on both sides of a comparison."""
        return cls(config, random_tensors(config, seed))

    def on(
        self, mesh: ttnn.MeshDevice, precision: str = "bf16", max_seq_len: int = 352, runner: Runner | None = None
    ) -> TtnnLlama:
        """The TT-NN model of these weights."""
        named = precision_named(precision)
        source = CheckpointSource(self, mesh, named)
        return TtnnLlama(self.config, mesh, source, precision=named, max_seq_len=max_seq_len, runner=runner)


def random_ids(count: int, seed: int, vocab_size: int = VOCAB) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def on_chips(tensor: ttnn.Tensor) -> list[torch.Tensor]:
    """What each chip of the mesh holds of a device tensor."""
    return [ttnn.to_torch(part) for part in ttnn.get_device_tensors(tensor)]


def put(mesh: ttnn.MeshDevice, values: torch.Tensor, memory: ttnn.MemoryConfig = ttnn.DRAM_MEMORY_CONFIG):
    """A tiled bf16 tensor of these values on every chip."""
    return ttnn.from_torch(
        values.to(torch.bfloat16),
        dtype=ttnn.bfloat16,
        layout=ttnn.TILE_LAYOUT,
        device=mesh,
        memory_config=memory,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh),
    )


def pcc(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation of all values."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} cannot be compared")
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def row_pccs(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """PCC row by row: one wrong row shows, however many right ones are beside it."""
    return [pcc(mine, theirs) for mine, theirs in zip(a, b, strict=True)]
