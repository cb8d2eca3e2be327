"""What breaks while texts are written costs speed, one warning or one text: never a token, a slot or a page."""

import random
from dataclasses import replace

import pytest
import torch
from loguru import logger

from models.errors import UserError
from models.llm import LLM
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.degrading import Degrading
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.registry import DrafterSpec, Source, register, unregister
from models.speculative.engine import Engine
from models.speculative.generate import stream
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request
from models.tests.engine_fixtures import build_pair, plain, random_prompt
from models.tests.faulty_drafters import FAULTS, SOUND_ROUNDS, Faulty, drafting, faults, raises

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 24


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that often agrees, in fp32, three slots each."""
    return build_pair(seed=0, noise=0.07, slots=3)


def finish(engine):
    while not engine.idle:
        engine.step()


def request(prompt, drafter, **options):
    return Request(prompt, drafter=drafter, controller=FixedDraftLength(3), **{"max_new_tokens": NEW} | options)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("company", [1, 3])
def test_a_faulty_drafter_costs_one_warning_and_no_token(pair, name, company, tally):
    """Alone, and beside texts whose drafter is sound; and the next text is written as always."""
    target, draft = pair
    fault, words = FAULTS[name]
    prompts = [random_prompt(5 + i, seed=i) for i in range(company)]
    warned = []
    drafter = Degrading(
        drafting(draft, fault, prompts[0]), lambda error: warned.append(f"{type(error).__name__}: {error}")
    )
    engine = Engine(target)
    sequences = [engine.add(request(prompt, drafter)) for prompt in prompts]
    finish(engine)
    after = engine.add(request(prompts[0][::-1], drafter))
    finish(engine)
    for each in (*sequences, after):
        assert each.error is None and each.stats.finish_reason == "length"
        assert each.tokens[len(each.request.prompt) :] == plain(target, each.request.prompt, max_new_tokens=NEW)
    assert len(warned) == 1 and words in warned[0], warned
    drafted = [each.drafted > 0 for each in sequences[0].stats.rounds]
    assert sum(drafted) == SOUND_ROUNDS
    tally["faults survived"] += 1
    for each in (*sequences[1:], after):
        assert sum(round_.drafted > 0 for round_ in each.stats.rounds) >= len(each.stats.rounds) - 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_sampled_text_of_a_faulty_drafter_is_as_long_and_of_the_targets_tokens(pair, name):
    """With the draft's real probabilities; top-k leaves tokens out that must never appear."""
    target, draft = pair
    fault, words = FAULTS[name]
    sampling = SamplingParams(temperature=0.8, top_k=4, seed=3)
    prompt, warned = random_prompt(9, seed=9), []
    drafter = Degrading(drafting(draft, fault), lambda error: warned.append(f"{type(error).__name__}: {error}"))
    engine = Engine(target)
    sequence = engine.add(request(prompt, drafter, sampling=sampling))
    finish(engine)
    text = sequence.tokens[len(prompt) :]
    assert sequence.error is None and len(text) == NEW
    assert len(warned) == 1 and words in warned[0], warned
    for end, token in enumerate(text, len(prompt)):
        assert token in target.prefill(sequence.tokens[:end]).topk(4).indices


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_drafter_that_nothing_guards_ends_its_own_text_alone(pair, name):
    target, draft = pair
    fault, _ = FAULTS[name]
    prompts = [random_prompt(5 + i, seed=i) for i in range(3)]
    engine, drafter = Engine(target), drafting(draft, fault, prompts[1])
    sequences = [engine.add(request(prompt, drafter)) for prompt in prompts]
    finish(engine)
    expected = [plain(target, prompt, max_new_tokens=NEW) for prompt in prompts]
    texts = [each.tokens[len(each.request.prompt) :] for each in sequences]
    assert [each.error is not None for each in sequences] == [False, True, False]
    assert texts[0] == expected[0] and texts[2] == expected[2]
    assert 0 < len(texts[1]) < NEW and texts[1] == expected[1][: len(texts[1])]


# -------------------------------------------------------------------------------------------------------- the library
@pytest.fixture(scope="module")
def llm():
    with LLM.load("tiny", dtype="fp32", num_draft_tokens=3, slots=2) as loaded:
        yield loaded


@pytest.fixture
def warnings():
    """The log's warnings, as they come."""
    told = []
    sink = logger.add(lambda message: told.append(message.record["message"]), level="WARNING", format="")
    yield told
    logger.remove(sink)


