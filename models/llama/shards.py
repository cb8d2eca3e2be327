"""The safetensors files of a checkpoint directory: which tensors they hold, checked without reading one.

The library reads and checks headers (`safe_open`). What it lacks is here:

- how long a file should be, that it is a git-lfs pointer, and the system's reason why it cannot be read: `_fault` looks
  for these in a file that the library has refused;
- where in its file a tensor lies: `read_ranges`. A digest reads a few KiB of each tensor. Through the library's memory
  maps, the first digest of 16 GB took 18 s on a file system where a page fault is slow; by `read` it takes 7 ms.
"""

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from models.errors import UserError
from models.llama.config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # the format's own bound; anything larger is not a safetensors file
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its length in bytes, what it holds, and `stamp` of it as it was then."""

    path: Path
    size: int
    tensors: dict[str, StoredTensor]
    stamp: tuple[int, int, int]


def stamp(path: Path) -> tuple[int, int, int]:
    """(inode, length in bytes, time of the last change in ns): another file, or a changed one, has another."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_layout(path: Path) -> tuple[list[Shard], dict[str, Path]]:
    """All shards, and which file holds which tensor."""
    if (path / SINGLE).is_file():
        shard = _read_shard(path / SINGLE)
        return [shard], {name: shard.path for name in shard.tensors}
    if not (path / INDEX).is_file():
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}{what_else(path)}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX} has no weight_map: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255:  # no file is called that
            shown = repr(name) if len(repr(name)) < 100 else f"{str(name)[:60]!r}..."
            raise UserError(f"{path / INDEX} names the file {shown}: shards must lie beside their index")
        if not os.path.isfile(path / name):
            raise UserError(f"{path} lacks the file {name}, which its index names: download it again")
    shards = [_read_shard(path / name) for name in sorted(set(weight_map.values()))]
    held: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in held:
                raise UserError(
                    f"{name} is in {held[name]} and in {shard.path.name}: which of them is meant, their index cannot "
                    "say, download all of them again"
                )
            held[name] = shard.path
    return shards, {tensor: path / name for tensor, name in weight_map.items()}


def read_ranges(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a file that `read_layout` has accepted, and (start, end) of each tensor's bytes behind it."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return header, _ranges(header)


def _ranges(header: bytes) -> list[tuple[int, int]]:
    described = json.loads(header)
    return [tuple(info["data_offsets"]) for name, info in described.items() if name != "__metadata__"]


def _read_shard(path: Path) -> Shard:
    """What a file holds, from its header."""
    try:
        before = stamp(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            tensors = {name: StoredTensor(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        return Shard(path, before[1], tensors, before)
    except (SafetensorError, OSError) as error:
        raise UserError(_fault(path, error)) from None


def _fault(path: Path, refusal: Exception) -> str:
    """What is wrong with a file that the library refused: one line, with both lengths if one is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if length <= _HEADER_LIMIT else b""
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    if prefix == b"version ":
        return f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository"
    if size >= 8 and length <= _HEADER_LIMIT and size < 8 + length:
        return f"{path} is truncated: {size} bytes, its header alone has {8 + length}: download it again"
    try:
        expected = 8 + length + max((end for _, end in _ranges(header)), default=0)
        wrong = (size > expected) - (size < expected)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{path} is not a safetensors file (its header is unreadable): download it again"
    if wrong:
        what = "damaged" if wrong > 0 else "truncated"
        return f"{path} is {what}: {size} bytes, its header promises {expected}: download it again"
    return f"{path} is damaged ({' '.join(str(refusal).split())}): download it again"


def pickles_in(path: Path) -> list[str]:
    """Names of pickled weights in a directory."""
    return sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))


def what_else(path: Path) -> str:
    """What a directory without a readable checkpoint holds instead, as the rest of an error message."""
    if pickles := pickles_in(path):
        return f" but {pickles[0]}: pickle can run code and is not read, convert it to safetensors"
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        return f" but {gguf[0]}: GGUF is not read, use the safetensors original"
    return ": give a directory in Hugging Face layout (config.json and safetensors)"
