"""The parts of the demos that need no run: flags, prompt files, the JSON file, words and tables."""

import io
import json
import os
import re
import sys

import pytest

from demo.arguments import EMBEDDED_DRAFT, EMBEDDED_TARGET, build_parser, parse_settings, read_prompts
from demo.environment import check_writable, write_json
from demo.report import _without_times
from demo.wording import MOCK, closing_lines, explain_slowdown, summary_sections
from models.errors import UserError


def settings(*argv, mode=None, environ=None):
    return parse_settings(list(argv), mode, environ or {})


def prompts_of(path, text):
    path.write_text(text, encoding="utf-8")
    return read_prompts(settings("--prompts", str(path)))


# ------------------------------------------------------------------------------------------------------- flags
def test_defaults_are_the_embedded_pair_greedy_in_bf16():
    defaults = settings()
    assert (defaults.target, defaults.draft) == (str(EMBEDDED_TARGET), str(EMBEDDED_DRAFT))
    assert (defaults.mode, defaults.device, defaults.dtype, defaults.draft_dtype) == ("compare", "cpu", "bf16", "bf16")
    assert (defaults.drafter, defaults.num_draft_tokens) == ("model", 4)
    assert (defaults.temperature, defaults.max_new_tokens, len(read_prompts(defaults))) == (0.0, 30, 10)


def test_environment_stands_for_flags_and_a_flag_wins():
    environ = {"HF_MODEL": "from-env", "DRAFT_MODEL": "draft-from-env"}
    assert settings(environ=environ).target == "from-env"
    assert settings(environ=environ).draft == "draft-from-env"
    assert settings("--target", "flag", "--draft", "other", environ=environ).target == "flag"
    assert settings("--target", "flag", "--draft", "other", environ=environ).draft == "other"


def test_another_target_has_no_draft_unless_one_is_named():
    assert settings("--target", "somewhere").draft is None
    assert settings(environ={"HF_MODEL": "somewhere"}).draft is None


@pytest.mark.parametrize(("k", "rows"), [(0, 1), (4, 5), (6, 7), (7, None), (31, None), ("auto", 7)])
def test_fixed_rows_are_the_drafted_tokens_and_one_more(k, rows):
    assert settings("--num-draft-tokens", str(k)).fixed_rows == rows


def test_rows_are_fixed_where_that_is_free_or_asked_for():
    assert settings("--dtype", "fp32").fixed_rows is None
    assert settings("--dtype", "fp32", "--row-invariant").fixed_rows == 5
    assert settings("--num-draft-tokens", "auto").fixed_rows == 7
    assert settings("--num-draft-tokens", "31", "--row-invariant").fixed_rows == 32
    assert settings("--no-row-invariant").fixed_rows is None


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        ("", 4),
        ("--device cuda --num-draft-tokens auto", "auto"),
        ("--drafter prompt-lookup --num-draft-tokens auto", "auto"),
        ("--num-draft-tokens 3", 3),
        ("--num-draft-tokens auto --dtype fp32", "auto"),
        ("--drafter none", 0),
        ("--drafter none --num-draft-tokens 0", 0),
        ("--verification sequential", 4),
        ("--verification sequential --num-draft-tokens 6", 6),
        ("--device tt", 4),
        ("--device tt --drafter none", 0),
        ("--device tt --num-draft-tokens 3", 3),
    ],
)
def test_draft_lengths_are_what_was_asked_for_and_else_four(argv, length):
    assert settings(*argv.split()).num_draft_tokens == length


def test_automatic_lengths_keep_within_the_rows_that_are_free():
    auto = settings("--num-draft-tokens", "auto")
    assert (auto.auto, auto.longest_draft) == (True, 6)
    fixed = settings("--num-draft-tokens", "9")
    assert (fixed.auto, fixed.longest_draft) == (False, 9)


@pytest.mark.parametrize(
    ("drafter", "drafts", "model"),
    [("model", True, True), ("combined", True, True), ("prompt-lookup", True, False), ("none", False, False)],
)
def test_a_draft_model_is_used_by_the_drafters_that_have_one(drafter, drafts, model):
    chosen = settings("--drafter", drafter)
    assert (chosen.drafts, chosen.uses_draft_model) == (drafts, model)
    chosen = settings("--drafter", drafter, mode="baseline")
    assert (chosen.drafts, chosen.uses_draft_model) == (False, False)


