"""LlamaConfig: the shape of a Llama 3.x model, read from and written to a Hugging Face config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")
_ARCHITECTURE = "LlamaForCausalLM"
# What no file may leave out: a wrong guess here would be a different model.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Far above every published model, and below what Python or torch would try to allocate for long.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": 2**30,
    "original_max_position_embeddings": 2**30,
}
# Arithmetic on these is float32: its squares and inverses must be finite and not 0.
_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-30, 1e30


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_count(name: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise UserError(f"{name} is {_shown(value)}: it must be a whole number of at least 1")
    largest = _LARGEST[name.removeprefix("rope ")]
    if value > largest:
        raise UserError(f"{name} is {_shown(value)}: no Llama has more than {largest}, give a smaller one")


def _require_number(name: str, value: Any) -> None:
    if not (_is_int(value) or isinstance(value, float)) or not value > 0:
        raise UserError(f"{name} is {_shown(value)}: it must be a number above 0")
    if not _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER:
        raise UserError(f"{name} is {_shown(value)}: it must be between {_SMALLEST_NUMBER:g} and {_LARGEST_NUMBER:g}")


def _shown(value: Any) -> str:
    """A value in a message: a number with too many digits to read by its magnitude."""
    if not _is_int(value) or abs(value) < 10**20:
        return repr(value)
    return f"{'-' if value < 0 else ''}about 10^{math.floor(math.log10(abs(value)))}"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rotary frequency scaling (``rope_type`` "llama3").

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` are divided by ``factor``, those
    below ``original_max_position_embeddings / high_freq_factor`` are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _require_number(f"rope {name}", getattr(self, name))
        _require_count("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.factor < 1:
            raise UserError(f"rope factor {self.factor} is below 1: Llama 3 scaling only stretches (8 or 32)")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"rope low_freq_factor {self.low_freq_factor} is not below "
                f"high_freq_factor {self.high_freq_factor}: published values are 1 and 4"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the arithmetic of a Llama 3.x model, under the names Hugging Face uses.

    ``eos_token_ids`` are all ids that end a text (Instruct models have several), ``dtype`` is the one the weights
    are stored in ("bfloat16", "float16" or "float32"). Values that cannot be a Llama raise UserError.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _require_count(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _require_number(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs, use an even head_dim")
        if not isinstance(self.tie_word_embeddings, bool):
            raise UserError(f"tie_word_embeddings is {self.tie_word_embeddings!r}: it must be true or false")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not supported for stored weights: use one of {', '.join(DTYPES)}")
        ids = (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,)))
        for token in ids:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                raise UserError(f"special token id {token!r} is not in the vocabulary 0..{self.vocab_size - 1}")

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied output matrix is counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of this model: Hugging Face name -> shape ([out, in] for matrices), in forward order.

        ``lm_head.weight`` is absent when the embeddings are tied.
        """
        hidden, ffn = self.hidden_size, self.intermediate_size
        q_width = self.num_attention_heads * self.head_dim
        kv_width = self.num_key_value_heads * self.head_dim
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_width, hidden),
            "self_attn.k_proj.weight": (kv_width, hidden),
            "self_attn.v_proj.weight": (kv_width, hidden),
            "self_attn.o_proj.weight": (hidden, q_width),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read a config.json file. Raises UserError if it is missing, no JSON, or not a Llama's."""
        try:
            return cls.from_dict(read_json(path))
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json dictionary as written by transformers 4 or 5.

        Keys that a file may leave out take transformers' Llama defaults, except the special token ids, which stay
        unset. Raises UserError for other architectures and for options that this implementation has no code for.
        """
        _reject_unsupported(values)
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}: is it complete?")
        sizes = {name: values[name] for name in _REQUIRED}
        for name, size in sizes.items():
            _require_count(name, size)
        head_dim = values.get("head_dim")
        kv_heads = values.get("num_key_value_heads")
        theta, scaling = _read_rope(values)
        return cls(
            **sizes,
            num_key_value_heads=sizes["num_attention_heads"] if kv_heads is None else kv_heads,
            head_dim=sizes["hidden_size"] // sizes["num_attention_heads"] if head_dim is None else head_dim,
            max_position_embeddings=values.get("max_position_embeddings", 2048),
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=as_token_ids(values.get("eos_token_id")),
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json dictionary of this model; transformers 4 and 5 both read it to the same values."""
        rope = {"rope_type": "default"} if self.rope_scaling is None else _rope_dict(self.rope_scaling)
        eos = self.eos_token_ids
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # transformers 5 reads rope_parameters and dtype, transformers 4 the three older keys.
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else rope,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }


def _named(factor: float, **sizes: Any) -> LlamaConfig:
    """A published Instruct model; the arguments are what the sizes do not share."""
    return LlamaConfig(
        vocab_size=128256,
        rope_scaling=RopeScaling(factor=factor),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        **sizes,
    )


# The published values; note that only 3.1 8B has factor 8, and only it keeps a separate output matrix.
NAMED_SIZES: dict[str, LlamaConfig] = {
    "llama-3.2-1b": _named(
        factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _named(
        factor=32.0,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _named(
        factor=8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def named_config(name: str) -> LlamaConfig:
    """The published configuration called ``name``: a key of NAMED_SIZES or its last part ("1b"), in any case."""
    wanted = name.strip().lower()
    for key, config in NAMED_SIZES.items():
        if wanted in (key, key.rsplit("-", 1)[1]):
            return config
    raise UserError(f"no Llama size is called {name!r}: use one of {', '.join(NAMED_SIZES)} (or 1b, 3b, 8b)")


def check_exit_layer(count: int, layers: int) -> None:
    """UserError for a number of first layers that leaves none of so many to verify with."""
    if not 0 < count < layers:
        raise UserError(f"exit layer {count}: must be between 1 and {layers - 1}, one less than the model's layers")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; UserError naming the file if it is missing, unreadable or something else."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({' '.join(str(error).split())}): download or write it again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not an object: download or write it again")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for a key that is there twice: which of its values is meant, nobody knows."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def as_token_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` as files have it (null, one id, or a list of ids) -> distinct ids in their order."""
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    for token in ids:
        if not _is_int(token):
            raise UserError(f"eos_token_id is {value!r}: it must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _reject_unsupported(values: Mapping[str, Any]) -> None:
    model_type = values.get("model_type")
    if model_type != "llama":
        raise UserError(f'model_type is {model_type!r}, not "llama": only Llama 3.x checkpoints are supported')
    names = values.get("architectures")
    if names and names != [_ARCHITECTURE]:
        raise UserError(
            f'architectures is {names!r}, not ["{_ARCHITECTURE}"]: only Llama 3.x checkpoints are supported'
        )
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f'hidden_act is {activation!r}, not "silu": only Llama 3.x checkpoints are supported')
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise UserError(f"{name} is {values[name]!r}: Llama 3.x has no biases and this implementation adds none")
    quantized = values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise UserError(f"the checkpoint is quantized ({method}): use the bf16, fp16 or fp32 original")


def _read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (4).

    Where a file has both, ``rope_scaling`` wins, as in transformers 5.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"the rope parameters are {rope!r}, not an object")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor is {partial!r}: Llama 3.x rotates the whole head (1.0)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f'rope_type is {kind!r}: only "llama3" and "default" are supported')
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise UserError(f'rope_type "llama3" needs {", ".join(missing)}: is config.json complete?')
    return theta, RopeScaling(**{name: rope[name] for name in names})


def _rope_dict(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
