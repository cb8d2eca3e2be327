"""What the demos say: headings, tables, and explanations of imaginary runs."""

import io
import re
from types import SimpleNamespace

import pytest

import demo.explain
import demo.wording
from demo.results import RunResults, without_times
from demo.runs import Run
from demo.settings import parse_settings
from demo.wording import UNTIMED, drafter_name, pace, run_settings
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats, Round


def example(speedup=0.8, verification="batched", draft_ms=4.0):
    """The file of an imaginary run: plain steps of 10 ms, rounds of draft_ms + 12 + 0.5 ms with two draft tokens."""
    tokens = {"tokens": 60, "decode_tokens": 59}
    prompt = {"prompt": "def", "prompt_tokens": 1, "prompt_ids": [4], "identical": None, "speedup": None}
    prompt |= {"baseline": None, "speculative": None}
    return {
        "baseline": {"ttft_ms": 5.0, "tok_s_user": 100.0, **tokens, "decode_s": 0.59, "load_s": 1.0},
        "speculative": {
            "ttft_ms": 5.1,
            "tok_s_user": 100 * speedup,
            **tokens,
            "decode_s": 0.7,
            "load_s": 1.5,
            "rounds": 40,
            "plain_rounds": 0,
            "drafted": 80,
            "sources": {"model": {"rounds": 40, "drafted": 80, "accepted": 24}},
            "mean_draft_length": 2,
            "tree_tokens_per_round": None,
            "acceptance_rate": 0.3,
            "mean_acceptance_length": 1.6,
            "acceptance_by_position": [0.55, 0.05],
            "draft_ms": draft_ms,
            "verify_ms": 12.0,
            "fused_ms": None,
            "host_ms": 0.1,
            "host_share": 0.006,
            "draft_prefill_ms": 16.0,
        },
        "speedup": speedup,
        "speedup_median": speedup,
        "ttft_ratio": 1.02,
        "outputs_identical": False,
        "identical_prompts": 1,
        "divergence": {"prompt": 2, "token": 7, "baseline_id": 5, "speculative_id": 6, "top2_margin": 0.0123},
        "interrupted": False,
        "memory": {
            "target": {"weight_bytes": 2_000_000_000, "kv_cache_bytes": 3_000_000},
            "draft": {"weight_bytes": 1_000_000, "kv_cache_bytes": 500_000},
            "peak_process_bytes": 4_000_000_000,
            "peak_cuda_bytes": None,
        },
        "total_s": 12.3,
        "first_token_s": 4.5,
        "warm_up_s": None,
        "machine": {"timed": True},
        "settings": {
            "device": "cpu",
            "dtype": "bf16",
            "fixed_rows": 7,
            "drafter": "model",
            "draft": "models/checkpoints/tiny-draft",
            "num_draft_tokens": 2,
            "tree_nodes": None,
            "exit_layer": None,
            "verification": verification,
            "max_new_tokens": 30,
        },
        "controller": None,
        "early_exit": None,
        "date": "2026-11-26T12:32:53+00:00",
        "versions": {},
        "command": ["demo/simple_text_demo.py"],
        "prompts": [prompt | {"number": number} for number in (1, 2)],
        "partial": [],
    }


def explain_slowdown(results):
    return demo.explain.explain_slowdown(RunResults.from_dict(results))


def summary_sections(results):
    return demo.wording.summary_sections(RunResults.from_dict(results))


def closing_lines(results):
    return demo.wording.closing_lines(RunResults.from_dict(results))


def controller(break_even):
    """Of automatic lengths, with what they cost left out."""
    costs = {name: {} for name in ("verify_ms", "draft_ms", "draft_step_ms", "prefill_token_ms")}
    return {"chosen": [], "lengths": [0, 1, 2], **costs, "break_even": break_even, "acceptance": {}, "trust": {}}


def test_a_slower_run_is_explained_with_its_break_even():
    text = " ".join(explain_slowdown(example()))
    # (4 + 12 + 0.1 + 16 / 40) / 10 = 1.65 plain steps per round; (1.65 - 1) / 2 of the drafted tokens must be accepted
    assert "16.50 ms" in text and "1.65 times a plain step of 10.00 ms" in text
    assert "acceptance rate of 32%" in text and "measured were 30%" in text
    # one draft token: 1.55 tokens per 2 + 12.1 + 0.4 ms
    assert "--num-draft-tokens 1 would give about 1.07x (predicted); auto finds" in text


