"""scripts/first_hour.py on a mock board: it runs to its end, says what it did not show, and stops at planted faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import ttnn

from models.board_mock import cluster
from models.boards import BOARDS, MOCK_VARIABLE, as_found
from models.errors import UserError
from models.tests.ttnn.model_fixtures import board
from models.ttnn_llama.modules.attend import CausalRows
from models.ttnn_llama.modules.linear import Linear
from models.ttnn_llama.modules.lm_head import LMHead
from models.ttnn_llama.modules.rows import RowPlan
from scripts import first_hour
from scripts.board_steps import programs, texts
from scripts.board_steps.bench import Bench
from scripts.board_steps.record import Record, Surprise
from scripts.board_steps.steps import Step, all_steps, never_shown

ROOT = Path(__file__).resolve().parents[3]
KERNELS = first_hour.STEPS[: first_hour.STEPS.index("text")]
ONLY_MOCK = pytest.mark.skipif(cluster.has_board(), reason="what is planted is planted in golden functions")
# Of the boards that are not N150: what is another program there, or another mesh.
PARTS = {"N300": ("rows", "text"), "T3K": ("cache", "text"), "P150": ("prefill", "rows")}


@pytest.fixture(scope="module")
def bench(mesh_opener, pytestconfig):
    with board(mesh_opener) as mesh, torch.no_grad():
        bench = Bench(as_found(BOARDS[pytestconfig.getoption("--board")]))
        bench.__dict__["mesh"] = mesh  # the tests' own, which stays open
        yield bench
        bench.close()


@pytest.fixture
def report(bench, tmp_path):
    return first_hour.Report(str(tmp_path / "report.json"), bench.board, not_shown=never_shown(bench.board))


def step_named(name):
    return next(step for step in all_steps(None, None) if step.name == name)


def written(report):
    report.write()
    return json.loads(Path(report.file).read_text())


# ------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.skipif(cluster.has_board(), reason="the script runs on a mock here")
def test_on_a_mock_it_runs_to_its_end_and_names_what_it_has_not_shown(mesh_opener, pytestconfig, tmp_path):
    mesh_opener.close()
    name = pytestconfig.getoption("--board")
    first, last = PARTS.get(name, (first_hour.STEPS[0], first_hour.STEPS[-1]))
    script = [str(ROOT / "scripts/first_hour.py"), "--report", "report.json", "--from", first, "--to", last]
    command = [sys.executable, "-m", "models.board_mock", name, *script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "report.json").read_text())
    results = {step["name"]: step["result"] for step in told["steps"]}
    asked = first_hour.STEPS[first_hour.STEPS.index(first) : first_hour.STEPS.index(last) + 1]
    not_shown = {"traces", "pair"} | ({"sums"} if BOARDS[name].chips == 1 else set())
    assert list(results) == first_hour.STEPS
    for step, result in results.items():
        expected = "as expected" if step not in not_shown else "not shown"
        assert result == (expected if step in asked else "not asked for"), step
    reasons = {each["what"]: each["why"] for each in told["not_shown"]}
    assert {
        "the arithmetic of kernels",
        "races between cores",
        "collectives over links",
        "replayed traces",
        "times",
    } <= set(reasons)
    assert all(f"not shown: {what}: " in done.stdout for what in ("times", "races between cores"))
    assert told["machine"]["board"] == name and told["machine"]["medium"] == "mock"
    assert told["versions"]["ttnn"] and told["uname"] and told["variables"][MOCK_VARIABLE]
    assert not {key for step in told["steps"] for key in step.get("facts", {}) if "tok/s" in key}


@pytest.mark.once
def test_steps_are_the_ones_that_the_command_line_knows():
    assert [step.name for step in all_steps("a", None)] == first_hour.STEPS


# ---------------------------------------------------------------------------------------------------- planted faults
def wrong_columns(monkeypatch):
    """Behind the first rows every width block holds the first one's values."""
    real = Linear.prefill_forward

    def forward(self, x):
        made = real(self, x)
        return made if x.shape[-2] <= 128 else ttnn.multiply(made, 0.0)

    monkeypatch.setattr(Linear, "prefill_forward", forward)


