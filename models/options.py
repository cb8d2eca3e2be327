"""What a user may choose, with all rules of the product: validated dataclasses. Quick to import.

`EngineOptions` says which models run where, and how they draft. A field that is None is filled in by `resolved`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.boards import PLACEMENTS
from models.errors import OptionError, UserError
from models.speculative.drafters import MAX_DRAFT_LENGTH
from models.speculative.drafters.forced import check_forced
from models.speculative.drafters.registry import FORCED, NONE, DrafterSpec, drafts_trees, spec_of
from models.ttnn_llama.shapes import MAX_ATTENTION_CORES, PREFILLS
from models.ttnn_llama.weights.precision import PRECISION, PRECISIONS

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
# Models that have a name: (target, the draft model that belongs to it).
NAMED = {"tiny": (CHECKPOINTS / "tiny-target", CHECKPOINTS / "tiny-draft")}
# Draft heads by the name of their target.
HEADS = {"tiny": CHECKPOINTS / "tiny-head", "smollm2": CHECKPOINTS / "smollm2-head"}
DEFAULT_TARGET = "tiny"
EMBEDDED_DRAFT = str(NAMED[DEFAULT_TARGET][1])

DEVICES = ("cpu", "cuda", "tt")
DTYPES = ("bf16", "fp32", "fp16", "int8")
VERIFICATIONS = ("batched", "sequential")

AUTO = "auto"  # by what was measured: tokens to draft, from none to the longest; layers to leave early after
# A padded decode of so many rows costs what one row does, within 5 % (bf16; 12 rows 1.12x; scripts/benchmark.py
# verify-cost measures it).
FREE_ROWS = 7
FREE = tuple(range(1, FREE_ROWS + 1))
LEAST_FREE_ROWS = 4  # fewer are not worth padding for: a verification of 3 drafted tokens has 4 rows
AUTO_LONGEST = 15  # where rows are computed as they come
AUTO_LONGEST_FIXED = FREE_ROWS - 1  # where every forward computes all rows that the longest draft needs
DRAFT_TOKENS = 4
TREE_NODES = 15
MAX_THREADS = 1024  # more than any machine has use for; torch would try to start them all
MAX_SLOTS = 1024

# Options that have a meaning on some devices only, and what to do about one of them on another device.
TORCH_OPTIONS = {
    "dtype": "use [precision] or leave it out",
    "draft_dtype": "use [draft_precision] or leave it out",
    "compiled": "leave it out, a board runs programs of its own",
    "row_invariant": "leave it out, on a board all rows are computed alike",
    "free_rows": "leave it out, on a board all rows are computed alike",
    "rows_alike": "leave it out, on a board all rows are computed alike",
}
BOARD_OPTIONS = (
    *("precision", "draft_precision", "draft_placement"),
    *("attention_cores", "prefill", "trace", "weight_cache"),
)
DRAFT_MODEL_OPTIONS = ("draft", "draft_dtype", "draft_precision", "draft_placement")


@dataclass(frozen=True)
class EngineOptions:
    """Which models run where, and how they draft.

    Args:
        target: a checkpoint directory, a Hugging Face id, or a name of `NAMED`.
        draft: the same for the draft model, or a draft head: its files say which it is. None: the one that belongs to
            a named target, else the embedded one if it fits.
        device: "cpu", "cuda" or "tt", a Tenstorrent board.
        max_seq_len: positions to reserve, in tokens (default: the models' own, at most 2048).
        threads: CPU threads of torch, which on a board converts weights and draws samples (default: torch's own).
        slots: texts that may be under way at once.
        pool_size: positions of the target's KV cache, of all texts together, at least max_seq_len
            (default: slots times max_seq_len, or on CPU and CUDA what the memory that is free holds, if that is less).
        dtype, draft_dtype: "bf16" (default), "fp32", "fp16", or "int8" on CPU: 8-bit matrices; of the draft by default
            the target's, and int8 beside a compiled target in bf16 or fp16.
        compiled: run the layers of models on a CPU as machine code of this project's own, in which every row has the
            same bits in any company (default: where that is faster than torch, timed once,
            `torch_llama.compiled.choice`).
        row_invariant: compute every row of the target in a way that does not depend on the rows beside it, so that
            greedy text is the same bit for bit with and without speculation (default: where that costs plain decoding
            nothing).
        rows_alike: whether this machine gives a row the same bits among any number of others, so that nothing has to be
            padded for that (default: tried once on a CPU, `torch_llama.calibration`).
        free_rows: where rows are not alike, the numbers of rows to which all forwards may be padded; the largest also
            says how long drafts may be where `num_draft_tokens` is "auto" (default: measured with it).
        precision, draft_precision: number formats on a board, a name in `precision.PRECISIONS` (default: by the
            target's size, `precision.default_precision`; of the draft: precision, if given, else "performance").
        draft_placement: "shared" or "own-chip", on a board.
        attention_cores: cores of a board that share one row and KV head in decode attention, 1 (default) to 16: more
            are faster at long contexts.
        prefill: of prompts on a board: "chunks" (default), or "rows", by decode forwards of 32 tokens.
        trace: replay captured programs on a board. weight_cache: keep converted weights on disk.
        drafter: who drafts, a name in `drafters.registry` (default: "combined" where there is a draft model, "model" on
            a board, else "prompt-lookup").
        num_draft_tokens: tokens drafted a round, of a tree its levels: 0 to 31, or "auto" (default; 4 on a board and
            with sequential verification).
        tree_nodes: tokens of a tree at most, 1 to 31.
        exit_layer: layers of the target that draft, or "auto" (default), for early exit.
        force_acceptance: of the drafter "forced", for measurements: the chance of each drafted token to be right, or
            the right tokens of each round in turn.
        verification: "batched" (default), or "sequential" for one token a forward.
        greedy: whether a board prepares programs for greedy texts or for sampled ones; the others run too, slower.
        reuse: whether a text takes over what another one, whose prompt began alike, has left in a cache that keeps it.
        speculative: False loads nothing that drafts; rows are computed as if something did.

    Raises:
        UserError: for what has no meaning.
    """

    target: str = DEFAULT_TARGET
    draft: str | None = None
    device: str = "cpu"
    max_seq_len: int | None = None
    threads: int | None = None
    slots: int = 1
    pool_size: int | None = None
    dtype: str | None = None
    draft_dtype: str | None = None
    compiled: bool | None = None
    row_invariant: bool | None = None
    free_rows: tuple[int, ...] | None = None
    rows_alike: bool | None = None
    precision: str | None = None
    draft_precision: str | None = None
    draft_placement: str | None = None
    attention_cores: int | None = None
    prefill: str | None = None
    trace: bool | None = None
    weight_cache: bool | None = None
    drafter: str | None = None
    num_draft_tokens: int | str | None = None
    tree_nodes: int | None = None
    exit_layer: int | str | None = None
    force_acceptance: float | tuple[int, ...] | None = None
    verification: str = "batched"
    greedy: bool = True
    reuse: bool = True
    speculative: bool = True

    def __post_init__(self) -> None:
        self._check_values()
        self._check_device()
        self._check_drafter()

    # -------------------------------------------------------------------------------------------------- defaults
    def resolved(self, drafter: str, precision: str = PRECISION) -> ResolvedOptions:
        """With every default filled in; `drafter` is who drafts, `precision` the target's, where that is left open."""
        chosen = self.drafter or drafter
        length = self.num_draft_tokens
        if length is None:
            by_hand = self.verification == "sequential" or self.device == "tt"
            length = 0 if chosen == NONE else DRAFT_TOKENS if by_hand else AUTO
        longest = 0 if length == AUTO else int(length)
        dtype = self.dtype or "bf16"
        compiled = bool(self.compiled)
        row_invariant = True if compiled else self.row_invariant
        rows_alike = compiled or self.rows_alike
        free = self.free_rows or FREE
        if row_invariant is None:
            asked = longest if self.tree_nodes is None else self.tree_nodes
            needed = LEAST_FREE_ROWS if length == AUTO and not self.tree_nodes else asked + 1
            possible = bool(rows_alike) or needed <= max(free)
            row_invariant = self.device != "tt" and dtype != "fp32" and possible
        elif max(free) < LEAST_FREE_ROWS:  # asked for whatever it costs
            free = FREE
        padded = row_invariant and not rows_alike
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)}
        return dataclasses.replace(
            ResolvedOptions(**given),
            dtype=dtype,
            draft_dtype=self.draft_dtype or dtype,
            compiled=compiled,
            row_invariant=row_invariant,
            rows_alike=rows_alike,
            free_rows=free,
            precision=self.precision or precision,
            draft_precision=self.draft_precision or self.precision or PRECISION,
            draft_placement=self.draft_placement or PLACEMENTS[0],
            attention_cores=self.attention_cores or 1,
            prefill=self.prefill or PREFILLS[0],
            trace=self.trace is not False,
            weight_cache=self.weight_cache is not False,
            drafter=chosen,
            num_draft_tokens=length,
            tree_nodes=self.tree_nodes or max(longest, max(free) - 1 if padded else TREE_NODES),
            exit_layer=self.exit_layer or AUTO,
        )

    # ------------------------------------------------------------------- what follows from options that are resolved
    @property
    def spec(self) -> DrafterSpec | None:
        """The drafter's row in the registry; None for plain decoding."""
        return None if self.drafter in (None, NONE) or not self.speculative else spec_of(self.drafter)

    @property
    def auto(self) -> bool:
        """Whether the draft length is chosen while it runs."""
        return self.num_draft_tokens == AUTO

    @property
    def longest_draft(self) -> int:
        """Tokens that a round drafts at most, one after the other; of a tree, its levels."""
        padded = self.row_invariant and not self.rows_alike
        chosen = max(self.free_rows or FREE) - 1 if padded else AUTO_LONGEST
        longest = chosen if self.auto else int(self.num_draft_tokens or 0)
        return min(longest, self.tree_nodes or longest) if self._is_tree else longest

    @property
    def verify_rows(self) -> int:
        """Rows that a verification has at most."""
        longest = self.longest_draft
        return 1 + (self.tree_nodes if longest and self._is_tree and self.tree_nodes else longest)

    @property
    def fixed_rows(self) -> int | None:
        """Rows every target forward is padded to, so that a row's bits do not depend on how many rows are computed.

        Enough for a verification, and of such numbers the smallest that is free. Nothing has to be padded so where rows
        are alike, nor on a board: a tile has 32 rows anyway.
        """
        if not self.row_invariant or self.rows_alike or self.device == "tt":
            return None
        needed = self.verify_rows
        return min((rows for rows in self.free_rows or FREE if rows >= needed), default=needed)

    @property
    def drafts(self) -> bool:
        """Whether anything is to be drafted by anybody."""
        return self.spec is not None

    @property
    def uses_draft_model(self) -> bool:
        """Whether a draft model is to be loaded."""
        return self.spec is not None and self.spec.needs_draft_model

    @property
    def drafter_settings(self) -> dict[str, Any]:
        """The drafter's own options."""
        return {name: getattr(self, name) for name in self.spec.settings} if self.spec else {}

    @property
    def _is_tree(self) -> bool:
        return self.drafter is not None and drafts_trees(self.drafter)

    # ---------------------------------------------------------------------------------------------------- checks
    def _check_values(self) -> None:
        for name in ("target", "draft", "drafter"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "target"):
                raise OptionError(f"[{name}] {value!r}: give a name" + ("" if name == "drafter" else ", or a path"))
        for name, allowed in (
            ("device", DEVICES),
            ("dtype", (None, *DTYPES)),
            ("draft_dtype", (None, *DTYPES)),
            ("precision", (None, *PRECISIONS)),
            ("draft_precision", (None, *PRECISIONS)),
            ("draft_placement", (None, *PLACEMENTS)),
            ("prefill", (None, *PREFILLS)),
            ("verification", VERIFICATIONS),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(filter(None, allowed))
                raise OptionError(f"[{name}] {getattr(self, name)!r}: choose one of {choices}")
        for name, low, high in (
            ("max_seq_len", 2, None),
            ("threads", 1, MAX_THREADS),
            ("slots", 1, MAX_SLOTS),
            ("pool_size", 2, None),
            ("num_draft_tokens", 0, MAX_DRAFT_LENGTH),
            ("tree_nodes", 1, MAX_DRAFT_LENGTH),
            ("exit_layer", 1, None),
            ("attention_cores", 1, MAX_ATTENTION_CORES),
        ):
            value = getattr(self, name)
            if value is None or (value == AUTO and name in ("num_draft_tokens", "exit_layer")):
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                auto = f", or {AUTO!r}" * (name in ("num_draft_tokens", "exit_layer"))
                raise OptionError(f"[{name}] {value!r}: give a whole number {bounds}{auto}")
        if self.free_rows is not None and not all(1 <= rows <= MAX_DRAFT_LENGTH + 1 for rows in self.free_rows or (0,)):
            raise OptionError(f"[free_rows] {self.free_rows!r}: give numbers from 1 to {MAX_DRAFT_LENGTH + 1}")
        if self.drafter not in (None, NONE):
            spec_of(self.drafter)
        if self.force_acceptance is not None:
            check_forced(self.force_acceptance)

    def _check_device(self) -> None:
        on_board = self.device == "tt"
        given = [name for name in (TORCH_OPTIONS if on_board else BOARD_OPTIONS) if getattr(self, name) is not None]
        if given:
            option = f"[{given[0]}{'=False' * (getattr(self, given[0]) is False)}]"
            remedy = TORCH_OPTIONS[given[0]] if on_board else "add [device] tt or leave it out"
            raise OptionError(f"{option} has no meaning with [device] {self.device}: {remedy}")

    def _check_drafter(self) -> None:
        drafter, length = self.drafter, self.num_draft_tokens
        if drafter == NONE and length:
            raise OptionError(
                f"[num_draft_tokens] {length} has no meaning with [drafter] {NONE}: leave one of them out"
            )
        spec = None if drafter in (None, NONE) else spec_of(drafter)
        given = [name for name in DRAFT_MODEL_OPTIONS if getattr(self, name) is not None]
        if given and drafter is not None and not (spec and spec.needs_draft_model):
            raise OptionError(
                f"[{given[0]}] has no meaning with [drafter] {drafter}: leave it out or use [drafter] model"
            )
        if drafter == FORCED and (self.force_acceptance is None or not self.greedy):
            raise OptionError(
                f"[drafter] {FORCED} repeats a greedy text as often as [force_acceptance] says: give that, such as "
                "[force_acceptance] 0.8, and no temperature"
            )
        for name, owner in (("tree_nodes", "tree"), ("exit_layer", "early-exit"), ("force_acceptance", FORCED)):
            if getattr(self, name) is not None and not (spec and name in spec.settings):
                raise OptionError(
                    f"[{name}] has no meaning with [drafter] {drafter or 'combined'}: leave it out or use [drafter] "
                    f"{owner}"
                )
        on_board = self.device == "tt"
        if spec and "exit_layer" in spec.settings and on_board and self.exit_layer in (None, AUTO) and length != 0:
            raise OptionError(
                "a board prepares early exit for one layer: give it with [exit_layer], such as [exit_layer] 4"
            )
        if spec and spec.workload.tree and self.verification == "sequential":
            raise OptionError(
                f"[drafter] {drafter} cannot be verified token by token: leave out [verification] sequential"
            )
        if length == AUTO and self.verification == "sequential":
            raise OptionError(
                f"[num_draft_tokens] {AUTO} chooses by what batched verification costs: with [verification] "
                f"sequential give a number, such as {DRAFT_TOKENS}"
            )


@dataclass(frozen=True)
class ResolvedOptions(EngineOptions):
    """Options in which every default is filled in, for devices and drafters that have no use for some of them too."""

    dtype: str = "bf16"
    draft_dtype: str = "bf16"
    compiled: bool = False
    row_invariant: bool = False
    free_rows: tuple[int, ...] = FREE
    precision: str = PRECISION
    draft_precision: str = PRECISION
    draft_placement: str = PLACEMENTS[0]
    attention_cores: int = 1
    prefill: str = PREFILLS[0]
    trace: bool = True
    weight_cache: bool = True
    drafter: str = NONE
    num_draft_tokens: int | str = 0
    tree_nodes: int = TREE_NODES
    exit_layer: int | str = AUTO

    def __post_init__(self) -> None:
        """What was given was checked before, and what is filled in need not pass for given."""


def engine_options(**options: Any) -> EngineOptions:
    """`EngineOptions` of these fields; models may be paths. Raises UserError for a name that is none of them."""
    known = [field.name for field in dataclasses.fields(EngineOptions)]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"unknown option {unknown[0]!r}: there are {', '.join(known)}")
    for name in ("target", "draft"):
        if isinstance(options.get(name), os.PathLike):
            options[name] = os.fspath(options[name])
    return EngineOptions(**options)


def named_target(source: str) -> str:
    """The checkpoint that a name stands for; anything else as it is."""
    return str(NAMED[source][0]) if source in NAMED else source


def named_draft(source: str) -> str:
    """The draft model, or else the draft head, that a name stands for; anything else as it is."""
    if source in NAMED:
        return str(NAMED[source][1])
    return str(HEADS[source]) if source in HEADS else source


def named_head(source: str) -> str:
    """The draft head that a target's name stands for; anything else as it is."""
    return str(HEADS[source]) if source in HEADS else source


def draft_of(target: str) -> str | None:
    """The draft model that belongs to a target with a name, or to its checkpoint; None for any other."""
    for name, (checkpoint, draft) in NAMED.items():
        if target in (name, str(checkpoint)):
            return str(draft)
    return None


def head_of(target: str) -> str | None:
    """The draft head that belongs to a target with a name, or to its checkpoint; None for any other."""
    for name, head in HEADS.items():
        if target == name or (name in NAMED and target == str(NAMED[name][0])):
            return str(head)
    return None


def describe_source(source: str) -> str:
    """A checkpoint's name for people: shipped ones relative to the package's parent, others as given."""
    path, root = Path(source), CHECKPOINTS.parent.parent
    return str(path.relative_to(root)) if path.is_absolute() and path.is_relative_to(CHECKPOINTS) else source
