"""What the user asked for: the command line with its defaults filled in, checked. Nothing heavy is imported here."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.arguments import (
    AUTO,
    AUTO_LONGEST,
    AUTO_LONGEST_FIXED,
    DRAFT_TOKENS,
    FREE_ROWS,
    MODEL_DRAFTERS,
    PRECISION,
    TREE_NODES,
    TREE_NODES_FIXED,
    build_parser,
)
from models.boards import PLACEMENTS
from models.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_TARGET = ROOT / "models" / "checkpoints" / "tiny-target"
EMBEDDED_DRAFT = ROOT / "models" / "checkpoints" / "tiny-draft"

# Flags that have a meaning on some devices only, and what to do about one of them on another device.
TORCH_FLAGS = {
    "dtype": "use --precision or leave it out",
    "draft_dtype": "use --draft-precision or leave it out",
    "row_invariant": "leave it out, on a board all rows are computed alike",
}
BOARD_FLAGS = ("precision", "draft_precision", "draft_placement", "trace", "weight_cache")
DRAFT_FLAGS = ("draft", "draft_dtype", "draft_precision", "draft_placement")  # of a draft model


@dataclass(frozen=True)
class Settings:
    """What the user asked for; one field per flag. ``draft`` is None when the embedded draft is to be tried."""

    mode: str
    target: str
    draft: str | None
    device: str
    dtype: str
    draft_dtype: str
    drafter: str
    num_draft_tokens: int | str  # or AUTO
    tree_nodes: int
    exit_layer: int | str  # or AUTO
    verification: str
    row_invariant: bool
    precision: str
    draft_precision: str
    draft_placement: str
    trace: bool
    weight_cache: bool
    max_seq_len: int | None
    prompts: str | None
    prompt: list[str] | None
    random_prompts: tuple[int, int] | None
    instruct: bool
    max_prompts: int | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    threads: int | None
    json: str | None
    html: str | None
    quiet: bool
    no_color: bool

    @property
    def auto(self) -> bool:
        """Whether the draft length is chosen while it runs."""
        return self.num_draft_tokens == AUTO

    @property
    def longest_draft(self) -> int:
        """Tokens that a round drafts at most, one after the other; of a tree, its levels."""
        chosen = AUTO_LONGEST_FIXED if self.row_invariant else AUTO_LONGEST
        longest = chosen if self.auto else self.num_draft_tokens
        return min(longest, self.tree_nodes) if self.drafter == "tree" else longest

    @property
    def verify_rows(self) -> int:
        """Rows that a verification has at most."""
        return 1 + (self.tree_nodes if self.drafter == "tree" and self.longest_draft else self.longest_draft)

    @property
    def drafts(self) -> bool:
        """Whether anything is to be drafted by anybody."""
        return "speculative" in self.paths and self.drafter != "none"

    @property
    def uses_draft_model(self) -> bool:
        """Whether a draft model is to be loaded."""
        return self.drafts and self.drafter in MODEL_DRAFTERS

    @property
    def fixed_rows(self) -> int | None:
        """Rows every target forward is padded to, so that a row's bits do not depend on how many rows are computed.

        Just enough for a verification. On a board nothing has to be padded: a tile has 32 rows anyway.
        """
        return self.verify_rows if self.row_invariant and self.device != "tt" else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The generation paths to run and to count, in the order of the report."""
        return ("baseline", "speculative") if self.mode == "compare" else (self.mode,)