def test_the_baseline_demo_has_one_mode():
    assert settings(mode="baseline").paths == ("baseline",)
    with pytest.raises(UserError, match="--mode"):
        settings("--mode", "compare", mode="baseline")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-draft-tokens", "-1"], ["--num-draft-tokens", "-1", "0 to 31"]),
        (["--num-draft-tokens", "32"], ["32", "0 to 31"]),
        (["--num-draft-tokens", "four"], ["four", "whole number", "auto"]),
        (["--drafter", "oracle"], ["--drafter", "oracle", "prompt-lookup", "combined"]),
        (["--drafter", "none", "--num-draft-tokens", "4"], ["--num-draft-tokens 4", "--drafter none", "leave"]),
        (["--drafter", "none", "--num-draft-tokens", "auto"], ["--num-draft-tokens auto", "--drafter none"]),
        (["--drafter", "prompt-lookup", "--draft", "x"], ["--draft has", "prompt-lookup", "--drafter model"]),
        (["--drafter", "none", "--draft-dtype", "int8"], ["--draft-dtype", "--drafter none"]),
        (["--verification", "sequential", "--num-draft-tokens", "auto"], ["auto", "sequential", "number, such as 4"]),
        (["--device", "tt", "--num-draft-tokens", "auto"], ["auto", "--device tt", "number, such as 4"]),
        (["--device", "tt", "--drafter", "prompt-lookup"], ["prompt-lookup", "--device tt", "--drafter model"]),
        (["--device", "tt", "--drafter", "combined"], ["combined", "--device tt", "--drafter model"]),
        (["--dtype", "int4"], ["--dtype", "int4", "bf16"]),
        (["--draft-dtype", "int2"], ["int2", "int8"]),
        (["--device", "tt", "--precision", "fp8"], ["--precision", "fp8", "performance"]),
        (["--device", "tt", "--draft-precision", "int8"], ["--draft-precision", "int8", "bfp4"]),
        (["--device", "tt", "--draft-placement", "host"], ["--draft-placement", "host", "own-chip"]),
        (["--device", "npu"], ["npu", "cuda"]),
        (["--max-new-tokens", "0"], ["0", "at least 1"]),
        (["--verification", "tree"], ["tree", "sequential"]),
        (["--random-prompts", "10"], ["'10'", "COUNTxLENGTH"]),
        (["--random-prompts", "0x5"], ["0x5"]),
        (["--prompt", "a", "--prompts", "b"], ["--prompts and --prompt", "one kind"]),
        (["--instruct", "--random-prompts", "1x5"], ["--instruct", "--random-prompts"]),
        (["--nonsense"], ["--nonsense"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(argv, words):
    with pytest.raises(UserError) as caught:
        settings(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_board_runs_in_the_precision_of_tt_transformers_with_traces_and_a_weight_cache():
    board = settings("--device", "tt")
    assert (board.precision, board.draft_precision, board.draft_placement) == ("performance", "performance", "shared")
    assert board.trace and board.weight_cache
    assert board.fixed_rows is None  # a tile has 32 rows anyway


def test_board_flags_are_taken_and_the_draft_follows_the_target_unless_named():
    board = settings("--device", "tt", "--precision", "bf16", "--no-trace", "--no-weight-cache")
    assert (board.precision, board.draft_precision, board.trace, board.weight_cache) == ("bf16", "bf16", False, False)
    board = settings("--device", "tt", "--precision", "accuracy", "--draft-precision", "bfp4")
    assert (board.precision, board.draft_precision) == ("accuracy", "bfp4")
    assert settings("--device", "tt", "--draft-placement", "own-chip").draft_placement == "own-chip"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "flag",
    [
        "--precision bf16",
        "--draft-precision bfp4",
        "--draft-placement own-chip",
        *("--trace", "--no-trace", "--weight-cache", "--no-weight-cache"),
    ],
)
def test_a_board_flag_is_refused_elsewhere_with_the_remedy(flag, device):
    with pytest.raises(UserError) as caught:
        settings("--device", device, *flag.split())
    name = flag.split()[0]
    assert str(caught.value) == f"{name} has no meaning with --device {device}: add --device tt or leave it out"


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--dtype fp32", "use --precision or"),
        ("--draft-dtype int8", "use --draft-precision or"),
        ("--row-invariant", "leave it out"),
        ("--no-row-invariant", "leave it out"),
    ],
)
def test_a_flag_of_torch_models_is_refused_on_a_board_with_the_remedy(flag, remedy):
    with pytest.raises(UserError) as caught:
        settings("--device", "tt", *flag.split())
    assert str(caught.value).startswith(f"{flag.split()[0]} has no meaning with --device tt: {remedy}")


