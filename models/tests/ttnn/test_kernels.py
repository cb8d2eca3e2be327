"""What kernels are handed, recorded on a mock of the board: the recorder itself, and what our programs must not ask of
kernels.

Layers have the published sizes, models one or two of them and no values. `OPERATIONS` is where the kernels' sources lie
in ttnn's package: a comment beside each claim names the file that says what an argument means.
"""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import torch
import ttnn

from models.board_mock import cluster
from models.board_mock.kernels import Kernel, MockProcess, named, recorded
from models.boards import BOARDS
from models.errors import UserError
from models.llama.config import named_config
from models.tests.ttnn.model_fixtures import SIZES, put
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.programs.fused import FusedRound
from models.ttnn_llama.shapes import KV_BLOCK, TILE
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import EmptySource

OPERATIONS = "ttnn/cpp/ttnn/operations"
ROWS = (1, 2, 5, 8, 16, 32)
CONTEXT = 1024
POSITION = 300


@pytest.fixture(scope="module")
def process(pytestconfig):
    with MockProcess(pytestconfig.getoption("--board")) as process:
        yield process


@pytest.fixture(scope="module", params=SIZES)
def recordings(request, process):
    """Kernels of a greedy forward, for each of ROWS."""
    return process.run(forwards, request.param, *ROWS)


# ------------------------------------------------------------------------------------------ run in the mock's process
def model_of(mesh, size: str, layers: int = 1, runner: Runner | None = None) -> TtnnLlama:
    """A published Llama of few layers and few ids, without values."""
    config = dataclasses.replace(
        named_config(size), num_hidden_layers=layers, vocab_size=1024, bos_token_id=None, eos_token_ids=()
    )
    precision = precision_named("performance")
    return TtnnLlama(config, mesh, EmptySource(mesh), precision=precision, max_seq_len=CONTEXT, runner=runner)


def norms(mesh, *widths: int) -> list[list[Kernel]]:
    """Of one RMSNorm for each width."""
    found = []
    for width in widths:
        x = put(mesh, torch.zeros(1, 1, TILE, width))
        with recorded(mesh) as kernels:
            ttnn.rms_norm(x)
        found.append(kernels)
    return found


def failing_norm(mesh) -> list[Kernel]:
    """Of a block that fails behind its RMSNorm."""
    x = put(mesh, torch.zeros(1, 1, TILE, 64))
    with pytest.raises(ValueError, match="on purpose"), recorded(mesh) as kernels:
        ttnn.rms_norm(x)
        raise ValueError("on purpose")
    return kernels


def fail(mesh) -> None:
    raise UserError("context of 9 tokens")


def variables(mesh) -> dict[str, str]:
    return dict(os.environ)


def prefill_matmuls(mesh, size: str, rows: int) -> dict[str, list[Kernel]]:
    """Of each matmul of a layer's prefill, by its weight."""
    layer = model_of(mesh, size).layers[0]
    matmuls = {
        "wqkv": layer.attention.wqkv,
        "wo": layer.attention.wo,
        "gate": layer.mlp.w1,
        "up": layer.mlp.w3,
        "down": layer.mlp.w2,
    }
    found = {}
    for name, linear in matmuls.items():
        x = ttnn.empty((1, 1, rows, linear.k), ttnn.bfloat16, ttnn.TILE_LAYOUT, mesh, ttnn.DRAM_MEMORY_CONFIG)
        with recorded(mesh) as found[name]:
            linear.prefill_forward(x)
    return found


def forwards(mesh, size: str, *rows: int) -> list[list[Kernel]]:
    """Of one greedy forward for each number of rows."""
    model = model_of(mesh, size)
    found = []
    for count in rows:
        model.prepare("ids", count)  # makes the buffers that stay
        with recorded(mesh) as kernels:
            model.greedy([1] * count, POSITION)
        found.append(kernels)
    return found


