"""Capture what forwards run on mock boards: ttnn's own graph, one process per board and placement.

    python -m scripts.planner.capture N150 --json FILE      # one board, in this process
    python scripts/plan.py --capture                        # all of them: docs/results/plan-counts.json

A model with one and with two layers is captured; the difference is a layer, what remains is outside the layers.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.board_mock import cluster
from models.boards import BOARDS, board_named
from models.llama.config import named_config
from models.ttnn_llama.device.mesh import open_mesh
from models.ttnn_llama.shapes import padded_rows
from models.ttnn_llama.weights.precision import PRECISIONS, precision_named
from scripts.op_counts import Recorder
from scripts.planner.counts import POSITIONS, ROWS, SIZES, Work

ROOT = Path(__file__).resolve().parent.parent.parent
DRAFT_LENGTHS = (1, 2, 15)  # of the fused rounds that are captured
# Names of the device operations in which chips wait for each other; an all-reduce runs two of them and local ones.
_EXCHANGES = ("reducescatter", "allgather", "allreduce", "allbroadcast", "alltoall", "pointtopoint")


def work_of(ops: Sequence, weights: Iterable[int] = (), cache: Iterable[int] = ()) -> Work:
    """The sum of device ops (`graph.DeviceOp`); ``weights`` and ``cache`` are addresses of buffers."""
    from models.board_mock import graph

    cost = graph.cost(ops, set(weights), set(cache))
    exchanges = sum(op.operation.lower().startswith(_EXCHANGES) for op in ops)
    return Work(cost.ops + cost.collectives, exchanges, cost.weights, cost.kv_cache, cost.other)


def forwards(config, mesh_device, precision, rows: Sequence[int], positions: Sequence[int]) -> dict:
    """(rows, position) -> Work of a greedy forward of that many rows from there."""
    from models.board_mock import graph
    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.weights.tensors import EmptySource

    gc.collect()  # the model before: its programs and it refer to each other, and its memory is wanted now
    source = Recorder(EmptySource(mesh_device))
    model = TtnnLlama(config, mesh_device, source, precision=precision, max_seq_len=max(positions) + max(rows))
    weights = {tensor.buffer_address() for tensor in source.tensors.values()}
    cache = {tensor.buffer_address() for layer in model.cache for tensor in (layer.keys, layer.values)}
    found = {}
    for n in rows:
        model.prepare("ids", n)  # not a program for more rows that is there already
        for position in positions:
            model.greedy([1] * n, position)  # makes the buffers that stay
            places = [*range(position, position + n), *[-1] * (padded_rows(n) - n)]
            ops = graph.capture(lambda n=n, position=position: model.greedy([1] * n, position), places)
            found[n, position] = work_of(ops, weights, cache)
    return found


def forward_entries(
    board: str, mesh_device, sizes: Sequence[str], precisions: Sequence[str], rows: Sequence[int], positions
) -> list[dict]:
    """An entry for each size, precision, row count and position on a mesh of the active mock board."""
    entries = []
    for size in sizes:
        config = named_config(size)
        for name in precisions:
            one, two = (
                forwards(
                    dataclasses.replace(config, num_hidden_layers=layers),
                    mesh_device,
                    precision_named(name),
                    rows,
                    positions,
                )
                for layers in (1, 2)
            )
            for n, position in one:
                layer = two[n, position] + -1 * one[n, position]
                entries.append(
                    {
                        "board": board,
                        "chips": mesh_device.get_num_devices(),
                        "model": size,
                        "precision": name,
                        "rows": n,
                        "position": position,
                        "layers": config.num_hidden_layers,
                        "layer": dataclasses.astuple(layer),
                        "outside": dataclasses.astuple(one[n, position] + -1 * layer),
                    }
                )
    return entries


def round_entries(board: str, mesh_device, draft_lengths: Sequence[int] = DRAFT_LENGTHS) -> list[dict]:
    """Programs of a fused round beside its forwards: joining, comparing and counting ids, moving positions on."""
    from models.board_mock import graph
    from models.ttnn_llama.device.runner import Runner
    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.programs.fused import FusedRound
    from models.ttnn_llama.weights.tensors import EmptySource

    config = dataclasses.replace(named_config("1B"), num_hidden_layers=1)
    runner = Runner(mesh_device, trace=False)
    target, draft = (
        TtnnLlama(
            config,
            mesh_device,
            EmptySource(mesh_device),
            precision=precision_named("performance"),
            max_seq_len=256,
            runner=runner,
        )
        for _ in range(2)
    )
    fused = FusedRound(target, draft)

    def programs(function) -> int:
        function()  # makes the buffers that stay
        return len(graph.capture(function))

    entries = []
    for k in draft_lengths:
        target.prepare("ids", k + 1)
        parts = [programs(lambda n=n: target.greedy([1] * n, 128)) for n in (2, 1, k + 1)]
        fused.prepare(k)
        whole = programs(lambda k=k: fused.run([1, 2], 128, k))
        entries.append(
            {
                "board": board,
                "chips": mesh_device.get_num_devices(),
                "draft_length": k,
                "programs": whole - parts[0] - (k - 1) * parts[1] - parts[2],
            }
        )
    return entries


def capture_here(board: str, own_chip: bool, sizes, precisions, rows, positions) -> dict:
    """Counts of one board in this process, which must be on its mock: forwards, and fused rounds where chips are
    shared."""
    with open_mesh(board_named(board), trace_region_bytes=0, own_chip_for_draft=own_chip) as meshes:
        different = {mesh.get_num_devices(): mesh for mesh in (meshes.draft, meshes.target)}
        entries = [
            entry
            for mesh in different.values()
            for entry in forward_entries(board, mesh, sizes, precisions, rows, positions)
        ]
        rounds = [] if own_chip else round_entries(board, meshes.target)
    return {"forwards": entries, "rounds": rounds}


def capture(
    boards: Sequence[str] = tuple(BOARDS),
    sizes: Sequence[str] = SIZES,
    precisions: Sequence[str] = tuple(PRECISIONS),
    rows: Sequence[int] = ROWS,
    positions: Sequence[int] = POSITIONS,
    progress=lambda text: None,
) -> dict:
    """Counts of boards, each in a process of its own on its mock. Needs ttnn; raises RuntimeError with what failed."""
    from models.cli.environment import versions

    counts = {"forwards": [], "rounds": []}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "counts.json")
        for board in boards:
            for own_chip in (False, True)[: 1 + (BOARDS[board].chips > 1)]:
                progress(f"counting on a mock {board}{', a chip for the draft' * own_chip}")
                command = [sys.executable, "-m", "scripts.planner.capture", board, "--json", str(file)]
                command += ["--own-chip"] * own_chip + ["--sizes", *sizes, "--precisions", *precisions]
                command += ["--rows", *map(str, rows), "--positions", *map(str, positions)]
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                if done.returncode:
                    raise RuntimeError(f"counting on {board} failed:\n{done.stdout}")
                found = json.loads(file.read_text())
                for kind, entries in counts.items():
                    entries += found[kind]
    return {**counts, "ttnn": versions()["ttnn"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("board", choices=list(BOARDS))
    parser.add_argument("--own-chip", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--positions", nargs="+", type=int, default=list(POSITIONS))
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    cluster.activate(options.board)
    found = capture_here(
        options.board, options.own_chip, options.sizes, options.precisions, options.rows, options.positions
    )
    Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
