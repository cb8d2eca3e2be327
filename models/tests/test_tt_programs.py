"""Which programs a generation on a board prepares, what their traces take, and what options are refused."""

import dataclasses

import pytest

from models.boards import BOARDS
from models.errors import UserError
from models.llama.config import NAMED_SIZES
from models.speculative.drafters.registry import spec_of, specs
from models.speculative.model import Workload
from models.ttnn_llama.programs.needed import (
    TRACE_BYTES_PER_LAYER,
    TYPICAL_LENGTH,
    Program,
    programs,
    reads_late,
    trace_bytes,
    usable_lengths,
)
from models.ttnn_llama.programs.options import DRAFT_LENGTHS, BoardOptions
from models.ttnn_llama.shapes import ROW_COUNTS
from models.ttnn_llama.weights.memory import check_fit, plan
from models.ttnn_llama.weights.precision import precision_named

TARGET, DRAFT = 32, 16  # layers
EXTRAS = {"early-exit": {"exit_layer": 8}, "tree": {"tree_nodes": 15}}


def options(drafter="model", **changes):
    """What a drafter of this name asks of a board, with 4 drafted tokens if nothing else is said."""
    return BoardOptions(
        workload=spec_of(drafter).workload, **{"draft_lengths": (4,), **EXTRAS.get(drafter, {}), **changes}
    )


def needed(drafter="model", shared=True, **changes):
    asked = options(drafter, **changes)
    return programs(asked, usable_lengths(asked, 1, shared), shared)


def rounds(*lengths):
    return [Program("round", "round", k=k) for k in lengths]


# -------------------------------------------------------------------------------------------------- what is needed
def test_greedy_rounds_of_each_length_are_all_that_a_model_draft_runs():
    assert needed(draft_lengths=(4,)) == [Program("target", "ids"), *rounds(4)]
    assert needed("early-exit", draft_lengths=(1, 3)) == [Program("target", "ids"), *rounds(1, 3)]


def test_a_head_runs_rounds_reads_what_would_be_lost_and_keeps_states_in_every_other_forward():
    plain, kept = (Program("target", what) for what in ("ids", "kept-ids"))
    reading = [Program("draft", "read", n) for n in (1, 5)]
    assert needed("head") == [plain, *reading, kept, *rounds(4)]
    mixed = dataclasses.replace(spec_of("combined").workload, drafts_with="head")
    found = programs(BoardOptions(workload=mixed, draft_lengths=(1, 4)), [1, 4], True)
    assert found == [plain, *reading, kept, *(Program("target", "kept-ids", n) for n in (2, 5)), *rounds(1, 4)]
    assert needed("head", greedy=False) == [
        Program("target", "logits"),
        *reading,
        Program("target", "kept-logits"),
        Program("draft", "logits", 5),
        Program("draft", "step"),
        Program("target", "kept-logits", 5),
    ]
    assert needed("head", draft_lengths=()) == [plain]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batched": False}, "needs batched verification"),
        ({"placement": "own-chip"}, "use --draft-placement shared"),
        ({"prefill": "rows"}, "use --prefill chunks"),
        ({"workload": Workload("head", tree=True), "tree_nodes": 8}, "drafts chains: use --drafter head or combined"),
    ],
)
def test_what_a_head_cannot_do_on_a_board_is_refused(changes, words):
    with pytest.raises(UserError, match=f"a draft head on a board .*{words}"):
        BoardOptions(**{"workload": spec_of("head").workload, "draft_lengths": (4,), **changes})


def test_prompts_that_are_read_in_rows_have_a_program_for_it():
    target, draft = (Program(model, "logits", 32) for model in ("target", "draft"))
    assert needed(draft_lengths=(4,), prefill="rows") == [Program("target", "ids"), target, draft, *rounds(4)]
    assert needed("prompt-lookup", draft_lengths=(), prefill="rows") == [Program("target", "ids"), target]
    assert draft not in needed("early-exit", prefill="rows")  # has the target's cache


def test_a_draft_that_may_fall_behind_can_read():
    read = Program("draft", "ids", 32)
    assert needed(draft_lengths=DRAFT_LENGTHS) == [Program("target", "ids"), read, *rounds(1, 3, 7, 15)]
    verified = [Program("target", "ids", k + 1) for k in (1, 3)]
    assert needed("combined", draft_lengths=(1, 3)) == [Program("target", "ids"), read, *verified, *rounds(1, 3)]
    assert read not in needed("early-exit", draft_lengths=DRAFT_LENGTHS)  # has the target's cache
    assert [spec.name for spec in specs() if reads_late(options(spec.name))] == ["combined"]
    assert reads_late(options(draft_lengths=(1, 3))) and reads_late(options("tree", draft_lengths=(1, 3)))


def test_apart_from_rounds_a_model_drafts_after_one_token_and_after_two():
    apart = needed(draft_lengths=(3,), shared=False)
    assert apart == [
        Program("target", "ids"),
        Program("draft", "chain", 1, 3),
        Program("draft", "chain", 2, 3),
        Program("target", "ids", 4),
    ]
    sampled = needed(draft_lengths=(3,), greedy=False)
    assert sampled[1:-1] == [Program("draft", "logits", 1), Program("draft", "logits", 2)]
    assert sampled[-1] == Program("target", "logits", 4)
    assert needed("early-exit", draft_lengths=(3,), greedy=False)[1:-1] == [Program("draft", "logits", 1)]


def test_sequential_verification_is_plain_decoding_of_the_target():
    sequential = needed(draft_lengths=(3,), batched=False)
    assert [program for program in sequential if program.model == "target"] == [Program("target", "ids")] * 2


