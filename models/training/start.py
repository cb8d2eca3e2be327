"""What a training begins with when it does not begin anew: the weights of a head that there is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.llama.config import LlamaConfig
from models.llama.head_checkpoint import EMBEDDING, HeadCheckpoint
from models.llama.head_config import HeadConfig

# Fields of a layer that decide nothing about its weights or its arithmetic.
_INDIFFERENT = {"dtype", "max_position_embeddings", "bos_token_id", "eos_token_ids", "tie_word_embeddings"}


@dataclass(frozen=True)
class FirstHead:
    """Weights to begin with.

    Args:
        name: for people. digest: of the files, so that a resumed training is known again.
        ids: [V] the target's ids of the draft vocabulary, in the file's order.
        weights: by file name, without d2t; fp32.
    """

    name: str
    digest: str
    ids: torch.Tensor
    weights: dict[str, torch.Tensor]


def open_first_head(path: str | Path, target: LlamaConfig, taps: tuple[int, ...] | None) -> HeadCheckpoint:
    """A head to begin with. taps: those that were asked for, None for the head's own. Raises UserError."""
    opened = HeadCheckpoint.open(path, target)
    if taps is not None and taps != opened.config.taps:
        raise UserError(
            f"--init-head {path} reads the target after layers {_listed(opened.config.taps)}, --taps says "
            f"{_listed(taps)}: leave --taps out"
        )
    return opened


def first_head(source: str | Path, opened: HeadCheckpoint, config: HeadConfig) -> FirstHead:
    """The weights of an opened head, for a training of heads of this shape.

    Raises:
        UserError: it has another shape, or an embedding of its own.
    """
    if opened.config.draft_vocab_size != config.draft_vocab_size:
        raise UserError(
            f"--init-head {source} drafts {opened.config.draft_vocab_size} ids, this training "
            f"{config.draft_vocab_size}: give --draft-vocab {opened.config.draft_vocab_size}"
        )
    its, ours = _shape(opened.config), _shape(config)
    for name in ours:
        if its[name] != ours[name]:
            raise UserError(
                f"--init-head {source} has {name} {its[name]}, heads that are trained for this target have "
                f"{ours[name]}: begin with one that was trained here, or anew without --init-head"
            )
    if EMBEDDING in opened:
        raise UserError(
            f"--init-head {source} has an embedding of its own, heads that are trained here read the target's: begin "
            "anew without --init-head"
        )
    ids = torch.arange(config.draft_vocab_size) if opened.target_ids is None else opened.target_ids
    weights = {name: opened[name].float() for name in config.tensor_shapes() if name != "d2t"}
    return FirstHead(Path(source).resolve().name, opened.digest(), ids, weights)


def _shape(config: HeadConfig) -> dict[str, Any]:
    """Everything that decides the arithmetic, by name."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "layer"}
    layer = {field.name: getattr(config.layer, field.name) for field in dataclasses.fields(config.layer)}
    return {name: value for name, value in (layer | own).items() if name not in _INDIFFERENT}


def _listed(taps: tuple[int, ...]) -> str:
    return ",".join(map(str, taps))
