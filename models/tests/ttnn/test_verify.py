"""Verification: rows equal single decodes bit for bit, the KV cache too; and so speculative text equals plain text."""

import itertools

import pytest
import torch

from models.llama.checkpoint import Checkpoint
from models.llama.tokenizer import LlamaTokenizer
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import perturbed, plain, speculate
from models.tests.llama_fixtures import hf_model
from models.tests.ttnn.model_fixtures import (
    CHECKPOINTS,
    SIZES,
    VOCAB,
    Weights,
    cached,
    in_pairs,
    random_ids,
    reduced,
    row_pccs,
)
from models.ttnn_llama.shapes import ROW_COUNTS

LAYERS = 2
IDS = random_ids(340, seed=3)


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=LAYERS))


@pytest.fixture(scope="module", params=["bf16", "accuracy"])
def model(request, mesh, weights):
    """With a bf16 and with a bfp8 cache."""
    return weights.on(mesh, request.param)


# ------------------------------------------------------------------------------------ rows equal single decodes
@pytest.mark.parametrize("size", SIZES)
def test_rows_equal_single_decodes_bit_for_bit(mesh, size):
    """In every program that has room for them: rows are asked for in rising numbers, so that each gets its own."""
    config = reduced(size, mesh.get_num_devices(), LAYERS)
    model = Weights.random(config).on(mesh)
    position = 120
    model.prefill(IDS[:position])
    single = torch.cat([model.forward(IDS[p : p + 1], p) for p in range(position, position + 16)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 16, 32):
        made = model.forward(IDS[position : position + rows], position)[:16]
        assert min(row_pccs(made, single[:rows])) >= 0.9999, rows
        assert torch.equal(made, single[:rows]), rows
    assert sorted({key[2] for key in model._inputs}) == list(ROW_COUNTS)


def test_ids_of_a_verification_equal_single_decodes(model):
    position = 150
    model.prefill(IDS[:position])
    single = [model.greedy(IDS[p : p + 1], p)[0] for p in range(position, position + 12)]
    assert model.greedy(IDS[position : position + 12], position) == single
    assert len(set(single)) > 5


# ------------------------------------------------------------------------------------------------ the KV cache
@pytest.mark.parametrize(("position", "rows"), [(150, 16), (158, 3), (120, 32), (0, 5)])
def test_a_verification_over_a_tile_border_writes_what_single_decodes_write(model, position, rows):
    """Cache rows 32, 64, ... begin a tile; 128 begins a block. Bit for bit, and nothing else changes."""
    tokens = IDS[position : position + rows]
    model.prefill(IDS[:200])  # other contents, so that every row has to be written
    before = cached(model)
    model.forward(random_ids(rows, seed=8), position)
    other = cached(model)
    model.forward(tokens, position)
    made = cached(model)
    model.forward(random_ids(rows, seed=8), position)
    for i, token in enumerate(tokens):
        model.forward([token], position + i)
    assert torch.equal(cached(model), made)
    written = slice(position, position + rows)
    assert not (made[..., written, :] == other[..., written, :]).flatten(-1).all(-1).any()
    made[..., written, :] = before[..., written, :]
    assert torch.equal(made, before)


@torch.no_grad()
def test_the_cache_holds_hugging_faces_keys_and_values(mesh, weights):
    """After a prefill of two blocks and a verification: every position's own, chips' heads in order."""
    model, length = weights.on(mesh), 250
    model.prefill(IDS[:230])
    model.forward(IDS[230:length], 230)
    kept = hf_model(weights.config, weights)(torch.tensor([IDS[:length]]), use_cache=True).past_key_values
    for made, layer in zip(cached(model), kept.layers, strict=True):
        keys = in_pairs(layer.keys[0].transpose(0, 1), weights.config.head_dim).transpose(0, 1)
        for ours, theirs in ((made[0], keys), (made[1], layer.values[0])):
            worst = min(row_pccs(ours[:, :length].flatten(0, 1), theirs.flatten(0, 1)))
            assert worst >= 0.99, worst


def test_going_back_is_as_if_one_had_never_gone_ahead(model):
    model.prefill(IDS[:100])
    expected = model.forward(IDS[100:105], 100)
    cache = cached(model)[..., :105, :]
    model.prefill(random_ids(300, seed=9))  # another text, then the same prompt again
    model.prefill(IDS[:100])
    model.forward(random_ids(32, seed=10), 100)
    model.draft_greedy(random_ids(2, seed=11), 103, 6)
    assert torch.equal(model.forward(IDS[100:105], 100), expected)
    assert torch.equal(cached(model)[..., :105, :], cache)


# ---------------------------------------------------------------------------------------------------- whole texts
# That rows are equal was shown above, on every board; the loop over them is the same on all.
def drafts(mesh, weights, noise):
    """The target's own weights with that much noise."""
    noisy = {name: tensor.bfloat16() for name, tensor in perturbed(weights, noise, seed=5).items()}
    return Weights(weights.config, noisy).on(mesh)


@pytest.mark.key_boards
def test_speculative_greedy_text_equals_plain_greedy_text(mesh, weights):
    target = weights.on(mesh)
    rounds = []
    for noise, k in ((0.0, 3), (0.03, 4), (0.05, 9)):
        draft = drafts(mesh, weights, noise)
        prompt = random_ids(20, seed=k)
        expected = plain(target, prompt, max_new_tokens=14)
        ids, _, stats = speculate(target, draft, prompt, k, max_new_tokens=14)
        assert ids == expected, (noise, k)
        rounds += stats.rounds
    kinds = {"none" if r.accepted == 0 else "all" if r.accepted == r.drafted else "some" for r in rounds if r.drafted}
    assert kinds == {"none", "some", "all"}
    assert len(set(expected)) > 4


@pytest.mark.key_boards
def test_speculation_goes_on_to_the_end_of_the_context(mesh, weights):
    target, draft = weights.on(mesh, max_seq_len=128), weights.on(mesh, max_seq_len=128)
    prompt = random_ids(118, seed=12)
    expected = plain(target, prompt, max_new_tokens=50)
    ids, _, stats = speculate(target, draft, prompt, 7, max_new_tokens=50)
    assert ids == expected
    assert len(ids) == 10
    assert stats.finish_reason == "context"


@pytest.mark.key_boards
def test_sequential_verification_writes_the_same_text(mesh, weights):
    target, draft = weights.on(mesh), drafts(mesh, weights, 0.03)
    prompt = random_ids(9, seed=13)
    expected = plain(target, prompt, max_new_tokens=8)
    assert speculate(target, draft, prompt, 3, max_new_tokens=8, verification="sequential")[0] == expected


@pytest.mark.key_boards
def test_sampled_text_keeps_to_the_vocabulary_and_repeats_with_its_seed(mesh, weights):
    target, draft = weights.on(mesh), drafts(mesh, weights, 0.02)
    prompt = random_ids(9, seed=14)

    def text(seed):
        sampling = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=seed)
        ids, _, stats = speculate(target, draft, prompt, 3, max_new_tokens=8, sampling=sampling)
        assert len(ids) == 8
        assert all(0 <= token < VOCAB for token in ids)
        assert sum(r.drafted for r in stats.rounds) > 0
        return ids

    first = text(1)
    assert text(1) == first
    assert text(2) != first


