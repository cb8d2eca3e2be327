"""Llama in torch: the reference for the TT-NN model's numbers, and the runtime on CPU and CUDA.

Shape letters as in `models.llama`, and R: rows of a sequence after padding.

Row-invariant arithmetic
    In bf16 (and in the last bits of fp32) the result of a row depends on how many rows are computed with it, because
    another row count selects another kernel. Speculative decoding would then differ from plain decoding wherever two
    logits nearly tie. Packed matrices on a CPU mostly give a row the same bits in any company, at least where it is not
    alone: `invariance.odd_alone` tries it. With `row_invariant`, matrices for which a single row has other bits compute
    two. Where rows differ in any case, `fixed_rows` = R runs every decode and every verification on exactly R rows.
    Either way each row reads the KV cache up to the end of the block of 128 rows that it stands in, so that the bits of
    a row depend on its own history alone; where the rows of one forward stand in two blocks, attention is computed once
    for each. A Tenstorrent tile does the same by nature: it has 32 rows whatever n is. All of this is about layers in
    torch operations; compiled ones (`compiled`) are row-invariant by the order of their sums.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.speculative.model import IDS, LOGITS, Chain, Chooser, Draws, Limits, Rows, SlotBySlot, Step, Want, _computed
from models.speculative.tree import tree_levels
from models.torch_llama.attention import Part, fold_of, whole
from models.torch_llama.choice import Head
from models.torch_llama.compiled import LANES, not_compiled, readable
from models.torch_llama.first_layers import FirstLayers, chained_greedy
from models.torch_llama.joint import Piece, passes
from models.torch_llama.kv_cache import KV_BLOCK, KVCache, block_end
from models.torch_llama.layers import Chained, Network, TorchLayers
from models.torch_llama.linear import Int8Linear, Linear, PackedLinear, PlainLinear, int8_works, packing_works

if TYPE_CHECKING:
    from models.llama.gguf_checkpoint import AnyCheckpoint

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PREFILL_CHUNK = 512
MAX_ROWS = 32

Tokens = Sequence[int] | torch.Tensor


class TorchLlama(SlotBySlot):
    """A Llama with its own KV cache on one device.

    Implements `models.speculative.model.LanguageModel` and `Paged` and, for its first slot, `SequenceModel` with the
    capabilities `Chains`, `Trees`, `EarlyExit` and `Tapped`.

    Args:
        config: the architecture.
        tensors: Hugging Face names -> weights, any float dtype; an opened `Checkpoint` serves as one, read lazily.
        device: "cpu", "cuda" or any torch device.
        dtype: "bf16", "fp32" or "fp16" (what it computes in).
        max_seq_len: positions the KV cache holds (<= config.max_position_embeddings).
        slots: sequences that `extend` can tell apart.
        pool: positions of the cache, for all slots together (default: max_seq_len for each). On a CPU memory is taken
            as they are written.
        fixed_rows: pad every decode and verification to this many rows (row-invariant, see above); None: no padding.
        row_invariant: be so without padding, if this machine computes rows alike: the attribute `row_invariant` says
            it. With fixed_rows it is so in any case.
        typical_rows: rows that most forwards have, for which weights are laid out (default: fixed_rows, else 1; at
            least 2 with row_invariant). A hint: it changes speed, and results only in their last bits.
        quantize: "int8" for matrices in int8 (on CPU; all else is then fp32), or None.
        compiled: run layers as machine code of this project's own (on CPU), see `compiled`. Rows are alike so, whatever
            the machine, and nothing is padded.

    Raises:
        UserError: unknown dtype or quantisation, a context longer than the model's, layers that cannot be compiled.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        device: str | torch.device = "cpu",
        dtype: str = "bf16",
        max_seq_len: int = 2048,
        slots: int = 1,
        pool: int | None = None,
        fixed_rows: int | None = None,
        row_invariant: bool = False,
        typical_rows: int | None = None,
        quantize: str | None = None,
        compiled: bool = False,
    ):
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if quantize not in (None, "int8"):
            raise UserError(f"unknown quantisation {quantize!r}: choose int8 or leave it out")
        self.device = torch.device(device)
        if quantize and self.device.type != "cpu":
            raise UserError(f"int8 weights run on the CPU only, not on {self.device}: use bf16 there")
        if quantize and not compiled and not int8_works():
            raise UserError(f"torch {torch.__version__} has no int8 kernels for this CPU: use bf16")
        if compiled and (reason := not_compiled(config, self.device)):
            raise UserError(f"compiled layers {reason}: leave them out")
        if not 0 < max_seq_len <= config.max_position_embeddings:
            raise UserError(
                f"context of {max_seq_len} tokens is outside the model's 1..{config.max_position_embeddings}: "
                "lower --max-seq-len"
            )
        if fixed_rows is not None and not 1 <= fixed_rows <= MAX_ROWS:
            raise UserError(f"fixed_rows {fixed_rows} is outside 1..{MAX_ROWS}")
        if slots < 1:
            raise UserError(f"{slots} slots: at least one is needed")
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = max_seq_len
        self.slots = slots
        self._slot = 0
        self.compiled = compiled
        self.fixed_rows = fixed_rows = None if compiled else fixed_rows
        self.row_invariant = (
            row_invariant or compiled or fixed_rows is not None
        )  # until it is known whether rows are alike
        self.max_rows = fixed_rows or MAX_ROWS
        # In the layout for one row, one row's bits are others than in those for several.
        self.typical_rows = max(typical_rows or fixed_rows or 1, 2 if row_invariant else 1)
        self.dtype = torch.float32 if quantize else DTYPES[dtype]
        self._early: FirstLayers | None = None  # what it has computed belongs to the tokens that come next
        self._scored = torch.empty(0)  # rows [B R, H] that the last logits were computed from
        self._taps: tuple[int, ...] = ()  # layers after which hidden states are kept, and those kept so far
        self._tapped: list[list[torch.Tensor]] = []
        self._load(tensors, quantize, pool)
        self._views: dict[int, TorchLlama] = {0: self}  # by slot, made when they are first asked for

    @classmethod
    def from_checkpoint(cls, checkpoint: AnyCheckpoint, **options) -> TorchLlama:
        """The model of an opened checkpoint; options as for the constructor."""
        return cls(checkpoint.config, checkpoint, **options)

    # ------------------------------------------------------------------------------------------ construction
    def _load(self, tensors: Mapping[str, torch.Tensor], quantize: str | None, pool: int | None) -> None:
        config, on_cpu = self.config, self.device.type == "cpu"

        def take(name: str) -> torch.Tensor:
            return tensors[name].to(device=self.device, dtype=self.dtype)

        spare = self.fixed_rows or MAX_ROWS
        self.cache = KVCache(
            config.num_hidden_layers,
            2 * config.num_key_value_heads,
            config.head_dim,
            dtype=self.dtype,
            device=self.device,
            slots=self.slots,
            positions=self.max_seq_len,
            spare=spare,
            pool=pool,
            key_group=LANES if self.compiled else 1,
        )
        # On the CPU the table stays as stored (a memory-mapped file costs no memory of its own): it is only ever
        # read a few rows at a time, and a tied lm_head has its own packed copy.
        embedding = tensors["model.embed_tokens.weight"]
        self.embedding = embedding if on_cpu else embedding.to(device=self.device, dtype=self.dtype)
        tied = config.tie_word_embeddings
        # Equal logits are decided by rows of the stored matrix, where these take no memory of their own. In fp32, as
        # compiled layers compute them, logits are next to never equal.
        decides = self.dtype in (torch.bfloat16, torch.float16) and on_cpu and not self.compiled
        stored = self.embedding if tied else tensors["lm_head.weight"] if decides else None
        exact = stored is not None and (tied or stored.dtype == self.dtype)
        self._head_rows = Head(stored if decides and exact else None)

        def head() -> torch.Tensor:
            return take("lm_head.weight") if stored is None else stored.to(device=self.device, dtype=self.dtype)

        self._chains = self.compiled and readable(self.embedding)
        self.fold = fold_of(config)
        self.network: Network
        if self.compiled:
            from models.torch_llama.compiled.network import CompiledLayers

            positions = self.max_seq_len + spare
            self.network = CompiledLayers(config, take, head, self.cache, positions, quantize is not None)
            self.odd_alone: list[bool] | None = []
        else:
            linear = self._linear_maker(quantize)
            self.network = TorchLayers(config, take, head, linear, self.cache, self.max_seq_len + spare, self.fold)
            # Whether a row has the same bits among any number of others; of which matrices a single row has others.
            self.odd_alone = self._odd_alone() if on_cpu else None
        self.rows_alike = self.odd_alone is not None
        if self.row_invariant and self.fixed_rows is None:
            self.row_invariant = self.rows_alike
            if isinstance(self.network, TorchLayers):
                self.network.pair(self.odd_alone or ())
        self.cache.unit = KV_BLOCK if self.rows_alike else PREFILL_CHUNK

    def _linear_maker(self, quantize: str | None) -> Callable[[torch.Tensor], Linear]:
        packed = self.device.type == "cpu" and packing_works(self.dtype)

        def linear(weight: torch.Tensor) -> Linear:
            # For one row, large weights are 1.3x faster in their own layout, small ones 1.1x to 1.3x slower.
            rows = self.typical_rows if self.typical_rows > 1 or weight.numel() >= 2**21 else 8
            if quantize:
                return Int8Linear(weight, rows)
            return PackedLinear(weight, rows) if packed else PlainLinear(weight)

        return linear

    def computed_rows(self, n: int) -> int:
        """Rows that a forward of n rows of one sequence computes."""
        return max(n, self.fixed_rows or 1)

    def _odd_alone(self) -> list[bool] | None:
        assert isinstance(self.network, TorchLayers)
        return self.network.odd_alone()

    @property
    def layers(self) -> Sequence:
        """The layers; those in torch operations have weights to look at."""
        return self.network.layers

    @property
    def norm(self) -> torch.Tensor:
        """Weights [H] of the final norm."""
        return self.network.norm.to(self.dtype)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, of which compiled layers have none."""
        return self.network.linears if isinstance(self.network, TorchLayers) else []

    @property
    def lm_head(self) -> Linear:
        """The output matrix, rows [n, H] -> logits [n, V]."""
        assert isinstance(self.network, TorchLayers)
        return self.network.head

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights held in memory; a memory-mapped embedding table is the file's, not counted."""
        table_of_its_own = self.device.type != "cpu" and not self.config.tie_word_embeddings
        return self.network.bytes + (self.embedding.nbytes if table_of_its_own else 0)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache when its pool is full; `cache.usage` says what it holds."""
        return self.cache.usage.capacity

    @property
    def kv(self) -> torch.Tensor:
        """[layers, S, 2 KV, D]: what this slot's blocks hold. A view, where they lie together."""
        table = self.cache.tables[self._slot]
        length = len(table.blocks) * KV_BLOCK
        if table.start is None or self.compiled:
            held = torch.stack([self.cache.gather(kv, table, length) for kv in self.cache.pool])
            return self.cache.in_order(held).transpose(1, 2)
        return self.cache.pool[:, :, table.start : table.start + length].transpose(1, 2)

    # -------------------------------------------------------------------------------------------------- slots
    def slot(self, index: int) -> TorchLlama:
        """One slot as a model of one sequence; the first is the model itself."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a model with {self.slots}")
        if index not in self._views:
            view = copy.copy(self)
            view._slot, view._early = index, None
            self._views[index] = view
        return self._views[index]

    @contextlib.contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """While it is entered, keep the hidden states [n, H] of the rows computed, after so many layers each: 0 is the
        embedding. They are in the list, a tensor for each of `layers`, when it is left.

        Raises UserError for a number of layers that the model has not.
        """
        if wrong := [count for count in layers if not 0 <= count <= len(self.layers)]:
            raise UserError(f"tap after layer {wrong[0]}: the model has layers 0 (embedding) to {len(self.layers)}")
        kept: list[torch.Tensor] = []
        self._early = None  # what was computed before would be missing
        self._taps, self._tapped = tuple(layers), [[] for _ in layers]
        try:
            yield kept
            kept += [torch.cat(pieces) for pieces in self._tapped]
        finally:
            self._taps, self._tapped = (), []

    # ----------------------------------------------------------------------------------------------- all slots
    @property
    def limits(self) -> Limits:
        """What it can hold and compute."""
        return Limits(self.max_rows, self.slots, self.max_seq_len, self.vocab_size, self.cache.limit)

    def reserve(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Promise a free slot so many positions; arguments, result and errors as of `speculative.model.Paged`."""
        if not len(tokens) <= positions <= self.max_seq_len:
            raise UserError(
                f"{positions} positions for {len(tokens)} tokens do not fit the context of {self.max_seq_len}: shorten "
                "the prompt or raise --max-seq-len"
            )
        self.slot(slot)._early = None
        return self.cache.reserve(slot, [int(token) for token in tokens], positions)

    def free(self, slot: int) -> None:
        """A sequence has ended: give its blocks back. Prompts that begin as it did may still share them."""
        self.slot(slot)._early = None
        self.cache.free(slot)

    @torch.inference_mode()
    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences in one forward; prompts that are longer than a chunk need several.

        Raises UserError for more rows, or positions, than there are, ValueError for two `Rows` of one slot.
        """
        if len({each.slot for each in rows}) < len(rows):
            raise ValueError(f"several Rows of one slot: {[each.slot for each in rows]}")
        if len(rows) == 1 and not rows[0].last:
            return super().extend(rows, want)
        for each in rows:
            self._check_rows(each)
        # What first layers have computed is gone on from one by one.
        early = [] if want.taps else [i for i, each in enumerate(rows) if self.slot(each.slot)._early and not each.last]
        others = [i for i in range(len(rows)) if i not in early]
        results, features, choosers = self._extend([rows[i] for i in others], want)
        for i in early:  # in rising order, so that each is put into its place
            results.insert(i, _computed(self.slot(rows[i].slot), rows[i], want))
            choosers.insert(i, self.slot(rows[i].slot).chooser())
        return Step(results, features, choosers if want.logits else ())

    def _extend(
        self, rows: Sequence[Rows], want: Want
    ) -> tuple[list[list[int] | torch.Tensor], list[torch.Tensor], list[Chooser]]:
        """(Results, features, choosers) of rows that were checked; slots are those of the cache."""
        taps = want.taps or self._taps
        if wrong := [count for count in taps if not 0 <= count <= len(self.layers)]:
            raise UserError(f"tap after layer {wrong[0]}: the model has layers 0 (embedding) to {len(self.layers)}")
        results: list[list[int] | torch.Tensor] = [[] for _ in rows]
        choosers: list[Chooser] = [self.chooser()] * len(rows)
        states: list[list[list[torch.Tensor]]] = [[[] for _ in taps] for _ in rows]
        for pieces in passes(rows, self.max_rows, PREFILL_CHUNK, apart=not self.rows_alike):
            pieces = sorted(pieces, key=self._neighbours)
            kept: list[list[torch.Tensor]] = [[] for _ in taps]
            hidden = self._together(pieces, taps, kept)
            row = 0
            for piece in pieces:
                n = piece.end - piece.first
                for mine, (state,) in zip(states[piece.owner], kept, strict=True):
                    mine.append(state[row : row + n])
                row += n
            self._take_results(pieces, hidden, want, results, choosers)
        if self._taps:
            for each in states:
                for tapped, pieces_of in zip(self._tapped, each, strict=True):
                    tapped += pieces_of
        features = [torch.cat([torch.cat(layer) for layer in each], -1) for each in states] if want.taps else []
        return results, features, choosers

    def _neighbours(self, piece: Piece) -> tuple[int, ...]:
        """Pieces of an order by this can be read together, where they lie evenly in the pool."""
        table = self.cache.tables[piece.rows.slot]
        length = block_end(piece.position + piece.end - piece.first)
        return piece.rows.parents is not None, piece.end - piece.first, length, table.start or 0, piece.owner

    def _together(self, pieces: Sequence[Piece], taps: tuple[int, ...], kept: list[list[torch.Tensor]]) -> torch.Tensor:
        """Hidden states [n, H] of all rows of these pieces; puts those after some layers into `kept`."""
        parts, tokens = [], []
        for piece in pieces:
            position, new = piece.position, [int(token) for token in piece.tokens]
            table = self.cache.write(piece.rows.slot, position, position + len(new))
            tree = None if piece.rows.parents is None else (piece.rows.position, piece.rows.parents)
            parts.append(Part(table, position, len(new), len(new), tree))
            tokens += new
        n = len(tokens)
        if n == 1 and (self.fixed_rows or not self.row_invariant):  # another kernel may compute a single row
            plan = self.network.plan([parts[0]._replace(rows=2)], fixed=True)
            tokens.append(0)
        else:
            plan = self.network.plan(parts)
        x = self._layers(torch.tensor(tokens, device=self.device), plan, n, taps=taps, kept=kept)
        for piece, part in zip(pieces, parts, strict=True):
            whole = part.position % PREFILL_CHUNK == 0 and n == part.rows == PREFILL_CHUNK
            if part.tree is None and (self.rows_alike or whole):
                self.cache.note(piece.rows.slot, part.position, [int(token) for token in piece.tokens])
        return x

    def _take_results(self, pieces: Sequence[Piece], hidden: torch.Tensor, want: Want, results, choosers) -> None:
        """Put the pieces' logits, or ids, among the results: those of pieces whose results are wanted."""
        wanted, places, row = [], [], 0
        for piece in pieces:
            row += piece.end - piece.first
            if piece.end == len(piece.rows.tokens):
                n = 1 if piece.rows.last else piece.end - piece.first
                wanted.append(hidden[row - n : row])
                places.append((piece.owner, n))
        if not wanted:
            return
        count = sum(n for _, n in places)
        # Another kernel may compute a single row.
        logits = self._head(self._padded(torch.cat(wanted), 1 if self.fixed_rows is None else 2))[:count]
        scored = self._scored[:count]
        ids = None if want.logits else self._head_rows.choose(logits, scored)
        row = 0
        for index, n in places:
            span = slice(row, row + n)
            if ids is None:
                results[index] = logits[span]
                choosers[index] = functools.partial(self._head_rows.choose, hidden=scored[span])
            else:
                results[index] = ids[span]
            row += n

    # ------------------------------------------------------------------------------------------------ forward
    @torch.inference_mode()
    def prefill(self, tokens: Tokens) -> torch.Tensor:
        """Fills the cache with `tokens` from position 0 and returns the logits [V] that follow the last one."""
        ids = self._ids(tokens).tolist()
        self._early = None
        self._check(len(ids), 0)
        return Step(self._extend([Rows(self._slot, ids, 0, last=True)], LOGITS)[0]).logits(0)[0]

    @torch.inference_mode()
    def forward(self, tokens: Tokens, position: int, parents: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [n, V] of `tokens` [n] standing at position..position+n-1; their KV is written there.

        n = 1 is decoding, n = K + 1 is verification. Rows of the cache beyond are stale, masked, and overwritten later:
        going back costs nothing.

        parents [m >= n]: the tree of which tokens are the last n rows; row i is written at position+i, stands as many
        positions after row 0 as it has ancestors, and sees them and what lies before `position`.
        """
        ids = self._ids(tokens)
        n = len(ids)
        if parents is None:
            self._check(n, position)
            hidden = self._decode(ids, position)
        else:
            self._check_tree(position, parents)
            self._early = None
            hidden = self._alone(ids, position + len(parents) - n, tree=(position, parents))
        return self._head(hidden)[:n]

    @torch.inference_mode()
    def greedy(self, tokens: Tokens, position: int, parents: Sequence[int] | None = None) -> list[int]:
        """The id [n] of greatest logit after each of `tokens` [n] at `position`; equal ones are decided in fp32 (CPU).

        Only ids cross to the host.
        """
        logits = self.forward(tokens, position, parents)
        return self._head_rows.choose(logits, self._scored)

    def chooser(self) -> Callable[[torch.Tensor], list[int]]:
        """What chooses ids by the logits [n, V] of the forward just computed, as `greedy` does."""
        return functools.partial(self._head_rows.choose, hidden=self._scored)

    @torch.inference_mode()
    def draft_greedy(self, tokens: Tokens, position: int, k: int) -> list[int]:
        """k chained greedy ids: feeds `tokens` [m >= 1] at `position`, then each id as the next token.

        The ids stay on the device until all are there. The cache then holds position..position+m+k-2.
        """
        return chained_greedy(self.forward, tokens, position, k)

    @property
    def chains(self) -> bool:
        """As of `speculative.model.ChainsWhile`."""
        return self._chains and not self._taps

    @torch.inference_mode()
    def draft_while(self, tokens: Tokens, position: int, least: Sequence[float], draws: Draws | None = None) -> Chain:
        """As of `speculative.model.ChainsWhile`: in compiled layers, by one call of their code."""
        network = cast("Chained", self.network)
        ids = self._ids(tokens)
        n = len(ids)
        self._check(n + len(least) - 1, position)
        self._early = None
        table = self.cache.write(self._slot, position, position + n + len(least) - 1)
        chain = network.chain(self.embedding[ids], Part(table, position, n, n, None), least, self.embedding, draws)
        self.cache.note(self._slot, position, [*ids.tolist(), *chain.ids[:-1]])
        return chain

    def draw(self, logits: torch.Tensor, draws: Draws) -> Chain:
        """As of `speculative.model.ChainsWhile`."""
        return cast("Chained", self.network).draw(logits, draws, self.vocab_size)

    @torch.inference_mode()
    def keep(self, position: int, rows: Sequence[int]) -> int:
        """Move the keys and values of a tree's rows to position..: all of them are then there."""
        self.cache.keep(self._slot, position, rows)
        return len(rows)

    def first_layers(self, count: int) -> FirstLayers:
        """The first `count` layers with the norm and the head, as a model that drafts in this one's cache."""
        return FirstLayers(self, count)

    # ----------------------------------------------------------------------------------------------- internals
    def _ids(self, tokens: Tokens) -> torch.Tensor:
        return torch.as_tensor(tokens, dtype=torch.long, device=self.device)

    def _check(self, n: int, position: int) -> None:
        if n < 1 or position < 0 or position + n > self.max_seq_len:
            raise UserError(
                f"{n} tokens at position {position} do not fit the context of {self.max_seq_len}: "
                "shorten the prompt or raise --max-seq-len"
            )

    def _check_tree(self, position: int, parents: Sequence[int]) -> None:
        if len(parents) > self.max_rows:
            raise UserError(f"a tree of {len(parents)} rows exceeds {self.max_rows}: draft fewer tokens")
        self._check(tree_levels(parents), position)  # its rows may lie beyond the context, there is room for them

    def _check_rows(self, rows: Rows) -> None:
        self.slot(rows.slot)  # raises IndexError
        if len(rows.tokens) > self.max_rows and not (rows.last and rows.parents is None):
            raise UserError(f"{len(rows.tokens)} rows exceed the {self.max_rows} of a forward: draft fewer tokens")
        if rows.parents is None:
            self._check(len(rows.tokens), rows.position)
        else:
            self._check_tree(rows.position, rows.parents)

    def _pad_ids(self, ids: torch.Tensor) -> torch.Tensor:
        n, rows = len(ids), self.computed_rows(len(ids))
        if n > (self.fixed_rows or rows):
            raise UserError(f"{n} rows exceed the fixed {self.fixed_rows} rows of this model: draft fewer tokens")
        return ids if n == rows else F.pad(ids, (0, rows - n))

    @staticmethod
    def _padded(hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return hidden if len(hidden) >= rows else F.pad(hidden, (0, 0, 0, rows - len(hidden)))

    def _decode(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Hidden states [R, H] of R rows, ids [n] and padding; goes on from what `FirstLayers` has computed of them."""
        early, self._early = self._early, None
        n, first, x = len(ids), 0, None
        if early is not None and len(done := early.computed(ids, position)):
            first, x = early.layers, done
            if len(done) < n:
                rest = self._alone(ids[len(done) :], position + len(done), stop=first)
                x = torch.cat((x, rest[: n - len(done)]))
            x = self._padded(x, self.computed_rows(n))
        hidden = self._alone(ids, position, first=first, x=x)
        if self.rows_alike:  # such rows are those of a prompt
            spread = position // KV_BLOCK != (position + n - 1) // KV_BLOCK
            grouped = whole(n * self.fold) == n * self.fold
            enough = self.row_invariant or (grouped and not spread and x is None and len(hidden) > 1)
            if enough and self.fixed_rows != 1:
                self.cache.note(self._slot, position, ids.tolist())
        return hidden

    def _alone(
        self,
        ids: torch.Tensor,
        position: int,
        *,
        tree: tuple[int, Sequence[int]] | None = None,
        first: int = 0,
        stop: int | None = None,
        x: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [R, H] of rows of this slot, ids [n] and padding; arguments as of `_layers`.

        tree: where its row 0 stands, and the parents of all its rows.
        """
        n, padded = len(ids), self._pad_ids(ids)
        table = self.cache.write(self._slot, position, position + n)
        plan = self.network.plan([Part(table, position, len(padded), n, tree)], self.row_invariant)
        return self._layers(padded, plan, n, first=first, stop=stop, x=x, taps=self._taps, kept=self._tapped)

    def _layers(
        self,
        ids: torch.Tensor,
        plan: Any,
        used: int,
        *,
        first: int = 0,
        stop: int | None = None,
        x: torch.Tensor | None = None,
        taps: tuple[int, ...] = (),
        kept: Sequence[list[torch.Tensor]] = (),
    ) -> torch.Tensor:
        """Hidden states [R, H] of rows with these ids before the final norm; writes their keys and values.

        used: the first rows, which are tokens; the others are padding, whose results mean nothing.
        first, stop: layers to run, from x [R, H]. taps: layers after which states go into the lists of `kept`.
        """
        last = len(self.layers) if stop is None else stop
        if x is None:
            x = self.embedding[ids].to(self.network.dtype)  # [R, H]
        known, between = {first: x}, tuple(sorted({count for count in taps if first < count < last}))
        if first < last:
            x, tapped = self.network.run(x, plan, first, last, between)
            known |= dict(zip(between, tapped, strict=True)) | {last: x}
        for count, states in zip(taps, kept, strict=True):
            if count in known:
                states.append(known[count][:used].to(self.dtype))
        return x

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        self._scored, logits = self.network.logits(hidden)
        return logits
