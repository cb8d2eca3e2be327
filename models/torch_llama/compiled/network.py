"""A Llama's layers in compiled form: weights in panels, and what a forward hands to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.tree import tree_depths
from models.torch_llama.attention import Part
from models.torch_llama.compiled import kernels
from models.torch_llama.compiled.kernels import LANES, PANEL
from models.torch_llama.kv_cache import KVCache, block_end, blocks_of

_STORED = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
_TILE_ROWS = 12  # rows times query heads that attention takes together
_NO_TREE = np.iinfo(np.int64).max


def padded(width: int) -> int:
    """Numbers from one row to the next: whole panels."""
    return -(-width // PANEL) * PANEL


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] as panels [out / 64, in, 64], zeros behind its last output."""
    out, width = weight.shape
    filled = torch.nn.functional.pad(weight, (0, 0, 0, padded(out) - out))
    return filled.view(-1, PANEL, width).transpose(1, 2).contiguous()


def as_numbers(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as the kernels take it."""
    return tensor.view(_STORED[tensor.dtype]).numpy()


class Rows(NamedTuple):
    """What all layers of a forward have in common: arguments of `kernels.run_layers`."""

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
        head: the output matrix [V, H].
        cache: keys, 16 positions together, and values.
        positions: that rows may stand at.
    """

    dtype = torch.float32

    def __init__(
        self,
        config: LlamaConfig,
        take: Callable[[str], torch.Tensor],
        head: torch.Tensor,
        cache: KVCache,
        positions: int,
    ) -> None:
        self.config = config
        count, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        self.layers: Sequence = range(count)
        norms = np.empty((count, 2, hidden), np.float32)
        weights: torch.Tensor | None = None
        for i in self.layers:
            prefix = f"model.layers.{i}."
            names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            qkv = panels(torch.cat([take(f"{prefix}{name}.weight") for name in names]))
            gate, up = (panels(take(f"{prefix}mlp.{name}.weight")) for name in ("gate_proj", "up_proj"))
            output, down = (panels(take(f"{prefix}{name}.weight")) for name in ("self_attn.o_proj", "mlp.down_proj"))
            parts = [each.flatten() for each in (qkv, output, torch.stack((gate, up), 1), down)]
            if weights is None:
                weights = torch.empty(count, sum(map(len, parts)), dtype=parts[0].dtype)
            torch.cat(parts, out=weights[i])
            norms[i, 0] = take(prefix + "input_layernorm.weight").float()
            norms[i, 1] = take(prefix + "post_attention_layernorm.weight").float()
        assert weights is not None  # a model has layers
        cos, sin = rope_tables(config, positions)
        self.norm = take("model.norm.weight").float()
        self._norms, self._norm = norms, self.norm.numpy()
        self._weights, self._head = as_numbers(weights), as_numbers(panels(head).flatten())
        self._cos = cos[:, : dim // 2].contiguous().view(-1).numpy()
        self._sin = sin[:, dim // 2 :].contiguous().view(-1).numpy()
        self._pool = as_numbers(cache.pool).reshape(count, -1)
        self._eps = np.float32(config.rms_norm_eps)
        self._buffers: dict[str, np.ndarray] = {}

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
        config, threads = self.config, self._threads()
        n, hidden = x.shape
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        inner, group, items = config.intermediate_size, heads // kv, len(plan.tiles) * kv
        residuals = self._residuals(x)
        # Where there are few items, threads share the heads of a group.
        item_heads = group if items % threads == 0 or items > 4 * threads else 1
        room = block_end(int(plan.ends.max()))
        scratch = max(n * 2 * PANEL, max(_TILE_ROWS, group) * (2 * dim + LANES + room))
        kernels.run_layers(
            residuals.view(-1).numpy(),
            first,
            stop,
            (n, hidden, heads, kv, dim, inner),
            self._eps,
            self._norms,
            self._weights,
            self._pool,
            self._cos,
            self._sin,
            *plan,
            item_heads,
            self._buffer("normed", n * padded(hidden)),
            self._buffer("qkv", n * padded((heads + 2 * kv) * dim)),
            self._buffer("attended", n * padded(heads * dim)),
            self._buffer("gated", n * padded(inner)),
            self._buffer("scratch", threads, scratch),
            threads,
        )
        return residuals[:, :hidden]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `layers.Network`."""
        n, width = hidden.shape
        residuals = self._residuals(hidden)
        scored = torch.empty_like(residuals)
        logits = torch.empty(n, padded(self.config.vocab_size))
        kernels.run_head(
            residuals.view(-1).numpy(),
            n,
            width,
            self._eps,
            self._norm,
            self._head,
            scored.view(-1).numpy(),
            logits.view(-1).numpy(),
            self._threads(),
        )
        return scored[:, :width], logits[:, : self.config.vocab_size]

    def _residuals(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, H] with zeros behind, as the kernels take them: a copy."""
        rows = torch.zeros(len(x), padded(x.shape[1]))
        rows[:, : x.shape[1]] = x
        return rows

    def _buffer(self, name: str, *shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.float32)
        return self._buffers[name][:size].reshape(shape)

    def _threads(self) -> int:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        return threads


def _ancestors(parents: Sequence[int]) -> np.ndarray:
    """[m, m]: which rows of a tree each one sees: itself, and its ancestors."""
    seen = np.eye(len(parents), dtype=np.uint8)
    for row, parent in enumerate(parents[1:], 1):
        seen[row] |= seen[parent]
    return seen
