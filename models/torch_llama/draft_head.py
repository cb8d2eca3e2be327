"""An EAGLE-3 draft head in torch: one layer that drafts for a Llama from that model's own hidden states.

The row of the token at position p joins two things: the token's embedding, and a state of position p-1. The state is
the target's, fused from what it computed there (`states`), where that is known; a token that the head has drafted
itself comes before the target has seen it, and then the state is what the head made of the row before (in a tree, of
the parent's row). Drafted positions are computed again, with the target's states, once it has verified them.

So it is called as a draft model is, and differs in three things: the target's states have to be handed over, position 0
has no row, and its logits belong to the draft vocabulary.

Source: Li et al. 2025 (EAGLE-3), and the checkpoints in `models.llama.head_config`'s layouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch

from models.errors import UserError
from models.llama.head_config import HeadConfig
from models.speculative.model import IDS, LOGITS, Chain, Draws, Rows, SlotBySlot, Step, Want
from models.speculative.tree import tree_levels
from models.torch_llama.attention import Part
from models.torch_llama.choice import argmax
from models.torch_llama.compiled import LANES, not_compiled, readable
from models.torch_llama.head_layers import ChainedHead, HeadNetwork, TorchHeadLayer
from models.torch_llama.joint import passes
from models.torch_llama.kv_cache import KV_BLOCK, KVCache, block_end
from models.torch_llama.linear import Int8Linear, Linear, PackedLinear, PlainLinear, int8_works, packing_works

READ_CHUNK = 512  # rows of a prompt that are computed at once
MAX_ROWS = 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class _Share(NamedTuple):
    """One sequence's rows of a forward.

    head: its slot. tokens: [n]. start: of the first row in the cache. states: what the rows join with the tokens, the
    target's states [n, taps x H] where `true`, else those [n, H] that the head passed on. position: of the last row of
    the text that is computed, -1 in a tree. tree: as of `attention.Part`.
    """

    head: TorchHead
    tokens: Sequence[int] | torch.Tensor
    start: int
    states: torch.Tensor
    true: bool
    position: int
    tree: tuple[int, Sequence[int]] | None = None

    def cut(self, first: int, end: int) -> _Share:
        """Rows first..end-1 of it; of a tree all."""
        if (first, end) == (0, len(self.tokens)):
            return self
        position = self.position - len(self.tokens) + end
        states = self.states[first:end]
        return self._replace(tokens=self.tokens[first:end], start=self.start + first, states=states, position=position)


class TorchHead(SlotBySlot):
    """A draft head with its own KV cache on the target's device: rows of several sequences are one forward.

    Implements `models.speculative.model.DraftHead` and `Paged`: sequences share the pages of what their prompts begin
    with. The row of position p depends on the tokens up to p, and lies at p - 1.

    Args:
        config: its shape.
        tensors: the file's names -> weights, any float dtype.
        embedding: the target's [V, H], shared and not copied; a head's own ``embed_tokens.weight`` goes before it.
        device: "cpu", "cuda" or any torch device.
        dtype: "bf16", "fp32" or "fp16" (what it computes in).
        max_seq_len: positions of a sequence.
        slots: sequences, each with pages of its own in one cache, which are taken as rows are computed.
        quantize: "int8" for matrices in int8 (on CPU; all else is then fp32), or None.
        compiled: run the layer as machine code of this project's own (on CPU), as of `TorchLlama`.

    Raises:
        UserError: quantisation that this machine cannot do, a layer that cannot be compiled.
    """

    def __init__(
        self,
        config: HeadConfig,
        tensors: Mapping[str, torch.Tensor],
        embedding: torch.Tensor,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "bf16",
        max_seq_len: int = 2048,
        slots: int = 1,
        quantize: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.device = torch.device(device)
        if quantize and self.device.type != "cpu":
            raise UserError(f"int8 weights run on the CPU only, not on {self.device}: use bf16 there")
        if quantize and not compiled and not int8_works():
            raise UserError(f"torch {torch.__version__} has no int8 kernels for this CPU: use bf16")
        if compiled and (reason := not_compiled(config.layer, self.device)):
            raise UserError(f"compiled layers {reason}: leave them out")
        self.config = config
        self.taps = config.taps
        self.lasting = True
        self.vocab_size = config.draft_vocab_size
        self.target_vocab_size = config.layer.vocab_size
        self.max_seq_len = max_seq_len
        self.max_rows = MAX_ROWS
        self.slots = slots
        self._slot = 0
        self.compiled = compiled
        self._load(tensors, embedding, quantize, torch.float32 if quantize else DTYPES[dtype])
        self._forget()
        self._keys: Sequence[int] = ()  # of the rows of the text's beginning, by which others may find them
        self._views: dict[int, TorchHead] = {0: self}

    # ------------------------------------------------------------------------------------------ construction
    def _load(
        self, tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, quantize: str | None, dtype: torch.dtype
    ) -> None:
        config, layer = self.config, self.config.layer

        def take(name: str) -> torch.Tensor:
            return tensors[name].to(device=self.device, dtype=dtype)

        self.cache = KVCache(  # the row of position p lies at p - 1
            *(1, 2 * layer.num_key_value_heads, layer.head_dim),
            dtype=dtype,
            device=self.device,
            slots=self.slots,
            positions=self.max_seq_len,
            spare=MAX_ROWS,
            key_group=LANES if self.compiled else 1,
        )
        self.network: HeadNetwork
        positions = self.max_seq_len + MAX_ROWS
        if self.compiled:
            from models.torch_llama.compiled.head import CompiledHead

            self.network = CompiledHead(config, take, self.cache, positions, quantize is not None)
        else:
            linear = self._linear_maker(quantize, dtype)
            self.network = TorchHeadLayer(config, take, linear, self.cache, positions, MAX_ROWS)
        self.dtype = self.network.dtype
        self.cache.unit = READ_CHUNK if self.network.odd is None else KV_BLOCK
        self.embedding = tensors.get("embed_tokens.weight", embedding)
        if self.device.type != "cpu":
            self.embedding = self.embedding.to(device=self.device, dtype=dtype)
        self._chains = self.compiled and readable(self.embedding)
        self.target_ids: torch.Tensor | None = None
        if config.reduced:
            self.target_ids = (torch.arange(config.draft_vocab_size) + tensors["d2t"].long()).to(self.device)

    def _linear_maker(self, quantize: str | None, dtype: torch.dtype) -> Callable[[torch.Tensor], Linear]:
        packed = self.device.type == "cpu" and not quantize and packing_works(dtype)

        def linear(weight: torch.Tensor) -> Linear:
            rows = 1 if weight.numel() >= 2**21 and self.slots == 1 else 8  # as in `TorchLlama`
            if quantize:
                return Int8Linear(weight, rows)
            return PackedLinear(weight, rows) if packed else PlainLinear(weight)

        return linear

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights held in memory, without the embedding, which is the target's."""
        return self.network.bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the cache when all slots are full; `cache.usage` says what it holds."""
        return self.cache.usage.capacity

    # -------------------------------------------------------------------------------------------------- slots
    def slot(self, index: int) -> TorchHead:
        """One slot as a head of one sequence; the first is the head itself."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a head with {self.slots}")
        if index not in self._views:
            view = copy.copy(self)
            view._slot = index
            view._forget()
            view._keys = ()
            self._views[index] = view
        return self._views[index]

    def reserve(self, slot: int, tokens: Sequence[int], positions: int) -> int | None:
        """Promise a free slot so many positions; as of `speculative.model.Paged`.

        Returns:
            Of how many of the tokens the states are not needed: the rows of these positions after the first are there.
        """
        self.free(slot)
        head = self.slot(slot)
        if len(tokens) > 1:  # the first row is of two tokens
            head._keys = [int(tokens[0]) << 32 | int(tokens[1]), *(int(token) for token in tokens[2:])]
        return self.cache.reserve(slot, head._keys, positions)

    def free(self, slot: int) -> None:
        """A sequence has ended: forget its states, and give its pages back. What begins as it did may share them."""
        head = self.slot(slot)
        head._forget()
        head._keys = ()
        self.cache.free(slot)

    def _forget(self) -> None:
        width = len(self.taps) * self.config.target_hidden_size
        self._known = torch.empty(0, width, dtype=self.dtype, device=self.device)
        self._known_from = 0  # position of the first of them
        self._outputs = torch.empty(0, self.config.layer.hidden_size)  # [m, H] of the last row, then of a tree's rows
        self._last = -1  # position of that last row

    # ------------------------------------------------------------------------------------------------- states
    def states(self, features: torch.Tensor, rows: Sequence[int], position: int) -> None:
        """Take the target's hidden states of some positions.

        Args:
            features: [m, taps x H] of the rows of a forward, as `Step.features` gives them.
            rows: those of them that belong to the text, in its order.
            position: of the first; the others follow it. 0 begins another text, and the end of a beginning that
                `reserve` has found goes on from it.

        Raises:
            ValueError: features of another width, or a position after which others are missing.
        """
        if features.shape[-1] != self._known.shape[-1]:
            raise ValueError(f"features {features.shape[-1]} wide: the head reads {self._known.shape[-1]}")
        if position == 0:
            self._forget()
        if not len(self._known) and position <= len(self.cache.tables[self._slot].tokens):
            self._known_from = position
        end = self._known_from + len(self._known)
        if not self._known_from <= position <= end:
            raise ValueError(f"states of position {position}: those known are of {self._known_from}..{end - 1}")
        first = list(rows) == list(range(len(rows)))  # no copy for a chain
        taken = (features[: len(rows)] if first else features[list(rows)]).to(self.dtype)
        kept = self._known[: position - self._known_from]
        self._known = torch.cat((kept, taken)) if len(kept) else taken

    def _true_states(self, position: int, n: int) -> torch.Tensor:
        """The target's states [n, taps x H] for the rows at position... ValueError where they are not known."""
        start = position - 1 - self._known_from
        if start < 0 or start + n > len(self._known):
            raise ValueError(
                f"{n} rows at position {position}: the target's states before them are not known "
                f"({self._known_from}..{self._known_from + len(self._known) - 1} are)"
            )
        return self._known[start : start + n]

    def _drop(self, share: _Share) -> None:
        """Rows were computed: the target's states before the last forward's rows will not be needed again."""
        if share.true:
            first = share.start + max(0, len(share.tokens) - self.max_rows)
            self._known, self._known_from = self._known[first - self._known_from :], first

    # ------------------------------------------------------------------------------------------------ forward
    @torch.inference_mode()
    def extend(self, rows: Sequence[Rows], want: Want = IDS) -> Step:
        """Compute rows of any number of sequences in one forward; a text of more rows than that takes its own.

        Raises UserError for more rows, or positions, than there are, ValueError for what a head cannot do: two `Rows`
        of one slot, hidden states, rows whose states are not there.
        """
        if len({each.slot for each in rows}) < len(rows):
            raise ValueError(f"several Rows of one slot: {[each.slot for each in rows]}")
        if want.taps:
            raise ValueError("TorchHead keeps no hidden states: leave out taps")
        results: list[list[int] | torch.Tensor] = [[] for _ in rows]
        shares = [self._asked(each) for each in rows]
        laid = [Rows(each.head._slot, range(len(each.tokens)), each.start) for each in shares]
        for pieces in passes(laid, self.max_rows, READ_CHUNK, apart=self.network.odd is None):
            # Where every row's logits are wanted, they are made with its states.
            whole = all(piece.end - piece.first == 1 or not rows[piece.owner].last for piece in pieces)
            whole = whole and all(piece.end == len(piece.rows.tokens) for piece in pieces)
            cut = [shares[piece.owner].cut(piece.first, piece.end) for piece in pieces]
            hidden, scores = self._compute(cut, whole)
            ready = [
                (piece.owner, states[-1:] if rows[piece.owner].last else states)
                for piece, states in zip(pieces, hidden, strict=True)
                if piece.end == len(piece.rows.tokens)
            ]
            if not ready:
                continue
            sizes = [len(states) for _, states in ready]
            logits = self.network.logits(_joined([states for _, states in ready])) if scores is None else scores
            if want.logits:
                made: Sequence[list[int] | torch.Tensor] = logits.split(sizes)
            else:
                ids = self._ids(argmax(logits)).tolist()
                made = [ids[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
            for (owner, _), result in zip(ready, made, strict=True):
                results[owner] = result
        for share in shares:
            share.head._drop(share)
        return Step(results, choosers=[self._choose] * len(rows) if want.logits else ())

    @property
    def chains(self) -> bool:
        """As of `speculative.model.ChainsWhile`."""
        return self._chains

    @torch.inference_mode()
    def draft_while(
        self,
        tokens: Sequence[int] | torch.Tensor,
        position: int,
        least: Sequence[float],
        draws: Draws | None = None,
    ) -> Chain:
        """As of `speculative.model.ChainsWhile`: in compiled layers, by one call of their code."""
        network = cast("ChainedHead", self.network)
        self._check(len(tokens) + len(least) - 1, position)
        share = self._share(tokens, position)
        n, start = len(tokens), share.start
        part = Part(self.cache.write(self._slot, start, start + n + len(least) - 1), start, n, n, None)
        rows, states = self.embedding[self._ids_of([share])], self._before([share])
        chain, passed = network.chain(rows, states, part, least, self.embedding, self.target_ids, draws)
        self._outputs, self._last = passed, share.position + len(chain.ids) - 1
        self._note([share])
        self._drop(share)
        return chain

    def draw(self, logits: torch.Tensor, draws: Draws) -> Chain:
        """As of `speculative.model.ChainsWhile`."""
        return cast("ChainedHead", self.network).draw(logits, draws, self.target_vocab_size, self.target_ids)

    def _choose(self, logits: torch.Tensor) -> list[int]:
        return self._ids(argmax(logits)).tolist()

    def read(self, tokens: Sequence[int], position: int) -> torch.Tensor:
        """Fill the cache with the rows of tokens at position.., whose states before them are known: logits [V_d] of the
        last. Position 0 has no row."""
        return self.extend([Rows(self._slot, tokens, position, last=True)], LOGITS).logits(0)[0]

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Read a text of any length on states of zeros, so that kernels for its length are prepared."""
        if len(tokens) > 1:
            self._forget()
            self.states(torch.zeros(len(tokens), self._known.shape[-1], device=self.device), range(len(tokens)), 0)
            self.read(tokens[1:], 1)
            self.free(self._slot)

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Fill the cache with a text of at least two tokens from its beginning: logits [V_d] of the last."""
        return self.read(tokens, 0)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [n, V_d] of tokens [n] at position.. : rows of the text whose states before them are known, or one
        token after the row computed last, or the last n rows of a tree (parents: as of `model.Rows`, position its
        root's), whose parents were computed before.

        Raises ValueError for rows whose states are not there.
        """
        return self._scored(tokens, position, parents)

    def greedy(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> list[int]:
        """The target's ids [n] of greatest logit of `forward`."""
        return self._ids(argmax(self.forward(tokens, position, parents))).tolist()

    @torch.inference_mode()
    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """Feed tokens at position.., then each id found in turn: k greedy ids. They stay on the device until then."""
        found = [self._ids(argmax(self._scored(tokens, position)[-1:]))]
        position += len(tokens)
        for step in range(k - 1):
            found.append(self._ids(argmax(self._scored(found[-1], position + step))))
        return torch.cat(found).tolist()

    def keep(self, position: int, rows: Sequence[int]) -> int:
        """Of a tree's rows the root alone: the others were made of the head's own states, and are fed again."""
        return 1

    # ----------------------------------------------------------------------------------------------- internals
    def _ids(self, found: torch.Tensor) -> torch.Tensor:
        return found if self.target_ids is None else self.target_ids[found]

    def _scored(
        self, tokens: Sequence[int] | torch.Tensor, position: int, parents: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits [n, V_d] of rows of this slot, of one of the three kinds of `forward`."""
        share = self._share(tokens, position, parents)
        logits = self._compute([share], True)[1]
        assert logits is not None
        self._drop(share)
        return logits

    def _asked(self, rows: Rows) -> _Share:
        """Rows as `extend` takes them, checked."""
        slot, tokens, position, parents, last = rows
        head, read = self.slot(slot), last and parents is None
        if read and position == 0:
            if len(tokens) < 2:
                raise ValueError("a head has no row for position 0: give at least two tokens")
            tokens, position = tokens[1:], 1
        if len(tokens) > self.max_rows and not read:
            raise UserError(f"{len(tokens)} rows exceed the {self.max_rows} of a forward: draft fewer tokens")
        return head._share(tokens, position, parents)

    def _share(
        self, tokens: Sequence[int] | torch.Tensor, position: int, parents: Sequence[int] | None = None
    ) -> _Share:
        """Rows of this slot, of one of the three kinds of `forward`."""
        if parents is not None:
            return self._tree_share(tokens, position, parents)
        self._check(len(tokens), position)
        if position == self._last + 1 and len(tokens) == 1 and position > self._known_from + len(self._known):
            return _Share(self, tokens, position - 1, self._outputs[:1], False, position)
        return self._true_share(tokens, position)

    def _true_share(self, tokens: Sequence[int] | torch.Tensor, position: int) -> _Share:
        n = len(tokens)
        return _Share(self, tokens, position - 1, self._true_states(position, n), True, position + n - 1)

    def _tree_share(self, tokens: Sequence[int] | torch.Tensor, root: int, parents: Sequence[int]) -> _Share:
        done = len(parents) - len(tokens)
        if len(parents) > self.max_rows:
            raise UserError(f"a tree of {len(parents)} rows exceeds {self.max_rows}: draft fewer tokens")
        if root != self._last or not 1 <= done <= len(self._outputs) or max(parents[done:]) >= done:
            raise ValueError(f"a tree's rows at position {root} whose parents have not been computed")
        self._check(tree_levels(parents), root)
        states = self._outputs[list(parents[done:])]
        return _Share(self, tokens, root - 1 + done, states, False, -1, (root - 1, parents))

    def _check(self, n: int, position: int) -> None:
        if n < 1 or position < 1 or position + n > self.max_seq_len:
            raise UserError(
                f"{n} rows of a draft head at position {position} are outside 1..{self.max_seq_len - 1}: shorten the "
                "prompt or raise --max-seq-len"
            )

    def _compute(self, shares: Sequence[_Share], scored: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """(states [n, H] that the rows of each sequence pass on, logits [all rows, V_d] if they are asked for), all
        computed in one forward.

        Keys and values are written, and each slot notes what its next rows may go on from.
        """
        order = sorted(range(len(shares)), key=lambda i: self._neighbours(shares[i])) if len(shares) > 1 else [0]
        ordered = [shares[i] for i in order]
        passed, logits = self._rows(ordered, scored)
        sizes = [len(share.tokens) for share in ordered]
        hidden = passed.split(sizes) if len(shares) > 1 else [passed]
        for share, states in zip(ordered, hidden, strict=True):
            head = share.head
            if share.tree is None:
                head._outputs, head._last = states[-1:], share.position
            else:
                done = len(share.tree[1]) - len(share.tokens)
                head._outputs = torch.cat((head._outputs[:done], states))
        self._note(ordered)
        if len(shares) == 1 or order == sorted(order):
            return list(hidden), logits
        places = {i: place for place, i in enumerate(order)}
        if logits is not None:
            pieces = logits.split(sizes)
            logits = torch.cat([pieces[places[i]] for i in range(len(shares))])
        return [hidden[places[i]] for i in range(len(shares))], logits

    def _note(self, shares: Sequence[_Share]) -> None:
        """Let rows that were computed in one forward be found, if they are of a prompt and have the bits that they have
        in any company."""
        true = sum(len(share.tokens) for share in shares if share.true)
        for share in shares:
            n = len(share.tokens)
            keys = share.head._keys[share.start : share.start + n]
            if self.network.odd is None:
                alike = len(shares) == 1 and n == READ_CHUNK and share.start % READ_CHUNK == 0
            else:
                alike = true > 1 or not any(self.network.odd)
            if keys and share.true and alike:
                self.cache.note(share.head._slot, share.start, keys)

    def _neighbours(self, share: _Share) -> tuple[int, ...]:
        """Sequences of an order by this can be read together, where they lie evenly in the pool."""
        n, slot = len(share.tokens), share.head._slot
        start = self.cache.tables[slot].start or 0
        return share.tree is not None, n, block_end(share.start + n), start, slot

    def _before(self, shares: Sequence[_Share]) -> torch.Tensor:
        """States [n, H] that the rows join with their tokens; the target's are fused, all at once."""
        true = [share.states for share in shares if share.true]
        if not true:
            return _joined([share.states for share in shares])
        fused = self.network.fuse(_joined(true))
        if len(true) == len(shares):
            return fused
        pieces = iter(fused.split([len(states) for states in true]))
        return torch.cat([next(pieces) if share.true else share.states for share in shares])

    def _ids_of(self, shares: Sequence[_Share]) -> torch.Tensor:
        if len(shares) == 1:  # those of a chain stay on the device
            return torch.as_tensor(shares[0].tokens, dtype=torch.long, device=self.device)
        tokens = [int(token) for share in shares for token in share.tokens]
        return torch.tensor(tokens, dtype=torch.long, device=self.device)

    def _rows(self, shares: Sequence[_Share], scored: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(states [n, H] that all rows pass on, their logits if asked for); their keys and values are written."""
        parts = []
        for share in shares:
            m = len(share.tokens)
            table = self.cache.write(share.head._slot, share.start, share.start + m)
            parts.append(Part(table, share.start, m, m, share.tree))
        return self.network.run(self.embedding[self._ids_of(shares)], self._before(shares), parts, scored)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """One behind the other; a single one as it is."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
