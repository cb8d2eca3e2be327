"""RMSNorm of the residual stream."""

import ttnn

from models.ttnn_llama.modules.layout import Layout, compute_config


class RMSNorm:
    """x / rms(x) * weight. ``weight``: [1, 1, H/32, 32] row-major, the same on all chips."""

    def __init__(self, weight: ttnn.Tensor, layout: Layout):
        self.weight = weight
        self.epsilon = layout.config.rms_norm_eps
        self.program = layout.norm_program
        self.residual = layout.residual
        self.compute = compute_config(layout.mesh_device, "HiFi4")

    def decode_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, R, H] -> same, width-sharded as the residual stream."""
        return ttnn.rms_norm(
            x,
            epsilon=self.epsilon,
            weight=self.weight,
            program_config=self.program,
            memory_config=self.residual,
            compute_kernel_config=self.compute,
        )

    def prefill_forward(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, m, H] -> same, interleaved in DRAM."""
        return ttnn.rms_norm(x, epsilon=self.epsilon, weight=self.weight, compute_kernel_config=self.compute)
