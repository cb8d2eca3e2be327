"""Ways to draft, from end to end: every drafter with fixed and automatic lengths, what is reported of it and shown."""

import re

import pytest

import models.llm
from demo.harness import main
from models.options import EMBEDDED_DRAFT
from tests.demo_fixtures import FOUR, make_tokenizer, refused, texts, write_pair

CONTROLLER_KEYS = {
    *("chosen", "lengths", "verify_ms", "draft_ms", "draft_step_ms", "prefill_token_ms"),
    *("break_even", "acceptance", "trust"),
}
SOURCES = {
    "model": {"model"},
    "prompt-lookup": {"lookup", "lookup-short"},
    "combined": {"lookup", "lookup-short", "model"},
    "tree": {"tree"},
    "early-exit": {"early-exit"},
}
# Of the embedded target's 16 layers the first 12 are right now and then; it was not trained to be left early.
DRAFTERS = {name: ["--drafter", name] + ["--exit-layer", "12"] * (name == "early-exit") for name in SOURCES}


def check_texts(results):
    """Greedy texts are their baselines'. Only a tree's may differ, in bf16 and at a near-tie, and then that is told."""
    settings = results["settings"]
    if results["outputs_identical"] or settings["drafter"] != "tree" or settings["dtype"] == "fp32":
        assert results["outputs_identical"] is True
    else:
        assert results["divergence"]["top2_margin"] < 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("drafter", SOURCES)
def test_every_drafter_writes_the_baselines_text_with_any_draft_lengths(drafter, dtype, run, all_lengths):
    argv = (*DRAFTERS[drafter], "--dtype", dtype, "--max-prompts", "2")
    code, results = run(*argv, models=False, max_new_tokens=30)
    assert code == 0
    check_texts(results)
    chosen, spec = results["controller"]["chosen"], results["speculative"]
    assert len(chosen) == 2 and set(sum(chosen, [])) > {0, 1, 2}
    tokens, levels = spec["drafted"], sum(map(sum, chosen))
    assert tokens > levels if drafter == "tree" else tokens == levels
    assert spec["sources"] and set(spec["sources"]) <= SOURCES[drafter]


@pytest.mark.parametrize("drafter", SOURCES)
def test_drafters_with_a_fixed_length_write_the_baselines_text(drafter, run, capsys):
    code, results = run(*DRAFTERS[drafter], *FOUR, "--max-prompts", "3", models=False, max_new_tokens=30)
    assert code == 0
    check_texts(results)
    spec = results["speculative"]
    assert set(spec["sources"]) == SOURCES[drafter]
    assert sum(counts["drafted"] for counts in spec["sources"].values()) == spec["drafted"] > 0
    assert sum(counts["rounds"] for counts in spec["sources"].values()) <= spec["rounds"]
    assert 0 < spec["acceptance_rate"] < 1
    assert spec["mean_acceptance_length"] == pytest.approx(1 + spec["acceptance_rate"] * spec["mean_draft_length"])
    assert (spec["mean_draft_length"] == 4) == (drafter != "tree")
    assert results["controller"] is None
    out = capsys.readouterr().out
    assert ("by model" in out) == (drafter == "combined")
    assert ("by lookup, short match" in out) == (drafter in ("combined", "prompt-lookup"))


@pytest.mark.parametrize("drafter", SOURCES)
def test_sequential_verification_writes_the_same_text_or_is_refused(drafter, run, capsys):
    argv = (*DRAFTERS[drafter], "--verification", "sequential", "--max-prompts", "1")
    code, results = run(*argv, models=False, max_new_tokens=12)
    if drafter == "tree":
        assert code == 2 and "--drafter tree" in capsys.readouterr().err
    else:
        assert code == 0
        assert (results["outputs_identical"], results["settings"]["num_draft_tokens"]) == (True, 4)
        assert results["speculative"]["drafted"] > 0


@pytest.mark.parametrize("nodes", [1, 7, 31])
def test_a_tree_counts_levels_apart_from_tokens(nodes, run, capsys):
    argv = ("--drafter", "tree", "--tree-nodes", str(nodes), *FOUR, "--dtype", "fp32", "--max-prompts", "2")
    code, results = run(*argv, models=False, max_new_tokens=20)
    assert code == 0
    assert results["outputs_identical"] is True
    spec, settings = results["speculative"], results["settings"]
    assert (settings["tree_nodes"], settings["exit_layer"]) == (nodes, None)
    assert spec["mean_draft_length"] <= min(nodes, 4) and len(spec["acceptance_by_position"]) <= min(nodes, 4)
    assert spec["tree_tokens_per_round"] == nodes
    out = capsys.readouterr().out
    assert re.search(rf"tree tokens per round +{nodes}\.00", out) and "at level 1" in out and "position" not in out
    assert re.search(rf"mean draft length +{spec['mean_draft_length']:.2f} levels", out)
    assert f"tree of up to {nodes} token" in out


