"""The safetensors files of a checkpoint directory, checked from their headers and lengths alone."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from models.errors import UserError
from models.llama.config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # the format's own bound; anything larger is not a safetensors file
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard: safetensors dtype name, shape, and its byte range behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its length in bytes, its header as it lies in the file, and what that describes."""

    path: Path
    size: int
    header: bytes
    tensors: dict[str, StoredTensor]


def read_layout(path: Path) -> tuple[list[Shard], dict[str, Path]]:
    """All shards with their headers, and which file holds which tensor."""
    if (path / SINGLE).is_file():
        shard = _read_header(path / SINGLE)
        return [shard], {name: shard.path for name in shard.tensors}
    if not (path / INDEX).is_file():
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}{what_else(path)}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX} has no weight_map: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path / INDEX} names the file {name!r}: shards must lie beside their index")
        if not (path / name).is_file():
            raise UserError(f"{path} lacks the file {name}, which its index names: download it again")
    shards = [_read_header(path / name) for name in sorted(set(weight_map.values()))]
    return shards, {tensor: path / name for tensor, name in weight_map.items()}


def _read_header(path: Path) -> Shard:
    """Parse a safetensors header and compare the file's length with it. Reads nothing behind the header.

    The library (0.8) opens a file too, but tells neither where in it a tensor lies nor the header's bytes, both of
    which a checkpoint's fingerprint needs. It calls files that are too short, too long or pointers all the same.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == b"version ":
                raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository")
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if length <= _HEADER_LIMIT else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if size >= 8 and length <= _HEADER_LIMIT and size < 8 + length:
        raise UserError(f"{path} is truncated: {size} bytes, its header alone has {8 + length}: download it again")
    try:
        tensors = {
            name: StoredTensor(info["dtype"], tuple(info["shape"]), *info["data_offsets"])
            for name, info in json.loads(header).items()
            if name != "__metadata__"
        }
        expected = 8 + length + max((info.end for info in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a safetensors file (its header is unreadable): download it again") from None
    if size < expected:
        raise UserError(f"{path} is truncated: {size} bytes, its header promises {expected}: download it again")
    if size > expected:
        raise UserError(f"{path} is damaged: {size} bytes, its header promises {expected}: download it again")
    try:  # the library's own checks (ranges against shapes, overlaps), so that no read fails later
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    return Shard(path, size, header, tensors)


def what_else(path: Path) -> str:
    """What a directory without a readable checkpoint holds instead, as the rest of an error message."""
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return f" but {pickles[0]}: pickle can run code and is not read, convert it to safetensors"
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if gguf:
        return f" but {gguf[0]}: GGUF is not read, use the safetensors original"
    return ": give a directory in Hugging Face layout (config.json and safetensors)"
