"""Each module of the TT-NN Llama against Hugging Face's with the same weights, PCC >= 0.999 in every row.

Three head layouts: D=64 with 4 queries per KV head (1B), D=128 with 3 (3B), D=128 with 4 (8B). Weights are larger than
Hugging Face's initial ones, and in bf16 on both sides; Hugging Face computes in fp32.
"""

import pytest
import torch
import ttnn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.tests.llama_fixtures import hf_model
from models.tests.ttnn.model_fixtures import SIZES, VOCAB, Weights, in_pairs, on_chips, put, reduced, row_pccs
from models.ttnn_llama.modules.lm_head import LMHead
from models.ttnn_llama.weights import tensors as ttnn_weights

BOUND = 0.999
PREFILL = 128


class Pair:
    """One layer's model on the board and in Hugging Face. `rows` and `hidden` move values between the two."""

    def __init__(self, size, mesh):
        self.weights = Weights.random(reduced(size, mesh.get_num_devices(), layers=1))
        self.config = self.weights.config
        self.mesh = mesh
        self.tt = self.weights.on(mesh)
        self.hf = hf_model(self.config, self.weights)
        self.tt_layer, self.hf_layer = self.tt.layers[0], self.hf.model.layers[0]

    def noise(self, rows, seed=1, width=None):
        noise = torch.randn(rows, width or self.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        return noise.bfloat16().float()

    def residual(self, x):
        """[R, H] on the device as decode holds it."""
        return ttnn.interleaved_to_sharded(put(self.mesh, x[None, None]), self.tt.layout.residual)

    def hf_rope(self, start, rows):
        return self.hf.model.rotary_emb(torch.zeros(1), torch.arange(start, start + rows)[None])

    @torch.no_grad()
    def hf_attention(self, x):
        return self.hf_layer.self_attn(x[None], self.hf_rope(0, len(x)), attention_mask=None)[0][0]


@pytest.fixture(scope="module", params=SIZES)
def pair(request, mesh):
    return Pair(request.param, mesh)


def assert_equal(tensor, expected):
    """The device tensor [1, 1, R, width] has these rows on every chip."""
    for values in on_chips(tensor):
        worst = min(row_pccs(values.view(expected.shape).float(), expected))
        assert worst >= BOUND, worst


@torch.no_grad()
def test_norm_equals_hugging_face(pair):
    for rows in (1, 5, 32):
        x = pair.noise(rows)
        assert_equal(pair.tt_layer.attention_norm.decode_forward(pair.residual(x)), pair.hf_layer.input_layernorm(x))
    x = pair.noise(PREFILL)
    made = pair.tt_layer.mlp_norm.prefill_forward(put(pair.mesh, x[None, None]))
    assert_equal(made, pair.hf_layer.post_attention_layernorm(x))


def test_norm_divides_by_the_root_mean_square_and_not_by_a_constant(pair):
    x = pair.noise(2)
    x[1] = 8 * x[0]
    norm = pair.tt_layer.attention_norm
    small, large = on_chips(norm.decode_forward(pair.residual(x)))[0][0, 0].float()
    torch.testing.assert_close(small, large, rtol=0.01, atol=0.01)
    tiny = on_chips(norm.decode_forward(pair.residual(x * 2**-10)))[0][0, 0, 0].float()
    expected = pair.hf_layer.input_layernorm(x[0] * 2**-10).detach()  # here epsilon is what counts
    torch.testing.assert_close(tiny, expected, rtol=0.02, atol=0.01)


@torch.no_grad()
def test_mlp_equals_hugging_face(pair):
    for rows in (1, 5, 32):
        x = pair.noise(rows)
        assert_equal(pair.tt_layer.mlp.decode_forward(pair.residual(x)), pair.hf_layer.mlp(x))
    x = pair.noise(PREFILL)
    assert_equal(pair.tt_layer.mlp.prefill_forward(put(pair.mesh, x[None, None])), pair.hf_layer.mlp(x))


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_rope_of_decode_rows_equals_hugging_face(pair, rows):
    layout, dim, position = pair.tt.layout, pair.config.head_dim, 90
    heads = layout.heads + 2 * layout.kv_heads
    qkv = pair.noise(rows, width=heads * dim).view(rows, heads, dim)
    q, k, v = qkv.split((layout.heads, layout.kv_heads, layout.kv_heads), 1)
    on_device = torch.cat([in_pairs(q, dim), in_pairs(k, dim), v], 1).flatten(1)
    plan = pair.tt.plan(rows)
    inputs = pair.tt.new_inputs(rows)
    inputs.fill([0] * rows, position)
    q_tt, k_tt, _ = ttnn.experimental.nlp_create_qkv_heads_decode(
        ttnn.interleaved_to_sharded(put(pair.mesh, on_device[None, None]), layout.qkv),
        num_heads=layout.heads,
        num_kv_heads=layout.kv_heads,
        overlap_qk_coregrid=plan.overlap_heads,
        memory_config=ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG,
    )
    q_tt, k_tt = plan.rotate(q_tt, k_tt, plan.rope_tables(inputs))
    cos, sin = pair.hf_rope(position, rows)
    q_hf, k_hf = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for made, expected in ((q_tt, q_hf), (k_tt, k_hf)):
        assert_equal(made, in_pairs(expected[0].transpose(0, 1), dim).flatten(0, 1))


def test_rope_of_a_prefill_equals_hugging_face(pair):
    heads, dim, start = pair.tt.layout.heads, pair.config.head_dim, 128
    q = pair.noise(PREFILL, width=heads * dim).view(PREFILL, heads, dim)
    rope = pair.tt.rope
    on_device = put(pair.mesh, in_pairs(q, dim).transpose(0, 1)[None])
    made = ttnn.experimental.rotary_embedding_llama(on_device, *rope.range(start, PREFILL), rope.rotation)
    cos, sin = pair.hf_rope(start, PREFILL)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)[0]
    assert_equal(made, in_pairs(expected[0].transpose(0, 1), dim).transpose(0, 1).flatten(0, 1))


