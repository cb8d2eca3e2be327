"""plan.py with draft heads: counts by independent arithmetic, times by hand, published acceptance, one-pass heads."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.boards import BOARDS
from models.cli.command import run_command
from models.errors import UserError
from models.llama.config import named_config
from models.speculative.formulas import expected_tokens
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import precision_named
from scripts.planner import fit, published
from scripts.planner.counts import ROWS, SIZES, Counts, Place
from scripts.planner.heads import (
    DFLASH,
    EAGLE3,
    HEAD,
    P_EAGLE,
    HeadTimes,
    PEagleTimes,
    drafting,
    head_config,
    memory_plan,
    times_of,
    weight_bytes,
)
from scripts.planner.levers import levers, memory_of
from scripts.planner.predict import Family, Pair, Times
from scripts.planner.speculation import Acceptance, best, chain, speedup
from scripts.planner.texts import TEXTS, reached, text_named

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "plan.py"
OVERVIEW = ROOT / "docs" / "results" / "plan-heads.json"
BFP8, BFP4 = 1088 / 1024, 576 / 1024  # bytes of a value


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("plan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped():
    return Counts.shipped()


@pytest.fixture(scope="module")
def family(shipped):
    return Family.of(shipped)


def place_of(board):
    return Place(board, BOARDS[board].chips)


def pair_of(board, target="8B", draft=HEAD, **changes):
    place = place_of(board)
    pair = Pair(target, draft, "performance", "performance", {"target": place, "draft": place}, 1024)
    return replace(pair, **changes)


def times(shipped, family, board, target="8B", draft=HEAD, **changes):
    return times_of(family, shipped, BOARDS[board], pair_of(board, target, draft, **changes))


# ------------------------------------------------------------------------------------------------ what a head does
def test_heads_have_the_sizes_of_the_published_ones():
    sizes = {size: head_config(named_config(size)).parameter_count for size in SIZES}
    assert 2 * sizes["8B"] == pytest.approx(850e6, rel=0.002)  # the published file, in fp16
    assert sizes["3B"] == pytest.approx(243e6, rel=0.002) and sizes["1B"] == pytest.approx(145e6, rel=0.002)
    assert head_config(named_config("8B")).taps == (2, 16, 29)


# Device programs of the parts of a round, counted by hand in the modules' decode forwards.
KEPT = 3  # a state from its cores to DRAM, each
FUSED = 3 * (1 + 2 + 1) + 3 + 2  # untilize, look up, tilize, shard; products; sums
TOKEN = 3  # look up, tilize, shard
ROPE = 2 * 3  # look up, tilize, transpose
LAYER = 16 + 3
PICK = 5  # gather, untilize, look up, tilize, shard
HEAD_OF_TWO = 1 + 2 * 2 + 1 + 2  # norm, two pieces and their gathering, join, untilize, argmax
JOIN = 5 - 2  # cut and look up the last id, look up the others, join, tilize, for look up and tilize


@pytest.mark.parametrize(
    ("k", "programs"),
    [
        (1, KEPT + FUSED + TOKEN + ROPE + LAYER + PICK + HEAD_OF_TWO + JOIN),
        (2, 64 + (TOKEN + ROPE + LAYER + HEAD_OF_TWO) + 1),  # and the ids joined
        (3, 101 + (TOKEN + ROPE + LAYER + HEAD_OF_TWO) + 2),  # and both positions moved on
        (7, 139 + 4 * (36 + 2)),
        (8, 291 + 38 + 1 - 2),  # padding to 16 rows; 32 rows of the rope are tiles at once
    ],
)
def test_programs_of_a_round_are_those_counted_by_hand(shipped, k, programs):
    assert drafting(shipped, place_of("N150"), "8B", "performance", EAGLE3, k, 1024).programs == programs


@pytest.mark.parametrize("board", ["N300", "T3K", "P300x2"])
def test_on_several_chips_a_forward_has_two_all_reduces_and_a_gather_and_one_piece_of_the_head(shipped, board):
    one, several = (
        [drafting(shipped, place_of(name), "8B", "performance", EAGLE3, k, 1024) for k in (1, 5)]
        for name in ("P150", board)
    )
    assert [work.exchanges for work in one] == [0, 0] and [work.exchanges for work in several] == [5, 25]
    # an all-reduce is three programs; a gather more, and a piece, its gathering and the join fewer
    assert [b.programs - a.programs for a, b in zip(one, several, strict=True)] == [6 - 2, 5 * (6 - 2)]


@pytest.mark.parametrize(("board", "chips"), [("N150", 1), ("T3K", 8)])
def test_weights_of_a_round_are_those_of_the_shapes(shipped, board, chips):
    hidden, ffn, qkv = 4096, 14336, (32 + 2 * 8) * 128
    layer = (2 * hidden * qkv + hidden * hidden + ffn * hidden) * BFP8 + 2 * hidden * ffn * BFP4
    step = (layer + 32000 * hidden * BFP8) / chips + 4 * 2 * hidden  # norms of token, state, MLP and output
    for k in (1, 5):
        work = drafting(shipped, place_of(board), "8B", "performance", EAGLE3, k, 1024)
        assert work.weights == pytest.approx(k * step + 3 * hidden * hidden * BFP8)


def test_a_head_in_bfp4_reads_fewer_bytes_and_runs_the_same_programs(shipped):
    high, low = (drafting(shipped, place_of("P150"), "3B", name, EAGLE3, 4, 1024) for name in ("performance", "bfp4"))
    assert low.weights < high.weights and (low.programs, low.kv_cache) == (high.programs, high.kv_cache)


def test_the_rows_read_again_are_as_many_as_a_round_can_add(shipped):
    place, row = place_of("N150"), shipped.parts(place_of("N150"), "8B", "performance", 1, 1024)[0].kv_cache
    for k in (1, 4, 7):
        kv_cache = drafting(shipped, place, "8B", "performance", EAGLE3, k, 1024).kv_cache
        assert kv_cache == pytest.approx((k + 1 + k - 1) * row)


def test_a_one_pass_head_reads_all_its_layers_once(shipped):
    place = place_of("N150")
    layer = shipped.parts(place, "8B", "performance", 1, 1024)[0].weights
    fused, output = 4096**2 * BFP8, 4096 * BFP8
    parallel, block = (drafting(shipped, place, "8B", "performance", each, 9, 1024) for each in (P_EAGLE, DFLASH))
    half = 4096 * 6144 * BFP8 + 2 * 4096
    assert parallel.weights == pytest.approx(4 * layer + half + 3 * fused + 32000 * output + 2 * 4096)
    assert block.weights == pytest.approx(5 * layer + 5 * fused + 128256 * output + 2 * 4096)
    chained = drafting(shipped, place, "8B", "performance", EAGLE3, 9, 1024)
    assert parallel.programs < chained.programs and parallel.weights < chained.weights


# ------------------------------------------------------------------------------------------------------- its time
def counts_by_hand():
    """Of 8B on N300: a layer of 10 programs, 4 exchanges and 288 MB; 1000 bytes of KV cache a row and position."""
    forwards = [
        {
            **{"board": "N300", "chips": 2, "model": "8B", "precision": "performance", "layers": 2},
            **{"rows": rows, "position": position, "outside": [30, 1, 0, 0, 0]},
            "layer": [10, 4, 288e6, 1000 * rows * (position // 128 + 1) * 128, 0],
        }
        for rows in ROWS
        for position in (1024, 8192)
    ]
    rounds = [{"board": "N300", "chips": 2, "draft_length": 1, "programs": 3}]
    return Counts({"forwards": forwards, "rounds": rounds, "ttnn": "none"}, "made by hand")


def test_the_time_of_a_round_is_that_of_its_bytes_layers_programs_and_exchanges():
    values = {"wormhole_bytes": 2.0, "kv_block_us": 10.0, "wormhole_layer_us": 54.0, "exchange_us": 20.0}
    values |= {"host_ms": 2.0, "fidelity": 1.0}
    hand = Family(np.array([[values.get(name, 0.0) for name in fit.FORM]]), np.array([0.5]), spread=0.1)
    context, k = 1024 + 128 - 64.5, 3  # reads 1152 positions
    found = HeadTimes(hand, counts_by_hand(), BOARDS["N300"], pair_of("N300", context=context))
    work = drafting(counts_by_hand(), Place("N300", 2), "8B", "performance", EAGLE3, k, context)
    moved = (work.weights + work.other) / 288e6 * 2.0
    block = 2 * 128 * 128 * 1088 / 1024
    # four KV heads of a row on a core each, of all rows beside each other
    read = 1000 * 1152 / block * 0.010 * (4 / (4 * 4) + 2 * 1 / 4)
    beside = (work.programs - 3 * 10) * 54 / published.LAYER_PROGRAMS / 1000
    expected = moved + read + 3 * 0.054 + beside + 15 * 0.020 + 3 * 1.0  # half of the host's time for each step
    assert work.exchanges == 15 and found.drafting(k) == pytest.approx(expected)
    assert found.drafting(0) == 0 and found.between(k) == pytest.approx(1.0)
    assert found.verifying(k + 1) == pytest.approx(Times.verifying(found, k + 1))


def test_a_step_costs_a_small_part_of_a_targets_step(shipped, family):
    """Of the weights that a plain step streams 5, 7 and 11 %, and of its time hardly more."""
    for board in ("N150", "P150"):
        for target, share in (("8B", 0.05), ("3B", 0.067), ("1B", 0.107)):
            each = times(shipped, family, board, target)
            cost = ((each.drafting(5) - each.drafting(4)) / each.decode())[0]
            assert share * 0.7 < cost < share * 1.5, (board, target, cost)


def test_at_equal_acceptance_a_head_beats_a_draft_of_1b_on_every_board(shipped, family):
    acceptance = Acceptance.equal(0.7)
    for board in BOARDS:
        for target in ("8B", "3B"):
            gains = []
            for draft in (HEAD, "1B"):
                each = times(shipped, family, board, target, draft)
                gains.append(speedup(each, best(lambda k, t=each: chain(t, acceptance, k), range(16))).value)
            assert gains[0] > gains[1], (board, target)


def test_fidelity_of_a_head_costs_on_blackhole_alone(shipped, family):
    for board, dearer in (("P150", True), ("N150", False)):
        high, low = (times(shipped, family, board, projections=name).drafting(4)[0] for name in ("HiFi2", "LoFi"))
        assert (high > low) == dearer


@pytest.mark.parametrize("board", ["N150", "P150"])
def test_with_published_acceptance_of_chat_8b_on_one_chip_is_predicted_at_least_1_9_times_as_fast(
    plan, tmp_path, board
):
    found = planned(plan, tmp_path, f"--target 8B --draft head --board {board}")
    assert found["acceptance"]["text"] == "mt-bench"
    assert found["best"]["speedup"] >= 1.9 and found["best"]["speedup_band"][0] >= 1.9


# ------------------------------------------------------------------------------------------- published acceptance
@pytest.mark.parametrize("text", TEXTS.values(), ids=lambda text: text.name)
def test_published_mean_lengths_come_out_exactly(text):
    acceptance = text.acceptance()
    chances = acceptance.chances(15)
    assert acceptance.known == max(text.lengths) and text.source in acceptance.source
    assert all(0 < chance < 1 for chance in chances) and len(set(np.round(chances[acceptance.known :], 12))) == 1
    for k, length in text.lengths.items():
        assert expected_tokens(chances[:k]) == pytest.approx(length)


def test_equal_chances_are_found_again_and_stretches_have_their_own():
    lengths = {k: expected_tokens([0.7] * k) for k in (3, 5, 7)}
    assert reached(lengths) == pytest.approx(np.cumprod([0.7] * 7))
    chances = [0.9, 0.9, 0.9, 0.6, 0.6, 0.3, 0.3]
    lengths = {k: expected_tokens(chances[:k]) for k in (3, 5, 7)}
    assert Acceptance(reached(lengths), "").chances(8) == pytest.approx([*chances, 0.3])


@pytest.mark.parametrize("lengths", [{3: 4.1}, {3: 0.9}, {3: 2.0, 5: 1.9}, {3: 2.0, 5: 4.5}])
def test_lengths_that_no_chances_give_are_refused(lengths):
    with pytest.raises(ValueError, match="tokens do not give"):
        reached(lengths)


# ------------------------------------------------------------------------------------------------------ whole plans
def planned(plan, tmp_path, argv):
    """The JSON of a plan."""
    file = tmp_path / "plan.json"
    assert plan.command([*argv.split(), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_plan_with_a_head_has_the_texts_and_says_what_is_counted_and_whose_acceptance_it_is(plan, tmp_path, capsys):
    found = planned(plan, tmp_path, "--target 8B --draft head --board T3K --text humaneval")
    assert found["settings"]["draft"] == HEAD and found["kind"] == "predicted"
    assert found["acceptance"]["text"] == "humaneval" and found["acceptance"]["known_positions"] == 7
    assert "of the head from its design, not recorded" in found["counts"]
    by_text = {each["text"]: each for each in found["texts"]}
    assert set(by_text) == set(TEXTS) and by_text["humaneval"]["speedup"] == found["best"]["speedup"]
    table = found["table"]
    assert found["best"]["speedup"] == max(row["speedup"] for row in table) == table[found["best"]["k"]]["speedup"]
    assert table[5]["expected_tokens"] == pytest.approx(4.32)
    names = {lever["name"] for lever in found["levers"]}
    assert {"draft in bfp4", "early exit after 4", "a draft that costs nothing"} <= names
    assert not {"tree of 31 tokens", "a chip for the draft"} & names
    assert set(found["memory"]["bytes_per_chip"]) == {"target", "draft"} and found["memory"]["fits"]
    out = " ".join(capsys.readouterr().out.split())
    assert "8B with an EAGLE-3 draft head on T3K, context 1024: PREDICTED" in out
    assert "on GPUs" in out and "SpecForge" in out and "* acceptance beyond position 7 was not measured" in out


def test_texts_that_are_drafted_better_are_faster_and_drafted_further(plan, tmp_path):
    found = planned(plan, tmp_path, "--target 8B --draft HEAD --board P150")
    by_text = {each["text"]: each for each in found["texts"]}
    order = [by_text[name] for name in ("financeqa", "mt-bench", "humaneval", "math500")]
    assert [each["speedup"] for each in order] == sorted(each["speedup"] for each in order)
    assert [each["k"] for each in order] == sorted(each["k"] for each in order) and order[0]["k"] < order[-1]["k"]


def test_an_acceptance_of_ones_own_is_taken_in_place_of_the_published(plan, tmp_path):
    pair = "--target 3B --draft head --board N150"
    speedups = [planned(plan, tmp_path, f"{pair} --acceptance {a}")["best"]["speedup"] for a in (0, 0.5, 0.8, 1)]
    assert speedups[0] == 1 and sorted(set(speedups)) == speedups
    found = planned(plan, tmp_path, f"{pair} --acceptance 0.6 --num-draft-tokens 4")
    assert found["acceptance"]["text"] is None and found["best"]["k"] == 4
    assert found["table"][4]["expected_tokens"] == pytest.approx(sum(0.6**i for i in range(5)))


@pytest.fixture(scope="module")
def overview(plan, tmp_path_factory):
    return planned(plan, tmp_path_factory.mktemp("heads"), "--heads")


def test_the_overview_has_every_target_board_and_text_and_equals_single_plans(plan, tmp_path, overview):
    entries = {(entry["target"], entry["board"]): entry for entry in overview["entries"]}
    assert set(entries) == {(size, board) for size in SIZES for board in BOARDS}
    for (target, _), entry in entries.items():
        assert [each["text"] for each in entry["texts"]] == list(TEXTS) and entry["fits"]
        assert (entry["draft_model"] is None) == (target == "1B")
        for each in (*entry["texts"], *([entry["draft_model"]] if entry["draft_model"] else [])):
            low, high = each["speedup_band"]
            assert low <= each["speedup"] <= high
        if entry["draft_model"]:
            assert entry["at_draft_acceptance"]["speedup"] > entry["draft_model"]["speedup"]
    alone = planned(plan, tmp_path, "--target 3B --draft head --board N300")
    assert alone["texts"] == entries["3B", "N300"]["texts"]
    model = planned(plan, tmp_path, "--target 8B --draft 1B --board P300x2")["best"]
    assert entries["8B", "P300x2"]["draft_model"]["speedup"] == model["speedup"]


def test_the_shipped_overview_is_what_is_predicted_today(overview):
    shipped = json.loads(OVERVIEW.read_text())
    remedy = "run scripts/plan.py --heads --json docs/results/plan-heads.json and scripts/tables.py"
    for then, now in zip(shipped["entries"], overview["entries"], strict=True):
        for name in ("texts", "one_pass", "draft_model", "at_draft_acceptance"):
            assert same(then[name], now[name]), remedy
    assert shipped["acceptance"] == overview["acceptance"], remedy


def same(then, now):
    if isinstance(now, dict):
        return then.keys() == now.keys() and all(same(then[key], now[key]) for key in now)
    if isinstance(now, list):
        return len(then) == len(now) and all(map(same, then, now))
    return then == (pytest.approx(now, rel=1e-6) if isinstance(now, float) else now)


def test_a_one_pass_head_that_gives_the_tokens_to_be_equal_is_as_fast_as_the_chain(overview, shipped, family):
    for entry in overview["entries"]:
        for each in entry["one_pass"]:
            for text in each["texts"]:
                chained = text["chain"]
                assert text["draft_ms"] < chained["draft_ms"] or text["k"] > chained["k"]
                ratio = text["speedup_if_alike"] / chained["speedup"]
                assert text["tokens_if_alike"] / text["tokens_to_equal"] == pytest.approx(ratio)
    chains = times(shipped, family, "N150")
    parallel = PEagleTimes(family, shipped, BOARDS["N150"], chains.pair)
    growth = (parallel.drafting(7) - parallel.drafting(2))[0], (chains.drafting(7) - chains.drafting(2))[0]
    assert 0 < growth[0] < growth[1] / 10  # tokens of a pass cost rows, of a chain forwards


def test_the_overview_as_markdown_is_tables_with_a_cell_for_every_column(plan, capsys):
    assert plan.command(["--heads", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.count("### ") == 2 and "PREDICTED" in text and "measured by others" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


# ------------------------------------------------------------------------------------------------------- memory
def test_a_heads_memory_is_its_weights_an_embedding_table_a_cache_of_one_layer_and_the_states():
    config = head_config(named_config("8B"))
    matrices = (2 * 4096 * 6144 + 4096 * 4096 + 14336 * 4096 + 32000 * 4096 + 3 * 4096 * 4096) * BFP8
    matrices += 2 * 4096 * 14336 * BFP4
    assert weight_bytes(config, precision_named("performance"), 1) == round(matrices + 2 * (4 * 4096 + 32000 * 4096))
    found = memory_plan(config, precision_named("performance"), 1, 1024, 0, 12)
    target = memory.plan(named_config("8B"), precision_named("performance"), 1, 1024, 0, dram_banks=12)
    assert found.kv_cache == target.kv_cache // 32
    assert found.activations > 2 * 1024 * 3 * 4096
    low = found.changed(precision=precision_named("bfp4"))
    assert low.weights < found.weights and low.changed(precision=found.precision) == found
    assert found.changed(chips=8).weights < found.weights


def test_8b_with_a_head_fits_one_chip_and_what_does_not_is_refused_with_a_remedy(plan, tmp_path):
    assert memory_of(BOARDS["N150"], pair_of("N150"), 7).refusal is None
    found = planned(plan, tmp_path, "--target 8B --draft head --board N150 --context 131072")
    assert not found["memory"]["fits"] and "too little: use --max-seq-len" in found["memory"]["refusal"]


def test_levers_of_a_head_draft_with_it(shipped, family):
    each = times(shipped, family, "T3K")
    acceptance = TEXTS["mt-bench"].acceptance()
    chosen = best(lambda k: chain(each, acceptance, k), range(16))
    found = {lever.name: lever for lever in levers(each, acceptance, range(16), chosen)}
    assert found["draft in bfp4"].gain.low > 1 and found["early exit after 4"].gain.value < 1
    assert found["a draft that costs nothing"].speedup.value == max(lever.speedup.value for lever in found.values())


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--target head --draft 1B --board N150", "no Llama size is called 'head'"),
        ("--target 8B --draft heads --board N150", "no Llama size is called 'heads'"),
        (
            "--target 8B --draft head --board N150 --text poems",
            "no acceptance is published for text 'poems': use one of",
        ),
        (
            "--target 8B --draft 1B --board N150 --text gsm8k",
            "--text gsm8k is published acceptance of draft heads: use",
        ),
        ("--target 8B --draft head --board N150 --text gsm8k --acceptance 0.5", "exclude each other"),
        ("--target 8B --draft head --board N150 --text gsm8k --acceptance-from x.json", "exclude each other"),
        ("--target 8B --draft head --board E75", "unknown board 'E75'"),
        ("--target 8B --draft head --board N150 --draft-precision fp8", "no precision is called 'fp8'"),
        ("--heads --target 8B", "--heads plans all targets, boards and texts: leave out --target"),
        ("--heads --acceptance 0", "leave out --acceptance"),
        ("--heads --capture", "leave out --capture"),
        ("--heads --context 0", "--context 0 is outside 1..131072"),
        ("--heads --precision int4", "no precision is called 'int4'"),
        ("--heads --json /nowhere/at/all.json", "cannot write --json /nowhere/at/all.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(plan, capsys, argv, message):
    assert run_command(lambda: plan.command(argv.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_an_unknown_kind_of_text_names_those_there_are():
    with pytest.raises(UserError, match="mt-bench, gsm8k, math500"):
        text_named("x")
