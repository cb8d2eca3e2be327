"""Several users on a board, at the sizes of a published Llama and without values: what is legal, what runs, what is
compiled."""

import dataclasses

import pytest
import torch
import ttnn

from models.board_mock import graph
from models.llama.config import named_config
from models.ttnn_llama.batch_model import BatchLlama, UserRows
from models.ttnn_llama.modules.rows import FusedRowPlan
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import EmptySource

SHAPES = ((1, 8), (2, 8), (4, 8), (8, 4), (16, 2), (32, 1))  # users x rows


@pytest.fixture(scope="module")
def whole(mesh_opener):
    """8B with one layer and 32 slots of 8192 positions, without values."""
    mesh = mesh_opener.open()
    config = dataclasses.replace(named_config("8B"), num_hidden_layers=1)
    precision = precision_named("performance")
    return BatchLlama(config, mesh, EmptySource(mesh), precision=precision, max_seq_len=8192, slots=32)


def shared_among(users, rows, position):
    return [UserRows(slot, [1] * rows, position) for slot in range(users)]


def test_users_by_rows_are_legal_up_to_8192_positions_and_nothing_of_them_is_compiled(whole):
    """Each shape is one program; other positions, other users, other pages and fewer rows find it in the cache."""
    mesh = whole.mesh_device
    for users, rows in SHAPES:
        whole.prepare("ids", users * rows, rows)
        whole.run("ids", shared_among(users, rows, 0))
        compiled = mesh.num_program_cache_entries()
        whole.run("ids", shared_among(users, rows, 8192 - rows))
        whole.run("ids", [UserRows(31 - slot, [2] * (1 + slot % rows), 100 * slot) for slot in range(users)])
        assert mesh.num_program_cache_entries() == compiled
    assert {(key[2], key[3]) for key in whole._inputs} == {(8, 8), (16, 8), (32, 8), (32, 4), (32, 2), (32, 1)}
    assert whole.pages.count == 32 * 65  # a tile of rows beyond the last position
    whole.prefill([1] * 8192)


def test_a_forward_has_one_cache_update_for_each_row_of_a_user(whole):
    """Beside that its operations are those of the model of one sequence."""
    for users, rows in SHAPES:
        whole.prepare("ids", users * rows, rows)
        inputs = whole._inputs[whole._program("ids", users * rows, rows)]
        fused = isinstance(whole.plan(inputs.rows), FusedRowPlan)
        asked = shared_among(users, rows, 300)
        operations = [op.operation for op in graph.capture(lambda asked=asked: whole.run("ids", asked))]
        updates = {True: "PagedFusedUpdateCacheDeviceOperation", False: "PagedUpdateCacheDeviceOperation"}
        assert operations.count(updates[fused]) == rows * (1 if fused else 2)
        assert operations.count("SdpaDecodeDeviceOperation") == 1
        assert operations.count("MatmulDeviceOperation") == 5 + len(whole.head.pieces)


def test_programs_can_be_captured(whole):
    """The host writes nothing while one runs, and makes no input: users, positions and pages are in buffers."""
    whole.run("ids", shared_among(4, 5, 100))
    key = whole._program("ids", 20, 5)
    chain = whole.prepare_chain(2, 3)
    whole.runner.run(chain)

    def forbidden(*args, **kwargs):
        raise AssertionError("the host writes to the device while a trace is captured")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("from_torch", "copy_host_to_device_tensor", "to_device", "to_torch", "as_tensor"):
            patch.setattr(ttnn, name, forbidden)
        with graph.recorded(ttnn.graph.RunMode.NO_DISPATCH):
            whole.runner.run(key)
            whole.runner.run(chain)


def test_what_keeps_a_verification_from_the_prefill_kernel_is_so(whole):
    """docs/batching.md: chunks begin where blocks of keys do, and at one place for all texts of a call."""
    mesh, cache = whole.mesh_device, whole.cache[0]
    replicated = ttnn.ReplicateTensorToMesh(mesh)

    def put(values, dtype, layout=ttnn.ROW_MAJOR_LAYOUT):
        return ttnn.from_torch(values, dtype=dtype, layout=layout, device=mesh, mesh_mapper=replicated)

    def attend(texts, start, **at):
        q = put(torch.zeros(texts, whole.layout.heads, 32, whole.layout.head_dim), ttnn.bfloat16, ttnn.TILE_LAYOUT)
        table = put(torch.zeros(texts, 72, dtype=torch.int32), ttnn.int32)
        if start is not None:
            at["chunk_start_idx_tensor"] = put(torch.tensor(start, dtype=torch.int32), ttnn.int32)
        program = whole.layout.attention_program(q_chunk=32)
        return ttnn.transformer.chunked_scaled_dot_product_attention(
            q, cache.keys, cache.values, table, scale=0.125, program_config=program, **at
        )

    assert attend(1, None, chunk_start_idx=8064).shape[2] == 32
    with pytest.raises(RuntimeError, match="must be a multiple of k_chunk_size"):
        attend(1, None, chunk_start_idx=8096)
    assert attend(2, [8064]).shape[0] == 2
    with pytest.raises(RuntimeError, match=r"must have shape \[1\]"):
        attend(2, [8064, 128])
