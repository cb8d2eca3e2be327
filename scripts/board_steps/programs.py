"""Programs of several ops or chips: sums over links, replayed traces."""

import torch
import ttnn

from models.ttnn_llama.device.runner import Runner
from scripts.board_steps.bench import Bench, on_chips
from scripts.board_steps.record import Record

FIRST = 120  # of the replayed positions: from before the end of a chunk of 128 to behind it
VERIFIED = 5  # rows of the replayed forward


def sums(bench: Bench, record: Record) -> None:
    """Partial sums of all chips, added over the links, and the vocabulary's parts joined."""
    model, effort = bench.model, bench.effort
    chips, hidden = bench.board.chips, model.layout.hidden
    held = _on_each_chip(bench, torch.zeros(chips, 1, 32, hidden))
    runner = Runner(bench.mesh, trace=bench.board.traces)

    def added() -> ttnn.Tensor:
        return model.collectives.sum_rows(ttnn.interleaved_to_sharded(held, model.layout.residual))

    runner.add("sum", added)
    try:
        _sums(bench, record, runner, held, effort.sums, "eager")
        if bench.board.traces:
            runner.capture()
            runner.select("sum")
            _sums(bench, record, runner, held, effort.replayed_sums, "replayed")
        else:
            record.leave_out("1000 sums replayed from a trace", f"a {bench.board.medium} replays none")
    finally:
        runner.release()
    parts = _whole_numbers((chips, 1, 32, 64), seed=0)
    made = model.collectives.join_vocabulary(ttnn.untilize(_on_each_chip(bench, parts), use_multicore=True))
    for chip, found in enumerate(on_chips(made)):
        record.equal(f"parts joined on chip {chip}", found[0, 0].float(), torch.cat(list(parts[:, 0]), -1))


def _sums(bench: Bench, record: Record, runner: Runner, held: ttnn.Tensor, count: int, how: str) -> None:
    shape = (bench.board.chips, 1, 32, held.shape[-1])
    for number in range(count):
        values = _whole_numbers(shape, seed=number)  # few enough chips that bf16 holds their sums
        ttnn.copy_host_to_device_tensor(_on_each_chip(bench, values, device=False), held)
        for chip, found in enumerate(on_chips(runner.run("sum"))):
            record.equal(f"{how} sum {number + 1} on chip {chip}", found[0, 0].float(), values.sum(0)[0])


def _whole_numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def _on_each_chip(bench: Bench, values: torch.Tensor, device: bool = True) -> ttnn.Tensor:
    """[chips, 1, n, width]: to each chip its own [1, 1, n, width]."""
    return ttnn.from_torch(
        values.bfloat16(),
        dtype=ttnn.bfloat16,
        layout=ttnn.TILE_LAYOUT,
        mesh_mapper=ttnn.ShardTensorToMesh(bench.mesh, 0),
        **({"device": bench.mesh} if device else {}),
    )


def replays(bench: Bench, record: Record) -> None:
    """A forward of five rows replayed from a trace gives what it gives eagerly, past position 128."""
    model, runner = bench.model, bench.model.runner
    generator = torch.Generator().manual_seed(6)
    end = FIRST + bench.effort.replays
    tokens = torch.randint(0, model.vocab_size, (end + VERIFIED,), generator=generator).tolist()
    model.prefill(tokens[:FIRST])

    def forward(position: int) -> torch.Tensor:
        return model.forward(tokens[position : position + VERIFIED], position)

    key = model.prepare("logits", VERIFIED)
    eager = [forward(position) for position in range(FIRST, end)]
    runner.capture()
    runner.select(key)
    record.facts["replayed"] = runner.is_trace(key)
    for position, expected in zip(range(FIRST, end), eager, strict=True):
        record.equal(f"replay at position {position}", forward(position), expected)
    runner.release()
