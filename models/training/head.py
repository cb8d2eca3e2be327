"""The draft head as it is trained: fp32 weights, one unrolled forward over rows.

Training repeats what drafting does (EAGLE-3's training-time test): step 0 reads the target's states, step r reads the
head's own output of step r - 1. A row at step r attends to the slots of step 0 up to its own, and to its own slots of
the steps between, nothing else: so are drafted positions cached in decoding.

Source: Li et al. 2025, https://arxiv.org/abs/2503.01840.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.llama.head_config import HeadConfig
from models.llama.rope import rope_tables
from models.training.batches import Batch, Span

# (step, rows, normed outputs [rows, H]) -> which of these rows are drafted on, a bool each
Judge = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
LONGEST = 32768  # positions, at most


class TrainedHead:
    """A head's weights, named as in its file, and its unrolled forward.

    Args:
        config: its shape. embedding: [V, H] the target's, frozen. weights: by file name; fp32.
        compute: dtype of matrix products.
    """

    def __init__(
        self,
        config: HeadConfig,
        embedding: torch.Tensor,
        weights: dict[str, torch.Tensor],
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.embedding, self.compute = config, embedding, compute
        self.weights = {name: weight.float().requires_grad_() for name, weight in weights.items()}
        device = embedding.device
        cos, sin = rope_tables(config.layer, min(LONGEST, config.layer.max_position_embeddings))
        self._cos, self._sin = cos.to(device, torch.float32), sin.to(device, torch.float32)

    # ---------------------------------------------------------------------------------------------------- pieces
    def _matrix(self, *names: str) -> torch.Tensor:
        """Weights one below the other, in the dtype of products; made once per unrolled forward."""
        key = names[0]
        if key not in self._cast:
            parts = [self.weights[name] for name in names]
            self._cast[key] = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.compute)
        return self._cast[key]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weights[name], self.config.layer.rms_norm_eps)

    def normed(self, out: torch.Tensor) -> torch.Tensor:
        """What the lm_head reads. out: [R, H]."""
        return self._norm(out, "norm.weight")

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """[n, taps H] states of the target -> [n, H]."""
        width = self.config.target_hidden_size
        parts = [
            self._norm(states[:, i * width : (i + 1) * width], f"fc_norm.{i}.weight").to(self.compute)
            for i in range(len(self.config.taps))
        ]
        return F.linear(torch.cat(parts, dim=-1), self._matrix("fc.weight")).float()

    def _inputs(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[n, 2H]: the normed embedding, then the normed state."""
        embedded = self._norm(self.embedding[ids], "midlayer.input_layernorm.weight")
        return torch.cat((embedded, self._norm(hidden, "midlayer.hidden_norm.weight")), dim=-1).to(self.compute)

    def _heads(self, x: torch.Tensor, heads: int, positions: torch.Tensor | None) -> torch.Tensor:
        """[n, heads D] -> [n, heads, D], rotated where positions [n] are given."""
        x = x.view(len(x), heads, self.config.layer.head_dim)
        if positions is None:
            return x
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        x = x.float()
        half = x.shape[-1] // 2
        # the tables' sine carries the sign of the swapped halves
        return (x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin).to(self.compute)

    def _keys_values(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv_heads = self.config.layer.num_key_value_heads
        names = "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight"
        keys, values = F.linear(x, self._matrix(*names)).chunk(2, dim=-1)
        return self._heads(keys, kv_heads, positions), self._heads(values, kv_heads, None)

    def _queries(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        projected = F.linear(x, self._matrix("midlayer.self_attn.q_proj.weight"))
        return self._heads(projected, self.config.layer.num_attention_heads, positions)

    def _rest(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer after attention: [R, H]."""
        x = residual + F.linear(attended, self._matrix("midlayer.self_attn.o_proj.weight"))
        y = self._norm(x, "midlayer.post_attention_layernorm.weight").to(self.compute)
        gate, up = F.linear(y, self._matrix(*(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up")))).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self._matrix("midlayer.mlp.down_proj.weight"))

    # --------------------------------------------------------------------------------------------------- forward
    def unroll(self, batch: Batch, steps: int, judge: Judge) -> None:
        """Drafts `steps` tokens from every row, as long as `judge` lets a row go on, along the answers' own tokens.

        judge is told, step by step, rows (indices into the batch's rows) and what the lm_head reads of them.
        """
        self._cast: dict[str, torch.Tensor] = {}
        device = batch.states.device
        hidden = self.fuse(batch.states)
        inputs = self._inputs(batch.next_ids, hidden)
        places = torch.cat([torch.arange(span.slots) for span in batch.spans]).to(device)
        keys, values = self._keys_values(inputs, places)
        at = torch.cat([torch.arange(s.slot + s.first, s.slot + s.slots) for s in batch.spans]).to(device)
        rows, stands = torch.arange(len(at), device=device), places[at]
        ends = torch.tensor([span.row + span.rows for span in batch.spans], device=device)
        own: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of the rows' own later steps
        residual = hidden[at]
        queries = self._queries(inputs[at], stands)
        for step in range(steps):
            counts = torch.searchsorted(rows, ends).tolist()
            attended = self._attend(batch.spans, counts, queries, stands, keys, values, own)
            out = self._rest(residual, attended)
            alive = judge(step, rows, self.normed(out))
            if step + 1 == steps:
                break
            alive = (alive & (batch.left[rows] > step + 1)).nonzero()[:, 0]
            if not len(alive):
                break
            rows, stands, residual = rows[alive], stands[alive], out[alive]
            inputs = self._inputs(batch.row_ids[rows + step + 1], residual)
            own = [(k[alive], v[alive]) for k, v in own]
            own.append(self._keys_values(inputs, stands + step + 1))
            queries = self._queries(inputs, stands + step + 1)

    def _attend(
        self,
        spans: list[Span],
        counts: list[int],
        queries: torch.Tensor,
        stands: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """[rows, heads D]. counts: rows up to the end of each sequence; stands: their slots within it."""
        layer = self.config.layer
        kv_heads, dim = layer.num_key_value_heads, layer.head_dim
        group, scale = layer.num_attention_heads // kv_heads, dim**-0.5
        pieces, begin = [], 0
        for span, end in zip(spans, counts, strict=True):
            n = end - begin
            if n:
                here = slice(begin, end)
                # query heads of a group are rows of their KV head: [KV, n group, D]
                q = queries[here].view(n, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, n * group, dim)
                slots = slice(span.slot, span.slot + span.slots)
                k, v = keys[slots].transpose(0, 1), values[slots].transpose(0, 1)  # [KV, S, D]
                scores = (q @ k.transpose(1, 2)).float().mul(scale)
                columns = torch.arange(span.slots, device=q.device)
                hidden = (columns > stands[here, None]).repeat_interleave(group, dim=0)
                seen = [scores.masked_fill(hidden, float("-inf"))]
                mine = []
                for own_keys, own_values in own:
                    wide_k, wide_v = (
                        x[here].transpose(0, 1).repeat_interleave(group, dim=1) for x in (own_keys, own_values)
                    )
                    seen.append((q.float() * wide_k).sum(-1, keepdim=True).mul(scale))
                    mine.append(wide_v)
                weights = torch.cat(seen, dim=-1).softmax(-1).to(self.compute)
                result = weights[..., : span.slots] @ v
                for index, wide_v in enumerate(mine, span.slots):
                    result = result + weights[..., index : index + 1] * wide_v
                pieces.append(result.view(kv_heads, n, group, dim).transpose(0, 1).reshape(n, -1))
            begin = end
        return torch.cat(pieces)
