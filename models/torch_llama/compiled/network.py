"""A Llama's layers in compiled form: weights in panels, and what a forward hands to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.tree import tree_depths
from models.torch_llama.attention import Part
from models.torch_llama.compiled import kernels
from models.torch_llama.compiled.kernels import LANES, PANEL
from models.torch_llama.kv_cache import KV_BLOCK, KVCache

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
        self, config: LlamaConfig, take: Callable[[str], torch.Tensor], head: torch.Tensor, cache: KVCache, positions: int
    ) -> None:
        self.config, self.cache = config, cache
        count, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        self.norms = np.empty((count, 2, hidden), np.float32)
        self.weights: torch.Tensor | None = None
        for i in range(count):
            prefix = f"model.layers.{i}."
            names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            qkv = panels(torch.cat([take(f"{prefix}{name}.weight") for name in names]))
            gate, up = (panels(take(f"{prefix}mlp.{name}.weight")) for name in ("gate_proj", "up_proj"))
            output, down = (panels(take(f"{prefix}{name}.weight")) for name in ("self_attn.o_proj", "mlp.down_proj"))
            parts = [each.flatten() for each in (qkv, output, torch.stack((gate, up), 1), down)]
            if self.weights is None:
                self.weights = torch.empty(count, sum(map(len, parts)), dtype=parts[0].dtype)
            torch.cat(parts, out=self.weights[i])
            self.norms[i, 0] = take(prefix + "input_layernorm.weight").float()
            self.norms[i, 1] = take(prefix + "post_attention_layernorm.weight").float()
        self.norm = take("model.norm.weight").float().numpy()
        self.head_weights = panels(head).flatten()
        cos, sin = rope_tables(config, positions)
        self.cos = cos[:, : dim // 2].contiguous().view(-1).numpy()
        self.sin = sin[:, dim // 2 :].contiguous().view(-1).numpy()
        self._weights, self._head = as_numbers(self.weights), as_numbers(self.head_weights)
        self._pool = as_numbers(cache.pool).reshape(count, -1)
        self.eps = np.float32(config.rms_norm_eps)
        self._buffers: dict[str, np.ndarray] = {}

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.weights.nbytes + self.head_weights.nbytes

    def _buffer(self, name: str, *shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.float32)
        return self._buffers[name][:size].reshape(shape)

    def _threads(self) -> int:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        return threads

    def run(self, x: torch.Tensor, parts: Sequence[Part], first: int, stop: int) -> torch.Tensor:
        """Residuals [n, H] behind layers first..stop-1 of rows with residuals x [n, H]; their keys and values are
        written."""
        config, threads = self.config, self._threads()
        n, hidden = x.shape
        heads, kv, dim, inner = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
        )
        residuals = torch.zeros(n, padded(hidden))
        residuals[:, :hidden] = x
        stands, places, ends = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        widest = max([len(part.tree[1]) for part in parts if part.tree] or [1])
        seen = np.zeros((n if widest > 1 else 1, widest), np.uint8)
        tiles: list[tuple[int, int, int, int]] = []
        blocks: list[int] = []
        row, most = 0, max(1, _TILE_ROWS * kv // heads)
        for table, position, rows, _, tree in parts:
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
            blocks += table.blocks[: -(-end // KV_BLOCK)]
            row += rows
        item_heads = heads // kv if len(tiles) * kv % threads == 0 or len(tiles) * kv > 4 * threads else 1
        room = int(ends.max() + KV_BLOCK - 1) // KV_BLOCK * KV_BLOCK
        scratch = max(_TILE_ROWS * 2, heads // kv) * (2 * dim + LANES + room)
        kernels.run_layers(
            residuals.view(-1).numpy(),
            first,
            stop,
            (n, hidden, heads, kv, dim, inner),
            self.eps,
            self.norms,
            self._weights,
            self._pool,
            self.cos,
            self.sin,
            stands,
            places,
            ends,
            seen,
            np.array(tiles, np.int64),
            np.array(blocks, np.int64),
            item_heads,
            self._buffer("normed", n * padded(hidden)),
            self._buffer("qkv", n * padded((heads + 2 * kv) * dim)),
            self._buffer("attended", n * padded(heads * dim)),
            self._buffer("gated", n * padded(inner)),
            self._buffer("scratch", threads, max(n * 2 * PANEL, scratch)),
            threads,
        )
        return residuals[:, :hidden]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [n, H] behind the final norm, their logits [n, V]), both fp32."""
        n, width = hidden.shape
        residuals = torch.zeros(n, padded(width))
        residuals[:, :width] = hidden
        scored = torch.empty_like(residuals)
        logits = torch.empty(n, padded(self.config.vocab_size))
        kernels.run_head(
            residuals.view(-1).numpy(),
            n,
            width,
            self.eps,
            self.norm,
            self._head,
            scored.view(-1).numpy(),
            logits.view(-1).numpy(),
            self._threads(),
        )
        return scored[:, :width], logits[:, : self.config.vocab_size]


def _ancestors(parents: Sequence[int]) -> np.ndarray:
    """[m, m]: which rows of a tree each one sees: itself, and its ancestors."""
    seen = np.eye(len(parents), dtype=np.uint8)
    for row, parent in enumerate(parents[1:], 1):
        seen[row] |= seen[parent]
    return seen
