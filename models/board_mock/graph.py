"""What a function of ttnn ops runs on a device: each op, its program, and the DRAM bytes it reads and writes per chip.

ttnn's graph capture names every op, its program factory and the buffers it gets. Where a buffer is larger than what
the kernel touches, rules correct the size; they follow the kernel sources of ttnn 0.81.1:

- exact: sharded norms, element-wise ops, reshuffles, matmuls from sharded input (the weight's tiles, without the
  padding of its last bank); an embedding reads the rows it looks up, a slice what it returns; a cache update reads and
  writes one row of tiles per KV head and position (of a paged cache, where every row has one turn of several, its share
  of them), `fill_cache` and `paged_fill_cache` write what they are given;
- estimated: decode attention, whole chunks of keys and values up to each row's position, once for each row and KV head
  (cores could share them); attention of a tree, whole chunks up to its last row, once for each query head; prefill
  attention, keys and values up to the chunk's end, once; matmuls of interleaved
  input, both operands once (cores multicast them, but blocks may be read again); collectives, their inputs and
  outputs.

Works on silicon too, where capture slows the host down.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import ttnn

Nodes = list[dict]  # of a captured graph, in the order of time

TILE = 32
_TILE_BYTES = {"BFLOAT8_B": 1088, "BFLOAT4_B": 576}
_VALUE_BYTES = {"FLOAT32": 4, "UINT32": 4, "INT32": 4, "BFLOAT16": 2, "UINT16": 2, "UINT8": 1}
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_broadcast", "all_to_all", "point_to_point")
_EXACT_MATMULS = ("MatmulMultiCoreReuseMultiCastDRAMShardedProgramFactory",)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one op moves between a chip's cores and one DRAM buffer."""

    address: int
    read: int
    written: int
    exact: bool  # False: estimated, see the module


@dataclass(frozen=True)
class DeviceOp:
    """One program that ran on every chip of the mesh."""

    call: str  # the function that was called, such as "ttnn.linear"
    operation: str  # what ttnn runs for it, such as "MatmulDeviceOperation"
    factory: str  # of its program
    cache_hit: bool  # the program was compiled before
    traffic: tuple[Traffic, ...]

    @property
    def dram_read(self) -> int:
        return sum(traffic.read for traffic in self.traffic)

    @property
    def dram_written(self) -> int:
        return sum(traffic.written for traffic in self.traffic)

    @property
    def exact(self) -> bool:
        return all(traffic.exact for traffic in self.traffic)

    @property
    def is_collective(self) -> bool:
        """Did it run within a call that lets chips talk to each other?"""
        return _is_collective(self.call)


@contextlib.contextmanager
def recorded(mode: ttnn.graph.RunMode = ttnn.graph.RunMode.NORMAL) -> Iterator[Nodes]:
    """Capture the graph of what the block runs, also when it fails; the nodes are there after the block.

    ttnn would also write down the Python arguments of every call, which takes longer than the calls and of which
    nothing is in the nodes: it is kept from it.
    """
    nodes: Nodes = []
    written_down = ttnn.graph.record_python_operation
    ttnn.graph.record_python_operation = lambda *arguments, **options: None
    ttnn.graph.begin_graph_capture(mode)
    try:
        yield nodes
    finally:
        ttnn.graph.record_python_operation = written_down
        nodes += ttnn.graph.end_graph_capture()


def capture(function: Callable[[], object], positions: Sequence[int] | None = None, turns: int = 1) -> list[DeviceOp]:
    """Run ``function`` and return its device ops; see `device_ops`."""
    with recorded() as nodes:
        function()
    return device_ops(nodes, positions, turns)


# ---- sums -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Device ops, and DRAM bytes (read and written) on each chip. Costs add, subtract and multiply."""

    ops: int = 0  # without collectives
    collectives: int = 0
    weights: int = 0
    kv_cache: int = 0
    other: int = 0

    @property
    def dram(self) -> int:
        return self.weights + self.kv_cache + self.other

    def __add__(self, cost: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(cost, field.name) for field in fields(Cost)))

    def __sub__(self, cost: Cost) -> Cost:
        return self + -1 * cost

    def __rmul__(self, times: int) -> Cost:
        return Cost(*(times * getattr(self, field.name) for field in fields(Cost)))


