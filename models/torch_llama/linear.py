"""Linear layers for the torch models: one stored copy of each weight, in the form that runs fastest.

A forward of a few rows is bound by reading weights. Plain `F.linear` has a fast kernel for one row and a slower one
from two rows on (1.3x to 1.8x in bf16, more in fp32), which would make verification dearer than decoding for no good
reason. Weights packed once into oneDNN's blocked layout cost about the same for 1 to 8 rows, in bf16 and in fp32
(`scripts/benchmark.py verify-cost` measures it).

Every class here is a callable `linear(x [rows, in]) -> [rows, out]` with `.bytes`, the memory its weight holds.
"""

import warnings

import torch
import torch.nn.functional as F

_MKLDNN = torch.ops.mkldnn


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


class PlainLinear:
    """`F.linear` on a row-major weight [out, in]: CUDA, fp16, and the fallback on CPU."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PackedLinear:
    """A weight [out, in] reordered once into the blocked layout oneDNN prefers for `rows` rows (CPU, bf16 or fp32)."""

    def __init__(self, weight: torch.Tensor, rows: int):
        self.weight = _MKLDNN._reorder_linear_weight(weight.contiguous(), rows)
        self.bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _MKLDNN._linear_pointwise(x, self.weight, None, "none", [], "")


class Int8Linear:
    """Weight [out, in] in int8 with one scale per output, activations quantised per call (fp32 in, fp32 out; CPU).

    Half the bytes of bf16. It changes results, so it is for drafts only: a draft can never change the output.
    """

    def __init__(self, weight: torch.Tensor):
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / 127.0).clamp_min(1e-12).double()
        zeros = torch.zeros(weight.shape[0], dtype=torch.long)
        with warnings.catch_warnings():  # quantised tensors are deprecated, their onednn kernels still the fastest
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "onednn"
        try:
            self.weight = torch.ops.quantized.linear_prepack(quantised, None)
        finally:
            torch.backends.quantized.engine = engine
        self.bytes = weight.numel() + 8 * weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.weight, False)
