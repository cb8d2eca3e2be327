"""One layer in torch, in fp32, from Hugging Face's names and in Hugging Face's order of the rotated pairs."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from models.llama.config import LlamaConfig, named_config
from models.llama.rope import inverse_frequencies

VOCAB = 2048


def one_layer(size: str, vocab_size: int = VOCAB) -> LlamaConfig:
    """A published Llama with one layer and a small vocabulary."""
    full = named_config(size)
    return replace(
        full,
        num_hidden_layers=1,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(),
    )


class Weights(dict):
    """Seeded tensors by their Hugging Face names, and the configuration that they are for.

    Matrices have variance 1/inputs, so that activations keep their scale; norm weights differ from one. A tensor is
    made when it is first asked for, and depends on its name alone.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self._shapes = config.tensor_shapes()

    def __missing__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        self[name] = (1 + 0.1 * noise if len(shape) == 1 else noise * shape[1] ** -0.5).bfloat16()
        return self[name]


def noise(rows: int, width: int, seed: int) -> torch.Tensor:
    """Seeded activations [rows, width] that bf16 holds exactly."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def keys_and_values(weights: Weights, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys and values [KV, n, D] of normed hidden states [n, H]."""
    config = weights.config
    k, v = (_heads(weights, x, name, config.num_key_value_heads) for name in "kv")
    return _rotated(k, positions, config), v


def attention(
    weights: Weights, x: torch.Tensor, positions: torch.Tensor | None = None, sees: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the first layer, output projection included: normed hidden states [n, H] -> [n, H].

    positions [n]: where rows stand (default: one behind the other). sees [n, n]: which rows a row sees (default: all
    before it, and itself).
    """
    config, n = weights.config, len(x)
    positions = torch.arange(n) if positions is None else positions
    sees = torch.ones(n, n, dtype=torch.bool).tril() if sees is None else sees
    group = config.num_attention_heads // config.num_key_value_heads
    q = _rotated(_heads(weights, x, "q", config.num_attention_heads), positions, config)
    k, v = (each.repeat_interleave(group, 0) for each in keys_and_values(weights, x, positions))
    scores = q @ k.transpose(1, 2) * config.head_dim**-0.5
    attended = scores.masked_fill(~sees, float("-inf")).softmax(-1) @ v  # [Q, n, D]
    return attended.transpose(0, 1).flatten(1) @ _matrix(weights, "o").t()


def _matrix(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return weights[f"model.layers.0.self_attn.{name}_proj.weight"].float()


def _heads(weights: Weights, x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
    """[heads, n, D]"""
    return (x @ _matrix(weights, name).t()).view(len(x), heads, -1).transpose(0, 1)


def _rotated(heads: torch.Tensor, positions: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    angles = torch.outer(positions.float(), inverse_frequencies(config))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin
