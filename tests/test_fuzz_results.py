"""A damaged results file is read or refused in one line by whatever reads it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.results import RunResults
from models.tests.fuzzing import damaged_json, fuzzed, read_or_refused

RECORDED = json.loads((Path(__file__).parents[1] / "docs" / "results" / "demo-embedded-pair.json").read_text())


@fuzzed
@given(st.data())
def test_results(tally, data):
    values = {**RECORDED, "prompts": RECORDED["prompts"][:1]}
    results = read_or_refused(tally, lambda: RunResults.from_dict(data.draw(damaged_json(values))))
    assert results is None or results.prompts is not None


@pytest.mark.parametrize("values", [None, [], "", 3, {}, {"prompts": None}])
def test_results_of_another_shape(values, tally):
    assert read_or_refused(tally, lambda: RunResults.from_dict(values)) is None
