"""A linear layer by itself, in compiled form."""

from __future__ import annotations

import torch

from models.torch_llama.compiled.kernels import head_fields, load_layers
from models.torch_llama.compiled.network import STORED, padded, panels, shared_out
from models.torch_llama.compiled.products import PANEL, WIDENED
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
        self._code, self._fields = load_layers(stored), head_fields(stored)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] -> [n, out], both fp32."""
        n, threads, step = len(x), torch.get_num_threads(), padded(self.width)
        rows = x if self.width == step and x.is_contiguous() else x.new_zeros(n, step)
        if rows is not x:
            rows[:, : self.width] = x
        result = torch.empty(n, padded(self.out))
        items, panel_count = shared_out(n, self.width), result.shape[1] // PANEL
        job = items | {
            "n": n,
            "hidden": self.width,
            "panels": panel_count,
            "scratch_step": PANEL * WIDENED,
            "row_items": 0,  # no row is normed
            "panel_items": panel_count * items["chunks"],
            "eps": 0.0,
            "x": 0,
            "norm": 0,
            "scored": rows.data_ptr(),
            "weights": self._panels.data_ptr(),
            "logits": result.data_ptr(),
        }
        pool = threads_pool()
        with pool.lock:
            job["scratch"] = pool.buffer("scratch", threads * PANEL * WIDENED)
            pool.run(self._code, "head", self._fields, threads, job)
        return result[:, : self.out]