def test_advice_fits_the_reason():
    dear = explain_slowdown(example(draft_ms=30.0))[-1]
    assert "cheaper" in dear and "use --num-draft-tokens auto" in dear
    assert "not even full acceptance" in explain_slowdown(example(draft_ms=30.0))[1]
    assert "--verification" in explain_slowdown(example(verification="sequential"))[-1]
    short = example()
    short["speculative"]["acceptance_rate"] = None
    assert "--max-new-tokens" in explain_slowdown(short)[-1]


def auto_example(**options):
    """The same run with automatic draft lengths, of which 2.5 were drafted on average."""
    results = example(**options)
    results["settings"]["num_draft_tokens"] = "auto"
    results["speculative"] |= {"mean_draft_length": 2.5, "plain_rounds": 10}
    results["controller"] = controller(0.25)
    return results


def lookup_example(**options):
    """The same run with prompt lookup instead of a draft model."""
    results = example(**options)
    results["settings"] |= {"drafter": "prompt-lookup", "draft": None}
    results["speculative"] |= {"draft_prefill_ms": 0.0, "draft_ms": 0.01}
    results["memory"]["draft"] = None
    return results


def test_automatic_lengths_are_explained_by_their_mean():
    lines = explain_slowdown(auto_example())
    assert "a round that drafts takes 16.50 ms" in lines[0]
    # (1.65 - 1) / 2.5
    assert "acceptance rate of 26% with 2.5 draft tokens on average; measured were 30%" in lines[1]
    assert "--num-draft-tokens" not in lines[2] and "already chosen" in lines[2]
    assert "not even full acceptance" in explain_slowdown(auto_example(draft_ms=40.0))[1]


def test_rounds_that_pay_are_told_from_the_rest():
    results = auto_example()
    results["speculative"]["mean_acceptance_length"] = 1.8
    assert explain_slowdown(results)[-1].startswith("Rounds that draft pay; ")
    results = example()
    results["speculative"]["mean_acceptance_length"] = 1.8
    assert explain_slowdown(results)[-1].startswith("Whole rounds pay; ")


def test_a_short_text_is_no_fault_of_automatic_lengths():
    results = auto_example()
    results["speculative"] |= {"acceptance_rate": None, "mean_draft_length": None, "plain_rounds": 0}
    (line,) = explain_slowdown(results)
    assert "--max-new-tokens" in line and "--num-draft-tokens" not in line and "auto" not in line


def tree_example(**options):
    """The same run with trees of six tokens in two levels."""
    results = example(**options)
    results["settings"] |= {"drafter": "tree", "tree_nodes": 6}
    sources = {"tree": {"rounds": 40, "drafted": 240, "accepted": 24}}
    results["speculative"] |= {"drafted": 240, "tree_tokens_per_round": 6.0, "sources": sources}
    return results


def early_exit_example(speed_up=0.9, **options):
    """The same run with early exit after layer 3, chosen by measurement if a speed-up was expected of it."""
    results = lookup_example(**options)
    results["settings"] |= {"drafter": "early-exit", "exit_layer": 3}
    results["speculative"] |= {"draft_ms": options.get("draft_ms", 4.0)}
    measured = {"measured_tokens": 100, "candidates": []}
    results["early_exit"] = speed_up and {"exit_layer": 3, "draft_length": 2, "speed_up": speed_up, **measured}
    return results


@pytest.mark.parametrize("speedup", [0.8, 1.02])
@pytest.mark.parametrize(
    ("results", "words"),
    [
        (auto_example(), "by the costs measured"),
        (lookup_example(), "no passage came again"),
        (early_exit_example(), "early exit after layer 3; --drafter model"),
    ],
)
def test_where_nothing_was_drafted_the_reason_is_told(results, words, speedup):
    results["speculative"] |= {"drafted": 0, "plain_rounds": 40, "acceptance_rate": None, "mean_draft_length": None}
    (line,) = explain_slowdown(results | {"speedup": speedup})
    assert line.startswith("Nothing was drafted: ") and words in line


