"""A model shared by the chips of N300 and T3K: their partial sums, joined vocabulary and own heads give torch's result.

That the whole model equals Hugging Face on these boards is `test_model`'s promise; here is what the chips do for it.
"""

import pytest
import torch

from models.tests.ttnn.model_fixtures import (
    VOCAB,
    Weights,
    board,
    in_pairs,
    on_chips,
    pcc,
    random_ids,
    reduced,
    row_pccs,
)
from models.torch_llama.model import TorchLlama
from models.ttnn_llama.device.collectives import Line
from models.ttnn_llama.weights import tensors as ttnn_weights

BOUND = 0.99
LAYERS = 2
POSITION = 100
IDS = random_ids(POSITION + 8, seed=6)


@pytest.fixture(scope="module")
def mesh(mesh_opener):
    with board(mesh_opener) as mesh:
        if mesh.get_num_devices() == 1:
            pytest.skip("one chip has nothing to share")
        yield mesh


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("3B", mesh.get_num_devices(), layers=LAYERS))


@pytest.fixture(scope="module")
def reference(weights):
    """The model in torch, its cache filled with the text."""
    model = TorchLlama(weights.config, weights, dtype="fp32", max_seq_len=352)
    model.prefill(IDS[:POSITION])
    model.expected = model.forward(IDS[POSITION:], POSITION)
    return model


@pytest.fixture(scope="module")
def model(mesh, weights):
    return weights.on(mesh)


def worst_pcc(model, reference):
    model.prefill(IDS[:POSITION])
    return min(row_pccs(model.forward(IDS[POSITION:], POSITION), reference.expected))


@pytest.mark.parametrize("precision", ["bf16", "accuracy"])
def test_the_shared_model_equals_torch(mesh, weights, reference, precision):
    assert worst_pcc(weights.on(mesh, precision), reference) >= BOUND


@pytest.mark.parametrize("name", ["sum_rows", "sum_prefill"])
def test_every_chip_has_only_a_part_of_each_sum(model, monkeypatch, name):
    """Two sums a layer. No part is like the total, and the total is that of all parts, the same on every chip."""
    sums = []
    real = getattr(Line, name)

    def noted(self, x):
        parts = torch.stack(on_chips(x)).float()
        total = real(self, x)
        sums.append((parts, torch.stack(on_chips(total)).float()))
        return total

    monkeypatch.setattr(Line, name, noted)
    model.prefill(IDS[:POSITION])
    if name == "sum_rows":
        model.forward(IDS[POSITION:], POSITION)
    assert len(sums) == 2 * LAYERS
    chips = model.layout.chips
    for parts, totals in sums:
        assert len(parts) == chips
        rows = slice(8 if name == "sum_rows" else POSITION)  # kernels leave what lies behind them unwritten
        parts, totals = parts[..., rows, :], totals[..., rows, :]
        assert max(pcc(part, totals[0]) for part in parts) < 0.9
        assert all(torch.equal(total, totals[0]) for total in totals)
        torch.testing.assert_close(totals[0], parts.sum(0), rtol=2**-7, atol=2**-7)


def test_logits_and_ids_are_the_same_on_all_chips(model):
    model.prefill(IDS[:POSITION])
    inputs = model.new_inputs(8)
    inputs.fill(IDS[POSITION:], POSITION)
    logits = model.decode(inputs, model.plan(8))
    ids = model.head.argmax(logits)
    for made in (on_chips(logits), on_chips(ids)):
        assert len(made) == model.layout.chips
        assert all(torch.equal(one, made[0]) for one in made)


def test_the_vocabulary_is_joined_in_the_order_of_the_chips(model, weights, reference):
    model.prefill(IDS[:POSITION])
    made = model.forward(IDS[POSITION:], POSITION)
    share = VOCAB // model.layout.chips
    for chip in range(model.layout.chips):
        part = slice(chip * share, (chip + 1) * share)
        assert min(row_pccs(made[:, part], reference.expected[:, part])) >= BOUND
    swapped = torch.cat(made.split(share, dim=-1)[::-1], -1)
    assert max(row_pccs(swapped, reference.expected)) < 0.5


def test_each_chip_caches_its_own_heads(model, weights, reference):
    model.prefill(IDS[:POSITION])
    kv_heads, dim = weights.config.num_key_value_heads, weights.config.head_dim
    for layer, kept in zip(model.cache, reference.kv, strict=True):
        keys, values = kept[:POSITION].view(POSITION, 2, kv_heads, dim).unbind(1)  # torch's: [S, KV, D]
        for tensor, expected in ((layer.keys, in_pairs(keys, dim)), (layer.values, values)):
            share = kv_heads // model.layout.chips
            for made, own in zip(on_chips(tensor), expected.split(share, 1), strict=True):
                own = own.transpose(0, 1).flatten(0, 1)
                assert min(row_pccs(made[0, :, :POSITION].flatten(0, 1).float(), own)) >= BOUND


# ------------------------------------------------------------------------------------------ faults are noticed
def unordered_qkv(monkeypatch):
    """All queries, then all keys, then all values, cut into equal parts: what one chip has would be mere queries."""
    real = ttnn_weights._qkv
    monkeypatch.setattr(ttnn_weights, "_qkv", lambda prefix, config, chips, tensors: real(prefix, config, 1, tensors))


def no_sum_in_decode(monkeypatch):
    monkeypatch.setattr(Line, "sum_rows", lambda self, x: x)


def no_sum_in_prefill(monkeypatch):
    monkeypatch.setattr(Line, "sum_prefill", lambda self, x: x)


def vocabulary_as_on_one_chip_in_two_pieces(monkeypatch):
    """Piece 0 the first half of the vocabulary, piece 1 the other: right only where there is one chip."""
    real = ttnn_weights._head_piece
    monkeypatch.setattr(ttnn_weights, "head_parts", lambda config, chips: 2)
    monkeypatch.setattr(
        ttnn_weights, "_head_piece", lambda name, chips, parts, part, tensors: real(name, 1, parts, part, tensors)
    )


@pytest.mark.parametrize(
    "fault", [unordered_qkv, no_sum_in_decode, no_sum_in_prefill, vocabulary_as_on_one_chip_in_two_pieces]
)
def test_a_fault_between_chips_is_noticed(mesh, weights, reference, monkeypatch, fault):
    fault(monkeypatch)
    assert worst_pcc(weights.on(mesh), reference) < BOUND - 0.01
