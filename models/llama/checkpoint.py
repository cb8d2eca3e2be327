"""Checkpoints in Hugging Face layout: a directory or hub id opened and checked, tensors read lazily; and writing one.

Everything that can be wrong with the files is found when a checkpoint is opened, from headers and file lengths
alone, before anything slow begins. Only safetensors is read: pickle formats can run code.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import UserError
from models.llama.config import LlamaConfig, as_token_ids, read_json
from models.llama.shards import INDEX, SINGLE, Shard, read_layout, read_ranges, stamp, what_else

SHARD_BYTES = 2 * 10**9
# safetensors' names of the dtypes a Llama is stored in -> torch's.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "model*.safetensors", "*.jinja"]


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of safetensors files that were checked, by name, read on access; `config` is what they belong to.

    ``path`` is their directory.
    """

    def __init__(self, path: Path, config: Any, shards: list[Shard], files: dict[str, Path]) -> None:
        """``files``: tensor name -> file that holds it."""
        self.path = path
        self.config = config
        self._shards = shards
        self._files = files
        self._stamps = {shard.path: shard.stamp for shard in shards}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, on the CPU. KeyError for other names, UserError where its file is not the one any more
        that was checked.

        It is backed by the file: pages are read when touched and given back when the tensor is dropped.
        """
        file = self._files[name]
        self._check_unchanged(file)
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(name)
        self._check_unchanged(file)
        return tensor

    def check_in_place(self) -> None:
        """Raise UserError where a file was written to since it was opened: tensors that it backs have changed, or are
        gone. A file that was replaced by renaming another one is still there for them."""
        for shard in self._shards:
            try:
                now = stamp(shard.path)
            except OSError:
                continue
            if now != shard.stamp and now[0] == shard.stamp[0]:
                raise UserError(
                    f"{shard.path} was written to while its model is in use: load it again, and replace checkpoints by "
                    "renaming"
                )

    def _check_unchanged(self, file: Path) -> None:
        try:
            same = stamp(file) == self._stamps[file]
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}: it was there when it was opened") from None
        if not same:
            raise UserError(f"{file} was changed or replaced while it was being loaded: load it again")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def digest(self) -> str:
        """16 hex digits that identify the content, wherever it lies: for caches of converted weights.

        Hashes the configuration, headers, file lengths and 4 KiB out of the middle of each tensor, so that two
        trainings of one architecture differ and 16 GB take milliseconds.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for shard in self._shards:
            header, ranges = read_ranges(shard.path)
            digest.update(f"{shard.size}".encode() + header)
            with shard.path.open("rb") as file:
                for start, end in ranges:
                    file.seek(8 + len(header) + max(start, (start + end) // 2 - 2048))
                    digest.update(file.read(min(4096, end - start)))
        return digest.hexdigest()[:16]


class Checkpoint(StoredTensors):
    """An opened, checked Llama checkpoint: a mapping from Hugging Face tensor names to tensors, read on access.

    Made by `open`. ``path`` is its directory, ``config`` its configuration: stop ids from generation_config.json where
    that has them, dtype from the weights themselves.
    """

    config: LlamaConfig

    @classmethod
    def open(cls, path_or_hub_id: str | Path) -> "Checkpoint":
        """Open a checkpoint directory, or download (or find in the cache) the hub id ``owner/name``.

        Raises UserError if it is missing or unreachable, not a Llama, incomplete, damaged, or if a tensor is missing,
        has another shape than config.json says, or belongs to none of its layers. Reads no weights.
        """
        path = locate(path_or_hub_id)
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a checkpoint: it has no config.json{what_else(path)}")
        config = LlamaConfig.from_json(path / "config.json")
        generation = path / "generation_config.json"
        if generation.is_file():
            stop_ids = as_token_ids(read_json(generation).get("eos_token_id"))
            config = _replace(generation, config, eos_token_ids=stop_ids or config.eos_token_ids)

        shards, files = read_layout(path)
        stored = {
            name: info for shard in shards for name, info in shard.tensors.items() if files.get(name) == shard.path
        }
        for name, file in files.items():
            if name not in stored:
                raise UserError(
                    f"{path / INDEX} names {name} in {file.name}, which does not hold it: download both again"
                )
        wanted_shapes = config.tensor_shapes()
        for name, shape in wanted_shapes.items():
            if name not in stored:
                raise UserError(f"{path} lacks the tensor {name}, which its config.json asks for: is it complete?")
            found = stored[name]
            if found.shape != shape:
                raise UserError(
                    f"{name} in {files[name]} has shape {list(found.shape)}, config.json says {list(shape)}: "
                    "these files are not of one model"
                )
            if found.dtype not in _DTYPES:
                raise UserError(
                    f"{name} in {files[name]} is stored as {found.dtype}: use a bf16, fp16 or fp32 checkpoint"
                )
        for shard in shards:
            for name in shard.tensors:
                if name not in wanted_shapes and not _harmless(name, config):
                    raise UserError(
                        f"{shard.path} holds the tensor {name}, which a Llama of its config.json has not: these files "
                        "are not of one model"
                    )
        dtype = _DTYPES[stored["model.embed_tokens.weight"].dtype]
        wanted = {name: files[name] for name in wanted_shapes}
        return cls(path, _replace(path, config, dtype=dtype), shards, wanted)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's tensors in forward order; no lm_head when tied; what else the files may hold is left out."""
        return tuple(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """As of `StoredTensors`. A tied ``lm_head.weight`` is the embedding."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return super().tensor(name)


class CheckpointWriter:
    """Writes a checkpoint tensor by tensor, holding one shard in memory; all of it appears at once, or nothing.

        with CheckpointWriter(path, config) as writer:
            writer.add(name, tensor)  # for every name of config.tensor_shapes()

    Files go to ``writer.folder``, a hidden neighbour of ``path`` that is renamed at the end and removed after an
    error. Raises UserError if ``path`` exists and is not an empty directory, or cannot be written.
    """

    def __init__(self, path: str | Path, config: LlamaConfig, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = Path(path).expanduser().resolve()
        self.config = config
        self.folder = self.path.parent / f".{self.path.name}.{os.getpid()}.tmp"
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        try:
            if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
                raise UserError(f"{self.path} exists: remove it or choose another output directory")
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot create {self.folder}: {error.strerror}") from None
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor (stored in its own dtype). ValueError for an unknown name or a wrong shape."""
        expected = self.config.tensor_shapes().get(name)
        if expected != tuple(tensor.shape):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: the configuration has {expected}")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        # A copy: safetensors refuses tensors that share memory, and the caller may go on using his.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {self.path}: {error}") from None
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        part = self.folder / f"part-{len(self._shards)}"
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it private
        self._pending = {}
        self._pending_bytes = 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        missing = self.config.tensor_shapes().keys() - {name for shard in self._shards for name in shard}
        if missing:
            raise ValueError(f"tensors never added: {', '.join(sorted(missing))}")
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names, 1):
            (self.folder / f"part-{number}").rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            _write_json(self.folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        _write_json(self.folder / "config.json", self.config.to_dict())
        self.folder.rename(self.path)


def save_checkpoint(
    path: str | Path, config: LlamaConfig, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``tensors`` (Hugging Face names) as a new checkpoint directory; sharded above ``shard_bytes`` bytes.

    A tied ``lm_head.weight`` is not written. Raises as CheckpointWriter does; KeyError for a tensor not given.
    """
    with CheckpointWriter(path, config, shard_bytes) as writer:
        for name in config.tensor_shapes():
            writer.add(name, tensors[name])


def _harmless(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor that no layer uses says nothing new: old files hold rotary frequencies, and tied matrices."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def is_hub_id(source: str) -> bool:
    """Whether a source may be a hub id: it looks like one, and nothing here has that name."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).expanduser().exists()


def locate(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint; hub ids are downloaded, or found in the cache."""
    given = str(path_or_hub_id)
    try:
        path = Path(given).expanduser()
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such ~user
        raise UserError(f"cannot open {given}: {getattr(error, 'strerror', None) or error}") from None
    if given and is_dir:
        return path
    if given and exists:
        raise UserError(f"{given} is a file: give the checkpoint's directory")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(given):
        raise UserError(
            f"no such directory: {given or repr(given)} (a checkpoint is a directory, or a hub id like owner/name)"
        )
    return _download(given)


def _download(hub_id: str) -> Path:
    # Imported here: local checkpoints do without its half second.
    import huggingface_hub
    from huggingface_hub import errors

    nowhere = f"there is no directory {hub_id!r} here, and the hub"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: accept its licence on its hub page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{nowhere} knows no such model (or only for logged-in users): check the spelling or set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "is switched off by HF_HUB_OFFLINE" if huggingface_hub.constants.HF_HUB_OFFLINE else "cannot be reached"
        )
        raise UserError(
            f"{nowhere} {reason}: give the directory of a downloaded checkpoint, or go online to download it"
        ) from None
    except Exception as error:  # network, disk, a malformed id: the client's errors have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot download {hub_id}: {text}: try again or give a directory") from None


def _replace(source: Path, config: LlamaConfig, **changes: Any) -> LlamaConfig:
    try:
        return dataclasses.replace(config, **changes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
