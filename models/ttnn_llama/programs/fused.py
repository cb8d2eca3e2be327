"""A whole greedy round on the device: K drafted tokens and their verification.

Draft and target share a mesh; the draft may be the target's own first layers. The drafted ids go from the draft's
argmax into the target's embedding without the host, which writes two tokens and a position, reads the ids of both,
and counts how many drafted ids the target has too.
"""

from collections.abc import Sequence

import torch
import ttnn

from models.errors import UserError
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.modules.rows import RowInputs
from models.ttnn_llama.shapes import MAX_ROWS, padded_rows


class FusedRound:
    """Greedy rounds of up to K drafted tokens, for the K that were prepared.

    Args:
        target, draft: models on the same mesh, with the same vocabulary and the same runner; or a model and its
            `first_layers`.

    Raises:
        UserError: models on different meshes, or of different vocabularies.
    """

    def __init__(self, target: TtnnLlama, draft: Decoder) -> None:
        if target.mesh_device is not draft.mesh_device or target.runner is not draft.runner:
            raise UserError("a fused round needs target and draft on one mesh: use --draft-placement shared")
        if target.vocab_size != draft.vocab_size:
            raise UserError(
                f"target vocab {target.vocab_size} != draft vocab {draft.vocab_size}: the pair must share one tokenizer"
            )
        self.target = target
        self.draft = draft
        self.runner = target.runner
        self.draft_lengths: list[int] = []  # prepared, in rising order
        self.features = None  # nobody reads hidden states
        self._inputs: dict[int, tuple[RowInputs, RowInputs, RowInputs]] = {}  # by length: first, step, verify
        mapper = ttnn.ReplicateTensorToMesh(target.mesh_device)
        self._padding = ttnn.from_torch(
            torch.zeros(MAX_ROWS, 1, dtype=torch.int32),
            dtype=ttnn.uint32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=target.mesh_device,
            mesh_mapper=mapper,
        )

    @property
    def max_draft(self) -> int:
        """The longest draft prepared; 0 before any was."""
        return self.draft_lengths[-1] if self.draft_lengths else 0

    def prepare(self, k: int) -> tuple:
        """Register the round of k drafted tokens, 1 <= k <= 31; returns its key."""
        if not 1 <= k < MAX_ROWS:
            raise UserError(f"{k} drafted tokens are outside 1..{MAX_ROWS - 1}: use --num-draft-tokens in that range")
        key = (id(self), "round", k)
        if k not in self.draft_lengths:
            first, step = self.draft.new_inputs(2), self.draft.new_inputs(1)
            verify = self.target.new_inputs(padded_rows(k + 1))
            self._inputs[k] = (first, step, verify)
            self.runner.add(key, lambda: self._round(k, first, step, verify))
            self.draft_lengths = sorted([*self.draft_lengths, k])
        return key

    def key(self, k: int) -> tuple:
        """Key of the shortest prepared round that drafts at least k tokens."""
        return (id(self), "round", self._prepared(k))

    def run(self, tokens: Sequence[int], position: int, k: int) -> tuple[list[int], list[int], int]:
        """Draft k tokens after the last two of the sequence and verify them.

        tokens: its end at position.., of which the last two ids are fed; the draft's cache holds all before them, the
        target's all before the last. Returns (drafted ids [k], the target's ids [k + 1], accepted <= k). Both caches
        then hold the drafted tokens too, except the draft's the last. Raises UserError where one of the caches has no
        room, or no round of so many tokens was prepared.
        """
        longest = self._prepared(k)
        first, step, verify = self._inputs[longest]
        context = min(self.target.max_seq_len, self.draft.max_seq_len + 1)  # the draft does not write the last one
        if len(tokens) < 2 or position < 0 or position + len(tokens) + k > context:
            raise UserError(
                f"{len(tokens)} tokens and {k} drafted ones at position {position} do not fit a fused round in the "
                f"context of {context}: draft fewer tokens or raise --max-seq-len"
            )
        tokens, position = tokens[-2:], position + len(tokens) - 2
        first.fill(tokens, position)
        step.place(position + 2)
        verify.fill([tokens[-1]] * (longest + 1), position + 1)
        ids, verified = (self.target.read(part) for part in self.runner.run(self.key(k)))
        drafted, verified = ids[1 : k + 1], verified[: k + 1]
        accepted = next((i for i in range(k) if drafted[i] != verified[i]), k)
        return drafted, verified, accepted

    def _prepared(self, k: int) -> int:
        if not 1 <= k <= self.max_draft:
            raise UserError(
                f"{k} drafted tokens are outside 1..{self.max_draft}, what this fused round was prepared for"
            )
        return next(length for length in self.draft_lengths if length >= k)

    def _round(self, k: int, first: RowInputs, step: RowInputs, verify: RowInputs) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        """Ids [R, 1] of the R >= k + 1 rows that are verified, the last token first and then the drafted ones, and the
        target's ids [1, R] after them."""
        drafted = self.draft.chain(first, step, 2, k)
        rows = verify.rows
        parts = [ttnn.slice(first.ids, [0, 1], [1, 2]), *drafted]
        if rows > k + 1:
            parts.append(ttnn.slice(self._padding, [0, 0], [rows - k - 1, 1]))
        ids = ttnn.concat(parts, dim=0)
        return ids, self.target.head.argmax(self.target.decode(verify, self.target.plan(rows), ids))
