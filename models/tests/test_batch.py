"""Many sequences in one engine, with real small models: each is written as if it were alone.

BATCH_CASES in the environment sets the number of random cases (default 100 of up to seven sequences each).
"""

import os
import random

import pytest
import torch

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.model import Paged, in_turns
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import WAITING, Request
from models.speculative.stats import GenerationStats
from models.tests.batch_fixtures import KINDS, SLOTS, VOCAB, Company, Wish, random_wish, request_of, text_of, write
from models.tests.engine_fixtures import random_prompt
from models.tests.test_generate_sampling import P_VALUE, PROMPT, chi_square_p_value, joint_law, p_values, tiny_model
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.model import TorchLlama

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = int(os.environ.get("BATCH_CASES", "100"))


@pytest.fixture(scope="module")
def company():
    """Four slots."""
    return Company()


def checked(company, wishes, sequences):
    """That each text is what it is alone, and that its statistics are its own."""
    for number, (wish, sequence) in enumerate(zip(wishes, sequences, strict=True)):
        assert sequence.error is None, (number, wish, sequence.error)
        text, expected, stats = text_of(sequence), company.expected(wish), sequence.stats
        if stats.finish_reason == "interrupted":
            assert wish.leaves is not None and text == expected[: len(text)], (number, wish)
        else:
            assert text == expected, (number, wish)
            assert stats.finish_reason == ("stop" if text[-1] in wish.stop_ids else "length")
        assert stats.tokens == len(text) == bool(text) + sum(each.emitted for each in stats.rounds)
        assert all(each.drafted <= max(8, 6) and each.emitted <= each.accepted + 1 for each in stats.rounds)
        parts = sum(each.draft_s + each.verify_s + each.host_s for each in stats.rounds)
        assert parts <= stats.decode_s + 1e-9 or stats.finish_reason == "interrupted"


@pytest.mark.parametrize("compiled", [False, True])
def test_every_text_in_any_company_is_its_text_alone(company, compiled):
    """Drafters, lengths, stops, limits, verification, arrivals, departures and bounds on prompts at random."""
    company = Company(compiled=True) if compiled else company
    kinds, accepted, shared = set(), 0, 0
    for case in range(CASES):
        draw = random.Random(case)
        wishes = [random_wish(draw) for _ in range(draw.randint(1, 7))]
        sequences = write(company, wishes, prompt_rows=draw.choice([1, 3, 10, 512]))
        checked(company, wishes, sequences)
        rounds = [each for sequence in sequences for each in sequence.stats.rounds]
        kinds |= {wish.kind for wish, sequence in zip(wishes, sequences, strict=True) if sequence.stats.rounds}
        accepted += sum(each.accepted for each in rounds)
        shared += sum(each.joint is not None and each.joint.sequences > 1 for each in rounds)
    assert kinds == set(KINDS)
    assert accepted > 5 * CASES and shared > 8 * CASES


