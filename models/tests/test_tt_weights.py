"""Weights for TT-NN, in plain torch: what the chips hold computes what Hugging Face computes. Needs no ttnn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.errors import UserError
from models.llama.config import NAMED_SIZES
from models.llama.rope import inverse_frequencies
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config
from models.ttnn_llama.weights import tensors as weights
from models.ttnn_llama.weights.precision import PRECISIONS, precision_named
from models.ttnn_llama.weights.tensors import check_split, head_parts, interleave_pairs, weight_specs

BF16 = precision_named("bf16")
MODEL = tiny_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
)


def on_chips(config, tensors, chips: int) -> list[dict[str, torch.Tensor]]:
    """What each chip holds, by name."""
    shares = [{} for _ in range(chips)]
    for spec in weight_specs(config, chips, BF16):
        whole = spec.build(tensors)
        assert tuple(whole.shape) == spec.shape, spec.name
        parts = [whole] * chips if spec.chip_dim is None else whole.chunk(chips, spec.chip_dim)
        for share, part in zip(shares, parts, strict=True):
            assert tuple(part.shape) == spec.local_shape(chips)
            share[spec.name] = part.reshape(part.shape[-2:])
    return shares


def rotate_pairs(x: torch.Tensor, config) -> torch.Tensor:
    """[heads, R, D] at positions 0..R-1: dimension 2 i turns with 2 i + 1, as `rotary_embedding_llama` does."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), inverse_frequencies(config))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def tensor_parallel_logits(ids: torch.Tensor, config, shares: list[dict], heads_first=rotate_pairs) -> torch.Tensor:
    """The whole forward, chip by chip, sums where chips would exchange. ids [R] -> logits [R, V]."""

    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight.flatten(), config.rms_norm_eps)

    n, dim = len(shares), config.head_dim
    q_heads, kv_heads = config.num_attention_heads // n, config.num_key_value_heads // n
    x = shares[0]["embedding"][ids]
    for layer in range(config.num_hidden_layers):
        parts = [
            {k.rsplit(".")[-1]: w for k, w in share.items() if k.startswith(f"layers.{layer}.")} for share in shares
        ]
        normed, attended = norm(x, parts[0]["attention_norm"]), 0
        for part in parts:
            heads = (normed @ part["wqkv"]).unflatten(-1, (-1, dim)).transpose(0, 1)
            q, k, v = heads.split([q_heads, kv_heads, kv_heads])
            q, k = heads_first(q, config), heads_first(k, config)
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
            attended = attended + out.transpose(0, 1).flatten(1) @ part["wo"]
        x = x + attended
        normed = norm(x, parts[0]["mlp_norm"])
        x = x + sum((F.silu(normed @ part["w1"]) * (normed @ part["w3"])) @ part["w2"] for part in parts)
    x = norm(x, shares[0]["norm"])
    pieces = [name for name in shares[0] if name.startswith("head.")]
    return torch.cat([x @ share[piece] for share in shares for piece in pieces], dim=-1)


def hf_logits(ids: torch.Tensor, config, tensors) -> torch.Tensor:
    with torch.inference_mode():
        return hf_model(config, tensors)(ids[None]).logits[0]


# ------------------------------------------------------------------------------------------------------ against HF
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chips", [1, 2, 4, 8])
def test_chips_together_compute_what_hugging_face_computes(monkeypatch, chips, tied):
    monkeypatch.setattr(weights, "HEAD_TILES", 2)  # several pieces of the head on each chip
    config = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    tensors = random_tensors(config, seed=1)
    ids = torch.randint(config.vocab_size, (50,))
    assert head_parts(config, chips) == 16 // chips
    found = tensor_parallel_logits(ids, config, on_chips(config, tensors, chips))
    torch.testing.assert_close(found, hf_logits(ids, config, tensors), rtol=1e-4, atol=1e-4)


def test_without_the_permutation_the_logits_are_wrong(monkeypatch):
    tensors = random_tensors(MODEL, seed=1)
    ids = torch.randint(MODEL.vocab_size, (50,))
    monkeypatch.setattr(weights, "interleave_pairs", lambda weight, head_dim: weight)
    found = tensor_parallel_logits(ids, MODEL, on_chips(MODEL, tensors, 2))
    assert (found - hf_logits(ids, MODEL, tensors)).abs().max() > 0.5