def test_a_bf16_tree_that_wrote_another_text_says_where_that_comes_from(run, wrong_third_token, capsys):
    for dtype in ("bf16", "fp32"):
        code, results = run("--drafter", "tree", "--prompt", "abc", "--dtype", dtype)
        assert code == 0
        assert results["outputs_identical"] is False
        assert ("side branches lie elsewhere" in capsys.readouterr().out) == (dtype == "bf16")


@pytest.mark.parametrize("length", ["3", "auto"])
def test_an_exit_layer_is_chosen_by_measurement_and_reported(length, run, deep_target, capsys):
    argv = ("--drafter", "early-exit", "--target", str(deep_target), "--prompt", "def", "--num-draft-tokens", length)
    code, results = run(*argv, models=False)
    assert code == 0
    assert results["outputs_identical"] is True
    chosen, settings = results["early_exit"], results["settings"]
    assert [each["exit_layer"] for each in chosen["candidates"]] == [1, 2, 3]
    lengths = ["3"] if length == "3" else ["1", "2", "3", "4", "5", "6"]
    for each in chosen["candidates"]:
        assert list(each["speed_ups"]) == list(each["tokens_per_round"]) == lengths
        assert 0 <= each["agreement"] <= 1 and each["step_s"] > 0
    best = next(each for each in chosen["candidates"] if each["exit_layer"] == chosen["exit_layer"])
    everything = [speed_up for each in chosen["candidates"] for speed_up in each["speed_ups"].values()]
    assert chosen["speed_up"] == best["speed_ups"][str(chosen["draft_length"])] == max(everything)
    assert chosen["measured_tokens"] == 63
    assert (settings["exit_layer"], settings["tree_nodes"]) == (chosen["exit_layer"], None)
    assert (settings["draft"], settings["draft_dtype"], results["memory"]["draft"]) == (None, None, None)
    out, err = capsys.readouterr()
    assert f"early exit after layer {chosen['exit_layer']} of 4: " in err
    assert re.search(rf"early exit after layer +{chosen['exit_layer']} *\n", out)


def test_a_named_exit_layer_is_not_measured(run, deep_target, capsys):
    argv = ("--drafter", "early-exit", "--exit-layer", "2", "--target", str(deep_target), "--prompt", "def", *FOUR)
    code, results = run(*argv, models=False)
    assert code == 0
    assert (results["early_exit"], results["settings"]["exit_layer"]) == (None, 2)
    assert "early exit after layer 2, 4 tokens a round" in capsys.readouterr().out


def test_a_baseline_has_no_settings_of_drafters(run, deep_target):
    for flags in (["--drafter", "early-exit"], ["--drafter", "tree"]):
        code, results = run(*flags, "--target", str(deep_target), "--prompt", "def", models=False, mode="baseline")
        assert code == 0
        assert (results["settings"]["tree_nodes"], results["settings"]["exit_layer"]) == (None, None)
        assert results["early_exit"] is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_without_a_drafter_both_paths_decode_plainly(dtype, run, capsys):
    code, results = run("--drafter", "none", "--dtype", dtype, "--max-prompts", "2", models=False)
    assert code == 0
    assert results["outputs_identical"] is True
    spec = results["speculative"]
    assert (spec["drafted"], spec["sources"], spec["rounds"]) == (0, {}, spec["plain_rounds"])
    assert (results["settings"]["drafter"], results["settings"]["num_draft_tokens"]) == ("none", 0)
    assert results["controller"] is None
    out = capsys.readouterr().out
    assert "drafter none: plain decoding" in out and "slower" not in out