@pytest.fixture(scope="module")
def embedded(mesh):
    """The embedded pair on the board, (target, draft, tokenizer)."""
    if mesh.get_num_devices() > 2:
        pytest.skip("the embedded models have 2 KV heads")
    checkpoints = [Checkpoint.open(CHECKPOINTS / name) for name in ("tiny-target", "tiny-draft")]
    models = [Weights(checkpoint.config, checkpoint).on(mesh) for checkpoint in checkpoints]
    return *models, LlamaTokenizer.load(CHECKPOINTS / "tiny-target")


PROMPTS = ("def main(argv):\n    ", "import os\nimport sys\n\nclass Reader:\n    def __init__(self", "# Return the ")


@pytest.mark.once
@pytest.mark.parametrize(("k", "prompt"), zip((4, 1, 8), PROMPTS, strict=True))
def test_the_embedded_pair_writes_the_targets_own_greedy_text(embedded, k, prompt):
    target, draft, tokenizer = embedded
    count = 32 if k == 4 else 10
    tokens = tokenizer.encode(prompt)
    expected = plain(target, tokens, max_new_tokens=count)
    ids, origins, stats = speculate(target, draft, tokens, k, max_new_tokens=count)
    assert ids == expected
    assert len(ids) == count
    assert stats.acceptance_rate > 0.1
    assert "drafted" in origins


@pytest.mark.once
def test_the_embedded_pair_samples(embedded):
    target, draft, tokenizer = embedded
    sampling = SamplingParams(temperature=1.0, seed=3)
    stats = GenerationStats()
    drafter = ModelDrafter(draft, sampling)
    tokens = generate(
        target,
        drafter,
        tokenizer.encode(PROMPTS[0]),
        sampling=sampling,
        controller=FixedDraftLength(4),
        max_new_tokens=16,
        stats=stats,
    )
    ids = [token.id for token in itertools.islice(tokens, 16)]
    assert len(ids) == 16
    assert all(0 <= token < target.vocab_size for token in ids)
    assert sum(r.accepted for r in stats.rounds) > 0
