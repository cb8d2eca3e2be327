"""compare_hf.py and forward_cost.py on the embedded pair and on tiny random models: what they write, and refuse."""

import importlib.util
import json
from pathlib import Path

import pytest

from models.command_line import run_command
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare_hf():
    return load("compare_hf")


@pytest.fixture(scope="module")
def forward_cost():
    return load("forward_cost")


def test_four_ways_write_the_same_greedy_text_in_fp32(compare_hf, tmp_path, capsys):
    file = tmp_path / "hf.json"
    argv = f"--repeats 2 --dtype fp32 --max-prompts 2 --max-new-tokens 12 --json {file}".split()
    assert compare_hf.command(argv) == 0
    results = json.loads(file.read_text())
    assert set(results["same_text_as_own_baseline"].values()) == {2}
    rates = results["tok_s_by_repeat"]
    own, hf = rates[compare_hf.OWN_PLAIN], rates[compare_hf.HF_PLAIN]
    assert results["baseline_ratio"] == pytest.approx(sum(a / b for a, b in zip(own, hf, strict=True)) / 2)
    low, high = results["speculative_ratio_range"]
    assert 0 < low <= results["speculative_ratio"] <= high
    assert "speculative / best HF assisted" in capsys.readouterr().out


def test_a_ratio_is_taken_to_the_best_of_the_others_within_a_repetition(compare_hf):
    rates = {"own": [6.0, 8.0, 10.0], "a": [3.0, 1.0, 5.0], "b": [2.0, 4.0, 1.0]}
    assert compare_hf.ratio(rates, "own", ["a", "b"]) == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert compare_hf.ratio(rates, "own", ["a"]) == {"median": 2.0, "min": 2.0, "max": 8.0}


def test_forward_cost_times_all_ways_at_all_rows(forward_cost, tmp_path, capsys):
    config = tiny_config(dtype="bfloat16")
    checkpoint, file = write_tiny_checkpoint(tmp_path / "tiny", config), tmp_path / "cost.json"
    argv = f"{checkpoint} --rows 1,2,6 --fixed-rows 4 --context 40 --repeats 2 --json {file}".split()
    assert forward_cost.command(argv) == 0
    table = json.loads(file.read_text())["milliseconds"]
    assert {way: set(cells) for way, cells in table.items()} == {
        "own, any rows": {"1", "2", "6"},
        "own, fixed 4 rows": {"1", "2"},
        "HF": {"1", "2", "6"},
    }
    assert all(value > 0 for cells in table.values() for value in cells.values())
    assert "own, fixed 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("compare_hf", "--repeats 0", "--repeats 0: must be at least 1"),
        ("compare_hf", "--temperature 0.7", "compares greedy text in one dtype"),
        ("compare_hf", "--device tt", "transformers does not run on a Tenstorrent board"),
        ("compare_hf", "--num-draft-tokens 32", "32 is out of range"),
        ("compare_hf", "--json /nowhere/at/all.json", "cannot write --json /nowhere/at/all.json"),
        ("forward_cost", "somewhere --rows 1,x", "--rows 1,x: give whole numbers"),
        ("forward_cost", "somewhere --rows 1,40", "--rows must be within 1..32"),
        ("forward_cost", "./no/such/dir", "no such directory: ./no/such/dir"),
        ("forward_cost", "", "the following arguments are required: checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(name, argv, message, request, capsys):
    script = request.getfixturevalue(name)
    assert run_command(lambda: script.command(argv.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