def exploding(monkeypatch):
    real = ttnn.transformer.chunked_scaled_dot_product_attention
    monkeypatch.setattr(
        ttnn.transformer,
        "chunked_scaled_dot_product_attention",
        lambda *args, **kwargs: ttnn.multiply(real(*args, **kwargs), 1e30),
    )


def rows_that_depend_on_each_other(monkeypatch):
    real = CausalRows.__call__

    def attend(self, q, cache, inputs):
        made = real(self, q, cache, inputs)
        return made if inputs.rows == 1 else ttnn.multiply(made, 1.01)

    monkeypatch.setattr(CausalRows, "__call__", attend)


def blind_to_far_positions(monkeypatch):
    real = CausalRows.__call__

    def attend(self, q, cache, inputs):
        made = real(self, q, cache, inputs)
        position = int(ttnn.to_torch(ttnn.get_device_tensors(inputs.positions)[0])[0])
        return ttnn.multiply(made, 0.0) if position > 128 else made

    monkeypatch.setattr(CausalRows, "__call__", attend)


def a_row_in_anothers_place(monkeypatch):
    """The last row of several is not written."""
    for plan in RowPlan.__subclasses__():

        def store(self, cache, k, v, inputs, real=plan.store):
            if inputs.rows == 1:
                return real(self, cache, k, v, inputs)
            places = ttnn.to_torch(ttnn.get_device_tensors(inputs.positions)[0]).tolist()
            inputs._set_places(places[:-1], places[:-1])
            real(self, cache, k, v, inputs)
            return inputs._set_places(places, places)

        monkeypatch.setattr(plan, "store", store)


def ids_of_16_bits(monkeypatch):
    real = LMHead.argmax

    def argmax(logits):
        found = real(logits)
        host = ttnn.to_torch(ttnn.get_device_tensors(found)[0]).to(torch.int32) & 0xFFFF
        return ttnn.from_torch(
            host,
            dtype=ttnn.uint32,
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=found.device(),
            mesh_mapper=ttnn.ReplicateTensorToMesh(found.device()),
        )

    monkeypatch.setattr(LMHead, "argmax", staticmethod(argmax))


FAULTS = {
    "linear": (wrong_columns, "384 rows"),
    "prefill": (exploding, "66 tokens"),
    "rows": (rows_that_depend_on_each_other, "position 100"),
    "decode": (blind_to_far_positions, "context 129"),
    "cache": (a_row_in_anothers_place, "8 rows from position 40"),
    "ids": (ids_of_16_bits, "argmax on chip 0"),
}


@pytest.mark.key_boards
@ONLY_MOCK
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_a_surprise_in_its_step(name, bench, report, monkeypatch):
    fault, where = FAULTS[name]
    fault(monkeypatch)
    step = step_named(name)
    assert first_hour.try_step(step, bench, report) is False
    told = written(report)
    (only,) = told["steps"]
    assert only["result"] == "surprise" and only["try"] == step.remedy and "traceback" not in only
    assert told["verdict"].startswith(f"surprise in step {name}: ") and "\n" not in told["verdict"]
    assert where in told["verdict"] and "expected" in told["verdict"] and told["verdict"].endswith(step.remedy)


@ONLY_MOCK
def test_a_wrong_sum_is_a_surprise(bench, report, monkeypatch):
    if bench.board.chips == 1:
        assert first_hour.try_step(step_named("sums"), bench, report) is True
        assert written(report)["steps"][0]["result"] == "not shown"
        return
    real = ttnn.all_reduce
    monkeypatch.setattr(ttnn, "all_reduce", lambda x, **options: ttnn.add(real(x, **options), 1.0))
    with pytest.raises(Surprise, match="eager sum 1 on chip 0"):
        programs.sums(bench, Record())


@pytest.mark.once
def test_another_text_than_the_targets_own_is_a_surprise():
    class Text:
        def __init__(self, *ids):
            self.token_ids = list(ids)

    record = Record()
    texts._check_same(record, "outputs", Text(1, 2, 3), Text(1, 2, 3))
    with pytest.raises(Surprise, match="identical texts, came another token at 2 of 3"):
        texts._check_same(record, "outputs", Text(1, 7, 3), Text(1, 2, 3))


