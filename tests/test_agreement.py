"""scripts/agreement.py: what it counts, what it reads, and a run on a mock board."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.board_mock import cluster
from models.cli.command import run_command
from models.loading import open_model
from models.options import named_target
from scripts import agreement

ROOT = Path(__file__).resolve().parent.parent
needs_ttnn = pytest.mark.skipif(not cluster.is_installed(), reason="ttnn is not installed")


@pytest.fixture(scope="module")
def opened():
    return open_model(named_target("tiny"))


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("def first(items):\n    return items[0]\n---\nfor index in range(10):\n    print(index)\n")
    return file


def test_top_1_counts_equal_choices_and_top_5_those_among_the_likeliest():
    likeliest = torch.tensor([[7, 1, 2, 3, 4], [1, 7, 2, 3, 4], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5]])
    assert agreement.agreement(likeliest, torch.tensor([7, 7, 7, 7])) == agreement.Agreement(4, 0.25, 0.75)


def test_texts_are_cut_to_the_positions_asked_for(opened, texts):
    whole = agreement.texts_of(opened, [texts], 1000)
    assert len(whole) == 2 and all(ids[0] == opened.tokenizer.bos_id for ids in whole)
    assert agreement.texts_of(opened, [texts], 4) == [ids[:4] for ids in whole]


def test_the_exact_model_says_what_follows_each_token(opened, texts):
    ids = agreement.texts_of(opened, [texts], 1000)
    likeliest = agreement.exact_choices(opened, ids)
    assert likeliest.shape == (sum(map(len, ids)), 5)
    prefix = agreement.exact_choices(opened, [ids[1][:5]])
    assert torch.equal(prefix, likeliest[len(ids[0]) : len(ids[0]) + 5])


def test_a_precision_is_a_row_and_a_target_two_columns():
    found = {"positions": 10, "top1": 0.9, "top5": 1.0}
    head, rows = agreement.table(
        {"tiny": {"bf16": found, "lofi": found | {"top1": 0.5}}, "other": {"bf16": found, "lofi": found}}
    )
    assert head == ["precision", "tiny: top-1 of 10", "top-5", "other: top-1 of 10", "top-5"]
    assert rows[1] == ("lofi", "50.0%", "100.0%", "90.0%", "100.0%")


@needs_ttnn
def test_a_mock_board_agrees_more_in_bf16_than_in_bfp4(texts, tmp_path):
    file = tmp_path / "found.json"
    command = f"-m models.board_mock N150 scripts/agreement.py --texts {texts} --precision bfp4 bf16 --json {file}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results["machine"]["mock"] is True and results["machine"]["board"] == "N150"
    low, high = (results["targets"]["tiny"][name] for name in ("bfp4", "bf16"))
    assert low["positions"] == high["positions"] > 20
    assert high["top1"] > 0.9 and low["top1"] <= high["top1"] and high["top5"] == 1


def test_the_cpu_in_bf16_and_int8_agrees_nearly_always(texts, tmp_path):
    file = tmp_path / "found.json"
    assert agreement.command(["--device", "cpu", "--texts", str(texts), "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert list(results["targets"]["tiny"]) == list(agreement.CPU_PRECISIONS)
    for found in results["targets"]["tiny"].values():
        assert found["positions"] > 20 and found["top1"] > 0.85 and found["top5"] > 0.95


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--precision fp8", "no precision is called 'fp8': use one of bf16"),
        ("--device cpu --precision lofi", "--precision lofi is none of the CPU's: use one of bf16"),
        ("--positions 0", "--positions 0: give a whole number of at least 1"),
        ("--texts missing.txt", "cannot read the prompt file missing.txt"),
        ("--json /no/such/folder/file.json", "cannot write --json"),
        ("--target no-such-directory", "no-such-directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, message):
    assert run_command(lambda: agreement.command(argv.split())) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
