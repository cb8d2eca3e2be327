"""The loss over the draft vocabulary: soft cross-entropy against the target's own distribution.

Logits of 8192 ids for thousands of rows do not fit a cache. They are made by the chunk, and so are the gradients, in
the same pass: the loss is a sum over rows, its gradient needs nothing that comes later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK_ROWS = 256


@torch.no_grad()
def target_probabilities(final: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[R, V] the target's next-token distribution restricted to the draft vocabulary and made to sum to one.

    final: [R, H] the target's normed last states. rows: [V, H] its lm_head's rows of the draft vocabulary.
    """
    parts = [F.linear(chunk, rows).float().softmax(-1).to(final.dtype) for chunk in final.split(CHUNK_ROWS)]
    return torch.cat(parts)


class SoftCrossEntropy(torch.autograd.Function):
    """sum over rows of weight * H(p, softmax(x W^T)); and the rank of each label among the logits.

    Inputs: x [R, H] fp32, W [V, H] fp32, p [R, V], weights [R], labels [R] (ids of the draft vocabulary, -1: none),
    dtype of the products. Outputs: the loss, ranks [R] (0: the label is the head's first choice; V where there is
    none).
    """

    @staticmethod
    def forward(ctx, x, matrix, p, weights, labels, compute):
        narrow_x, narrow = x.to(compute), matrix.to(compute)
        need = any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), device=x.device)
        ranks = torch.empty(len(x), dtype=torch.long, device=x.device)
        grad_x = torch.empty_like(x if need else x[:0])
        errors = torch.empty(len(x) if need else 0, len(matrix), dtype=compute, device=x.device)
        for start in range(0, len(x), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = F.linear(narrow_x[part], narrow).float()
            label = labels[part, None]
            own = logits.gather(1, label.clamp_min(0))
            better = (logits > own).sum(-1)
            # among equal logits the first is chosen, as argmax does
            better = torch.where(logits.argmax(-1) == label[:, 0], 0, better.clamp_min(1))
            ranks[part] = torch.where(label[:, 0] < 0, len(matrix), better)
            soft, weight = p[part].float(), weights[part]
            total = logits.logsumexp(-1, keepdim=True)
            loss += ((total[:, 0] - (soft * logits).sum(-1)) * weight).sum()
            if need:
                error = logits.sub_(total).exp_().sub_(soft).mul_(weight[:, None])
                errors[part] = error
                grad_x[part] = (errors[part] @ narrow).float()
        if need:
            ctx.save_for_backward(grad_x, (errors.t() @ narrow_x).float())
        ctx.mark_non_differentiable(ranks)
        return loss, ranks

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_x, grad_matrix = ctx.saved_tensors
        return grad_x * grad_loss, grad_matrix * grad_loss, None, None, None, None


class DraftVocabulary:
    """The ids that a head can draft: the most frequent ones of the answers, in rising order.

    ids: [V] the target's ids. inverse: [target V] the draft id, -1 where there is none.
    """

    def __init__(self, ids: torch.Tensor, target_vocab: int) -> None:
        self.ids, self.target_vocab = ids, target_vocab
        self.inverse = torch.full((target_vocab,), -1, device=ids.device)
        self.inverse[ids] = torch.arange(len(ids), device=ids.device)

    @classmethod
    def of_counts(cls, counts: torch.Tensor, size: int) -> DraftVocabulary:
        """The `size` most frequent ids; equal counts: the smaller ids. counts: [target V]."""
        if size >= len(counts):
            return cls(torch.arange(len(counts)), len(counts))
        order = counts.sort(descending=True, stable=True).indices
        return cls(order[:size].sort().values, len(counts))

    @classmethod
    def of_offsets(cls, d2t: torch.Tensor, target_vocab: int) -> DraftVocabulary:
        """From a file's ``d2t``."""
        return cls(d2t + torch.arange(len(d2t)), target_vocab)

    @property
    def whole(self) -> bool:
        """Whether it is the target's vocabulary."""
        return len(self.ids) == self.target_vocab

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds: ``d2t`` int64 [V], target id - draft id; ``t2d`` bool [target V]; {} for the whole."""
        if self.whole:
            return {}
        return {"d2t": self.ids.cpu() - torch.arange(len(self.ids)), "t2d": self.inverse.cpu() >= 0}
