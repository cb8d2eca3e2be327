"""A Llama's layers in compiled form: weights in panels, and what a forward hands to the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.model import Chain, Draws
from models.speculative.tree import tree_depths
from models.torch_llama.attention import Part
from models.torch_llama.compiled import LANES
from models.torch_llama.compiled.builder import BF16, BF16_PAIRS, F16, F32, INT8
from models.torch_llama.compiled.kernels import FORMS, fields_of, load_layers
from models.torch_llama.compiled.products import PANEL, TILE_ROWS, WIDENED, before
from models.torch_llama.compiled.threads import Prepared, bits
from models.torch_llama.compiled.threads import pool as threads_pool
from models.torch_llama.kv_cache import KVCache, block_end, blocks_of

STORED = {torch.bfloat16: BF16_PAIRS, torch.float16: F16, torch.float32: F32, torch.int8: INT8}  # of weights in panels
LARGEST = 127  # of a weight in int8, in parts of its output's scale
_SERIAL = 16384  # so many numbers are normed or rotated by one thread: sooner than others could begin
_CHUNK = 66  # rows of a product that one thread takes together, at most
_TILE_ROWS = 12  # rows times query heads that attention takes together
_NO_TREE = np.iinfo(np.int64).max
_NOTHING: Mapping[str, int] = {}
_FORMS = {torch.bfloat16: FORMS.index(BF16), torch.float16: FORMS.index(F16), torch.float32: FORMS.index(F32)}


def _up(number: int, whole: int) -> int:
    """The next multiple of a whole number."""
    return -(-number // whole) * whole


def padded(width: int) -> int:
    """Numbers from one row to the next: whole panels."""
    return _up(width, PANEL)


def panels(weight: torch.Tensor, int8: bool = False) -> torch.Tensor:
    """A matrix [out, in] as panels [out / 64, in, 64], zeros behind its last output; in bf16 with numbers in pairs.

    int8: round it to 8 bits, with a scale for each output: panels [out / 64, 4 + in, 64], the scales in front.
    """
    made = _in_panels(weight, int8)
    if not made.is_contiguous():
        made, view = torch.empty(made.shape, dtype=made.dtype), made
        _copy(view, made)
    return made.flatten(2)


def _in_panels(weight: torch.Tensor, int8: bool) -> torch.Tensor:
    """The same, or [out / 64, in, ..]; as a view, if its outputs are whole panels and are not rounded."""
    out, width = weight.shape
    if out % PANEL:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, padded(out) - out))
    filled = weight.view(-1, PANEL, width)
    if not int8 and STORED[weight.dtype].pairs:
        return filled.view(-1, PANEL // (2 * LANES), 2, LANES, width).permute(0, 4, 1, 3, 2)
    if not int8:
        return filled.transpose(1, 2)
    filled = filled.float()
    scales = filled.abs().amax(2, keepdim=True).clamp_min(1e-12) / LARGEST
    rounded = (filled / scales).round_().to(torch.int8).transpose(1, 2)
    return torch.cat((scales.contiguous().view(torch.int8).view(-1, before(INT8), PANEL), rounded), 1)


def _copy(made: torch.Tensor, to: torch.Tensor) -> None:
    """Copy panels; of pairs one half after the other, which takes two thirds of the time."""
    if made.dim() == 3:
        to.copy_(made)
        return
    for half in range(2):
        to[..., half].copy_(made[..., half])


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weights [H] as fp32, zeros behind."""
    return torch.nn.functional.pad(weight.float(), (0, padded(len(weight)) - len(weight)))


