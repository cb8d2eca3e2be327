"""Early exit on the board: the first layers are the model of these layers, in the whole model's cache."""

import dataclasses

import pytest
import torch

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import plain
from models.tests.ttnn.model_fixtures import Weights, cached, random_ids, reduced
from models.ttnn_llama.programs.fused import FusedRound

LAYERS, EXIT = 2, 1
CONTEXT = 192
IDS = random_ids(CONTEXT, seed=3)
POSITION = 125


@pytest.fixture(scope="module")
def weights(mesh):
    """The layers that are left out have less of a say, so that without them a model is right now and then."""
    weights = Weights.random(reduced("1B", mesh.get_num_devices(), LAYERS))
    outputs = tuple(f"layers.{EXIT}.{name}" for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"))
    return weights.changed(lambda name, tensor: tensor / 4 if name.endswith(outputs) else tensor)


@pytest.fixture(scope="module")
def model(mesh, weights):
    return weights.on(mesh, max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def first(model):
    return model.first_layers(EXIT)


@pytest.fixture(scope="module")
def alone(mesh, weights):
    """A model that has these layers and no more."""
    config = dataclasses.replace(weights.config, num_hidden_layers=EXIT)
    return Weights(config, weights).on(mesh, max_seq_len=CONTEXT)


@pytest.fixture(autouse=True)
def text(request):
    """Both models have read it; the first layers read what their model has."""
    for name in {"model", "alone"} & set(request.fixturenames):
        request.getfixturevalue(name).prefill(IDS[:POSITION])


def test_they_give_what_a_model_of_these_layers_gives(model, first, alone):
    for rows in (1, 5):
        tokens = IDS[POSITION : POSITION + rows]
        assert torch.equal(first.forward(tokens, POSITION), alone.forward(tokens, POSITION)), rows
        assert first.greedy(tokens, POSITION) == alone.greedy(tokens, POSITION)
    for rows, k in ((1, 4), (2, 3)):
        tokens = IDS[POSITION : POSITION + rows]
        assert first.draft_greedy(tokens, POSITION, k) == alone.draft_greedy(tokens, POSITION, k), (rows, k)
    assert first.prefill(IDS[: POSITION + 1]).equal(alone.prefill(IDS[: POSITION + 1]))


def test_they_write_the_models_own_keys_and_values_and_no_others(model, first):
    tokens = IDS[POSITION : POSITION + 2]
    drafted = first.draft_greedy(tokens, POSITION, 4)
    made, rows = cached(model), slice(POSITION, POSITION + 5)
    deeper = made[EXIT:].clone()
    model.forward([*tokens, *drafted[:3]], POSITION)
    after = cached(model)
    assert torch.equal(made[:EXIT], after[:EXIT])
    assert not (deeper[..., rows, :] == after[EXIT:, ..., rows, :]).flatten(-1).all(-1).any()


def test_they_need_no_weights_and_no_cache_of_their_own(model, first):
    assert first.layers == model.layers[:EXIT]
    assert first.head is model.head and first.embedding is model.embedding
    assert model.first_layers(EXIT) is first  # whose programs are prepared


@pytest.mark.parametrize("count", [-1, 0, LAYERS, LAYERS + 5])
def test_a_number_of_layers_that_leaves_none_is_refused(model, count):
    with pytest.raises(UserError, match=f"exit layer {count}: must be between 1 and {LAYERS - 1}"):
        model.first_layers(count)


def test_a_round_with_them_equals_its_parts(model, first):
    fused = FusedRound(model, first)
    fused.prepare(4)
    tokens = IDS[POSITION - 1 : POSITION + 1]
    for k in (4, 2):
        made = fused.run(tokens, POSITION - 1, k)
        rows = cached(model)[..., : POSITION + k, :]
        drafted = first.draft_greedy(tokens, POSITION - 1, k)
        verified = model.greedy([tokens[-1], *drafted], POSITION)
        accepted = next((i for i in range(k) if drafted[i] != verified[i]), k)
        assert made == (drafted, verified, accepted)
        assert torch.equal(cached(model)[..., : POSITION + k, :], rows)


@pytest.mark.key_boards
@pytest.mark.parametrize("in_one_program", [True, False])
def test_greedy_text_from_early_exit_equals_plain_greedy_text(model, in_one_program):
    prompt = random_ids(12, seed=1)
    expected = plain(model, prompt, max_new_tokens=10)
    fused = None
    if in_one_program:
        fused = FusedRound(model, model.first_layers(EXIT))
        for k in (1, 3):
            fused.prepare(k)
    drafter = EarlyExit(model, EXIT, SamplingParams(), rounds=fused)
    stats = GenerationStats()
    tokens = generate(model, drafter, prompt, controller=FixedDraftLength(3), max_new_tokens=10, stats=stats)
    assert [token.id for token in tokens] == expected
    assert {(r.source, r.verify_s == 0) for r in stats.rounds if r.drafted} == {("early-exit", in_one_program)}
    assert any(r.accepted for r in stats.rounds) and any(r.accepted < r.drafted for r in stats.rounds)
