"""A matmul with a weight that stays in DRAM, read once per call."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import ttnn

from models.ttnn_llama.modules.layout import Layout, compute_config


class Linear:
    """x @ weight. The weight [1, 1, k, n] (per chip) lies by width over the DRAM banks of its chip.

    Args:
        weight: as `weights` makes it.
        layout: of the model.
        weight_format: "bf16", "bfp8" or "bfp4".
        fidelity: math fidelity.
        in_cores: cores the decode input is width-sharded over.
        output: width-sharded memory configuration of the decode output.
    """

    def __init__(
        self,
        weight: ttnn.Tensor,
        layout: Layout,
        *,
        weight_format: str,
        fidelity: str,
        in_cores: int,
        output: ttnn.MemoryConfig,
    ):
        self.weight = weight
        self.layout = layout
        self.fidelity = fidelity
        self.output = output
        *_, self.k, self.n = weight.shape  # of one chip
        self.compute = compute_config(layout.mesh_device, fidelity)
        out_cores = output.shard_spec.grid.num_cores()
        self.decode_program = layout.decode_matmul(self.k, self.n, weight_format, in_cores, out_cores)
        self.prefill_programs: dict[int, object] = {}  # by rows

    def decode_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, R, k] -> [1, 1, R, n], R <= 32, width-sharded in L1."""
        return ttnn.linear(
            x,
            self.weight,
            program_config=self.decode_program,
            compute_kernel_config=self.compute,
            memory_config=self.output,
            dtype=ttnn.bfloat16,
        )

    def prefill_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, m, k] -> [1, 1, m, n], m a multiple of 128, interleaved in DRAM."""
        rows = x.shape[-2]
        if rows not in self.prefill_programs:
            self.prefill_programs[rows] = self.layout.prefill_matmul(rows, self.k, self.n, self.fidelity)
        return ttnn.linear(
            x,
            self.weight,
            program_config=self.prefill_programs[rows],
            compute_kernel_config=self.compute,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
            dtype=ttnn.bfloat16,
        )


class SplitLinear:
    """x @ weight where x lies in parts side by side: a product for each part and its rows of the weight, summed.

    Joined to one x, parts of the residual stream would have to be sharded anew. The weight's bytes are the same.

    Args:
        weights: of each part, as of `Linear`; the options are those of `Linear`.
    """

    def __init__(self, weights: Sequence[ttnn.Tensor], layout: Layout, **options: Any):
        self.parts = [Linear(weight, layout, **options) for weight in weights]
        self.output = self.parts[0].output

    def decode_forward(self, xs: Sequence[ttnn.Tensor]) -> ttnn.Tensor:
        """[1, 1, R, k] each -> [1, 1, R, n], width-sharded in L1."""
        products = [part.decode_forward(x) for part, x in zip(self.parts, xs, strict=True)]
        return reduce(lambda a, b: ttnn.add(a, b, memory_config=self.output), products)

    def prefill_forward(self, xs: Sequence[ttnn.Tensor]) -> ttnn.Tensor:
        """[1, 1, m, k] each -> [1, 1, m, n], interleaved in DRAM."""
        return reduce(ttnn.add, [part.prefill_forward(x) for part, x in zip(self.parts, xs, strict=True)])
