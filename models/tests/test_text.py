"""Streams of text: pieces add up, and a text ends before the stop string that is complete first."""

import random

import pytest

from models.errors import UserError
from models.speculative.sequence import Token
from models.speculative.text import TextStream, checked_stops


class Spelled:
    """A detokenizer whose ids stand for texts; None: nothing yet, as inside a character."""

    def __init__(self, texts, rest=""):
        self.texts, self.rest = texts, rest

    def push(self, id):
        return self.texts[id]

    def flush(self):
        return self.rest


def written(texts, stop, rest=""):
    """(pieces, the stop string that ended the text, tokens read) of tokens with these texts."""
    stream, pieces = TextStream(Spelled(texts, rest), stop), []
    for id in range(len(texts)):
        ended = stream.push(Token(id, "plain"))
        pieces.append(stream.take())
        if ended:
            break
    pieces.append(stream.finish())
    return pieces, stream.stopped, len(pieces) - 1


def by_character(text, stop):
    """What characters one by one would give: (text, stop string or None)."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("texts", "stop", "expected", "tokens"),
    [
        (["a", "b\n", "\nc"], ["\n\n"], "ab", 3),  # spans tokens
        (["one", " two", " three"], [" two"], "one", 2),
        (["x", "ab", "c"], ["ab", "abc"], "x", 2),  # one is the beginning of another
        (["x", "a", "bc"], ["abc", "ab"], "x", 3),
        (["xaby"], ["b", "aby"], "xa", 1),  # the one that is complete first, not the one that begins first
        (["xabc"], ["bc", "abc"], "x", 1),  # both end here: the longer one
        (["aaa", "ab"], ["aab"], "aa", 2),  # what was held back is not what follows
        (["no", "thing"], ["never"], "nothing", 2),
        (["", "", "é", "!"], ["!"], "é", 4),
    ],
)
def test_a_text_ends_before_the_stop_string_that_is_complete_first(texts, stop, expected, tokens):
    pieces, stopped, read = written(texts, stop)
    assert ("".join(pieces), read) == (expected, tokens)
    assert (stopped is None) == ("".join(texts) == expected)


def test_only_what_a_stop_string_may_have_begun_with_is_held_back():
    pieces, _, _ = written(["ab", "c", "STO", "x", "ST", "OP"], ["STOP"])
    assert pieces == ["ab", "c", "", "STOx", "", "", ""]


def test_what_is_held_back_comes_at_the_end():
    assert written(["ab", "ST"], ["STOP"], rest="O")[0] == ["ab", "", "STO"]
    pieces, stopped, _ = written(["ab", "ST"], ["STOP"], rest="OP!")
    assert ("".join(pieces), stopped) == ("ab", "STOP")


@pytest.mark.parametrize("seed", range(4))
def test_tokens_borders_make_no_difference(seed):
    """2,000 texts of few letters, cut in any places."""
    draw, stopped = random.Random(seed), 0
    for _ in range(500):
        text = "".join(draw.choices("ab\n", k=draw.randint(1, 14)))
        stop = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        texts, left = [], text
        while left:
            size = draw.randint(0, 4)
            texts.append(left[:size])
            left = left[size:]
        pieces, found, _ = written(texts, stop)
        assert ("".join(pieces), found) == by_character(text, stop), (texts, stop)
        stopped += found is not None
    assert 100 < stopped < 490


def test_each_token_has_its_own_piece_however_far_ahead_it_was_read():
    stream = TextStream(Spelled(["a", "b", "ST", "c"]), ["STOP"])
    for id in range(4):
        stream.push(Token(id, "plain"))
    assert [stream.take() for _ in range(4)] == ["a", "b", "", "STc"]
    assert stream.finish() == ""


def test_without_a_detokenizer_ids_are_shown():
    stream = TextStream(None)
    assert not stream.push(Token(7, "plain"))
    assert stream.take() == " 7"


@pytest.mark.parametrize("stop", ["", ["x", ""], [3], [None]])
def test_a_stop_string_that_is_none_is_refused(stop):
    with pytest.raises(UserError, match="stop string .*at least one character"):
        checked_stops([stop] if stop == "" else stop)
