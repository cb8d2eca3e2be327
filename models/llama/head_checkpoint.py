"""Draft heads in files: a directory opened and checked, tensors read lazily; and writing one.

As of other checkpoints everything that can be wrong is found when a head is opened, and only safetensors is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.errors import UserError
from models.llama.checkpoint import StoredTensors, locate
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig
from models.llama.shards import INDEX, SINGLE, pickles_in, read_layout, what_else

_FLOATS = {"BF16", "F16", "F32"}
_INTEGERS = {"I64", "I32"}
EMBEDDING = "embed_tokens.weight"
# What files hold besides: the inverse of d2t, and copies of the target's that only training reads.
_HARMLESS = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; d = torch.load('{}', weights_only=True); "
    "s.save_file({{k: v.contiguous() for k, v in d.items()}}, 'model.safetensors')\""
)


class HeadCheckpoint(StoredTensors):
    """An opened, checked draft head: a mapping from the file's tensor names to tensors, read on access.

    Attributes:
        path: its directory. config: its shape.
        target_ids: the target's id [V_d] for each of the draft vocabulary; None: they are the same.
    """

    config: HeadConfig
    target_ids: torch.Tensor | None

    @classmethod
    def open(cls, path_or_hub_id: str | Path, target: LlamaConfig | None = None) -> HeadCheckpoint:
        """Open a head's directory, or download (or find in the cache) the hub id ``owner/name``.

        Args:
            path_or_hub_id: where it is.
            target: of the model that it shall draft for; None: whatever the head's file says.

        Raises:
            UserError: it is missing, pickled, damaged or incomplete, holds what no head has, or belongs to another
                target.
        """
        path = locate(path_or_hub_id)
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a draft head: it has no config.json{what_else(path)}")
        config = HeadConfig.from_json(path / "config.json", target)
        if target is not None:
            try:
                config.check_target(target)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        pickled = pickles_in(path)
        if pickled and not ((path / SINGLE).is_file() or (path / INDEX).is_file()):
            raise UserError(
                f"{path} holds a pickled head, {pickled[0]}: pickle can run code and is not read, convert it there, "
                f"once: {_CONVERT.format(pickled[0])}"
            )
        shards, files = read_layout(path)
        stored = {name: info for shard in shards for name, info in shard.tensors.items()}
        shapes = config.tensor_shapes()
        if "model.fc.weight" in stored:
            raise UserError(f"{path} names its tensors as NeMo does (model.fc.weight): rename them as SpecForge does")
        own = (config.layer.vocab_size, config.hidden_size)
        if config.hidden_size != config.target_hidden_size:
            shapes[EMBEDDING] = own
        for name, shape in shapes.items():
            if name not in stored:
                raise UserError(f"{path} lacks the tensor {name}, which its config.json asks for: is it complete?")
            if stored[name].shape != shape:
                raise UserError(
                    f"{name} in {files[name]} has shape {list(stored[name].shape)}, config.json says {list(shape)}: "
                    "these files are not of one head"
                )
            if stored[name].dtype not in (_INTEGERS if name == "d2t" else _FLOATS):
                wanted = "integers" if name == "d2t" else "bf16, fp16 or fp32"
                raise UserError(f"{name} in {files[name]} is stored as {stored[name].dtype}: it must be {wanted}")
        for name in stored:
            harmless = name in _HARMLESS or name.endswith("rotary_emb.inv_freq")
            if name == EMBEDDING and stored[name].shape == own:
                shapes[EMBEDDING] = own
            elif not harmless and name not in shapes and not (name == "d2t" and not config.reduced):
                raise UserError(f"{path} holds the tensor {name}, which a head of its config.json has not")
        kept = (*shapes, *(name for name in ("d2t", "t2d") if name in stored and name not in shapes))
        opened = cls(path, config, shards, {name: files[name] for name in kept})
        opened.target_ids = _target_ids(opened)
        return opened


def _target_ids(head: HeadCheckpoint) -> torch.Tensor | None:
    """Of d2t, which holds offsets. Raises UserError for what is no map from the draft vocabulary to the target's."""
    size, vocabulary = head.config.draft_vocab_size, head.config.layer.vocab_size
    ids = torch.arange(size)
    if "d2t" in head:
        ids = ids + head["d2t"].long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"d2t in {head.path} leads to ids {low} to {high}, the target's vocabulary is {vocabulary}: it must hold "
            "offsets, target id minus draft id"
        )
    if len(ids.unique()) < size:
        raise UserError(f"d2t in {head.path} leads to one id twice: the file is damaged")
    if "t2d" in head:
        reached = torch.zeros(vocabulary, dtype=torch.bool)
        reached[ids] = True
        known = head["t2d"]
        if known.shape != reached.shape or not torch.equal(known.bool(), reached):
            raise UserError(f"t2d in {head.path} contradicts d2t: the file is damaged")
    return ids if head.config.reduced else None


def save_head(path: Path, config: HeadConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a head's files into a directory, in the layout of its configuration; a file there is replaced whole.

    Args:
        path: the directory, made if it is missing.
        config: its shape.
        tensors: under the file's names; those of `config.tensor_shapes` and, if there is one, t2d.

    Raises:
        UserError: where nothing can be written.
        KeyError: a tensor that is not given.
    """
    names = (*config.tensor_shapes(), *(name for name in ("t2d",) if name in tensors))
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / ".model.partial"
        save_file({name: tensors[name].contiguous() for name in names}, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes it private
        os.replace(partial, path / SINGLE)
        (path / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
