"""Which programs a generation runs, so that all of them can be prepared, compiled and captured before it.

A program that comes later would end all traces (see `runner`). Importable where ttnn is not installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.ttnn_llama.programs.options import BoardOptions
from models.ttnn_llama.shapes import MAX_ROWS

TREE = "tree-"  # before "ids" and "logits": of rows that are a tree
KEPT = "kept-"  # before them: of a forward that keeps its hidden states for a draft head
# Rows of a draft model's forwards while it grows a tree: what it has not read yet, then level by level.
READING_ROWS = (1, 2, 8, MAX_ROWS)
LEVEL_ROWS = (1, 2, 4, 8)
# Where several chips leave room for one trace of a round, the length of it: the one nearest to what suits most pairs.
TYPICAL_LENGTH = 4
# An upper estimate: tt_transformers reserves 25 MB for a trace of 32 layers with about 20 ops each.
TRACE_BYTES_PER_LAYER, TRACED_OPS = 800_000, 20


@dataclass(frozen=True)
class Program:
    """One program of "target" or "draft" (or the target's first layers, where they draft), or a "round" of both.

    what: "ids", "logits", with TREE or KEPT before them, "chain" or "round"; of a head also "read" and "step".
    n: tokens that it is given, k: tokens it drafts. users: how many sequences give it n tokens each.
    """

    model: str
    what: str
    n: int = 1
    k: int = 0
    users: int = 1

    def layers(self, target: int, draft: int) -> int:
        """Layers that it runs through, of models with so many."""
        if self.what == "round":
            return self.k * draft + target
        return max(self.k, 1) * (draft if self.model == "draft" else target)

    @property
    def turns(self) -> int:
        """Cache updates in a layer beside the first one: of several slots, one for each further row of a user."""
        return self.n - 1 if self.what in ("ids", "logits") else 0


def is_fused(options: BoardOptions, shared: bool) -> bool:
    """Whether a round is one program. shared: the draft, if there is one, lies on the target's chips."""
    return options.slots == 1 and options.greedy and options.batched and shared and options.workload.fusible


def reads_late(options: BoardOptions) -> bool:
    """Whether a draft model may be asked for the first time, or again, after others have written a part of the text."""
    workload = options.workload
    return workload.drafts_with == "draft" and (workload.mixed or len(options.lengths) > 1)


def usable_lengths(options: BoardOptions, chips: int, shared: bool) -> list[int]:
    """The draft lengths that rounds can have: on several chips only one trace lives at a time, so one."""
    lengths = options.lengths
    if options.trace and chips > 1 and is_fused(options, shared) and lengths:
        return [min(lengths, key=lambda k: abs(k - TYPICAL_LENGTH))]
    return lengths


def programs(options: BoardOptions, lengths: Sequence[int], shared: bool) -> list[Program]:
    """Every program of a generation that drafts these lengths; the first is plain decoding's, the last the one that
    a speculative round spends its time in."""
    what = "ids" if options.greedy else "logits"
    if options.slots > 1:
        return _of_several(options, lengths, what)
    plain = Program("target", what)
    if options.workload.drafts_with == "head" and lengths:
        return [plain, *_with_head(options, lengths, what, shared)]
    needed = [plain, *_reading(options, lengths)]
    if not lengths:
        return needed
    needed += _drafting(options, lengths, shared)
    if is_fused(options, shared):
        if options.workload.mixed:
            needed += [Program("target", what, k + 1) for k in lengths]
        return needed + [Program("round", "round", k=k) for k in lengths]
    if not options.batched:
        return [*needed, plain]
    if not options.workload.tree:
        return needed + [Program("target", what, k + 1) for k in lengths]
    # What the cache could not keep of a tree, up to all its levels, comes before the next one, or without one.
    again = max(lengths) + 1
    rows = min(again + (options.tree_nodes or 0), MAX_ROWS)
    return [*needed, Program("target", what, again), Program("target", TREE + what, rows)]


def _of_several(options: BoardOptions, lengths: Sequence[int], what: str) -> list[Program]:
    """Of several slots: for each length one that verifies for as many users as have room, and serves fewer too.

    A step in which a prompt is read wants logits of all its rows, also where texts are greedy; drafts in step want them
    of one row or two of every user. A single text is drafted for by chains.
    """
    users = min(options.slots, MAX_ROWS)
    kinds = dict.fromkeys(("logits", what))
    needed = [Program("target", what, users=users), *_reading(options, lengths)]
    drafted = lengths if options.batched else ()
    if lengths:
        needed += _drafting(options, lengths, shared=False)
    if lengths and options.workload.drafts_with == "draft":
        needed += [Program("draft", "logits", n, users=min(users, MAX_ROWS // n)) for n in (1, 2)]
        needed += [Program("draft", kind, MAX_ROWS) for kind in ("ids", "logits")]  # what it has yet to read
    needed += [Program("target", kind, 1, users=users) for kind in kinds]
    needed += [Program("target", kind, k + 1, users=min(users, MAX_ROWS // (k + 1))) for kind in kinds for k in drafted]
    return list(dict.fromkeys(needed))


def _with_head(options: BoardOptions, lengths: Sequence[int], what: str, shared: bool) -> list[Program]:
    """What a draft head and its target run: every forward of the target beside its rounds keeps its states."""
    rows = max(lengths) + 1
    needed = [Program("draft", "read", n) for n in (1, rows)] + [Program("target", KEPT + what)]
    if is_fused(options, shared):
        if options.workload.mixed:
            needed += [Program("target", KEPT + what, k + 1) for k in lengths]
        return needed + [Program("round", "round", k=k) for k in lengths]
    if options.greedy:
        needed += [Program("draft", "chain", k=k) for k in lengths]
    else:
        needed += [Program("draft", "logits", rows), Program("draft", "step")]
    return needed + [Program("target", KEPT + what, k + 1) for k in lengths]


def _reading(options: BoardOptions, lengths: Sequence[int]) -> list[Program]:
    """What reads prompts where prefill kernels do not."""
    if options.prefill != "rows":
        return []
    drafts = ["draft"] if lengths and options.workload.drafts_with == "draft" else []
    return [Program(model, "logits", MAX_ROWS) for model in ["target", *drafts]]


def _drafting(options: BoardOptions, lengths: Sequence[int], shared: bool) -> list[Program]:
    """What drafts by itself, apart from rounds."""
    workload = options.workload
    if not workload.drafts_with:
        return []
    needed: list[Program] = []
    if workload.tree:
        needed += [Program("draft", "logits", n) for n in READING_ROWS]
        needed += [Program("draft", TREE + "logits", n) for n in LEVEL_ROWS]
    elif not is_fused(options, shared):
        # After full acceptance two tokens are to be fed, but not to layers that share the target's cache.
        fed = (1,) if workload.drafts_with == "first-layers" else (1, 2)
        if options.greedy:
            needed += [Program("draft", "chain", n, k) for n in fed for k in lengths]
        else:
            needed += [Program("draft", "logits", n) for n in fed]
    # What it has not read since it was last asked.
    if reads_late(options) or workload.tree:
        needed.append(Program("draft", "ids", MAX_ROWS))
        if not options.greedy and not workload.tree:
            needed.append(Program("draft", "logits", MAX_ROWS))
    return needed


def trace_bytes(
    needed: Sequence[Program], target_layers: int, draft_layers: int, chips: dict[str, int], slots: int = 1
) -> int:
    """What every chip reserves for traces. chips: of the mesh of "target" and of "draft"; one entry if they share it.

    On one chip all programs are traces, on several one at a time. Where there are several slots, a forward has an op
    more in each layer for every further row of a user, of about 20.
    """
    most = 0
    for name, count in chips.items():
        own = [program for program in dict.fromkeys(needed) if len(chips) == 1 or program.model == name]
        sizes = [
            program.layers(target_layers, draft_layers)
            * (TRACE_BYTES_PER_LAYER + (slots > 1) * program.turns * TRACE_BYTES_PER_LAYER // TRACED_OPS)
            for program in own
        ]
        most = max(most, sum(sizes) if count == 1 else max(sizes, default=0))
    return most
