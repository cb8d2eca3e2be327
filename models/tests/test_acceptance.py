"""The rules that make speculation lossless, checked without any model."""

import itertools

import pytest
import torch

from models.speculative import acceptance
from models.speculative.acceptance import accept_greedy, accept_sampled, distribution, residual, sample

VOCAB = 24


def script(monkeypatch, *numbers: float) -> None:
    """Decide the random numbers that a rule will ask for, so that both sides of a threshold can be tried."""
    left = list(numbers)
    monkeypatch.setattr(acceptance, "_uniform", lambda generator: left.pop(0))


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def law(seed: int, **masks) -> torch.Tensor:
    probs = distribution(random_logits(seed), 1.0, **masks)[0].double()
    return probs / probs.sum()


def one_hot(token: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()


def pairs():
    """(name, p, q): dense, masked alike and differently, disjoint, deterministic and equal laws."""
    for seed in range(20):
        p, q = (100 + seed, 200 + seed)
        yield f"dense-{seed}", law(p), law(q)
        yield f"top_k-{seed}", law(p, top_k=5), law(q, top_k=5)
        yield f"top_p-{seed}", law(p, top_p=0.7), law(q, top_p=0.7)
        yield f"both-{seed}", law(p, top_k=8, top_p=0.8), law(q, top_k=8, top_p=0.8)
        yield f"masked-p-{seed}", law(p, top_k=2), law(q)
        yield f"one-hot-q-{seed}", law(p), one_hot(seed % VOCAB)
        yield f"one-hot-p-{seed}", one_hot(seed % VOCAB), law(q)
        yield f"equal-{seed}", law(p), law(p)
    yield "disjoint", one_hot(0), one_hot(1)


def acceptance_probability(monkeypatch, p: torch.Tensor, q: torch.Tensor, token: int, deterministic: bool) -> float:
    """The chance with which accept_sampled keeps `token`, found from its decisions: it accepts u < that chance."""
    wanted = min(1.0, float(p[token] / q[token]))
    for u, expected in ((wanted - 1e-9, 1), (wanted + 1e-9, 0), (0.0, int(wanted > 0))):
        if not 0 <= u < 1:
            continue
        script(monkeypatch, u, 0.5)
        accepted, _ = accept_sampled([token], torch.stack([p, p]), None if deterministic else q[None], None)
        assert accepted == expected, (token, u, wanted)
    return wanted


@pytest.mark.parametrize("name, p, q", [pytest.param(*pair, id=pair[0]) for pair in pairs()])
def test_emitted_law_is_exactly_the_targets(monkeypatch, name, p, q):
    """q(x) min(1, p/q) + P(reject) residual(x) = p(x) for every x, in fp64, by enumeration of the drafted token."""
    emitted, rejected = torch.zeros(VOCAB, dtype=torch.float64), 0.0
    for token in q.nonzero().flatten().tolist():
        keep = acceptance_probability(monkeypatch, p, q, token, deterministic="one-hot-q" in name)
        emitted[token] += q[token] * keep
        rejected += float(q[token]) * (1 - keep)
    emitted += rejected * residual(p, q)
    assert (emitted - p).abs().max() < 1e-12
    assert (emitted[p == 0] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_rejected_token_is_replaced_from_the_residual(monkeypatch, seed):
    p, q = law(seed), law(seed + 50)
    token = int((q - p).argmax())
    expected = residual(p, q)
    for u in torch.linspace(0.001, 0.999, 50).tolist():
        script(monkeypatch, 0.9999, u)
        accepted, replacement = accept_sampled([token], torch.stack([p, p]), q[None], None)
        script(monkeypatch, u)
        assert (accepted, replacement) == (0, sample(expected, None))
        assert p[replacement] > q[replacement]


def test_full_acceptance_draws_the_bonus_from_the_last_row(monkeypatch):
    p = torch.stack([one_hot(3), one_hot(5), one_hot(7)])
    script(monkeypatch, 0.9, 0.9, 0.9)
    assert accept_sampled([3, 5], p, p[:2], None) == (2, 7)


def test_first_rejection_ends_the_round(monkeypatch):
    p = torch.stack([one_hot(3), one_hot(5), one_hot(7)])
    script(monkeypatch, 0.5, 0.5, 0.5)
    assert accept_sampled([3, 6, 7], torch.cat([p, p[:1]]), None, None) == (1, 5)


def test_nothing_drafted_samples_the_target(monkeypatch):
    script(monkeypatch, 0.5)
    assert accept_sampled([], one_hot(4)[None], None, None) == (0, 4)


def test_equal_laws_leave_no_residual_and_no_nan(monkeypatch):
    p = law(1)
    assert torch.equal(residual(p, p), p)
    # Rounding can reject although p and q are equal: the replacement must still be a token of p.
    almost = one_hot(2) * (1 - 2**-20)
    script(monkeypatch, 1 - 2**-30, 0.5)
    assert accept_sampled([2], torch.stack([almost, almost]), one_hot(2)[None], None) == (0, 2)


@pytest.mark.parametrize("drafted", list(itertools.product(range(2), repeat=3)))
def test_greedy_keeps_the_matching_prefix(drafted):
    target = [1, 0, 1, 0]
    matches = next((i for i in range(3) if drafted[i] != target[i]), 3)
    assert accept_greedy(list(drafted), target) == (matches, target[matches])
    assert accept_greedy([], [9]) == (0, 9)


def test_rows_are_read_in_order_once_and_no_further_than_needed():
    class Lazy:
        def __init__(self, rows):
            self.rows, self.read = rows, []

        def __getitem__(self, i):
            self.read.append(i)
            return self.rows[i]

    for drafted, read in (([1, 2, 3], [0, 1, 2, 3]), ([1, 9, 3], [0, 1]), ([9, 2, 3], [0]), ([], [0])):
        ids, laws = Lazy([1, 2, 3, 4]), Lazy([one_hot(i) for i in (1, 2, 3, 4)])
        assert accept_greedy(drafted, ids) == accept_sampled(drafted, laws, None, torch.Generator())
        assert ids.read == laws.read == read


@pytest.mark.parametrize("probs", [law(3), law(3, top_k=4), 7 * law(3, top_p=0.6), one_hot(0), one_hot(VOCAB - 1)])
def test_sample_inverts_the_cumulative_law(monkeypatch, probs):
    """Every token owns an interval of [0, 1) of its probability's length; masked ones own none, the ends included."""
    for u in (0.0, 1 - 2**-53):
        script(monkeypatch, u)
        assert probs[sample(probs, None)] > 0
    ends = (probs / probs.sum()).cumsum(0)
    for token in probs.nonzero().flatten().tolist():
        start = float(ends[token - 1]) if token else 0.0
        for u in (start + 1e-12, float(ends[token]) - 1e-12):
            script(monkeypatch, u)
            assert sample(probs, None) == token


def test_sample_of_fp32_stays_inside_its_law(monkeypatch):
    """In fp32 the largest u would round to the total and point past the last token."""
    for seed in range(20):
        probs = distribution(random_logits(seed, vocab=1000), 1.0, top_k=50)[0]
        script(monkeypatch, 1 - 2**-53)
        assert probs[sample(probs, None)] > 0


def reference_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The definition, one token at a time, in double precision."""
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: top_k or len(logits)]
    total, mass, nucleus = float(weights[kept].sum()), 0.0, []
    for token in kept:
        if mass < top_p:
            nucleus.append(token)
        mass += float(weights[token]) / total
    probs = torch.zeros(len(logits), dtype=torch.float64)
    probs[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return probs


@pytest.mark.parametrize("vocab", [VOCAB, 3000])
@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (1.7, 0, 1.0), (1.0, 1, 1.0), (0.8, 6, 1.0), (1.0, 10**6, 1.0), (1.0, 0, 0.5),
    (1.2, 0, 0.9), (4.0, 0, 0.95), (1.0, 0, 1e-6), (0.9, 7, 0.8), (2.0, 20, 0.99), (0.6, 500, 1.0), (0.8, 0, 0.99),
])  # fmt: skip
def test_distribution_equals_its_definition(vocab, temperature, top_k, top_p):
    logits = random_logits(vocab, rows=4, vocab=vocab)
    got = distribution(logits, temperature, top_k, top_p)
    expected = torch.stack([reference_distribution(row.tolist(), temperature, top_k, top_p) for row in logits])
    assert got.dtype == torch.float32
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.8), (9, 0.7)])
def test_distribution_equals_transformers(top_k, top_p):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(11, rows=6, vocab=200)
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    torch.testing.assert_close(distribution(logits, 0.7, top_k, top_p), scores.softmax(-1), atol=1e-6, rtol=1e-5)


def test_distribution_of_a_row_does_not_depend_on_its_neighbours():
    """A flat row's nucleus is far larger than its peaked neighbour's, whose law must not feel it."""
    logits = torch.cat([random_logits(1, vocab=3000, spread=6.0), random_logits(2, vocab=3000, spread=0.01)])
    together = distribution(logits, 1.0, 0, 0.95)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], distribution(logits[row : row + 1], 1.0, 0, 0.95))


def test_distribution_takes_bf16_and_the_smallest_temperature():
    logits = random_logits(5).bfloat16()
    assert int(distribution(logits, 1e-4)[0].argmax()) == int(logits[0].argmax())
    assert distribution(100 * logits, 1e-4)[0].isfinite().all()
    torch.testing.assert_close(distribution(logits, 1.0), distribution(logits.float(), 1.0))


# ---------------------------------------------------------------------------------- a row depends on itself alone
MASKS = [{"top_p": 0.95}, {"top_p": 0.6}, {"top_k": 40}, {"top_k": 3000, "top_p": 0.9}, {"top_p": 1e-46}]


def tied_logits(rows: int, vocab: int = 5000) -> torch.Tensor:
    """bf16 logits as a model has them: many are equal, and nuclei have from a few tokens to more than 1024."""
    spread = torch.linspace(0.5, 6.0, rows)[:, None]
    return (spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) + 12).bfloat16()


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_a_rows_distribution_is_the_same_alone_and_in_any_company(masks):
    logits = tied_logits(24)
    together = distribution(logits, 0.8, **masks)
    sizes = (together > 0).sum(-1)
    if masks == {"top_p": 0.95}:
        assert sizes.min() < 1024 < sizes.max()  # or the test shows nothing
    for i in range(len(logits)):
        assert torch.equal(distribution(logits[i : i + 1], 0.8, **masks)[0], together[i])
    backwards = distribution(logits.flip(0), 0.8, **masks).flip(0)
    assert torch.equal(backwards, together)


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_of_equally_likely_tokens_the_lower_ids_stay(masks):
    logits = tied_logits(24)
    probs = distribution(logits, 0.8, **masks)
    whole = torch.softmax(logits.float() / 0.8, -1)
    cut = 0
    for row, all_of_row in zip(probs, whole, strict=True):
        kept = row.nonzero().flatten()
        least = all_of_row[kept].min()
        assert (row[all_of_row > least] > 0).all()
        tied = (all_of_row == least).nonzero().flatten()
        stayed = int((row[tied] > 0).sum())
        assert stayed and (row[tied[:stayed]] > 0).all()
        cut += stayed < len(tied)
    assert cut > 0  # or no tie was cut apart


def test_the_likeliest_token_always_stays():
    probs = distribution(random_logits(0), 1.0, top_p=1e-46)
    assert probs[0, random_logits(0)[0].argmax()] == 1
