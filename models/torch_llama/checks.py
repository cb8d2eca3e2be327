"""Where a model's numbers stop being finite: for the message of an error, after it has happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from models.errors import NotFinite

if TYPE_CHECKING:
    from models.torch_llama.model import TorchLlama


def check_finite(model: TorchLlama, tokens: Sequence[int]) -> None:
    """Compute a text again and look at the hidden states after every layer. Overwrites the model's cache.

    Args:
        model: one slot, which no text is using.
        tokens: read from position 0, in pieces: the states of a long prompt would take more memory than the model.

    Raises:
        NotFinite: naming the first layer after which a token's hidden state, or its logits, are not finite.
    """
    layers = len(model.layers)
    for start in range(0, len(tokens), model.max_rows):
        with model.tap(range(layers + 1)) as states:
            logits = model.forward(tokens[start : start + model.max_rows], start)
        finite = [bool(torch.isfinite(state).all()) for state in states]
        if all(finite) and torch.isfinite(logits).all():
            continue
        if all(finite):
            where = f"the output matrix (all {layers} layers are finite)"
        else:
            where = f"layer {finite.index(False)} of {layers}" if finite[0] else "the embedding"
        raise NotFinite(f"logits are not finite after {where}: {_remedy(model)}")


def _remedy(model: TorchLlama) -> str:
    if model.dtype == torch.float16:
        return "numbers too large for fp16, or damaged weights: use bf16 or fp32, or download the checkpoint again"
    return "the weights are damaged: download or convert the checkpoint again"
