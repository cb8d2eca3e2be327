"""Early exit on the device: the first layers of a model as its own draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from models.llama.config import check_exit_layer
from models.ttnn_llama.modules.decoder import Decoder

if TYPE_CHECKING:
    from models.ttnn_llama.model import TtnnLlama


class FirstLayers(Decoder):
    """The first layers of a `TtnnLlama` with its norm and head, in its cache: no weights and no memory of their own.

    Implements `LanguageModel` of one slot, `SequenceModel` and `Chains`.

    What they write there are the model's own keys and values. The model computes them again when it verifies: hidden
    states that a program left for another would save no bytes of weights, which is what a forward costs, since the
    token drafted last has yet to go through these layers, and rows beside it are free.

    Raises UserError for a number of layers that is not below the model's.
    """

    def __init__(self, model: TtnnLlama, count: int):
        check_exit_layer(count, len(model.layers))
        super().__init__(model._plans)
        self.layers = model.layers[:count]
        self.mesh_device, self.runner, self.layout, self.rope = (
            model.mesh_device,
            model.runner,
            model.layout,
            model.rope,
        )
        self.embedding, self.head = model.embedding, model.head
        self.vocab_size, self.max_seq_len = model.vocab_size, model.max_seq_len

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [V] after the last token, which alone is computed: the model has read all of them."""
        return self.forward(tokens[-1:], len(tokens) - 1)[-1]
