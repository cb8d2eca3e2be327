"""Memory of this machine: what is free, and zeros that take it only where they are written."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
PAGE = mmap.PAGESIZE


def free_bytes(device: torch.device | str = "cpu", cgroup: Path = CGROUP) -> int | None:
    """Bytes that a process could still take on a device; None where that cannot be told.

    On the CPU what the kernel calls available, or what is left of a container's limit if that is less; pages of files
    count as free in both. On CUDA what torch keeps for itself without using it is free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    except (OSError, ValueError):
        return None
    known = [each for each in (free, *(_left(cgroup, *version) for version in _CGROUPS)) if each is not None]
    return max(0, min(known)) if known else None


# Of cgroups' versions 2 and 1: a folder, files with the limit and what is used, what numbers of the whole group begin
# with.
_CGROUPS = (
    (".", "memory.max", "memory.current", ""),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def _left(cgroup: Path, folder: str, limit: str, usage: str, prefix: str) -> int | None:
    """What is left of a container's limit; None where there is none, or another version of cgroups."""
    try:
        used = int((cgroup / folder / usage).read_text())
        stat = dict(line.split() for line in (cgroup / folder / "memory.stat").read_text().splitlines())
        most = int((cgroup / folder / limit).read_text())
        most = min(most, int(stat.get("hierarchical_memory_limit", most)))
        return most - used + sum(int(stat.get(f"{prefix}{each}active_file", 0)) for each in ("", "in"))
    except (OSError, ValueError):  # "max" is no number
        return None


class LazyZeros:
    """A tensor of zeros. On the CPU of a Linux machine it takes memory page by page as it is written, and gives it
    back; elsewhere it takes all of it at once.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: where it lies.

    Attributes:
        tensor: row-major. It must not outlive this object.
        lazy: whether memory is taken as it is written.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        nbytes = prod(shape) * dtype.itemsize
        self.lazy = torch.device(device).type == "cpu" and sys.platform == "linux" and nbytes > 0
        if self.lazy:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.tensor = torch.frombuffer(self._map, dtype=dtype).view(*shape)
        else:
            self.tensor = torch.zeros(*shape, dtype=dtype, device=device)

    def clear(self, dim: int, start: int, stop: int) -> None:
        """Make start..stop-1 of a dimension zeros again, and give back the whole pages among them."""
        shape = self.tensor.shape
        row = prod(shape[dim:]) * self.tensor.element_size()
        one = prod(shape[dim + 1 :]) * self.tensor.element_size()
        first, length = start * one, (stop - start) * one
        if not self.lazy or any(size % PAGE for size in (row, first, length)):
            self.tensor.narrow(dim, start, stop - start).zero_()
            return
        for offset in range(first, prod(shape[:dim]) * row, row):
            self._map.madvise(mmap.MADV_DONTNEED, offset, length)
