"""What breaks while texts are written costs speed, one warning or one text: never a token, a slot or a page."""

import random

import pytest
import torch

from models.llm import LLM
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.degrading import Degrading
from models.speculative.drafters.model import ModelDrafter
from models.speculative.engine import Engine
from models.speculative.generate import stream
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request
from models.tests.engine_fixtures import build_pair, plain, random_prompt

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 24
SOUND_ROUNDS = 3
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that often agrees, in fp32, three slots each."""
    return build_pair(seed=0, noise=0.07, slots=3)


def _raises(draft):
    raise RuntimeError("broken")


def _probs(change):
    """A draft whose probabilities a function has changed; of a greedy text, made up first."""

    def damaged(draft):
        probs = torch.full((len(draft.tokens), 64), 1 / 64) if draft.probs is None else draft.probs.clone()
        return draft._replace(probs=change(probs))

    return damaged


def _one(value):
    def change(probs):
        probs[-1, 0] = value
        return probs

    return change


# What a drafter may do wrong: (what it makes of a sound draft, words of the one warning).
FAULTS = {
    "raises": (_raises, "RuntimeError: broken"),
    "out of memory": (lambda draft: torch.empty(2**60), "RuntimeError"),
    "id beyond the vocabulary": (lambda draft: draft._replace(tokens=[*draft.tokens[:-1], 64]), "drafted id 64"),
    "negative id": (lambda draft: draft._replace(tokens=[-1, *draft.tokens[1:]]), "drafted id -1"),
    "too many tokens": (lambda draft: draft._replace(tokens=[1] * 40), "40 drafted tokens"),
    "no tree": (lambda draft: draft._replace(parents=[5] * len(draft.tokens)), "no tree"),
    "parents missing": (lambda draft: draft._replace(parents=[-1] * (len(draft.tokens) + 1)), "no tree"),
    "NaN everywhere": (_probs(lambda probs: probs * NAN), "not finite"),
    "one NaN": (_probs(_one(NAN)), "not finite"),
    "one infinity": (_probs(_one(INF)), "not finite"),
    "too few rows of probabilities": (_probs(lambda probs: probs[1:]), "probabilities of shape"),
    "another vocabulary": (_probs(lambda probs: probs[:, :-1]), "probabilities of shape"),
    "probabilities without rows": (_probs(lambda probs: probs[0]), "probabilities of shape"),
    "no draft": (lambda draft: None, "AttributeError"),
}


class Faulty:
    """A real drafter that does one thing wrong after a few rounds."""

    def __init__(self, drafter, fault):
        self.drafter, self.fault, self.left = drafter, fault, SOUND_ROUNDS

    def propose(self, tokens, limit):
        draft = self.drafter.propose(tokens, limit)
        self.left -= 1
        return self.fault(draft) if self.left < 0 and draft.tokens else draft

    def observe(self, accepted):
        self.drafter.observe(accepted)


def drafting(draft, fault=None, which=None):
    """A drafter for all sequences, faulty for all or for those of one prompt."""

    def make(sequence):
        model = ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling)
        return Faulty(model, fault) if fault and which in (None, sequence.request.prompt) else model

    return PerSequence(make)


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


# --------------------------------------------------------------------------------------------------------- the target
@pytest.fixture(scope="module")
def llm():
    with LLM.load("tiny", dtype="fp32", num_draft_tokens=3, slots=2) as loaded:
        yield loaded


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