def update_of_separate_caches(mesh, rows: int) -> list[Kernel]:
    """Of the fused update of a cache of its own for each row: 2 heads, 128 positions, D = 64."""
    k_cache, v_cache = (put(mesh, torch.zeros(rows, 2, 128, 64)) for _ in range(2))
    k, v = (
        put(
            mesh,
            torch.zeros(1, rows, TILE, 64),
            ttnn.create_sharded_memory_config(
                (TILE, 64),
                ttnn.CoreRangeSet({ttnn.CoreRange(ttnn.CoreCoord(0, line), ttnn.CoreCoord(rows - 1, line))}),
                ttnn.ShardStrategy.HEIGHT,
                use_height_and_width_as_shard_shape=True,
            ),
        )
        for line in range(2)
    )
    mapper = ttnn.ReplicateTensorToMesh(mesh)
    positions = ttnn.from_torch(
        torch.arange(rows, dtype=torch.int32), dtype=ttnn.int32, device=mesh, mesh_mapper=mapper
    )
    with recorded(mesh) as kernels:
        ttnn.experimental.paged_fused_update_cache(k_cache, k, v_cache, v, update_idxs_tensor=positions)
    return kernels


def at_two_positions(mesh, size: str, form: str) -> tuple[list[Kernel], int, list[Kernel]]:
    """(kernels at a position, programs that another one adds, kernels there)."""
    runner = Runner(mesh, trace=False)
    model = model_of(mesh, size, layers=2, runner=runner)
    if form == "fused":
        fused = FusedRound(model, model.first_layers(1))
        fused.prepare(4)
    else:
        model.prepare("tree-ids" if form == "tree" else "ids", 1 if form == "decode" else 5)
    calls = {
        "decode": lambda position: model.greedy([1], position),
        "verify": lambda position: model.greedy([1] * 5, position),
        "tree": lambda position: model.greedy([1] * 5, position, [-1, 0, 0, 1, 1]),
        "fused": lambda position: fused.run([1, 2], position, 4),
    }
    call = calls[form]
    with recorded(mesh) as first:
        call(40)
    programs = mesh.num_program_cache_entries()
    call(901)  # other places in the tile, in the chunk of attention and in the cache
    added = mesh.num_program_cache_entries() - programs
    with recorded(mesh) as second:
        call(901)
    return first, added, second


def slices_at_two_places(mesh) -> tuple[int, list[Kernel], list[Kernel]]:
    """(programs that the second place adds, kernels of both)."""
    x = put(mesh, torch.zeros(1, 1, 128, 64))
    with recorded(mesh) as first:
        ttnn.slice(x, [0, 0, 0, 0], [1, 1, 32, 64])
        programs = mesh.num_program_cache_entries()
        ttnn.slice(x, [0, 0, 64, 0], [1, 1, 96, 64])
        added = mesh.num_program_cache_entries() - programs
    with recorded(mesh) as second:
        ttnn.slice(x, [0, 0, 64, 0], [1, 1, 96, 64])
    return added, first, second


# ------------------------------------------------------------------------------------------------------- the recorder
@pytest.mark.once
def test_a_kernel_shows_what_its_program_was_made_for(process):
    narrow, wide = process.run(norms, 64, 96)
    # normalization/layernorm/device/kernels/compute/layernorm.cpp
    for kernels, width in ((narrow, 64), (wide, 96)):
        compute = named(kernels, "layernorm")
        assert {kernel.source for kernel in compute} == {
            f"{OPERATIONS}/normalization/layernorm/device/kernels/compute/layernorm.cpp"
        }
        assert [kernel.processor for kernel in compute] == ["trisc0", "trisc1", "trisc2"]
        for kernel in compute:
            assert (kernel.named_args["W"], kernel.named_args["Wt"]) == (width, width // TILE)
            assert kernel.defines["RMSNORM"] == "1"
            assert kernel.runtime_args == ["NCHt"]
    (reader,) = named(wide, "reader_unary_interleaved_ln")
    assert reader.processor == "ncrisc"
    assert reader.compile_args[-1] == TILE * TILE * 2  # bytes of a page: a tile of bf16
    assert "RMSNORM" in reader.defines  # the program's, but not the chip's
    assert not [name for name in reader.defines if name.startswith(("ARCH_", "COMPILE_FOR_"))]


@pytest.mark.once
def test_a_source_is_a_file_of_the_package(process):
    package = Path(cluster.importlib.util.find_spec("ttnn").submodule_search_locations[0])
    (kernels,) = process.run(forwards, "1B", 5)
    assert len({kernel.source for kernel in kernels}) > 20
    for kernel in kernels:
        assert (package / kernel.source).is_file(), kernel


@pytest.mark.once
def test_each_block_has_all_kernels_of_its_programs(process):
    first, other, again = process.run(norms, 64, 96, 64)
    assert first == again != other
    assert process.run(norms, 64) == [first]


@pytest.mark.once
def test_what_a_failing_block_has_run_is_recorded(process):
    assert [process.run(failing_norm)] == process.run(norms, 64)


@pytest.mark.once
def test_an_error_in_the_process_is_raised_here_and_the_process_goes_on(process):
    with pytest.raises(UserError, match="context of 9 tokens"):
        process.run(fail)
    assert process.run(norms, 64)[0]


@pytest.mark.once
def test_kernels_cannot_be_recorded_where_commands_are_not_kept():
    with pytest.raises(RuntimeError, match=r"call recorded\(\) in MockProcess.run\(\)"), recorded(None):
        pass


@pytest.mark.once
def test_an_unknown_board_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="unknown board 'N151'"):
        MockProcess("N151")
    assert not list(tmp_path.rglob("kernels-*"))


