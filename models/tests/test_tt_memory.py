"""Memory plans: bytes as the allocator counts them, and refusals of which every remedy is true."""

import dataclasses
import re

import pytest

from models.boards import BOARDS, Board
from models.errors import UserError
from models.llama.config import NAMED_SIZES
from models.llama.head_config import typical_head
from models.ttnn_llama.weights.memory import COLUMNS, MemoryPlan, check_fit, plan, rows, weight_bytes
from models.ttnn_llama.weights.precision import PRECISIONS, precision_named
from models.ttnn_llama.weights.tensors import weight_specs

ONE_B, THREE_B, EIGHT_B = NAMED_SIZES.values()
TRACES = 50_000_000


def planned(config, precision: str, board: Board, context: int, chips: int | None = None) -> MemoryPlan:
    chips = chips or board.chips
    return plan(config, precision_named(precision), chips, context, TRACES, dram_banks=board.dram_banks)


def refusal(board: Board, plans: dict, placement: str = "shared") -> str:
    with pytest.raises(UserError) as caught:
        check_fit(board, plans, placement)
    message = str(caught.value)
    assert "\n" not in message
    return message


def bytes_of(config, name: str, chips: int, banks: int, precision: str = "accuracy") -> int:
    specs = weight_specs(config, chips, precision_named(precision))
    return weight_bytes(next(spec for spec in specs if spec.name == name), chips, banks)


# ------------------------------------------------------------------------------------------------------------- heads
def test_8b_with_a_head_fits_an_n150_and_takes_less_than_a_1b_draft():
    board, head = BOARDS["N150"], typical_head(EIGHT_B)
    for context in (2048, 16384):
        plans = {
            name: planned(config, "performance", board, context)
            for name, config in (("target", EIGHT_B), ("draft", head))
        }
        check_fit(board, plans)
        assert plans["draft"].total < planned(ONE_B, "performance", board, context).total
        assert plans["draft"].changed(max_seq_len=1024).total < plans["draft"].total


def test_a_heads_prompt_states_are_planned_with_the_context():
    """bf16 states of three layers for each position of the cache."""
    board, head = BOARDS["N150"], typical_head(EIGHT_B)
    short, long = (planned(head, "performance", board, context).activations for context in (4064, 8160))
    rope = 4 * 4096 * 128
    assert long - short == 2 * (3 * 4096 * 4096 + rope)


def test_a_head_that_the_chips_do_not_divide_is_refused():
    head = dataclasses.replace(typical_head(EIGHT_B), draft_vocab_size=32032)
    with pytest.raises(UserError, match="draft head: vocab_size 32032 cannot be split over 8 chips"):
        planned(head, "performance", BOARDS["T3K"], 2048)


# ------------------------------------------------------------------------------------------------------------- bytes
def test_a_matrix_takes_whole_tiles_of_columns_in_every_bank():
    # 2048 columns are 64 tiles: 6 in each of 12 banks, 8 in each of 8.
    assert bytes_of(ONE_B, "layers.0.wo", chips=1, banks=12) == 12 * 6 * 64 * 1088
    assert bytes_of(ONE_B, "layers.0.wo", chips=1, banks=8) == 8 * 8 * 64 * 1088
    assert bytes_of(ONE_B, "layers.0.w1", chips=1, banks=8, precision="performance") == 8 * 32 * 64 * 576


def test_chips_share_matrices_and_repeat_the_embedding():
    for name in ("wqkv", "wo", "w1", "w2", "w3"):
        whole, shared = (bytes_of(EIGHT_B, f"layers.3.{name}", chips, banks=8) for chips in (1, 8))
        assert shared < whole / 7, name
    embeddings = [bytes_of(EIGHT_B, "embedding", chips, banks=8) for chips in (1, 8)]
    assert embeddings == [128256 * 4096 * 2] * 2


def test_the_cache_grows_by_blocks_of_128_positions_and_leaves_room_for_one_verification():
    sizes = {length: planned(ONE_B, "accuracy", BOARDS["P150"], length).kv_cache for length in (96, 97, 224, 225)}
    block = 16 * 2 * 8 * 128 * 64 * 1088 // 1024  # layers, K and V, heads, positions, head_dim
    assert sizes == {96: block, 97: 2 * block, 224: 2 * block, 225: 3 * block}


