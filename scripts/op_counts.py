"""Device ops and DRAM bytes of one forward, per model size and board: the table of the README.

    python scripts/op_counts.py --markdown

Counted in ttnn's own graph of the model with one and with two layers, on mock boards: the difference is a layer, what
remains is outside the layers. The time is a bound computed from bytes: these bytes at the published DRAM bandwidth of
a chip, nothing else counted. It is no measurement: with this traffic a forward cannot be faster, and it will be slower.
Weights and most of the rest are exact, what attention reads of the cache and what collectives move is estimated: see
models/board_mock/graph.py.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.board_mock import cluster
from models.boards import BOARDS, Board, board_named
from models.cli.command import Parser, run_command
from models.cli.console import Terminal
from models.cli.tables import markdown_table, terminal_table
from models.errors import UserError
from models.llama.config import LlamaConfig, named_config
from models.llama.head_config import typical_head
from models.ttnn_llama.shapes import MAX_ROWS, padded_rows
from models.ttnn_llama.weights.precision import PRECISION, PRECISIONS, Precision, precision_named

if TYPE_CHECKING:
    from models.board_mock import graph

SIZES = ("1B", "3B", "8B")
ROWS = (1, 5, 32)
TREES = (32,)
USERS = ("1x8", "2x8", "4x8", "8x4", "16x2", "32x1")  # users x rows of each
POSITION = 1024
HEAD_ROWS = 5  # verified before a head drafts
COLUMNS = (
    "model",
    "board",
    "rows",
    "ops per layer",
    "collectives per layer",
    "ops outside",
    "collectives outside",
    "weights MB",
    "KV MB",
    "other MB",
    "bound ms",
)
BOUND = "bound ms: computed from bytes per chip at the published bandwidth ({bandwidth}), not measured."


class Recorder:
    """A weight source that remembers which tensors it gave."""

    def __init__(self, source):
        self.source = source
        self.tensors = {}

    def tensor(self, spec):
        self.tensors[spec.name] = self.source.tensor(spec)
        return self.tensors[spec.name]


def counted(
    config: LlamaConfig, mesh_device, precision: Precision, forms: Sequence[tuple[int, bool]], position: int
) -> Iterator:
    """(whether q and k are rotated together, Cost) of greedy forwards from a position: rows, and if they are a tree."""
    from models.board_mock import graph
    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.weights.tensors import EmptySource

    source = Recorder(EmptySource(mesh_device))
    most = max(n for n, _ in forms)
    model = TtnnLlama(config, mesh_device, source, precision=precision, max_seq_len=position + most)
    weights = {tensor.buffer_address() for tensor in source.tensors.values()}
    cache = {tensor.buffer_address() for layer in model.cache for tensor in (layer.keys, layer.values)}
    for n, tree in forms:
        parents = [-1, *[0] * (n - 1)] if tree else None
        model.greedy([1] * n, position, parents)  # makes the buffers that stay
        positions = [*range(position, position + n), *[-1] * (padded_rows(n) - n)]
        ops = graph.capture(lambda n=n, parents=parents: model.greedy([1] * n, position, parents), positions)
        yield not model.plan(padded_rows(n), tree=tree).overlap_heads, graph.cost(ops, weights, cache)


def measure(
    board: Board, sizes: Sequence[str], precision: Precision, forms: Sequence[tuple[int, bool]], position: int
) -> list[dict]:
    """One entry for each size and form of rows on a board; this process must be on the board's mock."""
    from models.board_mock import graph
    from models.ttnn_llama.device.mesh import open_mesh

    entries = []
    with open_mesh(board, trace_region_bytes=0) as meshes:
        for size in sizes:
            config = named_config(size)
            one, two = (
                list(
                    counted(dataclasses.replace(config, num_hidden_layers=n), meshes.target, precision, forms, position)
                )
                for n in (1, 2)
            )
            for (n, tree), (fused, once), (_, twice) in zip(forms, one, two, strict=True):
                layer, outside = graph.split(once, twice)
                whole = outside + config.num_hidden_layers * layer
                entries.append(
                    {
                        "model": size,
                        "board": board.name,
                        "rows": n,
                        "tree": tree,
                        "fused_rope_and_cache_update": fused,
                        "layers": config.num_hidden_layers,
                        "layer": dataclasses.asdict(layer),
                        "outside": dataclasses.asdict(outside),
                        "forward": dataclasses.asdict(whole),
                        "dram_bytes": whole.dram,
                        "bound_ms": whole.dram / board.dram_gb_per_s / 1e6,
                    }
                )
    return entries


