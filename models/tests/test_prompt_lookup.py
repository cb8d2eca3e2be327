"""PromptLookup: its rule against a search that reads everything, and the loop with real tiny models."""

import itertools
import random
from collections import Counter
from functools import partial

import pytest
import torch

from models.speculative import acceptance
from models.speculative.acceptance import distribution
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Limit, PerSequence
from models.speculative.drafters.prompt_lookup import LONGEST, SHORTEST, PromptLookup
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import (
    build,
    build_pair,
    draw_texts,
    engine_config,
    perturbed,
    plain,
    random_prompt,
    upto,
)
from models.tests.llama_fixtures import random_tensors
from models.tests.test_generate_sampling import P_VALUE, chi_square_p_value

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------------------- the rule
def search(tokens: list[int], k: int) -> tuple[list[int], int]:
    """(what PromptLookup should propose, how many tokens matched) by reading the whole text for every length."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(k):
                    text.append(text[end + i])
                return text[len(tokens) :], n
    return [], 0


@pytest.mark.parametrize("alphabet", [1, 2, 3, 5, 12, 40])
def test_proposals_equal_those_of_a_search_through_the_text(alphabet):
    """Of texts that grow by 0 to 10 tokens between two calls, in part by repeating themselves."""
    matched = Counter()
    for seed in range(30):
        rng = random.Random(f"{alphabet}/{seed}")
        lookup, tokens = PromptLookup(), [rng.randrange(alphabet) for _ in range(rng.choice([1, 2, 3, 7, 40]))]
        for calls in range(40):
            k, given = rng.randint(0, 9), list(tokens)
            draft = lookup.propose(given, upto(k))
            expected, n = search(tokens, k)
            assert draft.tokens == expected, (seed, tokens, k)
            assert given == tokens
            assert draft.probs is None and draft.fused is None
            assert (draft.prefill_s > 0) == (calls == 0)
            assert draft.source == ("lookup" if n >= 4 else "lookup-short") or not expected
            given.clear()  # must not have been kept
            matched[n] += 1
            if expected:
                lookup.observe(rng.randint(0, len(expected)))
            begin = rng.randrange(len(tokens))
            tokens += tokens[begin : begin + rng.randint(0, 8)]
            tokens += [rng.randrange(alphabet) for _ in range(rng.choice([0, 0, 1, 2]))]
    if alphabet > 3:
        assert min(matched[n] for n in (0, 2, 3, 4, 5, 6)) > 10, matched


@pytest.mark.parametrize("tokens, drafted", [
    pytest.param([1, 2, 7, 8, 1, 2, 9, 8, 1, 2], [9, 8, 1, 2, 9], id="the most recent of equal matches"),
    pytest.param([5, 1, 2, 7, 7, 3, 1, 2, 9, 9, 5, 1, 2], [7, 7, 3, 1, 2], id="a longer match, though it is older"),
    pytest.param([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 8, 8, 0, 1, 2, 3, 4, 5, 6], [8, 8, 0, 1, 2],
                 id="six are enough: the seventh does not count"),
    pytest.param([1, 2, 3, 1, 2], [3, 1, 2, 3, 1], id="on past the end of the text, with itself"),
    pytest.param([4, 4, 4], [4] * 5, id="a match that overlaps what is matched"),
    pytest.param([3, 1, 2, 4, 2], [], id="one token is no match"),
    pytest.param([1, 2], [], id="the last tokens are no earlier occurrence of themselves"),
    pytest.param([1], [], id="a text of one token"),
])  # fmt: skip
def test_what_is_copied(tokens, drafted):
    assert PromptLookup().propose(tokens, upto(5)).tokens == drafted


def test_the_limit_is_asked_for_once_and_only_where_there_is_a_match():
    lookup, asked = PromptLookup(), []

    @Limit
    def limit(source):
        asked.append(source)
        return 0

    assert lookup.propose([1, 2, 3, 1], limit).tokens == []
    assert asked == []
    assert lookup.propose([1, 2, 3, 1, 2], limit).tokens == []
    assert asked == ["lookup-short"]
    assert lookup.propose([1, 2, 3, 1, 2], upto(2)).tokens == [3, 1]  # asked again, having been told 0


class CountedList(list):
    """Counts the tokens that are read out of it."""

    read = 0

    def __getitem__(self, index):
        items = super().__getitem__(index)
        self.read += len(items) if isinstance(index, slice) else 1
        return items

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()


class CountedDict(dict):
    """Counts look-ups and entries made."""

    steps = 0

    def get(self, *args):
        self.steps += 1
        return super().get(*args)

    def __setitem__(self, *args):
        self.steps += 1
        super().__setitem__(*args)

    def __iter__(self):
        self.steps += len(self)
        return super().__iter__()


def test_a_round_costs_the_same_at_any_length_of_the_text():
    lengths = range(SHORTEST, LONGEST + 1)
    rng, k = random.Random(0), 4
    lookup, tokens = PromptLookup(), CountedList(rng.randrange(4) for _ in range(3000))
    lookup._after = CountedDict()
    grown = len(tokens)
    for _ in range(300):
        tokens.read = lookup._after.steps = 0
        assert len(lookup.propose(tokens, upto(k)).tokens) == k
        assert tokens.read <= sum(lengths) * (grown + 1) + k
        assert lookup._after.steps <= len(lengths) * (grown + 1)
        grown = rng.randint(0, 5)
        tokens.extend(rng.randrange(4) for _ in range(grown))


# -------------------------------------------------------------------------------------------------- the loop
def looked_up(target, prompt, k=4, **options):
    """(ids, stats) of a generation with PromptLookup."""
    stats = GenerationStats()
    tokens = generate(target, PromptLookup(), prompt, controller=FixedDraftLength(k), stats=stats, **options)
    return [token.id for token in tokens], stats


@pytest.mark.parametrize("vocab_size", [5, 12, 24])
def test_greedy_text_with_lookup_equals_plain_greedy(vocab_size):
    """3 vocabularies x 4 models x 4 prompts x 5 draft lengths = 240 cases."""
    rounds = []
    for seed in range(4):
        target, _ = build_pair(seed, None, vocab_size)
        for number, length in enumerate((1, 5, 40, 70)):
            prompt = random_prompt(length, 10 * seed + number, vocab_size)
            expected = plain(target, prompt, max_new_tokens=20)
            for k in (1, 2, 4, 8, 31):
                ids, stats = looked_up(target, prompt, k, max_new_tokens=20)
                assert ids == expected, (seed, length, k)
                assert all(r.source.startswith("lookup") for r in stats.rounds if r.drafted)
                rounds += [r for r in stats.rounds if r.drafted and not r.cut]
    none = sum(r.accepted == 0 for r in rounds)
    whole = sum(r.accepted == r.drafted for r in rounds)
    assert min(none, whole, len(rounds) - none - whole) > 10, (none, whole, len(rounds))


class Recital:
    """A target that knows one text by heart."""

    vocab_size, max_seq_len, max_rows = 64, 128, 32

    def __init__(self, text):
        self.text = text

    def prefill(self, tokens):
        return torch.nn.functional.one_hot(torch.tensor(self.text[len(tokens)]), self.vocab_size)

    def greedy(self, tokens, position):
        return self.text[position + 1 : position + 1 + len(tokens)]


@pytest.mark.parametrize("stop, emitted", [(3, 0), (4, 1), (6, 3), (7, 4), (8, 5), (9, 1), (20, 2)])
@pytest.mark.parametrize("verification", ["batched", "sequential"])
def test_nothing_follows_a_stop_token_inside_a_copy(stop, emitted, verification):
    """In the copied prompt it had stopped nothing."""
    prompt, text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2], [3, 4, 5, 6, 7, 8, 9, *range(20, 30)]
    target = Recital(prompt + text)
    whole, stats = looked_up(target, prompt, 4, max_new_tokens=14)
    assert whole == text[:14]
    assert [(r.drafted, r.accepted) for r in stats.rounds[:3]] == [(4, 4), (4, 1), (0, 0)]
    options = {"max_new_tokens": 14, "stop_ids": (stop,), "verification": verification}
    ids, stats = looked_up(target, prompt, 4, **options)
    assert ids == text[: text.index(stop) + 1]
    assert stats.finish_reason == "stop"
    if emitted:  # 3 is the first token of all
        assert stats.rounds[-1].emitted == emitted
        assert stats.rounds[-1].cut == (emitted <= stats.rounds[-1].accepted)
        assert sum(r.emitted for r in stats.rounds) == len(ids) - 1


@pytest.mark.parametrize("k", [1, 4, 31])
@pytest.mark.parametrize("fixed_rows", [None, 8])
def test_copies_fill_the_context_and_no_more(fixed_rows, k):
    cut = 0
    for seed in range(6):
        target, _ = build_pair(seed, None, vocab_size=5, max_seq_len=40, fixed_rows=fixed_rows)
        prompt = random_prompt(7, seed, vocab_size=5)
        ids, stats = looked_up(target, prompt, k, max_new_tokens=1000)
        assert ids == plain(target, prompt, max_new_tokens=1000)
        assert len(prompt) + len(ids) == 40
        assert stats.finish_reason == "context"
        left = 32
        for r in stats.rounds:
            assert r.drafted <= min(k, left - 1, target.max_rows - 1)
            left -= r.emitted
            cut += r.drafted > 0 and r.cut
        assert left == 0
    assert cut > 0 or k == 1  # the end shortened a copy


# ------------------------------------------------------------------------------------------------- sampling
VOCAB = 8
WARM = {"temperature": 0.7}


def tiny_model(noise: float, slots: int = 8):
    """One layer, 8 tokens, logits spread enough to be far from uniform; with noise a relative of the model without."""
    config = engine_config(VOCAB, layers=1)
    tensors = random_tensors(config, seed=7)
    tensors["lm_head.weight"] *= 1.5
    return build(config, perturbed(tensors, noise, seed=8), max_seq_len=48, slots=slots)


def joint_law(target, prompt) -> torch.Tensor:
    """p(t1, t2, t3) after the prompt [VOCAB] * 3, from the target alone, reading each prefix anew."""
    params, joint = SamplingParams(**WARM), torch.ones([VOCAB] * 3, dtype=torch.float64)
    for length in range(3):
        for drawn in itertools.product(range(VOCAB), repeat=length):
            row = distribution(target.prefill([*prompt, *drawn])[None], params.temperature)[0].double()
            joint[drawn] *= row.view([VOCAB] + [1] * (2 - length))
    return joint / joint.sum()


def p_values(counts, law) -> list[float]:
    """Of tokens 2-3, 1-2 and 1-3: the first comes from the prefill, the others are drafted."""
    pairs = [chi_square_p_value(counts.sum(others), law.sum(others)) for others in (0, 2)]
    return [*pairs, chi_square_p_value(counts, law)]


@pytest.fixture(scope="module")
def target():
    return tiny_model(noise=0)


@pytest.fixture(scope="module")
def prompt(target):
    """Of the target's own writing, so that copies are likely to be accepted."""
    return [3, *plain(target, [3], max_new_tokens=31, sampling=SamplingParams(**WARM))]


