"""Precisions: known by name, and sized as ttnn's tiles are."""

import dataclasses
import subprocess
import sys

import pytest

from models.errors import UserError
from models.llama.config import named_config
from models.options import EngineOptions
from models.ttnn_llama.weights.precision import (
    PRECISIONS,
    bytes_per_value,
    default_precision,
    precision_named,
    tile_bytes,
)

FORMATS = ("bf16", "bfp8", "bfp4")
MATRICES = ("attention", "gate_up", "down", "head")


@pytest.mark.parametrize("name", ["bf16", "accuracy", "performance", "lofi", "bfp4"])
def test_a_precision_is_found_by_its_name(name):
    assert precision_named(name).name == name


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'fp8': use one of bf16, accuracy, performance, lofi, bfp4"):
        precision_named("fp8")


def test_every_precision_uses_known_formats_and_fidelities():
    for precision in PRECISIONS.values():
        assert {getattr(precision, name) for name in (*MATRICES, "kv_cache")} <= set(FORMATS)
        fidelities = {getattr(precision, f"{name}_fidelity") for name in MATRICES}
        assert fidelities <= {"HiFi4", "HiFi2", "LoFi"}


def test_bits_of_weights_are_dropped_in_the_precision_named_for_it_alone():
    for precision in PRECISIONS.values():
        uses = [(getattr(precision, name), getattr(precision, f"{name}_fidelity")) for name in MATRICES]
        drops = [format for format, fidelity in uses if fidelity == "LoFi" and format != "bfp4"]
        assert bool(drops) == (precision.name == "lofi"), precision.name


def test_lofi_has_the_formats_of_performance_and_another_arithmetic():
    lofi, performance = PRECISIONS["lofi"], PRECISIONS["performance"]
    changed = {
        field.name
        for field in dataclasses.fields(lofi)
        if getattr(lofi, field.name) != getattr(performance, field.name)
    }
    assert changed == {"name", "attention_fidelity", "down_fidelity"}


def test_each_precision_is_smaller_or_faster_than_the_one_before():
    cost = [
        (
            sum(bytes_per_value(getattr(p, name)) for name in MATRICES),
            sum(getattr(p, f"{name}_fidelity") != "LoFi" for name in MATRICES),
        )
        for p in PRECISIONS.values()
    ]
    assert cost == sorted(cost, reverse=True) and len(set(cost)) == len(cost)


@pytest.mark.parametrize(("size", "expected"), [("1B", "accuracy"), ("3B", "performance"), ("8B", "performance")])
def test_a_small_target_is_not_put_into_bfp4_unless_asked_for(size, expected):
    default = default_precision(named_config(size).hidden_size)
    chosen = EngineOptions(device="tt").resolved("model", default)
    assert (chosen.precision, chosen.draft_precision) == (expected, "performance")
    asked = EngineOptions(device="tt", precision="lofi").resolved("model", default)
    assert (asked.precision, asked.draft_precision) == ("lofi", "lofi")
    draft = EngineOptions(device="tt", draft_precision="bfp4").resolved("model", default)
    assert (draft.precision, draft.draft_precision) == (expected, "bfp4")


def test_block_formats_pay_for_one_exponent_per_sixteen_values():
    for format, bits in (("bfp8", 8), ("bfp4", 4)):
        assert tile_bytes(format) == 1024 * bits // 8 + 1024 // 16
        assert bytes_per_value(format) == tile_bytes(format) / 1024
    assert bytes_per_value("bf16") == 2


def test_precisions_and_plans_are_there_without_importing_ttnn():
    modules = ("shapes", "weights.precision", "weights.memory", "programs.options", "programs.needed")
    names = ", ".join(f"models.ttnn_llama.{module}" for module in modules)
    code = f"import sys, {names}; sys.exit('ttnn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
