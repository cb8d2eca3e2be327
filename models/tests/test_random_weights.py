"""RandomWeights: seeded, of the scale of a fresh model, and no row twice."""

import pytest
import torch

from models.llama import random_weights
from models.llama.random_weights import RandomWeights
from models.tests.llama_fixtures import tiny_config
from models.torch_llama.model import TorchLlama


def test_they_are_seeded_differ_by_name_and_make_a_model():
    config = tiny_config(dtype="bfloat16")
    weights, others = RandomWeights(config, seed=1), RandomWeights(config, seed=2)
    assert {name: tuple(weights[name].shape) for name in weights} == config.tensor_shapes()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name], RandomWeights(config, seed=1)[name])
    assert not torch.equal(weights[name], others[name]) and not torch.equal(weights[name], weights[other])
    assert TorchLlama(config, weights, max_seq_len=32).prefill([1, 2, 3]).isfinite().all()


def test_they_have_the_scale_of_a_fresh_model():
    config = tiny_config(num_hidden_layers=8)
    for name, tensor in RandomWeights(config).items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones(config.hidden_size))
        else:
            scale = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert tensor.std() == pytest.approx(scale, rel=0.05) and abs(tensor.mean()) < scale / 10


@pytest.mark.parametrize("vocab_size", [128, 128256])
def test_no_row_is_there_twice(vocab_size, monkeypatch):
    """Else two tokens would have equal logits, and greedy text would depend on how a tie is decided."""
    if vocab_size == 128:
        monkeypatch.setattr(random_weights, "BLOCK", 1021)  # eight times in this matrix
    config = tiny_config(vocab_size=vocab_size)
    rows = RandomWeights(config)["model.embed_tokens.weight"]
    assert rows.numel() > random_weights.BLOCK and len(torch.unique(rows, dim=0)) == vocab_size