@pytest.mark.parametrize("drafter", ["prompt-lookup", "early-exit", "none"])
def test_where_no_draft_model_is_used_none_is_opened_or_reported(drafter, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DRAFT_MODEL", str(tmp_path / "missing"))
    flags = DRAFTERS.get(drafter, ["--drafter", drafter])
    code, results = run(*flags, "--max-prompts", "1", "--target", EMBEDDED_DRAFT)
    assert code == 2 and "missing" not in capsys.readouterr().err  # the pair's --draft is refused here
    code, results = run(*flags, "--max-prompts", "1", models=False)
    assert code == 0
    assert results["memory"]["draft"] is None
    assert (results["settings"]["draft"], results["settings"]["draft_dtype"]) == (None, None)
    assert results["speculative"]["load_s"] == results["baseline"]["load_s"]
    out, err = capsys.readouterr()
    assert "loading draft" not in err
    assert not [line for line in out.splitlines() if line.startswith(("draft ", "weights ")) and "+" in line]


def test_prompt_lookup_needs_no_draft_that_fits_the_target(pair, run):
    code, results = run("--drafter", "prompt-lookup", *FOUR, "--target", str(pair[0]), "--prompt", "def", models=False)
    assert code == 0
    assert results["outputs_identical"] is True


def test_a_context_shorter_than_the_longest_draft_will_do(run):
    code, results = run("--prompt", "def", "--max-seq-len", "5")
    assert code == 0
    assert results["outputs_identical"] is True


@pytest.mark.parametrize(("dtype", "longest"), [("bf16", 6), ("fp32", 15)])
def test_one_controller_learns_from_all_runs_the_warm_up_included(dtype, longest, run, all_lengths):
    code, results = run("--dtype", dtype, "--prompt", "def", "--prompt", "self")
    assert code == 0
    (controller,) = all_lengths
    assert controller.generations == 3
    assert controller.lengths == list(range(longest + 1))
    assert controller.rounds > sum(len(lengths) for lengths in results["controller"]["chosen"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("drafter", SOURCES)
def test_automatic_lengths_are_reported_with_what_they_were_chosen_by(drafter, dtype, run):
    argv = (*DRAFTERS[drafter], "--dtype", dtype, "--max-prompts", "2")
    code, results = run(*argv, models=False, max_new_tokens=8)
    assert code == 0
    fixed_rows = results["settings"]["fixed_rows"]
    assert (results["settings"]["num_draft_tokens"], fixed_rows) == ("auto", 7 if dtype == "bf16" else None)
    controller = results["controller"]
    assert set(controller) >= CONTROLLER_KEYS
    assert controller["lengths"] == list(range(7 if fixed_rows else 16))
    # Measured before anything is drafted; where rows are fixed, all forwards are one.
    measured = set(controller["verify_ms"])
    assert measured == {"7"} if fixed_rows else measured >= {"1", "2", "4", "7", "11", "16"}
    assert all(milliseconds > 0 for milliseconds in controller["verify_ms"].values())
    rows = [row["speculative"] for row in results["prompts"]]
    assert [len(lengths) for lengths in controller["chosen"]] == [row["rounds"] for row in rows]
    if drafter != "tree":
        assert [sum(lengths) for lengths in controller["chosen"]] == [row["drafted"] for row in rows]


def test_automatic_lengths_are_shown_while_they_run_and_in_the_end(run, all_lengths, terminal, capsys):
    code, results = run("--prompt", "def", "--no-color", max_new_tokens=30)
    assert code == 0
    out = capsys.readouterr().out
    assert "draft model, auto: 0 to 6 tokens a round" in out
    shown = {int(k) for k in re.findall(r"drafting (\d)", out)}
    assert shown == set(sum(results["controller"]["chosen"], []))
    assert re.search(r"\d\.\d drafted a round", out)
    assert all(row in out for row in ("mean draft length", "plain rounds", "break-even acceptance"))


@pytest.mark.parametrize(
    ("flags", "header", "live"),
    [
        ("--drafter model", "draft model, auto: 0 to 6 tokens a round", "draft model"),
        ("", "prompt lookup or draft model, auto: 0 to 6 tokens", "prompt lookup or draft model"),
        ("--drafter tree", "tree of up to 6 tokens, auto: 0 to 6 levels a round", "tree of up to 6 tokens"),
        ("--drafter tree --tree-nodes 3", "tree of up to 3 tokens, auto: 0 to 3 levels", "tree of up to 3 tokens"),
        ("--drafter early-exit", "early exit after layer (to be chosen), auto", "early exit after layer 1"),
        ("--drafter early-exit --exit-layer 1", "early exit after layer 1, auto", "early exit after layer 1"),
        ("--drafter prompt-lookup", "prompt lookup, auto: 0 to 6 tokens a round", "prompt lookup"),
        ("--drafter none", "drafter none: plain decoding", "speculative"),
    ],
)
def test_who_drafts_is_named_while_it_runs(flags, header, live, pair, run, all_lengths, terminal, capsys):
    models = ["--target", str(pair[0])]
    if not flags or "tree" in flags or "model" in flags:
        models += ["--draft", str(pair[1])]
    code, _ = run(*models, *flags.split(), "--prompt", "def", "--no-color", models=False)
    assert code == 0
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert header in out
    assert re.search(rf"^ {re.escape(live)}  \d+/8 tokens", out, re.MULTILINE)
    assert re.search(r"^ baseline  \d+/8 tokens", out, re.MULTILINE)


def test_an_interrupted_run_reports_the_lengths_so_far(run, all_lengths, monkeypatch):
    stream = models.llm.stream

    def interrupted(engine, sequence):
        for number, token in enumerate(stream(engine, sequence), 1):
            yield token
            if sequence.request.drafter and number == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(models.llm, "stream", interrupted)
    code, results = run("--prompt", "def")
    assert code == 130
    assert [len(lengths) for lengths in results["controller"]["chosen"]] == [results["partial"][-1]["rounds"]]


@pytest.mark.parametrize("drafter", SOURCES)
def test_every_drafter_can_be_sampled_with(drafter, run, all_lengths):
    argv = (*DRAFTERS[drafter], "--temperature", "0.7", "--max-prompts", "1")
    code, results = run(*argv, models=False, max_new_tokens=24)
    assert code == 0
    assert results["speculative"]["tokens"] == 24 and results["outputs_identical"] is None
    assert results["speculative"]["drafted"] > 0


@pytest.mark.parametrize("drafter", SOURCES)
def test_every_drafters_samples_repeat_with_their_seed_where_the_length_is_fixed(drafter, run):
    sampling = ("--temperature", "0.7", "--seed", "3")
    argv = (*DRAFTERS[drafter], *FOUR, *sampling, "--max-prompts", "1", "--mode", "speculative")
    first, again = (run(*argv, models=False, max_new_tokens=16)[1] for _ in range(2))
    assert texts(first, "speculative") == texts(again, "speculative")
    assert first["speculative"]["drafted"] > 0


def test_automatic_lengths_on_a_mock_board_have_no_times(run, as_on_a_mock, all_lengths, capsys):
    code, results = run("--prompt", "def", max_new_tokens=30)
    assert code == 0
    controller = results["controller"]
    timed = {"verify_ms", "draft_ms", "draft_step_ms", "prefill_token_ms", "break_even"}
    assert {name for name, value in controller.items() if value is None} == timed
    assert sum(controller["chosen"][0]) == results["speculative"]["drafted"] > 0
    assert "break-even" not in capsys.readouterr().out


def test_a_chosen_exit_layer_on_a_mock_board_has_no_times(deep_target, run, as_on_a_mock, capsys):
    argv = ("--drafter", "early-exit", "--target", str(deep_target), "--prompt", "def", *FOUR)
    code, results = run(*argv, models=False)
    assert code == 0
    chosen = results["early_exit"]
    assert {name for name, value in chosen.items() if value is None} == {"speed_up", "draft_length"}
    assert {(each["step_s"], each["speed_ups"]) for each in chosen["candidates"]} == {(None, None)}
    out, err = capsys.readouterr()
    assert "early exit after layer" in err and not re.search(r"\dx|expected", out + err)


@pytest.mark.parametrize("layer", [2, 3, 99])
def test_an_exit_layer_that_the_target_lacks_is_refused(layer, pair, capsys):
    argv = ["--target", str(pair[0]), "--drafter", "early-exit", "--exit-layer", str(layer)]
    refused(capsys, argv, f"exit layer {layer}", "between 1 and 1")


def test_what_early_exit_needs_is_checked_before_loading(pair, tmp_path, capsys):
    flat, _ = write_pair(tmp_path, num_hidden_layers=1)
    early = ["--drafter", "early-exit", "--prompt", "def"]
    refused(capsys, ["--target", str(flat), *early], "one layer", "another drafter")
    tokens = len(make_tokenizer().encode("def").ids) + 1  # the first is <bos>
    short = ["--target", str(pair[0]), *early, "--max-seq-len"]
    refused(capsys, [*short, str(tokens + 1)], "--exit-layer auto", "--max-seq-len")
    assert main([*short, str(tokens + 1), "--exit-layer", "1", "--quiet"]) == 0
    assert main([*short, str(tokens + 2), "--quiet"]) == 0


def test_forced_acceptance_is_named_wherever_it_shows(run, pair, capsys, tmp_path):
    page = tmp_path / "run.html"
    argv = ["--target", str(pair[0]), "--force-acceptance", "1", "--num-draft-tokens", "3", "--dtype", "fp32"]
    code, results = run(*argv, "--max-prompts", "1", "--html", str(page), models=False)
    assert code == 0 and results["settings"]["force_acceptance"] == 1.0
    assert results["speculative"]["acceptance_rate"] == 1.0 and results["prompts"][0]["identical"]
    printed = capsys.readouterr().out
    assert "forced acceptance 1.0" in printed and "acceptance rate, forced" in printed
    assert "speed-up with forced acceptance" in printed and "speed-up, forced" in page.read_text(encoding="utf-8")
