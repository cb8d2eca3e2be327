"""Draft heads in an engine of several sequences: beginnings that they share, and how they read prompts together."""

import time

import pytest
import torch

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.degrading import Degrading
from models.speculative.drafters.draft_head import HeadDrafter
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request
from models.tests.batch_fixtures import VOCAB, Company, text_of
from models.tests.engine_fixtures import random_prompt
from models.torch_llama.draft_head import TorchHead

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("head", "head-tree", "combined")
SHARED = 256  # of beginnings of 300 tokens, in whole pages
SAMPLING = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=0.8, seed=3)}


@pytest.fixture(scope="module")
def company():
    """Texts of several pages."""
    found = Company(max_seq_len=512)
    if found.head.cache.unit != 128 or found.target.cache.unit != 128:
        pytest.skip("on this machine only whole chunks are shared")
    return found


@pytest.fixture
def forwards(monkeypatch):
    """Of each forward of a head: (slot, cache position of the first row, rows) of each sequence."""
    noted, compute = [], TorchHead._rows

    def seen(self, shares, scored):
        noted.append([(share.head._slot, share.start, len(share.tokens)) for share in shares])
        return compute(self, shares, scored)

    monkeypatch.setattr(TorchHead, "_rows", seen)
    return noted


def drafter_of(company, kind):
    if kind != "combined":
        return company.drafter(kind)
    head = company.head

    def combined(sequence):
        return Combined(PromptLookup(), HeadDrafter(head.slot(sequence.slot), sequence.request.sampling))

    return InStep(combined, head, head.taps)


def prompts_of(seed, lengths=(9, 4, 90)):
    """Prompts that begin with the same 300 tokens."""
    beginning = random_prompt(300, seed, VOCAB)
    return [[*beginning, *random_prompt(length, number, VOCAB)] for number, length in enumerate(lengths)]


def written(engine, prompt, drafter, **options):
    """A sequence that was written to its end, whoever is beside it."""
    options = {"max_new_tokens": 12, "controller": FixedDraftLength(3), **options}
    sequence = engine.add(Request(prompt, drafter=drafter, **options))
    while not sequence.finished:
        engine.step()
    assert sequence.error is None and not sequence.stats.drafting_failure
    return sequence


def told(sequence):
    """Its text, and all that was proposed for it."""
    return text_of(sequence), [each.proposed for each in sequence.stats.rounds]


def reused(sequence):
    return sequence.stats.reused_tokens, sequence.stats.draft_reused_tokens


# ------------------------------------------------------------------------------------------------------- beginnings
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("beside", [False, True])
def test_a_known_beginning_is_read_by_neither_model_and_what_follows_is_the_same(
    company, kind, sampling, beside, forwards
):
    seed = 200 + 4 * KINDS.index(kind) + 2 * (sampling == "greedy") + beside
    prompts, found = prompts_of(seed), {}
    for reuse in (True, False):
        engine, drafter = Engine(company.target), drafter_of(company, kind)
        if beside:
            engine.add(Request(company.prompts[3], max_new_tokens=90, drafter=drafter))
        for number, prompt in enumerate(prompts):
            company.target.forwards.clear()
            forwards.clear()
            sequence = written(engine, prompt, drafter, reuse=reuse, sampling=SAMPLING[sampling])
            found[reuse, number] = told(sequence)
            held = SHARED if reuse and number else 0
            assert reused(sequence) == (held, held)
            read = [rows for each in company.target.forwards for rows in each if rows.last]
            assert sum(len(rows.tokens) for rows in read if rows.slot == sequence.slot) == len(prompt) - held
            rows = [start for shares in forwards for slot, start, _ in shares if slot == sequence.slot]
            assert min(rows, default=held) == held
        while not engine.idle:
            engine.step()
        assert company.head.cache.usage.live == company.target.cache.usage.live == 0
    for number in range(3):
        assert found[True, number] == found[False, number]
    assert any(proposed for _, rounds in found.values() for proposed in rounds)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_the_policy_hears_what_need_not_be_read(company, kind):
    heard = []

    class Listening(FixedDraftLength):
        def holds(self, tokens):
            heard.append(tokens)

    engine, drafter = Engine(company.target), company.drafter(kind)
    for prompt in prompts_of(390 + len(kind))[:2]:
        sequence = written(engine, prompt, drafter, controller=Listening(3))
    assert heard == [SHARED] == [sequence.stats.draft_reused_tokens]


