"""A draft head's weights in the layout that TT-NN runs fastest; see `tensors` for the terms.

Two matrices take what lies side by side, and are cut into one for each part. `fc`, three parts H x H, is whole on every
chip: it runs once a round, where sharing it would take a collective. The embeddings of the draft vocabulary are a copy
of rows of the target's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.ttnn_llama.shapes import TILE
from models.ttnn_llama.weights.precision import Precision
from models.ttnn_llama.weights.tensors import (
    Tensors,
    WeightSpec,
    _head_piece,
    _matrix,
    _norm,
    check_split,
    head_parts,
    interleave_pairs,
)

if TYPE_CHECKING:
    from models.llama.gguf_checkpoint import AnyCheckpoint

EMBEDDING = "model.embed_tokens.weight"  # of the target


def drafting_config(config: HeadConfig) -> LlamaConfig:
    """The head's layer as a Llama whose vocabulary is the draft's."""
    return dataclasses.replace(config.layer, vocab_size=config.draft_vocab_size)


def head_specs(config: HeadConfig, chips: int, precision: Precision) -> list[WeightSpec]:
    """All tensors of a head on ``chips`` chips, in the order of a forward.

    Names: "embedding" (of a reduced vocabulary), "fc_norm.{tap}", "fc.{tap}", "token_norm", "state_norm",
    "wqkv.{0,1}" (of the token, of the state), "wo", "mlp_norm", "w1", "w3", "w2", "norm", "head.{p}". Raises UserError
    if the head cannot be split over so many chips, is not as wide as its target's states, or has norm_before_fc.
    """
    layer = drafting_config(config)
    hidden, ffn = layer.hidden_size, layer.intermediate_size
    if config.norm_before_fc:
        raise UserError(
            "the head norms its target's states together before fc (norm_before_fc), a row too wide for the norm's "
            "kernel: use --device cpu, or a head without it"
        )
    if config.target_hidden_size != hidden:
        raise UserError(
            f"the head is {hidden} wide and its target's states {config.target_hidden_size}: boards run heads as wide "
            "as their target, use --device cpu"
        )
    try:
        check_split(layer, chips)
    except UserError as error:
        raise UserError(f"draft head: {error}") from None
    q_width, kv_width = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    own, taps = config.prefix, len(config.taps)

    def norm(name: str, source: str) -> WeightSpec:
        shape = (1, 1, hidden // TILE, TILE)
        return WeightSpec(name, "bf16", shape, None, "row_major", False, partial(_norm, f"{source}.weight", shape))

    def matrix(name: str, format: str, rows: int, columns: int, chip_dim: int, build) -> WeightSpec:
        return WeightSpec(name, format, (1, 1, rows, columns), chip_dim, "tile", True, build)

    specs: list[WeightSpec] = []
    if config.reduced:
        shape = (config.draft_vocab_size, hidden)
        specs.append(WeightSpec("embedding", "bf16", shape, None, "row_major", False, _draft_embedding))
    if config.fc_norm:
        specs += [norm(f"fc_norm.{i}", f"fc_norm.{i}") for i in range(taps)]
    # Whole on each chip: as many copies side by side, of which each chip gets one.
    specs += [
        matrix(f"fc.{i}", precision.attention, hidden, chips * hidden, 3, partial(_copies, "fc.weight", i, chips))
        for i in range(taps)
    ]
    specs += [norm("token_norm", f"{own}input_layernorm"), norm("state_norm", f"{own}hidden_norm")]
    specs += [
        matrix(
            f"wqkv.{i}",
            precision.attention,
            hidden,
            q_width + 2 * kv_width,
            3,
            partial(_qkv_part, f"{own}self_attn.", i, layer, chips),
        )
        for i in range(2)
    ]
    specs += [
        matrix("wo", precision.attention, q_width, hidden, 2, partial(_matrix, f"{own}self_attn.o_proj.weight")),
        norm("mlp_norm", f"{own}post_attention_layernorm"),
        matrix("w1", precision.gate_up, hidden, ffn, 3, partial(_matrix, f"{own}mlp.gate_proj.weight")),
        matrix("w3", precision.gate_up, hidden, ffn, 3, partial(_matrix, f"{own}mlp.up_proj.weight")),
        matrix("w2", precision.down, ffn, hidden, 2, partial(_matrix, f"{own}mlp.down_proj.weight")),
        norm("norm", "norm"),
    ]
    parts = head_parts(layer, chips)
    specs += [
        matrix(
            f"head.{part}",
            precision.head,
            hidden,
            layer.vocab_size // parts,
            3,
            partial(_head_piece, "lm_head.weight", chips, parts, part),
        )
        for part in range(parts)
    ]
    return specs


def _draft_embedding(tensors: Tensors) -> torch.Tensor:
    """Rows of the target's embedding, by number in the draft vocabulary."""
    return tensors[EMBEDDING][target_ids(tensors)]


def _copies(name: str, part: int, chips: int, tensors: Tensors) -> torch.Tensor:
    """[1, 1, H, n H]: of one part of the columns the transpose, once for each chip."""
    whole = tensors[name]
    width = whole.shape[0]
    return whole[:, part * width : (part + 1) * width].t().repeat(1, chips)[None, None]


def _qkv_part(prefix: str, part: int, config: LlamaConfig, chips: int, tensors: Tensors) -> torch.Tensor:
    """[1, 1, H, (Q + 2 KV) D] of one half of the inputs, in the order of `tensors._qkv`."""
    width = config.hidden_size
    q, k, v = (tensors[f"{prefix}{name}_proj.weight"][:, part * width : (part + 1) * width] for name in "qkv")
    q, k = interleave_pairs(q, config.head_dim), interleave_pairs(k, config.head_dim)
    shares = zip(q.chunk(chips), k.chunk(chips), v.chunk(chips), strict=True)
    return torch.cat([rows for share in shares for rows in share]).t()[None, None]


def target_ids(tensors: Tensors) -> torch.Tensor:
    """The target's id [V_d] for each number in a reduced draft vocabulary."""
    offsets = tensors["d2t"].long()
    return torch.arange(len(offsets)) + offsets


class HeadTensors(Mapping[str, torch.Tensor]):
    """A head's tensors and its target's embedding, by their names in files: what `CheckpointSource` reads.

    Raises UserError for a head with an embedding of its own, unless it is the target's.
    """

    def __init__(self, config: HeadConfig, head: Tensors, target: Tensors | AnyCheckpoint) -> None:
        self.config, self._head, self._target = config, head, target
        own = head.get("embed_tokens.weight")
        if own is not None and not torch.equal(own.float(), target[EMBEDDING].float()):
            raise UserError("the head has an embedding of its own: boards run heads that share their target's")

    @property
    def target_ids(self) -> torch.Tensor | None:
        """The target's id for each of the head's logits; None: they are the same."""
        return target_ids(self._head) if self.config.reduced else None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._target[name] if name == EMBEDDING else self._head[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._head, EMBEDDING))

    def __len__(self) -> int:
        return len(self._head) + 1

    def digest(self) -> str:
        """16 hex digits that identify the head's content, for the cache of converted weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self._head):
            tensor = self._head[name].contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
