"""Programs and traces of a tiny pair: what is compiled, what is captured when, what is allocated for it.

A mock cannot record a trace, but ttnn's graph capture without dispatch runs everything up to the recording.
"""

import contextlib
import dataclasses
import os

import pytest
import torch
import ttnn

from models.board_mock import cluster, graph
from models.boards import SLOW_DISPATCH_VARIABLE
from models.llama.head_config import HeadConfig
from models.speculative.model import Rows, Want
from models.tests.ttnn.model_fixtures import reduced
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.draft_head import TtnnHead
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.modules import rows
from models.ttnn_llama.modules.kept_states import Kept
from models.ttnn_llama.programs.fused import FusedRound
from models.ttnn_llama.programs.head_round import HeadRound
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import EmptySource

TRACES = cluster.has_board() and not os.environ.get(SLOW_DISPATCH_VARIABLE)


@pytest.fixture(scope="module")
def mesh(mesh_opener):
    return mesh_opener.open(parameters={"trace_region_size": 2**24})


class NotingRunner(Runner):
    """Notes what happens as (what, key); `run` and `compile` go through the programs themselves."""

    def __init__(self, mesh, **options):
        super().__init__(mesh, **options)
        self.noted = []

    def add(self, key, body):
        def noted_body():
            self.noted.append(("ran", key))
            return body()

        super().add(key, noted_body)

    def _capture(self, key):
        self.noted.append(("capture", key))
        super()._capture(key)

    def keys(self, what):
        return [key for noted, key in self.noted if noted == what]


class TinyPair:
    """Two models with one runner, and one program of each kind."""

    def __init__(self, mesh, trace=True):
        self.runner = NotingRunner(mesh, trace=trace)
        config = reduced("1B", mesh.get_num_devices(), layers=2)
        self.target, self.draft = (
            TtnnLlama(
                config,
                mesh,
                EmptySource(mesh),
                precision=precision_named("performance"),
                max_seq_len=128,
                runner=self.runner,
            )
            for _ in range(2)
        )
        self.fused = FusedRound(self.target, self.draft)
        self.programs = {
            "ids": self.target.prepare("ids", 1),
            "logits": self.target.prepare("logits", 5),
            "chain": self.draft.prepare_chain(2, 4),
            "round": self.fused.prepare(4),
            "tree": self.target.prepare("tree-ids", 8),
            "exit": self.target.first_layers(1).prepare_chain(1, 4),
        }
        shape = dataclasses.replace(config, rope_scaling=None, num_hidden_layers=1, tie_word_embeddings=False)
        self.head = TtnnHead(
            HeadConfig(shape, 768, config.hidden_size, (1, 2)),
            self.target,
            EmptySource(mesh),
            target_ids=torch.arange(768),
            precision=precision_named("performance"),
            max_seq_len=128,
        )
        self.head_rounds = HeadRound(self.head)
        self.programs |= {
            "kept": self.target.prepare("kept-ids", 5),
            "head rows": self.head.prepare("logits", 5),
            "head step": self.head.prepare("step", 1),
            "head reading": self.head.prepare("read", 5),
            "head chain": self.head.prepare_chain(4),
            "head round": self.head_rounds.prepare(4),
        }
        self.keys = list(self.programs.values())


@pytest.fixture
def pair(mesh):
    return TinyPair(mesh)


@contextlib.contextmanager
def recording(monkeypatch):
    """Where a trace can be captured; there the host must not write to the device, nor make an input.

    On a mock, yields a list that holds the nodes of the captured graph once the block has ended.
    """

    def forbidden(*args, **kwargs):
        raise AssertionError("the host writes to the device while a trace is captured")

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        for name in ("from_torch", "to_device", "copy_host_to_device_tensor", "zeros", "empty"):
            patch.setattr(ttnn, name, forbidden)
        patch.setattr(rows.RowInputs, "__init__", forbidden)
        nodes = []
        if cluster.is_mock():
            nodes = stack.enter_context(graph.recorded(ttnn.graph.RunMode.NO_DISPATCH))
        yield nodes


@pytest.fixture
def replays(monkeypatch):
    """What is replayed, which a mock cannot do."""
    replayed = []
    monkeypatch.setattr(ttnn, "execute_trace", lambda mesh, trace, **options: replayed.append(trace))
    return replayed


