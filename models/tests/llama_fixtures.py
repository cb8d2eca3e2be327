"""Helpers for tests: tiny random Llamas, as tensors, as a checkpoint directory, and as Hugging Face's model."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.llama.config import LlamaConfig, RopeScaling

_TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_ids=(1,),
    dtype="float32",
)
_LARGER = ("q_proj.weight", "o_proj.weight", "down_proj.weight")


def tiny_config(**overrides: Any) -> LlamaConfig:
    """A two-layer Llama of vocabulary 128 in which rope scaling is active; any field can be overridden."""
    return dataclasses.replace(_TINY, **overrides)


def random_tensors(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Seeded weights in ``config.dtype``, Hugging Face names -> tensors (no lm_head when tied).

    Matrices have variance 1/inputs, so that activations keep their scale through any depth and logits a spread of
    about one. Three kinds are larger: queries, which sharpens attention so that positions matter, and the two
    outputs of a layer, so that context outweighs the token itself. Without that, greedy text soon repeats one
    token and hides errors. Norm weights differ from one.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        gain = 3.0 if name.endswith(_LARGER) else 1.0
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * gain * shape[1] ** -0.5
    return {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in tensors.items()}


def write_tiny_checkpoint(path: str | Path, config: LlamaConfig | None = None, seed: int = 0) -> Path:
    """Write random_tensors(config, seed) as a Hugging Face directory without a tokenizer; returns its path."""
    from models.llama.checkpoint import save_checkpoint

    config = tiny_config() if config is None else config
    save_checkpoint(path, config, random_tensors(config, seed))
    return Path(path)


def hf_model(config: LlamaConfig, tensors: Mapping[str, torch.Tensor]):
    """transformers' LlamaForCausalLM with the same weights: fp32, eval mode, sdpa attention."""
    import transformers

    hf_config = transformers.LlamaConfig(**config.to_dict(), attn_implementation="sdpa")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config)
    model.to_empty(device="cpu")
    # Rotary tables are no weights: to_empty has left them undefined.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    state = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.float().load_state_dict(state, strict=True)
    model.tie_weights()
    return model.eval()


# The special tokens of tiny tokenizers; their ids are 0, 1, 2, ... in this order, BOS and EOS as in tiny_config().
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Behaves like Llama 3.2's: always a system block, the date from date_string, else from the clock.
CHAT_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- set system = messages[0].content | trim if messages[0].role == "system" else "" %}
{%- set turns = messages[1:] if messages[0].role == "system" else messages %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in turns %}
{%- if message.role not in ("user", "assistant") %}{{ raise_exception("unknown role " + message.role) }}{% endif %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
"""
_CORPUS = [
    "def greet(name):\n    return f'Hello, {name}!'\n",
    "The quick brown fox jumps over the lazy dog. Llamas chew, llamas hum, llamas never hurry.",
    "Grüße aus Köln; naïve café; 你好，世界，你好；こんにちは世界 🙂🙃👩\u200d👩\u200d👧 🦙🦙",
] * 4


def write_tiny_tokenizer(
    path: str | Path, vocab_size: int = 400, chat_template: str | None = CHAT_TEMPLATE, corpus: list[str] | None = None
) -> Path:
    """Train a byte-level BPE and add its files to the directory ``path``, which is created; returns ``path``.

    At least 261 entries: 256 bytes and SPECIAL_TOKENS; fewer than ``vocab_size`` if the corpus has no more pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS if corpus is None else corpus, trainer)
    bos = SPECIAL_TOKENS[0]
    # Like Llama 3's: the tokenizer itself puts a BOS in front of any text.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": SPECIAL_TOKENS[1]}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
