"""Llama in TT-NN on one mesh: weights, the KV cache, and prefill; `decoder` has the other forwards.

`TtnnLlama` has one sequence, `batch_model.BatchLlama` several.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import ttnn

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.ttnn_llama.device.collectives import Line, OneChip, collectives
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.modules.attention import Attention
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.modules.first_layers import FirstLayers
from models.ttnn_llama.modules.kept_states import Kept, KeptStates, NothingKept
from models.ttnn_llama.modules.kv_cache import LayerCache, PagedCache, make_cache
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.lm_head import LMHead
from models.ttnn_llama.modules.mlp import MLP
from models.ttnn_llama.modules.norm import RMSNorm
from models.ttnn_llama.modules.rope import RopeTables
from models.ttnn_llama.modules.rows import RowInputs, RowPlan
from models.ttnn_llama.shapes import MAX_ROWS, PREFILL_CHUNK, PREFILLS, padded_prompt
from models.ttnn_llama.weights.memory import kv_cache_bytes, weight_bytes
from models.ttnn_llama.weights.precision import Precision
from models.ttnn_llama.weights.tensors import WeightSpec, weight_specs


class WeightSource(Protocol):
    """Where weights come from: see `weights.CheckpointSource` and `weights.EmptySource`."""

    def tensor(self, spec: WeightSpec) -> ttnn.Tensor: ...


class Layer:
    """One decoder layer: x + attention(norm(x)), then that + mlp(norm(that))."""

    def __init__(
        self,
        weights: dict[str, ttnn.Tensor],
        cache: LayerCache | PagedCache,
        layout: Layout,
        collectives: OneChip | Line,
    ):
        self.attention_norm = RMSNorm(weights["attention_norm"], layout)
        self.attention = Attention(weights["wqkv"], weights["wo"], cache, layout, collectives)
        self.mlp_norm = RMSNorm(weights["mlp_norm"], layout)
        self.mlp = MLP(weights["w1"], weights["w3"], weights["w2"], layout, collectives)
        self.residual = layout.residual

    def decode_forward(self, x: ttnn.Tensor, tables: list[ttnn.Tensor], inputs: RowInputs, plan: RowPlan):
        """[1, 1, R, H] -> same."""
        attended = self.attention.decode_forward(self.attention_norm.decode_forward(x), tables, inputs, plan)
        x = ttnn.add(x, attended, memory_config=self.residual)
        return ttnn.add(x, self.mlp.decode_forward(self.mlp_norm.decode_forward(x)), memory_config=self.residual)

    def prefill_forward(self, x: ttnn.Tensor, tables: list[ttnn.Tensor], rotation: ttnn.Tensor, start: int):
        """[1, 1, m, H] -> same."""
        attended = self.attention.prefill_forward(self.attention_norm.prefill_forward(x), tables, rotation, start)
        middle = ttnn.add(x, attended)
        ttnn.deallocate(attended)
        return ttnn.add(middle, self.mlp.prefill_forward(self.mlp_norm.prefill_forward(middle)))


class BoardLlama(Decoder):
    """Weights, rope tables and KV cache of a Llama on all chips of a mesh, and the forward of a prompt's chunk.

    Args:
        config: the architecture.
        mesh_device: an open mesh; heads, intermediate size and vocabulary are split over its chips.
        source: the weights.
        precision: formats of weights and cache.
        max_seq_len: positions of a sequence (<= config.max_position_embeddings).
        runner: of this mesh, shared by all models on it; None: one that runs everything eagerly.
        attention_cores: that share one row and KV head in decode attention.
        prefill: "chunks", or "rows" to read prompts by decode forwards.
        slots: sequences that the cache has room for.
        pool: positions of all of them together, in pages; None: max_seq_len for each.

    Raises:
        UserError: a context longer than the model's; sizes that the chips do not divide.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh_device: ttnn.MeshDevice,
        source: WeightSource,
        *,
        precision: Precision,
        max_seq_len: int,
        runner: Runner | None = None,
        attention_cores: int = 1,
        prefill: str = PREFILLS[0],
        slots: int = 1,
        pool: int | None = None,
    ):
        if not 0 < max_seq_len <= config.max_position_embeddings:
            raise UserError(
                f"context of {max_seq_len} tokens is outside the model's 1..{config.max_position_embeddings}: "
                "lower --max-seq-len"
            )
        super().__init__({})
        specs = weight_specs(config, mesh_device.get_num_devices(), precision)
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = max_seq_len
        self.slots = slots
        self._pool = pool
        self._prompts_in_rows = prefill == "rows"
        self.mesh_device = mesh_device
        self.runner = runner or Runner(mesh_device, trace=False)
        self.layout = Layout(config, mesh_device, precision, max_seq_len, attention_cores)
        self.collectives = collectives(self.layout.chips, self.layout.residual)
        self.rope = RopeTables(config, self.layout.cache_length, mesh_device)
        self.cache = self._make_cache()
        weights = {spec.name: source.tensor(spec) for spec in specs}
        self.embedding = weights["embedding"]
        self.layers = [
            Layer(_below(f"layers.{i}.", weights), cache, self.layout, self.collectives)
            for i, cache in enumerate(self.cache)
        ]
        pieces = [weights[spec.name] for spec in specs if spec.name.startswith("head.")]
        self.head = LMHead(RMSNorm(weights["norm"], self.layout), pieces, self.layout, self.collectives)
        chips, banks = self.layout.chips, self.layout.banks
        self.weight_bytes = chips * sum(weight_bytes(spec, chips, banks) for spec in specs)
        self.kv_cache_bytes = chips * kv_cache_bytes(config, precision, chips, max_seq_len, banks, slots, pool)

    def _make_cache(self) -> Sequence[LayerCache | PagedCache]:
        """One for each layer."""
        raise NotImplementedError

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache from position 0: logits [V] fp32 that follow the last token."""
        raise NotImplementedError

    def warm_up(self, length: int) -> None:
        """Compile what a prompt of this length needs."""
        raise NotImplementedError

    def rest(self) -> None:
        """Before programs are compiled or captured: one sequence has nothing to lose by what they write."""

    def _prefill_chunk(self, tokens: Sequence[int], start: int, states: KeptStates | None = None) -> ttnn.Tensor:
        """Hidden states [1, 1, m, H] of tokens at positions start.., padded to m."""
        kept = states or NothingKept()
        m = padded_prompt(len(tokens))
        ids = self._on_device([[*tokens, *[0] * (m - len(tokens))]])
        tables = self._chunk_tables(start, m)
        x = ttnn.unsqueeze_to_4D(ttnn.embedding(ids, self.embedding, layout=ttnn.TILE_LAYOUT))
        kept.keep_chunk(0, x)
        for i, layer in enumerate(self.layers, 1):
            x = layer.prefill_forward(x, tables, self.rope.rotation, start)
            kept.keep_chunk(i, x)
        return x

    def _chunk_tables(self, start: int, m: int) -> list[ttnn.Tensor]:
        """cos and sin [1, 1, m, D] of a chunk's positions."""
        return self.rope.range(start, m)

    def _last_logits(self, x: ttnn.Tensor, last: ttnn.Tensor) -> torch.Tensor:
        """Logits [V] of a row of a chunk's hidden states [1, 1, m, H]; last [1, 1] uint32: which.

        By a lookup: cut out at its place, it would need programs of its own for every length.
        """
        row = ttnn.embedding(last, ttnn.untilize(x, use_multicore=True), layout=ttnn.TILE_LAYOUT)
        logits = self.head.logits(ttnn.interleaved_to_sharded(ttnn.unsqueeze_to_4D(row), self.layout.residual))
        return self._logits_of(logits).view(-1)

    def _on_device(self, ids: list[list[int]]) -> ttnn.Tensor:
        return ttnn.from_torch(
            torch.tensor(ids, dtype=torch.int32),
            dtype=ttnn.uint32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=self.mesh_device,
            mesh_mapper=ttnn.ReplicateTensorToMesh(self.mesh_device),
        )