def test_threads_of_torch_mean_something_everywhere():
    """On a board they convert weights and draw samples."""
    for device in ("cpu", "cuda", "tt"):
        assert settings("--device", device, "--threads", "3").threads == 3


@pytest.mark.parametrize("mode", [None, "baseline"])
def test_help_says_something_about_every_flag(mode):
    parser = build_parser(mode, {})
    assert all(action.help and action.help.strip() for action in parser._actions)
    text = parser.format_help()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all(name in text for name in ("HF_MODEL", "DRAFT_MODEL", "MESH_DEVICE", "TT_CACHE_PATH"))


# ------------------------------------------------------------------------------------------------ prompt files
def test_text_prompts_are_parted_by_dashes_and_keep_their_inner_lines(tmp_path):
    text = "def f():\n    return\n---\nends with a line end\n\n---\n    indented\n\nblank above"
    expected = ["def f():\n    return", "ends with a line end\n", "    indented\n\nblank above"]
    assert prompts_of(tmp_path / "p.txt", text) == expected
    assert prompts_of(tmp_path / "p.txt", text + "\n") == expected
    assert prompts_of(tmp_path / "p.txt", text.replace("\n", "\r\n")) == expected


def test_dashes_inside_a_line_part_nothing(tmp_path):
    text = "Title\n-----\n    ---\na --- b\n"
    assert prompts_of(tmp_path / "p.txt", text) == [text.removesuffix("\n")]


