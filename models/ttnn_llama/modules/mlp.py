"""The gated MLP: down(silu(gate(x)) * up(x))."""

import ttnn

from models.ttnn_llama.device.collectives import Line, OneChip
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.linear import Linear


class MLP:
    """w1 (gate) and w3 (up): [1, 1, H, I] per chip; w2 (down): [1, 1, I, H], whose products are summed."""

    def __init__(self, w1: ttnn.Tensor, w3: ttnn.Tensor, w2: ttnn.Tensor, layout: Layout, collectives: OneChip | Line):
        precision = layout.precision
        gate_up = {"weight_format": precision.gate_up, "fidelity": precision.gate_up_fidelity}
        self.w1, self.w3 = (
            Linear(weight, layout, in_cores=layout.residual_cores, output=layout.gated, **gate_up)
            for weight in (w1, w3)
        )
        self.w2 = Linear(
            w2,
            layout,
            weight_format=precision.down,
            fidelity=precision.down_fidelity,
            in_cores=layout.gated.shard_spec.grid.num_cores(),
            output=layout.residual,
        )
        self.gated = layout.gated
        self.collectives = collectives

    def decode_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """Normed [1, 1, R, H] -> [1, 1, R, H], both sharded as the residual stream."""
        gated = _silu_mul(self.w1.decode_forward(x), self.w3.decode_forward(x), self.gated)
        return self.collectives.sum_rows(self.w2.decode_forward(gated))

    def prefill_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """Normed [1, 1, m, H] -> [1, 1, m, H], in DRAM."""
        gate, up = self.w1.prefill_forward(x), self.w3.prefill_forward(x)
        gated = _silu_mul(gate, up, ttnn.DRAM_MEMORY_CONFIG)
        ttnn.deallocate(gate)
        ttnn.deallocate(up)
        return self.collectives.sum_prefill(self.w2.prefill_forward(gated))


def _silu_mul(gate: ttnn.Tensor, up: ttnn.Tensor, memory: ttnn.MemoryConfig) -> ttnn.Tensor:
    """silu(gate) * up in one op; as an activation of the linear, silu would be an op of its own."""
    return ttnn.mul(gate, up, input_tensor_a_activations=[ttnn.UnaryOpType.SILU], memory_config=memory)
