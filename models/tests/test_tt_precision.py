"""Precisions: known by name, and sized as ttnn's tiles are."""

import subprocess
import sys

import pytest

from models.errors import UserError
from models.ttnn_llama.weights.precision import PRECISIONS, bytes_per_value, precision_named, tile_bytes

FORMATS = ("bf16", "bfp8", "bfp4")
MATRICES = ("attention", "gate_up", "down", "head")


@pytest.mark.parametrize("name", ["bf16", "accuracy", "performance", "bfp4"])
def test_a_precision_is_found_by_its_name(name):
    assert precision_named(name).name == name


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'fp8': use one of bf16, accuracy, performance, bfp4"):
        precision_named("fp8")


def test_every_precision_uses_known_formats_and_fidelities():
    for precision in PRECISIONS.values():
        assert {getattr(precision, name) for name in (*MATRICES, "kv_cache")} <= set(FORMATS)
        fidelities = {precision.fidelity, precision.gate_up_fidelity, precision.head_fidelity}
        assert fidelities <= {"HiFi4", "HiFi2", "LoFi"}


def test_lofi_is_used_for_bfp4_alone_because_it_drops_bits_of_wider_formats():
    for precision in PRECISIONS.values():
        uses = [
            (precision.attention, precision.fidelity),
            (precision.down, precision.fidelity),
            (precision.gate_up, precision.gate_up_fidelity),
            (precision.head, precision.head_fidelity),
        ]
        assert all(format == "bfp4" for format, fidelity in uses if fidelity == "LoFi"), precision.name


def test_each_precision_is_smaller_than_the_one_before():
    sizes = [sum(bytes_per_value(getattr(p, name)) for name in MATRICES) for p in PRECISIONS.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


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