def test_where_hardly_anything_was_drafted_no_longer_text_is_asked_for():
    results = auto_example()
    results["speculative"]["plain_rounds"] = 38
    last = explain_slowdown(results)[-1]
    assert "38 of 40 rounds drafted nothing" in last and "write longer" not in last


def test_trees_are_explained_by_their_levels():
    lines = explain_slowdown(tree_example())
    assert "acceptance rate of 32% with trees of 2 levels on average; measured were 30%" in lines[1]
    # Of a smaller tree nothing is known, so nothing is predicted.
    assert "would give" not in lines[2] and "--tree-nodes" in lines[2] and "--drafter model" in lines[2]
    assert "use --num-draft-tokens auto" in lines[2]
    short = tree_example()
    short["speculative"]["acceptance_rate"] = None
    assert "a whole round of 2 levels: " in explain_slowdown(short)[-1]


def test_early_exit_is_explained_by_what_its_layers_promised():
    assert "promised to pay (at best 0.90x)" in explain_slowdown(early_exit_example(draft_ms=30.0))[-1]
    last = explain_slowdown(early_exit_example(1.1, draft_ms=30.0))[-1]
    assert "too little (3 of them here)" in last and "--exit-layer" not in last
    last = explain_slowdown(early_exit_example(None, draft_ms=30.0))[-1]
    assert "try --exit-layer auto, or use --drafter model" in last


def test_the_table_counts_a_trees_levels_and_tokens_apart():
    rows = {label.strip(): cell for section in summary_sections(tree_example()) for label, _, cell, _ in section}
    assert (rows["mean draft length"], rows["tree tokens per round"]) == ("2.00 levels", "6.00")
    assert rows["at level 1-2"] == "55% 5%" and not any("position" in label for label in rows)
    rows = {label.strip(): cell for section in summary_sections(early_exit_example()) for label, _, cell, _ in section}
    assert rows["early exit after layer"] == "3" and "tree tokens per round" not in rows


def test_the_table_of_a_run_that_drafted_nothing_says_how_often():
    results = auto_example()
    nothing = {"acceptance_rate": None, "mean_acceptance_length": None, "mean_draft_length": None}
    results["speculative"] |= {"plain_rounds": 40, "acceptance_by_position": [], "sources": {}, **nothing}
    rows = {label.strip(): cell for section in summary_sections(results) for label, _, cell, _ in section}
    assert (rows["plain rounds"], rows["break-even acceptance"]) == ("40 of 40", "25.0%")
    assert "acceptance rate" not in rows and "mean draft length" not in rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"fixed_rows": None}, "--row-invariant"),
        ({"fixed_rows": None, "dtype": "fp16"}, "fp16 rounds"),
        ({"fixed_rows": None, "dtype": "fp32"}, None),
        ({"drafter": "tree"}, "side branches"),
        ({"drafter": "tree", "dtype": "fp32"}, None),
    ],
)
def test_a_text_that_differs_for_a_known_reason_is_explained(changes, words):
    results = example()
    results["settings"] |= changes
    lines = [line for line, _ in closing_lines(results)]
    told = lines[lines.index(next(line for line in lines if line.startswith("outputs identical"))) + 1]
    assert words in told if words else told.startswith("peak memory")
    results["outputs_identical"] = True
    assert not any("near-tie" in line for line, _ in closing_lines(results))


def named(*argv, exit_layer=None):
    """As much of a session as its name needs."""
    chosen = parse_settings(list(argv), None, {})
    chosen = chosen.resolved_as(chosen.engine.resolved("combined"))
    return SimpleNamespace(
        calibration=None,
        settings=chosen,
        sampling=SamplingParams(),
        exit_layer=exit_layer,
        controller=SimpleNamespace(lengths=range(chosen.longest_draft + 1)),
        fused=False,
        prompts=["a", "b"],
    )


