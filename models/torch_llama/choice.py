"""Which id has the greatest logit, found fast, and decided in fp32 where logits are equal.

Logits in bf16 near 25 are 0.125 apart, so that the best two are often equal. The lowest id of them is then no better a
choice than the other: the few candidates are scored again, by dot products in fp32. A row's choice depends on that row
alone.
"""

import torch

BLOCK = 64  # ids whose greatest logit is found first; torch's argmax over a whole vocabulary takes ten times as long
MOST_CANDIDATES = 16  # more equal logits than these are left to the lowest id


class Head:
    """Chooses ids by logits.

    Args:
        weight: rows [V, H] of the output matrix as they are stored, to decide equal logits with; None: the lowest id.
    """

    def __init__(self, weight: torch.Tensor | None) -> None:
        self.weight = weight

    def choose(self, logits: torch.Tensor, hidden: torch.Tensor) -> list[int]:
        """The id of greatest logit in each row.

        Args:
            logits: [n, V]. Of a row whose greatest is not finite, -1 is chosen.
            hidden: [n or more, H], what the logits were computed from.
        """
        if self.weight is None:
            return _known(logits, argmax(logits)).tolist()
        ids, equal = greatest(logits)
        chosen = _known(logits, ids).tolist()
        if not equal.any():
            return chosen
        for row in equal.nonzero().flatten().tolist():
            if chosen[row] < 0:
                continue
            candidates = (logits[row] == logits[row, chosen[row]]).nonzero().flatten()
            if len(candidates) <= MOST_CANDIDATES:
                scores = self.weight[candidates].float() @ hidden[row].float()
                chosen[row] = int(candidates[scores.argmax()])
        return chosen


def _known(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """ids [n] of the greatest logits [n, V]; -1 where that one is not finite."""
    return ids.where(logits.gather(-1, ids[:, None])[:, 0].isfinite(), -1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The lowest id [n] of the greatest logit in each row of [n, V]: torch's own, but faster on the CPU."""
    return greatest(logits)[0] if logits.device.type == "cpu" else logits.argmax(-1)


def greatest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest id [n] of the greatest logit in each row of [n, V], and whether another one is equal [n]."""
    n, size = logits.shape
    if size % BLOCK:
        ids = logits.argmax(-1)
        return ids, (logits == logits.gather(-1, ids[:, None])).sum(-1) > 1
    blocks = logits.reshape(n, -1, BLOCK)
    best = blocks.amax(-1)  # [n, V / BLOCK]
    block = best.argmax(-1)
    within = blocks[torch.arange(n), block]  # [n, BLOCK]
    place = within.argmax(-1)
    top = within.gather(-1, place[:, None])
    equal = (best == top).sum(-1) + (within == top).sum(-1) > 2
    return block * BLOCK + place, equal
