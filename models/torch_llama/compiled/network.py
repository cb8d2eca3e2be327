"""A Llama's layers in compiled form: weights in panels, and what a forward hands to the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.tree import tree_depths
from models.torch_llama.attention import Part
from models.torch_llama.compiled.builder import BF16, F16, F32, LANES
from models.torch_llama.compiled.kernels import head_fields, layer_fields, load_layers
from models.torch_llama.compiled.products import PANEL, TILE_ROWS, WIDENED
from models.torch_llama.compiled.threads import pool as threads_pool
from models.torch_llama.kv_cache import KV_BLOCK, KVCache

_STORED = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}
_ONES = torch.ones(LANES)
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
    out, width = weight.shape
    filled = torch.nn.functional.pad(weight, (0, 0, 0, padded(out) - out))
    return filled.view(-1, PANEL, width).transpose(1, 2).contiguous()


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weights [H] as fp32, zeros behind."""
    return torch.nn.functional.pad(weight.float(), (0, padded(len(weight)) - len(weight)))


class CompiledLayers:
    """All layers of a model and its head.

    Args:
        config: the architecture.
        take: a tensor by name, in the model's dtype.
        head: the output matrix [V, H].
        cache: keys, 16 positions together, and values.
        positions: that rows may stand at.
    """

    def __init__(
        self,
        config: LlamaConfig,
        take: Callable[[str], torch.Tensor],
        head: torch.Tensor,
        cache: KVCache,
        positions: int,
    ) -> None:
        self.config, self.cache = config, cache
        count, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        self.norms = torch.empty(count, 2, padded(hidden))
        for i in range(count):
            prefix = f"model.layers.{i}."
            names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            qkv = panels(torch.cat([take(f"{prefix}{name}.weight") for name in names]))
            gate, up = (panels(take(f"{prefix}mlp.{name}.weight")) for name in ("gate_proj", "up_proj"))
            output, down = (panels(take(f"{prefix}{name}.weight")) for name in ("self_attn.o_proj", "mlp.down_proj"))
            parts = [each.flatten() for each in (qkv, output, torch.stack((gate, up), 1), down)]
            if not i:
                self.weights = torch.empty(count, sum(map(len, parts)), dtype=parts[0].dtype)
            torch.cat(parts, out=self.weights[i])
            self.norms[i, 0] = _wide(take(prefix + "input_layernorm.weight"))
            self.norms[i, 1] = _wide(take(prefix + "post_attention_layernorm.weight"))
        self.norm = _wide(take("model.norm.weight"))
        self.head_weights = panels(head).flatten()
        cos, sin = rope_tables(config, positions)
        self._cos, self._sin = cos[:, : dim // 2].contiguous(), sin[:, dim // 2 :].contiguous()
        self.eps = config.rms_norm_eps
        stored = _STORED[self.weights.dtype]
        self._code, self._fields, self._head_fields = load_layers(stored), layer_fields(stored), head_fields(stored)
        self._constants = {
            "hidden": hidden,
            "heads": config.num_attention_heads,
            "kv": config.num_key_value_heads,
            "dim": dim,
            "inner": config.intermediate_size,
            "size": cache.pool[0, 0].numel(),
            "weight_step": self.weights.shape[1],
            "pool_step": cache.pool[0].numel(),
            "eps": self.eps,
            "scale": 1 / math.sqrt(dim),
            "norms": self.norms.data_ptr(),
            "cos": self._cos.data_ptr(),
            "sin": self._sin.data_ptr(),
            "ones": _ONES.data_ptr(),
            "weights": self.weights.data_ptr(),
            "pool": cache.pool.data_ptr(),
        }

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.weights.nbytes + self.head_weights.nbytes

    def run(self, x: torch.Tensor, parts: Sequence[Part], first: int, stop: int) -> torch.Tensor:
        """Residuals [n, H] behind layers first..stop-1 of rows with residuals x [n, H]; their keys and values are
        written."""
        config, threads = self.config, torch.get_num_threads()
        n, hidden = x.shape
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        residuals = torch.zeros(n, padded(hidden))
        residuals[:, :hidden] = x
        rows = _Rows(parts, n, max(1, _TILE_ROWS * kv // heads))
        tiles = len(rows.tiles) // 4
        item_heads = heads // kv if tiles * kv % threads == 0 or tiles * kv > 4 * threads else 1
        room = _up(int(rows.ends.max()), KV_BLOCK)
        chunk, row_chunk = _chunk(n), max(1, _SERIAL // padded(hidden))
        chunks, row_items = -(-n // chunk), -(-n // row_chunk)
        scratch = max(PANEL * (WIDENED + 2 * chunk), max(_TILE_ROWS, heads // kv) * (2 * dim + LANES + room))
        widths = {"normed": hidden, "qkv": (heads + 2 * kv) * dim, "attended": heads * dim}
        widths["gated"] = config.intermediate_size
        inner_items, hidden_items = (padded(w) // PANEL * chunks for w in (widths["gated"], hidden))
        job = self._constants | {
            "n": n,
            "first": first,
            "layers": stop - first,
            "seen_step": rows.seen.shape[1],
            "item_heads": item_heads,
            "scratch_step": scratch,
            "chunk": chunk,
            "row_chunk": row_chunk,
            "row_items": row_items,
            "qkv_items": padded(widths["qkv"]) // PANEL * chunks,
            "attend_items": tiles * (heads // item_heads),
            "hidden_items": hidden_items,
            "inner_items": inner_items,
            "x": residuals.data_ptr(),
            "stands": rows.stands.ctypes.data,
            "places": rows.places.ctypes.data,
            "ends": rows.ends.ctypes.data,
            "seen": rows.seen.ctypes.data,
            "tiles": rows.tiles.ctypes.data,
            "blocks": rows.blocks.ctypes.data,
        }
        with (pool := threads_pool()).lock:
            for name, width in widths.items():
                job[name] = pool.buffer(name, n * padded(width)).data_ptr()
            job["scratch"] = pool.buffer("scratch", threads * scratch).data_ptr()
            pool.run(self._code, "layers", self._fields, threads, job)
        return residuals[:, :hidden]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [n, H] behind the final norm, their logits [n, V]), both fp32."""
        (n, width), threads = hidden.shape, torch.get_num_threads()
        residuals = torch.zeros(n, padded(width))
        residuals[:, :width] = hidden
        scored = torch.empty_like(residuals)
        logits = torch.empty(n, padded(self.config.vocab_size))
        chunk, row_chunk, panels = _chunk(n), max(1, _SERIAL // padded(width)), logits.shape[1] // PANEL
        scratch = PANEL * WIDENED
        job = {
            "n": n,
            "hidden": width,
            "panels": panels,
            "chunk": chunk,
            "row_chunk": row_chunk,
            "scratch_step": scratch,
            "row_items": -(-n // row_chunk),
            "panel_items": panels * -(-n // chunk),
            "eps": self.eps,
            "x": residuals.data_ptr(),
            "norm": self.norm.data_ptr(),
            "weights": self.head_weights.data_ptr(),
            "scored": scored.data_ptr(),
            "logits": logits.data_ptr(),
        }
        with (pool := threads_pool()).lock:
            job["scratch"] = pool.buffer("scratch", threads * scratch).data_ptr()
            pool.run(self._code, "head", self._head_fields, threads, job)
        return scored[:, :width], logits[:, : self.config.vocab_size]


class _Rows:
    """Which rows a forward has, as the kernels take it: see `layer_fields`.

    Args:
        parts: of the forward.
        n: rows of all of them.
        most: rows that attention takes together.
    """

    def __init__(self, parts: Sequence[Part], n: int, most: int) -> None:
        self.stands, self.places, self.ends = (np.empty(n, np.int64) for _ in range(3))
        widest = max([len(part.tree[1]) for part in parts if part.tree] or [0])
        self.seen = np.zeros((n if widest else 0, widest), np.uint8)
        tiles: list[int] = []
        blocks: list[int] = []
        row = 0
        for table, position, rows, _, tree in parts:
            end = position + rows
            self.ends[row : row + rows] = np.arange(position + 1, end + 1)
            for offset, place, length in table.spans(position, end):
                self.places[row + offset : row + offset + length] = np.arange(place, place + length)
            if tree is None:
                self.stands[row : row + rows] = self.ends[row : row + rows] - 1
                root = _NO_TREE
            else:
                root, parents = tree
                new = slice(position - root, end - root)
                self.stands[row : row + rows] = root + np.array(tree_depths(parents)[new])
                self.seen[row : row + rows, : len(parents)] = _ancestors(parents)[new]
            for i in range(0, rows, most):
                tiles += (row + i, row + min(rows, i + most), len(blocks), root)
            blocks += table.blocks[: -(-end // KV_BLOCK)]
            row += rows
        self.tiles, self.blocks = np.array(tiles, np.int64), np.array(blocks, np.int64)


def _chunk(n: int) -> int:
    """Rows of an item: all, or whole tiles of many."""
    return n if n <= _CHUNK else min(_CHUNK, _up(-(-n // 2), TILE_ROWS))


def _ancestors(parents: Sequence[int]) -> np.ndarray:
    """[m, m]: which rows of a tree each one sees: itself, and its ancestors."""
    seen = np.eye(len(parents), dtype=np.uint8)
    for row, parent in enumerate(parents[1:], 1):
        seen[row] |= seen[parent]
    return seen
