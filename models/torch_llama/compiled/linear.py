"""A linear layer by itself, in compiled form."""

from __future__ import annotations

import torch

from models.torch_llama.compiled.kernels import fields_of, load_layers
from models.torch_llama.compiled.network import STORED, in_panels, padded, panels, shared_out
from models.torch_llama.compiled.products import PANEL, WIDENED
from models.torch_llama.compiled.threads import Prepared
from models.torch_llama.compiled.threads import pool as threads_pool


class CompiledLinear:
    """A weight [out, in] in panels, for rows in fp32. The bits of a row do not depend on the rows beside it.

    Implements `linear.Linear`. int8: round the weight to 8 bits.
    """

    def __init__(self, weight: torch.Tensor, int8: bool = False) -> None:
        self.out, self.width = weight.shape
        self._panels = panels(weight, int8)
        self.bytes, self.form = self._panels.nbytes, PANEL
        stored = STORED[self._panels.dtype]
        constants = {"hidden": self.width, "panels": padded(self.out) // PANEL, "matrix": self._panels.data_ptr()}
        constants |= {"scratch_step": PANEL * WIDENED, "steps": 1}
        self._job = Prepared(load_layers(stored), "layers", fields_of(stored), constants)  # nothing but products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] -> [n, out], both fp32."""
        n, threads, step = len(x), torch.get_num_threads(), padded(self.width)
        rows = x if self.width == step and x.is_contiguous() else in_panels(x)
        result = torch.empty(n, padded(self.out))
        changes = shared_out(n, self.width)
        chunks = changes.pop("chunks")
        changes |= {
            "n": n,
            "panel_items": result.shape[1] // PANEL * chunks,
            "scored": rows.data_ptr(),
            "logits": result.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:
            changes["scratch"] = pool.buffer("scratch", threads * PANEL * WIDENED)
            pool.run(self._job, threads, changes)
        return result[:, : self.out]
