"""Tables and bars that command lines share."""

import io
import sys

import pytest

from models.cli.console import loading_bar, measuring_bar, writing_bar
from models.cli.tables import markdown_table, terminal_table


def test_a_markdown_table_lines_up():
    lines = markdown_table(("way", "x"), [("a", "1.00x"), ("long name", "–")]).splitlines()
    assert lines == [
        "| way       |     x |",
        "|-----------|------:|",
        "| a         | 1.00x |",
        "| long name |     – |",
        "",
    ]


def test_words_and_numbers_are_aligned_as_asked():
    assert markdown_table(("a", "bb", "c"), [("xx", "y", "100")], left=2) == (
        "| a  | bb |   c |\n|----|----|----:|\n| xx | y  | 100 |\n\n"
    )
    assert markdown_table(("a", "b"), []) == "| a | b |\n|---|--:|\n\n"
    columns = terminal_table(("a", "bb", "c"), [("xx", "y", "100")], left=2, title="t").columns
    assert [column.justify for column in columns] == ["left", "left", "right"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError):
        markdown_table(("a", "b"), [("x",)])


def moving(name, quiet):
    """Use one of the bars as its command does."""
    if name == "loading":
        with loading_bar(quiet, timed=True) as moved:
            moved("target", 1, 2, "embedding")
            moved("target", 2, 2, "norm")
    elif name == "measuring":
        with measuring_bar(quiet) as bar:
            bar.begin(2, "warm-up")
            bar.step()
            bar.begin(1, "repetition")
            bar.step("repetition 1")
    else:
        with writing_bar("tensors", 10) as written:
            written(10)


class TerminalText(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("name", ["loading", "measuring", "writing"])
def test_a_bar_is_drawn_on_a_terminal_only(name, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name_ in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name_, raising=False)
    texts = {}
    for kind, quiet in ((TerminalText, False), (TerminalText, True), (io.StringIO, False)):
        monkeypatch.setattr(sys, "stderr", kind())
        moving(name, quiet)
        texts[kind, quiet] = sys.stderr.getvalue()
    assert texts[io.StringIO, False].strip() == ""
    assert {"loading": "loading target", "measuring": "repetition", "writing": "writing tensors"}[name] in texts[
        TerminalText, False
    ]
    assert name == "writing" or texts[TerminalText, True] == ""
