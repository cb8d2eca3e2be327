"""Early exit: whatever the first layers leave for the target, it writes what it would alone; nothing is done twice.

A random model hardly ever agrees with its own first layers. Targets here have weak later layers: they add little to
what the first ones say, so that drafts are kept often and refused now and then.
"""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from models.loading import load_model, open_model
from models.speculative.acceptance import distribution
from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import early_exit
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.early_exit import (
    EarlyExit,
    ExitMeasurements,
    best_exit,
    choose_exit,
    exit_candidates,
    measure_exits,
    tokens_per_round,
)
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, SpyLlama, build, engine_config, plain, random_prompt, upto
from models.tests.llama_fixtures import random_tensors
from models.tests.test_generate_sampling import P_VALUE, PROMPT, VOCAB, p_values
from models.torch_llama.model import TorchLlama

TINY_TARGET = Path(__file__).parents[1] / "checkpoints" / "tiny-target"
EXITS = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]  # (layers, exit layer): every one


pytestmark = pytest.mark.usefixtures("one_thread")


def weak_tail(layers: int, exit_layer: int, seed: int, scale: float = 0.2, vocab_size: int = 64, **options) -> SpyLlama:
    """A model whose layers from the exit on write `scale` times as much as random ones would."""
    config = engine_config(vocab_size, layers)
    tensors = random_tensors(config, seed)
    for layer, name in itertools.product(range(exit_layer, layers), ("self_attn.o_proj", "mlp.down_proj")):
        tensors[f"model.layers.{layer}.{name}.weight"] *= scale
    return build(config, tensors, **options)


def early_text(target, exit_layer, prompt, k=4, drafter=None, controller=None, sampling=GREEDY, **options):
    """(ids, stats) of a generation that drafts by early exit."""
    stats = GenerationStats()
    drafter = drafter or EarlyExit(target, exit_layer, sampling)
    controller = controller or FixedDraftLength(k)
    tokens = generate(target, drafter, prompt, controller=controller, sampling=sampling, stats=stats, **options)
    return [token.id for token in tokens], stats


def outcomes(rounds):
    """How many rounds kept (none, part, all) of a draft."""
    rounds = [r for r in rounds if r.drafted and not r.cut]
    none = sum(r.accepted == 0 for r in rounds)
    whole = sum(r.accepted == r.drafted for r in rounds)
    return none, len(rounds) - none - whole, whole


# -------------------------------------------------------------------------------------------------- lossless
@pytest.mark.parametrize("layers, exit_layer", EXITS)
def test_greedy_text_equals_plain_greedy(layers, exit_layer):
    """6 exits x 4 targets x 3 prompts x 4 draft lengths = 288 cases, with and without fixed rows."""
    rounds = []
    for seed in range(4):
        target = weak_tail(layers, exit_layer, seed, fixed_rows=(None, 8)[seed % 2])
        for number, length in enumerate((1, 6, 40)):
            prompt = random_prompt(length, seed=10 * seed + number)
            expected = plain(target, prompt, max_new_tokens=16)
            for k in (1, 2, 4, 7):
                ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=16)
                assert ids == expected, (seed, length, k)
                assert stats.draft_prefill_s == 0
                assert all(r.source == "early-exit" and r.drafted <= k for r in stats.rounds if r.drafted)
                rounds += stats.rounds
    assert min(outcomes(rounds)) > 10, outcomes(rounds)


def test_bf16_with_fixed_rows_is_exact_too():
    accepted = 0
    for seed, (layers, exit_layer) in enumerate(EXITS):
        target = weak_tail(layers, exit_layer, seed, dtype="bf16", fixed_rows=8)
        prompt = random_prompt(6, seed)
        expected = plain(target, prompt, max_new_tokens=60)
        for k in (1, 3, 7):
            ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=60)
            assert ids == expected
            accepted += sum(r.accepted for r in stats.rounds)
    assert accepted > 100


