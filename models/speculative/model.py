"""What the engine asks of a network: the one interface that every target and every draft fulfils."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class LanguageModel(Protocol):
    """One network with its own KV cache on one device, addressed by absolute position.

    A call that is given n tokens and a position writes the cache at position .. position+n-1 and attends to
    everything before. Rollback needs no call: pass the position to go on from; what lies beyond it is stale, never
    attended to, and overwritten in time. V is the vocabulary, n a number of rows (tokens handed over at once).
    Logits may be of any floating type and lie on the model's device, whose work may still be under way.
    """

    vocab_size: int
    max_seq_len: int  # positions the cache has
    max_rows: int  # largest n of forward, greedy and draft_greedy

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Fill the cache from position 0 with at least one token, any number that fits: logits[V] of the last."""

    def forward(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> Tensor:
        """Logits[n, V]: row i follows tokens[i]. n = 1 is decoding, n = K+1 is verification, in one pass.

        parents makes it a tree, whose rows lie in the cache at position, position+1, .. while each stands one behind
        its parent: the row of every token's parent, -1 for row 0. Tokens are the last n rows; those before them are
        in the cache from earlier calls.
        """

    def greedy(self, tokens: Sequence[int], position: int, parents: Sequence[int] | None = None) -> list[int]:
        """The n ids of greatest logit, one for each row of `forward`; only ids leave the device."""

    def draft_greedy(self, tokens: Sequence[int], position: int, k: int) -> list[int]:
        """Feed m >= 1 tokens, then each id found in turn: the k >= 1 greedy ids that follow, by m + k-1 positions."""

    def keep(self, position: int, rows: Sequence[int]) -> int:
        """Of a tree at position, make these rows (one below the other, row 0 first) the sequence itself.

        Returns how many of them the cache now holds as such; the others have to be fed again.
        """

    def first_layers(self, count: int) -> "LanguageModel":
        """The model's first layers with its norm and head, as a model that drafts in this one's cache.

        What it writes there are this model's own keys and values. What it computed for tokens is not computed again
        when `forward` or `greedy` get them next. It has nothing to read at the start and no trees.
        """