@pytest.mark.once
def test_a_token_that_the_cpu_would_not_write_is_a_surprise():
    prompt = list(range(3, 20))
    with texts.LLM.load(texts.TARGET, dtype="fp32", speculative=False) as llm:
        own = llm.generate(prompt, max_new_tokens=3, stop_ids=(), speculate=False).token_ids
    texts._check_near_cpu(Record(), prompt, own)
    with pytest.raises(Surprise, match="token 2 after 17 tokens"):
        texts._check_near_cpu(Record(), prompt, [own[0], (own[1] + 1000) % 4096, own[2]])


# ------------------------------------------------------------------------------------------------------- the record
@pytest.mark.once
def test_numbers_that_are_none_are_a_surprise():
    nan = torch.full((2, 8), float("nan"))
    ones = torch.arange(16.0).view(2, 8)
    for call in (
        lambda r: r.close("x", nan, ones),
        lambda r: r.below("x", nan, 100.0),
        lambda r: r.equal("x", nan, nan),
    ):
        with pytest.raises(Surprise):
            call(Record())


@pytest.mark.once
def test_one_wrong_row_is_not_hidden_by_the_others():
    expected = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    made = expected.clone()
    Record().close("x", made, expected)
    made[17] = expected[18]
    with pytest.raises(Surprise, match="PCC"):
        Record().close("x", made, expected)


# -------------------------------------------------------------------------------------------- the report, and its end
def step_that(run):
    return Step("open", "something", "try nothing", run)


@pytest.mark.once
def test_the_report_says_which_step_was_under_way_when_the_board_hung(bench, report):
    seen = []
    first_hour.try_step(
        step_that(lambda bench, record: seen.append(json.loads(Path(report.file).read_text()))), bench, report
    )
    assert [step["result"] for step in seen[0]["steps"]] == ["began, and did not end"]
    assert seen[0]["verdict"] == "not complete"


@pytest.mark.once
def test_an_error_of_ttnn_is_a_surprise_of_one_line_and_its_traceback_is_in_the_report(bench, report):
    def failing(bench, record):
        raise RuntimeError("TT_FATAL @ /a/b.cpp:1: x\ninfo:\nno room in L1\nbacktrace:\n --- lib")

    assert first_hour.try_step(step_that(failing), bench, report) is False
    assert report.verdict == "surprise in step open: open: expected no error, came no room in L1: try nothing"
    assert "failing" in "".join(written(report)["steps"][0]["traceback"])


@pytest.mark.once
def test_an_interrupted_step_keeps_what_it_has_compared(bench, report):
    def interrupted(bench, record):
        record.equal("something", torch.ones(2), torch.ones(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_hour.try_step(step_that(interrupted), bench, report)
    (step,) = written(report)["steps"]
    assert step["result"] == "interrupted" and len(step["comparisons"]) == 1


@pytest.mark.once
@ONLY_MOCK
def test_after_a_surprise_nothing_else_is_run_and_the_exit_code_is_1(mesh_opener, monkeypatch, tmp_path, capsys):
    def surprising(bench, record):
        raise Surprise("a number", "1", "2")

    def never(bench, record):
        pytest.fail("a step after a surprise was run")

    planted = [Step("open", "one", "try this", surprising), Step("linear", "two", "try that", never)]
    monkeypatch.setattr("scripts.board_steps.steps.all_steps", lambda target, draft: planted)
    file = tmp_path / "report.json"
    assert first_hour.command(["--report", str(file)]) == 1
    told = json.loads(file.read_text())
    assert [step["name"] for step in told["steps"]] == ["open"]
    assert "surprise in step open: a number: expected 1, came 2: try this\n" in capsys.readouterr().out


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "text", "--to", "open"], "--from text comes after --to open"),
        (["--draft", "a"], "--draft a drafts for a target"),
        (["--from", "nothing"], "invalid choice"),
        (["--report", "/nowhere/at/all.json"], "cannot write --report"),
        (["--simulator", "/nowhere"], "this process has a mock board already"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, said):
    with pytest.raises(UserError) as caught:
        first_hour.command(arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)
