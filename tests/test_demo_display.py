"""What a terminal shows of texts with characters that it would obey."""

import io
import unicodedata
from types import SimpleNamespace

import pytest
from rich.console import Console

from demo.display import PlainView, TerminalView
from demo.runs import Row, Run
from models.cli.command import run_command
from models.cli.text import visible
from models.errors import UserError

OBEYED = [
    *(chr(code) for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
]
TEXT = "a" + "b".join(OBEYED) + "c"


def shown(view_type, terminal):
    """What a view writes for a prompt and a text that hold all of them."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, no_color=True, width=2000, highlight=False, markup=False)
    prompt = SimpleNamespace(number=1, text=TEXT)
    session = SimpleNamespace(prompts=[prompt], timed=False, settings=SimpleNamespace(auto=False))
    view = view_type(console, session)
    run = Run("baseline", prompt, tokens=[1], pieces=[(TEXT, "plain")])
    view.begin_prompt(prompt)
    if view_type is PlainView:
        view.begin_run(run)
    view.end_run(run)
    view.end_prompt(Row(prompt, {"baseline": run}))
    return out.getvalue()


@pytest.mark.parametrize("character", OBEYED, ids=lambda character: f"U+{ord(character):04X}")
def test_a_character_that_a_terminal_obeys_is_replaced_by_visible_ones(character):
    made = visible(character)
    assert made and not any(unicodedata.category(each) in ("Cc", "Cf") for each in made)


def test_other_text_stays_as_it_is():
    text = "line\n\tname = 'é 漢字 שלום ‍👩‍💻'"
    assert visible(text) == text
    assert visible("x\u009b31m\u202ey\x1b[0m") == "x⟨U+009B⟩31m⟨U+202E⟩y␛[0m"


@pytest.mark.parametrize("view_type", [PlainView, TerminalView])
def test_no_view_passes_them_on_to_a_terminal(view_type):
    text = shown(view_type, terminal=True)
    left = text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")  # rich's own styles
    assert not set(left) & set(OBEYED)
    assert text.count("⟨U+202E⟩") == text.count("␛") == 2  # in the prompt and in the text


def test_a_pipe_gets_the_text_as_it_was_written():
    assert shown(PlainView, terminal=False).count(TEXT) == 2


@pytest.mark.parametrize("error", [UserError, OSError])
def test_an_error_passes_none_of_them_on_to_a_terminal(error, capsys):
    def command():
        raise error(f"config.json: unknown key {TEXT}")  # of a file that somebody else may have written

    assert run_command(command) == 2
    said = capsys.readouterr().err
    assert not set(said) & set(OBEYED) and "⟨U+202E⟩" in said and "␛" in said
