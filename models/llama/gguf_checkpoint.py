"""Checkpoints in a GGUF file: configuration, tokenizer and weights of a Llama, as llama.cpp stores them.

What a file says of the model and its tokenizer is read once and kept beside others in the user's cache directory, in
Hugging Face's form. Weights stay in the file and are dequantised as they are loaded; those of a small model are kept
dequantised too, so that it loads in a tenth of the time.

Sources: the layout of llama.cpp's converter (names, and the rows of query and key matrices, which it reorders so that
rotary pairs lie side by side); the numbers by the package `gguf`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import UserError
from models.llama.checkpoint import Checkpoint
from models.llama.config import LlamaConfig, RopeScaling
from models.llama.rope import inverse_frequencies
from models.llama.shards import stamp

VERSION = 2  # of what is kept in the cache
KEPT_BYTES = 10**9  # of weights in fp32: of larger models they are not kept
_WEIGHTS = "weights.safetensors"
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3's frequency scaling, by pair
_PUBLISHED_SCALINGS = (RopeScaling(8.0), RopeScaling(32.0))  # Llama 3.1 and 3.2

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("llama-bpe", "llama3", "llama-v3", "smollm", "gpt-2", "default")


class GgufCheckpoint(Mapping[str, torch.Tensor]):
    """An opened GGUF file: a mapping from Hugging Face tensor names to fp32 tensors, dequantised on access.

    The interface of `checkpoint.Checkpoint`: ``path`` is a directory with the tokenizer's files, ``config`` the
    configuration, whose dtype is what dequantised weights have.
    """

    def __init__(self, file: Path, path: Path, config: LlamaConfig, index: dict[str, dict[str, Any]]) -> None:
        """Use `GgufCheckpoint.open`. index: Hugging Face name -> type, shape and place of the tensor in the file."""
        self.file = file
        self.path = path
        self.config = config
        self._index = index
        self._stamp = stamp(file)
        self._data = numpy.memmap(file, mode="r", dtype=numpy.uint8)
        self._kept = path / _WEIGHTS if _holds(path / _WEIGHTS, index) else None

    @classmethod
    def open(cls, file: Path) -> GgufCheckpoint:
        """Open a file; what it says is read at the first time, a few seconds.

        Raises UserError for a file that is none, is damaged, or holds another architecture or tokenizer than can be
        run.
        """
        try:
            before = stamp(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        key = hashlib.sha256(f"{VERSION} {file.resolve()} {before[1]} {before[2]}".encode()).hexdigest()[:16]
        kept = cache_directory() / f"{file.stem}-{key}"
        checkpoint = cls(file, kept, *(_read(kept) or _keep(file, kept)))
        if checkpoint._stamp != before:
            raise _changed(file)
        return checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """The model's tensors in forward order; no lm_head when tied."""
        return tuple(self.config.tensor_shapes())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in fp32 on the CPU. A tied ``lm_head.weight`` is the embedding. KeyError for other names."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if self._kept is None:
            return self._dequantised(name)
        with safe_open(self._kept, framework="pt") as weights:
            if name not in self._index:
                raise KeyError(name)
            return weights.get_tensor(name)

    def _dequantised(self, name: str) -> torch.Tensor:
        import gguf

        entry = self._index[name]
        self._check_unchanged()
        kind = gguf.GGMLQuantizationType(entry["type"])
        raw = self._data[entry["start"] : entry["start"] + entry["bytes"]].reshape(entry["stored_shape"])
        values = gguf.quants.dequantize(raw, kind).reshape(entry["shape"])
        tensor = torch.from_numpy(numpy.array(values, dtype=numpy.float32))  # a copy
        self._check_unchanged()
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        for part, count in heads.items():
            if name.endswith(f"{part}.weight"):
                tensor = _halves(tensor, count)
        return tensor

    def _check_unchanged(self) -> None:
        try:
            same = stamp(self.file) == self._stamp
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}: it was there when it was opened") from None
        if not same:
            raise _changed(self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """16 hex digits that identify the content: of the configuration and 4 KiB out of the middle of each tensor."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for entry in self._index.values():
            middle = entry["start"] + max(0, entry["bytes"] // 2 - 2048)
            digest.update(self._data[middle : min(middle + 4096, entry["start"] + entry["bytes"])].tobytes())
        return digest.hexdigest()[:16]


AnyCheckpoint = Checkpoint | GgufCheckpoint


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a source names, or a directory without a config.json holds; None for any other checkpoint.

    Raises UserError for a directory with several.
    """
    try:
        path = Path(source).expanduser()
        if path.suffix.lower() == ".gguf" and path.is_file():
            return path
        files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    except (OSError, RuntimeError, ValueError):  # what is wrong with the name is said where it is opened
        return None
    if len(files) > 1:
        raise UserError(f"{source} holds {len(files)} GGUF files ({files[0].name}, {files[1].name}): name one of them")
    return files[0] if files else None


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where what was read of GGUF files is kept."""
    caches = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "tt-speculative-llama" / "gguf"


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads x D, in] in Hugging Face's order, rotary pairs half a head apart, from pairs side by side."""
    rows, inner = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, inner).transpose(1, 2).reshape(rows, inner)