def test_a_heads_row_is_of_two_tokens(company):
    """The last row of a page belongs to the token after it: where that is another one, the page is not shared."""
    beginning, drafter = random_prompt(SHARED, 300, VOCAB), company.drafter("head")
    first, same, other = ([*beginning, token, *random_prompt(20, 5, VOCAB)] for token in (1, 1, 2))
    engine = Engine(company.target)
    assert reused(written(engine, first, drafter)) == (0, 0)
    assert reused(written(engine, other, None)) == (SHARED, 0)
    assert reused(written(engine, same, drafter)) == (SHARED, SHARED)
    sequence = written(engine, [*other, 3], drafter)
    assert reused(sequence) == (SHARED - 128, SHARED - 128)
    assert told(sequence) == told(written(engine, [*other, 3], drafter, reuse=False))
    changed = [(first[0] + 1) % VOCAB, *first[1:]]  # the first token has no row of its own
    assert reused(written(engine, changed, drafter)) == (0, 0)


@pytest.mark.parametrize("known", [0, 128])
def test_what_a_head_holds_and_the_target_does_not_is_read_again(company, known, monkeypatch):
    """And pages that another sequence shares stay as they are."""
    (first, second, third), drafter = prompts_of(310 + known), company.drafter("head")
    engine = Engine(company.target)
    written(engine, first, drafter)
    beside = engine.add(Request(second, max_new_tokens=60, drafter=drafter, controller=FixedDraftLength(3)))
    for _ in range(3):
        engine.step()
    assert reused(beside) == (SHARED, SHARED) and not beside.finished
    reserve = company.target.reserve
    monkeypatch.setattr(
        company.target, "reserve", lambda slot, tokens, positions: reserve(slot, tokens[: known + 1], positions)
    )
    sequence = written(engine, third, drafter)
    assert reused(sequence) == (known, known)
    while not engine.idle:
        engine.step()
    assert told(sequence) == told(written(Engine(company.target), third, drafter, reuse=False))
    alone = Engine(company.target)
    assert told(beside) == told(written(alone, second, drafter, reuse=False, max_new_tokens=60))


def test_the_bits_of_what_is_shared_are_those_of_a_prompt_read_anew(company):
    first, second, _ = prompts_of(320)
    drafter, head, states = company.drafter("head"), company.head, []
    for reuse in (True, False):
        engine = Engine(company.target)
        if reuse:
            written(engine, first, drafter)
        sequence = engine.add(Request(second, max_new_tokens=2, drafter=drafter, reuse=reuse))
        engine.step()
        engine._begin(sequence)
        drafter.of(sequence).read(sequence.tokens)
        table = head.cache.tables[sequence.slot]
        states.append(head.cache.gather(head.cache.pool[0], table, 384)[:, : len(second) - 2].clone())
        assert reused(sequence) == ((SHARED, SHARED) if reuse else (0, 0))
        engine.abort(sequence)
    assert torch.equal(*states) and states[0].abs().sum() > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_pages_of_who_never_begins_are_given_back(wrapped):
    """Aborted while its prompt is read, or while it waits for room in the target's pool."""
    company = Company(max_seq_len=512, pool=512)
    drafter, cache = company.drafter("head"), company.head.cache
    if wrapped:
        drafter = Degrading(drafter, pytest.fail)
    first, second, _ = prompts_of(330)
    engine = Engine(company.target, prompt_rows=40)
    written(engine, first, drafter)
    writer = engine.add(Request(company.prompts[3], max_new_tokens=60, drafter=drafter))
    engine.step()
    engine.step()
    alone = cache.usage.live
    sequence = engine.add(Request(second, max_new_tokens=12, drafter=drafter))
    engine.step()
    assert sequence.reading and cache.usage.live > alone
    late = engine.add(Request(first, max_new_tokens=200, drafter=drafter))
    held = cache.usage.live
    engine.step()
    assert late in engine.waiting and cache.usage.live == held
    engine.abort(sequence)
    engine.abort(late)
    assert cache.usage.live == alone and not writer.finished
    engine.abort(writer)
    assert cache.usage.live == 0


# ----------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_by_one_forward_for_all(company, kind, forwards):
    engine, drafter = Engine(company.target), drafter_of(company, kind)
    prompts = [random_prompt(length, 340 + length, VOCAB) for length in (40, 90, 60)]
    sequences = [
        engine.add(Request(prompt, max_new_tokens=12, drafter=drafter, controller=FixedDraftLength(3)))
        for prompt in prompts
    ]
    while any(each.reading for each in sequences):
        engine.step()
    forwards.clear()
    engine.step()
    reads = [sorted(shares) for shares in forwards if any(n > 32 for _, _, n in shares)]
    assert reads == [[(each.slot, 0, len(each.request.prompt) - 1) for each in sequences]] or kind == "combined"
    while not engine.idle:
        engine.step()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert told(sequence) == told(written(engine, prompt, drafter))


