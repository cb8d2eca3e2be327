"""The layers of a Llama and its head, in torch operations: on CUDA, and on any CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from models.llama.config import LlamaConfig
from models.llama.rope import rope_tables
from models.speculative.model import Chain, Draws
from models.torch_llama.attention import Attention, Part, Plan
from models.torch_llama.invariance import odd_alone
from models.torch_llama.kv_cache import KVCache
from models.torch_llama.linear import Linear, PairedLinear

_MATRICES = ("qkv", "output", "gate_up", "down")
Take = Callable[[str], torch.Tensor]


class Network(Protocol):
    """What a model does with rows: all that depends on how it computes."""

    dtype: torch.dtype
    """Of hidden states between layers."""
    layers: Sequence
    norm: torch.Tensor
    """Weights [H] of the final norm."""

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        ...

    def plan(self, parts: Sequence[Part], fixed: bool | None = None) -> Any:
        """What all layers of a forward of these rows have in common.

        fixed: of the rows of one sequence, whether each reads no further than its own block; None: of any number of
        sequences, none padded.
        """
        ...

    def run(
        self, x: torch.Tensor, plan: Any, first: int, stop: int, taps: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states [n, H] behind layers first..stop-1, of those before; writes the rows' keys and values.

        taps: rising numbers between first and stop: the states after so many layers are given too.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states [n, H] behind the final norm, the logits [n, V] computed from them)"""
        ...


class Chained(Protocol):
    """A network that drafts a chain by itself."""

    def chain(
        self, x: torch.Tensor, part: Part, least: Sequence[float], table: torch.Tensor, draws: Draws | None = None
    ) -> Chain:
        """Ids behind the last of some rows of one sequence, each fed in turn; writes the keys and values of all rows
        but the last id's.

        x: the rows' embeddings [n, H]. part: where they stand; the positions behind them must be there too. least,
        draws: as of `speculative.model.ChainsWhile`. table: embeddings [V, H] of all ids.
        """
        ...

    def draw(self, logits: torch.Tensor, draws: Draws, vocabulary: int, ids: torch.Tensor | None = None) -> Chain:
        """Draw one id from logits [1, V] as a chain does. vocabulary: of the text. ids: the text's id of each; None:
        the same."""
        ...


def rows_bytes(config: LlamaConfig, itemsize: int, rows: int, wide: bool) -> int:
    """Memory that so many rows take while they are computed: at most, which is in the MLP.

    There are rows as they came, as they are and normed; what attention was computed from; and the widest numbers four
    times: gate and up, a product of them and one beside it, or those of this layer and of the one before.

    itemsize: of a number. wide: kernels sum gate and up in fp32 beside their result.
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inner = config.intermediate_size
    both = 4 * inner if config.num_hidden_layers > 1 else 2 * inner
    widest = max(4 * inner, both + (2 * inner * 4 // itemsize if wide else 0))
    return rows * itemsize * (widest + (2 * heads + 3 * kv_heads) * dim + 3 * config.hidden_size)


class _Layer:
    """Weights of one decoder layer, and its keys and values of all slots.

    qkv: H -> (Q + 2 KV) D; gate_up: H -> 2 intermediate.
    """

    __slots__ = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down", "kv")

    def __init__(self, take: Take, linear: Callable, prefix: str, kv: torch.Tensor) -> None:
        def fused(*names: str):
            return linear(torch.cat([take(f"{prefix}{name}.weight") for name in names]))

        self.attention_norm = take(prefix + "input_layernorm.weight")
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.output = fused("self_attn.o_proj")
        self.mlp_norm = take(prefix + "post_attention_layernorm.weight")
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj")
        self.down = fused("mlp.down_proj")
        self.kv = kv  # [2 KV, P, D]: of the pool's positions


class TorchLayers:
    """Layers and head in torch operations; implements `Network`.

    Args:
        config: the architecture.
        take: a tensor by name, on the device and in the dtype that is computed in.
        head: gives the output matrix [V, H].
        linear: makes a linear layer of a matrix [out, in].
        cache: keys and values.
        positions: that rows may stand at.
        fold: query heads of a group that attention takes as rows of their KV head.
    """

    def __init__(
        self,
        config: LlamaConfig,
        take: Take,
        head: Callable[[], torch.Tensor],
        linear: Callable[[torch.Tensor], Linear],
        cache: KVCache,
        positions: int,
        fold: int,
    ) -> None:
        self.config = config
        self.linears: list[Linear] = []
        self.dtype = cache.pool.dtype

        def made(weight: torch.Tensor):
            self.linears.append(linear(weight))
            return self.linears[-1]

        self.head = linear(head())  # first, so that what it is made of is gone before the layers are there
        self.layers: Sequence[_Layer] = [
            _Layer(take, made, f"model.layers.{i}.", cache.pool[i]) for i in range(config.num_hidden_layers)
        ]
        self.norm = take("model.norm.weight")
        self.linears.append(self.head)
        cos, sin = rope_tables(config, positions)
        self.cos = cos.to(device=cache.device, dtype=self.dtype)[:, None]  # [S, 1, D]
        self.sin = sin.to(device=cache.device, dtype=self.dtype)[:, None]
        self.attention = Attention(cache, config.num_attention_heads // fold, fold)

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(each.bytes for each in self.linears) + self.norm.nbytes * (2 * len(self.layers) + 1)

    def odd_alone(self) -> list[bool] | None:
        """Of which matrices a single row has other bits, see `invariance.odd_alone`."""
        layer, config = self.layers[0], self.config
        hidden = config.hidden_size
        widths = (hidden, config.num_attention_heads * config.head_dim, hidden, config.intermediate_size)
        linears = zip((getattr(layer, name) for name in _MATRICES), widths, strict=True)
        return odd_alone(list(linears), (self.head, hidden), self.attention)

    def pair(self, odd: Sequence[bool]) -> None:
        """Let those matrices compute no row alone."""
        for name, pairs in zip(_MATRICES, odd, strict=False):
            for layer in self.layers if pairs else ():
                setattr(layer, name, PairedLinear(getattr(layer, name)))
        if odd and odd[-1]:
            self.head = PairedLinear(self.head)

    def plan(self, parts: Sequence[Part], fixed: bool | None = None) -> Plan:
        """As of `Network`."""
        return self.attention.together(parts) if fixed is None else self.attention.alone(parts[0], fixed)

    def run(
        self, x: torch.Tensor, plan: Plan, first: int, stop: int, taps: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As of `Network`; rows [R, H] may be more than are planned to be written: padding, whose results mean
        nothing."""
        config, attention = self.config, self.attention
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated, q_width, rows = heads + kv_heads, heads * dim, len(x)
        cos, sin = self.cos[plan.stands], self.sin[plan.stands]  # [R, 1, D]
        eps, shape, half = config.rms_norm_eps, (config.hidden_size,), dim // 2
        kept: list[torch.Tensor] = []

        for done, layer in enumerate(self.layers[first:stop], first + 1):
            qkv = layer.qkv(F.rms_norm(x, shape, layer.attention_norm, eps))
            qk = qkv[:, : rotated * dim].view(rows, rotated, dim)
            swapped = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
            torch.addcmul(qk * cos, swapped, sin, out=qk)
            attention.write(layer.kv, qkv[:, q_width:].view(rows, 2 * kv_heads, dim), plan)
            x = x + layer.output(attention.attend(layer.kv, qkv[:, :q_width], plan))
            gate, up = layer.gate_up(F.rms_norm(x, shape, layer.mlp_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
            if done in taps:
                kept.append(x)
        return x, kept

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `Network`."""
        scored = F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)
        return scored, self.head(scored)