@pytest.mark.parametrize(
    ("argv", "exit_layer", "name", "length"),
    [
        ("--drafter model", None, "draft model", "auto: 0 to 6 tokens a round"),
        ("--dtype fp32", None, "prompt lookup or draft model", "auto: 0 to 15 tokens a round"),
        ("--drafter tree", None, "tree of up to 6 tokens", "auto: 0 to 6 levels a round"),
        ("--drafter tree --tree-nodes 1 --num-draft-tokens 3", None, "tree of up to 1 token", "1 level a round"),
        ("--drafter early-exit --num-draft-tokens 3", 4, "early exit after layer 4", "3 tokens a round"),
        ("--drafter early-exit", None, "early exit after layer (to be chosen)", "auto: 0 to 6 tokens a round"),
        ("--drafter prompt-lookup --num-draft-tokens 31", None, "prompt lookup", "31 tokens a round"),
    ],
)
def test_the_heading_names_who_drafts_how_much(argv, exit_layer, name, length):
    session = named(*argv.split(), exit_layer=exit_layer)
    assert drafter_name(session) == name
    assert f", {name}, {length}, batched verification" in run_settings(session)


def test_the_heading_lists_lengths_that_leave_some_out():
    session = named("--drafter", "model")
    session.controller.lengths = [0, 1, 3, 7, 15]
    assert "draft model, auto: 0, 1, 3, 7 or 15 tokens a round, " in run_settings(session)


def test_a_trees_pace_is_that_of_its_levels():
    session = named("--drafter", "tree")
    session.timed = False
    rounds = [Round(6, kept, kept + 1, parents=(-1, -1, 0, 1, 2, 2)) for kept in (1, 2)]  # three levels each
    run = Run("speculative", None, stats=GenerationStats(rounds=rounds))
    assert pace(run, session) == "50% accepted, drafting 6"
    run.stats.finish_reason = "length"
    assert pace(run, session) == "50% accepted, 6.0 drafted a round"


def test_a_drafter_without_a_model_is_explained_without_one():
    lines = explain_slowdown(lookup_example())
    assert "draft 0.01, verify 12.00, host 0.10)" in lines[0] and "prefill" not in lines[0]
    results = lookup_example()
    results["speculative"] |= {"mean_acceptance_length": 1.15, "acceptance_by_position": [0.1, 0.05]}
    assert "--drafter model" in explain_slowdown(results)[-1]


def test_without_a_drafter_nothing_is_explained():
    results = lookup_example()
    results["settings"] |= {"drafter": "none", "num_draft_tokens": 0}
    assert explain_slowdown(results) == []


def test_memory_without_a_draft_model_is_the_targets():
    rows = {label: cells for rows in summary_sections(lookup_example()) for label, *cells in rows}
    assert rows["weights"] == ["2.00 GB", "2.00 GB", ""]


def test_automatic_lengths_and_several_sources_have_rows_of_their_own():
    results = auto_example()
    results["speculative"]["sources"] |= {
        "lookup": {"rounds": 8, "drafted": 20, "accepted": 15},
        "lookup-short": {"rounds": 4, "drafted": 8, "accepted": 1},
    }
    cells = {label.strip(): speculative for rows in summary_sections(results) for label, _, speculative, _ in rows}
    assert cells["by lookup, short match"] == "12.5% in 4 rounds"
    assert (cells["mean draft length"], cells["plain rounds"]) == ("2.50 tokens", "10 of 40")
    assert cells["break-even acceptance"] == "25.0%"
    assert (cells["by model"], cells["by lookup"]) == ("30.0% in 40 rounds", "75.0% in 8 rounds")
    cells = {label.strip() for rows in summary_sections(example()) for label, *_ in rows}
    assert not cells & {"mean draft length", "plain rounds", "break-even acceptance", "by model"}


def fused_example(**options):
    """The same run with draft and verification in one program of 16 ms."""
    results = example(**options)
    results["speculative"] |= {"draft_ms": None, "verify_ms": None, "fused_ms": 16.0}
    return results


