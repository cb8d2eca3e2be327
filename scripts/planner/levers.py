"""What else would pay: each change to a plan priced like the plan itself, and whether it fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from models.boards import Board
from models.errors import UserError
from models.llama.config import named_config
from models.speculative.drafters.registry import spec_of
from models.speculative.formulas import break_even, expected_tokens, with_rescue
from models.ttnn_llama.device.mesh import target_chips
from models.ttnn_llama.programs.needed import LEVEL_ROWS, programs, trace_bytes
from models.ttnn_llama.programs.options import BoardOptions
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import Precision, precision_named
from scripts.planner import counts
from scripts.planner.heads import HEAD, head_config, memory_plan, times_of
from scripts.planner.predict import Figure, Pair, Times
from scripts.planner.published import MERGED_US
from scripts.planner.speculation import Acceptance, Round, best, chain, gain, speedup

LONGER_CONTEXTS = (8192, 32768)
TREE_NODES = 31
# Where the first choice of the draft is wrong, how often another of a tree's tokens at that place is right.
TREE_RESCUE = 0.5
EXITS = (8, 4)  # early exit after an eighth and a quarter of the layers
LOWEST = "bfp4"
FASTEST = "all for speed"
MORE_ATTENTION_CORES = 8


@dataclass(frozen=True)
class Lever:
    """A change, what is assumed of it, and what is predicted at its best draft length ``k``.

    speedup: over plain decoding with the same change. gain: tokens per second over those of the plan, None where the
    task is another one. break_even: equal acceptance from which on it beats plain decoding, None if none is enough or
    nothing is drafted. fits: the memory.
    """

    name: str
    assumption: str
    k: int
    tok_s: Figure
    speedup: Figure
    gain: Figure | None
    break_even: float | None
    fits: bool


@dataclass(frozen=True)
class Memory:
    """What "target" and "draft" take of each chip; ``refusal`` says what is missing where they do not fit."""

    plans: dict[str, memory.MemoryPlan]
    refusal: str | None


def memory_of(board: Board, pair: Pair, k: int, drafter: str = "model") -> Memory:
    """What a pair takes of each chip when k tokens are drafted, as `pair.memory_plans` has it, with a cache for the
    pair's context. drafter: a name in `drafters.registry`, "model" also for a pair that drafts with a head."""
    headed = pair.draft == HEAD
    spec = spec_of(HEAD if headed and drafter == "model" else drafter)
    options = BoardOptions(
        workload=spec.workload, exit_layer=pair.draft_layers, tree_nodes=TREE_NODES, draft_lengths=(max(k, 1),)
    )
    models = {"target": (pair.target, pair.precision)}
    if spec.needs_draft_model and not headed:
        models["draft"] = (pair.draft, pair.draft_precision)
    chips = {name: pair.places[name].chips for name in (("target", "draft") if pair.own_chip else ("target",))}
    layers = named_config(pair.target).num_hidden_layers
    drafting = pair.draft_layers or (1 if headed else named_config(pair.draft).num_hidden_layers)
    needed = programs(options, options.lengths, not pair.own_chip)
    traces = trace_bytes(needed, layers, drafting, chips)
    plans = {
        name: memory.plan(
            named_config(model),
            precision_named(precision),
            pair.places[name].chips,
            pair.context,
            traces if name in chips else 0,
            dram_banks=board.dram_banks,
        )
        for name, (model, precision) in models.items()
    }
    if spec.needs_draft_model and headed:
        head, lower = head_config(named_config(pair.target)), precision_named(pair.draft_precision)
        plans["draft"] = memory_plan(head, lower, board.chips, pair.context, 0, board.dram_banks)
    try:
        memory.check_fit(board, plans, "own-chip" if pair.own_chip else "shared")
    except UserError as error:
        return Memory(plans, str(error))
    return Memory(plans, None)


