"""What the machine can do at best: bytes read per second, floating-point operations per second, free memory."""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.memory import free_bytes
from models.torch_llama.linear import PackedLinear, packing_works

READ_BYTES = 2**29  # far more than any cache holds
GEMM_SIDE = 2048
ROUNDS = 5


def available_bytes() -> int:
    """Memory that a process can still take without swapping; all there is where the system does not tell."""
    free = free_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free


def read_bandwidth(device: str = "cpu", size: int = READ_BYTES) -> float:
    """Bytes per second that torch's threads read: the best of summing a large tensor and of products of one row with a
    large bf16 matrix, as decoding does them, several times each."""
    best = size / best_seconds(torch.ones(size // 4, device=device).sum)
    side = 2 ** ((size // 2).bit_length() // 2)
    weight = torch.ones(size // 2 // side, side, dtype=torch.bfloat16, device=device)
    row = torch.ones(1, side, dtype=weight.dtype, device=device)
    product = linear(weight, rows=1)
    return max(best, weight.nbytes / best_seconds(lambda: product(row)))


def gemm_flops(dtype: torch.dtype, device: str = "cpu", side: int = GEMM_SIDE) -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    product = linear(torch.ones(side, side, dtype=dtype, device=device), rows=side)
    x = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / best_seconds(lambda: product(x))


def linear(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with a weight in the form that the models use."""
    if weight.device.type == "cpu" and packing_works(weight.dtype):
        return PackedLinear(weight, rows)
    return lambda x: F.linear(x, weight)


def best_seconds(run: Callable[[], torch.Tensor], rounds: int = ROUNDS) -> float:
    """The shortest of several runs, after one that prepares; `run` gives a tensor, which is waited for."""
    run().flatten()[0].item()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run().flatten()[0].item()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
