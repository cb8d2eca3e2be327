"""What a forward of a TorchLlama consists of: bare matrix products, bare attention, and how many operations in all."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.torch_llama.model import KV_BLOCK, TorchLlama


def matmul_flops(model: TorchLlama, rows: int) -> int:
    """Floating-point operations of the matrix products of a forward that computes so many rows."""
    config = model.config
    layer = sum(out * into for out, into in _shapes(model).values())
    return 2 * rows * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)


def bare_matmuls(model: TorchLlama, rows: int) -> Callable[[], object]:
    """A function that runs the matrix products of a forward, one after the other, and nothing else."""
    inputs = {name: _noise(model, rows, into) for name, (_, into) in _shapes(model).items()}
    last = _noise(model, rows, model.config.hidden_size)

    def run() -> float:
        for layer in model.layers:
            for name, x in inputs.items():
                getattr(layer, name)(x)
        return model.lm_head(last)[0, 0].item()

    return run


def bare_attention(model: TorchLlama, rows: int, context: int) -> Callable[[], object]:
    """The same for attention over the cache, as a forward at that position calls it."""
    config, fold = model.config, model.fold
    kv_heads, dim, streams = config.num_key_value_heads, config.head_dim, config.num_attention_heads // fold
    length = -(-(context + rows) // KV_BLOCK) * KV_BLOCK
    queries = _noise(model, rows * fold * streams, dim).view(1, streams, rows * fold, dim)
    mask = torch.zeros(1, 1, rows * fold, length, dtype=model.dtype, device=model.device)

    def run() -> float:
        for layer in model.layers:
            cached = layer.kv[None, :, :length]  # [1, 2 KV, S, D]
            out = F.scaled_dot_product_attention(
                queries,
                cached[:, :kv_heads],
                cached[:, kv_heads:],
                attn_mask=mask,
                enable_gqa=streams != kv_heads,
            )
        return out[0, 0, 0, 0].item()

    return run


def count_operations(run: Callable[[], object]) -> int:
    """How many operations torch dispatches while `run` runs; views count too."""
    counter = _Counter()
    with counter:
        run()
    return counter.count


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _shapes(model: TorchLlama) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's matrices by the names they have in it."""
    config = model.config
    heads, hidden, ffn = config.num_attention_heads, config.hidden_size, config.intermediate_size
    width = (heads + 2 * config.num_key_value_heads) * config.head_dim
    return {
        "qkv": (width, hidden),
        "output": (hidden, heads * config.head_dim),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }


def _noise(model: TorchLlama, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator).to(device=model.device, dtype=model.dtype)