@pytest.mark.parametrize("dtype, fixed_rows", [("bf16", 7), ("fp32", 7), ("fp32", None)])
def test_logits_of_a_verification_are_those_of_one_without_a_draft(dtype, fixed_rows):
    """With fixed rows bit by bit, the cache included; also where the draft's rows read one more block of the cache."""
    options = {"dtype": dtype, "fixed_rows": fixed_rows, "max_seq_len": 320}
    target, other = (weak_tail(3, 2, 1, **options) for _ in range(2))
    text = random_prompt(300, seed=1)
    for position, exit_layer, k in itertools.product((1, 60, 122, 125, 127, 128, 250, 254), (1, 2), (1, 3, 6)):
        for model in (target, other):
            model.prefill(text[:position])
        block, first = text[position : position + k + 1], target.first_layers(exit_layer)
        for i, token in enumerate(block[:-1]):
            first.forward([token], position + i)
        ours, theirs = target.forward(block, position), other.forward(block, position)
        end = position + len(block)
        if fixed_rows:
            assert torch.equal(ours, theirs)
            assert torch.equal(target.kv[:, :, :end], other.kv[:, :, :end])
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_sequential_verification_writes_the_same(k):
    target = weak_tail(3, 1, seed=3)
    prompt = random_prompt(6, seed=3)
    expected, batched = early_text(target, 1, prompt, k, max_new_tokens=50)
    ids, stats = early_text(target, 1, prompt, k, max_new_tokens=50, verification="sequential")
    assert ids == expected == plain(target, prompt, max_new_tokens=50)
    assert [r.accepted for r in stats.rounds] == [r.accepted for r in batched.rounds]


class Switching(FixedDraftLength):
    """Drafts nothing for some rounds in between."""

    def __init__(self, k: int, gap: int):
        super().__init__(k)
        self.period, self.rounds = gap + 1, 0

    def draft_length(self, source: str) -> int:
        return 0 if self.rounds % self.period else self.k

    def update(self, round) -> None:
        self.rounds += 1


@pytest.mark.parametrize("gap", [1, 9])
def test_plain_rounds_in_between_leave_no_hole(gap):
    """The first layers are the whole model but for nothing: every draft is kept, after any number of plain rounds."""
    target = weak_tail(3, 2, seed=4, scale=0.0)
    prompt = random_prompt(6, seed=4)
    ids, stats = early_text(target, 2, prompt, controller=Switching(3, gap), max_new_tokens=90)
    assert ids == plain(target, prompt, max_new_tokens=90)
    assert {r.drafted for r in stats.rounds} >= {0, 3}
    assert stats.acceptance_rate == 1


def test_with_prompt_lookup_before_it():
    rounds = {"early-exit": [], "lookup": []}
    for seed in range(12):
        target = weak_tail(3, 1, seed, vocab_size=12, fixed_rows=(None, 8)[seed % 2])
        prompt = random_prompt(20, seed, vocab_size=12)
        drafter = Combined(PromptLookup(), EarlyExit(target, 1, GREEDY))
        ids, stats = early_text(target, 1, prompt, 5, drafter, max_new_tokens=60)
        assert ids == plain(target, prompt, max_new_tokens=60)
        for r in stats.rounds:
            rounds["early-exit" if r.source == "early-exit" else "lookup"].append(r)
    assert min(*outcomes(rounds["early-exit"]), *outcomes(rounds["lookup"])) > 5


class Priced(FixedDraftLength):
    """A token pays if it is likely for a random model, whatever the time: drafts end where the layers are unsure."""

    def pays(self, source: str, reach: float, steps: int, rows: int) -> bool:
        return reach > 0.1 ** (rows - 1)


def test_drafts_may_end_where_the_first_layers_are_unsure():
    lengths, rounds = Counter(), []
    for seed in range(6):
        target = weak_tail(3, 2, seed, scale=0.1, fixed_rows=(None, 8)[seed % 2])
        prompt = random_prompt(6, seed)
        ids, stats = early_text(target, 2, prompt, controller=Priced(6), max_new_tokens=60)
        assert ids == plain(target, prompt, max_new_tokens=60)
        lengths.update(r.drafted for r in stats.rounds if not r.cut)
        rounds += stats.rounds
    assert len(lengths) > 3 and sum(r.accepted for r in rounds) > 50, lengths


