"""Named precisions: the format of every kind of weight and of the KV cache, and how exactly matmuls multiply.

Block formats keep one 8-bit exponent per 16 values: bfp8 has 7 bits of mantissa and a sign for each, bfp4 has 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:
    import ttnn

TILE_VALUES = 32 * 32
PRECISION = "performance"  # of drafts, and of targets that are large enough
SMALL_HIDDEN_SIZE = 2048  # that of Llama 3.2 1B
_TILE_BYTES = {"bf16": 2048, "bfp8": 1088, "bfp4": 576}
_TTNN_NAMES = {"bf16": "bfloat16", "bfp8": "bfloat8_b", "bfp4": "bfloat4_b"}


@dataclass(frozen=True)
class Precision:
    """Formats are "bf16", "bfp8" or "bfp4"; fidelities name a member of `ttnn.MathFidelity`.

    ``attention`` is the format of wqkv and wo, ``gate_up`` of w1 and w3, ``down`` of w2, ``head`` of the output
    matrix; each has its fidelity. The embedding and the norms are bf16 in every precision.
    """

    name: str
    attention: str
    gate_up: str
    down: str
    head: str
    kv_cache: str
    attention_fidelity: str
    gate_up_fidelity: str
    down_fidelity: str
    head_fidelity: str


# From exact to fast. LoFi multiplies with the first five significant bits of a weight: all that bfp4 has, not all of
# bfp8's seven.
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("bf16", *("bf16",) * 5, *("HiFi4",) * 4),
        Precision("accuracy", *("bfp8",) * 5, *("HiFi2",) * 4),
        Precision("performance", "bfp8", "bfp4", "bfp8", "bfp8", "bfp8", "HiFi2", "LoFi", "HiFi2", "HiFi2"),
        # Tenstorrent's choice for 8B on QuietBox 2 (tt-metal, models/demos/llama31_8b_qb2/config/precision.json).
        Precision("lofi", "bfp8", "bfp4", "bfp8", "bfp8", "bfp8", "LoFi", "LoFi", "LoFi", "HiFi2"),
        # For drafts: every matrix of the layers in bfp4. The head stays, it alone decides near-ties of the argmax.
        Precision("bfp4", "bfp4", "bfp4", "bfp4", "bfp8", "bfp8", "LoFi", "LoFi", "LoFi", "HiFi2"),
    )
}


def precision_named(name: str) -> Precision:
    """The precision called ``name``. Raises UserError for any other name."""
    if name not in PRECISIONS:
        raise UserError(f"no precision is called {name!r}: use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def default_precision(hidden_size: int) -> str:
    """The name of a target's precision where none is asked for: as tt_transformers' demo, but bfp8 for small models.

    With gate and up matrices in bfp4, Llama 3.2 1B chose the reference's token at 86 to 88 % of positions on a T3K,
    below the 90 % that Tenstorrent asks for; in bfp8 at 96 to 97 %, hardly slower (tt-metal,
    models/autoports/meta_llama_llama_3_2_1b_instruct/doc/datatype_sweep).
    """
    return "accuracy" if hidden_size <= SMALL_HIDDEN_SIZE else PRECISION


def bytes_per_value(format: str) -> float:
    """Bytes that one value takes in a full tile, its part of the shared exponents included."""
    return _TILE_BYTES[format] / TILE_VALUES


def tile_bytes(format: str) -> int:
    """Bytes of one tile of 32 x 32 values."""
    return _TILE_BYTES[format]


def ttnn_dtype(format: str) -> ttnn.DataType:
    """ttnn's data type of a format; imports ttnn."""
    import ttnn

    return getattr(ttnn, _TTNN_NAMES[format])
