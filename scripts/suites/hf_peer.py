"""transformers on the same weights; those of a GGUF file, dequantised, are handed over as a temporary checkpoint."""

import dataclasses
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.llama.checkpoint import CheckpointWriter
from models.llama.gguf_checkpoint import AnyCheckpoint, GgufCheckpoint
from models.torch_llama.model import DTYPES
from scripts.suites.peer import (
    HF_ASSISTED,
    HF_DEFAULTS,
    HF_LOOKUP,
    HF_PLAIN,
    Peer,
    Written,
    check_memory,
    configs_of,
)

if TYPE_CHECKING:
    from scripts.suites.bench import Bench


def hf_peer(bench: "Bench", k: int) -> Peer:
    """generate(), assisted generation with k tokens and with its defaults, and prompt lookup. Settings of assisted
    generation are read from the assistant's generation_config."""
    settings = bench.settings
    check_memory("transformers", configs_of(bench, True), settings.dtype)
    target = load(bench.target.opened.checkpoint, settings.dtype, settings.device)

    def run(ids: list[int], **options: Any) -> Written:
        prompt = torch.tensor([ids], device=settings.device)
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=list(bench.stop_ids) or None,
            pad_token_id=0,
            use_cache=True,
            **options,
        )
        return Written(out[0, len(ids) :].tolist())

    ways = {HF_PLAIN: run}
    if bench.draft_model:
        same_k, defaults = (
            load(bench.draft_model.opened.checkpoint, settings.dtype, settings.device) for _ in range(2)
        )
        config = same_k.generation_config
        config.num_assistant_tokens = k
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        ways[HF_ASSISTED] = lambda ids: run(ids, assistant_model=same_k)
        ways[HF_DEFAULTS] = lambda ids: run(ids, assistant_model=defaults)
    ways[HF_LOOKUP] = lambda ids: run(ids, prompt_lookup_num_tokens=k)
    return Peer(f"transformers {metadata.version('transformers')}", settings.dtype, settings.dtype, ways)


def load(checkpoint: AnyCheckpoint, dtype: str, device: str) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.path
        if isinstance(checkpoint, GgufCheckpoint):
            path = Path(folder) / "model"
            write_dequantised(path, checkpoint, DTYPES[dtype])
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
        )
    return model.to(device).eval()


def write_dequantised(path: Path, checkpoint: GgufCheckpoint, dtype: torch.dtype) -> None:
    """Write a GGUF file's weights as a checkpoint directory."""
    config = dataclasses.replace(checkpoint.config, dtype=str(dtype).removeprefix("torch."))
    with CheckpointWriter(path, config) as writer:
        for name in checkpoint.names:
            writer.add(name, checkpoint[name].to(dtype))
