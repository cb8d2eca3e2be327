"""Early exit: the first layers of a model as its own draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from models.llama.config import check_exit_layer
from models.speculative.model import SlotBySlot
from models.torch_llama.choice import argmax

if TYPE_CHECKING:
    from models.torch_llama.model import Tokens, TorchLlama


class FirstLayers(SlotBySlot):
    """The first layers of a TorchLlama with its norm and head: a draft that needs no weights and no cache of its own.

    Implements `LanguageModel` of one slot, `SequenceModel` and `Chains`. What it writes into the cache are the model's
    own keys and values, and the hidden states it leaves are where the model goes on when it is given the same tokens
    next.

    Raises UserError for a number of layers that is not below the model's.
    """

    def __init__(self, model: TorchLlama, count: int) -> None:
        check_exit_layer(count, len(model.layers))
        self.model = model
        self.layers = count
        self.vocab_size, self.max_seq_len, self.max_rows = model.vocab_size, model.max_seq_len, model.max_rows
        self.start = 0  # position of the first token read
        self.ids: list[torch.Tensor] = []  # read from there on, in pieces [n]
        self.hidden: list[torch.Tensor] = []  # [n, H] of each, after the last of these layers

    def prefill(self, tokens: Tokens) -> torch.Tensor:
        """Logits [V] after the last token, which alone is computed: the model has read all of them."""
        return self.forward(tokens[-1:], len(tokens) - 1)[-1]

    @torch.inference_mode()
    def forward(self, tokens: Tokens, position: int) -> torch.Tensor:
        """As `TorchLlama.forward`, by these layers."""
        model = self.model
        ids = model._ids(tokens)
        n = len(ids)
        model._check(n, position)
        if model._early is not self or position != self.start + sum(map(len, self.ids)):
            self.start, self.ids, self.hidden = position, [], []
        model._early = None  # an interruption leaves rows of the cache that do not belong to what is kept here
        hidden = model._alone(ids, position, stop=self.layers)
        self.ids.append(ids)
        self.hidden.append(hidden[:n])
        model._early = self
        return model._head(hidden)[:n]

    def greedy(self, tokens: Tokens, position: int) -> list[int]:
        """The argmax ids [n] of `forward`."""
        return argmax(self.forward(tokens, position)).tolist()

    def draft_greedy(self, tokens: Tokens, position: int, k: int) -> list[int]:
        """k greedy ids after tokens, each fed in turn."""
        return chained_greedy(self.forward, tokens, position, k)

    def computed(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Hidden states [m, H] of the first m of ids [n] at a position: those that were computed last, if any."""
        if position != self.start:
            return self.hidden[0][:0]
        pairs = zip(ids.tolist(), torch.cat(self.ids).tolist(), strict=False)
        same = next((i for i, (new, old) in enumerate(pairs) if new != old), len(ids))
        return torch.cat(self.hidden)[:same]


@torch.inference_mode()
def chained_greedy(forward: Callable, tokens: Sequence[int] | torch.Tensor, position: int, k: int) -> list[int]:
    """k greedy ids that follow tokens at a position, each fed in turn; they stay on the device until all are there."""
    last = argmax(forward(tokens, position)[-1:])
    ids = [last]
    position += len(tokens)
    for step in range(k - 1):
        last = argmax(forward(last, position + step)[-1:])
        ids.append(last)
    return torch.cat(ids).tolist()
