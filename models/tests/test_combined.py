"""Combined: its rule with tiny fakes, and the loop with real models that draft where prompt lookup does not."""

from collections import Counter
from functools import partial

import pytest
import torch

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Draft
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, build_pair, draw_texts, plain, random_prompt, upto
from models.tests.test_fused_drafter import ComposedRound
from models.tests.test_generate_sampling import P_VALUE
from models.tests.test_prompt_lookup import VOCAB, WARM, joint_law, p_values, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------------------- the rule
class Scripted:
    """Proposes what it is told to, and notes what it hears."""

    def __init__(self, *drafts):
        self.drafts, self.heard, self.asked = iter(drafts), [], 0

    def propose(self, tokens, limit):
        self.asked += 1
        return Draft(next(self.drafts))

    def observe(self, accepted):
        self.heard.append(accepted)


def test_the_first_draft_that_has_tokens_is_taken():
    first, second = Scripted([7, 8], [], []), Scripted([9], [])
    combined = Combined(first, second)
    assert [combined.propose([1], None).tokens for _ in range(3)] == [[7, 8], [9], []]
    assert (first.asked, second.asked) == (3, 2)


def test_only_the_drafter_whose_tokens_they_were_hears_what_was_kept():
    first, second = Scripted([7, 8], [], [], [7], []), Scripted([9], [], [9, 9])
    combined = Combined(first, second)
    for kept in (2, 1, None, 0, 2):  # None: nobody drafts, and nobody is told
        draft = combined.propose([1], None)
        assert (kept is None) == (not draft.tokens)
        if draft.tokens:
            combined.observe(kept)
    assert (first.heard, second.heard) == ([2, 0], [1, 2])


def test_drafts_are_handed_on_as_they_are():
    draft = Draft([1, 2], torch.ones(2, 3), 0.5, (1, 7), "other")
    drafter = Scripted()
    drafter.propose = lambda tokens, limit: draft
    assert Combined(Scripted([]), drafter).propose([1], None) == draft


def test_all_that_read_the_prompt_count():
    first, second = Scripted(), Scripted()
    first.propose = lambda tokens, limit: Draft([], prefill_s=0.25)
    second.propose = lambda tokens, limit: Draft([1], prefill_s=0.5)
    assert Combined(first, second).propose([1], None).prefill_s == 0.75
    assert Combined(first).propose([1], None).prefill_s == 0.25


def test_reading_without_a_draft_is_told_of_who_read():
    """Else entering a prompt into the lookup's index would pass for the model's reading of it."""
    prompt = list(range(10))
    draft = Combined(PromptLookup(), ModelDrafter(build_pair(0, 0.0)[1], GREEDY)).propose(prompt, upto(0))
    assert draft.source == "lookup" and draft.prefill_s > 0 and not draft.tokens


# -------------------------------------------------------------------------------------------------- the loop
class BySource(FixedDraftLength):
    """A length for each source of drafts."""

    def __init__(self, **lengths):
        super().__init__()
        self.lengths = lengths

    def draft_length(self, source):
        return self.lengths[source.removesuffix("-short")]


def combined_text(target, model, prompt, lookup=4, draft=4, **options):
    """(ids, stats) of a generation with prompt lookup first; model: a drafter or, for a ModelDrafter, its model."""
    if not hasattr(model, "propose"):
        model = ModelDrafter(model, options.get("sampling", GREEDY))
    stats, controller = GenerationStats(), BySource(lookup=lookup, model=draft)
    drafter = Combined(PromptLookup(), model)
    tokens = generate(target, drafter, prompt, controller=controller, stats=stats, **options)
    return [token.id for token in tokens], stats


def rounds_of(stats, source):
    return [r for r in stats.rounds if r.drafted and not r.cut and r.source.removesuffix("-short") == source]


def outcomes(rounds):
    """How many rounds kept (none, part, all) of a draft."""
    none = sum(r.accepted == 0 for r in rounds)
    whole = sum(r.accepted == r.drafted for r in rounds)
    return none, len(rounds) - none - whole, whole


LENGTHS = [(4, 4), (1, 3), (7, 2), (0, 4), (3, 0)]


@pytest.mark.parametrize("noise", [0.0, 0.07, None])
def test_greedy_text_with_both_equals_plain_greedy(noise):
    """3 kinds of draft x 5 models x 3 prompts x 5 pairs of lengths = 225 cases."""
    rounds = {"lookup": [], "model": []}
    for seed in range(5):
        vocab_size = (6, 12, 24)[seed % 3]
        target, draft = build_pair(seed, noise, vocab_size)
        for number, length in enumerate((1, 6, 40)):
            prompt = random_prompt(length, 10 * seed + number, vocab_size)
            expected = plain(target, prompt, max_new_tokens=16)
            for lookup, model in LENGTHS:
                ids, stats = combined_text(target, draft, prompt, lookup, model, max_new_tokens=16)
                assert ids == expected, (seed, length, lookup, model)
                for source, limit in (("lookup", lookup), ("model", model)):
                    rounds[source] += rounds_of(stats, source)
                    assert all(r.drafted <= limit for r in stats.rounds if r.drafted and r.source == source)
    assert min(outcomes(rounds["lookup"])) > 10
    none, part, whole = outcomes(rounds["model"])
    if noise == 0:
        assert none == part == 0 < whole
    else:
        assert min(none, part, whole if noise else 11) > 10, (none, part, whole)


