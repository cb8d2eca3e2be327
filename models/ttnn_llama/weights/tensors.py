"""Weights in the layout that TT-NN runs fastest: what each device tensor holds, and where its values come from.

Letters as in `models.llama`; I intermediate size, n chips. A Hugging Face matrix is [out, in]; here it is [1, 1, in,
out], so that a row of activations multiplies it from the left. Chips share matrices, Megatron style: wqkv, w1, w3 and
the head by output columns, wo and w2 by input rows; the embedding and the norms are on every chip. Each chip spreads
its matrices over all its DRAM banks in blocks of columns, the layout of the DRAM-sharded matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.ttnn_llama.shapes import TILE
from models.ttnn_llama.weights.precision import Precision, ttnn_dtype
from models.ttnn_llama.weights.weight_cache import WeightCache

if TYPE_CHECKING:
    import ttnn

    from models.llama.gguf_checkpoint import AnyCheckpoint
    from models.ttnn_llama.weights.head_tensors import HeadTensors

# A wider piece of the head would not fit the matmul's buffers into L1.
HEAD_TILES = 512
# Numbers of chips that a mesh of a known board, or a part of it beside a draft's chip, can have.
MESH_SIZES = (1, 2, 4, 8)

Tensors = Mapping[str, torch.Tensor]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WeightSpec:
    """One tensor on the device: its layout, and how it is made from Hugging Face tensors.

    ``shape`` is the whole tensor's, over all chips. ``chip_dim`` is the dimension that chips share, None where each
    has all of it. ``layout`` is "tile" or "row_major". ``build`` takes a mapping from Hugging Face names to tensors
    and returns the whole tensor, in their dtype.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    chip_dim: int | None
    layout: str
    dram_sharded: bool
    build: Callable[[Tensors], torch.Tensor]

    def local_shape(self, chips: int) -> tuple[int, ...]:
        """What each of ``chips`` chips holds."""
        return tuple(size // chips if dim == self.chip_dim else size for dim, size in enumerate(self.shape))


def weight_specs(config: LlamaConfig, chips: int, precision: Precision) -> list[WeightSpec]:
    """All tensors of a model on ``chips`` chips, in the order of a forward.

    Names: "embedding", "layers.{i}.{attention_norm,wqkv,wo,mlp_norm,w1,w3,w2}", "norm", "head.{p}". Raises UserError
    if the model cannot be split over so many chips, or its sizes are no multiples of a tile.
    """
    check_split(config, chips)
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim

    def norm(name: str, source: str) -> WeightSpec:
        shape = (1, 1, hidden // TILE, TILE)
        return WeightSpec(name, "bf16", shape, None, "row_major", False, partial(_norm, source, shape))

    def matrix(name: str, format: str, rows: int, columns: int, chip_dim: int, build: Callable) -> WeightSpec:
        return WeightSpec(name, format, (1, 1, rows, columns), chip_dim, "tile", True, build)

    embed = "model.embed_tokens.weight"
    specs = [WeightSpec("embedding", "bf16", (vocab, hidden), None, "row_major", False, lambda tensors: tensors[embed])]
    for index in range(config.num_hidden_layers):
        to, of = f"layers.{index}.", f"model.layers.{index}."
        qkv = partial(_qkv, of + "self_attn.", config, chips)
        output = partial(_matrix, of + "self_attn.o_proj.weight")
        specs += [
            norm(to + "attention_norm", of + "input_layernorm.weight"),
            matrix(to + "wqkv", precision.attention, hidden, q_width + 2 * kv_width, 3, qkv),
            matrix(to + "wo", precision.attention, q_width, hidden, 2, output),
            norm(to + "mlp_norm", of + "post_attention_layernorm.weight"),
            matrix(to + "w1", precision.gate_up, hidden, ffn, 3, partial(_matrix, of + "mlp.gate_proj.weight")),
            matrix(to + "w3", precision.gate_up, hidden, ffn, 3, partial(_matrix, of + "mlp.up_proj.weight")),
            matrix(to + "w2", precision.down, ffn, hidden, 2, partial(_matrix, of + "mlp.down_proj.weight")),
        ]
    specs.append(norm("norm", "model.norm.weight"))
    head = embed if config.tie_word_embeddings else "lm_head.weight"
    parts = head_parts(config, chips)
    for part in range(parts):
        build = partial(_head_piece, head, chips, parts, part)
        specs.append(matrix(f"head.{part}", precision.head, hidden, vocab // parts, 3, build))
    return specs


def head_parts(config: LlamaConfig, chips: int) -> int:
    """Into how many equal pieces each chip's columns of the head are cut: the fewest of at most HEAD_TILES tiles."""
    tiles = config.vocab_size // chips // TILE
    return next(parts for parts in range(1, tiles + 1) if tiles % parts == 0 and tiles // parts <= HEAD_TILES)


def check_split(config: LlamaConfig, chips: int) -> None:
    """UserError unless each of ``chips`` chips gets whole heads and whole tiles of everything."""
    for name in ("hidden_size", "head_dim"):
        if getattr(config, name) % TILE:
            raise UserError(
                f"{name} {getattr(config, name)} is not a multiple of {TILE}, the side of a tile: "
                "TT-NN cannot run this model, use --device cpu"
            )
    refusal = _refusal(config, chips)
    if refusal:
        *fitting, last = [str(count) for count in MESH_SIZES if not _refusal(config, count)] or [""]
        counts = f"{', '.join(fitting)} or {last}" if fitting else last
        chips_word = "chip" if counts == "1" else "chips"
        raise UserError(f"{refusal}: use {f'a mesh of {counts} {chips_word}' if last else 'another model'}")


def _refusal(config: LlamaConfig, chips: int) -> str | None:
    """Why the model cannot be split over so many chips, None if it can."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % chips:
            return f"{name} {getattr(config, name)} cannot be split over {chips} chips"
    for name in ("vocab_size", "intermediate_size"):
        if getattr(config, name) % (TILE * chips):
            size = getattr(config, name)
            return f"{name} {size} cannot be split over {chips} chip{'s' * (chips > 1)} in whole tiles of {TILE}"
    return None


# ---- from Hugging Face tensors --------------------------------------------------------------------------------------


def interleave_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection [heads D, H] for `rotary_embedding_llama`.

    Hugging Face rotates dimension i of a head with i + D/2; the operation rotates 2 i with 2 i + 1 (Meta's order).
    Scores do not change: q and k are reordered alike. The inverse of transformers' `convert_llama_weights_to_hf.py`.
    """
    rows, hidden = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, hidden).transpose(1, 2).reshape(rows, hidden)


def _norm(name: str, shape: tuple[int, ...], tensors: Tensors) -> torch.Tensor:
    return tensors[name].reshape(shape)


def _matrix(name: str, tensors: Tensors) -> torch.Tensor:
    return tensors[name].t()[None, None]


def _qkv(prefix: str, config: LlamaConfig, chips: int, tensors: Tensors) -> torch.Tensor:
    """[1, 1, H, (Q + 2 KV) D]: chip after chip, each with the queries, keys and values of its own heads."""
    q, k, v = (tensors[f"{prefix}{name}_proj.weight"] for name in "qkv")
    q, k = interleave_pairs(q, config.head_dim), interleave_pairs(k, config.head_dim)
    shares = zip(q.chunk(chips), k.chunk(chips), v.chunk(chips), strict=True)
    return torch.cat([rows for share in shares for rows in share]).t()[None, None]


def _head_piece(name: str, chips: int, parts: int, part: int, tensors: Tensors) -> torch.Tensor:
    """[1, 1, H, V / parts]: of chip d the tokens from d V / n + part V / n / parts on."""
    head = tensors[name]
    vocab, hidden = head.shape
    return head.view(chips, parts, vocab // chips // parts, hidden)[:, part].reshape(-1, hidden).t()[None, None]


# ---- onto the device ------------------------------------------------------------------------------------------------


def dram_sharded(mesh_device: ttnn.MeshDevice, rows: int, columns: int) -> ttnn.MemoryConfig:
    """A matrix [rows, columns] in blocks of columns over the DRAM banks of a chip, blocks rounded up to tiles."""
    import ttnn

    banks = mesh_device.dram_grid_size().x
    width = math.ceil(columns / (TILE * banks)) * TILE
    grid = ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(banks - 1, 0))})
    shards = ttnn.ShardSpec(grid, (rows, width), ttnn.ShardOrientation.ROW_MAJOR)
    return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.WIDTH_SHARDED, ttnn.BufferType.DRAM, shards)


def _memory_config(spec: WeightSpec, mesh_device: ttnn.MeshDevice) -> ttnn.MemoryConfig:
    import ttnn

    if not spec.dram_sharded:
        return ttnn.DRAM_MEMORY_CONFIG
    rows, columns = spec.local_shape(mesh_device.get_num_devices())[-2:]
    return dram_sharded(mesh_device, rows, columns)


def _layout(spec: WeightSpec) -> ttnn.Layout:
    import ttnn

    return ttnn.TILE_LAYOUT if spec.layout == "tile" else ttnn.ROW_MAJOR_LAYOUT


class CheckpointSource:
    """A checkpoint's weights on a mesh: one tensor at a time is converted, so that the host never holds the model.

    Args:
        checkpoint: an opened checkpoint.
        mesh_device: where tensors go; its chips share them.
        precision: the one the specs were made with.
        cache_dir: directory of converted tensors (see `weight_cache`), or None to convert each time.
        progress: called after each tensor with how many are done, how many there are, and the tensor's name.
        total: how many there are, where they are not a Llama's.
    """

    def __init__(
        self,
        checkpoint: AnyCheckpoint | HeadTensors,
        mesh_device: ttnn.MeshDevice,
        precision: Precision,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
        total: int = 0,
    ) -> None:
        self._checkpoint = checkpoint
        self._mesh_device = mesh_device
        self._progress = progress
        config = checkpoint.config
        if not total and isinstance(config, LlamaConfig):
            total = len(weight_specs(config, mesh_device.get_num_devices(), precision))
        self._total = total
        self._done = 0
        self._cache = None
        if cache_dir is not None:
            self._cache = WeightCache(cache_dir, checkpoint.digest(), tuple(mesh_device.shape))

    def tensor(self, spec: WeightSpec) -> ttnn.Tensor:
        """The weight on the device, every chip with its part."""
        import ttnn

        host = self._host_tensor(spec)
        tensor = ttnn.to_device(host, self._mesh_device, memory_config=_memory_config(spec, self._mesh_device))
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total, spec.name)
        return tensor

    def _host_tensor(self, spec: WeightSpec) -> ttnn.Tensor:
        # What every chip has whole is bf16: reading it from the cache would save nothing.
        if self._cache is None or spec.chip_dim is None:
            return self._convert(spec)
        cached = self._cache.load(spec)
        if cached is None:
            cached = self._convert(spec)
            self._cache.store(spec, cached)
        return cached

    def _convert(self, spec: WeightSpec) -> ttnn.Tensor:
        """The weight in its final format on the host, split into chips."""
        import ttnn

        whole = spec.build(self._checkpoint)
        if tuple(whole.shape) != spec.shape:
            raise ValueError(f"{spec.name} was built as {list(whole.shape)}, its spec says {list(spec.shape)}")
        if spec.chip_dim is None:
            mapper = ttnn.ReplicateTensorToMesh(self._mesh_device)
        else:
            mapper = ttnn.ShardTensorToMesh(self._mesh_device, spec.chip_dim)
        return ttnn.from_torch(
            whole.to(torch.bfloat16), dtype=ttnn_dtype(spec.format), layout=_layout(spec), mesh_mapper=mapper
        )


class EmptySource:
    """Tensors of the right layout without values: to check that a model fits and runs, without its weights."""

    def __init__(self, mesh_device: ttnn.MeshDevice) -> None:
        self._mesh_device = mesh_device

    def tensor(self, spec: WeightSpec) -> ttnn.Tensor:
        """Device memory of the weight's layout, uninitialised; nothing on the host."""
        import ttnn

        return ttnn.empty(
            spec.local_shape(self._mesh_device.get_num_devices()),
            dtype=ttnn_dtype(spec.format),
            layout=_layout(spec),
            device=self._mesh_device,
            memory_config=_memory_config(spec, self._mesh_device),
        )
