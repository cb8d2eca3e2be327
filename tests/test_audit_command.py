"""The audit on command lines: of a run that was recorded, and at the end of the demo."""

import json

import pytest

from models.cli.command import run_command
from scripts import audit


@pytest.fixture
def recorded(run, tmp_path):
    """Record a run of the demo; returns its file."""

    def call(*argv):
        code, results = run("--prompt", "def", "--prompt", "class", "--max-new-tokens", "10", *argv)
        assert code == 0
        path = tmp_path / "run.json"
        path.write_text(json.dumps(results))
        return path

    return call


def audited(*argv):
    return run_command(lambda: audit.command([str(each) for each in argv]))


def change(path, **texts):
    results = json.loads(path.read_text())
    results["prompts"][1]["speculative"] |= texts
    path.write_text(json.dumps(results))


@pytest.mark.parametrize("argv", [[], ["--dtype", "fp32"], ["--drafter", "tree", "--dtype", "fp32"]])
def test_a_recorded_run_is_identical(argv, recorded, tmp_path, capsys):
    path = recorded(*argv)
    assert audited(path, "--json", tmp_path / "out.json") == 0
    assert "audit: identical (4 texts, 40 tokens replayed" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["verdict"] == "identical" and [text["path"] for text in found["texts"]] == [
        *("speculative", "baseline") * 2
    ]
    assert audited(path, "--path", "speculative") == 0
    assert "2 texts, 20 tokens" in capsys.readouterr().out


def test_a_text_that_was_changed_is_different_and_its_place_is_told(recorded, capsys):
    path = recorded()
    tokens = json.loads(path.read_text())["prompts"][1]["speculative"]["token_ids"]
    change(path, token_ids=[*tokens[:6], (tokens[6] + 1) % 256, *tokens[7:]])
    assert audited(path) == 1
    out = capsys.readouterr().out
    assert "audit: different" in out and "text 3, token 7" in out and "top-2 margin" in out


def test_a_sampled_run_is_tested_with_what_it_was_drawn_with(recorded, capsys):
    path = recorded("--temperature", "0.9", "--top-k", "8")
    assert audited(path) == 0
    assert "audit: consistent" in capsys.readouterr().out
    results = json.loads(path.read_text())
    results["settings"]["top_k"] = 1  # then hardly any of its tokens could have been drawn
    path.write_text(json.dumps(results))
    assert audited(path) == 1
    assert "leaves out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "no run of the demo"), ("[]", "no run of the demo"), ("{}", "it has no 'settings'"), (None, "cannot read")],
)
def test_a_file_that_is_no_run_is_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert audited(path) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_run_without_texts_and_an_output_over_its_input_are_refused(recorded, capsys):
    path = recorded("--mode", "baseline")
    assert audited(path, "--json", path) == 2
    assert "overwrite" in capsys.readouterr().err
    assert audited(path, "--path", "speculative") == 2
    assert "no complete text of the speculative path" in capsys.readouterr().err
    assert audited(path, "--alpha", "2") == 2


def test_the_demo_audits_its_own_texts(run, capsys):
    assert run("--prompt", "def", "--audit")[0] == 0
    assert "audit: identical (1 texts, 8 tokens" in capsys.readouterr().out


def test_the_demo_says_that_its_text_is_another_one(run, wrong_third_token, capsys):
    code, results = run("--prompt", "def", "--audit")
    assert code == 1 and results["interrupted"] is False
    assert "text 1, token 3" in capsys.readouterr().out


def test_sampled_texts_of_the_demo_are_audited_too(run, capsys):
    assert run("--prompt", "def", "--audit", "--temperature", "0.8")[0] == 0
    assert "audit: consistent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "compiled"), [({"compiled": True}, True), ({"compiled": False}, False), ({}, False)]
)
def test_layers_are_computed_as_the_run_computed_them(written, compiled):
    """Whatever this machine would choose; runs from before there were compiled layers had torch's."""
    options = audit._options({"target": "tiny", "device": "cpu", "rows_alike": True, **written}, None)
    assert options["compiled"] == compiled
    assert "compiled" not in audit._options({"target": "tiny", "device": "tt", **written}, None)
