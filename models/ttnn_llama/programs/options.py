"""How models run on a board, as a user asks for it. Importable where ttnn is not installed."""

from dataclasses import dataclass

from models.errors import UserError
from models.ttnn_llama.shapes import MAX_ROWS

# What drafts. "model", "combined" and "tree" need a draft model, "early-exit" takes the target's first layers.
DRAFTERS = ("model", "prompt-lookup", "combined", "early-exit", "tree", "none")
# Lengths for a controller to choose from: with the token before them 2, 4, 8 and 16 rows, all of which are computed.
DRAFT_LENGTHS = (1, 3, 7, 15)


@dataclass(frozen=True)
class BoardOptions:
    """How models run on a board.

    precision, draft_precision: names in `precision.PRECISIONS`.
    placement: "shared", or "own-chip" for a draft on a chip of its own.
    trace: replay captured programs; never on mock boards, which cannot.
    weight_cache: keep converted weights on disk.
    drafter: one of DRAFTERS. exit_layer: of "early-exit". tree_nodes: tokens of a tree at most, of "tree".
    draft_lengths: how many tokens may be drafted in a round, one after the other; of a tree, its levels. None or
    zeros: nothing is drafted. More than one: whoever chooses among them may also choose to draft nothing for a while.
    greedy, batched: how the engine will decode and verify.

    The last two lines decide the programs that are prepared. Raises UserError for what has no meaning.
    """

    precision: str = "performance"
    draft_precision: str = "performance"
    placement: str = "shared"
    trace: bool = True
    weight_cache: bool = True
    drafter: str = "model"
    exit_layer: int | None = None
    tree_nodes: int | None = None
    draft_lengths: tuple[int, ...] = (4,)
    greedy: bool = True
    batched: bool = True

    def __post_init__(self):
        if self.drafter not in DRAFTERS:
            raise UserError(f"drafter {self.drafter!r}: choose one of {', '.join(DRAFTERS)}")
        for length in self.draft_lengths:
            if not 0 <= length < MAX_ROWS:
                raise UserError(
                    f"{length} drafted tokens are outside 1..{MAX_ROWS - 1}: use --num-draft-tokens in that range"
                )
        if self.drafter == "early-exit" and self.exit_layer is None:
            raise UserError("a board prepares early exit for one layer: name it with --exit-layer")
        if self.drafter == "tree" and not 1 <= (self.tree_nodes or 0) < MAX_ROWS:
            raise UserError(f"a tree of {self.tree_nodes} tokens: give --tree-nodes from 1 to {MAX_ROWS - 1}")

    @property
    def lengths(self) -> list[int]:
        """The draft lengths in rising order, without 0; none where nothing drafts."""
        return [] if self.drafter == "none" else sorted({length for length in self.draft_lengths if length})