def _changed(file: Path) -> UserError:
    return UserError(f"{file} was changed or replaced while it was being loaded: load it again")


# ---- reading a file -------------------------------------------------------------------------------------------------
def _keep(file: Path, kept: Path) -> tuple[LlamaConfig, dict[str, dict[str, Any]]]:
    """Read a file and write its configuration, tokenizer and index of tensors to a directory, all or nothing.

    Returns what `_read` does.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(file))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if len(tensors) < len(reader.tensors):
            raise ValueError("two tensors have the same name")
    except Exception as error:  # the library raises whatever a damaged file leads it to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} is no readable GGUF file ({reason}): download it again") from None
    config = _config(file, fields, tensors)
    index = _index(file, config, tensors)
    tokenizer, settings = _tokenizer(file, fields)
    part = None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
        (part / "config.json").write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        (part / "index.json").write_text(json.dumps(index), encoding="utf-8")
        (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (part / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        if 4 * config.parameter_count <= KEPT_BYTES:
            _keep_weights(GgufCheckpoint(file, part, config, index), part / _WEIGHTS)
        _place(part, kept)
    except OSError as error:
        raise UserError(f"cannot write {kept}: {error.strerror}: set XDG_CACHE_HOME to another directory") from None
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)
    return config, index


def _place(part: Path, kept: Path) -> None:
    """Give a directory that is whole its name; what has that name and is not whole goes."""
    try:
        part.rename(kept)
    except OSError:
        if _read(kept) is None:  # else another process was first
            kept.rename(part / "old")  # which is removed
            part.rename(kept)
            shutil.rmtree(kept / "old", ignore_errors=True)


def _read(kept: Path) -> tuple[LlamaConfig, dict[str, dict[str, Any]]] | None:
    """What is kept of a file's configuration and tensors; None where something is missing or damaged."""
    try:
        config = LlamaConfig.from_json(kept / "config.json")
        index = json.loads((kept / "index.json").read_text(encoding="utf-8"))
        whole = isinstance(index, dict) and index.keys() == config.tensor_shapes().keys()
    except (OSError, ValueError, UserError):
        return None
    return (config, index) if whole and (kept / "tokenizer.json").is_file() else None


def _holds(weights: Path, index: Mapping[str, Any]) -> bool:
    """Whether a file holds all these tensors, whole."""
    try:
        with safe_open(weights, framework="pt") as opened:
            return set(opened.keys()) == set(index)
    except (OSError, SafetensorError):
        return False


def _keep_weights(checkpoint: GgufCheckpoint, path: Path) -> None:
    """Write all tensors dequantised; where there is no room for them, none."""
    try:
        save_file({name: checkpoint.tensor(name).contiguous() for name in checkpoint}, path)
        path.chmod(0o644)  # safetensors makes it private
    except (OSError, SafetensorError):
        path.unlink(missing_ok=True)