USER_COLUMNS = ("users x rows", "ops per layer", "collectives per layer", "KV MB", "all MB", "bound ms")


def by_users(board: Board, size: str, precision: Precision, shapes: Sequence[str], position: int) -> list[dict]:
    """One entry for each shape of users x rows, of a greedy forward that they share with pages; this process must be on
    the board's mock."""
    from models.board_mock import graph
    from models.ttnn_llama.batch_model import BatchLlama, UserRows
    from models.ttnn_llama.device.mesh import open_mesh
    from models.ttnn_llama.weights.tensors import EmptySource

    config, costs = named_config(size), []
    parted = [tuple(map(int, shape.split("x"))) for shape in shapes]
    with open_mesh(board, trace_region_bytes=0) as meshes:
        for layers in (1, 2):
            source = Recorder(EmptySource(meshes.target))
            model = BatchLlama(
                dataclasses.replace(config, num_hidden_layers=layers),
                meshes.target,
                source,
                precision=precision,
                max_seq_len=position + MAX_ROWS,
                slots=max(users for users, _ in parted),
            )
            weights = {tensor.buffer_address() for tensor in source.tensors.values()}
            cache = {tensor.buffer_address() for layer in model.cache for tensor in (layer.keys, layer.values)}
            costs.append([])
            for users, rows in parted:
                model.prepare("ids", users * rows, rows)
                shared = [UserRows(slot, [1] * rows, position) for slot in range(users)]
                model.run("ids", shared)  # makes the buffers that stay
                positions = [*range(position, position + rows)] * users
                ops = graph.capture(lambda m=model, shared=shared: m.run("ids", shared), positions, rows)
                costs[-1].append(graph.cost(ops, weights, cache))
    entries = []
    for shape, once, twice in zip(shapes, *costs, strict=True):
        layer, outside = graph.split(once, twice)
        whole = outside + config.num_hidden_layers * layer
        entries.append(
            {
                "model": size,
                "board": board.name,
                "users_by_rows": shape,
                "layer": dataclasses.asdict(layer),
                "forward": dataclasses.asdict(whole),
                "dram_bytes": whole.dram,
                "bound_ms": whole.dram / board.dram_gb_per_s / 1e6,
            }
        )
    return entries


def show_users(board: Board, options: argparse.Namespace, entries: list[dict]) -> None:
    rows = []
    for entry in entries:
        layer, forward = entry["layer"], entry["forward"]
        sizes = (f"{size / 1e6:.1f}" for size in (forward["kv_cache"], entry["dram_bytes"]))
        sizes = *sizes, f"{entry['bound_ms']:.2f}"
        rows.append([entry["users_by_rows"], str(layer["ops"]), str(layer["collectives"]), *sizes])
    print(
        f"{options.users_of} on {board.name}, {options.precision}, several users with pages, rows at position "
        f"{options.position} and after, per chip. {BOUND.format(bandwidth=f'{board.dram_gb_per_s:.0f} GB/s')}"
    )
    print(markdown_table(USER_COLUMNS, rows, left=1))


