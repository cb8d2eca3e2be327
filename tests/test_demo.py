"""The demos from end to end: as a user types them, on the embedded pair and on a tiny random one."""

import json
import os
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import models.llm
from demo.wording import UNTIMED
from models.llama.checkpoint import save_checkpoint
from models.options import BOARD_OPTIONS
from models.tests.llama_fixtures import random_tensors, tiny_config
from tests.demo_fixtures import FOUR, make_tokenizer, refused, texts, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = [sys.executable, str(ROOT / "demo" / "simple_text_demo.py")]
BASELINE_DEMO = [sys.executable, str(ROOT / "demo" / "baseline_text_demo.py")]
PATH_KEYS = {"ttft_ms", "tok_s_user", "tokens", "decode_s", "load_s"}
SPECULATIVE_KEYS = PATH_KEYS | {
    *("rounds", "plain_rounds", "drafted", "sources", "mean_draft_length", "tree_tokens_per_round"),
    "acceptance_rate",
    "mean_acceptance_length",
    "acceptance_by_position",
    "draft_ms",
    "verify_ms",
    "fused_ms",
    "host_ms",
    "host_share",
}
TOP_KEYS = {
    *("controller", "early_exit"),
    *("baseline", "speculative", "speedup", "ttft_ratio", "outputs_identical"),
    *("settings", "date", "versions", "machine", "prompts", "total_s", "first_token_s", "warm_up_s"),
}


