"""One op or one module at a time against torch: where a kernel is wrong, this says which."""

import torch
import ttnn

from models.speculative.tree import tree_depths, tree_sights
from models.ttnn_llama.device.mesh import open_mesh
from models.ttnn_llama.modules.linear import Linear
from models.ttnn_llama.modules.lm_head import LMHead
from models.ttnn_llama.modules.rows import TreeInputs
from models.ttnn_llama.shapes import KV_BLOCK
from models.ttnn_llama.weights.precision import precision_named, ttnn_dtype
from models.ttnn_llama.weights.tensors import CheckpointSource, interleave_pairs, weight_specs
from scripts.board_steps.bench import CONTEXT, PRECISION, Bench, joined_columns, on_chips, rows_of
from scripts.board_steps.record import Record
from scripts.board_steps.reference import Weights, attention, keys_and_values, noise, one_layer

PREFILL_ROWS = (128, 384, 1024)
SHORT_PROMPTS = (66, 128)
EXPLODED = 100.0  # no output of attention comes near it; a fault reached 1e36 (tt-metal issue 52218)
TREE = (-1, 0, 0, 1, 1, 2, 4, 6)  # parents of 8 rows
EQUAL_AT = (100, 127, 128, 129, 600)  # positions of a decode; a chunk of attention has 128
CONTEXTS = (1, 127, 128, 129, 257, 1024)
ROWS = (1, 2, 5, 8, 32)
# (first position, rows): within a tile of 32 rows, over a border of two, and a whole tile's number over a border.
STORED = ((40, 8), (62, 5), (48, 32))
VOCABULARY = 128_256
IDS = (0, 65_535, 65_536, VOCABULARY - 1)


def opening(bench: Bench, record: Record) -> None:
    """Open the board, write to each chip, read back, close; twice."""
    for time in ("first", "second"):
        with open_mesh(bench.board, trace_region_bytes=0) as meshes:
            values = noise(32, 64, seed=1).bfloat16()
            mapper = ttnn.ReplicateTensorToMesh(meshes.target)
            host = ttnn.from_torch(values, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, mesh_mapper=mapper)
            tensor = ttnn.to_device(host, meshes.target)  # no kernel runs yet: from_torch would tilize on the device
            for chip, found in enumerate(on_chips(ttnn.from_device(tensor))):
                record.equal(f"written to chip {chip} and read back, {time} opening", found, values)
            grid = meshes.target.compute_with_storage_grid_size()
            record.facts["grid"] = f"{grid.x} x {grid.y}"


def prefill_linear(bench: Bench, record: Record) -> None:
    """The gate matrix of an 8B on so many rows."""
    layout, precision = bench.layout("8B"), precision_named(PRECISION)
    weights = Weights(one_layer("8B"))
    spec = next(spec for spec in weight_specs(weights.config, layout.chips, precision) if spec.name == "layers.0.w1")
    linear = Linear(
        CheckpointSource(weights, bench.mesh, precision).tensor(spec),
        layout,
        weight_format=precision.gate_up,
        fidelity=precision.gate_up_fidelity,
        in_cores=layout.residual_cores,
        output=layout.gated,
    )
    matrix = spec.build(weights)[0, 0]  # as its format holds it:
    rounded = ttnn.from_torch(matrix, dtype=ttnn_dtype(spec.format), layout=ttnn.TILE_LAYOUT).to_torch().float()
    x = noise(max(PREFILL_ROWS), layout.hidden, seed=1)
    expected = x @ rounded
    for rows in PREFILL_ROWS:
        made = joined_columns(linear.prefill_forward(bench.put(x[:rows])))
        record.close(f"{rows} rows by {list(matrix.shape)} in {spec.format}", made, expected[:rows])


def prefill_attention(bench: Bench, record: Record) -> None:
    """Short prompts, which are masked most, and the rows of a tree, whose kernel is the same."""
    model, layer = bench.model, bench.model.layers[0].attention
    x = bench.hidden(max(SHORT_PROMPTS) + len(TREE))
    for tokens in SHORT_PROMPTS:
        made = _prefilled(bench, x[:tokens])
        record.below(f"{tokens} tokens", made, EXPLODED)
        record.close(f"{tokens} tokens", made, attention(bench.weights, x[:tokens]))
    first, rows = max(SHORT_PROMPTS), len(TREE)
    plan = model.plan(rows, tree=True)
    inputs = TreeInputs(rows, plan.lookups, model.layout.cache_length, bench.mesh)
    inputs.fill_tree([0] * rows, first, TREE)
    made = rows_of(layer.decode_forward(_residual(bench, x[first:]), plan.rope_tables(inputs), inputs, plan))[:rows]
    positions = torch.tensor([*range(first), *(first + depth for depth in tree_depths(TREE))])
    sees = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    sees[first:, first:] = torch.tensor([[bits >> i & 1 for i in range(rows)] for bits in tree_sights(TREE)]).bool()
    record.below(f"tree of {rows} rows", made, EXPLODED)
    record.close(f"tree of {rows} rows", made, attention(bench.weights, x, positions, sees)[first:])


def decode_rows(bench: Bench, record: Record) -> None:
    """What lossless drafting rests on: a row is computed alike, alone and beside four others."""
    model = bench.model
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, model.vocab_size, (max(EQUAL_AT) + 40,), generator=generator).tolist()
    model.prefill(tokens)
    for position in EQUAL_AT:
        together = tokens[position : position + 5]
        alone = model.forward(together[:1], position)[0]
        beside = model.forward(together, position)[0]
        record.equal(f"row 0 of 5 at position {position}, and the row alone", beside, alone)


