"""Helpers for the tests of the TT-NN model: reduced Llamas, with the heads of the published ones.

On a mock the values come from golden functions (`models.board_mock.shadow`); on silicon the same tests read the chips.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import ttnn

import models
from models.board_mock import cluster
from models.llama.config import LlamaConfig, named_config
from models.tests.llama_fixtures import hf_model, random_tensors
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.weights.precision import precision_named, ttnn_dtype
from models.ttnn_llama.weights.tensors import CheckpointSource, interleave_pairs

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
SIZES = ("1B", "3B", "8B")  # D=64 Q:KV 4:1, D=128 3:1, D=128 4:1
VOCAB = 1024
LARGER = ("q_proj.weight", "o_proj.weight", "down_proj.weight")  # in `random_tensors`, three times
# Which field of a precision is the format of a matrix, by a part of its name.
FORMATS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "down_proj": "down",
    "lm_head": "head",
}


@contextlib.contextmanager
def board(mesh_opener) -> Iterator[ttnn.MeshDevice]:
    """The whole board, open for a module's tests; on a mock with shadow values for all that they make."""
    mesh = mesh_opener.open()
    if not cluster.is_mock():
        yield mesh
        return
    from models.board_mock import shadow

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
        "hidden_size": 768 if group == 3 else 512,
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
    def random(cls, config: LlamaConfig, seed: int = 0, *, sharp: bool = True) -> "Weights":
        """Larger than Hugging Face's initial ones; in bf16 on both sides of a comparison.

        sharp: as `random_tensors` makes them. Sharp attention shows small faults, and small errors grow in it: formats
        of few bits lose several percent. Without it all matrices have variance 1/inputs.
        """
        tensors = random_tensors(config, seed)
        if not sharp:
            tensors = {name: t / 3 if name.endswith(LARGER) else t for name, t in tensors.items()}
        return cls(config, tensors)

    def changed(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Weights":
        """The same model with change(name, tensor) for each tensor."""
        return Weights(self.config, {name: change(name, tensor) for name, tensor in self.items()})

    def in_formats_of(self, precision: str) -> "Weights":
        """Every matrix rounded to its format, in the order of values that it has on the device, and cut to the bits
        that its fidelity reads of it."""
        named = precision_named(precision)
        dim = self.config.head_dim

        def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
            kind = next((kind for part, kind in FORMATS.items() if part in name), None)
            if kind is None:
                return tensor
            format, fidelity = getattr(named, kind), getattr(named, f"{kind}_fidelity")
            paired = "q_proj" in name or "k_proj" in name
            matrix = interleave_pairs(tensor, dim) if paired else tensor
            device = ttnn.from_torch(matrix.t().contiguous(), dtype=ttnn_dtype(format), layout=ttnn.TILE_LAYOUT)
            matrix = device.to_torch().t().float()
            if fidelity == "LoFi":
                fraction, exponent = torch.frexp(matrix)
                matrix = torch.ldexp((fraction * 2**5).trunc(), exponent - 5)
            if paired:
                matrix = matrix.reshape(-1, dim // 2, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)
            return matrix

        return self.changed(rounded)

    def on(
        self,
        mesh: ttnn.MeshDevice,
        precision: str = "bf16",
        max_seq_len: int = 352,
        runner: Runner | None = None,
        **options: Any,
    ) -> TtnnLlama:
        """The TT-NN model of these weights."""
        named = precision_named(precision)
        source = CheckpointSource(self, mesh, named)
        return TtnnLlama(self.config, mesh, source, precision=named, max_seq_len=max_seq_len, runner=runner, **options)


@torch.no_grad()
def hf_logits(weights: Weights, ids: list[int]) -> torch.Tensor:
    """Hugging Face's logits [n, V] in fp32."""
    return hf_model(weights.config, weights)(torch.tensor([ids])).logits[0]


def random_ids(count: int, seed: int, vocab_size: int = VOCAB) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cached(model: TtnnLlama) -> torch.Tensor:
    """The whole KV cache [layers, 2, KV, S, D], chips joined: keys in the device's order of pairs, then values."""
    layers = [(layer.keys, layer.values) for layer in model.cache]
    return torch.stack([torch.stack([torch.cat(on_chips(kept), 1)[0].float() for kept in pair]) for pair in layers])


def in_pairs(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[R, heads, D] as Hugging Face has them -> in neighbouring pairs, as the device has them."""
    columns = heads.flatten(1).t()  # [heads D, R], like the rows of a weight
    return interleave_pairs(columns, head_dim).t().reshape(heads.shape)


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
