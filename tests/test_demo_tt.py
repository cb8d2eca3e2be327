"""The demos on Tenstorrent boards, from end to end on ttnn's mock of them, in processes of their own.

A run takes its numbers from golden functions, so texts can be compared, with each other and with the CPU's. One
process runs all cases of a board: most of the time goes into the models, not into what is tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from demo.harness import main
from demo.wording import UNTIMED
from models.board_mock import cluster
from models.options import NAMED

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "demo" / "simple_text_demo.py")
CASES = str(ROOT / "tests" / "demo_tt_cases.py")
# Two of the default prompts. Of all ten, nine give the CPU's text on a mock in bf16; the ninth leaves it at a near-tie.
PROMPTS = ["--max-prompts", "2"]
SHORT = ["--max-new-tokens", "9", "--max-seq-len", "128"]
BOARD = ["--device", "tt", "--no-weight-cache", *SHORT, *PROMPTS]
BF16 = [*BOARD, "--precision", "bf16"]
ONE_CHIP = ["open_mesh_device", "close_mesh_device"]
TWO_CHIPS = ["set_fabric_config", *ONE_CHIP, "set_fabric_config"]
TWO_MESHES = ["set_fabric_config", "open_mesh_device", *["close_mesh_device"] * 3, "set_fabric_config"]

pytestmark = pytest.mark.skipif(
    not cluster.is_installed(), reason="ttnn is not installed: its wheels are for CPython 3.12 and 3.10 on x86-64 Linux"
)


def on_mock(board, *command, **options):
    """A finished process of the mock, without settings from the shell that started the tests."""
    environ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "COLUMNS": "200"}
    for name in ("MESH_DEVICE", "HF_MODEL", "DRAFT_MODEL", "TT_CACHE_PATH"):
        environ.pop(name, None)
    command = [sys.executable, "-m", "models.board_mock", board, *command]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, **options)


def run_cases(board, cases):
    done = on_mock(board, CASES, input=json.dumps(cases))
    assert done.returncode == 0 and done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def case(*argv, **options):
    return {"argv": [*map(str, argv)], **options}


def texts(results, path):
    return [row[path]["token_ids"] for row in results["prompts"]]


def results_of(outcome):
    """The JSON of a run that went well."""
    assert outcome["code"] == 0, outcome["err"]
    return outcome["results"]


def refusal(outcome):
    """The one line that a refused run prints."""
    assert (outcome["code"], outcome["out"], outcome["results"]) == (2, "", None)
    (line,) = outcome["err"].splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------------------------- as users type it
@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """The finished process of a comparison on an N150, and its JSON results."""
    path = tmp_path_factory.mktemp("typed") / "out.json"
    done = on_mock("N150", DEMO, *BF16, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_speculative_text_is_the_baselines(typed):
    done, results = typed
    assert results["outputs_identical"] is True
    assert texts(results, "baseline") == texts(results, "speculative")
    assert "outputs identical: yes (2 of 2 prompts)" in done.stdout
    assert results["speculative"]["acceptance_rate"] > 0.2  # the pair was trained for each other
    assert results["speculative"]["tokens"] == results["baseline"]["tokens"] == 18


def test_baseline_text_is_that_of_the_models_on_the_cpu(typed, tmp_path):
    path = tmp_path / "cpu.json"
    assert main(["--mode", "baseline", *SHORT, *PROMPTS, "--quiet", "--json", str(path)]) == 0
    assert texts(typed[1], "baseline") == texts(json.loads(path.read_text(encoding="utf-8")), "baseline")


def test_no_number_looks_as_if_it_were_measured(typed):
    done, results = typed
    said = (done.stdout + done.stderr).replace("times would say nothing", "").replace("times mean nothing", "")
    assert not re.search(r"tok/s|tokens/s|\d m?s\b|\d\.\d+x|\btimes?\b", said), said
    assert done.stdout.count(UNTIMED["mock"]) == 1
    known = {"tokens", "decode_tokens", "rounds", "acceptance_rate", "mean_acceptance_length", "acceptance_by_position"}
    known |= {"plain_rounds", "drafted", "sources", "mean_draft_length"}
    for path in ("baseline", "speculative"):
        assert {name for name, value in results[path].items() if value is not None} <= known
    nothing = ("speedup", "speedup_median", "ttft_ratio", "total_s", "first_token_s", "warm_up_s")
    assert [results[name] for name in nothing] == [None] * len(nothing)


def test_memory_is_shown_for_both_models_before_loading(typed):
    lines = typed[0].stderr.splitlines()
    title = next(i for i, line in enumerate(lines) if "DRAM per chip, planned, of the 12.87 GB of N150" in line)
    rows = [line for line in lines[title:] if "GB" in line and ("target" in line or "draft" in line)]
    assert [row.split()[1] for row in rows] == ["target", "draft"]
    assert lines.index("compiling programs") > lines.index(rows[1])


def test_results_name_the_mock_and_the_flags_that_took_effect(typed):
    machine, settings = typed[1]["machine"], typed[1]["settings"]
    assert (machine["medium"], machine["board"], machine["chips"], machine["arch"]) == (
        "mock",
        "N150",
        1,
        "wormhole_b0",
    )
    assert machine["ttnn"] == typed[1]["versions"]["ttnn"]
    assert (settings["precision"], settings["draft_precision"], settings["draft_placement"]) == (
        "bf16",
        "bf16",
        "shared",
    )
    assert (settings["drafter"], settings["num_draft_tokens"]) == ("model", 4)
    assert settings["fused"] is True
    assert settings["trace"] is False  # asked for, but no mock can capture one
    assert not {"dtype", "draft_dtype", "fixed_rows", "row_invariant"} & set(settings)
    assert "mock of an N150, 1 chip" in typed[0].stdout


# ----------------------------------------------------------------------------------------------------------- N150
@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    """The embedded target with a file that ends early."""
    path = tmp_path_factory.mktemp("corrupt") / "target"
    shutil.copytree(NAMED["tiny"][0], path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return path


@pytest.fixture(scope="module")
def n150(corrupt):
    speculative, one = ("--mode", "speculative"), ("--max-prompts", 1)
    return run_cases(
        "N150",
        {
            "sequential": case(*BF16, *speculative, "--verification", "sequential"),
            "sampling": case(*BF16, "--max-prompts", 1, "--temperature", 0.8, "--top-p", 0.95, "--max-new-tokens", 6),
            "baseline demo": case(*BF16, "--max-prompts", 1, mode="baseline"),
            "no drafter": case(*BF16, "--max-prompts", 1, "--drafter", "none"),
            "ctrl-c": case(*BF16, *speculative, interrupt=5),
            "after ctrl-c": case(*BF16, *speculative, "--max-prompts", 1, "--max-new-tokens", 2, "--quiet"),
            "other board": case(*BF16, environ={"MESH_DEVICE": "N300"}),
            "unknown board": case(*BF16, environ={"MESH_DEVICE": "N9000"}),
            "long context": case(*BF16, "--max-seq-len", 4096),
            "long prompt": case(*BF16, "--prompt", "def f(x): return x\n" * 40),
            "own chip": case(*BF16, "--draft-placement", "own-chip"),
            "corrupt": case(*BF16, "--target", corrupt),
            "auto": case(*BF16, *speculative, *one, "--num-draft-tokens", "auto"),
            "prompt-lookup": case(*BF16, *speculative, *one, "--drafter", "prompt-lookup"),
            "combined": case(*BF16, *speculative, *one, "--drafter", "combined"),
            "tree": case(*BF16, *speculative, *one, "--drafter", "tree", "--tree-nodes", 5),
            "early-exit": case(*BF16, *speculative, *one, "--drafter", "early-exit", "--exit-layer", 4),
            "no exit layer": case(*BF16, "--drafter", "early-exit"),
            "deep exit": case(*BF16, "--drafter", "early-exit", "--exit-layer", 16),
        },
    )


def test_the_path_without_fused_rounds_writes_the_same_text(n150, typed):
    results = results_of(n150["sequential"])
    assert results["settings"]["fused"] is False
    assert texts(results, "speculative") == texts(typed[1], "speculative")
    ours, theirs = results["speculative"], typed[1]["speculative"]
    assert ours["acceptance_by_position"] == theirs["acceptance_by_position"]


def test_sampling_runs_on_both_paths(n150):
    results = results_of(n150["sampling"])
    assert results["settings"]["fused"] is False
    assert [results[path]["tokens"] for path in ("baseline", "speculative")] == [6, 6]
    assert results["outputs_identical"] is None
    assert results["speculative"]["rounds"] > 0


def test_the_baseline_demo_writes_the_same_text_without_a_draft(n150, typed):
    results = results_of(n150["baseline demo"])
    assert texts(results, "baseline") == texts(typed[1], "baseline")[:1]
    assert results["speculative"] is None and results["memory"]["draft"] is None


def test_without_a_drafter_no_draft_goes_onto_the_board(n150, typed):
    results = results_of(n150["no drafter"])
    assert results["outputs_identical"] is True
    assert texts(results, "speculative") == texts(typed[1], "baseline")[:1]
    assert results["memory"]["draft"] is None and results["speculative"]["drafted"] == 0
    settings = results["settings"]
    assert (settings["drafter"], settings["draft"], settings["draft_precision"]) == ("none", None, None)


DRAFTING = {
    "auto": {"model"},
    "prompt-lookup": {"lookup", "lookup-short"},
    "combined": {"model", "lookup", "lookup-short"},
    "tree": {"tree"},
    "early-exit": {"early-exit"},
}


@pytest.mark.parametrize("name", DRAFTING)
def test_every_drafter_writes_the_same_text(n150, typed, name):
    results = results_of(n150[name])
    assert texts(results, "speculative") == texts(typed[1], "speculative")[:1]
    assert set(results["speculative"]["sources"]) <= DRAFTING[name]
    assert results["speculative"]["rounds"] > 0
    if name == "auto":
        assert results["controller"]["lengths"] == [0, 1, 3, 7, 15]
    if name in ("tree", "early-exit"):  # what is automatic goes by times, which a mock's are not
        assert results["speculative"]["drafted"] > 0


def test_ctrl_c_closes_the_board_and_shows_what_there_is(n150, typed):
    outcome = n150["ctrl-c"]
    assert outcome["code"] == 130
    assert outcome["calls"] == ONE_CHIP
    assert "Traceback" not in outcome["err"]
    (partial,) = outcome["results"]["partial"]
    written = len(partial["token_ids"])  # the step that the signal came in may still be finished
    assert partial["token_ids"] == texts(typed[1], "speculative")[0][:written] and 5 <= written <= 6
    assert partial["finish_reason"] == "interrupted"
    assert f"interrupted in the warm-up, speculative, after {written} tokens" in outcome["out"]
    assert "tokens written" in outcome["out"]
    assert n150["after ctrl-c"]["code"] == 0


def test_every_run_that_opens_the_board_closes_it(n150):
    opened = {name for name, outcome in n150.items() if outcome["calls"]}
    assert opened == {"sequential", "sampling", "baseline demo", "no drafter", "ctrl-c", "after ctrl-c", *DRAFTING}
    assert all(n150[name]["calls"] == ONE_CHIP for name in opened)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other board", ["MESH_DEVICE=N300", "2 chips", "found 1", "unset MESH_DEVICE"]),
        ("unknown board", ["MESH_DEVICE=N9000", "N150", "P150"]),
        ("long context", ["4096", "2048", "--max-seq-len"]),
        ("long prompt", ["128", "--max-seq-len"]),
        ("own chip", ["needs 2 chips", "N150 has 1", "N300"]),
        ("corrupt", ["model.safetensors"]),
        ("no exit layer", ["--exit-layer 4"]),
        ("deep exit", ["exit layer 16", "between 1 and 15"]),
    ],
)
def test_a_mistake_is_one_line_before_the_board_is_opened(n150, name, words):
    line = refusal(n150[name])
    assert all(word in line for word in words), line
    assert n150[name]["calls"] == []


# ------------------------------------------------------------------------------------------------- several chips
@pytest.fixture(scope="module")
def n300():
    own_chip = ("--draft-placement", "own-chip")
    short = ("--max-new-tokens", 6, "--max-prompts", 1)
    return run_cases(
        "N300",
        {
            "shared": case(*BF16),
            "own chip": case(*BF16, *own_chip, "--mode", "speculative"),
            "own chip, sampling": case(*BF16, *own_chip, *short, "--mode", "speculative", "--temperature", 0.8),
            "ctrl-c": case(*BF16, *own_chip, "--mode", "speculative", interrupt=3),
        },
    )


def test_two_chips_write_the_text_of_one(n300, typed):
    results = results_of(n300["shared"])
    assert results["outputs_identical"] is True
    assert texts(results, "speculative") == texts(typed[1], "speculative")
    assert results["settings"]["fused"] is True
    assert n300["shared"]["calls"] == TWO_CHIPS


def test_each_of_two_chips_holds_half_of_the_matrices(n300, typed):
    target = results_of(n300["shared"])["memory"]["target"]
    assert target["chips"] == 2
    assert target["weight_bytes_per_chip"] * 2 == target["weight_bytes"]
    alone = typed[1]["memory"]["target"]
    for name in ("weight_bytes", "kv_cache_bytes"):  # the embedding is on both, and parts are padded to whole blocks
        assert alone[name] / 2 <= target[f"{name}_per_chip"] < alone[name]
    assert "per chip" in n300["shared"]["out"] and "per chip" not in typed[0].stdout


def test_a_draft_on_a_chip_of_its_own_writes_the_same_text(n300, typed):
    results = results_of(n300["own chip"])
    assert results["settings"]["fused"] is False
    assert texts(results, "speculative") == texts(typed[1], "speculative")
    assert [results["memory"][role]["chips"] for role in ("target", "draft")] == [1, 1]
    sampled = results_of(n300["own chip, sampling"])
    assert sampled["speculative"]["tokens"] == 6 and sampled["speculative"]["rounds"] > 0


def test_meshes_of_both_models_are_closed_whatever_happens(n300):
    assert n300["ctrl-c"]["code"] == 130
    for name in ("own chip", "own chip, sampling", "ctrl-c"):
        assert n300[name]["calls"] == TWO_MESHES


def test_heads_that_the_chips_do_not_divide_are_refused_with_the_meshes_that_would_do():
    done = on_mock("T3K", DEMO, *BF16)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("mock board")]
    assert line == "error: num_attention_heads 4 cannot be split over 8 chips: use a mesh of 1 or 2 chips"
