"""What a forward takes beside weights and pages, at most, by the configurations alone: on CPU and CUDA.

At most is while a piece of a prompt is read, at the end of the longest context; a verification has fewer rows, and
logits for all of them. Where compiled layers run, what rows need is in buffers that all models share and that stay.
Each form has its numbers beside its code: `layers.rows_bytes`, and `compiled.network` for compiled layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.torch_llama.attention import fold_of, mask_bytes
from models.torch_llama.compiled import not_compiled
from models.torch_llama.layers import rows_bytes
from models.torch_llama.linear import sums_beside
from models.torch_llama.model import DTYPES, MAX_ROWS, PREFILL_CHUNK


@dataclass(frozen=True)
class WorkingSet:
    """Bytes that a model works with.

    Args:
        lasting: as long as the model is there: masks, and tables of angles.
        passing: of a forward, and what all models share.
    """

    lasting: int
    passing: int

    @property
    def bytes(self) -> int:
        """Of this model alone."""
        return self.lasting + self.passing

    def beside(self, other: WorkingSet) -> WorkingSet:
        """Of two models that run one after the other."""
        return WorkingSet(self.lasting + other.lasting, max(self.passing, other.passing))


@dataclass(frozen=True)
class Form:
    """How models run.

    Args:
        device: where.
        compiled: layers are, where a model's can be.
        threads: of torch; None: those it has.
    """

    device: str = "cpu"
    compiled: bool = False
    threads: int | None = None

    def compiles(self, config: LlamaConfig | HeadConfig) -> bool:
        """Whether a model, or a head, is compiled."""
        layers = config.layer if isinstance(config, HeadConfig) else config
        return self.compiled and not not_compiled(layers, torch.device(self.device))


def working_set(config: LlamaConfig | HeadConfig, dtype: str, max_seq_len: int, form: Form) -> WorkingSet:
    """Of a model, or a head, with texts of so many positions.

    Args:
        config: its sizes.
        dtype: that it computes in, as of `loading.load_model`.
        max_seq_len: positions of a text.
        form: how it runs.
    """
    if isinstance(config, HeadConfig):
        return _of_head(config, dtype, max_seq_len, form)
    positions, computed = max_seq_len + MAX_ROWS, torch.float32 if dtype == "int8" else DTYPES[dtype]
    rows = min(PREFILL_CHUNK, max_seq_len)
    few = min(MAX_ROWS, max_seq_len)
    if form.compiles(config):
        from models.torch_llama.compiled import network

        buffers = network.buffer_bytes(config, rows, positions, form.threads or torch.get_num_threads())
        taken = max(network.rows_bytes(config, rows), network.rows_bytes(config, few) + 4 * few * config.vocab_size)
        return WorkingSet(network.table_bytes(config, positions), buffers + taken)
    size, wide = computed.itemsize, form.device == "cpu" and sums_beside(computed)
    lasting = mask_bytes(fold_of(config), positions, size) + 2 * positions * config.head_dim * size
    logits = few * config.vocab_size * (size + 4 * wide)
    return WorkingSet(lasting, max(rows_bytes(config, size, rows, wide), rows_bytes(config, size, few, wide) + logits))


def _of_head(config: HeadConfig, dtype: str, max_seq_len: int, form: Form) -> WorkingSet:
    """The target's states of a whole prompt are there in pieces, by layers and side by side before it has read them."""
    layer, width = config.layer, len(config.taps) * config.target_hidden_size
    positions, rows = max_seq_len + MAX_ROWS, min(PREFILL_CHUNK, max_seq_len)
    if form.compiles(config):
        from models.torch_llama.compiled import network

        buffers = network.buffer_bytes(layer, rows, positions, form.threads or torch.get_num_threads())
        states = 3 * max_seq_len * width * torch.float32.itemsize
        return WorkingSet(network.table_bytes(layer, positions), buffers + network.rows_bytes(layer, rows) + states)
    computed = torch.float32 if dtype == "int8" else DTYPES[dtype]
    size, wide = computed.itemsize, form.device == "cpu" and sums_beside(computed)
    group = layer.num_attention_heads // layer.num_key_value_heads
    lasting = mask_bytes(group, positions, size) + 2 * positions * layer.head_dim * size
    return WorkingSet(lasting, 3 * max_seq_len * width * size + rows_bytes(layer, size, rows, wide))
