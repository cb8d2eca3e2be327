"""A drafter that raises costs its text the drafts, and nothing else."""

import gc
import weakref

import pytest

from models.speculative import engine
from models.speculative.drafters import Draft, PerSequence, degrading
from models.speculative.drafters.degrading import Degrading
from models.speculative.engine import Engine
from models.speculative.sequence import Request
from models.tests.engine_fixtures import build_pair, random_prompt

CALLS = ("make", "propose", "observe")


class Breaking:
    """Proposes the last token again, until it raises at a given call."""

    def __init__(self, where, after):
        self.where, self.left = where, after
        self.step("make")

    def step(self, call):
        if call == self.where:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError(f"broken\nin {call}")

    def propose(self, tokens, limit):
        self.step("propose")
        return Draft([tokens[-1]] * limit("again"), source="again")

    def observe(self, accepted):
        self.step("observe")


def write(drafter_of, prompts, slots=4, tokens=12):
    """(texts, their sequences) of an engine, all at once."""
    target, _ = build_pair(1, None, slots=slots)
    engine = Engine(target)
    sequences = [engine.add(Request(prompt, max_new_tokens=tokens, drafter=drafter_of)) for prompt in prompts]
    while not engine.idle:
        engine.step()
    assert [each.error for each in sequences] == [None] * len(sequences)
    return [each.tokens for each in sequences], sequences


PROMPTS = [random_prompt(6 + i, seed=i) for i in range(3)]


@pytest.mark.parametrize("where", CALLS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_text_goes_on_plainly(where, after):
    warned = []
    drafter = Degrading(PerSequence(lambda sequence: Breaking(where, after)), warned.append)
    texts, sequences = write(drafter, PROMPTS[:1])
    assert texts == write(None, PROMPTS[:1])[0]
    drafted = [round_.drafted for round_ in sequences[0].stats.rounds]
    if where == "make" and after:
        assert warned == [] and drafter.failure(sequences[0]) == ""
        return
    assert len(warned) == 1 and drafter.failure(sequences[0]) == f"RuntimeError: broken in {where}"
    assert drafted[after + (where == "observe") :] == [0] * (len(drafted) - after - (where == "observe"))
    assert sum(map(bool, drafted)) == (0 if where == "make" else after + (where == "observe"))


@pytest.mark.parametrize("where", CALLS)
def test_other_texts_keep_their_drafter(where):
    warned = []

    def make(sequence):
        return Breaking(where if sequence.request.prompt == PROMPTS[1] else "", 0)

    drafter = Degrading(PerSequence(make), warned.append)
    texts, sequences = write(drafter, PROMPTS)
    assert texts == write(None, PROMPTS)[0]
    assert len(warned) == 1
    assert [bool(drafter.failure(each)) for each in sequences] == [False, True, False]
    for each in (sequences[0], sequences[2]):
        assert all(round_.drafted for round_ in each.stats.rounds if round_ is not each.stats.rounds[-1])


def test_a_sequence_that_failed_is_not_kept():
    drafter = Degrading(PerSequence(lambda sequence: Breaking("propose", 1)), lambda error: None)
    _, sequences = write(drafter, PROMPTS[:1])
    gone = weakref.ref(sequences[0])
    assert drafter.failure(sequences[0])
    del sequences
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("guarded", [True, False])
def test_every_draft_is_checked_once(guarded, monkeypatch):
    """By the guard, or by the engine where nothing guards."""
    seen = []
    for module in (engine, degrading):
        monkeypatch.setattr(module, "check_draft", lambda draft, *_: seen.append(draft))
    drafter = PerSequence(lambda sequence: Breaking("", 0))
    _, sequences = write(Degrading(drafter, lambda error: None) if guarded else drafter, PROMPTS[:1])
    assert len(seen) == len(sequences[0].stats.rounds) > 2