def decode_attention(bench: Bench, record: Record) -> None:
    """One layer's attention over contexts around the chunks of 128 positions, for several numbers of rows."""
    model, layer = bench.model, bench.model.layers[0].attention
    last = max(CONTEXTS)
    x = bench.hidden(last + max(ROWS), seed=3)
    expected = attention(bench.weights, x)
    _prefilled(bench, x[:last])
    for context in CONTEXTS:
        for rows in ROWS:
            plan, inputs = model.plan(rows), model.new_inputs(rows)
            inputs.fill([0] * rows, context)
            shown = x[context : context + rows]
            made = layer.decode_forward(_residual(bench, shown), plan.rope_tables(inputs), inputs, plan)
            # the rows write the keys and values that the prompt, or rows before, have written there
            record.close(f"context {context}, {rows} rows", rows_of(made)[:rows], expected[context : context + rows])


def shared_cache(bench: Bench, record: Record) -> None:
    """Rows that write one cache in turn leave what rows written one by one leave; again and again."""
    weights, cache = bench.weights, bench.model.layers[0].attention.cache
    texts = [bench.hidden(CONTEXT, seed=4), bench.hidden(CONTEXT, seed=5)]
    for first, rows in STORED:
        where = f"{rows} rows from position {first}"
        one_by_one = []
        for x in texts:
            for row in range(first, first + rows):
                _write(bench, x, row, 1)
            one_by_one.append([on_chips(kept) for kept in (cache.keys, cache.values)])
        positions = torch.arange(first, first + rows)
        keys, values = keys_and_values(weights, texts[-1][first : first + rows], positions)
        for name, found, expected in zip(("keys", "values"), one_by_one[-1], (_paired(keys), values), strict=True):
            written = torch.cat(found, 1)[0, :, first : first + rows].float()  # [KV, rows, D]
            record.close(f"{name}, {where}, one by one", _by_row(written), _by_row(expected))
        for repeat in range(bench.effort.cache_repeats):
            text = repeat % 2
            _write(bench, texts[text], first, rows)
            for kept, expected in zip((cache.keys, cache.values), one_by_one[text], strict=True):
                for chip, found in enumerate(on_chips(kept)):
                    record.equal(f"whole cache of chip {chip}, {where}, time {repeat + 1}", found, expected[chip])
    if bench.effort.cache_repeats < 50:
        record.leave_out("50 repeats", f"{bench.effort.cache_repeats} on a {bench.board.medium}: nothing races there")


def token_ids(bench: Bench, record: Record) -> None:
    """Ids of more than 16 bits through argmax and embedding, on the device from one to the other."""
    mapper = ttnn.ReplicateTensorToMesh(bench.mesh)
    logits = torch.zeros(len(IDS), VOCABULARY)
    logits[range(len(IDS)), IDS] = 2.0
    # A row of the table says which it is, in numbers that bf16 holds.
    ids = torch.arange(VOCABULARY)
    table = torch.zeros(VOCABULARY, 32)
    table[:, 0], table[:, 1], table[:, 2] = ids // 512, ids % 512 // 2, ids % 2
    on_device = ttnn.from_torch(table, dtype=ttnn.bfloat16, device=bench.mesh, mesh_mapper=mapper)
    found = LMHead.argmax(ttnn.untilize(bench.put(logits), use_multicore=True))
    looked_up = ttnn.embedding(found, on_device, layout=ttnn.TILE_LAYOUT)
    expected = torch.tensor(IDS)
    for chip, (each, rows) in enumerate(zip(on_chips(found), on_chips(looked_up), strict=True)):
        record.equal(f"argmax on chip {chip}", each.flatten().long(), expected)
        rows = rows.reshape(len(IDS), -1).long()
        record.equal(f"embedding on chip {chip}", rows[:, 0] * 512 + rows[:, 1] * 2 + rows[:, 2], expected)


def _residual(bench: Bench, x: torch.Tensor) -> ttnn.Tensor:
    return ttnn.interleaved_to_sharded(bench.put(x), bench.model.layout.residual)


def _prefilled(bench: Bench, x: torch.Tensor) -> torch.Tensor:
    """Attention of the first layer over a prompt [n, H], in chunks of 128; its keys and values are then cached."""
    model, layer = bench.model, bench.model.layers[0].attention
    parts = []
    for start in range(0, len(x), KV_BLOCK):
        chunk = torch.zeros(KV_BLOCK, x.shape[1])
        part = x[start : start + KV_BLOCK]
        chunk[: len(part)] = part
        tables = model.rope.range(start, KV_BLOCK)
        parts.append(rows_of(layer.prefill_forward(bench.put(chunk), tables, model.rope.rotation, start))[: len(part)])
    return torch.cat(parts)


def _write(bench: Bench, x: torch.Tensor, first: int, rows: int) -> None:
    """Rows of x through attention, which caches their keys and values."""
    model = bench.model
    plan, inputs = model.plan(rows), model.new_inputs(rows)
    inputs.fill([0] * rows, first)
    shown = _residual(bench, x[first : first + rows])
    model.layers[0].attention.decode_forward(shown, plan.rope_tables(inputs), inputs, plan)


def _paired(heads: torch.Tensor) -> torch.Tensor:
    """[KV, rows, D] in Hugging Face's order of the rotated pairs -> in the device's."""
    columns = heads.transpose(1, 2).flatten(0, 1)  # [KV D, rows], like the rows of a weight
    return interleave_pairs(columns, heads.shape[2]).view(heads.shape[0], heads.shape[2], -1).transpose(1, 2)


def _by_row(heads: torch.Tensor) -> torch.Tensor:
    """[KV, rows, D] -> [rows, KV D]"""
    return heads.transpose(0, 1).flatten(1)
