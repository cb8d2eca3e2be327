"""Converted weights kept on disk, so that a model is converted once per precision and mesh and read from then on.

An entry is two files: the tensor as ttnn writes it, and a note with the entry's whole key, the length and the SHA-256
of the first. Whatever does not agree with its note, or with what is asked for, is converted again and replaced: an
entry is never trusted for its name. Entries appear at once (rename), so several processes may share a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from models.ttnn_llama.weights.precision import bytes_per_value, ttnn_dtype
from models.user_cache import user_cache

if TYPE_CHECKING:
    import ttnn

    from models.ttnn_llama.weights.tensors import WeightSpec

# Raise it with every change of what `WeightSpec.build` makes of the same checkpoint.
LAYOUT_VERSION = 1
_SPARE_BYTES = 100 * 2**20  # of the disk, left to others
_PIECE = 2**24


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """TT_CACHE_PATH if that is set, else a directory in the user's cache directory."""
    if environ.get("TT_CACHE_PATH"):
        return Path(environ["TT_CACHE_PATH"]).expanduser()
    return user_cache("weights", environ)


class WeightCache:
    """The converted weights of one checkpoint on one shape of mesh.

    Args:
        directory: of all models' entries; made when the first one is stored.
        digest: of the checkpoint's content.
        mesh_shape: (rows, columns) of the mesh that the weights are split for.

    Nothing here raises for what is wrong with the disk: that costs time, not the run. It is logged as a warning.
    """

    def __init__(self, directory: Path, digest: str, mesh_shape: tuple[int, ...]) -> None:
        self._key = {
            "checkpoint": digest,
            "mesh": list(mesh_shape),
            "ttnn": version("ttnn"),
            "layout": LAYOUT_VERSION,
        }
        mesh = "x".join(map(str, mesh_shape))
        self._folder = Path(directory) / f"{digest}-{mesh}-ttnn{self._key['ttnn']}-v{LAYOUT_VERSION}"
        self._chips = math.prod(mesh_shape)
        self._writable = True

    def path(self, spec: WeightSpec) -> Path:
        """The file of a weight's values; its note lies beside it, with .json instead."""
        return self._folder / f"{spec.name}.{spec.format}.tensorbin"

    def load(self, spec: WeightSpec) -> ttnn.Tensor | None:
        """The weight on the host, split into chips; None if it is not there or not what it should be."""
        path = self.path(spec)
        if not path.with_suffix(".json").exists():
            return None
        try:
            return self._checked(spec, path)
        except Exception as error:  # damaged files fail in many ways, ttnn's have no type of their own
            logger.warning("cached weight {} is not usable ({}): converting it again", path, _first_line(error))
            return None

    def _checked(self, spec: WeightSpec, path: Path) -> ttnn.Tensor:
        """Load an entry. ValueError where it is not as its note or the spec says."""
        import ttnn

        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if note["key"] != self._entry_key(spec):
            raise ValueError("it was made for something else")
        size = path.stat().st_size
        if size != note["bytes"]:
            raise ValueError(f"{size} bytes, its note says {note['bytes']}")
        if _checksum(path) != note["sha256"]:
            raise ValueError("its checksum is wrong")
        tensor = ttnn.load_tensor(path)
        wanted, chips = self._chips, len(ttnn.get_device_tensors(tensor))
        found = (chips, tuple(tensor.shape), tensor.dtype, tensor.layout)
        if found != (wanted, spec.local_shape(wanted), ttnn_dtype(spec.format), ttnn.TILE_LAYOUT):
            raise ValueError(f"it holds {tensor.dtype} {list(tensor.shape)} for {chips} chips")
        return tensor

    def store(self, spec: WeightSpec, tensor: ttnn.Tensor) -> None:
        """Keep a converted weight (tiled, on the host). After the first failure nothing more is stored."""
        if not self._writable:
            return
        path = self.path(spec)
        part = path.with_name(f".{spec.name}.{os.getpid()}.tensorbin")
        try:
            self._write(spec, tensor, path, part)
        except Exception as error:  # OSError, or ttnn's RuntimeError for a full disk
            self._writable = False
            logger.warning(
                "cannot cache converted weights in {} ({}): going on without; set TT_CACHE_PATH to another directory",
                self._folder,
                _first_line(error),
            )
        finally:
            for left in (part, part.with_suffix(".json")):
                with contextlib.suppress(OSError):
                    left.unlink()

    def _write(self, spec: WeightSpec, tensor: ttnn.Tensor, path: Path, part: Path) -> None:
        import ttnn

        self._folder.mkdir(parents=True, exist_ok=True)
        payload = int(math.prod(spec.shape) * bytes_per_value(spec.format))
        free = shutil.disk_usage(self._folder).free
        if free < payload + _SPARE_BYTES:
            raise OSError(f"{free / 1e9:.2f} GB free, {(payload + _SPARE_BYTES) / 1e9:.2f} GB needed")
        ttnn.dump_tensor(part, tensor)
        size = part.stat().st_size
        if size < payload:
            raise OSError(f"{size} of {payload} bytes were written")
        note = {"key": self._entry_key(spec), "bytes": size, "sha256": _checksum(part)}
        part.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        # Another process may do the same now; a pair of files of two makers fails its checksum and is made again.
        part.replace(path)
        part.with_suffix(".json").replace(path.with_suffix(".json"))

    def _entry_key(self, spec: WeightSpec) -> dict[str, Any]:
        shape = list(spec.shape)
        return {**self._key, "name": spec.name, "format": spec.format, "shape": shape, "chip_dim": spec.chip_dim}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """What went wrong, without ttnn's backtrace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TT_FATAL @ file: condition / info: / the message / backtrace: ...
    return lines[lines.index("info:") + 1] if "info:" in lines[:-1] else lines[0] if lines else type(error).__name__
