"""The typed results of a demo run are what its JSON file holds."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest

import demo.results
from demo.results import RunResults, without_times
from models.errors import UserError

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "demo-embedded-pair.json"


@pytest.fixture
def written():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_a_recorded_run_is_read_back_whole_and_in_order(written):
    read = RunResults.from_dict(written)
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(written)
    assert read.speculative.sources["lookup"].accepted == 109
    assert list(read.totals) == list(read.prompts[3].runs) == ["baseline", "speculative"]


def test_a_board_says_what_each_chip_holds(written):
    per_chip = {"chips": 2, "weight_bytes_per_chip": 7, "kv_cache_bytes_per_chip": 8}
    written["memory"]["target"] |= per_chip
    read = RunResults.from_dict(written)
    assert (read.memory.target.chips, read.memory.target.weight_bytes_per_chip) == (2, 7)
    assert dataclasses.asdict(read) == written


def test_the_runs_of_an_interrupted_prompt_are_read_by_their_keys(written):
    row = written["prompts"][0]
    written["partial"] = [row["baseline"], row["speculative"]]
    read = RunResults.from_dict(written)
    assert [type(run).__name__ for run in read.partial] == ["TextResults", "SpeculativeTextResults"]
    assert dataclasses.asdict(read) == written


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("speculative", "rounds"), "many", "run.json.speculative.rounds is 'many', not a whole number"),
        (("speculative", "rounds"), 1.5, "speculative.rounds is 1.5, not a whole number"),
        (("speculative", "rounds"), True, "speculative.rounds is True, not a whole number"),
        (("speculative", "rounds"), None, "speculative.rounds is None, not a whole number"),
        (("speedup",), "3x", "speedup is '3x', not a number"),
        (("interrupted",), 0, "interrupted is 0, not true or false"),
        (("prompts",), {}, "prompts is {}, not a list"),
        (("prompts", 3, "prompt_ids", 2), "x", "prompts[3].prompt_ids[2] is 'x', not a whole number"),
        (("memory",), [], "memory is [], not an object"),
        (("controller", "acceptance", "model"), 0.5, "controller.acceptance.model is 0.5, not a list"),
        (("memory", "target", "chip"), 1, "memory.target has an unknown key chip"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(written, where, value, message):
    holder = written
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    with pytest.raises(UserError, match=re.escape(message)) as error:
        RunResults.from_dict(written, "run.json")
    assert "\n" not in str(error.value) and str(error.value).endswith("write it with demo/simple_text_demo.py --json")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((), "results has no key speedup"),
        (("speculative",), "results.speculative has no key rounds"),
        (("prompts", 2, "baseline"), "results.prompts[2].baseline has no key text"),
    ],
)
def test_a_missing_key_is_named_in_one_line(written, where, message):
    holder = written
    for key in where:
        holder = holder[key]
    del holder[message.split()[-1]]
    with pytest.raises(UserError, match=re.escape(message)):
        RunResults.from_dict(written)


def test_a_list_is_no_run():
    with pytest.raises(UserError, match=re.escape("results is [], not an object")):
        RunResults.from_dict([])


def test_without_times_counts_stay_and_the_file_can_be_read_back(written):
    before = copy.deepcopy(written)
    left = dataclasses.asdict(without_times(RunResults.from_dict(written)))
    assert written == before
    assert dataclasses.asdict(RunResults.from_dict(left)) == left
    spec = left["speculative"]
    assert (spec["rounds"], spec["acceptance_rate"], left["outputs_identical"]) == (84, 0.5652173913043478, True)
    for results in (left["baseline"], spec, left["prompts"][4]["speculative"]):
        assert {results[name] for name in ("ttft_ms", "tok_s_user", "decode_s")} == {None}
    assert {left["prompts"][4]["speedup"], left["controller"]["break_even"], left["controller"]["draft_ms"]} == {None}
    assert left["controller"]["lengths"] == [0, 1, 2, 3, 4, 5, 6]


def test_every_field_named_like_a_time_is_marked_as_one():
    kinds = [kind for kind in vars(demo.results).values() if dataclasses.is_dataclass(kind)]
    fields = {(kind.__name__, field.name): field for kind in kinds for field in dataclasses.fields(kind)}
    named = {key for key in fields if re.fullmatch(r".*_(s|ms)|tok_s_user|host_share|speed_?up.*|break_even", key[1])}
    assert len(named) > 40
    assert {key for key in named if not fields[key].metadata.get("time")} == set()