# ------------------------------------------------------------------------------------------- the embedded pair
def test_the_default_command_writes_the_text_of_its_baseline(tmp_path):
    path = tmp_path / "out.json"
    command = [*DEMO, "--max-prompts", "3", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "outputs identical: yes (3 of 3 prompts)" in done.stdout
    results = json.loads(path.read_text(encoding="utf-8"))
    assert set(results) >= TOP_KEYS
    assert set(results["baseline"]) >= PATH_KEYS and set(results["speculative"]) >= SPECULATIVE_KEYS
    assert results["outputs_identical"] is True
    for row in results["prompts"]:
        assert row["baseline"]["token_ids"] == row["speculative"]["token_ids"]
        assert row["baseline"]["text"] in done.stdout
    settings = results["settings"]
    assert (settings["drafter"], settings["num_draft_tokens"]) == ("combined", "auto")
    assert (settings["tree_nodes"], settings["exit_layer"], results["early_exit"]) == (None, None, None)


def test_the_embedded_pair_writes_its_baseline_text_in_fp32(run):
    code, results = run("--dtype", "fp32", *FOUR, "--max-prompts", "3", models=False, max_new_tokens=30)
    assert code == 0
    assert results["outputs_identical"] is True
    assert results["speculative"]["acceptance_rate"] > 0.2  # a pair that was trained for each other
    assert results["controller"] is None


def test_embedded_pair_verified_token_by_token_writes_the_same_text(run):
    code, results = run("--verification", "sequential", "--max-prompts", "2", models=False, max_new_tokens=30)
    assert code == 0
    assert results["outputs_identical"] is True


# ----------------------------------------------------------------------------------------- how runs are counted
def test_paths_take_turns_after_an_uncounted_warm_up(run, monkeypatch):
    order = []
    stream = models.llm.stream

    def noting(engine, sequence):
        order.append(("plain" if sequence.request.drafter is None else "speculative", len(sequence.request.prompt)))
        return stream(engine, sequence)

    monkeypatch.setattr(models.llm, "stream", noting)
    code, results = run("--prompt", "a", "--prompt", "bcd", "--prompt", "efghi")
    assert code == 0
    lengths = [row["prompt_tokens"] for row in results["prompts"]]
    assert order == [
        *(("plain", lengths[0]), ("speculative", lengths[0])),  # warm-up
        *(("plain", lengths[0]), ("speculative", lengths[0])),
        *(("speculative", lengths[1]), ("plain", lengths[1])),
        *(("plain", lengths[2]), ("speculative", lengths[2])),
    ]


def test_totals_are_weighted_by_tokens_and_ttft_is_a_median(run):
    code, results = run("--max-prompts", "3", "--dtype", "fp32", max_new_tokens=20)
    assert code == 0
    assert results["outputs_identical"] is True
    for path in ("baseline", "speculative"):
        rows = [row[path] for row in results["prompts"]]
        total = results[path]
        assert total["tokens"] == sum(row["tokens"] for row in rows) == 60
        assert total["decode_s"] == pytest.approx(sum(row["decode_s"] for row in rows))
        assert total["tok_s_user"] == pytest.approx((60 - 3) / total["decode_s"])
        assert total["ttft_ms"] == sorted(row["ttft_ms"] for row in rows)[1]
    assert results["speedup"] == results["speculative"]["tok_s_user"] / results["baseline"]["tok_s_user"]
    ratios = [row["speculative"]["ttft_ms"] / row["baseline"]["ttft_ms"] for row in results["prompts"]]
    assert results["ttft_ratio"] == pytest.approx(statistics.median(ratios))
    assert results["speedup_median"] == sorted(row["speedup"] for row in results["prompts"])[1]
    assert results["interrupted"] is False and results["partial"] == []


def test_a_divergence_is_reported_with_its_place_and_margin(run, wrong_third_token, capsys):
    code, results = run("--prompt", "abc", "--dtype", "fp32")
    assert code == 0
    assert results["outputs_identical"] is False
    divergence = results["divergence"]
    ids = results["prompts"][0]["baseline"]["token_ids"]
    assert (divergence["prompt"], divergence["token"]) == (1, 3)
    assert (divergence["baseline_id"], divergence["speculative_id"]) == (ids[2], (ids[2] + 1) % 256)
    assert divergence["top2_margin"] > 0
    assert "no (0 of 1 prompts; first divergence: prompt 1, token 3, top-2 margin" in capsys.readouterr().out


def test_each_single_mode_leaves_the_other_path_out(run):
    code, results = run("--mode", "speculative", "--prompt", "abc")
    assert code == 0
    assert results["baseline"] is None and results["speedup"] is None and results["outputs_identical"] is None
    assert results["speculative"]["tokens"] == 8
    code, results = run("--prompt", "abc", mode="baseline")
    assert code == 0
    assert results["speculative"] is None and results["settings"]["draft"] is None
    assert results["baseline"]["tokens"] == 8


def test_sampling_repeats_with_its_seed(run, capsys):
    sampling = [*FOUR, "--temperature", "1", "--top-k", "50", "--top-p", "0.95", "--max-prompts", "2"]
    first, again, other = (run(*sampling, "--seed", seed, max_new_tokens=16)[1] for seed in ("1", "1", "2"))
    for path in ("baseline", "speculative"):
        assert texts(first, path) == texts(again, path) != texts(other, path)
    assert first["outputs_identical"] is None
    assert "n/a (sampling)" in capsys.readouterr().out


def test_random_prompts_run_without_a_tokenizer(run, tmp_path):
    config = tiny_config(max_position_embeddings=64)
    for name in ("target", "draft"):
        save_checkpoint(tmp_path / name, config, random_tensors(config, seed=3))
    models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    code, results = run(*models, *FOUR, "--random-prompts", "2x5", "--dtype", "fp32", models=False)
    assert code == 0
    assert [row["prompt_tokens"] for row in results["prompts"]] == [5, 5]
    row = results["prompts"][0]["baseline"]
    assert row["text"].split() == [str(id) for id in row["token_ids"]]
    assert results["speculative"]["acceptance_rate"] == 1.0  # the draft is the target


# ------------------------------------------------------------------------------------------------- a mock board
@pytest.mark.parametrize("on_terminal", [False, True])
@pytest.mark.parametrize("mode", ["compare", "speculative", "baseline"])
def test_on_a_mock_board_nothing_that_is_told_depends_on_time(mode, on_terminal, run, as_on_a_mock, capsys, request):
    if on_terminal:
        request.getfixturevalue("terminal")
    told = []
    for _ in range(2):
        code, results = run("--mode", mode, *FOUR, "--prompt", "def", "--prompt", "self", max_new_tokens=6)
        assert code == 0
        del results["memory"]["peak_process_bytes"], results["date"]
        out, err = capsys.readouterr()
        told.append((results, re.sub("peak memory: .*", "", out), err))
    assert told[0] == told[1]
    results, out, err = told[0]
    assert results["machine"]["timed"] is False
    assert out.count(UNTIMED["mock"]) == 1
    assert not re.search(r"tok/s|tokens/s|\d m?s\b|\d\.\d+x| time", re.sub("times would say", "", out))
    if mode != "baseline":
        assert results["speculative"]["acceptance_rate"] is not None
        assert "accepted" in out and "mean acceptance length" in out


def test_an_interrupted_run_on_a_mock_board_has_no_times_either(run, as_on_a_mock, capsys, monkeypatch):
    stream = models.llm.stream

    def interrupted(engine, sequence):
        for number, token in enumerate(stream(engine, sequence), 1):
            yield token
            if sequence.request.drafter and number == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(models.llm, "stream", interrupted)
    code, results = run("--prompt", "def")
    assert code == 130
    assert [run["tokens"] for run in results["partial"]] == [8, 3]
    assert {run["decode_s"] for run in results["partial"]} == {None}
    out = capsys.readouterr().out
    assert "after 3 tokens" in out and "tok/s" not in out


def test_each_device_reports_the_flags_that_mean_something_on_it(run):
    code, results = run("--prompt", "def")
    assert code == 0
    assert set(results["settings"]) >= {"dtype", "draft_dtype", "fixed_rows", "threads"}
    assert not set(results["settings"]) & {*BOARD_OPTIONS, "fused"}
    machine = results["machine"]
    assert machine["timed"] is True
    assert {machine[name] for name in ("medium", "board", "chips", "arch", "ttnn")} == {None}
    assert results["warm_up_s"] is None


# ------------------------------------------------------------------------------------------- on a real terminal
def test_a_terminal_gets_colours_and_the_table(pair, tmp_path):
    keyboard, screen = pty.openpty()
    models = ["--target", str(pair[0]), "--draft", str(pair[1])]
    command = [*DEMO, *models, *FOUR, "--prompt", "def", "--prompt", "self", "--dtype", "fp32"]
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    environ.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdout=screen, stderr=subprocess.PIPE, env=environ)
    os.close(screen)
    output = b""
    while True:
        try:
            chunk = os.read(keyboard, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        output += chunk
    process.communicate()
    os.close(keyboard)
    assert process.returncode == 0
    text = output.decode()
    assert "\x1b[32m" in text and "\x1b[33m" in text  # drafted, corrected
    assert "drafted and accepted" in text
    assert "outputs identical: yes (2 of 2 prompts)" in text


def test_interruption_keeps_the_partial_text_and_statistics(pair, tmp_path):
    path = tmp_path / "out.json"
    models = ["--target", str(pair[0]), "--draft", str(pair[1]), "--max-new-tokens", "480"]
    command = [*DEMO, *models, "--prompt", "def", "--mode", "speculative", "--json", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stdout.readline() != b"=== speculative\n":
        assert process.poll() is None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = (stream.decode(errors="replace") for stream in process.communicate())
    assert process.returncode == 130, err
    assert "interrupted in prompt 1, speculative, after" in out
    assert "tokens written" in out
    assert "Traceback" not in err
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["interrupted"] is True and results["prompts"] == []
    (partial,) = results["partial"]
    assert 0 < partial["tokens"] < 480 and partial["finish_reason"] == "interrupted"
    assert results["speculative"]["tokens"] == partial["tokens"] == len(partial["token_ids"])


def test_a_closed_pipe_is_no_error(run, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        code, results = run("--prompt", "def")
    assert code == 141
    assert results["interrupted"] is True
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ mistakes
def truncated(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return ["model.safetensors"]


def without_config(path):
    (path / "config.json").unlink()
    return ["config.json"]


def other_architecture(path):
    change_config(path, model_type="mistral")
    return ["mistral", "llama"]


def wrong_shape(path):
    change_config(path, hidden_size=96)
    return ["96", "shape"]


def missing_tensor(path):
    change_config(path, num_hidden_layers=3)
    return ["model.layers.2"]


def without_tokenizer(path):
    (path / "tokenizer.json").unlink()
    return ["tokenizer.json", "--random-prompts"]


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGES = [truncated, without_config, other_architecture, wrong_shape, missing_tensor, without_tokenizer]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_by_name(damage, pair, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(pair[0], broken)
    words = damage(broken)
    refused(capsys, ["--target", str(broken), "--draft", str(pair[1])], *words)


def test_a_pair_with_different_vocabularies_is_refused_with_both(pair, tmp_path, capsys):
    ours, theirs = make_tokenizer().get_vocab_size(), 320
    config = tiny_config(vocab_size=theirs)
    save_checkpoint(tmp_path / "draft", config, random_tensors(config, seed=1))
    write_tokenizer(tmp_path / "draft", make_tokenizer())
    refused(capsys, ["--target", str(pair[0]), "--draft", str(tmp_path / "draft")], str(ours), str(theirs))


def test_a_target_that_the_embedded_draft_does_not_fit_asks_for_a_draft(pair, capsys):
    flags = ["--target", str(pair[0]), "--drafter", "model"]
    refused(capsys, flags, str(pair[0]), "--draft", "--drafter prompt-lookup")


def test_where_no_draft_model_fits_drafts_are_copied(pair, run, capfd):
    code, results = run("--target", str(pair[0]), "--prompt", "def def def", models=False)
    assert (code, results["settings"]["drafter"], results["settings"]["draft"]) == (0, "prompt-lookup", None)
    assert "no draft model" in capfd.readouterr().err


def test_other_mistakes_name_the_value_and_the_remedy(pair, tmp_path, capsys):
    models = ["--target", str(pair[0]), "--draft", str(pair[1])]
    missing = str(tmp_path / "missing")
    refused(capsys, ["--target", missing], missing)
    refused(capsys, [*models[:2], "--draft", missing], missing)
    refused(capsys, [*models, "--prompt", "x" * 600], "prompt 1", "601", "512", "--max-seq-len")
    refused(capsys, [*models, "--max-seq-len", "513"], "513", "512")
    refused(capsys, [*models, "--temperature", "-1"], "-1")
    refused(capsys, [*models, "--temperature", "nan"], "nan")
    refused(capsys, [*models, "--top-p", "1.5"], "1.5")
    refused(capsys, [*models, "--top-k", "-3"], "-3")
    refused(capsys, [*models, "--instruct"], "chat template")
    refused(capsys, [*models, "--prompts", missing], missing, "cannot read")
    refused(capsys, [*models, "--json", missing + "/out.json"], missing, "--json")
    refused(capsys, ["--num-draft-tokens", "32"], "32", "0 to 31")
    refused(capsys, ["--drafter", "tree", "--tree-nodes", "32"], "32", "1 to 31")
    refused(capsys, ["--dtype", "int4"], "int4", "bf16")
    refused(capsys, ["--prompt", " "], "--prompt")
    refused(capsys, ["--device", "tt"], "--device cpu")


@pytest.mark.parametrize("demo_command", [DEMO, BASELINE_DEMO], ids=["simple", "baseline"])
def test_a_mistake_on_the_command_line_is_one_line_and_needs_no_torch(demo_command):
    """So it is quick: torch takes seconds to import, and here cannot be imported."""
    script = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [demo_command[0], "-c", script, demo_command[1], "--dtype", "int4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "int4" in done.stderr
