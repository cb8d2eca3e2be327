"""A greedy round with a draft head as one program: the rows verified last, K drafted tokens, and their verification.

The head computes the rows of the tokens that the last round has added, on the states that its verification left; from
the last of them it chains K tokens; the target verifies them and leaves its states for the next round. Which rows are
the text's, and where they stand, are inputs. The host writes those, reads the ids of both, and counts how many drafted
ids the target has too.
"""

from collections.abc import Sequence

import torch
import ttnn

from models.errors import UserError
from models.ttnn_llama.draft_head import TtnnHead
from models.ttnn_llama.modules.kept_states import Kept
from models.ttnn_llama.modules.rows import HeadInputs, RowInputs
from models.ttnn_llama.shapes import MAX_ROWS, padded_rows


class HeadRound:
    """Greedy rounds of up to K tokens drafted by a head, for the K that were prepared.

    Implements `models.speculative.model.FusedRounds`.
    """

    def __init__(self, head: TtnnHead) -> None:
        self.head, self.target, self.runner = head, head.target, head.runner
        self.draft_lengths: list[int] = []  # prepared, in rising order
        self.features: Kept | None = None
        self._inputs: dict[int, tuple[HeadInputs, RowInputs, RowInputs]] = {}  # by length: first, step, verify
        self._padding = ttnn.from_torch(
            torch.zeros(MAX_ROWS, 1, dtype=torch.int32),
            dtype=ttnn.uint32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=head.mesh_device,
            mesh_mapper=ttnn.ReplicateTensorToMesh(head.mesh_device),
        )

    def prepare(self, k: int) -> tuple:
        """Register the round of k drafted tokens, 1 <= k <= 31; returns its key."""
        if not 1 <= k < MAX_ROWS:
            raise UserError(f"{k} drafted tokens are outside 1..{MAX_ROWS - 1}: use --num-draft-tokens in that range")
        key = (id(self), "round", k)
        if k not in self.draft_lengths:
            rows = padded_rows(k + 1)
            inputs = self._inputs[k] = self.head.new_inputs(rows), self.head.new_step(), self.target.new_inputs(rows)
            self.runner.add(key, lambda: self._round(k, *inputs))
            self.draft_lengths = sorted([*self.draft_lengths, k])
        return key

    def key(self, k: int) -> tuple:
        """Key of the shortest prepared round that drafts at least k tokens."""
        return (id(self), "round", self._prepared(k))

    def run(self, tokens: Sequence[int], position: int, k: int) -> tuple[list[int], list[int], int]:
        """Compute the head's rows of the tokens after the states that it was given, draft k, verify them.

        tokens: the end of the sequence at position.., as many as its last round can have added. Returns (drafted ids
        [k], the target's ids [k + 1], accepted <= k); `features` are then the states of the k + 1 rows. Raises
        UserError where a cache has no room, or no round of so many tokens was prepared.
        """
        longest = self._prepared(k)
        first, step, verify = self._inputs[longest]
        end = position + len(tokens)
        context = min(self.target.max_seq_len, self.head.max_seq_len)
        if len(tokens) < 2 or position < 0 or end + k > context:
            raise UserError(
                f"{len(tokens)} tokens and {k} drafted ones at position {position} do not fit a fused round in the "
                f"context of {context}: draft fewer tokens or raise --max-seq-len"
            )
        start = self.head.pending(end)
        pending, start = self.head.read_early(tokens[start - position :], start, first.rows)
        self.head.fill_chain(first, step, pending, start)
        verify.fill([tokens[-1]] * (longest + 1), end - 1)
        self.head.kept.begin(prompt=False)
        numbers, verified = (self.target.read(part) for part in self.runner.run(self.key(k)))
        self.features = self.head.kept.latest()
        drafted, verified = self.head.ids_of(numbers[:k]), verified[: k + 1]
        accepted = next((i for i in range(k) if drafted[i] != verified[i]), k)
        return drafted, verified, accepted

    def _prepared(self, k: int) -> int:
        longest = self.draft_lengths[-1] if self.draft_lengths else 0
        if not 1 <= k <= longest:
            raise UserError(f"{k} drafted tokens are outside 1..{longest}, what this fused round was prepared for")
        return next(length for length in self.draft_lengths if length >= k)

    def _round(self, k: int, first: HeadInputs, step: RowInputs, verify: RowInputs) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        """Numbers [R - 1, 1] of the drafted tokens in the draft vocabulary, and the target's ids [1, R]."""
        head, target, rows = self.head, self.target, verify.rows
        pages = head.chain(first, step, k)
        if rows > k + 1:
            pages.append(ttnn.slice(self._padding, [0, 0], [rows - k - 1, 1]))
        numbers = ttnn.concat(pages, dim=0) if len(pages) > 1 else pages[0]
        last = ttnn.embedding(
            ttnn.slice(verify.ids, [0, 0], [1, 1]), target.embedding, layout=ttnn.ROW_MAJOR_LAYOUT
        )  # [1, 1, H]
        drafted = ttnn.embedding(numbers, head.draft_embedding, layout=ttnn.ROW_MAJOR_LAYOUT)  # [R - 1, 1, H]
        embedded = head.as_rows(ttnn.concat([last, drafted], dim=0))
        logits = target.decode(verify, target.plan(rows), embedded=embedded, states=head.kept)
        return numbers, target.head.argmax(logits)