@pytest.fixture
def released(monkeypatch):
    """The traces that are given back."""
    real, traces = ttnn.release_trace, []

    def noted(mesh, trace):
        traces.append(trace)
        real(mesh, trace)

    monkeypatch.setattr(ttnn, "release_trace", noted)
    return traces


def captured_all(pair, monkeypatch):
    """Every program compiled, then captured, one after the other as on one chip."""
    pair.runner.compile()
    with recording(monkeypatch):
        for key in pair.keys:
            pair.runner._capture(key)


@pytest.mark.parametrize("kind", ["ids", "logits", "chain", "round", "tree", "exit"])
def test_every_kind_of_program_can_be_captured(pair, mesh, monkeypatch, kind):
    """Once it has run, a capture compiles no kernel, writes nothing to the device and makes no input."""
    key = pair.programs[kind]
    pair.runner.compile([key])
    assert pair.runner.keys("ran") == [key]
    compiled = mesh.num_program_cache_entries()
    with recording(monkeypatch) as nodes:
        pair.runner._capture(key)
    assert list(pair.runner._traces) == [key]
    assert mesh.num_program_cache_entries() == compiled
    if cluster.is_mock():
        ops = graph.device_ops(nodes)
        assert len(ops) > 10
        assert all(op.cache_hit for op in ops)


def test_a_compiled_program_finds_every_kernel(pair):
    """Its second run is all hits, so there is nothing left to compile within a capture."""
    pair.runner.compile()
    for key in pair.keys:
        ops = graph.capture(lambda key=key: pair.runner.run(key))
        assert len(ops) > 10
        assert all(op.cache_hit for op in ops)


@pytest.mark.key_boards
def test_capture_compiles_every_program_before_it_captures_one(pair, monkeypatch):
    """On one chip all become traces; on several none yet."""
    pair.runner.compile()
    pair.runner.noted.clear()
    with recording(monkeypatch):
        pair.runner.capture()
    several = pair.runner.one_at_a_time
    expected = [("ran", key) for key in pair.keys]
    if not several:
        expected += [step for key in pair.keys for step in (("capture", key), ("ran", key))]
    assert pair.runner.noted == expected
    assert list(pair.runner._traces) == ([] if several else pair.keys)


@pytest.mark.key_boards
def test_without_traces_nothing_is_captured(mesh):
    pair = TinyPair(mesh, trace=False)
    pair.runner.capture()
    pair.runner.select(pair.keys[0])
    assert pair.runner.keys("ran") == pair.keys
    assert pair.runner.keys("capture") == []
    assert pair.target.greedy([3], 5) is not None
    assert pair.runner.keys("ran")[len(pair.keys) :] == [pair.programs["ids"]]


def test_on_several_chips_only_one_trace_lives_at_a_time(pair, mesh, monkeypatch, released):
    pair.runner.compile()
    with recording(monkeypatch):
        if mesh.get_num_devices() == 1:
            pair.runner.capture()
            pair.runner.noted.clear()
            pair.runner.select(pair.keys[1])
            assert pair.runner.noted == []
            assert len(pair.runner._traces) == len(pair.keys)
            return
        for key in (pair.keys[0], pair.keys[3], pair.keys[0]):
            before = [trace for trace, _ in pair.runner._traces.values()]
            released.clear()
            pair.runner.select(key)
            assert released == before
            assert list(pair.runner._traces) == [key]
            pair.runner.select(key)
            assert released == before
        assert pair.runner.keys("capture") == [pair.keys[0], pair.keys[3], pair.keys[0]]


@pytest.mark.key_boards
def test_release_gives_every_trace_back_and_programs_run_again(pair, monkeypatch, released, replays):
    captured_all(pair, monkeypatch)
    traces = [trace for trace, _ in pair.runner._traces.values()]
    pair.runner.release()
    assert released == traces
    assert len(traces) == len(pair.keys)
    pair.runner.release()
    assert len(released) == len(traces)
    pair.runner.noted.clear()
    pair.target.greedy([3], 5)
    assert pair.runner.noted == [("ran", pair.programs["ids"])]
    assert replays == []


