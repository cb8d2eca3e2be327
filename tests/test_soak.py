"""The soak: it counts what happens, and fails for what is wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from models.cli.command import run_command

ROOT = Path(__file__).resolve().parent.parent


SMALL = "--prompts 4 --max-new-tokens 16 --window 0.3 --memory-mb-per-hour 1e9".split()


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_straight_line_is_found_in_noise(soak):
    line = soak.slope([0, 10, 20, 30, 40], [100.0, 101.1, 101.9, 103.0, 104.0])
    assert line.low < line.an_hour < line.high and abs(line.an_hour - 360) < 10
    assert line.low < 360 < line.high
    assert soak.slope([0, 10], [1, 2]) is None


def test_a_short_soak_finds_no_wrong_token(soak, tmp_path, capsys, one_thread):
    file = tmp_path / "soak.json"
    argv = [*SMALL, "--minutes", "0.08", "--slots", "3", "--json", str(file)]
    assert soak.command(argv) == 0
    counts = json.loads(file.read_text())["counts"]
    assert counts["wrong"] == counts["errors"] == 0 < counts["compared"] < counts["tokens"]
    assert counts["requests"] == counts["finished"] + counts["aborted"]
    assert f"{counts['tokens']} tokens" in capsys.readouterr().out


def test_a_wrong_token_is_found(soak, tmp_path, monkeypatch, one_thread):
    """A verification that takes every drafted token for accepted; compiled layers write many texts in a few seconds."""
    from models import loading
    from models.speculative import verify

    monkeypatch.setattr(loading, "compiles", lambda *_: True)
    monkeypatch.setattr(verify, "accept_greedy", lambda drafted, ids: (len(drafted), list(ids)[-1]))
    file = tmp_path / "soak.json"
    argv = [*SMALL, "--minutes", "0.1", "--slots", "2", "--json", str(file)]
    assert soak.command(argv) == 1
    assert json.loads(file.read_text())["counts"]["wrong"] > 0


def test_mistakes_are_told_in_one_line(soak, capsys):
    assert run_command(lambda: soak.command(["--minutes", "0"])) == 2
    assert capsys.readouterr().err.count("\n") == 1
