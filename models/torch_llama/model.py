"""Llama in torch: the reference for the TT-NN model's numbers, and the runtime on CPU and CUDA.

Shape letters as in `models.llama`, and R: rows of a sequence after padding.

Row-invariant arithmetic
    In bf16 (and in the last bits of fp32) the result of a row depends on how many rows are computed with it, because
    another row count selects another kernel. Speculative decoding would then differ from plain decoding wherever two
    logits nearly tie. With `fixed_rows` = R every decode and every verification runs the same kernels on exactly R
    rows (padded), and each row reads the KV cache up to the end of the block of 128 rows that it stands in, so that
    the bits of a row depend on its own history alone. Where the rows of one forward stand in two blocks, attention is
    computed once for each. A Tenstorrent tile does the same by nature: it has 32 rows whatever n is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.model import SlotBySlot
from models.speculative.tree import tree_depths, tree_levels
from models.torch_llama.choice import Head
from models.torch_llama.first_layers import FirstLayers, chained_greedy
from models.torch_llama.linear import Int8Linear, PackedLinear, PlainLinear, int8_works, packing_works

if TYPE_CHECKING:
    from models.llama.gguf_checkpoint import AnyCheckpoint

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
KV_BLOCK = 128
PREFILL_CHUNK = 512
MAX_ROWS = 32

Tokens = Sequence[int] | torch.Tensor


class _Layer:
    """Weights of one decoder layer. qkv: H -> (Q + 2 KV) D; gate_up: H -> 2 intermediate."""

    __slots__ = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down", "kv")

    def __init__(self, take: Callable, linear: Callable, prefix: str, kv: torch.Tensor):
        def fused(*names: str):
            return linear(torch.cat([take(f"{prefix}{name}.weight") for name in names]))

        self.attention_norm = take(prefix + "input_layernorm.weight")
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.output = fused("self_attn.o_proj")
        self.mlp_norm = take(prefix + "post_attention_layernorm.weight")
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj")
        self.down = fused("mlp.down_proj")
        self.kv = kv  # [B, S, 2 KV, D]: the keys of a position, then its values

    def with_cache(self, kv: torch.Tensor) -> _Layer:
        """The same weights with another cache."""
        layer = copy.copy(self)
        layer.kv = kv
        return layer


class TorchLlama(SlotBySlot):
    """A Llama with its own KV cache on one device.

    Implements `models.speculative.model.LanguageModel` and, for its first slot, `SequenceModel` with the capabilities
    `Chains`, `Trees`, `EarlyExit` and `Tapped`.

    Args:
        config: the architecture.
        tensors: Hugging Face names -> weights, any float dtype; an opened `Checkpoint` serves as one, read lazily.
        device: "cpu", "cuda" or any torch device.
        dtype: "bf16", "fp32" or "fp16" (what it computes in).
        max_seq_len: positions the KV cache holds (<= config.max_position_embeddings).
        batch: sequences that one call of `prefill` or `forward` takes side by side.
        slots: sequences that `extend` can tell apart, each with a cache of its own; more than one only without a batch.
        fixed_rows: pad every decode and verification to this many rows (row-invariant, see above); None: no padding.
        typical_rows: rows that most forwards have, for which weights are laid out (default: fixed_rows, else 1). A
            hint: it changes speed, and results only in their last bits.
        quantize: "int8" for matrices in int8 (on CPU; all else is then fp32), or None.

    Raises:
        UserError: unknown dtype or quantisation, a context longer than the model's.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        device: str | torch.device = "cpu",
        dtype: str = "bf16",
        max_seq_len: int = 2048,
        batch: int = 1,
        slots: int = 1,
        fixed_rows: int | None = None,
        typical_rows: int | None = None,
        quantize: str | None = None,
    ):
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if quantize not in (None, "int8"):
            raise UserError(f"unknown quantisation {quantize!r}: choose int8 or leave it out")
        self.device = torch.device(device)
        if quantize and self.device.type != "cpu":
            raise UserError(f"int8 weights run on the CPU only, not on {self.device}: use bf16 there")
        if quantize and not int8_works():
            raise UserError(f"torch {torch.__version__} has no int8 kernels for this CPU: use bf16")
        if not 0 < max_seq_len <= config.max_position_embeddings:
            raise UserError(
                f"context of {max_seq_len} tokens is outside the model's 1..{config.max_position_embeddings}: "
                "lower --max-seq-len"
            )
        if fixed_rows is not None and not 1 <= fixed_rows <= MAX_ROWS:
            raise UserError(f"fixed_rows {fixed_rows} is outside 1..{MAX_ROWS}")
        if slots < 1 or (slots > 1 and batch > 1):
            raise UserError(f"{slots} slots with a batch of {batch}: at least one slot, several only without a batch")
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = max_seq_len
        self.batch = batch
        self.slots = slots
        self.fixed_rows = fixed_rows
        self.max_rows = fixed_rows or MAX_ROWS
        self.typical_rows = typical_rows or fixed_rows or 1
        self.dtype = torch.float32 if quantize else DTYPES[dtype]
        self._early: FirstLayers | None = None  # what it has computed belongs to the tokens that come next
        self._scored = torch.empty(0)  # rows [B R, H] that the last logits were computed from
        self._taps: tuple[int, ...] = ()  # layers after which hidden states are kept, and those kept so far
        self._tapped: list[list[torch.Tensor]] = []
        self._load(tensors, quantize)
        self._views: dict[int, TorchLlama] = {0: self}  # by slot, made when they are first asked for

    @classmethod
    def from_checkpoint(cls, checkpoint: AnyCheckpoint, **options) -> TorchLlama:
        """The model of an opened checkpoint; options as for the constructor."""
        return cls(checkpoint.config, checkpoint, **options)

    # ------------------------------------------------------------------------------------------ construction
    def _load(self, tensors: Mapping[str, torch.Tensor], quantize: str | None) -> None:
        config, on_cpu = self.config, self.device.type == "cpu"
        packed = on_cpu and not quantize and packing_works(self.dtype)
        self.linears: list = []

        def take(name: str) -> torch.Tensor:
            return tensors[name].to(device=self.device, dtype=self.dtype)

        def layout_rows(weight: torch.Tensor) -> int:
            # For one row, large weights are 1.3x faster in their own layout, small ones 1.1x to 1.3x slower.
            rows = self.typical_rows * self.batch
            return rows if rows > 1 or weight.numel() >= 2**21 else 8

        def linear(weight: torch.Tensor):
            made: Int8Linear | PackedLinear | PlainLinear
            if quantize:
                made = Int8Linear(weight, layout_rows(weight))
            else:
                made = PackedLinear(weight, layout_rows(weight)) if packed else PlainLinear(weight)
            self.linears.append(made)
            return made

        rows = self.fixed_rows or MAX_ROWS
        length = _block_end(self.max_seq_len + rows)
        # In memory the positions of a head lie side by side: attention reads them up to twice as fast so.
        shape = (
            config.num_hidden_layers,
            self.batch * self.slots,
            2 * config.num_key_value_heads,
            length,
            config.head_dim,
        )
        self._caches = torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(2, 3)
        self.kv = self._caches[:, : self.batch]  # of the first slot, or of the batch
        # On the CPU the table stays as stored (a memory-mapped file costs no memory of its own): it is only ever
        # read a few rows at a time, and a tied lm_head has its own packed copy.
        embedding = tensors["model.embed_tokens.weight"]
        self.embedding = embedding if on_cpu else embedding.to(device=self.device, dtype=self.dtype)
        self.layers = [_Layer(take, linear, f"model.layers.{i}.", self.kv[i]) for i in range(config.num_hidden_layers)]
        self.norm = take("model.norm.weight")
        tied = config.tie_word_embeddings
        head = self.embedding.to(self.dtype) if tied else take("lm_head.weight")
        self.lm_head = linear(head)
        # Equal logits are decided by rows of the stored matrix, where these take no memory of their own.
        decides = self.dtype in (torch.bfloat16, torch.float16) and on_cpu
        stored = self.embedding if tied else head if decides and tensors["lm_head.weight"].dtype == self.dtype else None
        self._head_rows = Head(stored if decides else None)
        cos, sin = rope_tables(config, length)
        self.cos = cos.to(device=self.device, dtype=self.dtype)[:, None]  # [S, 1, D]
        self.sin = sin.to(device=self.device, dtype=self.dtype)[:, None]
        # Attention may take the query heads of a group as rows of their KV head, which is then read (on CPU also
        # repacked) once for all of them: equal but for the last bit, 1.3x cheaper at 24 heads on 8, 4x in a batch of
        # 96. Two heads a group are cheaper left apart.
        group = config.num_attention_heads // config.num_key_value_heads
        self.fold = group if group > 2 or self.batch > 1 else 1
        # Row i of a forward at position p may see columns 0..p+i. One band, shifted by p, holds every such mask.
        band = torch.full((rows, 2 * length), float("-inf"), dtype=self.dtype, device=self.device)
        band = band.triu(length + 1)  # [R, 2S]: 0 up to column S + i, -inf beyond
        self.band = band.repeat_interleave(self.fold, dim=0)
        self._band_origin = length

    def _view(self, index: int) -> TorchLlama:
        """A slot as a model of its own that shares the weights."""
        view = copy.copy(self)
        view.kv = self._caches[:, index : index + 1]
        view.layers = [layer.with_cache(view.kv[i]) for i, layer in enumerate(self.layers)]
        return view

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights held in memory; a memory-mapped embedding table is the file's, not counted."""
        held = sum(linear.bytes for linear in self.linears)
        norms = self.norm.nbytes * (2 * len(self.layers) + 1)
        table_of_its_own = self.device.type != "cpu" and not self.config.tie_word_embeddings
        return held + norms + (self.embedding.nbytes if table_of_its_own else 0)

    @property
    def kv_cache_bytes(self) -> int:
        return self._caches.nbytes

    # -------------------------------------------------------------------------------------------------- slots
    def slot(self, index: int) -> TorchLlama:
        """One slot as a model of one sequence; the first is the model itself."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of a model with {self.slots}")
        if index not in self._views:
            self._views[index] = self._view(index)
        return self._views[index]

    def sequence(self, index: int) -> TorchLlama:
        """One sequence of the batch as a model of its own: it fills that sequence's cache and no other."""
        if not 0 <= index < self.batch:
            raise IndexError(f"sequence {index} of a batch of {self.batch}")
        view = self._view(index)
        view.batch = 1
        return view

    @contextlib.contextmanager
    def tap(self, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """While it is entered, keep the hidden states [n, H] of the rows computed, after so many layers each: 0 is the
        embedding. They are in the list, a tensor for each of `layers`, when it is left; of a batch, one sequence after
        another.

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

    # ------------------------------------------------------------------------------------------------ forward
    @torch.inference_mode()
    def prefill(self, tokens: Tokens) -> torch.Tensor:
        """Fills the cache with `tokens` from position 0 and returns the logits [V] that follow the last one.

        With a batch, tokens [B, n] gives [B, V].
        """
        ids = self._ids(tokens)
        n = ids.shape[1]
        self._early = None
        self._check(n, [0] * len(ids))
        for start in range(0, n, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            hidden = self._layers(chunk, [start] * len(ids), chunk.shape[1])
        last = hidden.view(len(ids), chunk.shape[1], -1)[:, -1]
        logits = self._head(self._padded(last, self.max_rows if self.fixed_rows else 1))[: len(ids)]
        return logits if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else logits[0]

    @torch.inference_mode()
    def forward(
        self, tokens: Tokens, position: int | Sequence[int], parents: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits [n, V] of `tokens` [n] standing at position..position+n-1; their KV is written there.

        n = 1 is decoding, n = K + 1 is verification. With a batch, tokens [B, n] and position [B] give [B, n, V].
        Rows of the cache beyond are stale, masked, and overwritten later: going back costs nothing.

        parents [m >= n]: the tree of which tokens are the last n rows; row i is written at position+i, stands as many
        positions after row 0 as it has ancestors, and sees them and what lies before `position`. No batch.
        """
        ids = self._ids(tokens)
        batch, n = ids.shape
        if parents is None:
            positions = [position] if isinstance(position, int) else [int(p) for p in position]
            self._check(n, positions)
            hidden = self._decode(self._pad_ids(ids), positions, n)
        else:
            root = position if isinstance(position, int) else int(position[0])
            self._check_tree(root, parents)
            self._early = None
            hidden = self._layers(self._pad_ids(ids), [root + len(parents) - n], n, tree=(root, parents))
        logits = self._head(hidden).view(batch, -1, self.vocab_size)[:, :n]
        return logits if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else logits[0]

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

    @torch.inference_mode()
    def keep(self, position: int, rows: Sequence[int]) -> int:
        """Move the keys and values of a tree's rows to position..: all of them are then there. No batch."""
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))  # those before are in their places
        if moved < len(rows):
            kv = self.kv[:, 0]
            kv[:, position + moved : position + len(rows)] = kv[:, [position + row for row in rows[moved:]]]
        return len(rows)

    def first_layers(self, count: int) -> FirstLayers:
        """The first `count` layers with the norm and the head, as a model that drafts in this one's cache."""
        return FirstLayers(self, count)

    # ----------------------------------------------------------------------------------------------- internals
    def _ids(self, tokens: Tokens) -> torch.Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        return ids if ids.ndim == 2 else ids[None]

    def _check(self, n: int, positions: list[int]) -> None:
        if n < 1 or min(positions) < 0 or max(positions) + n > self.max_seq_len:
            raise UserError(
                f"{n} tokens at position {max(positions)} do not fit the context of {self.max_seq_len}: "
                "shorten the prompt or raise --max-seq-len"
            )

    def _check_tree(self, position: int, parents: Sequence[int]) -> None:
        if len(parents) > self.max_rows:
            raise UserError(f"a tree of {len(parents)} rows exceeds {self.max_rows}: draft fewer tokens")
        self._check(tree_levels(parents), [position])  # its rows may lie beyond the context, there is room for them

    def _pad_ids(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        if self.fixed_rows is None or n == self.fixed_rows:
            return ids
        if n > self.fixed_rows:
            raise UserError(f"{n} rows exceed the fixed {self.fixed_rows} rows of this model: draft fewer tokens")
        return F.pad(ids, (0, self.fixed_rows - n))

    @staticmethod
    def _padded(hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return hidden if len(hidden) >= rows else F.pad(hidden, (0, 0, 0, rows - len(hidden)))

    @staticmethod
    def _rows(table: torch.Tensor, positions: list[int], n: int) -> torch.Tensor:
        """Rows p..p+n-1 of a [S, 1, D] table for each position p: [positions, n, 1, D]."""
        if len(positions) == 1:
            return table[None, positions[0] : positions[0] + n]
        return torch.stack([table[p : p + n] for p in positions])

    def _mask(self, positions: list[int], n: int, length: int) -> torch.Tensor:
        """Additive causal mask [positions, 1, n fold, length] for n rows that start at each position."""
        if n * self.fold <= len(self.band):
            origin = self._band_origin
            rows = [self.band[: n * self.fold, origin - p : origin - p + length] for p in positions]
            return rows[0][None, None] if len(rows) == 1 else torch.stack(rows)[:, None]
        columns = torch.arange(length, device=self.device)
        last = torch.tensor(positions, device=self.device)[:, None] + torch.arange(n, device=self.device)
        hidden = (columns > last[:, :, None]).repeat_interleave(self.fold, dim=1)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None]

    def _tree(self, root: int, parents: Sequence[int], start: int, n: int, length: int):
        """Mask [1, 1, n fold, length] and positions [n] of a tree's rows that are written at start.. .

        Rows beyond the tree are padding: they see what the root sees, and nobody sees them.
        """
        seen = torch.eye(len(parents) + n, dtype=torch.bool)
        for row, parent in enumerate(parents[1:], 1):
            seen[row] |= seen[parent]
        new = slice(start - root, start - root + n)
        seen = seen[new, : length - root]
        mask = torch.zeros(n, length, dtype=self.dtype)
        mask[:, root:] = float("-inf")
        mask[:, root : root + seen.shape[1]].masked_fill_(seen, 0.0)
        stands = torch.tensor([root + depth for depth in (tree_depths(parents) + [0] * n)[new]])
        return mask.repeat_interleave(self.fold, dim=0).to(self.device)[None, None], stands.to(self.device)

    def _decode(self, ids: torch.Tensor, positions: list[int], n: int) -> torch.Tensor:
        """Hidden states [B R, H] of R rows, n of them tokens; goes on from what `FirstLayers` has computed of them."""
        early, self._early = self._early, None
        if early is None or not len(x := early.computed(ids[:, :n], positions)):
            return self._layers(ids, positions, n)
        done = len(x)
        if done < n:
            rest = self._layers(self._pad_ids(ids[:, done:n]), [positions[0] + done], n - done, stop=early.layers)
            x = torch.cat((x, rest[: n - done]))
        return self._layers(ids, positions, n, first=early.layers, x=self._padded(x, ids.shape[1]))

    def _layers(
        self,
        ids: torch.Tensor,
        positions: list[int],
        used: int,
        *,
        tree: tuple[int, Sequence[int]] | None = None,
        first: int = 0,
        stop: int | None = None,
        x: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B R, H] before the final norm; writes the KV of all R rows at each position.

        used: rows of each sequence that are tokens; the others are padding, whose results mean nothing.
        tree: where its row 0 stands, and the parents of all its rows. first, stop: layers to run, from x [R, H].
        """
        config = self.config
        batch, n = ids.shape
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated, q_width, fold = heads + kv_heads, heads * dim, self.fold
        streams = heads // fold
        length = _block_end(max(positions) + n)
        if len(set(positions)) == 1:  # one span of the cache serves all sequences
            spans, positions = [(slice(batch), positions[0])], positions[:1]
        else:
            spans = [(slice(index, index + 1), position) for index, position in enumerate(positions)]
        attention = []  # (cache rows that are read, mask, first row that reads so many), shortest first
        if tree is None:
            lengths = [length]
            if self.fixed_rows and used <= self.fixed_rows and len(positions) == 1:
                lengths = sorted({_block_end(positions[0] + i) for i in (1, used)})
            for length in lengths:
                attention.append((length, self._mask(positions, n, length), max(0, length - KV_BLOCK - positions[0])))
            cos, sin = (self._rows(table, positions, n) for table in (self.cos, self.sin))  # [1 or B, n, 1, D]
        else:
            mask, stands = self._tree(*tree, positions[0], n, length)
            attention.append((length, mask, 0))
            cos, sin = (table[None, stands] for table in (self.cos, self.sin))
        eps, shape, half = config.rms_norm_eps, (config.hidden_size,), dim // 2

        if x is None:
            x = self.embedding[ids.flatten()].to(self.dtype)  # [B R, H]
        if self._taps:
            self._keep_states(first, x, batch, used)
        for count, layer in enumerate(self.layers[first:stop], first + 1):
            qkv = layer.qkv(F.rms_norm(x, shape, layer.attention_norm, eps))
            qk = qkv[:, : rotated * dim].view(batch, n, rotated, dim)
            swapped = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
            torch.addcmul(qk * cos, swapped, sin, out=qk)
            new = qkv[:, q_width:].view(batch, n, 2 * kv_heads, dim)
            for sequences, start in spans:
                layer.kv[sequences, start : start + n] = new[sequences]
            queries = qkv[:, :q_width].view(batch, n, streams, fold, dim).transpose(1, 2)
            folded = queries.reshape(batch, streams, n * fold, dim)
            attended: torch.Tensor | None = None
            for length, mask, row in attention:
                cached = layer.kv[:batch, :length].transpose(1, 2)
                result = F.scaled_dot_product_attention(
                    folded,
                    cached[:, :kv_heads],
                    cached[:, kv_heads:],
                    attn_mask=mask,
                    enable_gqa=streams != kv_heads,
                )
                if attended is None:
                    attended = result
                else:
                    attended[:, :, row * fold :] = result[:, :, row * fold :]
            assert attended is not None  # something is always read
            x = x + layer.output(attended.view(queries.shape).transpose(1, 2).reshape(batch * n, q_width))
            gate, up = layer.gate_up(F.rms_norm(x, shape, layer.mlp_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
            if self._taps:
                self._keep_states(count, x, batch, used)
        return x

    def _keep_states(self, count: int, x: torch.Tensor, batch: int, used: int) -> None:
        """Keep the states after `count` layers, where they were asked for; rows that are padding are left out."""
        for layers, pieces in zip(self._taps, self._tapped, strict=True):
            if layers == count:
                pieces.append(x.view(batch, -1, x.shape[1])[:, :used].flatten(0, 1))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        self._scored = F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)
        return self.lm_head(self._scored)


def _block_end(rows: int) -> int:
    """Rows of the KV cache that are read to see so many: whole blocks."""
    return -(-rows // KV_BLOCK) * KV_BLOCK
