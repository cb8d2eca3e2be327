"""docs/kernels.md speaks of every operation that a program of ours runs, on every board."""

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest

from models.board_mock import graph
from models.llama.config import named_config
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.programs.fused import FusedRound
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
        for k in (4, 13):  # 13: rows are filled up
            rounds.prepare(k)

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

        everything()  # makes buffers and programs
        return {(op.operation, op.factory) for op in graph.capture(everything)}


def test_every_operation_of_every_program_is_on_the_page(ran):
    assert ran - named_on_the_page() == set()


def test_the_page_names_what_runs(ran):
    """Nearly all operations run on every board; what does not is named with its boards."""
    text = PAGE.read_text()
    elsewhere = {(op, factory) for op, factory, where in rows_of(text) if re.search(r"N150|N300|T3K|P150|P300", where)}
    assert named_on_the_page() - elsewhere - ran == set()


def rows_of(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r"^\| (\w+Operation) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