class _Choice:
    """What the steps of a chain choose, and how: arguments as of `layers.Chained`; vocabulary: of the text.

    fields: of the job.
    """

    def __init__(self, least: Sequence[float], ids: torch.Tensor | None, draws: Draws | None, vocabulary: int) -> None:
        steps = len(least)
        self._ids, self._chances = np.zeros(steps + 1, np.int64), np.ones(steps + 1, np.float32)
        self._least, self._laws = np.array(least, np.float32), None
        self.fields = {
            "steps": steps,
            "choose_items": 1,
            "map": 0 if ids is None else ids.data_ptr(),
            "ids": self._ids.ctypes.data,
            "chances": self._chances.ctypes.data,
            "least": self._least.ctypes.data,
        }
        if draws is not None:
            self._laws, self._words = torch.zeros(steps, vocabulary), np.array(draws.words[:steps], np.uint64)
            self.fields |= {
                "laws": self._laws.data_ptr(),
                "words": self._words.ctypes.data,
                "coldness": bits(1 / draws.temperature),
                "text_vocabulary": vocabulary,
                "top_k": draws.top_k if draws.top_k < vocabulary else 0,
                "top_p": bits(draws.top_p),
            }

    def chain(self) -> Chain:
        """What was chosen."""
        count = int(self._ids[-1])
        laws = None if self._laws is None else self._laws[:count]
        return Chain(self._ids[:count].tolist(), self._chances[1 : count + 1].tolist(), laws)


class Rows(NamedTuple):
    """What all layers of a forward have in common.

    longest: positions that the last of its rows see. fields: of the job, see `kernels.fields_of`. held: what the
    addresses among them point to.
    """

    tiles: int
    longest: int
    fields: dict[str, int]
    held: tuple[np.ndarray, ...]


Take = Callable[[str], torch.Tensor]

# Of each matrix of a layer, how many are read panel by panel in turn, and which of them it is.
_TURNS = ((1, 0), (1, 0), (2, 0), (2, 1), (1, 0))