def test_the_controller_that_chooses_lengths_can_use_it():
    """Whatever the times of this machine are, and so the lengths that it chooses."""
    target = weak_tail(4, 1, seed=2, scale=0.05, max_seq_len=256)
    prompt, controller = random_prompt(6, seed=2), AutoDraftLength()
    ids, stats = early_text(target, 1, prompt, controller=controller, max_new_tokens=200)
    assert ids == plain(target, prompt, max_new_tokens=200)
    assert len(controller.chosen) == len(stats.rounds)
    assert "early-exit" in controller.report()["acceptance"]


# ------------------------------------------------------------------------------------------- where a text ends
@pytest.mark.parametrize("k", [1, 3, 7])
def test_nothing_follows_a_stop_token(k):
    target = weak_tail(3, 1, seed=5, scale=0.1)
    for seed in range(8):
        prompt = random_prompt(5, seed)
        whole = plain(target, prompt, max_new_tokens=40)
        for stop in whole[:20:3]:
            ids, stats = early_text(target, 1, prompt, k, max_new_tokens=40, stop_ids=[stop])
            assert ids == whole[: whole.index(stop) + 1]
            assert (stats.finish_reason, stats.tokens) == ("stop", len(ids))


@pytest.mark.parametrize("fixed_rows", [None, 8])
@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_a_text_may_fill_the_context(k, fixed_rows):
    for length in (1, 19, 22, 23):
        target = weak_tail(3, 2, seed=6, scale=0.1, max_seq_len=24, fixed_rows=fixed_rows)
        prompt = random_prompt(length, seed=length)
        ids, stats = early_text(target, 2, prompt, k, max_new_tokens=100)
        assert ids == plain(target, prompt, max_new_tokens=100)
        assert (len(ids), stats.finish_reason) == (24 - length, "context")


def test_a_draft_ends_with_the_context():
    target = weak_tail(3, 2, seed=6, max_seq_len=12)
    tokens = random_prompt(12, seed=1)
    target.prefill(tokens[:-1])
    for length, expected in ((9, 4), (11, 2), (12, 1)):
        assert len(EarlyExit(target, 2, GREEDY).propose(tokens[:length], upto(5)).tokens) == expected
    assert EarlyExit(target, 2, GREEDY).propose([*tokens, 1], upto(5)).tokens == []


@pytest.mark.parametrize("limit", [1, 2, 3, 11])
def test_max_new_tokens(limit):
    target = weak_tail(2, 1, seed=7)
    prompt = random_prompt(4, seed=7)
    ids, stats = early_text(target, 1, prompt, 5, max_new_tokens=limit)
    assert ids == plain(target, prompt, max_new_tokens=limit)
    assert (len(ids), stats.finish_reason) == (limit, "length")


def test_after_an_interruption_the_next_text_is_right():
    """Closed by its reader after any number of tokens, or interrupted when a verification was to go on from a draft."""
    target = weak_tail(3, 1, seed=8)
    prompts = [random_prompt(6, seed=8), random_prompt(6, seed=9)]
    expected = [plain(target, prompt, max_new_tokens=30) for prompt in prompts]
    for taken in range(1, 12):
        stream = generate(target, EarlyExit(target, 1, GREEDY), prompts[0])
        assert [token.id for token in itertools.islice(stream, taken)] == expected[0][:taken]
        stream.close()
        assert early_text(target, 1, prompts[1], max_new_tokens=30)[0] == expected[1]
        target.fail_at = len(target.calls) + 1 + taken  # a prefill, then the verifications
        with pytest.raises(KeyboardInterrupt):
            early_text(target, 1, prompts[0])
        target.fail_at = None
        assert early_text(target, 1, prompts[taken % 2], max_new_tokens=30)[0] == expected[taken % 2]