class Checked(ModelDrafter):
    """Compares every draft to one of a drafter that reads everything anew; notes how far it was behind."""

    def __init__(self, model, fresh):
        super().__init__(model, GREEDY)
        self.fresh, self.behind, self.compared = fresh, Counter(), 0

    def propose(self, tokens, limit):
        if self.cached:
            self.behind[len(tokens) - self.cached] += 1
        draft = super().propose(tokens, limit)
        if draft.tokens:
            k = len(draft.tokens)
            assert draft.tokens == ModelDrafter(self.fresh, GREEDY).propose(tokens, upto(k)).tokens
            self.compared += 1
        return draft


@pytest.mark.parametrize("noise", [0.0, 0.07])
def test_a_draft_that_fell_behind_catches_up(noise):
    """Over copies longer, too, than the 8 rows it takes at once."""
    behind, compared, kept, drafted = Counter(), 0, 0, 0
    for seed in range(9):
        options = {"vocab_size": 12, "fixed_rows": 8, "max_seq_len": 112}
        target, draft = build_pair(seed, noise, **options)
        drafter = Checked(draft, build_pair(seed, noise, **options)[1])
        prompt = random_prompt(20, seed, vocab_size=12)
        ids, stats = combined_text(target, drafter, prompt, lookup=7, draft=2, max_new_tokens=90)
        assert ids == plain(target, prompt, max_new_tokens=90)
        behind, compared = behind + drafter.behind, compared + drafter.compared
        kept += sum(r.accepted for r in rounds_of(stats, "model"))
        drafted += sum(r.drafted for r in rounds_of(stats, "model"))
    assert compared > 50
    assert sum(count for gap, count in behind.items() if 2 < gap <= 8) > 5, behind
    assert sum(count for gap, count in behind.items() if gap > 8) > 5, behind
    assert (kept == drafted) == (noise == 0)


def test_verified_drafts_of_a_fused_round_stay_right_after_copies():
    rounds = {"lookup": [], "model": []}
    caught_up = 0  # fused rounds before which the draft had to read what copies had added
    for seed in range(20):
        target, draft = build_pair(seed, (0.0, 0.07)[seed % 2], vocab_size=12)
        fused = ComposedRound(target, draft)
        prompt = random_prompt(20, seed, vocab_size=12)
        ids, stats = combined_text(
            target, ModelDrafter(draft, GREEDY, rounds=fused), prompt, lookup=4, draft=3, max_new_tokens=40
        )
        assert ids == plain(target, prompt, max_new_tokens=40)
        by_model = [r for r in stats.rounds if r.drafted and r.source == "model"]
        assert len(fused.rounds) == len(by_model) and not any(r.verify_s for r in by_model)
        caught_up += sum(method == "greedy" for method, *_ in draft.calls)
        for source in rounds:
            rounds[source] += rounds_of(stats, source)
    assert caught_up > 20
    assert min(*outcomes(rounds["lookup"]), *outcomes(rounds["model"])) > 5


def test_the_draft_reads_its_prompt_when_it_first_drafts_and_once():
    target, draft = build_pair(0, noise=0.07, vocab_size=12)
    prompt = [1, 2, 3, 4] * 5
    for first in range(12):  # every token the target could begin with
        draft.calls.clear()
        _, stats = combined_text(target, draft, [*prompt, first], max_new_tokens=30)
        reading = [rows for method, rows, _ in draft.calls if method == "prefill"]
        sources = [r.source if r.drafted else "" for r in stats.rounds]
        assert len(reading) == ("model" in sources)
        assert stats.draft_prefill_s > 0
        if "model" in sources:
            emitted = 1 + sum(r.emitted for r in stats.rounds[: sources.index("model")])
            assert reading == [len(prompt) + 1 + emitted - 1]


# ------------------------------------------------------------------------------------------------- sampling
def test_sampled_text_with_both_follows_the_targets_law():
    target, draft = tiny_model(noise=0), tiny_model(noise=0.5)
    prompt = [3, *plain(target, [3], max_new_tokens=31, sampling=SamplingParams(**WARM, seed=1))]

    def drafts(sequence):
        return Combined(PromptLookup(), ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling))

    controller = partial(BySource, lookup=2, model=2)
    drafter = InStep(drafts, draft)
    counts, stats = draw_texts(target, drafter, prompt, WARM, 1000, controller=controller, vocab=VOCAB, counted=3)
    for source in ("lookup", "model"):
        rounds = GenerationStats.merge(stats).rounds
        kept = Counter(r.accepted for r in rounds if r.drafted == 2 and r.source.removesuffix("-short") == source)
        assert min(kept[accepted] for accepted in (0, 1, 2)) > 50, (source, kept)
    assert min(p_values(counts, joint_law(target, prompt))) > P_VALUE