def attention_and_mlp(take: Take, prefix: str) -> Iterable[torch.Tensor]:
    """The matrices of a layer whose tensors' names begin so, as `InPanels` takes them."""
    yield torch.cat([take(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"])
    for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        yield take(f"{prefix}{name}_proj.weight")


class InPanels:
    """Layers, a final norm and an output matrix.

    Args:
        config: of the layers.
        layers: of each, made one after the other: matrices [out, in] of queries, keys and values together, of the
            output, the gate, "up" and down; norms [H] of what attention and what the MLP takes, more where there are.
        norm: the final one's weights [H].
        head: gives the output matrix [V, H].
        cache: keys, 16 positions together, and values, in the matrices' dtype; with int8 in fp32.
        positions: that rows may stand at.
        int8: round the matrices to 8 bits.
        wide: numbers that queries, keys and values are made of, if not H.
    """

    dtype = torch.float32

    def __init__(
        self,
        config: LlamaConfig,
        layers: Iterable[tuple[Iterable[torch.Tensor], Sequence[torch.Tensor]]],
        norm: torch.Tensor,
        head: Callable[[], torch.Tensor],
        cache: KVCache,
        positions: int,
        int8: bool = False,
        wide: int | None = None,
    ) -> None:
        self.config = config
        count, hidden, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        self.layers: Sequence = range(count)
        output = head()
        self.vocab_size = len(output)
        self._head = panels(output, int8)
        del output  # so that what the head is made of is gone before the layers are there
        front = before(STORED[self._head.dtype])
        weights = torch.empty(count, _layer_size(config, wide or hidden, front), dtype=self._head.dtype)
        norms = torch.empty(0)
        for i, (matrices, normed) in enumerate(layers):
            start = 0
            for matrix, (turns, turn) in zip(matrices, _TURNS, strict=True):
                made = _in_panels(matrix, int8)
                place = weights[i, start : start + turns * made.numel()]
                _copy(made, place.view(len(made), turns, *made.shape[1:])[:, turn])
                start += len(place) if turn == turns - 1 else 0
            if not i:
                norms = torch.empty(count, len(normed), padded(hidden))
            torch.stack([_wide(each) for each in normed], out=norms[i])
        cos, sin = rope_tables(config, positions)
        self.norm = norm.float()
        self._weights, self._norms, self._norm = weights, norms, _wide(self.norm)
        self._ones, self._lanes = torch.ones(LANES), torch.arange(float(LANES))
        self._cos, self._sin = cos[:, : dim // 2].contiguous(), sin[:, dim // 2 :].contiguous()
        self._pool, self._no_taps = cache.pool, np.zeros(count, np.int64)
        stored = STORED[weights.dtype]
        constants: dict[str, float] = {
            "hidden": hidden,
            "panels": padded(self.vocab_size) // PANEL,
            "vocabulary": self.vocab_size,
            "eps": config.rms_norm_eps,
            "norm": self._norm.data_ptr(),
            "matrix": self._head.data_ptr(),
            "steps": 1,
            "wide": wide or hidden,
            "heads": config.num_attention_heads,
            "kv": config.num_key_value_heads,
            "dim": dim,
            "inner": config.intermediate_size,
            "size": cache.pool[0, 0].numel(),
            "weight_step": weights.shape[1],
            "pool_step": cache.pool[0].numel(),
            "scale": 1 / math.sqrt(dim),
            "norms": norms.data_ptr(),
            "cos": self._cos.data_ptr(),
            "sin": self._sin.data_ptr(),
            "ones": self._ones.data_ptr(),
            "lanes": self._lanes.data_ptr(),
            "weights": weights.data_ptr(),
            "pool": cache.pool.data_ptr(),
            "taps": self._no_taps.ctypes.data,
        }
        self._job = Prepared(load_layers(stored), "layers", fields_of(stored), constants)
        self._between = _widths(config, wide or hidden)
        self._tile_rows = max(1, _TILE_ROWS * config.num_key_value_heads // config.num_attention_heads)
        self._counts: dict[int, dict[str, int]] = {}

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return self._weights.nbytes + self._head.nbytes + self._norms.nbytes + self._norm.nbytes

    def plan(self, parts: Sequence[Part], fixed: bool | None = None) -> Rows:
        """As of `layers.Network`."""
        if len(parts) == 1 and parts[0].rows == 1 and parts[0].tree is None:
            table, position = parts[0][:2]
            one = [position, table.at(position), position + 1, 0, 1, 0, _NO_TREE]
            one += table.blocks[: blocks_of(position + 1)]
            return _rows(1, 1, position + 1, np.array(one, np.int64))
        n = sum(part.used for part in parts)
        stands, places, ends = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        widest = max(len(part.tree[1]) if part.tree else 0 for part in parts)
        seen = np.zeros((n, widest), np.uint8) if widest else None
        tiles: list[int] = []
        blocks: list[int] = []
        row, most = 0, self._tile_rows
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
                assert seen is not None
                seen[row : row + rows, : len(parents)] = _ancestors(parents)[new]
            for i in range(0, rows, most):
                tiles += (row + i, row + min(rows, i + most), len(blocks), root)
            blocks += table.blocks[: blocks_of(end)]
            row += rows
        words = np.concatenate((stands, places, ends, np.array(tiles + blocks, np.int64)))
        return _rows(n, len(tiles) // 4, int(ends.max()), words, seen)

    def _chain_plan(self, part: Part, steps: int) -> Rows:
        """As `plan`, for a chain that begins with rows of one sequence: those of its later steps follow them."""
        table, position, _, n, _ = part
        stands = np.arange(position, position + n + steps - 1)
        places = np.empty_like(stands)
        for offset, place, length in table.spans(position, position + len(stands)):
            places[offset : offset + length] = np.arange(place, place + length)
        most = self._tile_rows
        tiles = [(i, min(n, i + most), 0, _NO_TREE) for i in range(0, n, most)]
        first, end = len(tiles), position + len(stands)
        tiles += [(0, 1, 0, _NO_TREE)] * (steps - 1)
        blocks = table.blocks[: blocks_of(end)]
        words = np.concatenate((stands, places, stands + 1, np.array(tiles, np.int64).reshape(-1), np.array(blocks)))
        return _rows(len(stands), len(tiles), end, words)._replace(tiles=first)

    def _chain(
        self,
        x: torch.Tensor,
        part: Part,
        least: Sequence[float],
        table: torch.Tensor,
        ids: torch.Tensor | None = None,
        more: Mapping[str, int] = _NOTHING,
        draws: Draws | None = None,
    ) -> tuple[Chain, torch.Tensor]:
        """Draft a chain in one job: (what was drafted, the state that its last row passes on).

        Args:
            x: rows before the layers, in panels; changed.
            part: where they stand, in a text and not in a tree.
            least, table, ids, draws: as of `layers.Chained`.
            more: fields of the job.
        """
        n, hidden = len(x), self.config.hidden_size
        choice, logits = _Choice(least, ids, draws, len(table)), torch.empty(padded(self.vocab_size))
        scored = torch.empty(1, padded(hidden))
        changes = {
            **more,
            **choice.fields,
            "last_alone": 1,
            "last_items": 1,
            "panel_items": len(logits) // PANEL,
            "form": _FORMS[table.dtype],
            "table": table.data_ptr(),
            "scored": scored.data_ptr(),
            "logits": logits.data_ptr(),
        }
        self._run(x, self._chain_plan(part, len(least)), 0, len(self.layers), changes)
        chain = choice.chain()
        last = x[n - 1 :] if len(chain.ids) == 1 else x[:1]
        return chain, (scored if more.get("hands_on") else last)[:, :hidden]

    def draw(self, logits: torch.Tensor, draws: Draws, vocabulary: int, ids: torch.Tensor | None = None) -> Chain:
        """Draw an id from logits [1, V] as a chain would; vocabulary: of the text. ids: as of `layers.Chained`."""
        choice, row = _Choice([0.0], ids, draws, vocabulary), torch.empty(padded(self.vocab_size))
        row[: self.vocab_size] = logits[0]
        pool = threads_pool()
        with pool.lock:
            pool.run(self._job, 1, {"n": 1, "row_items": 1, **choice.fields, "logits": row.data_ptr()})
        return choice.chain()

    def _run(
        self, x: torch.Tensor, plan: Rows, first: int, stop: int, more: Mapping[str, int] = _NOTHING
    ) -> torch.Tensor:
        """Rows [n, H] behind some layers. x: of them before, in panels; changed. more: fields of the job."""
        config, threads = self.config, torch.get_num_threads()
        n, group, tiles = len(x), config.num_attention_heads // config.num_key_value_heads, plan.tiles
        work = tiles * config.num_key_value_heads
        # Where there are few items, threads share the heads of a group.
        item_heads = group if work % threads == 0 or work > 4 * threads else 1
        counts = self._counted(n)
        scratch = _scratch(config, counts["chunk"], plan.longest)
        changes = {
            **counts,
            **plan.fields,
            **more,
            "first": first,
            "rounds": stop - first,
            "tile_count": tiles,
            "item_heads": item_heads,
            "scratch_step": scratch,
            "attend_items": tiles * (config.num_attention_heads // item_heads),
            "x": x.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:  # its buffer is that of one forward
            place = pool.buffer("layers", n * sum(map(padded, self._between.values())) + threads * scratch)
            for name, width in self._between.items():
                changes[name] = place
                place += 4 * n * padded(width)
            changes["scratch"] = place
            pool.run(self._job, threads, changes)
        return x

    def _counted(self, n: int) -> dict[str, int]:
        """Fields of the job of some layers that follow from the number of rows."""
        if n not in self._counts:
            counts = {"n": n, **shared_out(n, self.config.hidden_size)}
            chunks = counts.pop("chunks")
            widths = {"qkv": self._between["qkv"], "hidden": self.config.hidden_size, "inner": self._between["gated"]}
            counts |= {f"{name}_items": padded(width) // PANEL * chunks for name, width in widths.items()}
            self._counts[n] = counts
        return self._counts[n]

    def _scores(self, x: torch.Tensor, normed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(states behind the final norm, in panels, logits [n, V]) of states before it, in panels, or behind it."""
        n, threads = len(x), torch.get_num_threads()
        scored, logits = x if normed else torch.empty_like(x), torch.empty(n, padded(self.vocab_size))
        changes = shared_out(n, x.shape[1])
        changes |= {
            "n": n,
            "last_items": 0 if normed else changes["row_items"],
            "panel_items": logits.shape[1] // PANEL * changes.pop("chunks"),
            "scratch_step": PANEL * WIDENED,
            "x": x.data_ptr(),
            "scored": scored.data_ptr(),
            "logits": logits.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:
            changes["scratch"] = pool.buffer("scratch", threads * PANEL * WIDENED)
            pool.run(self._job, threads, changes)
        return scored, logits[:, : self.vocab_size]


def _rows(n: int, tiles: int, longest: int, words: np.ndarray, seen: np.ndarray | None = None) -> Rows:
    """words: stands, places and ends of n rows, tiles, blocks."""
    place = words.ctypes.data
    fields = {"stands": place, "places": place + 8 * n, "ends": place + 16 * n, "tiles": place + 24 * n}
    fields["blocks"] = place + 24 * n + 32 * tiles
    if seen is None:
        return Rows(tiles, longest, fields, (words,))
    return Rows(tiles, longest, fields | {"seen": seen.ctypes.data, "seen_step": seen.shape[1]}, (words, seen))


class CompiledLayers(InPanels):
    """All layers of a model and its head; implements `layers.Network`.

    Args:
        config: the architecture.
        take: a tensor by name, in the model's dtype.
        head, cache, positions, int8: as of `InPanels`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        take: Take,
        head: Callable[[], torch.Tensor],
        cache: KVCache,
        positions: int,
        int8: bool = False,
    ) -> None:
        def layers() -> Iterable[tuple[Iterable[torch.Tensor], Sequence[torch.Tensor]]]:
            for i in range(config.num_hidden_layers):
                prefix = f"model.layers.{i}."
                norms = [take(f"{prefix}{name}_layernorm.weight") for name in ("input", "post_attention")]
                yield attention_and_mlp(take, prefix), norms

        super().__init__(config, layers(), take("model.norm.weight"), head, cache, positions, int8)

    def run(
        self, x: torch.Tensor, plan: Rows, first: int, stop: int, taps: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As of `layers.Network`."""
        x, hidden = in_panels(x), x.shape[1]
        if not taps:
            return self._run(x, plan, first, stop)[:, :hidden], []
        kept, words = torch.empty(len(taps), *x.shape), self._no_taps.copy()
        words[list(taps)] = [states.data_ptr() for states in kept]
        self._run(x, plan, first, stop, {"taps": words.ctypes.data})
        return x[:, :hidden], [states[:, :hidden] for states in kept]

    def chain(
        self, x: torch.Tensor, part: Part, least: Sequence[float], table: torch.Tensor, draws: Draws | None = None
    ) -> Chain:
        """As of `layers.Chained`."""
        return self._chain(in_panels(x), part, least, table, draws=draws)[0]

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `layers.Network`."""
        scored, logits = self._scores(in_panels(hidden))
        return scored[:, : hidden.shape[1]], logits


def in_panels(x: torch.Tensor) -> torch.Tensor:
    """Rows [n, H] in fp32 with zeros behind, as the kernels take them: a copy."""
    if x.shape[1] % PANEL == 0:
        return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    rows = torch.zeros(len(x), padded(x.shape[1]))
    rows[:, : x.shape[1]] = x
    return rows


def _widths(config: LlamaConfig, wide: int) -> dict[str, int]:
    """Numbers of a row in each of the buffers that phases hand on; queries, keys and values are made of so many."""
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    widths = {"normed": wide, "qkv": (heads + 2 * kv) * dim, "attended": heads * dim}
    return widths | {"gated": config.intermediate_size}


def _scratch(config: LlamaConfig, chunk: int, longest: int) -> int:
    """Numbers that a thread needs for itself, where so many rows are multiplied together and the last one sees so many
    positions."""
    tile = max(_TILE_ROWS, config.num_attention_heads // config.num_key_value_heads)
    return max(PANEL * (WIDENED + 2 * chunk), tile * (2 * config.head_dim + LANES + block_end(longest)))


def _layer_size(config: LlamaConfig, wide: int, front: int) -> int:
    """Numbers of a layer in panels, without norms; each panel has so many rows in front of its weights."""
    widths, hidden, inner = _widths(config, wide), config.hidden_size, config.intermediate_size
    matrices = [(widths["qkv"], wide), (hidden, widths["attended"]), (inner, hidden), (inner, hidden), (hidden, inner)]
    return sum(padded(out) * (width + front) for out, width in matrices)


def table_bytes(config: LlamaConfig, positions: int) -> int:
    """Memory of the tables of angles."""
    return positions * config.head_dim * 4


def buffer_bytes(config: LlamaConfig, rows: int, positions: int, threads: int) -> int:
    """Memory that all models share for as long as the process runs, after a forward of so many rows up to the last
    position."""
    hidden = config.hidden_size
    scratch = threads * _scratch(config, shared_out(rows, hidden)["chunk"], positions)
    return 4 * (rows * sum(map(padded, _widths(config, hidden).values())) + scratch)


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
