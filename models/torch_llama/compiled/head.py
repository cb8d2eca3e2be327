"""A draft head's layer in compiled form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from models.llama.head_config import HeadConfig
from models.torch_llama.attention import Part
from models.torch_llama.compiled.linear import CompiledLinear
from models.torch_llama.compiled.network import InPanels, Take, attention_and_mlp, in_panels, padded
from models.torch_llama.head_layers import Fusing
from models.torch_llama.kv_cache import KVCache


class CompiledHead(InPanels):
    """A head's layer and its output matrix; implements `head_layers.HeadNetwork`. No row depends on those beside it.

    Args:
        config: the head's shape.
        take: a tensor by name, in the dtype that weights are stored in.
        cache, positions, int8: as of `InPanels`.
    """

    def __init__(self, config: HeadConfig, take: Take, cache: KVCache, positions: int, int8: bool = False) -> None:
        own, hidden = config.prefix, config.hidden_size
        self.head_config, self.odd = config, cast("list[bool] | None", [])
        self.fuse = Fusing(config, lambda name: take(name).float(), CompiledLinear(take("fc.weight"), int8))

        qkv, *others = attention_and_mlp(take, own)
        tokens, states = qkv.split(hidden, 1)
        qkv = torch.cat((F.pad(tokens, (0, padded(hidden) - hidden)), states), 1)  # states begin a panel
        names = ("hidden_norm", "post_attention_layernorm", "input_layernorm")
        norms = [take(f"{own}{name}.weight") for name in names]
        norm, lm_head = take("norm.weight"), take("lm_head.weight")
        super().__init__(config.layer, [([qkv, *others], norms)], norm, lm_head, cache, positions, int8)
        self._constants |= {"wide": padded(hidden) + hidden, "normed_residual": int(config.norm_before_residual)}
        self._shape = (hidden,)

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return super().bytes + self.fuse.bytes

    def run(self, tokens: torch.Tensor, states: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """As of `head_layers.HeadNetwork`."""
        rows = in_panels(tokens)
        passed = self._run(states, self.plan(parts), 0, 1, {"tokens": rows.data_ptr()})
        if self.head_config.norm_output:
            return F.rms_norm(passed, self._shape, self.norm, self.config.rms_norm_eps)
        return passed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As of `head_layers.HeadNetwork`."""
        return self._scores(hidden, normed=self.head_config.norm_output)[1]