def test_json_prompts_are_strings_or_objects(tmp_path):
    assert prompts_of(tmp_path / "p.json", '["one", {"prompt": "two\\n"}]') == ["one", "two\n"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("p.txt", b"", "no prompt"),
        ("p.txt", b"\n---\n  \n---\n", "no prompt"),
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
        ("p.json", b"[]", "no prompt"),
        ("p.json", b"{", "not JSON"),
        ("p.json", b'{"prompt": "x"}', "not a list"),
        ("p.json", b'["x", 3]', "entry 2"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_fault(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        read_prompts(settings("--prompts", str(tmp_path / name)))
    assert name in str(caught.value)


@pytest.mark.parametrize("flags", [[], ["--instruct"]])
def test_default_prompt_files_hold_ten_different_prompts(flags):
    prompts = read_prompts(settings(*flags))
    assert len(set(prompts)) == 10


def test_max_prompts_takes_the_first():
    assert read_prompts(settings("--max-prompts", "2")) == read_prompts(settings())[:2]


# --------------------------------------------------------------------------------------------------- JSON file
def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    results = {"text": "[1,  2]\n é", "ids": [1, 2, 3], "none": None}
    write_json(str(path), results)
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert os.listdir(tmp_path) == ["out.json"]
    with pytest.raises(TypeError):
        write_json(str(path), {"x": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == results


def test_json_destination_is_checked_without_a_trace(tmp_path):
    check_writable(str(tmp_path / "new.json"))
    assert os.listdir(tmp_path) == []
    for bad in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(UserError, match="cannot write --json"):
            check_writable(str(bad))


# ------------------------------------------------------------------------------------------------------- words
def example(speedup=0.8, verification="batched", draft_ms=4.0):
    """Results of an imaginary run: plain steps of 10 ms, rounds of draft_ms + 12 + 0.5 ms with two draft tokens."""
    return {
        "baseline": {"ttft_ms": 5.0, "tok_s_user": 100.0, "tokens": 60, "decode_s": 0.59, "load_s": 1.0},
        "speculative": {
            "ttft_ms": 5.1,
            "tok_s_user": 100 * speedup,
            "tokens": 60,
            "decode_s": 0.7,
            "load_s": 1.5,
            "rounds": 40,
            "plain_rounds": 0,
            "drafted": 80,
            "sources": {"model": {"rounds": 40, "drafted": 80, "accepted": 24}},
            "mean_draft_length": 2,
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
        "divergence": {"prompt": 2, "token": 7, "top2_margin": 0.0123},
        "memory": {
            "target": {"weight_bytes": 2_000_000_000, "kv_cache_bytes": 3_000_000},
            "draft": {"weight_bytes": 1_000_000, "kv_cache_bytes": 500_000},
            "peak_process_bytes": 4_000_000_000,
            "peak_cuda_bytes": None,
        },
        "total_s": 12.3,
        "warm_up_s": None,
        "machine": {"mock": False},
        "settings": {
            "drafter": "model",
            "draft": "models/checkpoints/tiny-draft",
            "num_draft_tokens": 2,
            "verification": verification,
            "max_new_tokens": 30,
        },
        "controller": None,
        "prompts": [{}, {}],
    }


def test_a_slower_run_is_explained_with_its_break_even():
    text = " ".join(explain_slowdown(example()))
    # (4 + 12 + 0.1 + 16 / 40) / 10 = 1.65 plain steps per round; (1.65 - 1) / 2 of the drafted tokens must be accepted
    assert "16.50 ms" in text and "1.65 times a plain step of 10.00 ms" in text
    assert "acceptance rate of 32%" in text and "measured were 30%" in text
    # one draft token: 1.55 tokens per 2 + 12.1 + 0.4 ms
    assert "--num-draft-tokens 1 would give about 1.07x" in text


def test_advice_fits_the_reason():
    assert "cheaper" in explain_slowdown(example(draft_ms=30.0))[-1]
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
    results["controller"] = {"break_even": 0.25}
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


@pytest.mark.parametrize(
    ("results", "words"), [(auto_example(), "by the costs measured"), (lookup_example(), "no passage came again")]
)
def test_where_nothing_was_drafted_the_reason_is_told(results, words):
    results["speculative"] |= {"drafted": 0, "plain_rounds": 40, "acceptance_rate": None, "mean_draft_length": None}
    (line,) = explain_slowdown(results)
    assert line.startswith("Nothing was drafted: ") and words in line


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
    results["speculative"]["sources"]["lookup"] = {"rounds": 8, "drafted": 20, "accepted": 15}
    cells = {label.strip(): speculative for rows in summary_sections(results) for label, _, speculative, _ in rows}
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
    assert "--num-draft-tokens" in lines[2]


def test_a_fused_round_has_one_time():
    cells = {label: speculative for rows in summary_sections(fused_example()) for label, _, speculative, _ in rows}
    assert cells["draft + verify per round"] == "16.00 ms (one program)"
    assert not {"draft per round", "verify per round"} & set(cells)
    cells = {label: speculative for rows in summary_sections(example()) for label, _, speculative, _ in rows}
    assert (cells["draft per round"], cells["verify per round"]) == ("4.00 ms", "12.00 ms")
    assert "draft + verify per round" not in cells


def test_without_times_a_table_has_no_rows_for_them():
    results = _without_times(example()) | {"machine": {"mock": True}}
    text = " ".join(cell for rows in summary_sections(results) for row in rows for cell in row)
    assert not re.search(r"\bm?s\b|tokens/s|time|\dx", text), text
    assert "1.60 tokens" in text and "2.00 GB" in text
    lines = [line for line, _ in closing_lines(results)]
    assert lines[-1] == MOCK
    assert not any("time:" in line or "speed-up" in line for line in lines)
    assert explain_slowdown(results) == []
    assert MOCK not in [line for line, _ in closing_lines(example())]


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


def test_help_and_early_errors_need_no_torch():
    import subprocess

    code = "import sys; from demo.harness import main; main(['--dtype', 'int4']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=EMBEDDED_TARGET.parents[2], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# ----------------------------------------------------------------------------------------------------- display
def test_a_table_fits_80_columns_and_is_not_cut():
    from rich.console import Console

    from demo.display import QuietView

    combined = auto_example()
    combined["speculative"]["sources"]["lookup"] = {"rounds": 8888, "drafted": 20, "accepted": 15}
    for results in (example(), fused_example(), combined):
        out = io.StringIO()
        QuietView(Console(file=out, force_terminal=True, no_color=True, width=80), None).summary(results)
        text = out.getvalue()
        assert "…" not in text
        assert "2.00 GB + 1.0 MB" in text and "1.60 tokens" in text and "0.100 ms (0.6%)" in text