def parse_settings(
    argv: Sequence[str] | None, mode: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings | None:
    """Settings from a command line, or None for --version. Raises UserError for anything wrong in it."""
    options = build_parser(mode, environ).parse_args(argv)
    if options.version:
        return None
    _check_prompts(options)
    _check_device_flags(options)
    _check_drafter(options)
    options.draft = options.draft or (environ.get("DRAFT_MODEL") if options.target else str(EMBEDDED_DRAFT)) or None
    options.target = options.target or str(EMBEDDED_TARGET)
    _fill_in_numbers(options)
    _fill_in_drafts(options)
    del options.version
    return Settings(**vars(options))


def _fill_in_numbers(options: argparse.Namespace) -> None:
    """Defaults of formats and of how a board is used."""
    options.dtype = options.dtype or "bf16"
    options.precision = options.precision or PRECISION
    options.draft_dtype = options.draft_dtype or options.dtype
    options.draft_precision = options.draft_precision or options.precision
    options.draft_placement = options.draft_placement or PLACEMENTS[0]
    options.trace = options.trace is not False
    options.weight_cache = options.weight_cache is not False


def _fill_in_drafts(options: argparse.Namespace) -> None:
    """Defaults of who drafts how much, and of the rows that are computed for it."""
    if options.num_draft_tokens is None:
        by_hand = options.verification == "sequential" or options.device == "tt"
        options.num_draft_tokens = 0 if options.drafter == "none" else DRAFT_TOKENS if by_hand else AUTO
    length = 0 if options.num_draft_tokens == AUTO else options.num_draft_tokens
    if options.row_invariant is None:
        asked = length if options.tree_nodes is None else options.tree_nodes
        options.row_invariant = options.device != "tt" and options.dtype != "fp32" and asked < FREE_ROWS
    if options.tree_nodes is None:
        options.tree_nodes = max(length, TREE_NODES_FIXED if options.row_invariant else TREE_NODES)
    options.exit_layer = options.exit_layer or AUTO


def _check_prompts(options: argparse.Namespace) -> None:
    """UserError for prompts of several kinds."""
    sources = [flag for flag in ("prompts", "prompt", "random_prompts") if getattr(options, flag)]
    if len(sources) > 1:
        flags = " and ".join("--" + flag.replace("_", "-") for flag in sources)
        raise UserError(f"{flags} were given together: give one kind of prompts")
    if options.instruct and options.random_prompts:
        raise UserError("--instruct has no meaning with --random-prompts: give one of them")


def _check_device_flags(options: argparse.Namespace) -> None:
    """UserError for a flag that has no meaning on the device."""
    on_board = options.device == "tt"
    given = [name for name in (TORCH_FLAGS if on_board else BOARD_FLAGS) if getattr(options, name) is not None]
    if given:
        flag = "--no-" * (getattr(options, given[0]) is False) or "--"
        flag += given[0].replace("_", "-")
        remedy = TORCH_FLAGS[given[0]] if on_board else "add --device tt or leave it out"
        raise UserError(f"{flag} has no meaning with --device {options.device}: {remedy}")


def _check_drafter(options: argparse.Namespace) -> None:
    """UserError for a way of drafting that the device or another flag rules out."""
    drafter, length = options.drafter, options.num_draft_tokens
    if options.device == "tt" and drafter == "early-exit" and options.exit_layer in (None, AUTO):
        raise UserError("a board prepares early exit for one layer: give it with --exit-layer, such as --exit-layer 4")
    if drafter == "none" and length:
        raise UserError(f"--num-draft-tokens {length} has no meaning with --drafter none: leave one of them out")
    if drafter not in MODEL_DRAFTERS:
        given = [name for name in DRAFT_FLAGS if getattr(options, name) is not None]
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise UserError(f"{flag} has no meaning with --drafter {drafter}: leave it out or use --drafter model")
    for flag, given, owner in (
        ("--tree-nodes", options.tree_nodes, "tree"),
        ("--exit-layer", options.exit_layer, "early-exit"),
    ):
        if given is not None and drafter != owner:
            raise UserError(f"{flag} has no meaning with --drafter {drafter}: leave it out or use --drafter {owner}")
    if drafter == "tree" and options.verification == "sequential":
        raise UserError("--drafter tree cannot be verified token by token: leave out --verification sequential")
    if length == AUTO and options.verification == "sequential":
        raise UserError(
            f"--num-draft-tokens {AUTO} chooses by what batched verification costs: with --verification sequential "
            f"give a number, such as {DRAFT_TOKENS}"
        )


def describe_source(source: str) -> str:
    """A checkpoint's name for people: embedded ones relative to the project, others as given."""
    path = Path(source)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else source