# ------------------------------------------------------------------------------------------------- the sharing
class Counting:
    """Counts what goes through a linear layer: [rows of each call]."""

    def __init__(self, linear):
        self.linear, self.rows = linear, []

    def __call__(self, x):
        self.rows.append(len(x))
        return self.linear(x)


@pytest.mark.parametrize("layers, exit_layer", EXITS)
def test_no_layer_is_computed_twice_for_a_token(layers, exit_layer):
    """Each round: K rows by the draft, one by one; one more for the last token; K + 1 by the other layers, at once."""
    target = weak_tail(layers, exit_layer, seed=1)
    counters = [Counting(layer.qkv) for layer in target.layers]
    for layer, counter in zip(target.layers, counters, strict=True):
        layer.qkv = counter
    _, stats = early_text(target, exit_layer, random_prompt(6, seed=1), controller=Switching(4, 1), max_new_tokens=60)
    drafted = [r.drafted for r in stats.rounds]
    assert {0, 4} <= set(drafted)
    for number, counter in enumerate(counters):
        prompt, *rows = counter.rows
        assert prompt == 6
        assert rows == ([1] * sum(k + 1 for k in drafted) if number < exit_layer else [k + 1 for k in drafted])


def run_both(target, other, method, *arguments):
    """Call a method of two models; both results have to be equal bit by bit."""
    ours, theirs = (getattr(model, method)(*arguments) for model in (target, other))
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("seed", range(8))
def test_a_draft_never_shows_in_what_the_target_says(seed):
    """Drafts by any exit layer, then anything at all: the target says, bit by bit, what one without drafts says.

    Other prompts, rejected and changed tokens, rows that begin elsewhere, more or fewer of them than were drafted,
    trees. `text` is what both caches hold.
    """
    rng = random.Random(seed)
    target, other = (weak_tail(4, 2, seed, fixed_rows=8, max_seq_len=160) for _ in range(2))
    exits = [target.first_layers(count) for count in (1, 2, 3)]

    def some(n):
        return [rng.randrange(64) for _ in range(n)]

    text, offered, seen = some(5), [], Counter()
    run_both(target, other, "prefill", text)
    for _ in range(150):
        what = rng.choice(["draft", "draft", "draft", "go on", "go on", "go on", "elsewhere", "tree", "prefill"])
        if len(text) > 130 or (what == "prefill" and rng.random() < 0.3):
            if not offered:  # else the same rows might follow another prompt of this length
                text = text[: rng.randint(1, 20)]
            text = some(len(text))
            run_both(target, other, "prefill", text)
        elif what == "draft":
            first = rng.choice(exits)
            position = rng.choice([len(text), len(text), rng.randint(1, len(text))])
            text, offered = text[:position], some(rng.randint(1, 3))
            if rng.random() < 0.3:  # it has drafted here before
                first.forward(offered, position)
            offered += first.draft_greedy(offered, position, rng.randint(1, 4))
        elif what in ("go on", "elsewhere"):
            position = len(text) if what == "go on" else rng.randint(0, len(text))
            block = [*offered, *some(8)][: rng.randint(1, 8)]
            if rng.random() < 0.3:
                block[rng.randrange(len(block))] = rng.randrange(64)
            seen["same"] += what == "go on" and bool(offered) and block[: len(offered)] == offered[: len(block)]
            run_both(target, other, "forward", block, position)
            text, offered = text[:position] + block[: rng.randint(1, len(block))], []
        elif what == "tree":
            position, tokens = len(text), [*offered[:1], *some(4)][:4]
            run_both(target, other, "forward", tokens, position, [-1, 0, 0, 2])
            run_both(target, other, "keep", position, [0, 2, 3])
            block = [*offered, *some(3)][:3]
            if rng.random() < 0.5:  # the tree came to nothing: what was drafted before it is read after all
                run_both(target, other, "forward", block, position)
                text += block
            else:
                text += [tokens[i] for i in (0, 2, 3)]
            offered = []
        seen[what] += 1
        if not offered:
            assert torch.equal(target.kv[:, :, : len(text)], other.kv[:, :, : len(text)])
    assert min(seen.values()) > 3 and len(seen) >= 6, seen