def test_a_plan_counts_each_layer_and_the_traces():
    board = BOARDS["N150"]
    deep, flat = (planned(dataclasses.replace(EIGHT_B, num_hidden_layers=n), "accuracy", board, 2048) for n in (32, 31))
    names = ("attention_norm", "wqkv", "wo", "mlp_norm", "w1", "w3", "w2")
    assert deep.weights - flat.weights == sum(bytes_of(EIGHT_B, f"layers.0.{name}", 1, 12) for name in names)
    assert deep.traces == TRACES and deep.total == deep.weights + deep.kv_cache + deep.activations + TRACES


def test_a_model_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="num_attention_heads 32 cannot be split over 3 chips"):
        plan(ONE_B, PRECISIONS["accuracy"], 3, 2048, 0)


# ----------------------------------------------------------------------------------------------------------- refusals
def test_what_fits_is_accepted():
    for board in BOARDS.values():
        target, draft = (planned(config, "accuracy", board, 8192) for config in (EIGHT_B, ONE_B))
        check_fit(board, {"target": target})
        if board.name != "N150":
            check_fit(board, {"target": target, "draft": draft})


def test_a_plan_fits_up_to_the_last_byte():
    target = planned(ONE_B, "accuracy", BOARDS["N150"], 2048)
    exact = dataclasses.replace(BOARDS["N150"], dram_bytes=target.total)
    check_fit(exact, {"target": target})
    refusal(dataclasses.replace(exact, dram_bytes=target.total - 1), {"target": target})


def test_a_refusal_names_the_models_the_board_and_both_sizes():
    board = BOARDS["N150"]
    plans = {"target": planned(EIGHT_B, "bf16", board, 8192), "draft": planned(ONE_B, "accuracy", board, 8192)}
    need = plans["target"].total + plans["draft"].total
    message = refusal(board, plans)
    assert message.startswith(f"target and draft need {need / 1e9:.2f} GB of each chip's DRAM (weights ")
    assert (
        f"a chip of N150 has {board.dram_bytes / 1e9:.2f} GB, {(need - board.dram_bytes) / 1e9:.2f} GB too" in message
    )


def test_the_named_context_is_the_largest_that_fits():
    board = BOARDS["N150"]
    plans = {"target": planned(EIGHT_B, "accuracy", board, 131072)}
    context = int(re.search(r"--max-seq-len (\d+)", refusal(board, plans))[1])
    assert 8192 < context < 131072
    check_fit(board, {"target": planned(EIGHT_B, "accuracy", board, context)})
    refusal(board, {"target": planned(EIGHT_B, "accuracy", board, context + 1)})


def test_the_named_precision_fits_and_the_next_better_does_not():
    board = BOARDS["N150"]
    message = refusal(board, {"target": planned(EIGHT_B, "bf16", board, 2048)})
    assert "use --precision accuracy, or a board like N300" in message
    check_fit(board, {"target": planned(EIGHT_B, "accuracy", board, 2048)})


def test_the_draft_is_lowered_before_the_target():
    board = BOARDS["N150"]
    plans = {"target": planned(EIGHT_B, "accuracy", board, 2048), "draft": planned(THREE_B, "accuracy", board, 2048)}
    assert "--draft-precision bfp4" in refusal(board, plans)
    check_fit(board, {**plans, "draft": planned(THREE_B, "bfp4", board, 2048)})


def test_the_flags_for_target_and_draft_are_both_named_and_fit_together():
    board = BOARDS["N150"]
    plans = {"target": planned(EIGHT_B, "bf16", board, 2048), "draft": planned(ONE_B, "performance", board, 2048)}
    found = re.search(r"--precision (\w+) --draft-precision (\w+)", refusal(board, plans)).groups()
    assert found == ("accuracy", "performance")  # what is low enough is left as it is
    check_fit(
        board, {"target": planned(EIGHT_B, found[0], board, 2048), "draft": planned(ONE_B, found[1], board, 2048)}
    )


def test_the_named_board_is_the_smallest_that_fits():
    message = refusal(BOARDS["N150"], {"target": planned(EIGHT_B, "bf16", BOARDS["N150"], 8192)})
    assert re.search(r"a board like (\w+)", message)[1] == "N300"
    check_fit(BOARDS["N300"], {"target": planned(EIGHT_B, "bf16", BOARDS["N300"], 8192)})


