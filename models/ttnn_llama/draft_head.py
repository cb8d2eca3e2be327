"""An EAGLE-3 draft head in TT-NN, on its target's chips: one layer that reads the target's hidden states.

What it computes is `torch_llama.draft_head`'s. The row of the token at position p joins the token's embedding with a
state of position p - 1, and lies at p - 1 in the head's own cache. Two matrices take what lies side by side in two or
more parts (the fused states, and the token beside the state); they are cut into a matrix for each part, so that no
tensor has to be joined and sharded anew.

A drafted token has a number in the draft vocabulary, and is looked up in a table of the draft vocabulary's embeddings,
copied out of the target's. So the target's ids, which bf16 (all that `ttnn.embedding` looks up) cannot hold, are never
needed on the device; the host maps the numbers that it reads.

Layer, cache and output matrix are split over the chips as the target's are; `fc`, which runs once a round, is whole on
each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import ttnn

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.speculative.model import SlotBySlot
from models.ttnn_llama.device.collectives import collectives
from models.ttnn_llama.model import TtnnLlama, WeightSource
from models.ttnn_llama.modules.attention import Attention
from models.ttnn_llama.modules.kept_states import Kept, rows_of, state_buffer, write_rows
from models.ttnn_llama.modules.kv_cache import make_cache
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.linear import SplitLinear
from models.ttnn_llama.modules.lm_head import LMHead
from models.ttnn_llama.modules.mlp import MLP
from models.ttnn_llama.modules.norm import RMSNorm
from models.ttnn_llama.modules.rope import RopeTables
from models.ttnn_llama.modules.rows import HeadInputs, RowInputs, RowPlan, make_row_plan
from models.ttnn_llama.shapes import MAX_ROWS, PREFILL_CHUNK, padded_rows
from models.ttnn_llama.weights.head_tensors import drafting_config, head_specs
from models.ttnn_llama.weights.memory import kv_cache_bytes, weight_bytes
from models.ttnn_llama.weights.precision import Precision


class TtnnHead(SlotBySlot):
    """A draft head beside its target.

    Implements `models.speculative.model.DraftHead` and `DraftModel` of one slot; it drafts chains.

    Args:
        config: its shape.
        target: on the same mesh; its forwards leave their states for the head, in the programs made from now on.
        source: the weights, see `weights.head_tensors`.
        target_ids: [V_d] the target's id for each of its logits; None: they are the same.
        precision: formats of weights and cache.
        max_seq_len: positions of a text.
        attention_cores: as of `TtnnLlama`.

    Raises:
        UserError: sizes that the chips do not divide, or that boards have no code for.
    """

    max_rows = MAX_ROWS
    lasting = False

    def __init__(
        self,
        config: HeadConfig,
        target: TtnnLlama,
        source: WeightSource,
        *,
        target_ids: torch.Tensor | None,
        precision: Precision,
        max_seq_len: int,
        attention_cores: int = 1,
    ) -> None:
        mesh_device = target.mesh_device
        specs = head_specs(config, mesh_device.get_num_devices(), precision)
        if (target_ids is None) == config.reduced:
            raise ValueError("a reduced vocabulary needs the target's ids, and another has none")
        self.config, self.target, self.target_ids = config, target, target_ids
        self.taps, self.vocab_size = config.taps, config.draft_vocab_size
        self.target_vocab_size = config.layer.vocab_size
        self.max_seq_len = max_seq_len
        self.mesh_device, self.runner = mesh_device, target.runner
        self.kept = target.keep_states(config.taps)
        layer: LlamaConfig = drafting_config(config)
        self.layout = layout = Layout(layer, mesh_device, precision, max_seq_len, attention_cores)
        self.residual = layout.residual
        shared = collectives(layout.chips, layout.residual)
        self.rope = RopeTables(layer, layout.cache_length, mesh_device)
        (self.cache,) = make_cache(layout)
        weights = {spec.name: source.tensor(spec) for spec in specs}

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights[name], layout)

        def parts(name: str) -> list[ttnn.Tensor]:
            return [weights[spec.name] for spec in specs if spec.name.startswith(f"{name}.")]

        self.fc = SplitLinear(
            parts("fc"),
            layout,
            weight_format=precision.attention,
            fidelity=precision.attention_fidelity,
            in_cores=layout.residual_cores,
            output=layout.residual,
        )
        self.state_norms = [norm(spec.name) for spec in specs if spec.name.startswith("fc_norm.")]
        self.token_norm, self.state_norm = norm("token_norm"), norm("state_norm")
        self.attention = Attention(parts("wqkv"), weights["wo"], self.cache, layout, shared)
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(weights["w1"], weights["w3"], weights["w2"], layout, shared)
        self.norm = norm("norm")
        self.head = LMHead(self.norm, parts("head"), layout, shared)
        self.embedding = target.embedding
        self.draft_embedding = weights.get("embedding", target.embedding)
        self.weight_bytes = layout.chips * sum(weight_bytes(spec, layout.chips, layout.banks) for spec in specs)
        self.kv_cache_bytes = layout.chips * kv_cache_bytes(layer, precision, layout.chips, max_seq_len, layout.banks)
        self._own = state_buffer(layer.hidden_size, mesh_device)  # what its last forward passed on
        self._plans: dict[int, RowPlan] = {}
        self._inputs: dict[tuple, HeadInputs] = {}
        self._chain_inputs: dict[tuple, tuple[HeadInputs, RowInputs]] = {}
        self._forget()

    def _forget(self) -> None:
        self._features: Kept | None = None
        self._rows: list[int] = []  # of the features, those that belong to the text
        self._first = 0  # position of the first of them
        self._of_prompt = False  # whether they are a prompt's, of which the last row alone is in the buffers
        self._last, self._last_row = -1, 0  # position that a forward computed last, and its row there

    def free(self, slot: int) -> None:
        """A sequence has ended: forget its states."""
        self._forget()

    # ------------------------------------------------------------------------------------------------- states
    def states(self, features: Kept, rows: Sequence[int], position: int) -> None:
        """Take the target's hidden states of some positions; they have to be used before its next forward.

        features: as its `Step` gave them. rows: those of them that belong to the text, in its order. position: of the
        first; the others follow it.
        """
        if features.states is not self.kept:
            raise ValueError("states of another target: a head reads its own")
        self._features, self._rows, self._first = features, list(rows), position
        self._of_prompt = features.chunks is not None

    def pending(self, end: int) -> int:
        """Position of the first row that the states at hand serve, of a text of so many tokens whose prompt is read."""
        return end - 1 if self._of_prompt else self._first + 1

    def picks(self, position: int, n: int) -> list[int]:
        """Rows of the buffers that hold the states before the rows at position.. . ValueError where they do not."""
        features, start = self._features, position - 1 - self._first
        if features is None or start < 0 or start + n > len(self._rows):
            known = f"{self._first}..{self._first + len(self._rows) - 1} are" if self._rows else "none are"
            raise ValueError(
                f"{n} rows at position {position}: the target's states before them are not known ({known})"
            )
        if not features.lasting:
            raise UserError(
                f"the target's states before position {position} are overwritten: a draft head on a board needs "
                "batched verification"
            )
        if self._of_prompt:
            if (start, n) != (len(self._rows) - 1, 1):
                raise ValueError(f"{n} rows at position {position} of a prompt: read it first")
            return [0]
        return self._rows[start : start + n]

    # ------------------------------------------------------------------------------------------------ forwards
    def read(self, tokens: Sequence[int], position: int) -> None:
        """Write keys and values of tokens at position >= 1.., whose states before them were given."""
        self._check(len(tokens), position)
        if self._of_prompt and position == 1:
            of_prompt = len(self._rows) - 1  # rows of the prompt: the one after it, if it is asked for, is apart
            self._read_prompt(tokens[:of_prompt])
            tokens, position = tokens[of_prompt:], position + of_prompt
        if tokens:
            picks = self.picks(position, len(tokens))
            key = self._program("read", len(tokens)) or self.prepare("read", len(tokens))
            self._inputs[key].fill_picked(tokens, position - 1, picks)
            self.runner.run(key)
        self._last = -1

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [V_d] after a text of at least two tokens from its beginning, whose states were given."""
        if len(tokens) < 2:
            raise ValueError("a head has no row for position 0: give at least two tokens")
        if len(tokens) > 2:
            self.read(tokens[1:-1], 1)
        return self.forward(tokens[-1:], len(tokens) - 1)[-1]

    def forward(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [n, V_d] fp32 of tokens [n <= 32] at position..: rows whose states before them were given, or one
        token after the row computed last. Trees are refused."""
        n = len(tokens)
        self._check(n, position)
        if parents is not None:
            raise UserError("a draft head on a board drafts chains: use --drafter head or combined, not tree")
        if n == 1 and position == self._last + 1 and position > self._first + len(self._rows):
            what, picks = "step", [self._last_row]
        else:
            what, picks = "logits", self.picks(position, n)
        key = self._program(what, n) or self.prepare(what, n)
        self._inputs[key].fill_picked(tokens, position - 1, picks)
        self._last, self._last_row = position + n - 1, n - 1
        return self._on_host(self.runner.run(key))[:n]

    def _on_host(self, logits: ttnn.Tensor) -> torch.Tensor:
        """[rows, V_d] fp32 of logits that are the same on all chips: waits for the device."""
        return ttnn.to_torch(ttnn.get_device_tensors(logits)[0]).view(-1, self.vocab_size).float()

    def greedy(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> list[int]:
        """The target's ids [n] of greatest logit of `forward`."""
        return self.ids_of(self.forward(tokens, position, parents).argmax(-1).tolist())

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """k chained greedy ids after tokens, whose states before them were given; the host reads all at once."""
        self._check(len(tokens), position)
        self._check(len(tokens) + k - 1, position)
        key = min((key for key in self._chain_inputs if key[2] >= k), key=lambda key: key[2], default=None)
        key = key or self.prepare_chain(k)
        first, step = self._chain_inputs[key]
        tokens, position = self.read_early(tokens, position, first.rows)
        self.fill_chain(first, step, tokens, position)
        return self.ids_of(TtnnLlama.read(self.runner.run(key)))[:k]

    def read_early(self, tokens: Sequence[int], position: int, rows: int) -> tuple[Sequence[int], int]:
        """What is left for a forward of so many rows: where the tokens are more, all but the last are read here."""
        if len(tokens) <= rows:
            return tokens, position
        self.read(tokens[:-1], position)
        return tokens[-1:], position + len(tokens) - 1

    def fill_chain(self, first: HeadInputs, step: RowInputs, tokens: Sequence[int], position: int) -> None:
        """Fill the inputs of `chain`."""
        first.fill_picked(tokens, position - 1, self.picks(position, len(tokens)))
        step.place(position - 1 + len(tokens))
        self._last = -1

    def ids_of(self, numbers: Sequence[int]) -> list[int]:
        """The target's ids of numbers in the draft vocabulary."""
        return list(numbers) if self.target_ids is None else self.target_ids[list(numbers)].tolist()

    # ------------------------------------------------------------------------------------------------ programs
    def prepare(self, what: str, n: int) -> tuple:
        """Register a program of up to n rows; returns its key.

        "logits": of rows whose states are the target's. "step": of one row after the head's own. "read": the first,
        for keys and values alone.
        """
        rows = padded_rows(n)
        key = (id(self), what, rows)
        if key not in self.runner:
            inputs = self._inputs[key] = self.new_inputs(rows)
            body = {"logits": self._logits, "step": self._step, "read": self._read}[what]
            self.runner.add(key, lambda: body(inputs))
        return key

    def prepare_chain(self, k: int) -> tuple:
        """Register the program that drafts k ids after what a verification of k ids can leave; returns its key."""
        key = (id(self), "chain", k)
        if key not in self.runner:
            first, step = self.new_inputs(padded_rows(k + 1)), self.new_step()
            self._chain_inputs[key] = (first, step)
            self.runner.add(key, lambda: ttnn.concat(self.chain(first, step, k), dim=0))
        return key

    def new_inputs(self, rows: int) -> HeadInputs:
        """Buffers for R rows whose states are looked up."""
        return HeadInputs(rows, self.plan(rows).lookups, self.mesh_device)

    def new_step(self) -> RowInputs:
        """Buffers for one row of a chain."""
        return RowInputs(1, self.plan(1).lookups, self.mesh_device)

    def plan(self, rows: int) -> RowPlan:
        """The plan for R rows, made once."""
        if rows not in self._plans:
            self._plans[rows] = make_row_plan(rows, self.layout, self.rope)
        return self._plans[rows]

    def _program(self, what: str, n: int) -> tuple | None:
        keys = [key for key in self._inputs if key[1] == what and key[2] >= n]
        return min(keys, key=lambda key: (not self.runner.is_trace(key), key[1:]), default=None)

    def chain(self, first: HeadInputs, step: RowInputs, k: int) -> list[ttnn.Tensor]:
        """k greedy numbers of the draft vocabulary, a page [1, 1] each, after the last row of ``first``; ``step`` holds
        the position after it."""
        hidden = ttnn.untilize(self._interleaved(self._true_rows(first)), use_multicore=True)
        row = ttnn.embedding(first.last, hidden, layout=ttnn.TILE_LAYOUT)
        hidden = ttnn.interleaved_to_sharded(ttnn.unsqueeze_to_4D(row), self.residual)
        normed = self.norm.decode_forward(hidden)
        drafted = [self.head.argmax(self.head.project(normed))]
        for i in range(k - 1):
            if i:
                ttnn.plus_one(step.positions)
                ttnn.plus_one(step.lookups)
            token = self.embed_drafted(drafted[-1])
            state = normed if self.config.norm_output else hidden
            hidden = self._layer(state, token, step, self.plan(1))
            normed = self.norm.decode_forward(hidden)
            drafted.append(self.head.argmax(self.head.project(normed)))
        return drafted

    def embed_drafted(self, numbers: ttnn.Tensor) -> ttnn.Tensor:
        """Embeddings [1, 1, R, H] of pages [R, 1] of the draft vocabulary."""
        return self.as_rows(ttnn.embedding(numbers, self.draft_embedding, layout=ttnn.ROW_MAJOR_LAYOUT))

    @staticmethod
    def as_rows(embedded: ttnn.Tensor) -> ttnn.Tensor:
        """[R, 1, H] row-major -> [1, 1, R, H] in tiles."""
        rows, _, width = embedded.shape
        return ttnn.to_layout(ttnn.reshape(embedded, (1, 1, rows, width)), ttnn.TILE_LAYOUT)

    # ------------------------------------------------------------------------------------------ on the device
    def _logits(self, inputs: HeadInputs) -> ttnn.Tensor:
        return self._passed_on(self._true_rows(inputs))

    def _step(self, inputs: HeadInputs) -> ttnn.Tensor:
        state = rows_of(self._own, inputs.picks, self.residual)
        return self._passed_on(self._layer(state, self._embed(inputs.ids), inputs, self.plan(inputs.rows)))

    def _passed_on(self, hidden: ttnn.Tensor) -> ttnn.Tensor:
        """Logits [1, 1, R, V_d] row-major; what the rows pass on is kept for a step after one of them."""
        normed = self.norm.decode_forward(hidden)
        write_rows(normed if self.config.norm_output else hidden, self._own)
        return self.head.project(normed)

    def _read(self, inputs: HeadInputs) -> tuple:
        plan = self.plan(inputs.rows)
        pair = self._normed_pair(self._fused(inputs.picks), self._embed(inputs.ids))
        self.attention.store_rows(pair, plan.rope_tables(inputs), inputs, plan)
        return ()

    def _true_rows(self, inputs: HeadInputs) -> ttnn.Tensor:
        """The layer's output [1, 1, R, H] of rows whose states are the target's."""
        return self._layer(self._fused(inputs.picks), self._embed(inputs.ids), inputs, self.plan(inputs.rows))

    def _embed(self, ids: ttnn.Tensor) -> ttnn.Tensor:
        """[1, R] uint32 -> [1, 1, R, H]."""
        return ttnn.unsqueeze_to_4D(ttnn.embedding(ids, self.embedding, layout=ttnn.TILE_LAYOUT))

    def _fused(self, picks: ttnn.Tensor) -> ttnn.Tensor:
        """fc of the target's states at picks [1, R]: [1, 1, R, H] as the residual stream."""
        found = [rows_of(buffer, picks, self.residual) for buffer in self.kept.buffers]
        if self.state_norms:
            found = [norm.decode_forward(x) for norm, x in zip(self.state_norms, found, strict=True)]
        return self.fc.decode_forward(found)

    @staticmethod
    def _interleaved(x: ttnn.Tensor) -> ttnn.Tensor:
        return ttnn.sharded_to_interleaved(x, ttnn.DRAM_MEMORY_CONFIG)

    def _normed_pair(self, state: ttnn.Tensor, token: ttnn.Tensor) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        token = ttnn.interleaved_to_sharded(token, self.residual)
        return self.token_norm.decode_forward(token), self.state_norm.decode_forward(state)

    def _layer(self, state: ttnn.Tensor, token: ttnn.Tensor, inputs: RowInputs, plan: RowPlan) -> ttnn.Tensor:
        """One layer: states [1, 1, R, H] as the residual stream, tokens' embeddings [1, 1, R, H] interleaved."""
        pair = self._normed_pair(state, token)
        attended = self.attention.decode_forward(pair, plan.rope_tables(inputs), inputs, plan)
        residual = pair[1] if self.config.norm_before_residual else state
        x = ttnn.add(residual, attended, memory_config=self.residual)
        return ttnn.add(x, self.mlp.decode_forward(self.mlp_norm.decode_forward(x)), memory_config=self.residual)

    # -------------------------------------------------------------------------------------------------- prompts
    def _read_prompt(self, tokens: Sequence[int]) -> None:
        """Keys and values of a prompt's tokens from position 1 on, chunk by chunk beside the target's own."""
        features = self._features
        if features is None or features.chunks is None:
            raise ValueError("this prompt has been read, its states are gone")
        chunks, features.chunks = features.chunks, None
        for start in range(0, len(tokens), PREFILL_CHUNK):
            states = chunks[start // PREFILL_CHUNK]
            chunk = tokens[start : start + PREFILL_CHUNK]
            m = states[0].shape[-2]
            ids = self.target._on_device([[*chunk, *[0] * (m - len(chunk))]])
            embedded = ttnn.unsqueeze_to_4D(ttnn.embedding(ids, self.embedding, layout=ttnn.TILE_LAYOUT))
            found = states
            if self.state_norms:
                found = [norm.prefill_forward(x) for norm, x in zip(self.state_norms, found, strict=True)]
            fused = self.fc.prefill_forward(found)
            pair = self.token_norm.prefill_forward(embedded), self.state_norm.prefill_forward(fused)
            self.attention.store_prefill(pair, self.rope.range(start, m), self.rope.rotation, start)

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compile what a prompt of this length needs, the target's part of it too. Overwrites both caches."""
        if len(tokens) < 2:
            return
        with self.target.tap(self.taps) as found:
            self.target.prefill(tokens)
        self.states(found[0], range(len(tokens)), 0)
        self.read(tokens[1:], 1)
        self._forget()

    # ------------------------------------------------------------------------------------------------ internals
    def _check(self, n: int, position: int) -> None:
        if n < 1 or position < 1 or position + n > self.max_seq_len:
            raise UserError(
                f"{n} rows of a draft head at position {position} are outside 1..{self.max_seq_len - 1}: shorten the "
                "prompt or raise --max-seq-len"
            )
