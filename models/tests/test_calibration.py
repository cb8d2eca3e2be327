"""How many rows are padded for nothing: measured once for a machine and a model, and kept."""

import json

import pytest
import torch

from models import LLM, loading
from models.llama.config import named_config
from models.options import AUTO_LONGEST, FREE_ROWS, EngineOptions
from models.tests.llama_fixtures import tiny_config
from models.torch_llama import calibration
from models.torch_llama.calibration import PART_BYTES, ROWS, SINGLE, Calibration, calibrate, part_of
from models.torch_llama.model import TorchLlama

NEVER = [False] * 5  # matrices in which a single row has other bits than among others


def made(costs, rows_alike=False):
    """A calibration in which so many rows cost so much."""
    return Calibration(10.0, costs, dict.fromkeys(costs, 0.0), "2026-01-01", rows_alike)


@pytest.fixture
def odd_alone(monkeypatch):
    """Says which matrices give a single row other bits, as if it had been tried; None: rows are not alike."""
    return lambda odd: monkeypatch.setattr(TorchLlama, "_odd_alone", lambda self: odd)


@pytest.mark.parametrize(
    ("costs", "free"),
    [
        ({2: 1.0, 4: 1.01, 8: 1.02, 16: 1.021}, (1, 2, 4, 8)),
        ({2: 1.3, 4: 1.01, 8: 1.3}, (1, 4)),  # fewer rows may cost more
        ({2: 1.1, 8: 1.03}, (1,)),
        ({2: 0.9, 16: 0.98}, (1, 2, 16)),
    ],
)
def test_free_are_rows_that_cost_at_most_two_percent(costs, free):
    assert made(costs).free_rows == free


def test_what_may_be_free_is_free():
    """Equal bits are given up for a cost that is seen, not for noise."""
    assert Calibration(10.0, {4: 1.03, 5: 1.06}, {4: 0.02, 5: 0.02}, "2026-01-01").free_rows == (1, 4)


@pytest.mark.parametrize(
    ("odd", "timed"), [(None, ROWS), (NEVER, ()), ([True, *NEVER[1:]], (SINGLE,))], ids=["differ", "alike", "paired"]
)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_calibration_is_measured_once_and_kept(tmp_path, dtype, odd, timed, odd_alone, monkeypatch):
    odd_alone(odd)
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    monkeypatch.setattr(calibration, "CERTAIN", float("inf"))  # as of a quiet machine
    config, threads = tiny_config(), torch.get_num_threads()
    first = calibrate(config, dtype, 1, tmp_path)
    assert torch.get_num_threads() == threads
    assert first.rows_alike == (odd is not None)
    assert set(first.costs) == set(first.errors) == set(timed)
    if timed:
        assert min(first.costs.values()) > 0 and min(first.errors.values()) >= 0 and first.one_row_ms > 0
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured again"))
    assert calibrate(config, dtype, 1, tmp_path) == first
    for other in ((tiny_config(intermediate_size=96), dtype, 1), (config, "fp16", 1), (config, dtype, 2)):
        with pytest.raises(pytest.fail.Exception):
            calibrate(*other, tmp_path)


def test_what_a_busy_machine_says_is_not_kept_and_frees_no_rows(tmp_path, monkeypatch):
    """The baseline would be padded to rows that nobody knows the price of, for as long as the file lies there."""
    times = []

    def measure(*_):
        times.append(True)
        error = 0.7 if len(times) == 1 else 0.01
        return Calibration(580.0, dict.fromkeys(ROWS, 0.94), dict.fromkeys(ROWS, error), "2026-01-01")

    monkeypatch.setattr(calibration, "measure", measure)
    assert calibrate(tiny_config(), "bf16", 1, tmp_path).free_rows == (1,)
    for _ in range(2):
        assert calibrate(tiny_config(), "bf16", 1, tmp_path).free_rows == (1, *ROWS)
    assert len(times) == 2


def test_a_damaged_or_unwritable_cache_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda *_: made({2: 1.0}))
    most = '"one_row_ms": 1, "costs": {}, "errors": {}, "measured": ""'
    contents = ("", "[]", '{"one_row_ms": 1}', '{"one_row_ms": 1, "costs": {"x": 1}, "measured": ""}', f"{{{most}}}")
    for content in (*contents, f'{{{most}, "rows_alike": 3}}', f'{{{most}, "rows_alike": false}}'):
        calibrate(tiny_config(), "bf16", 1, tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_text(content)
        assert calibrate(tiny_config(), "bf16", 1, tmp_path) == made({2: 1.0})
        assert json.loads(file.read_text())["one_row_ms"] == 10.0
    (tmp_path / "file").touch()
    assert calibrate(tiny_config(), "bf16", 1, tmp_path / "file") == made({2: 1.0})


def test_a_part_is_as_much_of_a_model_as_caches_do_not_hold():
    for size in ("1B", "3B", "8B"):
        whole = named_config(size)
        part = part_of(whole)
        assert 0.5 * PART_BYTES < 2 * part.parameter_count < 3 * PART_BYTES
        layers, vocab = (part.num_hidden_layers / whole.num_hidden_layers, part.vocab_size / whole.vocab_size)
        assert vocab == pytest.approx(layers, rel=0.01)
    small = tiny_config()
    assert part_of(small).num_hidden_layers == small.num_hidden_layers
    assert part_of(small).vocab_size == small.vocab_size


@pytest.mark.parametrize(
    ("costs", "options", "fixed"),
    [
        ({4: 1.0, 6: 1.0, 7: 1.3, 8: 1.3, 16: 1.3}, {}, 6),
        ({4: 1.0, 6: 1.0, 7: 1.3, 8: 1.3, 16: 1.3}, {"num_draft_tokens": 6}, None),  # 7 rows
        ({4: 1.0, 6: 1.0, 7: 1.3, 8: 1.3, 16: 1.3}, {"num_draft_tokens": 4}, 6),  # 5 are not free
        ({16: 1.0}, {}, 16),
        ({2: 1.1, 16: 1.3}, {}, None),
        ({2: 1.1, 16: 1.3}, {"row_invariant": True}, FREE_ROWS),
        ({16: 1.0}, {"row_invariant": False}, None),
        ({16: 1.0}, {"dtype": "fp32"}, None),
        ({2: 1.1, 16: 1.3}, {"free_rows": (5,)}, 5),
    ],
)
def test_rows_are_padded_where_that_is_free(costs, options, fixed, monkeypatch):
    monkeypatch.setattr(loading, "calibrate", lambda *_: made(costs))
    resolved = loading.open_pair(EngineOptions(**options)).options
    assert resolved.fixed_rows == fixed
    if fixed and "num_draft_tokens" not in options:
        assert resolved.longest_draft == fixed - 1


@pytest.mark.parametrize(
    ("costs", "options", "invariant"),
    [
        ({}, {}, True),
        ({}, {"num_draft_tokens": 15}, True),  # nothing is padded, however many rows a verification has
        ({SINGLE: 1.01}, {}, True),
        ({SINGLE: 1.1}, {}, False),
        ({SINGLE: 1.1}, {"row_invariant": True}, True),
        ({}, {"row_invariant": False}, False),
        ({}, {"dtype": "fp32"}, False),
    ],
)
def test_rows_that_are_alike_are_not_padded(costs, options, invariant, monkeypatch):
    monkeypatch.setattr(loading, "calibrate", lambda *_: made(costs, rows_alike=True))
    resolved = loading.open_pair(EngineOptions(**options)).options
    assert (resolved.row_invariant, resolved.fixed_rows) == (invariant, None)
    assert resolved.longest_draft == (options.get("num_draft_tokens") or AUTO_LONGEST)


def test_a_second_row_in_some_matrices_is_taken_for_cheap_where_it_cannot_be_timed():
    assert Calibration(10.0, {SINGLE: 1.5}, {SINGLE: 0.3}, "2026-01-01", True).alike_for_nothing
    assert not Calibration(10.0, {SINGLE: 1.5}, {SINGLE: 0.01}, "2026-01-01", True).alike_for_nothing
    assert not made(dict.fromkeys(ROWS, 1.0)).alike_for_nothing


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_finds_other_bits_than_were_found_before_promises_nothing(odd_alone, monkeypatch):
    """The trial has fewer layers and tokens; the model tries its own matrices when it is loaded."""
    monkeypatch.setattr(loading, "calibrate", lambda *_: made({}, rows_alike=True))
    odd_alone(None)
    with LLM.load(max_seq_len=64) as llm:
        assert not llm.options.row_invariant and not llm.options.rows_alike
        assert not llm.target.model.row_invariant
    odd_alone(NEVER)
    with LLM.load(max_seq_len=64) as llm:
        assert llm.options.row_invariant and llm.target.model.row_invariant


def test_plain_decoding_by_itself_computes_the_same_rows(monkeypatch):
    monkeypatch.setattr(loading, "calibrate", lambda *_: made({5: 1.0}))
    rows = [loading.open_pair(EngineOptions(speculative=each)).options.fixed_rows for each in (True, False)]
    assert rows == [5, 5]