def each_in_its_process(boards: Sequence[str], options: argparse.Namespace) -> list[dict]:
    """A process has one board: run this script once for each."""
    entries = []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "counts.json")
        for board in boards:
            command = [sys.executable, __file__, "--boards", board, "--json", str(file), "--sizes", *options.sizes]
            command += ["--rows", *map(str, options.rows), "--position", str(options.position)]
            command += ["--trees", *map(str, options.trees)]
            command += ["--precision", options.precision]
            command += ["--users-of", options.users_of] if options.users_of else []
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise RuntimeError(f"counting on {board} failed:\n{done.stdout}")
            entries += json.loads(file.read_text())["entries"]
    return entries


HEAD_COLUMNS = ("part", "ops", "collectives", "weights MB", "KV MB", "other MB", "all MB")


def head_parts(board: Board, size: str, precision: Precision, position: int) -> list[tuple[str, "graph.Cost"]]:
    """(what, Cost) of what a round with a draft head of a published shape adds to the target's verification; this
    process must be on the board's mock. The target has two layers: the head's part does not depend on their number."""
    import torch

    from models.board_mock import graph
    from models.speculative.model import Rows, Want
    from models.ttnn_llama.device.mesh import open_mesh
    from models.ttnn_llama.draft_head import TtnnHead
    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.weights.tensors import EmptySource

    full, found = named_config(size), []
    config = dataclasses.replace(full, num_hidden_layers=2)
    shape = dataclasses.replace(typical_head(full), taps=(0, 1, 2))
    with open_mesh(board, trace_region_bytes=0) as meshes:
        sources = [Recorder(EmptySource(meshes.target)) for _ in range(2)]
        room = {"precision": precision, "max_seq_len": position + MAX_ROWS}
        target = TtnnLlama(config, meshes.target, sources[0], **room)
        head = TtnnHead(shape, target, sources[1], target_ids=torch.arange(shape.draft_vocab_size), **room)
        weights = {tensor.buffer_address() for source in sources for tensor in source.tensors.values()}
        layers = (*target.cache, head.cache)
        cache = {tensor.buffer_address() for layer in layers for tensor in (layer.keys, layer.values)}
        positions = list(range(position, position + HEAD_ROWS))

        def verified() -> None:
            kept = target.extend([Rows(0, [1] * HEAD_ROWS, position)], Want(taps=head.taps)).features(0)
            head.states(kept, range(HEAD_ROWS), position)

        def cost(body) -> graph.Cost:
            verified()
            body()  # makes the buffers that stay
            verified()
            return graph.cost(graph.capture(body, positions), weights, cache)

        plain = cost(lambda: target.greedy([1] * HEAD_ROWS, position))
        found.append(("keeping the states of a verification", cost(verified) + -1 * plain))
        found.append(("reading verified rows", cost(lambda: head.read([1] * HEAD_ROWS, position + 1))))
        for k in range(1, HEAD_ROWS):
            key = head.prepare_chain(k)
            inputs, given = head._chain_inputs[key], min(HEAD_ROWS, k + 1)

            def chain(key=key, inputs=inputs, given=given) -> None:
                head.fill_chain(*inputs, [1] * given, position + HEAD_ROWS + 1 - given)
                head.runner.run(key)

            found.append((f"rows of {given} verified tokens and a chain of {k}", cost(chain)))
    return found


def show_head(board: Board, options: argparse.Namespace, precision: Precision) -> None:
    rows = []
    for what, cost in head_parts(board, options.head, precision, options.position):
        sizes = (cost.weights, cost.kv_cache, cost.other, cost.dram)
        rows.append([what, str(cost.ops), str(cost.collectives), *(f"{size / 1e6:.1f}" for size in sizes)])
    print(
        f"Head of {options.head} on {board.name}, {options.precision}, {HEAD_ROWS} rows at {options.position}, per chip"
    )
    print(markdown_table(HEAD_COLUMNS, rows, left=1))


def table_row(entry: dict) -> list[str]:
    layer, outside, forward = entry["layer"], entry["outside"], entry["forward"]
    megabytes = [f"{forward[part] / 1e6:.1f}" for part in ("weights", "kv_cache", "other")]
    counts = [layer["ops"], layer["collectives"], outside["ops"], outside["collectives"]]
    rows = f"{entry['rows']} of a tree" if entry["tree"] else str(entry["rows"])
    return [entry["model"], entry["board"], rows, *map(str, counts), *megabytes, f"{entry['bound_ms']:.2f}"]


