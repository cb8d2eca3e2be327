"""Opening a model, and loading it for CPU or CUDA (a board takes both models at once: `ttnn_llama.pair`).

Two steps, so that everything cheap is checked before anything slow begins: `open_model` reads configuration and
tokenizer and checks the files, `load_model` puts the weights on the device.
"""

import time
from dataclasses import dataclass

import torch

from models.device import check_device
from models.errors import UserError
from models.llama.checkpoint import Checkpoint
from models.llama.tokenizer import LlamaTokenizer, check_pair
from models.torch_llama.model import TorchLlama

DEFAULT_CONTEXT = 2048
# Bytes of one weight and of one number in the KV cache.
VALUE_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 4)}


@dataclass(frozen=True)
class OpenedModel:
    """A checked checkpoint whose weights are not read yet. ``tokenizer`` is None when the directory has none."""

    source: str
    checkpoint: Checkpoint
    tokenizer: LlamaTokenizer | None
    seconds: float


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run; ``load_s`` is the time from opening the checkpoint to here, in seconds."""

    opened: OpenedModel
    model: TorchLlama
    dtype: str
    load_s: float


def open_model(source: str) -> OpenedModel:
    """Open a checkpoint directory or hub id. Raises UserError for whatever is wrong with its files."""
    start = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    has_tokenizer = (checkpoint.path / "tokenizer.json").exists()
    tokenizer = LlamaTokenizer.load(checkpoint.path) if has_tokenizer else None
    return OpenedModel(source, checkpoint, tokenizer, time.perf_counter() - start)


def load_model(
    opened: OpenedModel,
    *,
    device: str = "cpu",
    dtype: str = "bf16",
    max_seq_len: int | None = None,
    fixed_rows: int | None = None,
    typical_rows: int | None = None,
) -> LoadedModel:
    """Put a model's weights on ``device`` ("cpu" or "cuda"; boards are opened by `ttnn_llama.pair.BoardModels`).

    ``dtype`` is "bf16", "fp32", "fp16", or "int8" (8-bit matrices, the rest in fp32). ``max_seq_len`` is the context
    to reserve in tokens (default: `default_context`); ``fixed_rows`` pads every forward to that many rows,
    ``typical_rows`` says how many most forwards have (see `TorchLlama`). Raises UserError if the device is not there,
    or cannot hold the model.
    """
    if device == "tt":
        raise UserError("--device tt: only the demos run on a board, use --device cpu here")
    check_device(device)
    start = time.perf_counter()
    max_seq_len = max_seq_len or default_context(opened)
    try:
        model = TorchLlama.from_checkpoint(
            opened.checkpoint,
            device=device,
            dtype="fp32" if dtype == "int8" else dtype,
            max_seq_len=max_seq_len,
            fixed_rows=fixed_rows,
            typical_rows=typical_rows,
            quantize="int8" if dtype == "int8" else None,
        )
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for a full GPU, none for a full host
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not full:
            raise
        gigabytes = sum(estimate_bytes(opened, dtype, max_seq_len)) / 1e9
        raise UserError(
            f"{opened.source} needs {gigabytes:.1f} GB in {dtype} with a context of {max_seq_len} tokens, more than "
            f"{device} has free: lower --max-seq-len or choose a smaller model"
        ) from error
    return LoadedModel(opened, model, dtype, opened.seconds + time.perf_counter() - start)


def default_context(*models: OpenedModel) -> int:
    """The context that all of these models can hold, at most DEFAULT_CONTEXT tokens."""
    return min(DEFAULT_CONTEXT, *(opened.checkpoint.config.max_position_embeddings for opened in models))


def estimate_bytes(opened: OpenedModel, dtype: str, max_seq_len: int) -> tuple[int, int]:
    """Bytes of weights and of KV cache that loading will take, from the configuration alone."""
    config = opened.checkpoint.config
    weight, kv = VALUE_BYTES[dtype]
    kv_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * max_seq_len
    return config.parameter_count * weight, kv_values * kv


def check_opened_pair(target: OpenedModel, draft: OpenedModel) -> None:
    """UserError unless the draft's token ids mean what the target's do; without tokenizers, sizes and stop ids."""
    t, d = target.checkpoint.config, draft.checkpoint.config
    if target.tokenizer and draft.tokenizer:
        check_pair(target.tokenizer, draft.tokenizer, t, d)
    elif t.vocab_size != d.vocab_size:
        raise UserError(f"target vocab {t.vocab_size} != draft vocab {d.vocab_size}: the pair must share one tokenizer")