def test_an_interrupted_draft_leaves_nothing_to_go_on_from():
    """Its rows are in the first layer's cache already, over those that an earlier draft had left."""
    target, other = (weak_tail(3, 2, seed=1, fixed_rows=8) for _ in range(2))
    for model in (target, other):
        model.prefill([1, 2, 3])
    first = target.first_layers(2)
    first.forward([4, 5], 3)
    down = target.layers[0].down

    def interrupted(x):
        raise KeyboardInterrupt

    target.layers[0].down = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.forward([6, 7], 3)
    target.layers[0].down = down
    run_both(target, other, "forward", [4, 5, 8], 3)


def test_a_batch_is_not_mixed_up_with_a_draft_for_one_sequence():
    config = engine_config(layers=3)
    target, other = (
        TorchLlama(config, random_tensors(config, 3), dtype="fp32", max_seq_len=64, batch=2, fixed_rows=8)
        for _ in range(2)
    )
    prompts = torch.tensor([random_prompt(6, seed=1), random_prompt(6, seed=2)])
    run_both(target, other, "prefill", prompts)
    assert len(target.first_layers(1).draft_greedy([5], 6, 3)) == 3
    run_both(target, other, "forward", torch.tensor([[5, 1, 2], [5, 1, 2]]), [6, 6])
    target.first_layers(2).draft_greedy([5], 9, 3)
    run_both(target, other, "forward", torch.tensor([[5, 1], [5, 4]]), [9, 7])


@pytest.mark.parametrize("exit_layer", [-1, 0, 3, 4])
def test_an_exit_layer_outside_the_model_is_refused(exit_layer):
    target = weak_tail(3, 1, seed=0)
    with pytest.raises(UserError, match=f"exit layer {exit_layer}: must be between 1 and 2"):
        EarlyExit(target, exit_layer, GREEDY)


# ------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("params, options", [
    pytest.param({"temperature": 1.0}, {}, id="temperature-1"),
    pytest.param({"temperature": 0.7}, {"verification": "sequential"}, id="cool-sequential"),
    pytest.param({"temperature": 1.3, "top_k": 6, "top_p": 0.9}, {}, id="top_k-top_p"),
    pytest.param({"temperature": 0.6}, {"greedy_draft": True}, id="deterministic-draft"),
])  # fmt: skip
def test_joint_law_of_the_text_is_the_targets(params, options):
    """Tokens 2 and 3 are drafted first, 4 is the bonus or of another round."""
    target = weak_tail(2, 1, seed=7, scale=0.4, vocab_size=VOCAB, max_seq_len=16)
    options = dict(options)
    greedy_draft = options.pop("greedy_draft", False)
    counts, stats = torch.zeros([VOCAB] * 4, dtype=torch.long), []
    for seed in range(900):
        sampling = SamplingParams(**params, seed=seed)
        drafter = EarlyExit(target, 1, GREEDY if greedy_draft else sampling)
        ids, one = early_text(target, 1, PROMPT, 2, drafter, sampling=sampling, max_new_tokens=4, **options)
        counts[tuple(ids)] += 1
        stats.append(one)
    kept = Counter(r.accepted for one in stats for r in one.rounds if r.drafted == 2)
    assert min(kept[accepted] for accepted in (0, 1, 2)) > 50, kept
    assert min(p_values((target,), params, counts)) > P_VALUE


def test_sampled_drafts_come_with_the_law_they_were_drawn_from():
    target, other = (weak_tail(3, 2, seed=2) for _ in range(2))
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, seed=3)
    tokens = random_prompt(9, seed=2)
    target.prefill(tokens[:-1])
    draft = EarlyExit(target, 2, params).propose(tokens, upto(4))
    assert draft.probs.shape == (4, 64)
    for i, token in enumerate(draft.tokens):
        history = [*tokens, *draft.tokens[:i]]
        other.prefill(history)
        logits = other.first_layers(2).prefill(history)
        law = distribution(logits[None], params.temperature, params.top_k, params.top_p)[0]
        torch.testing.assert_close(draft.probs[i], law, atol=1e-4, rtol=1e-3)
        assert law[token] > 0


