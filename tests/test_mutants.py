"""Mutants stay what they are, faults that apply to the sources and name tests that there are; and some are run."""

import dataclasses
import json

import pytest

from models.errors import UserError
from scripts import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_is_python(mutant):
    sound = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    broken = mutant.applied(sound)
    assert broken != sound
    compile(broken, mutant.file, "exec")
    for test in mutant.tests:
        assert (mutants.ROOT / test.partition("::")[0]).is_file()


def test_there_are_many_and_each_has_a_name():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 36


def test_a_text_that_is_not_there_is_told():
    with pytest.raises(UserError, match="occurs 0 times"):
        mutants.MUTANTS[0].applied("nothing")


QUICK = next(mutant for mutant in mutants.MUTANTS if mutant.name == "seed-shared")
HARMLESS = dataclasses.replace(QUICK, name="harmless", new='f"{self.seed}:{stream}"')  # another stream, as good


def test_a_fault_is_caught_a_harmless_change_survives_and_both_are_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mutants, "MUTANTS", (QUICK, HARMLESS))
    file = tmp_path / "mutants.json"
    assert mutants.command(["--json", str(file)]) == 1
    caught, survived = json.loads(file.read_text())["mutants"]
    assert (caught["name"], caught["verdict"]) == (QUICK.name, mutants.CAUGHT)
    assert caught["by"] == ["models/tests/test_sampling.py::test_streams_repeat_and_differ_by_seed_and_name"]
    assert (survived["name"], survived["verdict"], survived["by"]) == (HARMLESS.name, mutants.SURVIVED, [])
    assert "1 of 2 mutants were caught" in capsys.readouterr().out

    tried = []
    monkeypatch.setattr(mutants, "check_sound", lambda test, copy: None)
    monkeypatch.setattr(mutants, "tried", lambda mutant, copy: tried.append(mutant.name) or survived)
    assert mutants.command(["--resume", str(file)]) == 1
    assert tried == [HARMLESS.name]  # what was caught is taken over, what survived is tried again


def test_results_of_another_fault_are_not_taken_over(monkeypatch, tmp_path):
    file = tmp_path / "mutants.json"
    result = {"name": QUICK.name, "verdict": mutants.CAUGHT, "digest": QUICK.digest}
    file.write_text(json.dumps({"mutants": [result]}))
    assert list(mutants.before(str(file))) == [QUICK.name]
    monkeypatch.setattr(mutants, "MUTANTS", (dataclasses.replace(QUICK, new="0"),))
    assert mutants.before(str(file)) == {}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"mutants": [1]}'])
def test_a_file_without_results_cannot_be_resumed(tmp_path, content):
    file = tmp_path / "mutants.json"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match="holds no results of mutants"):
        mutants.before(str(file))


def test_tests_that_fail_on_the_unbroken_sources_are_refused(tmp_path):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    with pytest.raises(UserError, match="test_red.py::test_red fails on the unbroken sources"):
        mutants.check_sound("test_red.py", tmp_path)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="there is no mutant 'oracle': choose from accept-greedy, "):
        mutants.command(["--only", "oracle"])


def test_those_of_the_documents_were_caught(tally):
    """As they are now; one that was changed or added since is left to be tried."""
    recorded = json.loads((mutants.ROOT / "docs/results/mutants.json").read_text())["mutants"]
    results = {each["name"]: each for each in recorded}
    for mutant in mutants.MUTANTS:
        result = results.get(mutant.name)
        if result is None or result["digest"] != mutant.digest:
            tally["mutants untried"] += 1
            continue
        assert result["verdict"] == mutants.CAUGHT
        tally["mutants caught"] += 1
    assert tally["mutants caught"] >= 25
