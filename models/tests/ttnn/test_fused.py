"""A fused greedy round equals its parts: drafting on the device, verifying, comparing."""

import pytest
import torch

from models.errors import UserError
from models.tests.engine_fixtures import perturbed
from models.tests.ttnn.model_fixtures import Weights, cached, random_ids, reduced
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.programs.fused import FusedRound

LENGTHS = (1, 4, 9, 14, 31)  # 14 leaves one row over
CONTEXT = 192
IDS = random_ids(CONTEXT, seed=21)


@pytest.fixture(scope="module")
def runner(mesh):
    return Runner(mesh, trace=False)


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=1, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def target(mesh, weights, runner):
    return weights.on(mesh, max_seq_len=CONTEXT, runner=runner)


def always_right(weights):
    return weights


def always_wrong(weights):
    """Every id is one more than the target's."""
    return weights.changed(lambda name, tensor: tensor.roll(1, 0) if name == "lm_head.weight" else tensor)


def sometimes_right(weights):
    noisy = {name: tensor.bfloat16() for name, tensor in perturbed(weights, 0.05, seed=5).items()}
    return Weights(weights.config, noisy)


key_boards = pytest.mark.key_boards  # one program, and rounds of a noisy draft end in every way
KINDS = [pytest.param(always_right, marks=key_boards), pytest.param(always_wrong, marks=key_boards), sometimes_right]


@pytest.fixture(scope="module", params=KINDS)
def fused(request, mesh, weights, target, runner):
    """A target and a draft of one kind, with rounds of all LENGTHS."""
    draft = request.param(weights).on(mesh, max_seq_len=CONTEXT, runner=runner)
    fused = FusedRound(target, draft)
    for k in reversed(LENGTHS):
        fused.prepare(k)
    fused.kind = request.param
    return fused


def in_parts(fused, tokens, position, k):
    """The same round by single calls: drafted ids, the target's ids, accepted."""
    drafted = fused.draft.draft_greedy(tokens, position, k)
    verified = fused.target.greedy([tokens[-1], *drafted], position + 1)
    accepted = next((i for i in range(k) if drafted[i] != verified[i]), k)
    return drafted, verified, accepted


@pytest.mark.parametrize("k", LENGTHS)
def test_a_fused_round_equals_its_parts(fused, k):
    """Ids, how many are accepted, and what both caches hold afterwards."""
    position = 118  # over a border of 128
    for model in (fused.target, fused.draft):
        model.prefill(IDS[:position])
    tokens = IDS[position : position + 2]
    fused.target.forward(tokens[:1], position)
    made = fused.run(tokens, position, k)
    ends = [(fused.target, position + 2 + k), (fused.draft, position + 1 + k)]
    caches = [cached(model)[..., :end, :] for model, end in ends]
    assert made == in_parts(fused, tokens, position, k)
    assert all(
        torch.equal(cached(model)[..., :end, :], cache) for (model, end), cache in zip(ends, caches, strict=True)
    )
    drafted, verified, accepted = made
    assert (len(drafted), len(verified)) == (k, k + 1)
    if fused.kind is always_right:
        assert accepted == k
    elif fused.kind is always_wrong:
        assert accepted == 0
        assert drafted[0] == (verified[0] + 1) % fused.target.vocab_size


def test_rounds_of_a_noisy_draft_end_in_every_way(fused):
    """Rounds as generation runs them, each from where the one before has ended, with lengths that were not prepared."""
    if fused.kind is not sometimes_right:
        pytest.skip("is about partial acceptance")
    tokens, seen = IDS[:40], set()
    for model in (fused.target, fused.draft):
        model.prefill(tokens[:-1])
    for k in (4, 3, 4, 2, 4, 1, 4, 3):
        made = fused.run(tokens[-2:], len(tokens) - 2, k)
        assert made == in_parts(fused, tokens[-2:], len(tokens) - 2, k)
        drafted, verified, accepted = made
        tokens = [*tokens, *drafted[:accepted], verified[accepted]]
        seen.add("none" if accepted == 0 else "all" if accepted == k else "some")
    assert seen == {"none", "some", "all"}


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_round_may_end_with_the_context(fused, k):
    """A longer program than k may run there: what it computes beyond the context must not show."""
    position = CONTEXT - 2 - k
    for model in (fused.target, fused.draft):
        model.prefill(IDS[: position + 1])
    tokens = IDS[position : position + 2]
    assert fused.run(tokens, position, k) == in_parts(fused, tokens, position, k)


def test_a_round_beyond_the_context_is_refused(fused):
    with pytest.raises(
        UserError, match=f"2 tokens and 4 drafted ones at position .* context of {CONTEXT}: draft fewer"
    ):
        fused.run([1, 2], CONTEXT - 5, 4)


def test_the_shortest_program_that_is_long_enough_runs(target, runner):
    fused = FusedRound(target, target)
    assert fused.max_draft == 0
    keys = {k: fused.prepare(k) for k in (9, 1, 4)}
    assert fused.draft_lengths == [1, 4, 9]
    assert fused.max_draft == 9
    for k, length in ((1, 1), (2, 4), (4, 4), (5, 9), (9, 9)):
        assert fused.key(k) == keys[length]
    assert all(key in runner for key in keys.values())
    assert fused.prepare(4) == keys[4]
    assert fused.draft_lengths == [1, 4, 9]


def test_what_is_no_round_is_refused(target, weights, mesh):
    fused = FusedRound(target, target)
    for k in (0, -1, 32):
        with pytest.raises(UserError, match=rf"{k} drafted tokens are outside 1\.\.31: use --num-draft-tokens"):
            fused.prepare(k)
    with pytest.raises(UserError, match=r"1 drafted tokens are outside 1\.\.0"):
        fused.run([1, 2], 5, 1)
    fused.prepare(2)
    with pytest.raises(UserError, match=r"3 drafted tokens are outside 1\.\.2"):
        fused.run([1, 2], 5, 3)
    for tokens, position in (([1], 5), ([1, 2], -1)):
        with pytest.raises(UserError, match="do not fit a fused round"):
            fused.run(tokens, position, 2)
    with pytest.raises(UserError, match="needs target and draft on one mesh: use --draft-placement shared"):
        FusedRound(target, weights.on(mesh, max_seq_len=CONTEXT))  # has a runner of its own


def test_a_chain_longer_than_a_tile_is_refused(target):
    """A longer prepared chain may serve a shorter draft at the end of the context: the cache has a tile of room."""
    with pytest.raises(UserError, match="draft at most 31 tokens"):
        target.draft_greedy([1, 2], 5, 32)
