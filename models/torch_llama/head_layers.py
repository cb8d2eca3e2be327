"""What a draft head computes, in torch operations: on CUDA, and on any CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from models.llama.head_config import HeadConfig
from models.llama.rope import rope_tables
from models.speculative.model import Chain, Draws
from models.torch_llama.attention import Attention, Part
from models.torch_llama.invariance import MANY, odd_matrices, seeded_noise
from models.torch_llama.kv_cache import KVCache
from models.torch_llama.layers import Take
from models.torch_llama.linear import Linear


class HeadNetwork(Protocol):
    """What a head does with rows: all that depends on how it computes."""

    dtype: torch.dtype
    """Of states."""
    odd: list[bool] | None
    """Whether a row's keys and values have other bits alone than among others, for what they are made by; None: they
    depend on the number of rows even where these are several."""

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        ...

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """[n, H] of the target's states [n, taps x H]."""
        ...

    def run(
        self, tokens: torch.Tensor, states: torch.Tensor, parts: Sequence[Part], scored: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(states [n, H] that rows pass on, their logits [n, V_d] if they are asked for); keys and values are written.

        tokens: their embeddings [n, H], in any float dtype. states: [n, H] that they join with these.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V_d] of states [n, H] that rows have passed on."""
        ...


class ChainedHead(Protocol):
    """A head's network that drafts a chain by itself."""

    def chain(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        part: Part,
        least: Sequence[float],
        table: torch.Tensor,
        ids: torch.Tensor | None,
        draws: Draws | None = None,
    ) -> tuple[Chain, torch.Tensor]:
        """What was drafted behind the last of some rows of a text, and the state [1, H] that its last row passes on.

        tokens, states, part: of the rows that it begins with, as of `HeadNetwork.run`. least, table, draws: as of
        `layers.Chained`. ids: the text's id [V_d] of each that is drafted; None: the same.
        """
        ...

    def draw(self, logits: torch.Tensor, draws: Draws, vocabulary: int, ids: torch.Tensor | None = None) -> Chain:
        """As of `layers.Chained`."""
        ...


class Fusing:
    """Makes one state of the target's for each row, and norms what a head's matrix for that takes.

    Args:
        config: of the head.
        take: a tensor by name, on the device and in the dtype of states.
        linear: the matrix, [n, taps x H] -> [n, H].
    """

    def __init__(self, config: HeadConfig, take: Take, linear: Linear) -> None:
        self.config, self.linear = config, linear
        self.together = take("input_norm.weight") if config.norm_before_fc else None
        each = [take(f"fc_norm.{i}.weight") for i in range(len(config.taps))] if config.fc_norm else []
        self.each = torch.stack(each) if each else None  # [taps, H]

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return self.linear.bytes + sum(norm.nbytes for norm in (self.each, self.together) if norm is not None)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """As of `HeadNetwork.fuse`."""
        eps = self.config.layer.rms_norm_eps
        if self.together is not None:
            states = F.rms_norm(states, (states.shape[-1],), self.together, eps)
        if self.each is not None:
            taps = states.view(len(states), *self.each.shape)
            normed = F.rms_norm(taps.float(), self.each.shape[1:], None, eps) * self.each.float()
            states = normed.to(states.dtype).view(states.shape)
        return self.linear(states)


class TorchHeadLayer:
    """A head's layer in torch operations; implements `HeadNetwork`.

    Args:
        config: its shape.
        take: a tensor by name, on the device and in the dtype that is computed in.
        linear: makes a linear layer of a matrix [out, in].
        cache: keys and values.
        positions: that rows may stand at.
        alone: so many rows of one sequence are computed as its decoding is.
    """

    def __init__(
        self,
        config: HeadConfig,
        take: Take,
        linear: Callable[[torch.Tensor], Linear],
        cache: KVCache,
        positions: int,
        alone: int,
    ) -> None:
        self.config, self.dtype, self._pool, self._alone = config, cache.pool.dtype, cache.pool, alone
        self.linears: list[Linear] = []
        own, layer = config.prefix, config.layer

        def made(*names: str) -> Linear:
            self.linears.append(linear(torch.cat([take(f"{name}.weight") for name in names])))
            return self.linears[-1]

        self.fuse = Fusing(config, take, made("fc"))
        self.token_norm = take(f"{own}input_layernorm.weight")
        self.state_norm = take(f"{own}hidden_norm.weight")
        self.qkv = made(*(f"{own}self_attn.{name}_proj" for name in "qkv"))
        self.output = made(f"{own}self_attn.o_proj")
        self.mlp_norm = take(f"{own}post_attention_layernorm.weight")
        self.gate_up = made(f"{own}mlp.gate_proj", f"{own}mlp.up_proj")
        self.down = made(f"{own}mlp.down_proj")
        self.norm = take("norm.weight")
        self.lm_head = made("lm_head")
        # The query heads of a group are rows of their KV head.
        kv_heads = layer.num_key_value_heads
        self._attention = Attention(cache, kv_heads, layer.num_attention_heads // kv_heads)
        # A row's keys and values are made of its own numbers: bits may depend on those beside it in two matrices.
        widths = (len(config.taps) * config.target_hidden_size, 2 * layer.hidden_size)
        tried = [(self.fuse.linear, widths[0], MANY), (self.qkv, widths[1], MANY)]
        self.odd = odd_matrices(tried, seeded_noise(self.dtype)) if cache.device.type == "cpu" else None
        cos, sin = rope_tables(layer, positions)
        self._cos = cos.to(device=cache.device, dtype=self.dtype)[:, None]  # [S, 1, D]
        self._sin = sin.to(device=cache.device, dtype=self.dtype)[:, None]

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        norms = (self.token_norm, self.state_norm, self.mlp_norm, self.norm)
        own = sum(each.bytes for each in self.linears if each is not self.fuse.linear)
        return own + self.fuse.bytes + sum(norm.nbytes for norm in norms)

    def run(
        self, tokens: torch.Tensor, states: torch.Tensor, parts: Sequence[Part], scored: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As of `HeadNetwork`."""
        config, layer, attention, kv = self.config, self.config.layer, self._attention, self._pool[0]
        alone = len(parts) == 1 and parts[0].rows <= self._alone
        plan = attention.alone(parts[0], fixed=False) if alone else attention.together(parts)
        n, eps, shape = len(tokens), layer.rms_norm_eps, (layer.hidden_size,)
        heads, kv_heads, dim = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        rotated, half, width = heads + kv_heads, dim // 2, heads * dim

        tokens_normed = F.rms_norm(tokens.to(self.dtype), shape, self.token_norm, eps)
        states_normed = F.rms_norm(states, shape, self.state_norm, eps)
        qkv = self.qkv(torch.cat((tokens_normed, states_normed), -1))
        qk = qkv[:, : rotated * dim].view(n, rotated, dim)
        swapped = torch.cat((qk[..., half:], qk[..., :half]), dim=-1)
        torch.addcmul(qk * self._cos[plan.stands], swapped, self._sin[plan.stands], out=qk)
        attention.write(kv, qkv[:, width:].view(n, 2 * kv_heads, dim), plan)
        attended = attention.attend(kv, qkv[:, :width], plan)
        x = (states_normed if config.norm_before_residual else states) + self.output(attended)
        gate, up = self.gate_up(F.rms_norm(x, shape, self.mlp_norm, eps)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        passed = self._normed(x) if config.norm_output else x
        return passed, self.logits(passed) if scored else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As of `HeadNetwork`."""
        return self.lm_head(hidden if self.config.norm_output else self._normed(hidden))

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.config.layer.rms_norm_eps)