def cost(ops: Sequence[DeviceOp], weights: Collection[int], kv_cache: Collection[int]) -> Cost:
    """The sum of ``ops``; ``weights`` and ``kv_cache`` are addresses of buffers."""
    moved: Counter[str] = Counter()
    for traffic in (traffic for op in ops for traffic in op.traffic):
        kind = "weights" if traffic.address in weights else "kv_cache" if traffic.address in kv_cache else "other"
        moved[kind] += traffic.read + traffic.written
    collectives = sum(op.is_collective for op in ops)
    return Cost(ops=len(ops) - collectives, collectives=collectives, **moved)


def split(one_layer: Cost, two_layers: Cost) -> tuple[Cost, Cost]:
    """(each layer, all the rest) of a model, from the costs of it with one and with two layers."""
    layer = two_layers - one_layer
    return layer, one_layer - layer


def readers(ops: Sequence[DeviceOp], address: int) -> list[DeviceOp]:
    """The ops that read the buffer at an address: exactly one for a weight that a forward reads once."""
    return [op for op in ops if any(traffic.address == address and traffic.read for traffic in op.traffic)]


def peak_dram(nodes: Nodes) -> int:
    """The most DRAM, per chip, that buffers made within the captured graph took at one time."""
    live: dict[int, int] = {}
    peak = 0
    for node in nodes:
        _follow(node, "DRAM", "size", live)
        peak = max(peak, sum(live.values()))
    return peak


def peak_l1(nodes: Nodes) -> int:
    """L1 per core, at most, that the captured graph shows to be taken beside what was there before it.

    Every core is taken to have a part of each tensor. Circular buffers are in the graph when a program is compiled,
    not when it is found in the program cache; ttnn 0.81.1 records none for matmuls and unary ops. It does refuse a
    program whose circular buffers do not fit beside the tensors.
    """
    # ttnn's extract_resource_usage_per_core adds up the circular buffers of all chips of a mesh.
    live: dict[int, int] = {}
    circular: Counter[int] = Counter()  # chip -> bytes, of the program at hand
    peak = 0
    for node in nodes:
        _follow(node, "L1", "max_size_per_bank", live)
        if node["node_type"] == "circular_buffer_allocate" and node["params"]["globally_allocated"] == "0":
            circular[node["params"]["device_id"]] += node["params"]["size"]
        elif node["node_type"] == "function_end":
            circular.clear()
        peak = max(peak, sum(live.values()) + max(circular.values(), default=0))
    return peak


def _follow(node: dict, kind: str, size: str, live: dict[int, int]) -> None:
    """Keep ``live`` (address -> bytes) up with a node that makes or frees a buffer of that kind."""
    params = node["params"]
    if node["node_type"] == "buffer_allocate" and params["type"] == kind:
        live[params["address"]] = params[size]
    elif node["node_type"] == "buffer_deallocate" and params["type"] == kind:
        live.pop(params["address"], None)


