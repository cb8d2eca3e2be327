"""Helpers for tests: tiny random draft heads for tiny random Llamas."""

import dataclasses
from pathlib import Path

import torch

from models.llama.config import LlamaConfig
from models.llama.head_checkpoint import save_head
from models.llama.head_config import HeadConfig
from models.torch_llama.draft_head import TorchHead


def head_config(target: LlamaConfig, draft_vocab: int | None = None, **options) -> HeadConfig:
    """A head for a target, reading it after its first and its last layer; any field can be overridden."""
    layer = dataclasses.replace(
        target, num_hidden_layers=1, rope_scaling=None, bos_token_id=None, eos_token_ids=(), tie_word_embeddings=False
    )
    chosen = {"taps": (1, target.num_hidden_layers), "target_hidden_size": target.hidden_size, **options}
    return HeadConfig(layer, draft_vocab or target.vocab_size, **chosen)


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
    save_head(path, config, random_head_tensors(config, 0))
    return path


def made_to_agree(
    target: LlamaConfig, tensors: dict[str, torch.Tensor], noise: float, seed: int = 7, **options
) -> tuple[dict[str, torch.Tensor], HeadConfig, dict[str, torch.Tensor]]:
    """(a target's tensors, a head's config, its tensors) that agree often: both go by the text's last token.

    The target's embeddings come from as many dimensions as a KV cache's row has, and its layers add little to them:
    noise times a random model's part. The head's values carry a token's embedding through attention that sees little
    but its own row, to the target's output matrix; states add noise.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, dim = target.hidden_size, target.head_dim
    heads, kv_heads = target.num_attention_heads, target.num_key_value_heads
    rank = min(kv_heads * dim, hidden)
    basis = torch.linalg.qr(torch.randn(hidden, rank, generator=generator)).Q.t()  # [rank, H], rows of length 1
    found = {
        name: noise * t if name.endswith(("o_proj.weight", "down_proj.weight")) else t for name, t in tensors.items()
    }
    found["model.embed_tokens.weight"] = torch.randn(target.vocab_size, rank, generator=generator) @ basis
    found["model.norm.weight"] = torch.ones(hidden)
    found = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in found.items()}
    config = head_config(target, norm_before_residual=True, **options)
    own = random_head_tensors(config, seed)
    prefix, group = config.prefix, heads // kv_heads
    token = torch.zeros(kv_heads * dim, 2 * hidden)
    token[:rank, :hidden] = basis
    back = torch.zeros(hidden, heads * dim)
    for head in range(heads):
        kept = basis[head // group * dim : (head // group + 1) * dim]  # of this head's share of the dimensions
        back[:, head * dim : head * dim + len(kept)] = kept.t() * 4 / group
    ids = torch.arange(config.draft_vocab_size)
    if config.reduced:
        ids = ids + own["d2t"]
    own |= {
        "fc.weight": 0.1 * noise * own["fc.weight"],
        f"{prefix}input_layernorm.weight": torch.ones(hidden),
        f"{prefix}hidden_norm.weight": torch.full((hidden,), 0.1),
        f"{prefix}self_attn.q_proj.weight": 1.5
        * token.view(kv_heads, dim, -1).repeat_interleave(group, 0).view(heads * dim, -1),
        f"{prefix}self_attn.k_proj.weight": 1.5 * token,
        f"{prefix}self_attn.v_proj.weight": token,
        f"{prefix}self_attn.o_proj.weight": back,
        f"{prefix}mlp.down_proj.weight": noise * own[f"{prefix}mlp.down_proj.weight"],
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": found["lm_head.weight"][ids],
    }
    own = {name: t if name == "d2t" else t.bfloat16().to(t.dtype) for name, t in own.items()}
    return found, config, own