def test_a_fused_round_is_explained_as_a_whole():
    lines = explain_slowdown(fused_example())
    assert "16.50 ms (draft and verify 16.00 in one program, host 0.10" in lines[0]
    assert "1.65 times a plain step of 10.00 ms" in lines[0]
    assert "acceptance rate of 32%" in lines[1]
    assert "would give" not in lines[2]  # what one draft token costs in it is not known, so nothing is predicted
    assert "--num-draft-tokens auto" in lines[2]
    automatic = fused_example()
    automatic["controller"] = controller(None)
    assert "already chosen" in explain_slowdown(automatic)[2]


def test_a_fused_round_has_one_time():
    cells = {label: speculative for rows in summary_sections(fused_example()) for label, _, speculative, _ in rows}
    assert cells["draft + verify per round"] == "16.00 ms (one program)"
    assert not {"draft per round", "verify per round"} & set(cells)
    cells = {label: speculative for rows in summary_sections(example()) for label, _, speculative, _ in rows}
    assert (cells["draft per round"], cells["verify per round"]) == ("4.00 ms", "12.00 ms")
    assert "draft + verify per round" not in cells


def test_without_times_a_table_has_no_rows_for_them():
    results = without_times(RunResults.from_dict(example() | {"machine": {"timed": False, "medium": "mock"}}))
    text = " ".join(cell for rows in demo.wording.summary_sections(results) for row in rows for cell in row)
    assert not re.search(r"\bm?s\b|tokens/s|time|\dx", text), text
    assert "1.60 tokens" in text and "2.00 GB" in text
    lines = [line for line, _ in demo.wording.closing_lines(results)]
    assert lines[-1] == UNTIMED["mock"]
    assert not any("time:" in line or "speed-up" in line for line in lines)
    assert demo.explain.explain_slowdown(results) == []
    assert UNTIMED["mock"] not in [line for line, _ in closing_lines(example())]


def test_models_on_several_chips_say_what_each_chip_holds():
    results = example()
    for role, chips in (("target", 4), ("draft", 1)):
        model = results["memory"][role]
        model["chips"] = chips
        model |= {f"{name}_per_chip": model[name] // chips for name in ("weight_bytes", "kv_cache_bytes")}
    rows = [row for rows in summary_sections(results) for row in rows]
    where = [label for label, *_ in rows].index("weights")
    assert rows[where][1:3] == ("2.00 GB", "2.00 GB + 1.0 MB")
    assert rows[where + 1] == ("  per chip", "500.0 MB", "500.0 MB + 1.0 MB", "")
    results["memory"]["target"]["chips"] = 1
    assert "  per chip" not in [label for rows in summary_sections(results) for label, *_ in rows]


def test_compiling_is_told_apart_from_loading():
    assert "loading, compiling (4.5 s) and warm-up" in closing_lines(example() | {"warm_up_s": 4.5})[-1][0]
    assert "loading and warm-up" in closing_lines(example())[-1][0]


def test_a_faster_run_needs_no_explanation():
    assert explain_slowdown(example(speedup=1.2)) == []


def test_closing_lines_name_the_first_divergence():
    text = "\n".join(line for line, _ in closing_lines(example()))
    assert "no (1 of 2 prompts; first divergence: prompt 2, token 7, top-2 margin 0.0123)" in text
    assert "4.00 GB" in text and "12.3 s" in text and "0.80x" in text


def test_many_positions_take_several_table_rows():
    results = example()
    results["speculative"]["acceptance_by_position"] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    cells = {label.strip(): speculative for rows in summary_sections(results) for label, _, speculative, _ in rows}
    assert cells["at position 1-4"] == "90% 80% 70% 60%"
    assert cells["at position 5-6"] == "50% 40%"


# ----------------------------------------------------------------------------------------------------- display
def test_a_table_fits_80_columns_and_is_not_cut():
    from rich.console import Console

    from demo.display import QuietView

    combined = auto_example()
    combined["speculative"]["sources"]["lookup-short"] = {"rounds": 8888, "drafted": 20, "accepted": 15}
    for results in (example(), fused_example(), combined, tree_example()):
        out = io.StringIO()
        view = QuietView(Console(file=out, force_terminal=True, no_color=True, width=80), None)
        view.summary(RunResults.from_dict(results))
        text = out.getvalue()
        assert "…" not in text
        assert "2.00 GB + 1.0 MB" in text and "1.60 tokens" in text and "0.100 ms (0.6%)" in text
