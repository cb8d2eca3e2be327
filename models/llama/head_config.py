"""HeadConfig: the shape of an EAGLE-3 draft head, read from and written to a config.json.

A head is one decoder layer that drafts for one target. Per position it reads the target's hidden states after some of
its layers (the taps) and the embedding of the token that follows; its logits cover a reduced vocabulary, the draft
vocabulary.

Two layouts are public. SpecForge, SGLang and EAGLE itself name the tensors ``midlayer.*`` and write the layer's sizes
at the top of config.json; speculators names them ``layers.0.*`` and has the sizes in ``transformer_layer_config``.

They count the layers read differently, under the same key. Inside ``eagle_config`` (SpecForge, SGLang) a number is the
index of the layer whose output is read: 1 is the second layer's, and -1 the embedding. At the top of the file
(speculators, vLLM) it is the index of the layer whose input is read, which is how many layers were run: that is a tap.

Source: Li et al. 2025 (EAGLE-3); SpecForge's and speculators' files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.llama.config import LlamaConfig, read_json

SPECFORGE, SPECULATORS = "specforge", "speculators"
_PREFIXES = {SPECFORGE: "midlayer.", SPECULATORS: "layers.0."}
_ARCHITECTURES = {
    "LlamaForCausalLMEagle3": SPECFORGE,
    "Eagle3LlamaForCausalLM": SPECFORGE,
    "Eagle3Speculator": SPECULATORS,
    "Eagle3DraftModel": SPECULATORS,
}
_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
TAPS = "eagle_aux_hidden_state_layer_ids"
_EAGLE = "eagle_config"


@dataclass(frozen=True)
class HeadConfig:
    """Everything that decides the arithmetic of a head, under the names that its files use.

    Args:
        layer: sizes of its one layer, and its own RoPE. `vocab_size` is the target's; the embedding is the target's
            too, unless the file has one of its own.
        draft_vocab_size: ids that it can draft.
        target_hidden_size: width of the target's hidden states.
        taps: layers of the target after which states are read: 0 the embedding, i the output of the i-th layer.
        norm_before_residual: the residual stream starts with the normed state.
        norm_before_fc: one norm over all states together before they are fused.
        fc_norm: one norm for each state before they are fused.
        norm_output: a drafted position passes on its state after the final norm.
        layout: how files name the tensors, "specforge" or "speculators".

    Raises:
        UserError: values that cannot be a head.
    """

    layer: LlamaConfig
    draft_vocab_size: int
    target_hidden_size: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    layout: str = SPECFORGE

    def __post_init__(self) -> None:
        for name in ("draft_vocab_size", "target_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if self.draft_vocab_size > self.layer.vocab_size:
            raise UserError(
                f"draft_vocab_size {self.draft_vocab_size} is more than the target's vocabulary {self.layer.vocab_size}"
            )
        if self.layer.num_hidden_layers != 1:
            raise UserError(f"num_hidden_layers is {self.layer.num_hidden_layers}: a draft head has one layer")
        if not self.taps or any(not isinstance(tap, int) or isinstance(tap, bool) or tap < 0 for tap in self.taps):
            raise UserError(f"{TAPS} is {list(self.taps)!r}: it must name layers of the target")
        if list(self.taps) != sorted(set(self.taps)):
            raise UserError(f"{TAPS} is {list(self.taps)!r}: give layers once, in rising order")
        if self.norm_before_fc and self.fc_norm:
            raise UserError("norm_before_fc and fc_norm are both true: a head has one of them or neither")

    @property
    def reduced(self) -> bool:
        """Whether the draft vocabulary is not the whole."""
        return self.draft_vocab_size < self.layer.vocab_size

    @property
    def parameter_count(self) -> int:
        """Number of weights, without an embedding."""
        return sum(math.prod(shape) for name, shape in self.tensor_shapes().items() if name not in ("d2t", "t2d"))

    @property
    def num_hidden_layers(self) -> int:
        """One."""
        return self.layer.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of its own states."""
        return self.layer.hidden_size

    @property
    def num_key_value_heads(self) -> int:
        """Of its layer."""
        return self.layer.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Of its layer."""
        return self.layer.head_dim

    @property
    def prefix(self) -> str:
        """Of the layer's tensors in files."""
        return _PREFIXES[self.layout]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a file must hold: name -> shape ([out, in] for matrices).

        ``t2d`` and ``embed_tokens.weight`` may be there too.
        """
        layer, hidden, prefix = self.layer, self.layer.hidden_size, self.prefix
        states, ffn = len(self.taps) * self.target_hidden_size, layer.intermediate_size
        q_width, kv_width = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (states,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (self.target_hidden_size,) for i in range(len(self.taps))}
        shapes |= {
            "fc.weight": (hidden, states),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}hidden_norm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (q_width, 2 * hidden),
            f"{prefix}self_attn.k_proj.weight": (kv_width, 2 * hidden),
            f"{prefix}self_attn.v_proj.weight": (kv_width, 2 * hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q_width),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab_size, hidden),
        }
        if self.reduced:
            shapes["d2t"] = (self.draft_vocab_size,)
        return shapes

    def check_target(self, target: LlamaConfig) -> None:
        """Raise UserError, with both values, unless the head was made for a target of these sizes."""
        for what, own, its in (
            ("vocabulary", self.layer.vocab_size, target.vocab_size),
            ("hidden size", self.target_hidden_size, target.hidden_size),
        ):
            if own != its:
                raise UserError(
                    f"the head is for a target of {what} {own}, this one has {its}: give the head of this target"
                )
        if self.taps[-1] > target.num_hidden_layers:
            raise UserError(
                f"the head reads the target after layer {self.taps[-1]}, this one has {target.num_hidden_layers}: give "
                "the head of this target"
            )

    @classmethod
    def from_json(cls, path: str | Path, target: LlamaConfig | None = None) -> HeadConfig:
        """Read a config.json file. Raises UserError if it is missing, no JSON, or not a head's."""
        try:
            return cls.from_dict(read_json(path), target)
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], target: LlamaConfig | None = None) -> HeadConfig:
        """Read a config.json dictionary of either layout.

        Args:
            values: the dictionary.
            target: says what the file leaves open: the layers read (default: the second, the middle one and the last
                but two) and the width of states; the head's own RoPE is never the target's.

        Raises:
            UserError: not a head's, or a head that this implementation has no code for.
        """
        layout = layout_of(values)
        if layout is None:
            raise UserError(f"architectures is {values.get('architectures')!r}: not an EAGLE-3 head for a Llama")
        sizes, top = values, values
        if layout == SPECULATORS:
            sizes = values.get("transformer_layer_config")  # type: ignore[assignment]
            if not isinstance(sizes, Mapping):
                raise UserError("config.json lacks transformer_layer_config: is it complete?")
            if "sliding_attention" in (sizes.get("layer_types") or ()):
                raise UserError("layer_types has sliding_attention: only heads of full attention are supported")
        else:
            eagle = values.get(_EAGLE) or {}
            if not isinstance(eagle, Mapping):
                raise UserError(f"{_EAGLE} is {eagle!r}, not an object")
            top = {**values, **eagle}
            if eagle.get(TAPS) is not None:
                top[TAPS] = _after_outputs(eagle[TAPS])
        layer = LlamaConfig.from_dict(
            {
                **sizes,
                "architectures": None,  # its own
                "tie_word_embeddings": False,
                "bos_token_id": None,
                "eos_token_id": None,
            }
        )
        switches = {name: top.get(name, False) for name in _SWITCHES}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise UserError(f"{name} is {value!r}: it must be true or false")
        taps = top.get(TAPS)
        if taps is None:
            if target is None:
                raise UserError(f"config.json lacks {TAPS}: give the head's target with it")
            taps = default_taps(target.num_hidden_layers)
        if not isinstance(taps, (list, tuple)):
            raise UserError(f"{TAPS} is {taps!r}: it must be a list of layers")
        width = top.get("target_hidden_size")
        return cls(
            layer,
            layer.vocab_size if top.get("draft_vocab_size") is None else top["draft_vocab_size"],
            layer.hidden_size if width is None else width,
            tuple(taps),
            layout=layout,
            **switches,
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json dictionary of this head in its layout."""
        layer = self.layer.to_dict()
        for name in ("architectures", "bos_token_id", "eos_token_id"):
            del layer[name]
        own: dict[str, Any] = {
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            **{name: getattr(self, name) for name in _SWITCHES},
        }
        if self.layout == SPECFORGE:
            eagle = {TAPS: [tap - 1 for tap in self.taps], "use_aux_hidden_state": True}
            return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **own, _EAGLE: eagle}
        return {
            "architectures": ["Eagle3Speculator"],
            "model_type": "speculators",
            "speculators_model_type": "eagle3",
            **own,
            TAPS: list(self.taps),
            "tie_word_embeddings": False,
            "dtype": self.layer.dtype,
            "transformer_layer_config": layer,
        }


def typical_head(target: LlamaConfig) -> HeadConfig:
    """The shape of published heads for Llama 3: a layer of the target's sizes, its default taps, RoPE of base 10000,
    and a draft vocabulary of 32000."""
    layer = dataclasses.replace(
        target,
        num_hidden_layers=1,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
    )
    return HeadConfig(layer, 32000, target.hidden_size, default_taps(target.num_hidden_layers))


def layout_of(values: Mapping[str, Any]) -> str | None:
    """Which layout a config.json dictionary has; None where it is not a head's."""
    if values.get("speculators_model_type") == "eagle3":
        return SPECULATORS
    names = values.get("architectures")
    for name in names if isinstance(names, (list, tuple)) else ():
        if isinstance(name, str) and name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    return None


def is_head(path: str | Path) -> bool:
    """Whether a directory is a draft head's, by its config.json. False for what cannot be read."""
    try:
        return layout_of(read_json(Path(path) / "config.json")) is not None
    except UserError:
        return False


def _after_outputs(outputs: Any) -> list[int]:
    """Taps of `eagle_config`, whose numbers are indices of the layers whose outputs are read."""
    if not isinstance(outputs, (list, tuple)):
        raise UserError(f"{TAPS} is {outputs!r}: it must be a list of layers")
    if wrong := [each for each in outputs if not isinstance(each, int) or isinstance(each, bool) or each < -1]:
        raise UserError(f"{TAPS} has {wrong[0]!r}: it must hold indices of the target's layers (-1: the embedding)")
    if list(outputs) != sorted(set(outputs)):
        raise UserError(f"{TAPS} is {list(outputs)!r}: give layers once, in rising order")
    return [each + 1 for each in outputs]


def default_taps(layers: int) -> tuple[int, ...]:
    """The layers read where a file names none: the second, the middle one and the last but two."""
    if layers < 6:
        raise UserError(f"a target of {layers} layers has no default taps: name them in {TAPS}")
    return (2, layers // 2, layers - 3)
