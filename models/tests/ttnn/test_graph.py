"""Device ops and DRAM bytes counted from ttnn's graph: by hand for single ops, and what a forward must not exceed."""

import dataclasses

import pytest
import torch
import ttnn

from models.board_mock import graph
from models.tests.ttnn.model_fixtures import reduced
from models.ttnn_llama.batch_model import BatchLlama, UserRows
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.weights.precision import precision_named, tile_bytes
from models.ttnn_llama.weights.tensors import EmptySource

BFP8 = tile_bytes("bfp8")
POSITION = 300  # chunks of 128: a row there attends to 384 positions
CONTEXT = 480  # the cache has 512 positions


class Counted:
    """A model without values, and the addresses of its weights and cache."""

    def __init__(self, mesh_device, size="3B", layers=2):
        self.config = reduced(size, mesh_device.get_num_devices(), layers)
        self.kv_heads = self.config.num_key_value_heads // mesh_device.get_num_devices()
        self.weights = {}
        source = EmptySource(mesh_device)

        class Recorder:
            def tensor(_, spec):
                self.weights[spec.name] = source.tensor(spec)
                return self.weights[spec.name]

        precision = precision_named("accuracy")
        self.model = TtnnLlama(self.config, mesh_device, Recorder(), precision=precision, max_seq_len=CONTEXT)
        self.cache = [tensor.buffer_address() for layer in self.model.cache for tensor in (layer.keys, layer.values)]

    def forward(self, rows, positions=None):
        """Device ops of a greedy forward whose buffers have been made before."""
        self.model.greedy([1] * rows, POSITION)
        return graph.capture(lambda: self.model.greedy([1] * rows, POSITION), positions)

    def tree(self, rows, positions=None):
        """The same for a tree whose rows all follow the first one."""
        parents = [-1, *[0] * (rows - 1)]
        self.model.greedy([1] * rows, POSITION, parents)
        return graph.capture(lambda: self.model.greedy([1] * rows, POSITION, parents), positions)

    def cost(self, rows, tree=False):
        ops = (self.tree if tree else self.forward)(rows, list(range(POSITION, POSITION + rows)))
        return graph.cost(ops, {tensor.buffer_address() for tensor in self.weights.values()}, self.cache)

    def bytes_of_positions(self, count):
        """In keys or in values of one layer, all heads of a chip."""
        return self.kv_heads * count // 32 * self.config.head_dim // 32 * BFP8


def on_device(mesh_device, *shape, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, values=torch.zeros):
    return ttnn.from_torch(
        values(shape),
        dtype=dtype,
        layout=layout,
        device=mesh_device,
        memory_config=ttnn.DRAM_MEMORY_CONFIG,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh_device),
    )


def only(ops, operation):
    found = [op for op in ops if op.operation == operation]
    assert len(found) == 1, [op.operation for op in ops]
    return found[0]


def moved(op, tensor):
    return sum(
        (
            torch.tensor([traffic.read, traffic.written])
            for traffic in op.traffic
            if traffic.address == tensor.buffer_address()
        ),
        start=torch.tensor([0, 0]),
    ).tolist()


# ------------------------------------------------------------------------------------------------------ single ops
def test_an_elementwise_op_reads_its_inputs_and_writes_its_output(mesh_device):
    a = on_device(mesh_device, 1, 1, 40, 64)  # 2 x 2 tiles of bf16
    (op,) = graph.capture(lambda: ttnn.add(a, a, memory_config=ttnn.DRAM_MEMORY_CONFIG))
    assert (op.call, op.dram_read, op.dram_written, op.exact) == ("ttnn.add", 4 * 2048, 4 * 2048, True)
    (op,) = graph.capture(lambda: ttnn.neg(a, memory_config=ttnn.L1_MEMORY_CONFIG))
    assert (op.dram_read, op.dram_written) == (4 * 2048, 0)


def test_a_program_is_compiled_once(mesh_device):
    a = on_device(mesh_device, 1, 1, 32, 96, dtype=ttnn.bfloat8_b)
    first, second = (graph.capture(lambda: ttnn.exp(a))[0] for _ in range(2))
    assert (first.cache_hit, second.cache_hit) == (False, True)
    assert second.factory


def test_an_embedding_reads_the_rows_it_looks_up(mesh_device):
    table = on_device(mesh_device, 1024, 256, layout=ttnn.ROW_MAJOR_LAYOUT)
    ids = on_device(mesh_device, 1, 5, dtype=ttnn.uint32, layout=ttnn.ROW_MAJOR_LAYOUT)
    ops = graph.capture(lambda: ttnn.embedding(ids, table, layout=ttnn.TILE_LAYOUT))
    assert moved(only(ops, "EmbeddingsDeviceOperation"), table) == [5 * 256 * 2, 0]


def test_a_slice_reads_what_it_returns(mesh_device):
    a = on_device(mesh_device, 1, 1, 512, 64)
    (op,) = graph.capture(lambda: ttnn.slice(a, [0, 0, 32, 0], [1, 1, 96, 64]))
    assert moved(op, a) == [4 * 2048, 0]