@pytest.mark.skipif(TRACES, reason="where there are no traces they are only noted")
def test_what_was_prepared_is_replayed_with_the_inputs_that_it_was_captured_with(pair, monkeypatch, replays):
    """Fewer rows or drafted tokens run in the program that has room for them: nothing is made after the capture."""
    captured_all(pair, monkeypatch)
    monkeypatch.setattr(rows.RowInputs, "__init__", lambda *args: pytest.fail("an input made after the capture"))
    pair.runner.noted.clear()
    calls = {
        "ids": [lambda: pair.target.greedy([3], 5)],
        "logits": [lambda n=n: pair.target.forward([3] * n, 5) for n in (2, 4, 5)],
        "chain": [lambda k=k: pair.draft.draft_greedy([3, 4], 5, k) for k in (1, 3, 4)],
        "round": [lambda k=k: pair.fused.run([3, 4], 5, k) for k in (1, 3, 4)],
        "tree": [lambda n=n: pair.target.greedy([3] * n, 5, [-1, *[0] * (n - 1)]) for n in (1, 3, 8)],
        "exit": [lambda k=k: pair.target.first_layers(1).draft_greedy([3], 5, k) for k in (1, 3, 4)],
    }

    def verified(call):
        """The call, after a verification of two rows at position 5."""
        pair.head.states(Kept(pair.head.kept, pair.head.kept.serial, None), range(2), 5)
        call()

    def stepped():
        pair.head._last, pair.head._last_row = 7, 1
        pair.head.forward([3], 8)

    calls |= {
        "kept": [lambda n=n: pair.target.extend([Rows(0, [3] * n, 5)], Want(taps=(1, 2))) for n in (1, 5)],
        "head rows": [lambda n=n: verified(lambda: pair.head.forward([3] * n, 6)) for n in (1, 2)],
        "head step": [lambda: verified(stepped)],
        "head reading": [lambda: verified(lambda: pair.head.read([3, 4], 6))],
        "head chain": [lambda k=k: verified(lambda: pair.head.draft_greedy([3, 4], 6, k)) for k in (1, 3, 4)],
        "head round": [lambda k=k: verified(lambda: pair.head_rounds.run([3] * 4, 4, k)) for k in (1, 4)],
    }
    monkeypatch.setattr(TtnnHead, "_on_host", lambda self, logits: torch.zeros(8, 768))
    monkeypatch.setattr(TtnnLlama, "read", staticmethod(lambda ids: [0] * 40))  # outputs of a trace not recorded
    monkeypatch.setattr(TtnnLlama, "_logits_of", lambda self, logits: [0] * 40)
    for kind, functions in calls.items():
        for function in functions:
            replays.clear()
            function()
            assert replays == [pair.runner._traces[pair.programs[kind]][0]]
    assert pair.runner.noted == []


@pytest.mark.key_boards
def test_more_than_two_tokens_are_read_by_a_forward_before_a_chain(pair, monkeypatch):
    """There are chains after one token and after two; a draft may be further behind."""
    pair.draft.prepare_chain(1, 4)
    read = pair.draft.prepare("ids", 32)
    pair.runner.noted.clear()
    for tokens in (3, 9, 32):
        pair.draft.draft_greedy([5] * tokens, 5, 4)
    assert pair.runner.keys("ran") == [read, pair.draft.prepare_chain(1, 4)] * 3


@pytest.mark.key_boards
def test_the_smallest_program_with_room_runs_but_a_trace_before_others(pair, monkeypatch, replays):
    """On several chips one trace has to serve all that it has rows for."""
    programs = {rows: pair.target.prepare("logits", rows) for rows in (1, 2, 8)}
    pair.runner.compile()
    pair.runner.noted.clear()
    for n in (1, 2, 3, 5, 6):
        pair.target.forward([3] * n, 5)
    five = pair.programs["logits"]
    assert pair.runner.keys("ran") == [programs[1], programs[2], five, five, programs[8]]
    with recording(monkeypatch):
        pair.runner._capture(five)
    monkeypatch.setattr(TtnnLlama, "_logits_of", lambda self, logits: [0] * 40)
    pair.runner.noted.clear()
    for n in (1, 2, 3, 5, 6):
        pair.target.forward([3] * n, 5)
    assert len(replays) == 4
    assert pair.runner.keys("ran") == [programs[8]]
    assert [pair.target.computed_rows("logits", n) for n in (1, 5, 6, 9)] == [5, 5, 8, 16]


