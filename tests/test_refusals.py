"""Every bad input of the tables in docs/reliability.md gets the answer there; requests: `test_server_hostile.py`."""

import pytest

from models.cli.text import visible
from tests.bad_inputs import BAD_INPUTS
from tests.bad_requests import BAD_REQUESTS
from tests.record_refusals import comparable, faults, read, refusal

RECORDED = read()


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.what)
def test_a_bad_input_is_refused_as_the_documents_say(bad, tmp_path, tally):
    answer = refusal(bad, tmp_path)
    assert visible(answer) == answer
    assert not comparable(RECORDED) or answer == RECORDED["inputs"][bad.what]
    tally["cases tried"] += 1


def test_a_faulty_drafter_is_warned_of_as_the_documents_say():
    answers = faults()
    assert not comparable(RECORDED) or answers == RECORDED["faults"]


def test_what_is_recorded_is_what_is_tried():
    """In the same order too: tables are made of it."""
    assert list(RECORDED["inputs"]) == [bad.what for bad in BAD_INPUTS]
    assert list(RECORDED["requests"]) == list(BAD_REQUESTS)