# ---- from the graph -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the graph describes it, per chip."""

    shape: tuple[int, ...]
    dtype: str
    tiled: bool
    in_dram: bool
    address: int

    @classmethod
    def of(cls, params: dict) -> _Tensor | None:
        """None for a tensor on the host."""
        if params["storage_type"] != "DEVICE":
            return None
        return cls(
            tuple(int(size) for size in re.findall(r"\d+", params["shape"])),
            params["dtype"].removeprefix("DataType::"),
            params["layout"] == "Layout::TILE",
            "BufferType::DRAM" in params["memory_config"],
            # views have no address of their own
            params.get("address") or json.loads(params["device_tensors"])[0]["address"],
        )

    @property
    def tile_bytes(self) -> int:
        return _TILE_BYTES.get(self.dtype) or TILE * TILE * _VALUE_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Whole tiles, or values."""
        if not self.tiled:
            return math.prod(self.shape) * _VALUE_BYTES[self.dtype]
        *outer, rows, columns = (1, 1, *self.shape)
        return math.prod(outer) * math.ceil(rows / TILE) * math.ceil(columns / TILE) * self.tile_bytes

    def rows_bytes(self, positions: int) -> int:
        """Of that many positions, a multiple of 32, of all heads of a cache [1, heads, S, D]."""
        _, heads, _, head_dim = self.shape
        return heads * positions // TILE * math.ceil(head_dim / TILE) * self.tile_bytes


@dataclass
class _Call:
    """A device op that is being read from the graph."""

    call: str
    params: dict
    arguments: list[str]
    inputs: list[_Tensor]
    made: dict[int, int]  # DRAM buffers: address -> bytes


def device_ops(nodes: Nodes, positions: Sequence[int] | None = None, turns: int = 1) -> list[DeviceOp]:
    """The device ops of a captured graph, in their order.

    ``positions`` are the rows' positions in the cache, -1 for rows that are skipped: ops of decode attention and cache
    updates with that many rows are counted accordingly. Others attend to the whole cache, an upper bound. ``turns``:
    updates of a paged cache in which these rows are written, as many in each.
    """
    tensors = {node["counter"]: _Tensor.of(node["params"]) for node in nodes if node["node_type"] == "tensor"}
    ops: list[DeviceOp] = []
    stack: list[tuple[str, _Call | None]] = []
    for node in nodes:
        kind, params = node["node_type"], node["params"]
        if kind == "function_start":
            call = None
            if "program_factory_type" in params:
                inputs = [tensor for i in node["input_tensors"] if (tensor := tensors.get(i))]
                call = _Call(stack[0][0] if stack else params["name"], params, node["arguments"], inputs, {})
            stack.append((params["name"], call))
        elif kind == "buffer_allocate" and params["type"] == "DRAM":
            call = next((call for _, call in reversed(stack) if call), None)
            if call:
                call.made[params["address"]] = params["size"]
        elif kind == "function_end" and stack:
            _, call = stack.pop()
            if call:
                outputs = [tensor for i in node["connections"] if (tensor := tensors.get(i))]
                ops.append(_device_op(call, outputs, positions, turns))
    return ops


def _device_op(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None, turns: int) -> DeviceOp:
    operation, factory = call.params["name"], call.params["program_factory_type"].rpartition("::")[2]
    exact = not _is_collective(call.call) and (operation != "MatmulDeviceOperation" or factory in _EXACT_MATMULS)
    read = {tensor.address: tensor.bytes for tensor in call.inputs if tensor.in_dram}
    # What is written: buffers the op made, or was given for its output; what it changes in place is for a rule.
    written = {tensor.address: tensor.bytes for tensor in outputs if tensor.in_dram} | call.made
    traffic = {address: Traffic(address, 0, size, exact) for address, size in written.items()}
    traffic |= {address: Traffic(address, size, 0, exact) for address, size in read.items()}
    if operation in _UPDATES and positions is not None:
        ran = [position for position in positions if position >= 0]
        positions = ran[:: turns if _table_width(call) else 1] + [-1] * (len(positions) - len(ran))
        positions += [-1] * (_update_count(call) - len(positions))
    if operation in _RULES:
        traffic |= {corrected.address: corrected for corrected in _RULES[operation](call, outputs, positions)}
    return DeviceOp(call.call, operation, factory, call.params["program_cache_hit"], tuple(traffic.values()))


def _is_collective(call: str) -> bool:
    return call.rpartition(".")[2].removesuffix("_async") in _COLLECTIVES


# ---- ops that touch a part of a buffer ------------------------------------------------------------------------------


def _embedding(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    ids, table = call.inputs[:2]
    row = table.shape[-1] * _VALUE_BYTES[table.dtype]
    return [Traffic(table.address, math.prod(ids.shape) * row, 0, True)] if table.in_dram else []


def _slice(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    source = call.inputs[0]
    return [Traffic(source.address, sum(output.bytes for output in outputs), 0, True)] if source.in_dram else []


def _update_rows(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    """(cache, new)... and the positions: each row patches one row of tiles in every head."""
    caches = [tensor for tensor in call.inputs if tensor.in_dram and tensor.tiled]
    new = next(tensor for tensor in call.inputs if not tensor.in_dram)
    rows = _rows(new.shape[1], positions)
    count = new.shape[1] if rows is None else len(rows)
    moved = [(cache.address, count * cache.rows_bytes(TILE)) for cache in caches]
    return [Traffic(address, size, size, True) for address, size in moved]


def _fill(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    cache, new = call.inputs[:2]
    return [Traffic(cache.address, 0, new.bytes, "FILL" in call.arguments[0])]


def _update_count(call: _Call) -> int:
    """Rows that a cache update is given."""
    return next(tensor for tensor in call.inputs if not tensor.in_dram).shape[1]


def _table_width(call: _Call) -> int:
    """Pages of a sequence in the page table that an op is given; 0 without one."""
    tables = [tensor for tensor in call.inputs if tensor.in_dram and not tensor.tiled and len(tensor.shape) == 2]
    return tables[0].shape[1] if tables else 0


def _attend_rows(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    queries, *caches = call.inputs[:3]
    length = caches[0].shape[2] * (_table_width(call) or 1)
    chunk = _chunk(call)
    rows = _rows(queries.shape[1], positions)
    if rows is None:
        rows = [length - 1] * queries.shape[1]
    attended = sum(min(length, (position // chunk + 1) * chunk) for position in rows)
    return [Traffic(cache.address, cache.rows_bytes(attended), 0, False) for cache in caches]


def _fill_pages(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    cache, new = call.inputs[:2]
    return [Traffic(cache.address, 0, new.bytes, True)]


def _attend_sequence(call: _Call, outputs: list[_Tensor], positions: Sequence[int] | None) -> list[Traffic]:
    """Attention of a prefill chunk, whose start stands among the arguments, or is a tensor and taken for 0, as for the
    first chunk; keys and values of its own else. With a mask and a map of its blocks: of a tree."""
    queries, *stored = call.inputs[:3]
    found = re.search(r"SDPAProgramConfig\(.*?\), (\d+), (\d+|std::nullopt),", call.arguments[0])
    causal, start = found.groups() if found else ("0", "")
    if len(call.inputs) == 5 and causal == "0":
        return _attend_tree(call, positions)
    end = stored[0].shape[2]
    if len(call.inputs) > 3 and found:  # paged
        end = (int(start) if start.isdigit() else 0) + queries.shape[2]
    return [
        Traffic(tensor.address, min(tensor.bytes, tensor.rows_bytes(math.ceil(end / TILE) * TILE)), 0, False)
        for tensor in stored
    ]


def _attend_tree(call: _Call, positions: Sequence[int] | None) -> list[Traffic]:
    queries, *caches, mask, _ = call.inputs
    _, heads, count, _ = queries.shape
    _, kv_heads, length, _ = caches[0].shape
    chunk = _chunk(call)
    rows = _rows(count, positions)
    seen = min(length, (max(rows) // chunk + 1) * chunk) if rows else length
    shared = heads // kv_heads
    read = [Traffic(cache.address, shared * cache.rows_bytes(seen), 0, False) for cache in caches]
    return [*read, Traffic(mask.address, heads * mask.bytes * seen // length, 0, False)]


def _chunk(call: _Call) -> int:
    """Positions of keys and values that attention takes at once."""
    found = re.search(r"SDPAProgramConfig\([^,]*, [^,]*, \d+, (\d+)", call.arguments[0])
    if found is None:
        raise ValueError(f"attention without a program configuration: {call.arguments[0]}")
    return int(found[1]) or TILE


def _rows(count: int, positions: Sequence[int] | None) -> list[int] | None:
    """The positions of an op of ``count`` rows that takes part, None where they are not known."""
    if positions is None or len(positions) != count:
        return None
    return [position for position in positions if position >= 0]


_UPDATES = ("PagedFusedUpdateCacheDeviceOperation", "PagedUpdateCacheDeviceOperation")

_RULES: dict[str, Callable[[_Call, list[_Tensor], Sequence[int] | None], list[Traffic]]] = {
    "EmbeddingsDeviceOperation": _embedding,
    "SliceDeviceOperation": _slice,
    "PagedFusedUpdateCacheDeviceOperation": _update_rows,
    "PagedUpdateCacheDeviceOperation": _update_rows,
    "UpdateKVCacheOperation": _fill,
    "PagedFillCacheDeviceOperation": _fill_pages,
    "SdpaDecodeDeviceOperation": _attend_rows,
    "SDPAOperation": _attend_sequence,
}
