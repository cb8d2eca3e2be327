"""Final norm, lm_head and argmax.

The head's columns are cut into pieces that fit the L1 buffers of a DRAM-sharded matmul; with several chips each has
its own part of the vocabulary. Rows are untilized before the parts are joined and before argmax: that drops the
padding of the 32-row tile, and argmax over a row-major row runs on many cores.
"""

import ttnn

from models.ttnn_llama.device.collectives import Line, OneChip
from models.ttnn_llama.modules.layout import Layout
from models.ttnn_llama.modules.linear import Linear
from models.ttnn_llama.modules.norm import RMSNorm
from models.ttnn_llama.shapes import TILE


class LMHead:
    """norm: of the last hidden states. pieces: [1, 1, H, V / n / parts] per chip each, in the vocabulary's order."""

    def __init__(self, norm: RMSNorm, pieces: list[ttnn.Tensor], layout: Layout, collectives: OneChip | Line):
        self.norm = norm
        self.collectives = collectives
        width, cores = pieces[0].shape[-1], layout.cores
        tiles_per_core = -(-width // (TILE * cores.count))
        output = cores.width_sharded(width, cores.in_rows(-(-width // (TILE * tiles_per_core))))
        self.join = _concatenate if len(pieces) > 1 else _only
        options = {"weight_format": layout.precision.head, "fidelity": layout.precision.head_fidelity}
        self.pieces = [
            Linear(piece, layout, in_cores=layout.residual_cores, output=output, **options) for piece in pieces
        ]

    def logits(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """Residual stream [1, 1, R, H] -> [1, 1, R, V] bf16 row-major in DRAM, whole on every chip."""
        return self.project(self.norm.decode_forward(x))

    def project(self, normed: ttnn.Tensor) -> ttnn.Tensor:
        """The logits of states that have gone through the norm."""
        parts = [
            ttnn.sharded_to_interleaved(piece.decode_forward(normed), ttnn.DRAM_MEMORY_CONFIG) for piece in self.pieces
        ]
        return self.collectives.join_vocabulary(ttnn.untilize(self.join(parts), use_multicore=True))

    @staticmethod
    def argmax(logits: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, R, V] row-major -> ids [1, R] uint32, the lowest one where logits tie."""
        ids = ttnn.argmax(logits, dim=3, keepdim=False)  # [1, 1, R]
        return ttnn.reshape(ids, (1, ids.shape[-1]))


def _concatenate(parts: list[ttnn.Tensor]) -> ttnn.Tensor:
    return ttnn.concat(parts, dim=-1)


def _only(parts: list[ttnn.Tensor]) -> ttnn.Tensor:
    return parts[0]