def test_filling_a_cache_writes_what_is_filled_in(mesh_device):
    cache = on_device(mesh_device, 1, 2, 512, 64, dtype=ttnn.bfloat8_b)
    new = on_device(mesh_device, 1, 2, 128, 64, dtype=ttnn.bfloat8_b)
    (op,) = graph.capture(lambda: ttnn.fill_cache(cache, new, 0, update_idx=128))
    size = 2 * 4 * 2 * BFP8
    assert (moved(op, cache), moved(op, new)) == ([0, size], [size, 0])


def test_peak_dram_counts_what_lives_at_the_same_time(mesh_device):
    a = on_device(mesh_device, 1, 1, 32, 1024)  # 65536 bytes

    def chain():
        b = ttnn.exp(a)
        c = ttnn.exp(b)
        ttnn.deallocate(b)
        ttnn.concat([c, c], dim=-1)

    with graph.recorded() as nodes:
        chain()
    assert graph.peak_dram(nodes) == 3 * 65536


def test_peak_l1_counts_each_cores_part_of_the_tensors_that_live_together(mesh_device):
    cores = ttnn.CoreGrid(y=1, x=4)
    memory = ttnn.create_sharded_memory_config((1, 1, 128, 160), cores, ttnn.ShardStrategy.HEIGHT)  # 5 tiles a core
    a = ttnn.to_memory_config(on_device(mesh_device, 1, 1, 128, 160), memory)

    def chain():
        b = ttnn.exp(a, memory_config=memory)
        c = ttnn.exp(b, memory_config=memory)
        ttnn.deallocate(b)
        ttnn.exp(c, memory_config=memory)

    chain()
    with graph.recorded() as nodes:
        chain()
    assert graph.peak_l1(nodes) == 2 * 5 * 2048


def test_peak_l1_adds_the_circular_buffers_of_one_program_on_one_chip():
    def node(kind, **params):
        return {"node_type": kind, "params": params}

    def circular(chip, size, tensor="0"):
        return node("circular_buffer_allocate", device_id=chip, size=size, globally_allocated=tensor)

    tensor = node("buffer_allocate", type="L1", address=1, max_size_per_bank=1000)
    nodes = [tensor, *(circular(chip, size) for chip in (0, 1) for size in (100, 20)), node("function_end")]
    assert graph.peak_l1(nodes) == 1120
    nodes += [circular(0, 110), circular(0, 5000, tensor="1"), node("function_end")]  # the last one lies in a tensor
    assert graph.peak_l1(nodes) == 1120


def test_a_capture_ends_when_its_function_fails(mesh_device):
    a, b = on_device(mesh_device, 1, 1, 32, 64), on_device(mesh_device, 1, 1, 64, 64)
    with pytest.raises(RuntimeError, match="width"), graph.recorded() as nodes:
        ttnn.exp(b)
        ttnn.matmul(a, a)
    assert [op.call for op in graph.device_ops(nodes)] == ["ttnn.exp"]
    assert len(graph.capture(lambda: ttnn.exp(a))) == 1


# ---------------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("rows", [1, 5, 32, "tree"])
def test_each_weight_is_read_by_one_op_of_a_forward(mesh_device, rows):
    counted = Counted(mesh_device)
    ops = counted.tree(32) if rows == "tree" else counted.forward(rows)
    for name, weight in counted.weights.items():
        assert len(graph.readers(ops, weight.buffer_address())) == 1, name