def test_another_board_is_judged_by_its_own_banks(monkeypatch):
    n150, p150 = BOARDS["N150"], BOARDS["P150"]
    need = planned(ONE_B, "accuracy", p150, 2048).total  # less than with the padding to twelve banks
    boards = {b.name: dataclasses.replace(b, dram_bytes=size) for b, size in ((n150, need // 2), (p150, need))}
    monkeypatch.setattr("models.ttnn_llama.weights.memory.BOARDS", boards)
    assert "a board like P150" in refusal(boards["N150"], {"target": planned(ONE_B, "accuracy", n150, 2048)})


def test_leaving_out_the_draft_is_named_only_where_that_helps():
    board = BOARDS["N150"]
    fits, large = (planned(EIGHT_B, precision, board, 2048) for precision in ("accuracy", "bf16"))
    draft = planned(THREE_B, "bf16", board, 2048)
    assert "no draft" in refusal(board, {"target": fits, "draft": draft})
    assert "no draft" not in refusal(board, {"target": large, "draft": draft})


def test_precision_and_context_are_named_together_where_neither_alone_is_enough():
    board = dataclasses.replace(BOARDS["N150"], dram_bytes=7_000_000_000)
    plans = {"target": planned(EIGHT_B, "accuracy", board, 131072)}
    precision, context = re.search(r"use --precision (\w+) with --max-seq-len (\d+)", refusal(board, plans)).groups()
    check_fit(board, {"target": planned(EIGHT_B, precision, board, int(context))})
    refusal(board, {"target": planned(EIGHT_B, precision, board, int(context) + 1)})
    refusal(board, {"target": planned(EIGHT_B, "accuracy", board, 128)})


def test_models_on_chips_of_their_own_are_checked_one_by_one():
    board = BOARDS["N300"]
    plans = {
        "target": planned(EIGHT_B, "accuracy", board, 2048, chips=1),
        "draft": planned(THREE_B, "bf16", board, 2048, chips=1),
    }
    check_fit(board, plans, "own-chip")
    refusal(board, plans, "shared")
    plans["draft"] = planned(EIGHT_B, "bf16", board, 2048, chips=1)
    message = refusal(board, plans, "own-chip")
    assert message.startswith("draft needs ") and "--draft-precision bfp4" in message
    assert "a board like T3K" not in message  # the draft would still be on one chip


def test_on_a_larger_board_the_target_gets_the_chips_that_the_draft_leaves(monkeypatch):
    board = BOARDS["N300"]
    plans = {
        "target": planned(EIGHT_B, "bf16", board, 2048, chips=1),
        "draft": planned(ONE_B, "accuracy", board, 2048, chips=1),
    }
    assert "a board like P300" in refusal(board, plans, "own-chip")
    check_fit(BOARDS["P300"], {**plans, "target": planned(EIGHT_B, "bf16", BOARDS["P300"], 2048)}, "own-chip")
    monkeypatch.setattr("models.ttnn_llama.weights.memory.BOARDS", {name: BOARDS[name] for name in ("N300", "T3K")})
    assert "a board like T3K" in refusal(board, plans, "own-chip")
    check_fit(BOARDS["T3K"], {**plans, "target": planned(EIGHT_B, "bf16", BOARDS["T3K"], 2048, chips=4)}, "own-chip")


def test_a_model_too_large_for_everything_is_told_so():
    huge = dataclasses.replace(EIGHT_B, num_hidden_layers=2000)
    message = refusal(BOARDS["T3K"], {"target": planned(huge, "bfp4", BOARDS["T3K"], 2048)})
    assert message.endswith("no context, precision or board here fits, use a smaller model")


def test_the_table_has_a_row_for_each_model_in_gigabytes():
    board = BOARDS["T3K"]
    target = planned(EIGHT_B, "performance", board, 2048)
    table = rows({"target": target, "draft": planned(ONE_B, "bfp4", board, 2048)})
    assert [row[:2] for row in table] == [("target", "performance"), ("draft", "bfp4")]
    assert {len(row) for row in table} == {len(COLUMNS)}
    assert table[0][2] == f"{target.weights / 1e9:.2f} GB" and table[0][-1] == f"{target.total / 1e9:.2f} GB"