@pytest.fixture(scope="module")
def law(target, prompt):
    return joint_law(target, prompt)


def write_texts(target, prompt, texts: int):
    """Counts [VOCAB] * 3 of the first three tokens of each text, and the statistics of all of them."""
    drafter, controller = PerSequence(lambda sequence: PromptLookup()), partial(FixedDraftLength, 2)
    counts, stats = draw_texts(target, drafter, prompt, WARM, texts, controller=controller, vocab=VOCAB, counted=3)
    return counts, GenerationStats.merge(stats)


def test_sampled_text_with_lookup_follows_the_targets_law(target, prompt, law):
    counts, stats = write_texts(target, prompt, texts=1200)
    kept = Counter(r.accepted for r in stats.rounds if r.drafted == 2)
    assert min(kept[accepted] for accepted in (0, 1, 2)) > 100, kept
    assert min(p_values(counts, law)) > P_VALUE


def keeps_the_refused_token_possible(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)


def believes_the_copy_was_drawn(monkeypatch):
    right = acceptance.accept_sampled
    monkeypatch.setattr(
        "models.speculative.verify.accept_sampled", lambda drafted, p, q, g: right(drafted, p, p[: len(drafted)], g)
    )


@pytest.mark.parametrize("mistake", [keeps_the_refused_token_possible, believes_the_copy_was_drawn])
def test_the_statistic_finds_wrong_rules(monkeypatch, target, prompt, law, mistake):
    mistake(monkeypatch)
    counts, _ = write_texts(target, prompt, texts=600)
    assert min(p_values(counts, law)) < P_VALUE / 100