def levers(base: Times, acceptance: Acceptance, lengths: Sequence[int], chosen: Round) -> Iterator[Lever]:
    """Changes to the plan of ``base``, whose best round is ``chosen``; each at its own best draft length."""
    pair, family = base.pair, base.family
    headed = pair.draft == HEAD

    def priced(
        name: str,
        assumption: str,
        changed: Times,
        make: Callable[[int], Round] | None = None,
        ks: Sequence[int] = lengths,
        compare: bool = True,
        drafter: str = "model",
        rescue: float = 0.0,
    ) -> Lever:
        round = best(make or (lambda k: chain(changed, acceptance, k)), ks)
        plain = base if changed.pair.own_chip else changed
        cost = float(round.ms()[0] / plain.decode()[0])
        return Lever(
            name,
            assumption,
            round.k,
            family.figure(round.tok_s),
            speedup(plain, round),
            gain(changed, round, chosen) if compare else None,
            break_even(round.k, cost, rescue) if round.k else None,
            memory_of(changed.board, changed.pair, round.k, drafter).refusal is None,
        )

    def with_pair(**changes: object) -> Times:
        return times_of(family, base.counts, base.board, replace(pair, **changes))

    if pair.draft_precision != LOWEST:
        yield priced(f"draft in {LOWEST}", "same acceptance", with_pair(draft_precision=LOWEST))
    merged = times_of(family.faster_layers(MERGED_US), base.counts, base.board, pair)
    yield priced("one program for all layers", "saves of each layer what it saved of 8B's on P300x2", merged)
    precisions = [precision_named(name) for name in (pair.precision, pair.draft_precision)]
    lofi = "LoFi" if all(map(_may_be_lofi, precisions)) else None
    if lofi and any(
        {each.attention_fidelity, each.gate_up_fidelity, each.down_fidelity} != {lofi} for each in precisions
    ):
        what = "another model than that precision's: target and baseline share it; same acceptance"
        yield priced("LoFi projections", what, with_pair(projections=lofi))
    if pair.attention_cores < MORE_ATTENTION_CORES:
        what = f"--attention-cores {MORE_ATTENTION_CORES}: bits of a row depend on the rows beside it; same acceptance"
        more = with_pair(attention_cores=MORE_ATTENTION_CORES)
        yield priced(f"{MORE_ATTENTION_CORES} cores for a row's KV head", what, more)
    fastest = with_pair(
        projections=lofi,
        attention_cores=max(pair.attention_cores, MORE_ATTENTION_CORES),
        draft_precision=LOWEST,
    )
    what = (
        f"{'LoFi, ' if lofi else ''}{fastest.pair.attention_cores} attention cores, draft in {LOWEST}; same acceptance"
    )
    yield priced(FASTEST, what, fastest)
    if base.board.chips > 1 and not headed:  # a head reads its target's states where they are
        chips = target_chips(base.board, own_chip_for_draft=True)
        apart = with_pair(places=counts.places(base.board, True, chips), own_chip=True)
        what = f"target on {chips} chip{'s' * (chips > 1)}, two programs a round; over plain decoding on all chips"
        yield priced("a chip for the draft", what, apart)
    layers = named_config(pair.target).num_hidden_layers
    for part in EXITS:
        early = with_pair(draft=pair.target, draft_precision=pair.precision, draft_layers=layers // part)
        text = f"draft: {layers // part} of the target's {layers} layers and its head; same acceptance"
        yield priced(f"early exit after {layers // part}", text, early, drafter="early-exit")
    if not headed:  # on a board heads draft chains
        yield priced(
            f"tree of {TREE_NODES} tokens",
            f"where the first choice is wrong another one is right in {TREE_RESCUE:.0%}; {TREE_NODES + 1} rows "
            "verified; the host grows the tree, a program for each level",
            base,
            lambda depth: tree(base, acceptance, depth),
            range(1, max(max(lengths), 1) + 1),
            drafter="tree",
            rescue=TREE_RESCUE,
        )
    yield priced(
        "a draft that costs nothing",
        "prompt lookup, say; same acceptance: the most that any cheaper draft can give",
        base,
        lambda k: free(base, acceptance, k),
        drafter="prompt-lookup",
    )
    for context in LONGER_CONTEXTS:
        if pair.context < context:
            yield priced(f"context of {context}", "same acceptance", with_pair(context=context), compare=False)


def _may_be_lofi(precision: Precision) -> bool:
    """LoFi reads half of bfp8's mantissa; of bf16's it would leave too little to call it the same model."""
    return "bf16" not in (precision.attention, precision.gate_up, precision.down)


def tree(times: Times, acceptance: Acceptance, depth: int, rescue: float = TREE_RESCUE) -> Round:
    """31 tokens on ``depth`` levels, verified together; the draft reads a level at a time, of at most 8 tokens."""
    width = min(-(-TREE_NODES // depth), LEVEL_ROWS[-1])
    family = times.family
    tokens = expected_tokens(with_rescue(acceptance.chances(depth), rescue))
    drafting = times.draft(2) + (depth - 1) * times.draft(width, tree=True) + depth * (family.tail_ms + family.host_ms)
    verifying = times.target(TREE_NODES + 1, tree=True) + family.tail_ms
    return Round(depth, tokens, drafting, verifying, family.host_ms)


def free(times: Times, acceptance: Acceptance, k: int) -> Round:
    """As `chain`, by a draft that takes no time."""
    return replace(chain(times, acceptance, k), drafting=0 * times.drafting(k))