@pytest.mark.once
def test_the_cache_of_a_process_is_its_own_and_ends_with_it(pytestconfig):
    with MockProcess(pytestconfig.getoption("--board")) as process:
        there = process.run(variables)
        root = Path(there["TT_METAL_RUNTIME_ROOT"])
        assert root.is_dir() and Path(there["TT_METAL_CACHE"]).is_relative_to(root)
    assert not root.exists()


@pytest.mark.once
def test_the_stand_in_keeps_its_commands_only_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.delenv(cluster.COMMANDS_VARIABLE, raising=False)
    cluster.environment("N150", tmp_path)
    compiler = tmp_path / "runtime/sfpi/compiler/bin/riscv-tt-elf-g++"
    made = tmp_path / "kernel"
    made.mkdir()
    compiling = ["-DA=1,2", '-DB="x y"', "-c", "-o", made / "k.o", "a b.cc", "-MF", made / "k.d"]
    subprocess.run([compiler, *compiling], check=True)
    assert sorted(path.name for path in made.iterdir()) == ["k.d", "k.o"]
    monkeypatch.setenv(cluster.COMMANDS_VARIABLE, "1")
    subprocess.run([compiler, *compiling], check=True)
    subprocess.run([compiler, "k.o", "-o", made / "k.elf"], check=True)  # linking leaves the command as it is
    assert sorted(path.name for path in made.iterdir()) == ["command", "k.d", "k.elf", "k.o"]
    assert (made / cluster.COMMAND).read_text().splitlines() == [str(argument) for argument in compiling]


