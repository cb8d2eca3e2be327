"""How models run on a board, as a user asks for it. Importable where ttnn is not installed."""

from dataclasses import dataclass

from models.errors import UserError
from models.speculative.model import Workload
from models.ttnn_llama.shapes import MAX_ROWS, PREFILLS

# Lengths for a controller to choose from: with the token before them 2, 4, 8 and 16 rows, all of which are computed.
DRAFT_LENGTHS = (1, 3, 7, 15)


@dataclass(frozen=True)
class BoardOptions:
    """How models run on a board.

    precision, draft_precision: names in `precision.PRECISIONS`.
    placement: "shared", or "own-chip" for a draft on a chip of its own.
    attention_cores: that share one row and KV head in decode attention.
    prefill: "chunks", or "rows" where prompts are read by decode forwards.
    trace: replay captured programs, on a board that can (`Board.traces`).
    weight_cache: keep converted weights on disk.
    workload: what drafting asks the models for. exit_layer: how many first layers draft, where they do. tree_nodes:
    tokens of a tree at most, where drafts are trees.
    draft_lengths: how many tokens may be drafted in a round, one after the other; of a tree, its levels. None or
    zeros: nothing is drafted. More than one: whoever chooses among them may also choose to draft nothing for a while.
    greedy, batched: how the engine will decode and verify.
    slots: sequences that are written at once; more than one only where drafts are chains of a draft model, or copies.
    pool: positions of all of them together in the target's cache; None: the whole context for each.

    From workload on they decide the programs that are prepared. Raises UserError for what has no meaning.
    """

    precision: str = "performance"
    draft_precision: str = "performance"
    placement: str = "shared"
    attention_cores: int = 1
    prefill: str = PREFILLS[0]
    trace: bool = True
    weight_cache: bool = True
    workload: Workload = Workload()
    exit_layer: int | None = None
    tree_nodes: int | None = None
    draft_lengths: tuple[int, ...] = ()
    greedy: bool = True
    batched: bool = True
    slots: int = 1
    pool: int | None = None

    def __post_init__(self) -> None:
        for length in self.draft_lengths:
            if not 0 <= length < MAX_ROWS:
                raise UserError(
                    f"{length} drafted tokens are outside 1..{MAX_ROWS - 1}: use --num-draft-tokens in that range"
                )
        if not self.lengths:
            return
        self._check_slots()
        if self.workload.drafts_with == "first-layers" and self.exit_layer is None:
            raise UserError("a board prepares early exit for one layer: name it with --exit-layer")
        if self.workload.drafts_with == "head":
            self._check_head()
        if self.workload.tree and not 1 <= (self.tree_nodes or 0) < MAX_ROWS:
            raise UserError(f"a tree of {self.tree_nodes} tokens: give --tree-nodes from 1 to {MAX_ROWS - 1}")

    def _check_slots(self) -> None:
        refused = {"head": "a draft head", "first-layers": "early exit"}.get(self.workload.drafts_with)
        refused = "a tree" if self.workload.tree else refused
        if self.slots > 1 and refused:
            raise UserError(
                f"{self.slots} texts at once on a board cannot be drafted by {refused}: use a draft model with "
                "--drafter model, combined or prompt-lookup, or one slot"
            )

    def _check_head(self) -> None:
        for refused, words in (
            (self.workload.tree, "drafts chains: use --drafter head or combined, not tree"),
            (not self.batched, "needs batched verification: its target's states last for one forward"),
            (self.placement != "shared", "lies on its target's chips: use --draft-placement shared"),
            (self.prefill != "chunks", "reads prompts that prefill kernels have read: use --prefill chunks"),
        ):
            if refused:
                raise UserError(f"a draft head on a board {words}")

    @property
    def exits(self) -> int | None:
        """How many first layers of the target draft; None where they do not."""
        return self.exit_layer if self.workload.drafts_with == "first-layers" and self.lengths else None

    @property
    def lengths(self) -> list[int]:
        """The draft lengths in rising order, without 0; none where nothing drafts."""
        return sorted({length for length in self.draft_lengths if length})
