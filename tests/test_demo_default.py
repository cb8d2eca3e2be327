"""Which models the demo runs where none is named."""

import json

import pytest

import demo.settings
import models.cli.default
from demo.harness import main
from demo.settings import parse_settings
from models.cli.default import CHAT_TOKENS, TOKENS, everyday_target
from models.errors import UserError
from models.options import NAMED


def chosen(*argv, environ=None):
    """(settings, how often a model was asked for)"""
    asked = []

    def choose(options):
        asked.append(options)
        return "smollm2"

    return parse_settings(list(argv), None, environ or {}, choose), len(asked)


def test_a_chat_model_answers_where_nothing_is_named():
    settings, asked = chosen()
    assert (settings.target, settings.max_new_tokens, asked) == ("smollm2", CHAT_TOKENS, 1)
    assert chosen("--max-new-tokens", "7")[0].max_new_tokens == 7


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--target", "tiny"], {}),
        (["--draft", "somewhere"], {}),
        (["--device", "tt"], {}),
        ([], {"HF_MODEL": "tiny"}),
    ],
)
def test_models_that_are_named_and_boards_are_left_alone(argv, environ):
    settings, asked = chosen(*argv, environ=environ)
    assert (settings.target, settings.max_new_tokens, asked) == (str(NAMED["tiny"][0]), TOKENS, 0)


def test_a_mistake_is_answered_before_anything_is_fetched():
    asked = []
    with pytest.raises(UserError, match="top_p"):
        parse_settings(["--top-p", "7"], None, {}, lambda options: asked.append(1))
    assert asked == []


def test_offline_the_embedded_pair_runs_and_the_demo_says_why(monkeypatch, tmp_path, capsys):
    def fetched(name, announce):
        raise UserError(f"{name} could not be fetched (no route to host)")

    monkeypatch.delenv("HF_MODEL")
    monkeypatch.setattr(models.cli.default, "fetched", fetched)
    path = tmp_path / "run.json"
    assert main(["--max-prompts", "1", "--max-new-tokens", "3", "--json", str(path)]) == 0
    errors = capsys.readouterr().err
    assert "no route to host" in errors
    assert "small pair" in errors
    assert json.loads(path.read_text())["settings"]["target"].endswith("tiny-target")


def test_quiet_runs_fetch_in_silence(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(models.cli.default, "fetched", lambda name, announce: announce("fetching"))
    for quiet in ([], ["--quiet"]):
        options = demo.settings.build_parser(None, {}).parse_args(quiet)
        assert everyday_target(options) == "smollm2"
        said.append(capsys.readouterr().err)
    assert said == ["fetching\n", ""]
