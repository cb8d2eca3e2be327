"""Linear layers for the torch models: one stored copy of each weight, in the form that runs fastest.

A forward of a few rows is bound by reading weights. Plain `F.linear` has a fast kernel for one row and a slower one
from two rows on (1.3x to 1.8x in bf16, more in fp32), which would make verification dearer than decoding for no good
reason. Weights packed once into oneDNN's blocked layout cost about the same for 1 to 8 rows, in bf16 and in fp32
(`scripts/benchmark.py verify-cost` measures it).

Every class here is a callable `linear(x [rows, in]) -> [rows, out]` with `.bytes`, the memory its weight holds, and
`.form`, what beside type and size a choice of kernels can go by.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F

_MKLDNN, _ONEDNN = torch.ops.mkldnn, torch.ops.onednn


class Linear(Protocol):
    """A linear layer in any form."""

    bytes: int
    form: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] -> [n, out]."""
        ...


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch build and CPU can run packed weights of `dtype`: tried on one small matrix, not guessed.

    The operators have underscore names (Inductor's own building blocks), so another torch version may lack them.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = torch.eye(32, dtype=dtype)
        rows = torch.arange(64.0).reshape(2, 32).to(dtype)
        return torch.equal(PackedLinear(weight, rows=2)(rows), rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def sums_beside(dtype: torch.dtype) -> bool:
    """Whether kernels on this CPU sum products of `dtype` in fp32 beside the result: those of bf16, where it has no
    instructions for them (seen with oneDNN)."""
    able = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return dtype is torch.bfloat16 and not any(each and each() for each in able)


class PlainLinear:
    """`F.linear` on a row-major weight [out, in]: CUDA, fp16, and the fallback on CPU."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.bytes, self.form = weight.nbytes, weight.data_ptr() % 64

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PackedLinear:
    """A weight [out, in] reordered once into the blocked layout oneDNN prefers for `rows` rows (CPU, bf16 or fp32)."""

    def __init__(self, weight: torch.Tensor, rows: int):
        self.weight = _MKLDNN._reorder_linear_weight(weight.contiguous(), rows)
        self.bytes, self.form = weight.nbytes, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _MKLDNN._linear_pointwise(x, self.weight, None, "none", [], "")


class PairedLinear:
    """A linear that computes a single row twice, side by side, so that it has the bits that it has among others."""

    def __init__(self, linear: Linear):
        self.linear, self.bytes, self.form = linear, linear.bytes, linear.form

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat((x, x)))[:1] if len(x) == 1 else self.linear(x)


class Int8Linear:
    """Weight [out, in] in int8 with one scale for each output, rows quantised to 8 bits as they come (fp32 in and out;
    CPU).

    Half the bytes of bf16. Every row has a scale of its own and products are summed as integers, so the bits of a row
    do not depend on the rows beside it.
    """

    ZERO = 128  # of rows: kernels want them unsigned

    def __init__(self, weight: torch.Tensor, rows: int):
        weight = weight.float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        quantised = (weight / scales[:, None]).round_().to(torch.int8)
        self.weight = _ONEDNN.qlinear_prepack(quantised, [rows, weight.shape[1]])
        self.scales = scales / 127  # a row's largest value becomes 127
        self.zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.one, self.zero = torch.tensor(1.0), torch.tensor(self.ZERO)
        self.rounding = torch.tensor(self.ZERO + 0.5)
        self.bytes, self.form = weight.numel() + 8 * weight.shape[0], rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).clamp_min_(1e-20)
        rows = torch.addcmul(self.rounding, x, 127 / largest).to(torch.uint8)
        y = _ONEDNN.qlinear_pointwise.tensor(
            rows,
            self.one,
            self.zero,
            self.weight,
            self.scales,
            self.zeros,
            None,  # bias
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y.mul_(largest)


@functools.cache
def int8_works() -> bool:
    """Whether this torch build and CPU multiply int8 weights: tried on one small matrix, not guessed."""
    try:
        weight = torch.eye(32)
        rows = torch.arange(64.0).reshape(2, 32)
        return torch.allclose(Int8Linear(weight, rows=2)(rows), rows, rtol=0.01, atol=0.3)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
