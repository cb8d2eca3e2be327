"""The engine with real tiny models: sequences beside each other, whatever else is written meanwhile."""

import itertools
import random

import pytest

from models.errors import UserError
from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import OneText, PerSequence
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.generate import stream
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import WAITING, Request
from models.tests.engine_fixtures import build_pair, plain, random_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair():
    """Two slots each."""
    return build_pair(seed=0, noise=0.07, slots=2)


def drafter_of(draft, kind="model"):
    """A drafter for every sequence of an engine."""

    def make(sequence):
        model = ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling)
        return Combined(PromptLookup(), model) if kind == "combined" else model

    return PerSequence(make)


def request(number, draft=None, controller=None, kind="model", **options):
    drafter = drafter_of(draft, kind) if draft else None
    return Request(
        random_prompt(3 + 5 * number, seed=number),
        drafter=drafter,
        controller=controller,
        **{"max_new_tokens": 40} | options,
    )


def finish(engine):
    """Texts of all sequences, in the order in which they began, by rounds of all."""
    texts = {}
    while not engine.idle:
        for sequence, tokens in engine.step():
            texts.setdefault(sequence, []).extend(token.id for token in tokens)
    return list(texts.values())


@pytest.mark.parametrize("kind", ["model", "combined"])
@pytest.mark.parametrize("length", [1, 4, "auto"])
def test_two_sequences_in_turn_write_what_each_writes_alone(pair, kind, length):
    target, draft = pair
    for first, second in itertools.combinations(range(4), 2):
        controller = AutoDraftLength() if length == "auto" else FixedDraftLength(length)
        engine = Engine(target)
        for number in (first, second):
            engine.add(request(number, draft, controller, kind))
        expected = [plain(target, random_prompt(3 + 5 * n, seed=n), max_new_tokens=40) for n in (first, second)]
        assert finish(engine) == expected


def test_two_engines_with_automatic_lengths_write_what_each_writes_alone():
    pairs = [build_pair(seed, noise=0.07) for seed in (0, 1)]
    streams, expected = [], []
    for number, (target, _) in enumerate(pairs):
        expected.append(plain(target, random_prompt(3 + 5 * number, seed=number), max_new_tokens=60))
    for number, (target, draft) in enumerate(pairs):
        engine = Engine(target)
        sequence = engine.add(request(number, draft, AutoDraftLength(), "combined", max_new_tokens=60))
        streams.append(stream(engine, sequence))
    written = list(zip(*streams, strict=True))  # token by token in turn
    assert [[token.id for token in tokens] for tokens in zip(*written, strict=True)] == expected


def test_sequences_beyond_the_slots_wait_and_find_a_clean_slot(pair):
    target, draft = pair
    engine = Engine(target)
    sequences = [
        engine.add(request(number, draft, FixedDraftLength(3), max_new_tokens=10 + 7 * number)) for number in range(5)
    ]
    engine.step()
    assert [each.slot for each in sequences] == [0, 1, WAITING, WAITING, WAITING]
    assert (len(engine.running), len(engine.waiting)) == (2, 3)
    texts = finish(engine)
    for number, sequence in enumerate(sequences):
        expected = plain(target, random_prompt(3 + 5 * number, seed=number), max_new_tokens=10 + 7 * number)
        assert sequence.tokens[len(sequence.request.prompt) :] == expected
        assert sequence.stats.tokens == len(expected) and sequence.stats.finish_reason == "length"
    assert len(texts) == 5 and engine.idle


def test_sampled_sequences_repeat_in_any_company(pair):
    """A fixed length and a seed give one text, alone and beside another one."""
    target, draft = pair

    def texts(*numbers):
        engine = Engine(target)
        for number in numbers:
            params = SamplingParams(temperature=0.9, top_k=20, seed=number)
            engine.add(request(number, draft, FixedDraftLength(3), sampling=params))
        return finish(engine)

    (alone,) = texts(1)
    assert texts(1, 2)[0] == texts(3, 1)[1] == alone
    assert texts(2)[0] != alone


def test_a_sequence_may_be_ended_at_any_step(pair):
    target, draft = pair
    draw = random.Random(0)
    for _ in range(30):
        engine = Engine(target)
        first, second = (engine.add(request(number, draft, FixedDraftLength(3))) for number in (1, 2))
        for _ in range(draw.randrange(6)):
            engine.step()
        engine.abort(first)
        assert first.stats.finish_reason == "interrupted" and first.slot not in [each.slot for each in engine.running]
        written = len(first.tokens)
        finish(engine)
        assert len(first.tokens) == written
        assert second.tokens[13:] == plain(target, random_prompt(13, seed=2), max_new_tokens=40)
        engine.abort(second)
        assert second.stats.finish_reason == "length"


def test_an_error_ends_only_the_sequence_it_happened_in(pair):
    target, draft = pair

    class Failing(PromptLookup):
        def propose(self, tokens, limit):
            raise ValueError("no idea")

    engine = Engine(target)
    good = engine.add(request(1, draft, FixedDraftLength(3)))
    bad = engine.add(Request([1, 2, 3], drafter=OneText(Failing()), max_new_tokens=30))
    finish(engine)
    assert str(bad.error) == "no idea" and bad.stats.finish_reason == "interrupted" and len(bad.tokens) == 4
    assert good.error is None
    assert good.tokens[8:] == plain(target, random_prompt(8, seed=1), max_new_tokens=40)


def test_an_interrupt_while_a_drafter_is_made_is_that_interrupt(pair):
    def interrupted(sequence):
        raise KeyboardInterrupt

    engine = Engine(pair[0])
    sequence = engine.add(Request([1, 2, 3], drafter=PerSequence(interrupted)))
    tokens = stream(engine, sequence)
    next(tokens)
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert sequence.stats.finish_reason == "interrupted" and engine.idle


def test_a_stream_without_a_free_slot_says_so(pair):
    engine = Engine(pair[0])
    open_streams = [stream(engine, engine.add(request(number))) for number in (0, 1)]
    for each in open_streams:
        next(each)
    third = stream(engine, engine.add(request(2)))
    with pytest.raises(UserError, match="all 2 slots are taken"):
        next(third)
    open_streams[0].close()
    assert len(list(stream(engine, engine.add(request(2))))) == 40


def test_a_watcher_ends_a_text_inside_a_block(pair):
    """As a stop string does: in an accepted token, and in the target's own after it."""
    target, draft = pair
    text = plain(target, random_prompt(8, seed=1), max_new_tokens=40)

    class EndingAt:
        def __init__(self, count):
            self.left = count

        def push(self, token):
            self.left -= 1
            return self.left == 0

    origins = set()
    for count in range(1, 41):
        engine = Engine(target)
        sequence = engine.add(request(1, draft, FixedDraftLength(4), watcher=EndingAt(count)))
        tokens = list(stream(engine, sequence))
        assert [token.id for token in tokens] == text[:count]
        assert (sequence.stats.tokens, sequence.stats.finish_reason) == (count, "stop")
        assert sum(r.emitted for r in sequence.stats.rounds) == count - 1
        origins.add(tokens[-1].origin)
    assert origins >= {"drafted", "corrected", "bonus"}


def test_what_nothing_can_write_is_refused_before_it_waits(pair):
    engine = Engine(pair[0])
    for wrong in (Request([]), Request([999]), Request([1], max_new_tokens=0), Request([1] * 128)):
        with pytest.raises(UserError):
            engine.add(wrong)
    assert engine.idle