@pytest.mark.key_boards
def test_the_same_key_is_registered_once(pair):
    ran = []
    pair.runner.add("mine", lambda: ran.append(1))
    pair.runner.add("mine", lambda: ran.append(2))
    pair.runner.run("mine")
    assert ran == [1]
    assert "mine" in pair.runner
    assert "another" not in pair.runner


@pytest.mark.key_boards
def test_preparing_again_makes_no_second_program_and_no_second_input(pair, monkeypatch):
    monkeypatch.setattr(rows.RowInputs, "__init__", lambda *args: pytest.fail("an input made twice"))
    count = len(pair.runner._bodies)
    again = [
        pair.target.prepare("ids", 1),
        pair.target.prepare("logits", 5),
        pair.draft.prepare_chain(2, 4),
        pair.fused.prepare(4),
        pair.target.prepare("tree-ids", 8),
        pair.target.first_layers(1).prepare_chain(1, 4),
        pair.target.prepare("kept-ids", 5),
        pair.head.prepare("logits", 5),
        pair.head.prepare("step", 1),
        pair.head.prepare("read", 5),
        pair.head.prepare_chain(4),
        pair.head_rounds.prepare(4),
    ]
    assert again == pair.keys
    assert len(pair.runner._bodies) == count


@pytest.mark.key_boards
def test_models_that_share_a_runner_have_keys_of_their_own(pair):
    assert pair.draft.prepare("ids", 1) != pair.target.prepare("ids", 1)
    assert pair.target.prepare("logits", 1) != pair.target.prepare("ids", 1)


@pytest.mark.key_boards
def test_a_program_added_after_the_capture_ends_all_traces(pair, monkeypatch, released, replays):
    """What it brings along would lie in memory that replays use."""
    captured_all(pair, monkeypatch)
    traces = [trace for trace, _ in pair.runner._traces.values()]
    pair.target.prepare("logits", 7)
    assert released == traces
    pair.target.forward([3] * 7, 5)
    assert pair.target.greedy([3], 5) is not None
    assert replays == []


@pytest.mark.key_boards
def test_a_program_that_fails_in_a_capture_leaves_no_capture_open(mesh, monkeypatch):
    runner = Runner(mesh, trace=True)
    ended, released = [], []
    monkeypatch.setattr(ttnn, "release_trace", lambda device, trace: released.append(trace))
    monkeypatch.setattr(ttnn, "begin_trace_capture", lambda *args, **options: "trace")
    monkeypatch.setattr(ttnn, "end_trace_capture", lambda device, trace, **options: ended.append(trace))
    runner.add("bad", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner._capture("bad")
    assert ended == ["trace"]
    assert released == ["trace"]
    assert runner._traces == {}


@pytest.mark.skipif(not TRACES, reason="neither a mock nor slow dispatch can replay a trace")
def test_a_replay_gives_what_the_program_gives(pair):
    """For the first board: all kinds of programs, twice, in turn, on other inputs."""
    calls = [
        ("ids", lambda i: pair.target.greedy([3 + i], 5 + i)),
        ("logits", lambda i: pair.target.forward([3, 4 + i], 5 + i).tolist()),
        ("chain", lambda i: pair.draft.draft_greedy([3 + i, 4], 5 + i, 4)),
        ("round", lambda i: pair.fused.run([3, 4 + i], 5 + i, 4)),
        ("tree", lambda i: pair.target.greedy([3, 4 + i, 5], 5 + i, [-1, 0, i])),
        ("exit", lambda i: pair.target.first_layers(1).draft_greedy([3 + i], 5 + i, 4)),
    ]
    expected = [[call(i) for _, call in calls] for i in range(2)]
    pair.runner.capture()
    for i in range(2):
        for (kind, call), result in zip(calls, expected[i], strict=True):
            pair.runner.select(pair.programs[kind])
            assert call(i) == result
    pair.runner.release()