def test_lookup_needs_the_target_alone():
    assert needed("prompt-lookup", draft_lengths=DRAFT_LENGTHS) == [
        Program("target", "ids"),
        *(Program("target", "ids", rows) for rows in (2, 4, 8, 16)),
    ]


@pytest.mark.parametrize("what", ["ids", "logits"])
def test_a_tree_has_rows_for_what_the_last_one_left_to_feed(what):
    prepared = needed("tree", draft_lengths=(5,), tree_nodes=10, greedy=what == "ids")
    target = [program for program in prepared if program.model == "target"]
    assert target == [Program("target", what), Program("target", what, 6), Program("target", f"tree-{what}", 16)]
    largest = needed("tree", draft_lengths=(15,), tree_nodes=31)
    assert largest[-1] == Program("target", "tree-ids", 32)
    drafting = {(program.what, program.n) for program in prepared if program.model == "draft"}
    assert drafting >= {("logits", 1), ("logits", 32), ("tree-logits", 1), ("tree-logits", 8), ("ids", 32)}


def test_without_lengths_decoding_is_plain():
    plain = [Program("target", "ids")]
    for spec in specs():
        assert needed(spec.name, draft_lengths=()) == needed(spec.name, draft_lengths=(0,)) == plain
    assert programs(BoardOptions(), [], shared=True) == plain


def test_first_layers_beside_lookup_need_both_kinds_of_programs():
    """A drafter that no row of the registry names: only the workload counts."""
    asked = BoardOptions(workload=Workload("first-layers", fusible=True, mixed=True), exit_layer=8, draft_lengths=(3,))
    assert programs(asked, asked.lengths, shared=True) == [
        Program("target", "ids"),
        Program("target", "ids", 4),
        *rounds(3),
    ]


def test_lengths_to_choose_from_fill_the_rows_that_are_computed():
    assert all(k + 1 in ROW_COUNTS for k in DRAFT_LENGTHS)


# ---------------------------------------------------------------------------------------- several chips, memory
def test_on_several_chips_rounds_have_one_length_as_only_one_trace_lives_at_a_time():
    asked = options(draft_lengths=DRAFT_LENGTHS)
    assert usable_lengths(asked, 2, shared=True) == [3]
    assert usable_lengths(options(draft_lengths=(TYPICAL_LENGTH, 31)), 8, shared=True) == [TYPICAL_LENGTH]
    assert usable_lengths(asked, 1, shared=True) == [*DRAFT_LENGTHS]
    without_traces = options(draft_lengths=DRAFT_LENGTHS, trace=False)
    assert usable_lengths(without_traces, 2, shared=True) == [*DRAFT_LENGTHS]
    # One program of many rows serves all lengths of these.
    for drafter in ("prompt-lookup", "tree"):
        assert usable_lengths(options(drafter, draft_lengths=DRAFT_LENGTHS), 8, shared=True) == [*DRAFT_LENGTHS]
    assert usable_lengths(asked, 4, shared=False) == [*DRAFT_LENGTHS]


def test_one_chip_holds_all_traces_and_several_the_largest():
    prepared = [Program("target", "ids"), Program("draft", "ids", 32), *rounds(1, 3)]
    layers = [TARGET, DRAFT, DRAFT + TARGET, 3 * DRAFT + TARGET]

    def traces(programs, **chips):
        return trace_bytes(programs, TARGET, DRAFT, chips) / TRACE_BYTES_PER_LAYER

    assert traces(prepared, target=1) == sum(layers)
    assert traces([*prepared, prepared[0]], target=1) == sum(layers)  # the same program
    assert traces(prepared, target=2) == max(layers)
    apart = [Program("target", "ids"), Program("target", "ids", 4), Program("draft", "chain", 2, 5)]
    assert traces(apart, target=4, draft=1) == 5 * DRAFT
    assert traces(apart, target=1, draft=1) == max(2 * TARGET, 5 * DRAFT)


def test_traces_that_do_not_fit_beside_the_models_are_refused_with_the_way_around_them():
    board, config = BOARDS["N150"], NAMED_SIZES["llama-3.1-8b"]
    layers = config.num_hidden_layers
    reserved = trace_bytes(needed(draft_lengths=DRAFT_LENGTHS), layers, DRAFT, {"target": 1})
    planned = plan(config, precision_named("accuracy"), 1, 2048, reserved, dram_banks=12)
    small = dataclasses.replace(board, dram_bytes=planned.total - 1)
    with pytest.raises(UserError, match=f"traces {reserved / 1e9:.2f}.*--no-trace"):
        check_fit(small, {"target": planned})
    check_fit(small, {"target": dataclasses.replace(planned, traces=0)})
    tiny = dataclasses.replace(board, dram_bytes=planned.total - reserved - 1)
    with pytest.raises(UserError) as caught:
        check_fit(tiny, {"target": planned})
    assert "--no-trace" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"draft_lengths": (4, 32)}, "32 drafted tokens are outside 1..31: use --num-draft-tokens in that range"),
        ({"draft_lengths": (-1,)}, "-1 drafted tokens are outside 1..31"),
        (
            {"workload": Workload("first-layers"), "draft_lengths": (4,)},
            "a board prepares early exit for one layer: name it with --exit-layer",
        ),
        (
            {"workload": Workload("draft", tree=True), "draft_lengths": (4,)},
            "a tree of None tokens: give --tree-nodes from 1 to 31",
        ),
        (
            {"workload": Workload("draft", tree=True), "draft_lengths": (4,), "tree_nodes": 32},
            "a tree of 32 tokens: give --tree-nodes from 1 to 31",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(asked, message):
    with pytest.raises(UserError) as caught:
        BoardOptions(**asked)
    assert message in str(caught.value) and "\n" not in str(caught.value)
