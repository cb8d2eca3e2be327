"""docs/kernels.md speaks of every operation that a program of ours runs, on every board; and claims of its that the
programs at full sizes show, without values."""

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import ttnn

from models.board_mock import graph
from models.llama.config import named_config
from models.llama.head_config import HeadConfig
from models.speculative.model import Rows, Want
from models.ttnn_llama.batch_model import BatchLlama, UserRows
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.draft_head import TtnnHead
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.modules.rows import FusedRowPlan, SeparateRowPlan
from models.ttnn_llama.programs.fused import FusedRound
from models.ttnn_llama.programs.head_round import HeadRound
from models.ttnn_llama.shapes import ROW_COUNTS
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import EmptySource

PAGE = Path(__file__).parents[3] / "docs/kernels.md"
CONTEXT, POSITION = 1600, 300


def named_on_the_page() -> set[tuple[str, str]]:
    """(operation, factory) of each row of the page's table."""
    return {(operation, factory) for operation, factory, _ in rows_of(PAGE.read_text())}


@pytest.fixture(scope="module")
def ran(mesh_opener):
    """(operation, factory) of everything that the programs of 8B run, with two layers, at full sizes."""
    config = dataclasses.replace(named_config("8B"), num_hidden_layers=2)
    with contextlib.nullcontext(mesh_opener.open()) as mesh:  # without values
        runner = Runner(mesh, trace=False)
        precision = precision_named("performance")
        model = TtnnLlama(config, mesh, EmptySource(mesh), precision=precision, max_seq_len=CONTEXT, runner=runner)
        rounds = FusedRound(model, model.first_layers(1))
        head = head_of(model, mesh)
        head_rounds = HeadRound(head)
        several = BatchLlama(config, mesh, EmptySource(mesh), precision=precision, max_seq_len=CONTEXT, slots=32)
        for k in (4, 13):  # 13: rows are filled up
            rounds.prepare(k)
            head_rounds.prepare(k)

        def everything():
            for length in (66, 1100):
                model.prefill([1] * length)
            for rows in (1, 5, 32):
                model.greedy([1] * rows, POSITION)
                model.greedy([1] * rows, POSITION, [-1, *[0] * (rows - 1)])
            for given in (1, 2):
                model.draft_greedy([1] * given, POSITION, 4)
            for k in (4, 13):
                rounds.run([1, 2], POSITION, k)
            for length in (66, 1100):
                head.warm_up([1] * length)
            for rows in (1, 5, 14):
                kept = model.extend([Rows(0, [1] * rows, POSITION)], Want(taps=head.taps)).features(0)
                for k in (4, 13):
                    head.states(kept, range(rows), POSITION)
                    head.read([1] * rows, POSITION + 1)
                    head.draft_greedy([1] * rows, POSITION + 1, k)
                head.forward([1] * rows, POSITION + 1)
                head.forward([1], POSITION + 1 + rows)
            for k in (4, 13):
                kept = model.extend([Rows(0, [1] * 3, POSITION)], Want(taps=head.taps)).features(0)
                head.states(kept, range(3), POSITION)
                head_rounds.run([1] * 4, POSITION, k)
            for length in (66, 1100):
                several.prefill([1] * length)
            for rows in (1, 5, 32):
                several.run("ids", [UserRows(slot, [1], POSITION) for slot in range(rows)])
            several.run("logits", [UserRows(slot, [1] * 4, POSITION) for slot in range(8)])
            several.draft_greedy([1, 1], POSITION, 4)

        everything()  # makes buffers and programs
        return {(op.operation, op.factory) for op in graph.capture(everything)}


def head_of(model, mesh):
    """A head of the published shape, with every option that ops depend on."""
    sizes = {"rope_scaling": None, "num_hidden_layers": 1, "tie_word_embeddings": False}
    layer = dataclasses.replace(model.config, bos_token_id=None, eos_token_ids=(), **sizes)
    config = HeadConfig(layer, 32000, layer.hidden_size, (0, 1, 2), fc_norm=True)
    ids, precision = torch.arange(32000), precision_named("performance")
    return TtnnHead(config, model, EmptySource(mesh), target_ids=ids, precision=precision, max_seq_len=CONTEXT)


def test_every_operation_of_every_program_is_on_the_page(ran):
    assert ran - named_on_the_page() == set()


def test_the_page_names_what_runs(ran):
    """Nearly all operations run on every board; what does not is named with its boards."""
    text = PAGE.read_text()
    elsewhere = {(op, factory) for op, factory, where in rows_of(text) if re.search(r"N150|N300|T3K|P150|P300", where)}
    assert named_on_the_page() - elsewhere - ran == set()


def rows_of(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r"^\| (\w+Operation) \| (\w+) \| (.*) \|$", text, re.MULTILINE)


def cores_of(*tensors):
    """Where the shards of each lie, in their order, one after another."""
    return [
        (core.x, core.y)
        for tensor in tensors
        for core in ttnn.corerange_to_cores(tensor.memory_config().shard_spec.grid, row_wise=True)
    ]


@pytest.mark.parametrize("size", ["3B", "8B"])
def test_cos_and_sin_lie_on_the_cores_of_q_and_k_in_their_order(mesh_opener, size, monkeypatch):
    """The kernel pairs them by core: in another order each row would be rotated by another row's angle."""
    config = dataclasses.replace(named_config(size), num_hidden_layers=1)
    mesh = mesh_opener.open()  # without values
    model = TtnnLlama(config, mesh, EmptySource(mesh), precision=precision_named("performance"), max_seq_len=256)
    seen = []
    for kind in (FusedRowPlan, SeparateRowPlan):
        real = kind.rotate

        def noted(self, q, k, tables, real=real):
            seen.append((self, cores_of(q, k) if self.lookups > self.rows else cores_of(q), tables))
            return real(self, q, k, tables)

        monkeypatch.setattr(kind, "rotate", noted)
    for rows in ROW_COUNTS:
        model.greedy([1] * rows, 40)
    assert [plan.rows for plan, _, _ in seen] == list(ROW_COUNTS)
    for plan, cores, tables in seen:
        assert all(cores_of(table) == cores for table in (*tables, plan.rotation))