def test_a_permutation_of_the_batch_permutes_the_results(company):
    for case in range(4):
        draw = random.Random(1000 + case)
        wishes = [
            Wish(
                draw.randrange(30), draw.choice(KINDS[1:]), 3, sampling=SamplingParams(draw.choice([0.0, 0.9]), seed=n)
            )
            for n in range(6)
        ]
        order = draw.sample(range(6), 6)
        texts = [text_of(each) for each in write(company, wishes)]
        permuted = [text_of(each) for each in write(company, [wishes[i] for i in order])]
        assert permuted == [texts[i] for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_text_alone_and_in_any_company(company, kind):
    """With a fixed length, whoever is beside it and however its prompt is cut."""
    draw = random.Random(KINDS.index(kind))
    params = SamplingParams(temperature=0.9, top_k=15, seed=7)
    wish = Wish(8, kind, 0 if kind == "none" else 3, sampling=params)
    (alone,) = write(company, [wish])
    for prompt_rows in (2, 512):
        others = [random_wish(draw) for _ in range(4)]
        place = draw.randrange(5)
        beside = write(company, [*others[:place], wish, *others[place:]], prompt_rows)[place]
        assert text_of(beside) == text_of(alone)
        assert [each.proposed for each in beside.stats.rounds] == [each.proposed for each in alone.stats.rounds]
    assert text_of(alone) != company.texts[8]


# ------------------------------------------------------------------------------------------------- how a step is made
def test_a_step_is_one_forward_of_the_target_and_one_of_the_draft_for_each_position(company):
    engine = Engine(company.target)
    drafter = company.drafter("model")
    for number in range(3):
        controller = FixedDraftLength(2 + number)
        engine.add(Request(company.prompts[number], max_new_tokens=20, drafter=drafter, controller=controller))
    while not engine.idle:
        going = [each for each in engine.running if each.begun]
        company.target.forwards.clear()
        company.draft.forwards.clear()
        engine.step()
        assert len(company.target.forwards) == 1
        if len(going) == 3:
            rows = company.draft.forwards
            longest = max(each.stats.rounds[-1].drafted for each in going)
            assert len(rows) == longest
            assert [len(each) for each in rows] == [
                sum(each.stats.rounds[-1].drafted > i for each in going) for i in range(longest)
            ]


@pytest.mark.parametrize("kind", ["head", "head-tree"])
def test_a_head_drafts_for_all_sequences_with_one_forward_for_each_position(company, kind, monkeypatch):
    forwards, compute = [], TorchHead._rows

    def counted(self, shares, scored):
        forwards.append(len(shares))
        return compute(self, shares, scored)

    monkeypatch.setattr(TorchHead, "_rows", counted)
    engine, drafters = Engine(company.target), {}
    wishes = [Wish(number, kind, 2 + number) for number in range(4)]
    sequences = [engine.add(request_of(company, wish, drafters, {})) for wish in wishes]
    shared = 0
    while not engine.idle:
        going = [each for each in engine.running if each.stats.rounds]
        forwards.clear()
        engine.step()
        if len(going) == 4:
            rounds = [each.stats.rounds[-1] for each in going]
            assert {(each.joint.drafting, each.joint.draft_steps) for each in rounds if each.drafted} == {
                (max(forwards), len(forwards))
            }
            assert len(forwards) == max(each.depth for each in rounds) or kind == "head-tree"
            assert forwards == sorted(forwards, reverse=True) and len(forwards) <= 5
            shared += max(forwards) == 4
    assert shared > 1
    checked(company, wishes, sequences)


@pytest.mark.parametrize("prompt_rows", [1, 7, 20])
def test_writing_never_waits_for_more_rows_of_prompts_than_the_bound(company, prompt_rows):
    engine = Engine(company.target, prompt_rows=prompt_rows)
    writer = engine.add(request_of(company, Wish(1, "model", 2), {}, {}))
    engine.step()
    late = [engine.add(request_of(company, Wish(prompt, "model", 2), {}, {})) for prompt in (5, 11, 10)]
    while any(each.reading for each in late) and not writer.finished:
        company.target.forwards.clear()
        company.draft.forwards.clear()
        before = writer.stats.tokens
        engine.step()
        (rows,) = company.target.forwards
        assert 1 <= sum(len(each.tokens) for each in rows if each.last) <= prompt_rows
        for rows in company.draft.forwards:
            assert sum(len(each.tokens) for each in rows if len(each.tokens) > 4) <= prompt_rows
        assert writer.stats.tokens > before
    assert prompt_rows < 20 or not any(each.reading for each in late)


def test_a_lone_prompt_is_read_at_once_and_of_several_the_first(company):
    engine = Engine(company.target, prompt_rows=5)
    first, second = (engine.add(request_of(company, Wish(prompt, "none", 0), {}, {})) for prompt in (5, 11))
    company.target.forwards.clear()
    engine.step()
    assert first.stats.tokens == 1 and second.cached <= 5
    assert [rows.slot for rows in company.target.forwards[0]][0] == first.slot


def test_chosen_sequences_alone_go_on(company):
    engine = Engine(company.target)
    mine, other = (engine.add(request_of(company, Wish(prompt, "model", 3), {}, {})) for prompt in (3, 4))
    engine.advance(other)
    written = list(other.tokens)
    while not mine.finished:
        engine.step([mine])
    assert text_of(mine) == company.texts[3] and other.tokens == written and not other.finished
    engine.abort(other)


def test_who_is_chosen_and_finds_no_slot_is_told(company):
    engine = Engine(company.target)
    held = [engine.add(request_of(company, Wish(prompt, "none", 0), {}, {})) for prompt in range(SLOTS)]
    for each in held:
        engine.advance(each)
    late = engine.add(request_of(company, Wish(9, "none", 0), {}, {}))
    with pytest.raises(UserError, match="slots are taken"):
        engine.step([late])
    engine.abort(held[0])
    assert [each.sequence for each in engine.step([late])] == [late]


def test_the_wait_of_a_step_is_everybodys(company):
    """Each of them has waited for the whole step, and their rounds say with whom they shared it."""
    wishes = [Wish(number, "combined", 3) for number in range(3)]
    sequences = write(company, wishes)
    whole = GenerationStats.merge(each.stats for each in sequences)
    assert whole.tokens == sum(each.stats.tokens for each in sequences)
    first = [each.stats.rounds[0] for each in sequences]
    assert len({round_.verify_s for round_ in first}) == 1 and len({round_.draft_s for round_ in first}) == 1
    joint = first[0].joint
    assert (joint.sequences, joint.prompt_rows) == (3, 0)
    assert joint.rows == sum(1 + round_.drafted for round_ in first)
    assert joint.context == sum(len(each.request.prompt) + 1 for each in sequences)


# ------------------------------------------------------------------------------------------ a bound on rows together
@pytest.mark.parametrize("most", [4, 8, 13])
@pytest.mark.parametrize("length", [5, "auto"])
def test_a_forward_never_has_more_rows_than_the_target_takes(monkeypatch, most, length):
    """Four texts beside prompts that are read: drafts of a fixed length are verified in turns, those of an automatic
    one are cut to fit one forward, and every text is the one it is alone."""
    company = Company()
    monkeypatch.setattr(
        type(company.target), "limits", property(lambda self: TorchLlama.limits.fget(self)._replace(batch_rows=most))
    )
    rows, forwards = [], []

    def seen(parts):
        rows.append(sum(len(each.tokens) for each in parts if not each.last))

    company.target.fail = seen
    wishes = [
        Wish(number, kind, length, arrives=2 * (number > 3))
        for number, kind in enumerate(("model", "combined", "prompt-lookup", "tree", "none", "model"))
    ]
    engine = Engine(company.target)
    drafters, controllers = {}, {}
    sequences = [engine.add(request_of(company, wish, drafters, controllers)) for wish in wishes[:4]]
    late = wishes[4:]
    while late or not engine.idle:
        if late and not engine.waiting:
            sequences.append(engine.add(request_of(company, late.pop(0), drafters, controllers)))
        before = len(rows)
        engine.step()
        forwards.append(len(rows) - before)
    checked(company, wishes, sequences)
    assert max(rows) <= most
    drafted = [round_.drafted for each in sequences for round_ in each.stats.rounds]
    if length == "auto":
        assert max(forwards) == 1
    else:
        assert max(drafted) >= min(length, most - 1)
        assert max(forwards) > 1, "there was nothing to take turns for"


def test_turns_keep_the_order_and_fill_forwards():
    assert in_turns([5, 5, 5], None) == [[0, 1, 2]] and in_turns([], 8) == []
    assert in_turns([5, 3, 1, 8, 9, 1], 8) == [[0, 1], [2], [3], [4], [5]]


def test_more_texts_than_rows_decode_in_turns(monkeypatch):
    """Nobody drafts where not even one row each fits."""
    company = Company()
    monkeypatch.setattr(
        type(company.target), "limits", property(lambda self: TorchLlama.limits.fget(self)._replace(batch_rows=3))
    )
    wishes = [Wish(number, "model", "auto") for number in range(4)]
    sequences = write(company, wishes)
    checked(company, wishes, sequences)
    assert all(sum(len(each.tokens) for each in parts if not each.last) <= 3 for parts in company.target.forwards)


# ------------------------------------------------------------------------------------------------------- admission
paged = pytest.mark.skipif(not issubclass(TorchLlama, Paged), reason="slots of this model have positions of their own")


@paged
def test_who_does_not_fit_waits_in_order_and_who_never_fits_is_refused():
    """A pool of three blocks for four slots: nobody is stopped for another, and none overtakes."""
    company = Company(pool=3 * 128 - 32)
    engine = Engine(company.target)
    with pytest.raises(UserError, match="the cache has 60 for all texts: ask for at most 55 new tokens"):
        Request([1] * 5, max_new_tokens=80).check(company.target.limits._replace(pool=60))
    began, sequences = [], []
    for number in range(12):
        sequences.append(engine.add(request_of(company, Wish(number, "combined", 3), {}, {})))
    most = 0
    while not engine.idle:
        engine.step()
        began += [each for each in engine.running if each not in began]
        most = max(most, len(engine.running))
    assert began == sequences and 1 <= most < SLOTS
    checked(company, [Wish(number, "combined", 3) for number in range(12)], sequences)


@paged
def test_a_known_beginning_is_not_read_again_and_is_told():
    company = Company(max_seq_len=512)
    beginning = random_prompt(300, 77, VOCAB)
    prompts = [[*beginning, *random_prompt(9, number, VOCAB)] for number in range(3)]
    for kind in ("none", "combined", "head"):
        engine = Engine(company.target)
        drafter = company.drafter(kind)
        texts, reused = [], []
        for prompt in prompts:
            company.target.forwards.clear()
            sequence = engine.add(Request(prompt, max_new_tokens=12, drafter=drafter))
            while not sequence.finished:
                engine.step()
            texts.append(text_of(sequence))
            reused.append(sequence.stats.reused_tokens)
            read = sum(len(rows.tokens) for each in company.target.forwards for rows in each if rows.last)
            assert read == len(prompt) - reused[-1]
        assert reused[1:] == [256, 256], kind
        if kind == "none":
            expected = texts
        assert texts == expected


@pytest.fixture(scope="module")
def roomy():
    """Texts of several pages."""
    return Company(max_seq_len=512)


@paged
@pytest.mark.parametrize("kind", ["model", "model-ids", "combined", "tree"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_draft_model_does_not_read_a_known_beginning_again_and_drafts_the_same(roomy, kind, beside):
    """Alone and in company: rows that it reads, what is proposed, and what is told."""
    company = roomy
    if company.draft.cache.unit != 128:
        pytest.skip("on this machine only whole chunks are shared")
    beginning = random_prompt(300, 100 + 2 * KINDS.index(kind) + beside, VOCAB)
    prompts = [[*beginning, *random_prompt(length, number, VOCAB)] for number, length in enumerate((9, 4, 90))]
    found = {}
    for reuse in (True, False):
        engine, drafter = Engine(company.target), company.drafter(kind)
        if beside:
            engine.add(Request(company.prompts[3], max_new_tokens=90, drafter=drafter))
        for number, prompt in enumerate(prompts):
            company.draft.forwards.clear()
            sequence = engine.add(Request(prompt, max_new_tokens=12, drafter=drafter, reuse=reuse))
            while not sequence.finished:
                engine.step()
            held = sequence.stats.draft_reused_tokens
            found[reuse, number] = text_of(sequence), [each.proposed for each in sequence.stats.rounds]
            assert sequence.stats.acceptance_rate > 0
            assert held == (256 if reuse and number else 0) == sequence.stats.reused_tokens
            rows = [each for rows in company.draft.forwards for each in rows if each.slot == sequence.slot]
            assert all(each.position >= held for each in rows)
            if held and kind != "combined":
                assert min(each.position for each in rows) == held
        while not engine.idle:
            engine.step()
        assert company.draft.cache.usage.live == 0
    for number in range(3):
        assert found[True, number] == found[False, number]


# ------------------------------------------------------------------------------------------------------------ errors
def test_an_error_of_any_kind_stays_with_its_sequence(company):
    """In the drafter, while it is made, while it observes, in a watcher, in the target's and the draft's forward."""

    class Broken(PromptLookup):
        def propose(self, tokens, limit):
            raise ValueError("propose")

    class Deaf(PromptLookup):
        def observe(self, accepted):
            raise ValueError("observe")

    def unmade(sequence):
        raise ValueError("made")

    class Watching:
        def push(self, token):
            raise ValueError("watched")

    broken = {
        "propose": {"drafter": PerSequence(lambda sequence: Broken())},
        "observe": {"drafter": PerSequence(lambda sequence: Deaf())},
        "made": {"drafter": PerSequence(unmade)},
        "watched": {"watcher": Watching()},
        "target": {},
        "draft": {},
    }
    drafters, target, draft = {}, company.target, company.draft
    for message, options in broken.items():
        engine = Engine(target)
        wishes = [Wish(1, "model", 3), Wish(2, "combined", 2), Wish(4, "tree", 3)]
        good = [engine.add(request_of(company, wish, drafters, {})) for wish in wishes]
        chosen = {"drafter": drafters["model"], "controller": FixedDraftLength(3), **options}
        bad = engine.add(Request(company.prompts[5], max_new_tokens=20, **chosen))
        engine.step()

        def fail(rows, message=message, bad=bad):
            if bad.slot != WAITING and not bad.finished and any(each.slot == bad.slot for each in rows):
                raise ValueError(message)

        target.fail = fail if message == "target" else lambda rows: None
        draft.fail = fail if message == "draft" else lambda rows: None
        try:
            while not engine.idle:
                engine.step()
        finally:
            target.fail = draft.fail = lambda rows: None
        assert str(bad.error) == message and bad.stats.finish_reason == "interrupted"
        checked(company, wishes, good)


def test_logits_that_are_not_finite_end_only_their_own_text(company):
    """A prompt whose first token's embedding is damaged, beside others."""
    broken = Company()
    broken.target.embedding = broken.target.embedding.clone()
    broken.target.embedding[23] = float("nan")
    broken.target._views.clear()
    broken.target._views[0] = broken.target
    engine = Engine(broken.target)
    wishes = [Wish(number, "none", 0, max_new_tokens=8) for number in range(30) if 23 not in broken.prompts[number]]
    wishes = [wish for wish in wishes if 23 not in broken.texts[wish.prompt][:8]][:3]
    good = [engine.add(request_of(broken, wish, {}, {})) for wish in wishes]
    bad = engine.add(Request([1, 23, 2], max_new_tokens=8))
    while not engine.idle:
        engine.step()
    assert "not finite" in str(bad.error)
    checked(broken, wishes, good)


# ---------------------------------------------------------------------------------------------------------- sampling
@pytest.fixture(scope="module")
def sampled():
    """Texts of four tokens after PROMPT at two temperatures, side by side in one engine: counts of each, counts of the
    pairs of their second tokens, and the statistics."""
    target, draft = tiny_model(noise=0, slots=8), tiny_model(noise=0.5, slots=8)
    from models.speculative.drafters.in_step import InStep
    from models.speculative.drafters.model import ModelDrafter

    drafter = InStep(lambda each: ModelDrafter(draft.slot(each.slot), each.request.sampling), draft)
    engine = Engine(target)
    sequences = []
    for seed in range(1200):
        params = SamplingParams(**TEMPERATURES[seed % 2], seed=seed)
        sequences.append(
            engine.add(Request(PROMPT, params, 4, drafter=drafter, controller=FixedDraftLength(1 + seed // 2 % 2)))
        )
    while not engine.idle:
        engine.step()
    return target, sequences


TEMPERATURES = ({"temperature": 1.3}, {"temperature": 0.7})


@pytest.mark.parametrize("which", [0, 1])
def test_each_of_two_temperatures_in_a_batch_keeps_its_joint_distribution(sampled, which):
    target, sequences = sampled
    counts = torch.zeros([8] * 4, dtype=torch.long)
    for each in sequences[which::2]:
        counts[tuple(text_of(each))] += 1
    stats = GenerationStats.merge(each.stats for each in sequences[which::2])
    assert 0.2 < stats.acceptance_rate < 0.9
    assert min(p_values((target,), TEMPERATURES[which], counts)) > P_VALUE
    assert min(p_values((target,), TEMPERATURES[1 - which], counts)) < P_VALUE, "it could be the other's as well"


def test_texts_of_a_batch_are_independent(sampled):
    """Pairs of tokens of two neighbours, at the same place: their joint distribution is the product."""
    target, sequences = sampled
    laws = [joint_law(target, SamplingParams(**params), 2).sum(0) for params in TEMPERATURES]
    counts = torch.zeros(8, 8, dtype=torch.long)
    for one, other in zip(sequences[::2], sequences[1::2], strict=True):
        counts[text_of(one)[1], text_of(other)[1]] += 1
    assert chi_square_p_value(counts, laws[0][:, None] * laws[1][None]) > P_VALUE