@pytest.fixture
def fragile(llm):
    """A function: a drafting of the embedded pair with one fault, in texts of one prompt or of all."""
    names = []

    def make(name, fault=None, which=None):
        def drafter(parts):
            sound = ModelDrafter(parts.draft, parts.sampling)
            return Faulty(sound, fault) if which in (None, parts.settings["prompt_tokens"]) else sound

        names.append(name)
        register(DrafterSpec(name, name, name, drafter, {"model": Source("model", "a broken model")}))
        return llm.drafting(name, 3)

    yield make
    for name in names:
        unregister(name)


PROMPT = "def add(self, value):"
OTHER = "class Point:"


@pytest.mark.parametrize("name", FAULTS)
def test_a_text_of_the_library_goes_on_plainly_and_the_next_one_drafts_again(llm, fragile, warnings, name, tally):
    fault, words = faults(llm.target.model.limits.vocabulary)[name]
    broken = fragile("fragile", fault)
    whole = llm.generate(PROMPT, max_new_tokens=NEW, speculate=False)
    for texts in (1, 2):
        completion = llm.generate(PROMPT, max_new_tokens=NEW, speculate=broken)
        assert completion == replace(whole, stats=completion.stats)
        assert completion.stats is llm.stats and words in llm.stats.drafting_failure
        assert sum(each.drafted > 0 for each in llm.stats.rounds) == SOUND_ROUNDS
        assert len(warnings) == texts and llm.stats.drafting_failure in warnings[-1]
    tally["faults survived"] += 2
    llm.generate(PROMPT, max_new_tokens=NEW)
    assert llm.stats.drafting_failure == "" and len(warnings) == 2
    assert whole.stats.drafting_failure == ""


def test_texts_side_by_side_in_the_library_keep_their_drafter(llm, fragile, warnings):
    prompts = [PROMPT, OTHER]
    expected = [each.token_ids for each in llm.generate(prompts, max_new_tokens=NEW, speculate=False)]
    broken = fragile("fragile", raises, which=len(llm.encode(OTHER)))
    assert len(llm.encode(PROMPT)) != len(llm.encode(OTHER))
    completions = llm.generate(prompts, max_new_tokens=NEW, speculate=broken)
    assert [each.token_ids for each in completions] == expected
    assert [each.stats.drafting_failure for each in completions] == ["", "RuntimeError: broken"]
    assert llm.stats.drafting_failure == "RuntimeError: broken" and len(warnings) == 1


@pytest.mark.parametrize("error", [UserError("no such text: give another"), ValueError("broken")])
def test_a_drafter_that_refuses_a_text_ends_it_and_one_that_fails_as_it_is_made_does_not(llm, warnings, error):
    def make(parts):
        raise error

    register(DrafterSpec("refusing", "refusing", "refusing", make, {"refused": Source("refused", "nothing")}))
    try:
        refusing = llm.drafting("refusing", 3)
        if isinstance(error, UserError):
            with pytest.raises(UserError, match="no such text"):
                llm.generate(PROMPT, max_new_tokens=NEW, speculate=refusing)
            assert warnings == []
        else:
            text = llm.generate(PROMPT, max_new_tokens=NEW, speculate=refusing).text
            assert text == llm.generate(PROMPT, max_new_tokens=NEW, speculate=False).text
            assert len(warnings) == 1
    finally:
        unregister("refusing")
    assert llm.engine.idle
    llm.generate(PROMPT, max_new_tokens=NEW)


# --------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("call", [1, 3])
def test_a_target_out_of_memory_ends_a_text_with_what_there_is_and_the_next_is_written(llm, error, call, monkeypatch):
    """On the embedded pair, in the prompt and in a later round."""
    prompt, new, model = "def add(self, value):", 12, llm.target.model
    whole = llm.generate(prompt, max_new_tokens=new, speculate=False).token_ids
    idle, extend, calls = model.cache.idle, model.extend, []

    def failing(rows, *want):
        calls.append(rows)
        if len(calls) >= call:
            raise error
        return extend(rows, *want)

    written = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "extend", failing)
        with pytest.raises(type(error)):
            for piece in llm.stream(prompt, max_new_tokens=new):
                written.append(piece.id)
    assert written == whole[: len(written)] and bool(written) == (call > 1)
    assert llm.engine.idle and model.cache.idle == idle
    assert llm.generate(prompt, max_new_tokens=new).token_ids == whole