def test_the_permutation_puts_the_halves_of_each_head_side_by_side():
    rows = torch.arange(16)[:, None]  # two heads of 8
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave_pairs(rows, head_dim=8).flatten().tolist() == expected


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_head_pieces_of_a_chip_then_the_next_chip_are_the_vocabulary_in_order(monkeypatch, chips):
    monkeypatch.setattr(weights, "HEAD_TILES", 2)
    tensors = random_tensors(MODEL, seed=2)
    shares = on_chips(MODEL, tensors, chips)
    rows = [share[f"head.{part}"].t() for share in shares for part in range(16 // chips)]
    assert all(len(row) == 64 for row in rows)
    assert torch.equal(torch.cat(rows), tensors["lm_head.weight"])


# ---------------------------------------------------------------------------------------------------------- specs
def test_every_weight_of_the_checkpoint_is_used_once_and_no_value_is_lost():
    class Counting(dict):
        def __getitem__(self, name):
            self.setdefault("used", []).append(name)
            return super().__getitem__(name)

    tensors = Counting(random_tensors(MODEL, seed=3))
    specs = weight_specs(MODEL, 2, BF16)
    values = sum(spec.build(tensors).numel() for spec in specs)
    assert values == MODEL.parameter_count
    assert sorted(tensors.pop("used")) == sorted(MODEL.tensor_shapes())


def test_names_are_in_the_order_of_a_forward():
    names = [spec.name for spec in weight_specs(MODEL, 1, BF16)]
    layer = "attention_norm wqkv wo mlp_norm w1 w3 w2".split()
    layers = [f"layers.{i}.{name}" for i in range(2) for name in layer]
    assert names == ["embedding", *layers, "norm", "head.0"]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
def test_formats_follow_the_precision(precision):
    formats = {spec.name: spec.format for spec in weight_specs(MODEL, 1, precision)}
    assert {formats[f"layers.0.{name}"] for name in ("wqkv", "wo")} == {precision.attention}
    assert {formats[f"layers.0.{name}"] for name in ("w1", "w3")} == {precision.gate_up}
    assert formats["layers.0.w2"] == precision.down and formats["head.0"] == precision.head
    assert {formats[name] for name in ("embedding", "norm", "layers.1.mlp_norm")} == {"bf16"}


@pytest.mark.parametrize("size", NAMED_SIZES)
@pytest.mark.parametrize("chips", [1, 2, 4, 8])
def test_published_sizes_split_over_every_mesh_into_equal_whole_tiles(size, chips):
    config = NAMED_SIZES[size]
    for spec in weight_specs(config, chips, BF16):
        assert all(side % 32 == 0 for side in spec.local_shape(chips)[-2:]) or spec.name == "embedding", spec.name
        assert spec.dram_sharded == (spec.chip_dim is not None) == (spec.layout == "tile")
    tiles = config.vocab_size // chips // 32 // head_parts(config, chips)
    assert tiles == 501  # 128256 tokens: 4008 tiles in 8 pieces, wherever they lie


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "chips", "message"),
    [
        ({}, 3, "num_attention_heads 16 cannot be split over 3 chips: use a mesh of 1, 2, 4 or 8 chips"),
        (
            {"num_key_value_heads": 2},
            8,
            "num_key_value_heads 2 cannot be split over 8 chips: use a mesh of 1 or 2 chips",
        ),
        ({"num_key_value_heads": 1}, 2, "num_key_value_heads 1 cannot be split over 2 chips: use a mesh of 1 chip"),
        (
            {"vocab_size": 1056},
            2,
            "vocab_size 1056 cannot be split over 2 chips in whole tiles of 32: use a mesh of 1 chip",
        ),
        ({"intermediate_size": 576}, 4, "intermediate_size 576 cannot be split over 4 chips in whole tiles of 32: use"),
        (
            {"vocab_size": 1000},
            1,
            "vocab_size 1000 cannot be split over 1 chip in whole tiles of 32: use another model",
        ),
        ({"hidden_size": 144}, 1, "hidden_size 144 is not a multiple of 32"),
        ({"head_dim": 48}, 1, "head_dim 48 is not a multiple of 32"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_meshes_that_would_do(changes, chips, message):
    with pytest.raises(UserError) as caught:
        weight_specs(dataclasses.replace(MODEL, **changes), chips, BF16)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mesh_that_a_refusal_names_is_accepted():
    config = dataclasses.replace(MODEL, num_key_value_heads=2)
    for chips in (1, 2):
        check_split(config, chips)
