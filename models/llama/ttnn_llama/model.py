"""Llama in TT-NN on one mesh: prefill, decode and verify, with the KV cache of one sequence.

Decode, verification and drafting are one function of R rows (`_decode`): a row's arithmetic is the same whatever R
is, since a tile has 32 rows anyway and attention handles each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import ttnn

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.ttnn_llama.attention import Attention
from models.llama.ttnn_llama.collectives import Line, OneChip, collectives
from models.llama.ttnn_llama.kv_cache import LayerCache, make_cache
from models.llama.ttnn_llama.layout import Layout
from models.llama.ttnn_llama.lm_head import LMHead
from models.llama.ttnn_llama.memory import kv_cache_bytes, weight_bytes
from models.llama.ttnn_llama.mlp import MLP
from models.llama.ttnn_llama.norm import RMSNorm
from models.llama.ttnn_llama.precision import Precision
from models.llama.ttnn_llama.rope import RopeTables
from models.llama.ttnn_llama.rows import RowInputs, RowPlan, make_row_plan
from models.llama.ttnn_llama.runner import Runner
from models.llama.ttnn_llama.shapes import MAX_ROWS, PREFILL_CHUNK, TILE, padded_prompt, padded_rows
from models.llama.ttnn_llama.weights import WeightSpec, weight_specs


class WeightSource(Protocol):
    """Where weights come from: see `weights.CheckpointSource` and `weights.EmptySource`."""

    def tensor(self, spec: WeightSpec) -> ttnn.Tensor: ...


class Layer:
    """One decoder layer: x + attention(norm(x)), then that + mlp(norm(that))."""

    def __init__(self, weights: dict[str, ttnn.Tensor], cache: LayerCache, layout: Layout, collectives: OneChip | Line):
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


class TtnnLlama:
    """A Llama on all chips of a mesh. Implements `models.speculative.language_model.LanguageModel`.

    Args:
        config: the architecture.
        mesh_device: an open mesh; heads, intermediate size and vocabulary are split over its chips.
        source: the weights.
        precision: formats of weights and cache.
        max_seq_len: positions the cache holds (<= config.max_position_embeddings).
        runner: of this mesh, shared by all models on it; None: one that runs everything eagerly.

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
    ):
        if not 0 < max_seq_len <= config.max_position_embeddings:
            raise UserError(
                f"context of {max_seq_len} tokens is outside the model's 1..{config.max_position_embeddings}: "
                "lower --max-seq-len"
            )
        specs = weight_specs(config, mesh_device.get_num_devices(), precision)
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = max_seq_len
        self.max_rows = MAX_ROWS
        self.mesh_device = mesh_device
        self.runner = runner or Runner(mesh_device, trace=False)
        self.layout = Layout(config, mesh_device, precision, max_seq_len)
        self.collectives = collectives(self.layout.chips, self.layout.residual)
        self.rope = RopeTables(config, self.layout.cache_length, mesh_device)
        self.cache = make_cache(self.layout)
        weights = {spec.name: source.tensor(spec) for spec in specs}
        self.embedding = weights["embedding"]
        self.layers = [
            Layer(_below(f"layers.{i}.", weights), cache, self.layout, self.collectives)
            for i, cache in enumerate(self.cache)
        ]
        pieces = [weights[spec.name] for spec in specs if spec.name.startswith("head.")]
        self.head = LMHead(RMSNorm(weights["norm"], self.layout), pieces, self.layout, self.collectives)
        self.weight_bytes = sum(weight_bytes(spec, self.layout.chips, self.layout.banks) for spec in specs) * (
            self.layout.chips
        )
        self.kv_cache_bytes = kv_cache_bytes(config, precision, self.layout.chips, max_seq_len, self.layout.banks) * (
            self.layout.chips
        )
        self._plans: dict[int, RowPlan] = {}
        self._inputs: dict[tuple, RowInputs] = {}

    # ------------------------------------------------------------------------------------------------ prefill
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache from position 0: logits [V] fp32 that follow the last token.

        In chunks of at most 1024 positions, the last one rounded up to a multiple of 128: what the padding writes
        lies beyond the prompt, where nothing is attended to before it is overwritten.
        """
        n = len(tokens)
        self._check(n, 0)
        for start in range(0, n, PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            x = self._prefill_chunk(chunk, start)
        last = (n - 1) % PREFILL_CHUNK
        tile = last // TILE * TILE
        rows = ttnn.slice(x, [0, 0, tile, 0], [1, 1, tile + TILE, self.layout.hidden])
        logits = self.head.logits(ttnn.interleaved_to_sharded(rows, self.layout.residual))  # [1, 1, 32, V]
        row = last - tile
        logits = ttnn.slice(logits, [0, 0, row, 0], [1, 1, row + 1, self.vocab_size])
        return self._logits_of(logits).view(-1)

    def _prefill_chunk(self, tokens: Sequence[int], start: int) -> ttnn.Tensor:
        """Hidden states [1, 1, m, H] of tokens at positions start.., padded to m."""
        m = padded_prompt(len(tokens))
        ids = ttnn.from_torch(
            torch.tensor([[*tokens, *[0] * (m - len(tokens))]], dtype=torch.int32),
            dtype=ttnn.uint32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=self.mesh_device,
            mesh_mapper=ttnn.ReplicateTensorToMesh(self.mesh_device),
        )
        tables = self.rope.range(start, m)
        x = ttnn.unsqueeze_to_4D(ttnn.embedding(ids, self.embedding, layout=ttnn.TILE_LAYOUT))
        for layer in self.layers:
            x = layer.prefill_forward(x, tables, self.rope.rotation, start)
        return x

    # ------------------------------------------------------------------------------------------ decode, verify
    def forward(self, tokens: Sequence[int], position: int) -> torch.Tensor:
        """Logits [n, V] fp32 of tokens [n <= 32] at position..: n = 1 is decoding, n = K + 1 verification."""
        return self._logits_of(self._run("logits", tokens, position))[: len(tokens)]

    def greedy(self, tokens: Sequence[int], position: int) -> list[int]:
        """The argmax ids [n] of `forward`; only ids leave the device."""
        return self.read(self._run("ids", tokens, position))[: len(tokens)]

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """k chained greedy ids after tokens [m]: argmax feeds the next embedding, the host reads all ids at once."""
        m = len(tokens)
        self._check(m, position)
        self._check(m + k - 1, position)
        # A longer chain that is there already costs less than making a shorter one.
        key = min((key for key in self._inputs if key[1:3] == ("chain", m) and key[3] >= k), default=None)
        key = key or self.prepare_chain(m, k)
        first, step = self._inputs[key]
        first.fill(tokens, position)
        step.place(position + m)
        return self.read(self.runner.run(key))[:k]

    def prepare(self, what: str, n: int) -> tuple:
        """Register the program that gives "logits" or "ids" of up to n rows; returns its key."""
        self._check_rows(n)
        rows = padded_rows(n)
        key = (id(self), what, rows)
        if key not in self.runner:
            plan = self.plan(rows)
            inputs = self._inputs[key] = self.new_inputs(rows)
            if what == "ids":
                self.runner.add(key, lambda: self.head.argmax(self.decode(inputs, plan)))
            else:
                self.runner.add(key, lambda: self.decode(inputs, plan))
        return key

    def prepare_chain(self, m: int, k: int) -> tuple:
        """Register the program that drafts k ids after m tokens; returns its key."""
        self._check_rows(m)
        self._check_rows(k + 1)  # also what keeps a longer chain than asked for within the cache's last tile
        key = (id(self), "chain", m, k)
        if key not in self.runner:
            first, step = self.new_inputs(padded_rows(m)), self.new_inputs(1)
            self._inputs[key] = (first, step)
            self.runner.add(key, lambda: ttnn.concat(self.chain(first, step, m, k), dim=1))
        return key

    # ----------------------------------------------------------------------- on the device, for programs
    def plan(self, rows: int) -> RowPlan:
        """The plan for R rows, made once."""
        if rows not in self._plans:
            self._plans[rows] = make_row_plan(rows, self.layout, self.rope)
        return self._plans[rows]

    def new_inputs(self, rows: int) -> RowInputs:
        return RowInputs(rows, self.plan(rows).lookups, self.mesh_device)

    def decode(self, inputs: RowInputs, plan: RowPlan, ids: ttnn.Tensor | None = None) -> ttnn.Tensor:
        """Logits [1, 1, R, V] row-major of the rows in ``inputs``; ``ids`` [1, R], if given, in place of theirs."""
        embedded = ttnn.embedding(inputs.ids if ids is None else ids, self.embedding, layout=ttnn.TILE_LAYOUT)
        x = ttnn.interleaved_to_sharded(ttnn.unsqueeze_to_4D(embedded), self.layout.residual)
        tables = plan.rope_tables(inputs)
        for layer in self.layers:
            x = layer.decode_forward(x, tables, inputs, plan)
        return self.head.logits(x)

    def chain(self, first: RowInputs, step: RowInputs, m: int, k: int) -> list[ttnn.Tensor]:
        """k greedy ids, [1, 1] each, after the m tokens in ``first``; ``step`` holds the position after them."""
        ids = self.head.argmax(self.decode(first, self.plan(first.rows)))
        drafted = [ids if first.rows == 1 else ttnn.slice(ids, [0, m - 1], [1, m])]
        for i in range(k - 1):
            if i:
                ttnn.plus_one(step.positions)
                ttnn.plus_one(step.lookups)
            drafted.append(self.head.argmax(self.decode(step, self.plan(1), drafted[-1])))
        return drafted

    @staticmethod
    def read(ids: ttnn.Tensor) -> list[int]:
        """Ids that are the same on all chips, on the host: waits for the device."""
        return ttnn.to_torch(ttnn.get_device_tensors(ids)[0]).view(-1).tolist()

    # ---------------------------------------------------------------------------------------------- internals
    def _run(self, what: str, tokens: Sequence[int], position: int) -> ttnn.Tensor:
        n = len(tokens)
        self._check(n, position)
        # One row is decoding and worth a program of its own; a verification may run in one made for more rows.
        key = min((key for key in self._inputs if n > 1 and key[1] == what and key[2] >= n), default=None)
        key = key or self.prepare(what, n)
        self._inputs[key].fill(tokens, position)
        return self.runner.run(key)

    def _logits_of(self, logits: ttnn.Tensor) -> torch.Tensor:
        """[rows, V] fp32 of logits that are the same on all chips."""
        return ttnn.to_torch(ttnn.get_device_tensors(logits)[0]).view(-1, self.vocab_size).float()

    def _check(self, n: int, position: int) -> None:
        if n < 1 or position < 0 or position + n > self.max_seq_len:
            raise UserError(
                f"{n} tokens at position {position} do not fit the context of {self.max_seq_len}: "
                "shorten the prompt or raise --max-seq-len"
            )

    @staticmethod
    def _check_rows(n: int) -> None:
        if n > MAX_ROWS:
            raise UserError(f"{n} rows exceed the {MAX_ROWS} of a tile: draft at most {MAX_ROWS - 1} tokens")


def _below(prefix: str, weights: dict[str, ttnn.Tensor]) -> dict[str, ttnn.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
