"""Where tensors lie on grids of cores that the mock boards of the other tests do not have. No board is opened."""

from types import SimpleNamespace

import pytest

from models.llama.config import named_config
from models.ttnn_llama.modules.layout import TILE, Layout
from models.ttnn_llama.shapes import MAX_ROWS
from models.ttnn_llama.weights.precision import precision_named

pytestmark = pytest.mark.once

WORMHOLE, BLACKHOLE = 12, 8  # DRAM banks
# The workers that are left of a chip: what is harvested differs from card to card, and with where ttnn dispatches from.
GRIDS = [
    *((columns, rows, WORMHOLE) for columns, rows in ((8, 8), (8, 7))),
    *((columns, rows, BLACKHOLE) for columns, rows in ((11, 10), (12, 10), (13, 10), (14, 10))),
]


def layout_on(columns, rows, banks, size, chips):
    mesh = SimpleNamespace(
        get_num_devices=lambda: chips,
        compute_with_storage_grid_size=lambda: SimpleNamespace(x=columns, y=rows),
        dram_grid_size=lambda: SimpleNamespace(x=banks, y=1),
    )
    return Layout(named_config(size), mesh, precision_named("performance"), 2048)


@pytest.mark.parametrize("chips", [1, 2, 4, 8])
@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_every_sharding_covers_its_width_on_cores_that_the_grid_has(grid, size, chips):
    columns, rows, _ = grid
    layout = layout_on(*grid, size, chips)
    heads = layout.heads + 2 * layout.kv_heads
    widths = {"residual": layout.hidden, "qkv": heads * layout.head_dim, "gated": layout.intermediate}
    for name, width in widths.items():
        shards = getattr(layout, name).shard_spec
        end = shards.grid.bounding_box().end
        assert end.x < columns and end.y < rows, name
        assert shards.shape[0] == TILE and shards.shape[1] % TILE == 0, name
        assert shards.shape[1] * shards.grid.num_cores() == width, name  # no core is left with nothing
    assert layout.qkv.shard_spec.shape[1] == layout.head_dim


@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_the_norm_runs_on_the_cores_of_the_residual_stream(grid, size):
    layout = layout_on(*grid, size, 1)
    program, box = layout.norm_program, layout.residual.shard_spec.grid.bounding_box()
    across, down = program.compute_with_storage_grid_size.x, program.compute_with_storage_grid_size.y
    assert (across, down) == (box.end.x + 1, box.end.y + 1)
    assert program.block_w * TILE * layout.residual_cores == layout.hidden
    assert program.block_w % program.subblock_w == 0


@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_a_prefill_covers_rows_and_columns_within_the_grid(grid, size):
    columns, rows, _ = grid
    layout = layout_on(*grid, size, 1)
    for count in (128, 1024):
        program = layout.prefill_matmul(count, layout.hidden, layout.intermediate, "HiFi2")
        across, down = program.compute_with_storage_grid_size.x, program.compute_with_storage_grid_size.y
        assert across <= columns and down <= rows
        assert program.per_core_M * down * TILE >= count
        assert program.per_core_N * across * TILE >= layout.intermediate


def test_wide_grids_rotate_q_and_k_of_all_rows_together():
    fused = {grid[:2]: layout_on(*grid, "8B", 1).cores.count >= 2 * MAX_ROWS for grid in GRIDS}
    assert fused == {grid[:2]: grid[:2] != (8, 7) for grid in GRIDS}