# ------------------------------------------------------------------------------------------------- the choice
def test_candidates_are_all_of_a_shallow_model_and_some_of_a_deep_one():
    assert exit_candidates(1) == []
    assert exit_candidates(2) == [1]
    assert exit_candidates(16) == list(range(1, 16))
    assert exit_candidates(28) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert exit_candidates(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize("agreed, k, rounds", [
    ("1111", 1, 2), ("1111", 3, 1), ("1111", 4, 1), ("1111", 2, 2), ("0000", 3, 4), ("1010", 2, 2), ("0101", 2, 3),
    ("1101110", 2, 3), ("1101110", 6, 2), ("1", 6, 1), ("0", 1, 1),
])  # fmt: skip
def test_rounds_are_replayed_by_hand(agreed, k, rounds):
    assert tokens_per_round([mark == "1" for mark in agreed], k) == len(agreed) / rounds


def measured(agreed, step_s, verify_s) -> ExitMeasurements:
    return ExitMeasurements({e: tuple(m == "1" for m in marks) for e, marks in agreed.items()}, step_s, verify_s)


def test_the_choice_by_hand():
    """12 tokens take plain decoding 12 s, layer 1 with K = 1 nine rounds of 1.1 s, layer 3 with K = 2 four of 1.8 s."""
    agreed = {1: "100010001000", 3: "110110110110", 5: "111111111111"}
    choice = best_exit(measured(agreed, {1: 0.1, 3: 0.3, 5: 0.9}, {1: 1.0, 2: 1.0, 3: 1.2}))
    assert (choice.exit_layer, choice.draft_length, choice.measured_tokens) == (3, 2, 12)
    assert choice.speed_up == pytest.approx(12 / (4 * (2 * 0.3 + 1.2)))
    one, three, five = choice.candidates
    assert [one.exit_layer, three.exit_layer, five.exit_layer] == [1, 3, 5]
    assert one.agreement == 0.25 and three.agreement == pytest.approx(2 / 3) and five.agreement == 1
    assert one.tokens_per_round == {1: 12 / 9, 2: 12 / 9} and five.tokens_per_round == {1: 2, 2: 3}
    assert one.speed_ups == pytest.approx({1: 12 / (9 * 1.1), 2: 12 / (9 * 1.4)})
    assert (one.draft_length, one.speed_up) == (1, one.speed_ups[1])
    assert five.speed_ups == pytest.approx({1: 2 / 1.9, 2: 3 / 3.0})


def test_where_nothing_pays_the_choice_still_names_the_best():
    agreed = {1: "000000", 2: "010000", 3: "010101"}
    choice = best_exit(measured(agreed, {1: 0.2, 2: 0.3, 3: 0.9}, {1: 1.0, 2: 1.1}))
    assert (choice.exit_layer, choice.draft_length) == (2, 1)
    assert choice.speed_up == pytest.approx(6 / 5 / 1.4) and choice.speed_up < 1


def test_of_equal_choices_the_first_layer_and_the_shortest_draft():
    choice = best_exit(measured({4: "0000", 2: "0000"}, {4: 0.0, 2: 0.0}, {1: 1.0, 2: 1.0, 3: 1.0}))
    assert (choice.exit_layer, choice.draft_length, choice.speed_up) == (2, 1, 1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_measured_agreement_foretells_the_rounds_of_a_real_run(k):
    """Exactly: what counts as agreement is what a round accepts."""
    for seed, fixed_rows in enumerate((None, 8, 6)):
        target = weak_tail(4, 2, seed, scale=0.3, fixed_rows=fixed_rows)
        prompt = random_prompt(7, seed)
        text = prompt + plain(target, prompt, max_new_tokens=80)
        target.prefill(random_prompt(90, seed=5))  # its cache holds something else
        result = measure_exits(target, text, len(prompt), [k])
        assert list(result.agreed) == list(result.step_s) == [1, 2, 3] and list(result.verify_s) == [1, k + 1]
        assert min([*result.step_s.values(), *result.verify_s.values()]) > 0
        for exit_layer, agreed in result.agreed.items():
            ids, stats = early_text(target, exit_layer, prompt, k, max_new_tokens=80)
            assert prompt + ids == text
            assert len(agreed) == 79
            assert tokens_per_round(agreed, k) == 79 / len(stats.rounds)
        assert 0 < sum(result.agreed[2]) < 79


def test_measuring_leaves_nothing_that_a_later_text_could_see():
    target = weak_tail(3, 1, seed=3, max_seq_len=40)
    prompt = random_prompt(5, seed=3)
    text = prompt + plain(target, prompt)  # fills the context
    assert len(text) == 40
    choose_exit(target, text, len(prompt))
    assert early_text(target, 1, prompt)[0] == text[5:]


def test_times_are_of_whole_forwards_and_of_single_steps():
    """No verification that is timed goes on from a draft; rows of padded forwards are timed once."""
    for fixed_rows, expected in ((None, {1, 2, 4}), (4, {1})):
        target = weak_tail(3, 1, seed=3, fixed_rows=fixed_rows)
        prompt = random_prompt(5, seed=3)
        text = prompt + plain(target, prompt, max_new_tokens=9)
        target.calls.clear()
        target.layers[0].qkv = counter = Counting(target.layers[0].qkv)
        result = measure_exits(target, text, len(prompt), [1, 3, 7, 40] if fixed_rows else [1, 3])
        assert list(result.verify_s) == [1, 2, 4]
        repeats = early_exit.REPEATS + 1
        forwards = Counter(rows for method, rows, _ in target.calls if method == "greedy")
        assert forwards == dict.fromkeys(expected, repeats)
        timed = Counter(counter.rows[-repeats * (len(expected) + 2) :])  # two exit layers
        assert timed == ({4: 3 * repeats} if fixed_rows else {1: 3 * repeats, 2: repeats, 4: repeats})


def test_a_choice_on_the_embedded_target():
    """Its last layers add little, its first ones know little: later exits agree more, on the text it writes."""
    opened = open_model(str(TINY_TARGET))
    target = load_model(opened, dtype="bf16", fixed_rows=7, max_seq_len=128).model
    prompt = opened.tokenizer.encode("def add(a, b):\n")
    ids, _ = early_text(target, 13, prompt, max_new_tokens=40)
    assert ids == plain(target, prompt, max_new_tokens=40)
    choice = choose_exit(target, prompt + ids, len(prompt), candidates=[2, 13])
    assert [candidate.exit_layer for candidate in choice.candidates] == [2, 13]
    shallow, deep = choice.candidates
    assert shallow.agreement < 0.3 and deep.agreement > 0.6
    assert choice.measured_tokens == 39 and list(deep.speed_ups) == [1, 2, 3, 4, 5, 6]
    assert choice.speed_up == max(shallow.speed_up, deep.speed_up) > 0


def test_what_cannot_be_chosen_is_refused():
    target = weak_tail(3, 1, seed=3, fixed_rows=4)
    text = random_prompt(20, seed=1)
    for prompt_length in (0, 19, 20):
        with pytest.raises(UserError, match="too short to choose an exit layer"):
            choose_exit(target, text, prompt_length)
    with pytest.raises(UserError, match="no draft length between 1 and 3"):
        choose_exit(target, text, 5, lengths=[0, 4, 9])
    with pytest.raises(UserError, match="exit layer 3"):
        choose_exit(target, text, 5, candidates=[1, 3])
    with pytest.raises(UserError, match="a model of one layer"):
        choose_exit(build(engine_config(layers=1), random_tensors(engine_config(layers=1), 0)), text, 5)
