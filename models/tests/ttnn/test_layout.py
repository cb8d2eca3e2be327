"""Program configurations of matmuls and attention, at full sizes."""

import pytest
import ttnn

from models.llama.config import named_config
from models.tests.ttnn.model_fixtures import Weights, put, random_ids, reduced
from models.ttnn_llama.modules.layout import Layout, compute_config
from models.ttnn_llama.shapes import KV_BLOCK, PREFILL_CHUNK, TILE
from models.ttnn_llama.weights.precision import precision_named

MOST_TILES = 96  # of output that a core keeps in L1, or one row of tiles where that is more


def matrices(layout):
    """(k, n) per chip of all matrices of a layer."""
    heads = layout.heads + 2 * layout.kv_heads
    return {
        "wqkv": (layout.hidden, heads * layout.head_dim),
        "wo": (layout.heads * layout.head_dim, layout.hidden),
        "gate, up": (layout.hidden, layout.intermediate),
        "down": (layout.intermediate, layout.hidden),
    }


@pytest.mark.parametrize("fidelity", ["LoFi", "HiFi2", "HiFi4"])
@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
def test_a_prefill_matmul_cuts_rows_and_never_the_columns_of_a_weight(mesh, size, fidelity):
    layout = Layout(named_config(size), mesh, precision_named("performance"), 2048)
    room = 4 if compute_config(mesh, fidelity).fp32_dest_acc_en else 8  # tiles
    for k, n in matrices(layout).values():
        for rows in range(KV_BLOCK, PREFILL_CHUNK + 1, KV_BLOCK):
            program = layout.prefill_matmul(rows, k, n, fidelity)
            assert program.out_block_w == program.per_core_N
            assert program.per_core_M % program.out_block_h == 0
            assert program.out_block_h * program.out_block_w <= max(MOST_TILES, program.per_core_N)
            assert program.out_block_h % program.out_subblock_h == program.out_block_w % program.out_subblock_w == 0
            assert program.out_subblock_h * program.out_subblock_w <= room
            columns, lines = 8, min(layout.cores.rows, rows // TILE, 8)
            assert program.per_core_N * TILE * columns >= n and program.per_core_M * TILE * lines >= rows


def test_a_weight_in_dram_shards_whose_columns_are_cut_is_refused(mesh, shadow):
    """ttnn accepts it. On a chip every block then has the first columns."""
    chips = mesh.get_num_devices()
    model = Weights.random(reduced("1B", chips, layers=1, intermediate_size=1280 * chips)).on(mesh)
    linear = model.layers[0].mlp.w1
    x = put(mesh, Weights.random(model.config)["model.embed_tokens.weight"][random_ids(KV_BLOCK, 1)][None, None])
    whole = model.layout.prefill_matmul(KV_BLOCK, linear.k, linear.n, linear.fidelity)
    linear.prefill_forward(x)
    assert whole.per_core_N > 1
    linear.prefill_programs[KV_BLOCK] = ttnn.MatmulMultiCoreReuseMultiCastProgramConfig(
        compute_with_storage_grid_size=whole.compute_with_storage_grid_size,
        in0_block_w=whole.in0_block_w,
        out_subblock_h=1,
        out_subblock_w=1,
        out_block_h=whole.out_block_h,
        out_block_w=1,
        per_core_M=whole.per_core_M,
        per_core_N=whole.per_core_N,
        transpose_mcast=False,
        fused_activation=None,
        fuse_batch=True,
    )
    with pytest.raises(ValueError, match=f"blocks of 1 of {whole.per_core_N} columns"):
        linear.prefill_forward(x)


@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
def test_decode_attention_takes_the_same_number_of_cores_for_any_number_of_rows(mesh, size):
    layout = Layout(named_config(size), mesh, precision_named("performance"), 2048)
    assert layout.attention_program(TILE).max_cores_per_head_batch == 1