def test_attention_equals_hugging_face_in_prefill_and_in_decode_rows(pair):
    """Two prefill chunks, then rows from 250 on: over a border of the cache's tiles and of its 128-row blocks."""
    first = 250
    x = pair.noise(first + 32)
    tt, attention = pair.tt, pair.tt_layer.attention
    expected = pair.hf_attention(x)
    for start in (0, PREFILL):
        chunk = torch.zeros(PREFILL, x.shape[1])
        chunk[: min(PREFILL, first - start)] = x[start : min(start + PREFILL, first)]
        made = attention.prefill_forward(
            put(pair.mesh, chunk[None, None]), tt.rope.range(start, PREFILL), tt.rope.rotation, start
        )
        filled = min(PREFILL, first - start)
        for values in on_chips(made):
            assert min(row_pccs(values[0, 0, :filled].float(), expected[start : start + filled])) >= BOUND
    for rows in (1, 2, 5, 8, 16, 32):
        plan, inputs = tt.plan(rows), tt.new_inputs(rows)
        inputs.fill([0] * rows, first)
        made = attention.decode_forward(pair.residual(x[first : first + rows]), plan.rope_tables(inputs), inputs, plan)
        assert_equal(made, expected[first : first + rows])


@torch.no_grad()
def test_lm_head_equals_hugging_face(pair):
    for rows in (1, 5, 32):
        x = pair.noise(rows)
        assert_equal(pair.tt.head.logits(pair.residual(x)), pair.hf.lm_head(pair.hf.model.norm(x)))


def test_every_part_of_the_vocabulary_gives_its_own_ids(mesh, monkeypatch):
    """Two pieces of the head on each chip. A hidden state that is a token's embedding has its logit highest."""
    chips = mesh.get_num_devices()
    monkeypatch.setattr(ttnn_weights, "HEAD_TILES", VOCAB // 32 // chips // 2)
    pair = Pair("1B", mesh)
    pieces = 2 * chips
    assert len(pair.tt.head.pieces) == 2
    width = VOCAB // pieces
    tokens = sorted({edge for piece in range(pieces) for edge in (piece * width, (piece + 1) * width - 1)})
    x = pair.weights["model.embed_tokens.weight"][tokens].float()
    ids = pair.tt.head.argmax(pair.tt.head.logits(pair.residual(x)))
    for on_chip in on_chips(ids):
        assert on_chip.flatten().tolist() == tokens


def test_argmax_takes_the_lowest_id_where_logits_tie(mesh):
    logits = torch.zeros(1, 1, 5, VOCAB)
    for row, ids in enumerate(([7, 900], [0, 1], [511, 512], [1023], [30, 40, 50])):
        logits[0, 0, row, ids] = 2.0
    ids = LMHead.argmax(ttnn.untilize(put(mesh, logits), use_multicore=True))
    assert on_chips(ids)[0].flatten().tolist() == [7, 0, 511, 1023, 30]
