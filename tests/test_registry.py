"""A drafter of somebody else's: a row in the registry makes it known to the command line and to its reports."""

import json

import pytest

from demo.harness import main
from models.speculative.drafters.registry import spec_of
from models.tests.engine_fixtures import registered_last_token


@pytest.fixture
def again():
    with registered_last_token():
        yield


def test_the_demo_runs_a_new_drafter_and_names_it(again, capsys, tmp_path):
    page = tmp_path / "run.html"
    flags = ["--prompt", "a a a a", "--max-new-tokens", "8", "--no-color", "--html", str(page)]
    assert main(["--drafter", "again", "--num-draft-tokens", "2", *flags]) == 0
    out = capsys.readouterr().out
    assert "the last token again, 2 tokens a round" in out and "outputs identical: yes" in out
    assert "the last token again" in page.read_text(encoding="utf-8")


def test_what_it_has_no_use_for_is_refused(again, capsys):
    assert main(["--drafter", "again", "--draft", "x"]) == 2
    assert "--draft has no meaning with --drafter again" in capsys.readouterr().err


def test_the_help_lists_it(again, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "again" in capsys.readouterr().out


def test_the_demo_goes_on_without_one_that_fails_and_says_so(again, capsys, monkeypatch, tmp_path):
    """One warning a text, the text plain decoding's; the next prompt drafts again."""
    flags = ["--prompt", "a a a a", "--prompt", "b b b b", "--max-new-tokens", "12", "--no-color", "--json"]
    drafter = ["--drafter", "again", "--num-draft-tokens", "2"]
    assert main([*drafter, *flags, str(tmp_path / "sound.json")]) == 0
    capsys.readouterr()
    kind, drafts = type(spec_of("again").make(None)), {}
    propose = kind.propose

    def broken(self, tokens, limit):
        drafts[self] = drafts.get(self, 0) + 1
        if drafts[self] > 2:
            raise ZeroDivisionError("a drafter of mine")
        return propose(self, tokens, limit)

    monkeypatch.setattr(kind, "propose", broken)
    assert main([*drafter, *flags, str(tmp_path / "broken.json")]) == 0
    told = capsys.readouterr()
    assert told.out.count("drafter failed") == 2 and "outputs identical: yes" in told.out
    warnings = [line for line in told.err.splitlines() if "a drafter of mine" in line]
    assert len(warnings) == len(drafts) == 3  # the warm-up is a text too
    sound, fragile = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sound", "broken"))
    for before, after in zip(sound["prompts"], fragile["prompts"], strict=True):
        assert after["speculative"]["token_ids"] == before["speculative"]["token_ids"]
        assert after["speculative"]["rounds"] > after["speculative"]["plain_rounds"] > 0