@pytest.mark.parametrize("rows", [7, 40])
def test_texts_never_wait_for_more_of_a_heads_reading_than_the_bound(company, rows, forwards):
    engine, drafter = Engine(company.target, prompt_rows=rows), company.drafter("head")
    writer = engine.add(Request(company.prompts[3], max_new_tokens=200, drafter=drafter))
    engine.step()
    late = [engine.add(Request(prompt, max_new_tokens=8, drafter=drafter)) for prompt in prompts_of(350)[:2]]
    most = 0
    while not (all(each.finished for each in late) or writer.finished):
        forwards.clear()
        before = writer.stats.tokens
        engine.step()
        assert writer.stats.tokens > before
        read = [n for shares in forwards for slot, _, n in shares if slot != writer.slot and n > 5]
        assert sum(read) <= rows
        most = max(most, sum(read))
    assert most == rows
    engine.abort(writer)
    while not engine.idle:
        engine.step()
    for each in late:
        assert text_of(each) == text_of(written(engine, each.request.prompt, None, max_new_tokens=8))


def test_the_time_of_reading_is_counted_once(company, monkeypatch):
    """As reading, shared out by rows, and not as drafting."""
    compute, reading_s = TorchHead._rows, 0.4

    def slow(self, shares, scored):
        if any(len(share.tokens) > 32 for share in shares):
            time.sleep(reading_s)
        return compute(self, shares, scored)

    monkeypatch.setattr(TorchHead, "_rows", slow)
    engine, drafter = Engine(company.target), company.drafter("head")
    prompts = [random_prompt(length, 360 + length, VOCAB) for length in (50, 149)]
    sequences = [
        engine.add(Request(prompt, max_new_tokens=8, drafter=drafter, controller=FixedDraftLength(3)))
        for prompt in prompts
    ]
    while any(not each.stats.rounds for each in sequences):
        engine.step()
    seconds = [each.stats.draft_prefill_s for each in sequences]
    assert reading_s <= sum(seconds) < 1.9 * reading_s
    assert seconds[1] == pytest.approx(148 / 49 * seconds[0], rel=0.01)
    for each in sequences:
        first = each.stats.rounds[0]
        assert first.joint.drafting == 2 and max(first.joint.draft_s, first.draft_s, first.host_s) < reading_s
    for each in sequences:
        engine.abort(each)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_reading_in_pieces_is_told_to_the_policy_as_a_whole(company, kind):
    """Once, with the time of all pieces: what a token costs to read is made of it."""
    told_s = []

    class Listening(FixedDraftLength):
        def read(self, source, seconds):
            told_s.append((source, seconds))

    engine, drafter = Engine(company.target, prompt_rows=60), company.drafter(kind)
    writer = engine.add(Request(company.prompts[3], max_new_tokens=200, drafter=drafter))
    engine.step()
    prompt = random_prompt(300, 380, VOCAB)
    sequence = engine.add(Request(prompt, max_new_tokens=8, drafter=drafter, controller=Listening(3)))
    pieces = 0
    while not sequence.finished:
        before = sequence.stats.draft_prefill_s
        engine.step()
        pieces += sequence.stats.draft_prefill_s > before
    engine.abort(writer)
    assert pieces == 5 and told_s == [(kind, pytest.approx(sequence.stats.draft_prefill_s))]


def test_a_reading_that_fails_is_its_own_sequences(company, monkeypatch):
    """The others are read all the same, though the forward was a common one and had begun."""
    engine, drafter = Engine(company.target), company.drafter("head")
    prompts = [random_prompt(length, 370 + length, VOCAB) for length in (300, 310, 50)]
    sequences = [
        engine.add(Request(prompt, max_new_tokens=8, drafter=drafter, controller=FixedDraftLength(3)))
        for prompt in prompts
    ]
    while any(each.reading for each in sequences):
        engine.step()
    compute, bad = TorchHead._rows, sequences[1]

    def failing(self, shares, scored):
        if any(share.head._slot == bad.slot and share.start + len(share.tokens) > 290 for share in shares):
            raise ValueError("broken")
        return compute(self, shares, scored)

    monkeypatch.setattr(TorchHead, "_rows", failing)
    engine.step()
    assert str(bad.error) == "broken"
    monkeypatch.undo()
    while not engine.idle:
        engine.step()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if sequence is not bad:
            assert sequence.error is None and told(sequence) == told(written(engine, prompt, drafter, max_new_tokens=8))
