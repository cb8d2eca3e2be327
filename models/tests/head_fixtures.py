"""Helpers for tests: tiny random draft heads for tiny random Llamas."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.torch_llama.draft_head import TorchHead


def head_config(target: LlamaConfig, draft_vocab: int | None = None, **options) -> HeadConfig:
    """A head for a target, reading it after its first and its last layer; any field can be overridden."""
    layer = dataclasses.replace(
        target, num_hidden_layers=1, rope_scaling=None, bos_token_id=None, eos_token_ids=(), tie_word_embeddings=False
    )
    chosen = {"taps": (1, target.num_hidden_layers), **options}
    return HeadConfig(layer, draft_vocab or target.vocab_size, target.hidden_size, **chosen)


def random_head_tensors(config: HeadConfig, seed: int) -> dict[str, torch.Tensor]:
    """Seeded weights under a file's names, scaled as `random_tensors` scales a target's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if name == "d2t":
            ids = torch.randperm(config.layer.vocab_size, generator=generator)[: shape[0]].sort().values
            tensors[name] = ids - torch.arange(shape[0])
            continue
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * shape[1] ** -0.5
    return tensors


def build_head(config: HeadConfig, target, seed: int = 0, **options) -> TorchHead:
    """A random head for a loaded target."""
    chosen = {"dtype": "fp32", "max_seq_len": target.max_seq_len, **options}
    return TorchHead(config, random_head_tensors(config, seed), target.embedding, **chosen)


def write_head(path: Path, target: Path, draft_vocab: int = 60) -> Path:
    """A directory with a random draft head for a target's, which reads it after its first and its last layer."""
    config = head_config(LlamaConfig.from_json(target / "config.json"), draft_vocab)
    path.mkdir()
    save_file(random_head_tensors(config, 0), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return path