def _field(file: Path, fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    if name not in fields and default is None:
        raise UserError(f"{file} says nothing of {name}: it is no complete model")
    return fields.get(name, default)


def _config(file: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file} holds the architecture {architecture!r}: only llama can be run")

    def number(name: str, default: Any = None) -> Any:
        return _field(file, fields, f"llama.{name}", default)

    heads, hidden = number("attention.head_count"), number("embedding_length")
    if not isinstance(heads, int) or isinstance(number("feed_forward_length"), list):
        raise UserError(f"{file} has layers of different sizes: only models whose layers are alike can be run")
    if number("expert_count", 0):
        raise UserError(f"{file} holds a mixture of {number('expert_count')} experts: only dense models can be run")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file} lacks the tensor token_embd.weight: it is no complete model")
    head_dim = int(number("attention.key_length", hidden // heads))
    if number("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file} rotates only a part of each head: that is not a Llama 3.x model")
    stops = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    try:
        config = LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=int(hidden),
            intermediate_size=int(number("feed_forward_length")),
            num_hidden_layers=int(number("block_count")),
            num_attention_heads=int(heads),
            num_key_value_heads=int(number("attention.head_count_kv", heads)),
            head_dim=head_dim,
            max_position_embeddings=int(number("context_length")),
            rms_norm_eps=float(numpy.float32(number("attention.layer_norm_rms_epsilon"))),
            rope_theta=float(number("rope.freq_base", 10000.0)),
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(int(stop) for stop in stops if stop is not None)),
            dtype="float32",
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return dataclasses.replace(config, rope_scaling=_scaling(file, fields, tensors, config))


def _scaling(
    file: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any], config: LlamaConfig
) -> RopeScaling | None:
    """Of rotary frequencies: a file has the factor of each pair, which belongs to one of the published scalings."""
    kind = fields.get("llama.rope.scaling.type", "none")
    if _ROPE_FACTORS not in tensors:
        if kind not in ("none", ""):
            raise UserError(f"{file} scales rotary frequencies by {kind!r}: only Llama 3's own scaling can be run")
        return None
    stored = numpy.asarray(tensors[_ROPE_FACTORS].data, dtype=numpy.float32).ravel()
    plain = inverse_frequencies(config)
    for scaling in _PUBLISHED_SCALINGS:
        factors = (plain / inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))).numpy()
        if factors.shape == stored.shape and numpy.allclose(factors, stored, rtol=1e-3):
            return scaling
    raise UserError(f"{file} scales rotary frequencies otherwise than Llama 3.1 and 3.2 do: it cannot be run")


def _index(file: Path, config: LlamaConfig, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hugging Face name -> where and how a tensor lies in the file. Refuses what is missing, unknown or misshapen."""
    import gguf

    shapes, index = config.tensor_shapes(), {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue
        known = _OUTER.get(name) or _layer_name(name)
        if known not in shapes:
            raise UserError(f"{file} has the tensor {name}, which a Llama has not: it cannot be run")
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        if shape != shapes[known]:
            raise UserError(f"{name} in {file} has shape {list(shape)}, its header says {list(shapes[known])}")
        if tensor.tensor_type.name not in _readable(gguf):
            raise UserError(f"{name} in {file} is stored as {tensor.tensor_type.name}, which cannot be dequantised")
        data = tensor.data
        stored = data.view(numpy.uint8) if data.dtype != numpy.uint8 else data
        index[known] = {
            "type": int(tensor.tensor_type),
            "shape": list(shape),
            "start": int(tensor.data_offset),
            "bytes": int(tensor.n_bytes),
            "stored_shape": [*shape[:-1], stored.size // max(math.prod(shape[:-1]), 1)],
        }
    for name in shapes:
        if name not in index:
            raise UserError(f"{file} lacks the tensor of {name}: it is no complete model")
    return index


def _layer_name(name: str) -> str | None:
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or parts[3] != "weight":
        return None
    known = _NAMES.get(parts[2])
    return known and f"model.layers.{int(parts[1])}.{known}.weight"


def _readable(gguf: Any) -> set[str]:
    """Names of the types that the package dequantises."""
    plain = {"F32", "F16", "BF16"}
    return plain | {kind.name for kind in gguf.quants._type_traits}


# ---- tokenizer ------------------------------------------------------------------------------------------------------
def _tokenizer(file: Path, fields: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the tokenizer, tokenizer_config.json) that a file describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{file} has the tokenizer {kind!r} with {pre!r}: only byte-level BPE is read, with "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = _field(file, fields, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(file, fields, "tokenizer.ggml.merges")]
    try:
        bpe = models.BPE({token: id for id, token in enumerate(tokens)}, merges, ignore_merges=pre.startswith("llama"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} has a tokenizer that cannot be read ({' '.join(str(error).split())})") from None
    tokenizer = Tokenizer(bpe)
    split = pre_tokenizers.Split
    if pre.startswith("llama"):
        steps: list[Any] = [split(_regex(_LLAMA3), "isolated")]
    elif pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), split(_regex(_GPT2), "isolated")]
    else:
        steps = [split(_regex(_GPT2), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    control = [token for token, each in zip(tokens, types, strict=False) if each == 3]
    own = [token for token, each in zip(tokens, types, strict=False) if each == 4]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])

    def token(name: str) -> str | None:
        id = fields.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[id] if isinstance(id, int) and 0 <= id < len(tokens) else None

    bos = token("bos")
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", pre.startswith("llama"))) and bos is not None
    if begins:
        id = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": begins}
    settings |= {f"{name}_token": text for name in ("bos", "eos") if (text := token(name)) is not None}
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return tokenizer, settings


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)
