"""TorchLlama against Hugging Face with equal weights, and the promises its protocol makes."""

import itertools

import pytest
import torch

from models.errors import UserError
from models.llama.config import RopeScaling
from models.llama.rope import inverse_frequencies, rope_tables
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config
from models.torch_llama.linear import Int8Linear, PackedLinear, PlainLinear, packing_works
from models.torch_llama.model import TorchLlama

TOLERANCE = 1e-4

LAYOUTS = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa-3:1": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "gqa-4:1-tied": {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "head-dim-64": {"head_dim": 64, "tie_word_embeddings": True, "rope_scaling": RopeScaling(factor=32.0)},
    "head-dim-128": {"head_dim": 128, "rope_scaling": RopeScaling(factor=8.0), "rope_theta": 500000.0},
    "no-scaling": {"rope_scaling": None},
}


def build(config, seed=0, **options):
    tensors = random_tensors(config, seed)
    return TorchLlama(config, tensors, **{"dtype": "fp32", "max_seq_len": 256, **options}), tensors


def random_ids(config, n, seed=0):
    return torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def hf_logits(config, tensors, ids):
    return hf_model(config, tensors)(torch.tensor([ids])).logits[0]


# ---------------------------------------------------------------------------------------- blocks against HF
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 32, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_equals_plain_linear(dtype, rows):
    if not packing_works(dtype):
        pytest.skip("this torch build or CPU cannot pack weights: the plain form is used")
    torch.manual_seed(rows)
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    got, expected = PackedLinear(weight, rows=8)(x), PlainLinear(weight)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, **({"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {}))


def test_int8_linear_is_close_and_a_quarter_of_fp32():
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    quantised = Int8Linear(weight, rows=8)
    exact = x @ weight.T
    error = (quantised(x) - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.03
    assert quantised.bytes < weight.nbytes / 3


def test_int8_rows_keep_their_bits_whatever_is_beside_them():
    """A scale for all rows together would let a draft's tokens change what the target computes."""
    torch.manual_seed(0)
    linear, x = Int8Linear(torch.randn(96, 64), rows=8), torch.randn(32, 64)
    x[7] *= 1000
    x[8] = 0
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, 5, 8, 9, 16, 32):
        assert torch.equal(linear(x[:rows]), alone[:rows])
    assert linear(torch.full((1, 64), float("nan"))).isnan().all()


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_tables_equal_hf_beyond_8192(factor, head_dim):
    config = tiny_config(
        head_dim=head_dim, rope_theta=500000.0, rope_scaling=RopeScaling(factor=factor), max_position_embeddings=131072
    )
    reference = hf_model(config, random_tensors(config, 0)).model.rotary_emb
    positions = torch.tensor([0, 1, 2047, 8191, 8192, 8200, 16384, 20000])
    cos_hf, sin_hf = reference(torch.zeros(1, 1), positions[None])
    cos, sin = rope_tables(config, 20001)
    sign = torch.cat((-torch.ones(head_dim // 2), torch.ones(head_dim // 2)))
    torch.testing.assert_close(cos[positions], cos_hf[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[positions] * sign, sin_hf[0], atol=1e-5, rtol=0)


def test_rope_factor_8_and_32_differ():
    tables = [inverse_frequencies(tiny_config(head_dim=64, rope_scaling=RopeScaling(factor=f))) for f in (8.0, 32.0)]
    assert (tables[0] / tables[1]).max() > 3.9


# ------------------------------------------------------------------------------------ whole model against HF
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_hf(layout):
    config = tiny_config(**LAYOUTS[layout])
    model, tensors = build(config)
    ids = random_ids(config, 150)
    expected = hf_logits(config, tensors, ids)
    difference = (model.forward(ids[:32], 0) - expected[:32]).abs().max()
    assert difference < TOLERANCE
    assert (model.prefill(ids) - expected[-1]).abs().max() < TOLERANCE
    assert expected.abs().max() > 1.0  # the tolerance means something


@pytest.mark.parametrize("layout", ["gqa-3:1", "head-dim-64"])
def test_positions_beyond_8192_equal_hf(layout):
    config = tiny_config(
        **{**LAYOUTS[layout], "rope_scaling": RopeScaling(factor=32.0), "rope_theta": 500000.0},
        max_position_embeddings=16384,
        num_hidden_layers=1,
    )
    model, tensors = build(config, max_seq_len=8448)
    ids = random_ids(config, 8300)
    with torch.no_grad():
        expected = hf_model(config, tensors)(torch.tensor([ids]), logits_to_keep=4).logits[0]
    assert (model.prefill(ids[:-3]) - expected[0]).abs().max() < TOLERANCE
    assert (model.forward(ids[-3:], 8297) - expected[1:]).abs().max() < TOLERANCE


def test_prefill_in_chunks_equals_hf(monkeypatch):
    monkeypatch.setattr("models.torch_llama.model.PREFILL_CHUNK", 48)
    config = tiny_config()
    model, tensors = build(config)
    ids = random_ids(config, 131)
    assert (model.prefill(ids) - hf_logits(config, tensors, ids)[-1]).abs().max() < TOLERANCE


def test_checkpoint_on_disk_gives_the_same_model(tmp_path):
    from models.llama.checkpoint import Checkpoint
    from models.tests.llama_fixtures import write_tiny_checkpoint

    config = tiny_config(tie_word_embeddings=True)
    path = write_tiny_checkpoint(tmp_path / "tiny", config, seed=3)
    from_disk = TorchLlama.from_checkpoint(Checkpoint.open(str(path)), dtype="fp32", max_seq_len=64)
    in_memory = TorchLlama(config, random_tensors(config, 3), dtype="fp32", max_seq_len=64)
    ids = random_ids(config, 20)
    assert torch.equal(from_disk.prefill(ids), in_memory.prefill(ids))


# ------------------------------------------------------------------------------------ decode, verify, rollback
@pytest.mark.parametrize("fixed_rows", [None, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_n_row_forward_equals_n_single_steps(layout, fixed_rows):
    config = tiny_config(**LAYOUTS[layout])
    model, _ = build(config, fixed_rows=fixed_rows)
    ids = random_ids(config, 60)
    for position, n in ((1, 2), (30, 5), (47, 8)):  # the last two cross a 32-row border
        model.prefill(ids[:position])
        together = model.forward(ids[position : position + n], position).clone()
        model.prefill(ids[:position])
        one_by_one = torch.cat([model.forward([ids[position + i]], position + i) for i in range(n)])
        assert (together - one_by_one).abs().max() < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_last_token_changes_no_earlier_row(layout):
    config = tiny_config(**LAYOUTS[layout])
    model, _ = build(config)
    ids = random_ids(config, 24)
    model.prefill(ids[:16])
    before = model.forward(ids[16:], 16).clone()
    changed = ids[16:-1] + [(ids[-1] + 1) % config.vocab_size]
    after = model.forward(changed, 16)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_stale_rows_after_rollback_are_not_seen():
    config = tiny_config()
    model, _ = build(config, fixed_rows=8)
    ids, wrong = random_ids(config, 40), random_ids(config, 40, seed=9)
    model.prefill(ids[:20])
    expected = model.forward(ids[20:24], 20).clone()
    model.forward(wrong[20:28], 20)
    assert torch.equal(model.forward(ids[20:24], 20), expected)


def test_draft_greedy_equals_single_greedy_steps():
    config = tiny_config()
    model, _ = build(config)
    ids = random_ids(config, 12)
    model.prefill(ids)
    expected = model.greedy(ids[-1:], 11)
    for step in range(5):
        expected += model.greedy(expected[-1:], 12 + step)
    model.prefill(ids[:10])
    assert model.draft_greedy(ids[10:], 10, 6) == expected
    assert len(set(expected)) > 1


# --------------------------------------------------------------------------------- row-invariant arithmetic
def test_each_row_has_the_same_bits_whatever_n_is():
    """The promise of fixed_rows, bitwise in bf16: n rows at once, one by one, and cut anywhere in between."""
    config = tiny_config(
        hidden_size=128, head_dim=64, intermediate_size=384, vocab_size=512, max_position_embeddings=1024
    )
    ids = random_ids(config, 700)
    for fixed_rows in (5, 16):  # the demo's default, and more than one block of any kernel
        model, _ = build(config, dtype="bf16", fixed_rows=fixed_rows, max_seq_len=640, seed=1)
        _check_bits(model, ids, fixed_rows)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_each_row_has_the_same_bits_without_padding_where_rows_are_alike(dtype, compiled):
    """The promise of row_invariant, and of compiled layers."""
    config = tiny_config(
        hidden_size=128, head_dim=64, intermediate_size=384, vocab_size=512, max_position_embeddings=1024
    )
    model, _ = build(config, dtype=dtype, row_invariant=True, compiled=compiled, max_seq_len=640, seed=1)
    assert model.row_invariant == model.rows_alike
    if not model.row_invariant:
        pytest.skip(f"rows in {dtype} are not alike on this machine")
    _check_bits(model, random_ids(config, 700), 16)


def _check_bits(model, ids, most):
    for position in (1, 60, 125, 253, 510, 590):  # across the borders of 128 and 512 cached rows
        model.prefill(ids[:position])
        reference = torch.cat([model.forward([ids[position + i]], position + i) for i in range(most)])
        for sizes in itertools.islice(_cuts(most), 12):
            model.prefill(ids[:position])
            pieces, at = [], position
            for n in sizes:
                pieces.append(model.forward(ids[at : at + n], at))
                at += n
            assert torch.equal(torch.cat(pieces), reference), (most, position, sizes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "padding", [{"fixed_rows": 7}, {"row_invariant": True}, {"compiled": True}], ids=["fixed", "alike", "compiled"]
)
@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (3, 1), (4, 2)])
def test_each_row_has_the_same_bits_on_both_sides_of_a_block_of_the_cache(dtype, padding, heads, kv_heads):
    """Where plain decoding reads one block less than a verification that goes on into the next."""
    sizes = {"hidden_size": 64 * heads, "head_dim": 64, "intermediate_size": 128, "max_position_embeddings": 1024}
    config = tiny_config(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1)
    model, _ = build(config, dtype=dtype, **padding, max_seq_len=1000)
    if not model.row_invariant:
        pytest.skip(f"rows in {dtype} are not alike on this machine")
    ids = random_ids(config, 920)
    for border in (128, 256, 384, 768, 896):
        begin = border - 7
        model.prefill(ids[:begin])
        plain = [model.forward([ids[begin + i]], begin + i)[0] for i in range(14)]
        for start in range(1, 7):  # the cache now holds the rows of plain decoding
            rows = model.forward(ids[begin + start : begin + start + 7], begin + start)
            for i, row in enumerate(rows):
                assert torch.equal(row, plain[start + i]), (border, start, i)


def _cuts(total):
    """Ways to cut `total` rows into consecutive forwards, seeded."""
    generator = torch.Generator().manual_seed(total)
    yield [total]
    while True:
        left, sizes = total, []
        while left:
            sizes.append(int(torch.randint(1, left + 1, (1,), generator=generator)))
            left -= sizes[-1]
        yield sizes


# --------------------------------------------------------------------------------------------------- limits
def test_limits_are_user_errors_that_name_the_values():
    config = tiny_config()
    model, tensors = build(config, max_seq_len=32, fixed_rows=8)
    with pytest.raises(UserError, match="33 tokens at position 0 do not fit the context of 32"):
        model.prefill(random_ids(config, 33))
    with pytest.raises(UserError, match="2 tokens at position 31"):
        model.forward([1, 2], 31)
    with pytest.raises(UserError, match="9 rows exceed the fixed 8 rows"):
        model.forward(list(range(9)), 0)
    with pytest.raises(UserError, match="unknown dtype 'bf8'"):
        TorchLlama(config, tensors, dtype="bf8")
    with pytest.raises(UserError, match="context of 9999 tokens is outside the model's 1..512"):
        TorchLlama(config, tensors, max_seq_len=9999)
    with pytest.raises(UserError, match="unknown quantisation 'int4'"):
        TorchLlama(config, tensors, quantize="int4")


def test_int8_draft_agrees_with_fp32_mostly():
    config = tiny_config()
    model, tensors = build(config)
    draft = TorchLlama(config, tensors, quantize="int8", max_seq_len=256)
    ids = random_ids(config, 32)
    exact, quantised = model.forward(ids, 0), draft.forward(ids, 0)
    cosine = torch.nn.functional.cosine_similarity(exact, quantised, dim=-1)
    assert cosine.min() > 0.97
    assert not torch.equal(exact, quantised)
    assert draft.weight_bytes < model.weight_bytes / 2