class TtnnLlama(BoardLlama):
    """A Llama on all chips of a mesh, for one sequence; its arguments and errors are those of `BoardLlama`.

    Implements `models.speculative.model.LanguageModel` of one slot, and `SequenceModel` with the capabilities `Chains`,
    `Trees` and `EarlyExit`.
    """

    def _make_cache(self) -> Sequence[LayerCache]:
        return make_cache(self.layout)

    # ------------------------------------------------------------------------------------------------ prefill
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache from position 0: logits [V] fp32 that follow the last token."""
        self._check(len(tokens), 0)
        return self._read_in_rows(tokens) if self._prompts_in_rows else self._read_in_chunks(tokens)

    def _read_in_rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """By decode forwards of up to 32 tokens."""
        for start in range(0, len(tokens), MAX_ROWS):
            rows = tokens[start : start + MAX_ROWS]
            logits = self._run("logits", rows, start, None)
        return self._logits_of(logits)[len(rows) - 1]

    def _read_in_chunks(self, tokens: Sequence[int]) -> torch.Tensor:
        """In chunks of at most 1024 positions, the last one rounded up to a multiple of 128: what the padding writes
        lies beyond the prompt, where nothing is attended to before it is overwritten."""
        n = len(tokens)
        kept = self.kept if self._keeping else None
        if kept is not None:
            kept.begin(prompt=True)
        for start in range(0, n, PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            x = self._prefill_chunk(chunk, start, kept)
        last = self._on_device([[(n - 1) % PREFILL_CHUNK]])
        if kept is not None:
            kept.keep_row(last)
        return self._last_logits(x, last)

    def warm_up(self, length: int) -> None:
        """Compile what a prompt of this length needs; overwrites the cache."""
        self.prefill([0] * length)

    # ------------------------------------------------------------------------------------------- hidden states
    def keep_states(self, taps: Sequence[int]) -> KeptStates:
        """Make buffers for the hidden states after these layers, once, before programs are captured.

        Raises UserError where prompts are read by decode forwards, whose states would not last.
        """
        if self._prompts_in_rows:
            raise UserError(
                "a draft head on a board reads prompts that prefill kernels have read: use --prefill chunks"
            )
        if self.kept is None:
            self.kept = KeptStates(taps, self.layout)
        if self.kept.taps != tuple(taps):
            raise ValueError(f"states are kept after layers {self.kept.taps}, not {tuple(taps)}")
        return self.kept

    @contextlib.contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[list[Kept]]:
        """While it is entered, forwards keep their hidden states on the device; filled at the end: all layers as one.

        layers: those of `keep_states`, which comes first.
        """
        if self.kept is None or self.kept.taps != tuple(layers):
            raise ValueError(f"no states are kept after layers {tuple(layers)}: call keep_states")
        found: list[Kept] = []
        self._keeping = True
        try:
            yield found
            found.append(self.kept.latest())
        finally:
            self._keeping = False

    # ---------------------------------------------------------------------------------------- trees, early exit
    def keep(self, position: int, rows: Sequence[int]) -> int:
        """How many of a tree's rows lie where the sequence wants them: the first ones, up to one that has to move.

        Nothing is moved. The others are fed again with the next round, where rows are free.
        """
        return next((i for i, row in enumerate(rows) if row != i), len(rows))

    @functools.cached_property
    def _first_layers(self) -> dict[int, FirstLayers]:
        return {}

    def first_layers(self, count: int) -> FirstLayers:
        """The first `count` layers with the norm and the head, as a model that drafts in this one's cache. Made once,
        so that its programs can be prepared."""
        if count not in self._first_layers:
            self._first_layers[count] = FirstLayers(self, count)
        return self._first_layers[count]


def _below(prefix: str, weights: dict[str, ttnn.Tensor]) -> dict[str, ttnn.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