def failing_for(llm, prompt, error, calls):
    """An `extend` that fails from a prompt's so many-th forward on, with rows of others beside it or without."""
    extend, ids, seen = llm.target.model.extend, llm.encode(prompt), []

    def failing(rows, *want):
        slots = {each.slot for each in llm.engine.running if each.request.prompt == ids}
        if slots & {each.slot for each in rows}:
            seen.append(rows)
            if len(seen) >= calls:
                raise error
        return extend(rows, *want)

    return failing


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("call", [1, 5])
def test_the_error_of_a_whole_text_has_what_was_written(llm, error, call, monkeypatch):
    whole = llm.generate(PROMPT, max_new_tokens=NEW, speculate=False)
    idle = llm.target.model.cache.idle
    with monkeypatch.context() as patch:
        patch.setattr(llm.target.model, "extend", failing_for(llm, PROMPT, error, call))
        with pytest.raises(type(error)) as raised:
            llm.generate(PROMPT, max_new_tokens=NEW, speculate=False)
    (completion,) = raised.value.completions
    assert completion.token_ids == whole.token_ids[: call - 1]
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == "interrupted" and str(error) in completion.error
    assert completion.stats is llm.stats and llm.stats.tokens == call - 1
    assert llm.engine.idle and llm.target.model.cache.idle == idle


@pytest.mark.parametrize("prompts", [2, 4])
def test_an_error_in_one_text_of_a_list_leaves_the_others_whole(llm, prompts, monkeypatch, tally):
    """Two slots: the others are beside it, or still wait when it happens."""
    texts = [PROMPT, OTHER, "import os\n", "x = [1, 2, 3]\n"][:prompts]
    whole = llm.generate(texts, max_new_tokens=NEW)
    error = MemoryError("no memory")
    with monkeypatch.context() as patch:
        patch.setattr(llm.target.model, "extend", failing_for(llm, OTHER, error, 6))
        with pytest.raises(MemoryError) as raised:
            llm.generate(texts, max_new_tokens=NEW)
    completions = raised.value.completions
    assert raised.value is error and len(completions) == prompts
    for i, (completion, expected) in enumerate(zip(completions, whole, strict=True)):
        if i == 1:
            n = len(completion.token_ids)
            assert 0 < n < NEW and completion.token_ids == expected.token_ids[:n]
            assert expected.text.startswith(completion.text) and completion.text
            assert (completion.finish_reason, completion.error) == ("interrupted", "MemoryError: no memory")
        else:
            assert completion == replace(expected, stats=completion.stats)
    assert llm.stats.tokens == sum(len(each.token_ids) for each in completions)
    assert llm.engine.idle
    assert [each.text for each in llm.generate(texts, max_new_tokens=NEW)] == [each.text for each in whole]
    tally["faults survived"] += 1


def test_an_interruption_of_a_list_has_what_was_written(llm, monkeypatch):
    texts = [PROMPT, OTHER, "import os\n"]
    whole = llm.generate(texts, max_new_tokens=NEW, speculate=False)
    step, steps = llm.engine.step, []

    def interrupted(chosen):
        steps.append(chosen)
        if len(steps) > 5:
            raise KeyboardInterrupt
        return step(chosen)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt) as raised:
            llm.generate(texts, max_new_tokens=NEW, speculate=False)
    for completion, expected, tokens in zip(raised.value.completions, whole, (5, 5, 0), strict=True):
        assert completion.token_ids == expected.token_ids[:tokens]
        assert (completion.finish_reason, completion.error) == ("interrupted", "")
    assert llm.engine.idle


# ---------------------------------------------------------------------------------------------------------- the clock
@pytest.mark.parametrize("length", [3, "auto"])
def test_a_clock_that_jumps_changes_no_token(pair, length):
    """Back and forth by hours: times say nothing then, texts do."""
    from models.speculative.control.policy import AutoDraftLength

    target, draft = pair
    jump = random.Random(0)
    for seed in range(10):
        prompt = random_prompt(6, seed=seed)
        engine = Engine(target, clock=lambda: jump.uniform(-1e4, 1e4))
        controller = AutoDraftLength() if length == "auto" else FixedDraftLength(length)
        sequence = engine.add(Request(prompt, drafter=drafting(draft), controller=controller, max_new_tokens=NEW))
        text = [token.id for token in stream(engine, sequence)]
        assert text == plain(target, prompt, max_new_tokens=NEW)
        assert sequence.error is None and sum(each.emitted for each in sequence.stats.rounds) == NEW - 1