def test_matmuls_read_the_bytes_of_their_weights(mesh_device):
    counted = Counted(mesh_device, layers=1)
    ops = counted.forward(1)
    for name in ("layers.0.wqkv", "layers.0.wo", "layers.0.w1", "layers.0.w3", "layers.0.w2", "head.0"):
        weight = counted.weights[name]
        (op,) = graph.readers(ops, weight.buffer_address())
        *_, rows, columns = weight.shape
        assert moved(op, weight) == [rows // 32 * columns // 32 * BFP8, 0], name
        assert op.call == "ttnn.linear" and op.exact


@pytest.mark.parametrize("size", ["1B", "3B", "8B"])
@pytest.mark.parametrize(("rows", "most"), [(1, 16), (5, 16), (32, 18)])
def test_a_layer_takes_at_most_sixteen_ops(mesh_device, size, rows, most):
    """18 for 32 rows where the grid has fewer than 64 cores."""
    one, two = (Counted(mesh_device, size, layers).cost(rows) for layers in (1, 2))
    layer, _ = graph.split(one, two)
    grid = mesh_device.compute_with_storage_grid_size()
    assert 10 < layer.ops <= (16 if grid.x * grid.y >= 64 else most)
    assert layer.collectives == (0 if mesh_device.get_num_devices() == 1 else 6)  # two sums of three ops


@pytest.mark.parametrize("rows", [8, 32])
def test_a_layer_takes_one_op_more_for_rows_of_a_tree(mesh_device, rows):
    tree, causal = (
        graph.split(*(Counted(mesh_device, layers=layers).cost(rows, tree=tree) for layers in (1, 2)))[0]
        for tree in (True, False)
    )
    assert (tree.ops, tree.collectives) == (causal.ops + 1, causal.collectives)


def test_costs_grow_by_the_same_layer(mesh_device):
    one, two, four = (Counted(mesh_device, layers=layers).cost(5) for layers in (1, 2, 4))
    layer, outside = graph.split(one, two)
    assert outside + 4 * layer == four
    assert outside.kv_cache == 0 and outside.weights > 0


def test_decode_attention_reads_chunks_up_to_each_rows_position(mesh_device):
    counted = Counted(mesh_device, layers=1)

    def read(positions):
        op = only(counted.forward(5, positions), "SdpaDecodeDeviceOperation")
        assert not op.exact
        return [moved(op, tensor)[0] for tensor in (counted.model.cache[0].keys, counted.model.cache[0].values)]

    assert read([127, 128, 300, 383, 384]) == 2 * [counted.bytes_of_positions(128 + 256 + 384 + 384 + 512)]
    assert read([0, -1, -1, -1, -1]) == 2 * [counted.bytes_of_positions(128)]
    assert read(None) == 2 * [counted.bytes_of_positions(5 * 512)]


def test_attention_of_a_tree_reads_what_its_rows_see_once_for_each_query_head(mesh_device):
    counted = Counted(mesh_device, layers=1)
    cache = counted.model.cache[0]

    def read(positions):
        op = only(counted.tree(32, positions), "SDPAOperation")
        assert not op.exact
        mask = next(
            t for t in op.traffic if t.address not in (cache.keys.buffer_address(), cache.values.buffer_address())
        )
        return [moved(op, tensor)[0] for tensor in (cache.keys, cache.values)], mask.read

    heads = 3 * counted.kv_heads  # of 3B
    for positions, seen in (([*range(300, 332)], 384), ([*range(380, 400), *[-1] * 12], 512), (None, 512)):
        keys_and_values, mask = read(positions)
        assert keys_and_values == 2 * [3 * counted.bytes_of_positions(seen)]
        assert mask == heads * seen // 32 * 2048


@pytest.mark.parametrize("rows", [5, 32])
def test_a_cache_update_reads_and_writes_a_row_of_tiles_for_each_position(mesh_device, rows):
    counted = Counted(mesh_device, layers=1)
    ops = counted.forward(rows, [*range(POSITION, POSITION + 3), *[-1] * (rows - 3)])
    updates = [op for op in ops if "UpdateCache" in op.operation]
    for tensor in (counted.model.cache[0].keys, counted.model.cache[0].values):
        both = [sum(sizes) for sizes in zip(*(moved(op, tensor) for op in updates), strict=True)]
        assert both == 2 * [3 * counted.bytes_of_positions(32)]


def test_prefill_attention_reads_the_cache_up_to_its_chunk(mesh_device):
    counted = Counted(mesh_device, layers=1)
    op = only(graph.capture(lambda: counted.model.prefill([1] * 129)), "SDPAOperation")
    assert moved(op, counted.model.cache[0].keys) == [counted.bytes_of_positions(256), 0]


def test_costs_multiply_and_subtract():
    cost = graph.Cost(ops=3, collectives=1, weights=100, kv_cache=10, other=1)
    assert cost.dram == 111
    assert 2 * cost - cost == cost
    assert dataclasses.astuple(graph.split(cost, 3 * cost)[1]) == (-3, -1, -100, -10, -1)


def test_pages_move_the_bytes_that_a_flat_cache_moves(mesh_device):
    """Of one user's rows the same; of several each its own."""
    flat = Counted(mesh_device, layers=1)
    source, precision = EmptySource(mesh_device), precision_named("accuracy")
    model = BatchLlama(flat.config, mesh_device, source, precision=precision, max_seq_len=CONTEXT, slots=4)
    cache = [tensor.buffer_address() for layer in model.cache for tensor in (layer.keys, layer.values)]

    def kv_bytes(users, rows):
        asked = [UserRows(slot, [1] * rows, POSITION) for slot in range(users)]
        model.prepare("ids", users * rows, rows)
        model.run("ids", asked)
        positions = [*range(POSITION, POSITION + rows)] * users
        return graph.cost(graph.capture(lambda: model.run("ids", asked), positions, rows), (), cache).kv_cache

    assert kv_bytes(4, 1) == 4 * flat.cost(1).kv_cache  # before there are programs of more rows
    assert kv_bytes(1, 8) == flat.cost(8).kv_cache
    assert kv_bytes(4, 8) == 4 * kv_bytes(1, 8)
    model.prefill([1] * 200)
    filled = only(graph.capture(lambda: model.prefill([1] * 200)), "SDPAOperation")
    assert sum(traffic.read for traffic in filled.traffic if traffic.address in cache) == 2 * flat.bytes_of_positions(
        256
    )
