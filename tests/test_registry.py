"""A drafter of somebody else's: a row in the registry makes it known to the command line and to its reports."""

import pytest

from demo.harness import main
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
