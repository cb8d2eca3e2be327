"""Where a model's tensors lie on a chip, and which program configuration each matmul gets, bound when it is built.

Decode and verify keep everything in L1, sharded, from one op to the next:
- the residual stream [1, 1, R, H] by width over H/D cores, one head's width each: what the heads of one position
  concatenate to on one chip, so that no op between them has to move data;
- q|k|v [1, 1, R, (Q + 2 KV) D] by width, one head per core, from which `nlp_create_qkv_heads_decode` puts q and k on
  disjoint cores, as the fused rope and the fused cache update want them;
- weights by width over the DRAM banks, read by the cores next to the banks (DRAM-sharded matmul).
Prefill is interleaved in DRAM and cuts the same weights over a two-dimensional grid.
"""

from dataclasses import dataclass

import ttnn

from models.llama.config import LlamaConfig
from models.ttnn_llama.shapes import KV_BLOCK, TILE, cache_length
from models.ttnn_llama.weights.precision import Precision, tile_bytes

# L1 for a matmul's weight buffers (three blocks in flight), and tiles of output that a prefill core keeps at once.
_WEIGHT_BUFFER_BYTES = 600_000
_PREFILL_TILES = 96


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@dataclass(frozen=True)
class Cores:
    """The grid of worker cores, and shardings on it."""

    columns: int
    rows: int

    @property
    def count(self) -> int:
        return self.columns * self.rows

    def rectangle(self, cores: int) -> tuple[int, int]:
        """(columns, rows) of a rectangle of that many cores, as wide as 8 allows. Sharded norms need one."""
        for columns in range(min(8, self.columns), 0, -1):
            if cores % columns == 0 and cores // columns <= self.rows:
                return columns, cores // columns
        raise ValueError(f"no rectangle of {cores} cores on a grid of {self.columns} x {self.rows}")

    def fits_rectangle(self, cores: int) -> bool:
        return any(
            cores % columns == 0 and cores // columns <= self.rows for columns in range(1, min(8, self.columns) + 1)
        )

    def in_rectangle(self, cores: int) -> ttnn.CoreRangeSet:
        columns, rows = self.rectangle(cores)
        return ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(columns - 1, rows - 1))})

    def in_rows(self, cores: int) -> ttnn.CoreRangeSet:
        """The first cores, row after row; the last row may be part of one."""
        return ttnn.num_cores_to_corerangeset(cores, ttnn.CoreCoord(self.columns, self.rows), row_wise=True)

    @staticmethod
    def width_sharded(width: int, cores: ttnn.CoreRangeSet) -> ttnn.MemoryConfig:
        """L1: each core has 32 rows of its share of the columns, whole tiles of them; the last may have fewer."""
        shape = (TILE, -(-width // (TILE * cores.num_cores())) * TILE)
        return ttnn.create_sharded_memory_config(
            shape,
            cores,
            ttnn.ShardStrategy.WIDTH,
            ttnn.ShardOrientation.ROW_MAJOR,
            use_height_and_width_as_shard_shape=True,
        )

    @staticmethod
    def height_sharded(width: int, cores: ttnn.CoreRangeSet) -> ttnn.MemoryConfig:
        """L1: each core has one tile row, all columns: one position's heads, or its cos and sin."""
        return ttnn.create_sharded_memory_config(
            (TILE, width),
            cores,
            ttnn.ShardStrategy.HEIGHT,
            ttnn.ShardOrientation.ROW_MAJOR,
            use_height_and_width_as_shard_shape=True,
        )


def compute_config(mesh_device: ttnn.MeshDevice, fidelity: str):
    """Compute kernel configuration of a matmul: sums are kept in fp32, except at LoFi, which is for speed.

    bf16 sums leave room for 8 tiles of output instead of 4. Tenstorrent's models choose them wherever they choose LoFi,
    for bfp8 weights too (tt_transformers' `compute_kernel_config_lofi`; `matmul_fp32` of llama31_8b_qb2).
    """
    return ttnn.init_device_compute_kernel_config(
        mesh_device.arch(),
        math_fidelity=getattr(ttnn.MathFidelity, fidelity),
        math_approx_mode=False,
        fp32_dest_acc_en=fidelity != "LoFi",
        packer_l1_acc=True,
    )


def attention_compute_config(mesh_device: ttnn.MeshDevice, *, exact: bool):
    """Compute kernel configuration of attention, as tt_transformers sets it for Llama: exact (HiFi4, scores and
    row sums in fp32) in the prefill kernel, which trees use too; HiFi2 and bf16 in the decode kernel."""
    return ttnn.init_device_compute_kernel_config(
        mesh_device.arch(),
        math_fidelity=ttnn.MathFidelity.HiFi4 if exact else ttnn.MathFidelity.HiFi2,
        math_approx_mode=False,
        fp32_dest_acc_en=exact,
        packer_l1_acc=False,
    )


class Layout:
    """Sizes per chip and memory configurations of one model on one mesh.

    Args:
        config: the architecture; its heads, KV heads, intermediate size and vocabulary are split over the chips.
        mesh_device: an open mesh; weights and activations lie on all its chips.
        precision: formats and fidelities.
        max_seq_len: positions the model may use.
        attention_cores: that share the work of one row and KV head in decode attention.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh_device: ttnn.MeshDevice,
        precision: Precision,
        max_seq_len: int,
        attention_cores: int = 1,
    ):
        self.attention_cores = attention_cores
        self.config = config
        self.mesh_device = mesh_device
        self.precision = precision
        self.chips = mesh_device.get_num_devices()
        self.cache_length = cache_length(max_seq_len)
        grid = mesh_device.compute_with_storage_grid_size()
        self.cores = Cores(grid.x, grid.y)
        self.banks = mesh_device.dram_grid_size().x
        self.hidden = config.hidden_size
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // self.chips
        self.kv_heads = config.num_key_value_heads // self.chips
        self.intermediate = config.intermediate_size // self.chips
        self.vocab = config.vocab_size // self.chips
        # The rectangle of the residual stream: one head's width a core, or fewer cores where the grid is too small.
        streams = self.hidden // self.head_dim
        while not self.cores.fits_rectangle(streams) or self.hidden % (streams * TILE):
            streams -= 1
        self.residual_cores = streams
        self.residual = self.cores.width_sharded(self.hidden, self.cores.in_rectangle(streams))
        heads = self.heads + 2 * self.kv_heads
        self.qkv = self.cores.width_sharded(heads * self.head_dim, self.cores.in_rows(heads))
        tiles = self.intermediate // TILE
        self.gated = self.cores.width_sharded(
            self.intermediate, self.cores.in_rows(_largest_divisor(tiles, self.cores.count))
        )

    @property
    def norm_program(self) -> ttnn.LayerNormShardedMultiCoreProgramConfig:
        """RMSNorm on the residual stream as it is sharded."""
        block = self.hidden // TILE // self.residual_cores
        return ttnn.LayerNormShardedMultiCoreProgramConfig(
            compute_with_storage_grid_size=list(self.cores.rectangle(self.residual_cores)),
            subblock_w=_largest_divisor(block, 4),
            block_h=1,
            block_w=block,
            inplace=False,
        )

    def attention_program(self, q_chunk: int) -> ttnn.SDPAProgramConfig:
        """Chunks of 128 positions: 32 gave wrong results beyond the first (tt-metal issue 56171).

        `attention_cores` matters to decoding only: left to itself its kernel takes more cores for a KV head the fewer
        rows there are, and joins their results in bf16, so that a row's bits would depend on how many rows there are.
        """
        return ttnn.SDPAProgramConfig(
            max_cores_per_head_batch=self.attention_cores,
            compute_with_storage_grid_size=ttnn.CoreCoord(self.cores.columns, self.cores.rows),
            q_chunk_size=q_chunk,
            k_chunk_size=KV_BLOCK,
            exp_approx_mode=False,
        )

    def decode_matmul(self, k: int, n: int, weight_format: str, in_cores: int, out_cores: int):
        """DRAM-sharded matmul of [1, 1, R <= 32, k] by [k, n], both per chip, between two width shardings."""
        shard_tiles = k // TILE // in_cores
        bank_tiles = -(-n // (TILE * self.banks))
        block = max(1, _WEIGHT_BUFFER_BYTES // (3 * bank_tiles * tile_bytes(weight_format)))
        return ttnn.MatmulMultiCoreReuseMultiCastDRAMShardedProgramConfig(
            in0_block_w=_largest_divisor(shard_tiles, min(block, 8)),
            per_core_M=1,
            per_core_N=-(-n // (TILE * out_cores)),
            fused_activation=None,
        )

    def prefill_matmul(self, rows: int, k: int, n: int, fidelity: str):
        """Two-dimensional multicast matmul of [1, 1, rows, k] by [k, n] per chip, rows a multiple of 128 up to 1024.

        Where a core's output is too much for its L1, its rows are cut, never its columns: a core that reads a weight
        from DRAM shards reads all of its columns for each block, from the first one on
        (reader_bmm_tile_layout_in1_sender_writer_padding, IN1_DRAM_WIDTH_SHARDED).
        """
        m_tiles, k_tiles, n_tiles = rows // TILE, k // TILE, n // TILE
        columns, lines = min(8, self.cores.columns), min(self.cores.rows, m_tiles, 8)
        per_m, per_n = -(-m_tiles // lines), -(-n_tiles // columns)
        block_m = _largest_divisor(per_m, max(1, _PREFILL_TILES // per_n))
        destination = 8 if fidelity == "LoFi" else 4  # tiles; fp32 sums take twice the room
        sub_w = _largest_divisor(per_n, destination)
        return ttnn.MatmulMultiCoreReuseMultiCastProgramConfig(
            compute_with_storage_grid_size=(columns, lines),
            in0_block_w=_largest_divisor(k_tiles, 4),
            out_subblock_h=_largest_divisor(block_m, destination // sub_w),
            out_subblock_w=sub_w,
            out_block_h=block_m,
            out_block_w=per_n,
            per_core_M=per_m,
            per_core_N=per_n,
            transpose_mcast=False,
            fused_activation=None,
            fuse_batch=True,
        )
