"""A Llama's layers in compiled form: weights in panels, and what a forward hands to the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.tree import tree_depths
from models.torch_llama.attention import Part
from models.torch_llama.compiled import LANES
from models.torch_llama.compiled.builder import BF16, F16, F32
from models.torch_llama.compiled.kernels import head_fields, layer_fields, load_layers
from models.torch_llama.compiled.products import PANEL, TILE_ROWS, WIDENED
from models.torch_llama.compiled.threads import pool as threads_pool
from models.torch_llama.kv_cache import KVCache, block_end, blocks_of

STORED = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
_SERIAL = 16384  # so many numbers are normed or rotated by one thread: sooner than others could begin
_CHUNK = 66  # rows of a product that one thread takes together, at most
_TILE_ROWS = 12  # rows times query heads that attention takes together
_NO_TREE = np.iinfo(np.int64).max


def _up(number: int, whole: int) -> int:
    """The next multiple of a whole number."""
    return -(-number // whole) * whole


def padded(width: int) -> int:
    """Numbers from one row to the next: whole panels."""
    return _up(width, PANEL)


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] as panels [out / 64, in, 64], zeros behind its last output."""
    return _in_panels(weight).contiguous()


def _in_panels(weight: torch.Tensor) -> torch.Tensor:
    """The same as a view, if its outputs are whole panels."""
    out, width = weight.shape
    if out % PANEL:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, padded(out) - out))
    return weight.view(-1, PANEL, width).transpose(1, 2)


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weights [H] as fp32, zeros behind."""
    return torch.nn.functional.pad(weight.float(), (0, padded(len(weight)) - len(weight)))


# A layer's matrices in the order that kernels read them: what is read panel by panel in turn, of each what lies in it.
_MATRICES = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    (("self_attn.o_proj",),),
    (("mlp.gate_proj",), ("mlp.up_proj",)),
    (("mlp.down_proj",),),
)


class Rows(NamedTuple):
    """What all layers of a forward have in common: see `kernels.layer_fields`."""

    stands: np.ndarray
    places: np.ndarray
    ends: np.ndarray
    seen: np.ndarray
    tiles: np.ndarray
    blocks: np.ndarray


class CompiledLayers:
    """All layers of a model and its head; implements `layers.Network`.

    Args:
        config: the architecture.
        take: a tensor by name, in the model's dtype.
        head: gives the output matrix [V, H].
        cache: keys, 16 positions together, and values.
        positions: that rows may stand at.
    """

    dtype = torch.float32

    def __init__(
        self,
        config: LlamaConfig,
        take: Callable[[str], torch.Tensor],
        head: Callable[[], torch.Tensor],
        cache: KVCache,
        positions: int,
    ) -> None:
        self.config = config
        count, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        self.layers: Sequence = range(count)
        self._head = panels(head())  # first, so that what it is made of is gone before the layers are there
        norms = torch.empty(count, 2, padded(hidden))
        weights = torch.empty(count, _layer_size(config), dtype=self._head.dtype)
        for i in self.layers:
            prefix, start = f"model.layers.{i}.", 0
            for in_turn in _MATRICES:
                for j, names in enumerate(in_turn):
                    given = [take(f"{prefix}{name}.weight") for name in names]
                    made = _in_panels(torch.cat(given) if len(given) > 1 else given[0])
                    place = weights[i, start : start + len(in_turn) * made.numel()]
                    place.view(len(made), len(in_turn), *made.shape[1:])[:, j] = made
                start += len(place)
            norms[i, 0] = _wide(take(prefix + "input_layernorm.weight"))
            norms[i, 1] = _wide(take(prefix + "post_attention_layernorm.weight"))
        cos, sin = rope_tables(config, positions)
        self.norm = take("model.norm.weight").float()
        self._weights, self._norms, self._norm = weights, norms, _wide(self.norm)
        self._ones = torch.ones(LANES)
        self._cos, self._sin = cos[:, : dim // 2].contiguous(), sin[:, dim // 2 :].contiguous()
        self._pool = cache.pool
        stored = STORED[weights.dtype]
        self._code, self._fields, self._head_fields = load_layers(stored), layer_fields(stored), head_fields(stored)
        self._constants: dict[str, Any] = {
            "hidden": hidden,
            "heads": config.num_attention_heads,
            "kv": config.num_key_value_heads,
            "dim": dim,
            "inner": config.intermediate_size,
            "size": cache.pool[0, 0].numel(),
            "weight_step": weights.shape[1],
            "pool_step": cache.pool[0].numel(),
            "eps": config.rms_norm_eps,
            "scale": 1 / math.sqrt(dim),
            "norms": norms.data_ptr(),
            "cos": self._cos.data_ptr(),
            "sin": self._sin.data_ptr(),
            "ones": self._ones.data_ptr(),
            "weights": weights.data_ptr(),
            "pool": cache.pool.data_ptr(),
        }

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return self._weights.nbytes + self._head.nbytes + self._norms.nbytes + self._norm.nbytes

    def plan(self, parts: Sequence[Part], fixed: bool | None = None) -> Rows:
        """As of `layers.Network`."""
        config = self.config
        n = sum(part.used for part in parts)
        stands, places, ends = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        widest = max(len(part.tree[1]) if part.tree else 0 for part in parts)
        seen = np.zeros((n if widest else 0, widest), np.uint8)
        tiles: list[tuple[int, int, int, int]] = []
        blocks: list[int] = []
        row, most = 0, max(1, _TILE_ROWS * config.num_key_value_heads // config.num_attention_heads)
        for table, position, _, rows, tree in parts:
            end = position + rows
            ends[row : row + rows] = np.arange(position + 1, end + 1)
            for offset, place, length in table.spans(position, end):
                places[row + offset : row + offset + length] = np.arange(place, place + length)
            if tree is None:
                stands[row : row + rows] = ends[row : row + rows] - 1
                root = _NO_TREE
            else:
                root, parents = tree
                new = slice(position - root, position - root + rows)
                stands[row : row + rows] = root + np.array(tree_depths(parents)[new])
                seen[row : row + rows, : len(parents)] = _ancestors(parents)[new]
            tiles += [(row + i, row + min(rows, i + most), len(blocks), root) for i in range(0, rows, most)]
            blocks += table.blocks[: blocks_of(end)]
            row += rows
        return Rows(stands, places, ends, seen, np.array(tiles, np.int64), np.array(blocks, np.int64))

    def run(self, x: torch.Tensor, plan: Rows, first: int, stop: int) -> torch.Tensor:
        """As of `layers.Network`."""
        config, threads = self.config, torch.get_num_threads()
        n, hidden = x.shape
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        group, tiles = heads // kv, len(plan.tiles)
        residuals, items = self._residuals(x), shared_out(n, config.hidden_size)
        # Where there are few items, threads share the heads of a group.
        item_heads = group if tiles * kv % threads == 0 or tiles * kv > 4 * threads else 1
        scratch, widths = _scratch(config, items["chunk"], int(plan.ends.max())), _widths(config)
        chunks = items.pop("chunks")
        job = self._constants | items | {name: each.ctypes.data for name, each in plan._asdict().items()}
        job |= {
            "n": n,
            "first": first,
            "layers": stop - first,
            "seen_step": plan.seen.shape[1],
            "item_heads": item_heads,
            "scratch_step": scratch,
            "qkv_items": padded(widths["qkv"]) // PANEL * chunks,
            "attend_items": tiles * (heads // item_heads),
            "hidden_items": padded(hidden) // PANEL * chunks,
            "inner_items": padded(widths["gated"]) // PANEL * chunks,
            "x": residuals.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:  # its buffers are those of one forward
            job |= {name: pool.buffer(name, n * padded(width)) for name, width in widths.items()}
            job["scratch"] = pool.buffer("scratch", threads * scratch)
            pool.run(self._code, "layers", self._fields, threads, job)
        return residuals[:, :hidden]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `layers.Network`."""
        (n, width), threads = hidden.shape, torch.get_num_threads()
        residuals, items, scratch = self._residuals(hidden), shared_out(n, width), PANEL * WIDENED
        scored = torch.empty_like(residuals)
        logits = torch.empty(n, padded(self.config.vocab_size))
        panels = logits.shape[1] // PANEL
        job = items | {
            "n": n,
            "hidden": width,
            "panels": panels,
            "scratch_step": scratch,
            "panel_items": panels * items["chunks"],
            "eps": self.config.rms_norm_eps,
            "x": residuals.data_ptr(),
            "norm": self._norm.data_ptr(),
            "weights": self._head.data_ptr(),
            "scored": scored.data_ptr(),
            "logits": logits.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:
            job["scratch"] = pool.buffer("scratch", threads * scratch)
            pool.run(self._code, "head", self._head_fields, threads, job)
        return scored[:, :width], logits[:, : self.config.vocab_size]

    def _residuals(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, H] with zeros behind, as the kernels take them: a copy."""
        rows = torch.zeros(len(x), padded(x.shape[1]))
        rows[:, : x.shape[1]] = x
        return rows


def _widths(config: LlamaConfig) -> dict[str, int]:
    """Numbers of a row in each of the buffers that phases hand on."""
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    widths = {"normed": config.hidden_size, "qkv": (heads + 2 * kv) * dim, "attended": heads * dim}
    return widths | {"gated": config.intermediate_size}


def _scratch(config: LlamaConfig, chunk: int, end: int) -> int:
    """Numbers that a thread needs for itself, where so many rows are multiplied together and the last one reads up to
    a position."""
    tile = max(_TILE_ROWS, config.num_attention_heads // config.num_key_value_heads)
    return max(PANEL * (WIDENED + 2 * chunk), tile * (2 * config.head_dim + LANES + block_end(end)))


def _layer_size(config: LlamaConfig) -> int:
    """Weights of a layer in panels, without norms."""
    widths = _widths(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = (padded(widths["qkv"]) * hidden, padded(hidden) * widths["attended"], 2 * padded(inner) * hidden)
    return sum(sizes) + padded(hidden) * inner


def table_bytes(config: LlamaConfig, positions: int) -> int:
    """Memory of the tables of angles."""
    return positions * config.head_dim * 4


def buffer_bytes(config: LlamaConfig, rows: int, positions: int, threads: int) -> int:
    """Memory that all models share for as long as the process runs, after a forward of so many rows up to the last
    position."""
    scratch = threads * _scratch(config, shared_out(rows, config.hidden_size)["chunk"], positions)
    return 4 * (rows * sum(map(padded, _widths(config).values())) + scratch)


def rows_bytes(config: LlamaConfig, rows: int) -> int:
    """Memory that so many rows take while they are computed: as they come, and twice in fp32."""
    return rows * padded(config.hidden_size) * 10


def shared_out(n: int, width: int) -> dict[str, int]:
    """How n rows of so many numbers are shared out: rows of an item of a product, so many items of each panel; rows of
    an item of what has to do with single rows, so many items."""
    chunk = max(1, n) if n <= _CHUNK else min(_CHUNK, _up(-(-n // 2), TILE_ROWS))
    row_chunk = max(1, _SERIAL // padded(width))
    return {"chunk": chunk, "chunks": -(-n // chunk), "row_chunk": row_chunk, "row_items": -(-n // row_chunk)}


def _ancestors(parents: Sequence[int]) -> np.ndarray:
    """[m, m]: which rows of a tree each one sees: itself, and its ancestors."""
    seen = np.eye(len(parents), dtype=np.uint8)
    for row, parent in enumerate(parents[1:], 1):
        seen[row] |= seen[parent]
    return seen
