"""What the chips of a mesh tell each other: sums of row-parallel products, and the vocabulary's parts joined.

One object per model, chosen when it is built: with one chip there is nothing to do, and no op is spent on it.
"""

import ttnn


class OneChip:
    """No collectives."""

    @staticmethod
    def sum_rows(x: ttnn.Tensor) -> ttnn.Tensor:
        return x

    @staticmethod
    def sum_prefill(x: ttnn.Tensor) -> ttnn.Tensor:
        return x

    @staticmethod
    def join_vocabulary(x: ttnn.Tensor) -> ttnn.Tensor:
        return x


class Line:
    """Chips in a row (1 x n), no wrap-around: what N300 and T3K have in common.

    Sums use one link, gathers every link that ttnn finds free.
    """

    def __init__(self, residual: ttnn.MemoryConfig):
        self.residual = residual
        self.options = {"num_links": 1, "topology": ttnn.Topology.Linear}

    def sum_rows(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, 32, H] partial sums -> the sum on every chip, sharded as the residual stream."""
        return ttnn.all_reduce(x, memory_config=self.residual, **self.options)

    def sum_prefill(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, m, H] partial sums -> the sum on every chip, in DRAM."""
        return ttnn.all_reduce(x, memory_config=ttnn.DRAM_MEMORY_CONFIG, **self.options)

    def join_vocabulary(self, x: ttnn.Tensor) -> ttnn.Tensor:
        """[1, 1, R, V / n] row-major -> [1, 1, R, V] on every chip, in the order of the chips."""
        return ttnn.all_gather(x, dim=3)


def collectives(chips: int, residual: ttnn.MemoryConfig) -> OneChip | Line:
    return Line(residual) if chips > 1 else OneChip()
