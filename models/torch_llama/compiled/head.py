"""A draft head's layer in compiled form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from models.llama.head_config import HeadConfig
from models.speculative.model import Chain, Draws
from models.torch_llama.attention import Part
from models.torch_llama.compiled.linear import CompiledLinear
from models.torch_llama.compiled.network import InPanels, Take, attention_and_mlp, in_panels, padded
from models.torch_llama.compiled.products import PANEL
from models.torch_llama.head_layers import Fusing
from models.torch_llama.kv_cache import KVCache


class CompiledHead(InPanels):
    """A head's layer and its output matrix; implements `head_layers.HeadNetwork`. No row depends on those beside it.

    Args:
        config: the head's shape.
        take: a tensor by name, in the dtype that weights are stored in.
        cache, positions, int8: as of `InPanels`.
    """

    odd: list[bool] | None

    def __init__(self, config: HeadConfig, take: Take, cache: KVCache, positions: int, int8: bool = False) -> None:
        own, hidden = config.prefix, config.hidden_size
        self.odd = []
        self.fuse = Fusing(config, lambda name: take(name).float(), CompiledLinear(take("fc.weight"), int8))
        qkv, *others = attention_and_mlp(take, own)
        tokens, states = qkv.split(hidden, 1)
        qkv = torch.cat((F.pad(tokens, (0, padded(hidden) - hidden)), states), 1)  # states begin a panel
        names = ("hidden_norm", "post_attention_layernorm", "input_layernorm")
        norms = [take(f"{own}{name}.weight") for name in names]
        layers, norm = [([qkv, *others], norms)], take("norm.weight")

        def head() -> torch.Tensor:
            return take("lm_head.weight")

        super().__init__(config.layer, layers, norm, head, cache, positions, int8, padded(hidden) + hidden)
        self._normed = {"normed_residual": int(config.norm_before_residual)}
        self._norm_output = config.norm_output

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return super().bytes + self.fuse.bytes

    def chain(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        part: Part,
        least: Sequence[float],
        table: torch.Tensor,
        ids: torch.Tensor | None,
        draws: Draws | None = None,
    ) -> tuple[Chain, torch.Tensor]:
        """As of `head_layers.ChainedHead`."""
        rows = in_panels(tokens)
        more = {**self._normed, "tokens": rows.data_ptr(), "hands_on": int(self._norm_output)}
        return self._chain(in_panels(states), part, least, table, ids, more, draws)

    def run(
        self, tokens: torch.Tensor, states: torch.Tensor, parts: Sequence[Part], scored: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As of `head_layers.HeadNetwork`."""
        rows, x = in_panels(tokens), in_panels(states)
        n, hidden = states.shape
        more, behind, logits = {**self._normed, "tokens": rows.data_ptr()}, x, None
        if scored or self._norm_output:
            behind, counts = torch.empty_like(x), self._counted(n)
            more |= {"scored": behind.data_ptr(), "last_items": counts["row_items"]}
            if scored:
                logits = torch.empty(n, padded(self.vocab_size))
                chunks = counts["hidden_items"] // (padded(hidden) // PANEL)
                more |= {"logits": logits.data_ptr(), "panel_items": logits.shape[1] // PANEL * chunks}
                logits = logits[:, : self.vocab_size]
        self._run(x, self.plan(parts), 0, 1, more)
        return (behind if self._norm_output else x)[:, :hidden], logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As of `head_layers.HeadNetwork`."""
        return self._scores(in_panels(hidden), self._norm_output)[1]
