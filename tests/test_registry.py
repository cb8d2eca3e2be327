"""A drafter of somebody else's: a row in the registry makes it known to the command line and to its reports."""

import pytest

from demo.harness import main
from models.speculative.drafters import Draft, registry
from models.speculative.drafters.registry import DrafterSpec, Source


class LastToken:
    """Proposes the last token again."""

    def propose(self, tokens, limit):
        return Draft([tokens[-1]] * limit("again"), source="again")

    def observe(self, accepted):
        pass


@pytest.fixture
def again():
    sources = {"again": Source("again", "repetition")}
    spec = DrafterSpec("again", "the last token again", "the last token again", lambda parts: LastToken(), sources)
    registry.register(spec)
    yield
    registry.unregister("again")


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
