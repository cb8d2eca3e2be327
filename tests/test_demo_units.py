"""The parts of the demos that need no run: flags, prompt files, the JSON file, words and tables."""

import io
import json
import os
import sys

import pytest

from demo.arguments import EMBEDDED_DRAFT, EMBEDDED_TARGET, parse_settings, read_prompts
from demo.environment import check_writable, write_json
from demo.wording import closing_lines, explain_slowdown, summary_sections
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


@pytest.mark.parametrize(("k", "rows"), [(0, 1), (4, 5), (6, 7), (7, None), (31, None)])
def test_fixed_rows_are_the_drafted_tokens_and_one_more(k, rows):
    assert settings("--num-draft-tokens", str(k)).fixed_rows == rows


def test_rows_are_fixed_where_that_is_free_or_asked_for():
    assert settings("--dtype", "fp32").fixed_rows is None
    assert settings("--dtype", "fp32", "--row-invariant").fixed_rows == 5
    assert settings("--num-draft-tokens", "31", "--row-invariant").fixed_rows == 32
    assert settings("--no-row-invariant").fixed_rows is None


def test_the_baseline_demo_has_one_mode():
    assert settings(mode="baseline").paths == ("baseline",)
    with pytest.raises(UserError, match="--mode"):
        settings("--mode", "compare", mode="baseline")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-draft-tokens", "-1"], ["--num-draft-tokens", "-1", "0 to 31"]),
        (["--num-draft-tokens", "32"], ["32", "0 to 31"]),
        (["--num-draft-tokens", "four"], ["four", "whole number"]),
        (["--dtype", "int4"], ["--dtype", "int4", "bf16"]),
        (["--draft-dtype", "int2"], ["int2", "int8"]),
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
            "acceptance_rate": 0.3,
            "mean_acceptance_length": 1.6,
            "acceptance_by_position": [0.55, 0.05],
            "draft_ms": draft_ms,
            "verify_ms": 12.0,
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
        "settings": {"num_draft_tokens": 2, "verification": verification, "max_new_tokens": 30},
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

    code = "import sys; from demo.harness import main; main(['--dtype', 'int4']); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=EMBEDDED_TARGET.parents[2], capture_output=True).returncode
        == 0
    )


# ----------------------------------------------------------------------------------------------------- display
def test_a_table_fits_80_columns_and_is_not_cut():
    from rich.console import Console

    from demo.display import QuietView

    out = io.StringIO()
    QuietView(Console(file=out, force_terminal=True, no_color=True, width=80), None).summary(example())
    text = out.getvalue()
    assert "…" not in text
    assert "2.00 GB + 1.0 MB" in text and "1.60 tokens" in text and "0.100 ms (0.6%)" in text