def show(entries: list[dict], options: argparse.Namespace) -> None:
    bandwidth = ", ".join(f"{name} {BOARDS[name].dram_gb_per_s:.0f} GB/s" for name in options.boards)
    about = (
        f"Precision {options.precision}; rows at positions {options.position} and after; bytes per chip, read and "
        f"written, of one greedy forward. {BOUND.format(bandwidth=bandwidth)}"
    )
    separate = sorted({f"{e['rows']} rows on {e['board']}" for e in entries if not e["fused_rope_and_cache_update"]})
    if any(entry["tree"] for entry in entries):
        about += " Rows of a tree read keys and values once for each query head, other rows once for each row."
    if separate:
        about += (
            f" Two ops more than elsewhere, as two cores a row are needed to rotate q and k together and to write k "
            f"and v together, and the grid has fewer: {', '.join(separate)}."
        )
    rows = [table_row(entry) for entry in entries]
    if options.markdown:
        print(f"{markdown_table(COLUMNS, rows, left=2)}{about}")
        return
    console = Terminal(highlight=False)
    console.print(terminal_table(COLUMNS, rows, left=2))
    console.print(about)


def command(argv: Sequence[str] | None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="(default: 1B 3B 8B)")
    parser.add_argument("--boards", nargs="+", default=list(BOARDS), help=f"(default: {' '.join(BOARDS)})")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="(default: 1 5 32)")
    parser.add_argument(
        "--trees", nargs="*", type=int, default=list(TREES), help="rows that are a tree (default: 32; none: no value)"
    )
    parser.add_argument("--position", type=int, default=POSITION, help="of the first row (default: %(default)s)")
    parser.add_argument("--precision", default=PRECISION, help=f"{', '.join(PRECISIONS)} (default: %(default)s)")
    parser.add_argument("--head", help="instead, on one board: a draft head of the published shape for 1B, 3B or 8B")
    parser.add_argument(
        "--users-of", metavar="SIZE", help=f"instead, of one model: forwards that users share, {', '.join(USERS)}"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    options = parser.parse_args(argv)
    for name in options.sizes:
        named_config(name)
    boards = [board_named(name) for name in options.boards]
    precision = precision_named(options.precision)
    forms = [(n, tree) for tree, counts in ((False, options.rows), (True, options.trees)) for n in counts]
    if not all(1 <= n <= MAX_ROWS for n, _ in forms) or not 0 <= options.position <= 100_000:
        raise UserError(f"--rows and --trees must be within 1..{MAX_ROWS} and --position within 0..100000")
    from models.cli.environment import check_writable, date, versions, write_json

    if options.json:
        check_writable(options.json)
    if options.head:
        named_config(options.head)
        if len(boards) != 1:
            raise UserError("--head counts on one board: name it with --boards")
        cluster.activate(boards[0].name)
        show_head(boards[0], options, precision)
        return 0
    if options.users_of:
        named_config(options.users_of)
        if len(boards) == 1:
            cluster.activate(boards[0].name)
            entries = by_users(boards[0], options.users_of, precision, USERS, options.position)
        else:
            entries = each_in_its_process(options.boards, options)
        for board in boards:
            show_users(board, options, [entry for entry in entries if entry["board"] == board.name])
    elif len(boards) == 1:
        cluster.activate(boards[0].name)
        entries = measure(boards[0], options.sizes, precision, forms, options.position)
    else:
        entries = each_in_its_process(options.boards, options)
        entries.sort(key=lambda entry: options.sizes.index(entry["model"]))
    if not options.users_of:
        show(entries, options)
    if options.json:
        circumstances = {"date": date(), "versions": versions(), "command": sys.argv, "settings": vars(options)}
        write_json(options.json, {"entries": entries} | circumstances)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run_command(lambda: command(None)))