# ----------------------------------------------------------------------------------------------------- prefill matmuls
@pytest.mark.parametrize("rows", [128, 384, 896, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_prefill_matmuls_do_not_cut_their_output_along_the_width(process, size, rows):
    # matmul/device/kernels/dataflow/reader_bmm_tile_layout_in1_sender_writer_padding_metal2.cpp: of weights sharded by
    # width over DRAM it reads the same columns for each of num_blocks_w_dim blocks.
    for name, kernels in process.run(prefill_matmuls, size, rows).items():
        senders = named(kernels, "reader_bmm_tile_layout_in1_sender_writer_padding_metal2")
        assert senders and all("IN1_DRAM_WIDTH_SHARDED" in kernel.defines for kernel in senders), name
        told = [kernel.named_args for kernel in kernels if "num_blocks_w_dim" in kernel.named_args]
        assert len(told) > len(senders)  # those of the other operand and the computing ones too
        assert {arguments["num_blocks_w_dim"] for arguments in told} == {1}, name


# --------------------------------------------------------------------------------------------------- decode attention
@dataclasses.dataclass(frozen=True)
class Attention:
    """Arguments of decode attention, by transformer/sdpa_decode/device/kernels/dataflow/reader_decode_all.cpp."""

    rows: int
    chunk: int  # positions of keys and values at once; 0 would be: by position
    cores_per_head: int
    heads_per_core: int
    causal: bool
    caches: int

    @classmethod
    def of(cls, kernels: list[Kernel]) -> "Attention":
        (reader,) = named(kernels, "reader_decode_all")
        arguments = reader.compile_args
        return cls(
            rows=arguments[0],
            chunk=TILE * arguments[5],
            cores_per_head=arguments[14],
            heads_per_core=arguments[15],
            causal=arguments[17] == 1,
            caches=arguments[12],
        )


def test_a_row_is_attended_to_in_the_same_steps_whatever_rows_are_beside_it(recordings):
    found = [Attention.of(kernels) for kernels in recordings]
    assert [attention.rows for attention in found] == list(ROWS)
    assert {(attention.chunk, attention.causal, attention.caches) for attention in found} == {(KV_BLOCK, True, 1)}
    # A row's positions are dealt out to the cores of a KV head, whose results are joined (rt_args_common.hpp): another
    # number of cores is another order of sums.
    assert len({attention.cores_per_head for attention in found}) == 1, found
    # transformer/sdpa_decode/device/kernels/compute/sdpa_flash_decode.cpp: the only other thing that may differ is how
    # many KV heads a core handles one after the other, argument 16.
    computing = [named(kernels, "sdpa_flash_decode") for kernels in recordings]
    told = [(kernel.compile_args[:16], kernel.compile_args[17:], kernel.defines) for row in computing for kernel in row]
    assert len(told) == 3 * len(ROWS) and all(each == told[0] for each in told)


# ------------------------------------------------------------------------------------------------------- cache updates
UPDATES = (
    "reader_paged_fused_update_cache_interleaved_start_id",
    "writer_paged_fused_update_cache_interleaved_start_id",
    "reader_update_cache_interleaved_start_id",
    "writer_update_cache_interleaved_start_id",
)


def test_rows_that_update_one_cache_are_made_to_take_turns(recordings, pytestconfig):
    """What is known when compiling; which core waits for which is set at run time, and not seen here."""
    # experimental/paged_cache/device/kernels/dataflow/: in the readers a row waits for in0_seq before it reads, in the
    # writers it raises the next one's. Row i begins at i * cache_batch_num_tiles, which only share_cache makes 0.
    # else 32 rows have no cores for one op of k and v
    wide = BOARDS[pytestconfig.getoption("--board")].worker_cores >= 2 * max(ROWS)
    for rows, kernels in zip(ROWS, recordings, strict=True):
        readers, writers = (
            [kernel for kernel in named(kernels, *UPDATES) if kernel.name.startswith(part)]
            for part in ("reader", "writer")
        )
        assert ("fused" in readers[0].name) == (wide or rows < 32), rows
        assert readers and writers
        for kernel in readers + writers:
            assert kernel.named_args["cache_batch_num_tiles"] == 0, rows
            assert "USE_INDEX_TENSOR" in kernel.defines and "IS_PAGED_CACHE" not in kernel.defines
        assert all("wait_to_start" in kernel.runtime_args for kernel in readers)
        assert all({"send_signal", "send_core_x", "send_core_y"} <= set(kernel.runtime_args) for kernel in writers)
        assert {kernel.semaphores["in0_seq"] for kernel in readers + writers} == {0}  # one and the same


@pytest.mark.once
def test_rows_of_separate_caches_are_told_apart_from_rows_of_one(process):
    kernels = named(process.run(update_of_separate_caches, 5), *UPDATES)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.named_args["cache_batch_num_tiles"] == 2 * 128 // TILE * 64 // TILE


# ----------------------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("form", ["decode", "verify", "tree", "fused"])
def test_nothing_of_a_position_is_compiled(process, form):
    """A second position finds every program in the cache; and had it been the first, the kernels would be the same."""
    first, added, second = process.run(at_two_positions, "1B", form)
    assert added == 0
    assert len(first) > 50 and first == second


@pytest.mark.once
def test_a_position_that_is_compiled_shows(process):
    """A slice has its start among the attributes of its program."""
    added, first, second = process.run(slices_at_two_places)
    assert added == 1 and first and second
