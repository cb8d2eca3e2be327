"""Which drafted tokens are kept, and what follows them: the rules that make speculation lossless.

K drafted tokens, V vocabulary. p: the target's distribution, q: the draft's, each with temperature, top-k and top-p
already applied. Whatever q is, the tokens that leave `accept_sampled` follow p, because for every token x

    q(x) min(1, p(x)/q(x)) + P(rejection) residual(x) = min(p, q) + max(0, p - q) = p(x)

(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", appendix A.1).
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1  # in place of an id, where logits are NaN or infinite

# Of the likeliest token's probability: tokens that are considered, then more of them, in the end all.
_SHARES = (2**-7, 2**-10, 2**-13, 2**-17, 2**-22, 2**-32, 0.0)


class Distributions(Protocol):
    """Distributions [V], by number."""

    def __getitem__(self, row: int, /) -> Tensor:
        """One of them."""
        ...


def distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits[n, V] -> fp32 probabilities[n, V] in which masked tokens are exactly 0. temperature > 0.

    A row's probabilities depend on that row alone, to the last bit: a drafted token must not change the distribution
    that it is checked against. Of equally likely tokens the lower id counts as the likelier one. The likeliest token
    always stays. It is computed on the host, wherever the logits are.
    """
    rows = logits.float().numpy(force=True)
    vocab = rows.shape[-1]
    top_k = min(top_k, vocab) or vocab
    laws = np.empty_like(rows)
    with np.errstate(invalid="ignore"):
        for row, law in zip(rows, laws, strict=True):  # by row: a sum's last bits depend on its neighbours
            np.divide(row, temperature, out=law)
            law -= law.max()
            np.exp(law, out=law)
            law /= law.sum()
            if top_k < vocab or top_p < 1:
                _truncate(law, top_k, top_p)
    return torch.from_numpy(laws).to(logits.device)


def is_distribution(logits: Tensor) -> bool:
    """Whether softmax of logits[n, V] is finite: so it is exactly where the largest logit of each row is."""
    return bool(torch.isfinite(logits.amax(-1)).all())


def _truncate(probs: np.ndarray, top_k: int, top_p: float) -> None:
    """Keep of probs[V] the top_k likeliest tokens, and of them the fewest that hold top_p of their mass.

    Only tokens that are likely enough are sorted: a whole vocabulary takes a hundred times as long.
    """
    likeliest, vocab = probs.max(), len(probs)
    if not np.isfinite(likeliest):
        return
    for share in _SHARES:
        seen = probs >= share * likeliest
        if top_k < vocab and np.count_nonzero(seen) < top_k:
            continue
        ids = np.flatnonzero(seen)
        kept = probs[ids]
        if top_k < vocab or not share or kept.sum(dtype=np.float64) >= top_p:
            break
    order = np.argsort(-kept, kind="stable")[:top_k]  # ids ascend: of equals the lower one is first
    ids, kept = ids[order], kept[order]
    if top_k < vocab:
        kept /= kept.sum()
    if top_p < 1:
        count = 1 + np.count_nonzero(kept.cumsum(dtype=np.float64)[:-1] < top_p)  # by the mass of all likelier ones
        ids, kept = ids[:count], kept[:count] / kept[:count].sum()
    probs.fill(0)
    probs[ids] = kept


def sample(probs: Tensor, generator: torch.Generator) -> int:
    """Draw from probs[V], which need not sum to one; a token of probability 0 is never drawn.

    By inverse CDF from one uniform number, so that the draw is the same on every device. NO_TOKEN where probs are none.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    if not cdf[-1].isfinite():
        return NO_TOKEN
    return int(torch.searchsorted(cdf, cdf[-1:] * _uniform(generator), right=True))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) of p[V] and q[V]: the distribution of the token that replaces a rejected one.

    Where nothing is left (p and q equal but for rounding) it is p itself.
    """
    rest = (p - q).clamp_(min=0)
    total = rest.sum()
    return rest / total if total > 0 else p


def accept_greedy(drafted: Sequence[int], target_ids: Iterable[int]) -> tuple[int, int]:
    """Keep drafted tokens while each is the target's own choice: (how many, the target's id that follows them).

    target_ids: K+1 ids, the target's choice after the last token and after each drafted one. They are read in order
    and only as far as needed, so a generator makes verification sequential.
    """
    choices = iter(target_ids)
    for accepted, token in enumerate(drafted):
        choice = next(choices)
        if choice != token:
            return accepted, choice
    return len(drafted), next(choices)


def accept_sampled(
    drafted: Sequence[int], p: Tensor | Iterable[Tensor], q: Tensor | None, generator: torch.Generator
) -> tuple[int, int]:
    """Keep each drafted token with probability min(1, p/q): (how many before the first rejection, the id after them).

    That id is drawn from the residual at a rejection, from p[K] (the bonus) after full acceptance.
    p[K+1, V]: may come from a generator, as in `accept_greedy`. q[K, V]: the distribution each token was drawn from;
    None for a deterministic draft, whose q is one-hot. `generator` must be independent of the draft's.
    """
    distributions = iter(p)
    for accepted, token in enumerate(drafted):
        probs = next(distributions)
        draft_probs = _one_hot(token, probs) if q is None else q[accepted]
        # u < p/q without the division; never true where p is 0, or a number is none.
        if not _uniform(generator) * float(draft_probs[token]) < float(probs[token]):
            return accepted, sample(residual(probs, draft_probs), generator)
    return len(drafted), sample(next(distributions), generator)


def accept_tree_greedy(
    drafted: Sequence[int], parents: Sequence[int], target_ids: Sequence[int]
) -> tuple[list[int], int]:
    """Walk down a tree while a child is the target's own choice: (indices of the kept tokens, the target's id after).

    parents: see `drafters.Draft`. target_ids: the target's choice after the text and after each drafted token.
    """
    path: list[int] = []
    node, choice = -1, target_ids[0]
    while True:
        kept = next((i for i, up in enumerate(parents) if up == node and drafted[i] == choice), None)
        if kept is None:
            return path, choice
        path.append(kept)
        node, choice = kept, target_ids[kept + 1]


def accept_tree_sampled(
    drafted: Sequence[int],
    parents: Sequence[int],
    p: Distributions,
    q: Tensor | None,
    generator: torch.Generator,
) -> tuple[list[int], int]:
    """Walk down a tree by rejection sampling: (indices of the kept tokens, the id after them).

    At each token its children are tried in turn. One is kept with probability min(1, p/q); where it is not, p becomes
    the residual for the next child, and after the last child the distribution the next id is drawn from. As every step
    keeps the distribution of what leaves (see the module), so does any number of them. p[n+1, V]: after the text and
    each of the n drafted tokens. q[n, V]: the distribution each token was drawn from once its earlier siblings were,
    which it excludes; None if they were chosen deterministically.
    """
    path: list[int] = []
    node, probs = -1, p[0]
    while True:
        for child in (i for i, up in enumerate(parents) if up == node):
            token = drafted[child]
            draft_probs = _one_hot(token, probs) if q is None else q[child]
            if _uniform(generator) * float(draft_probs[token]) < float(probs[token]):
                break
            probs = residual(probs, draft_probs)
        else:
            return path, sample(probs, generator)
        path.append(child)
        node, probs = child, p[child + 1]


def _one_hot(token: int, like: Tensor) -> Tensor:
    row = torch.zeros_like(like)
    row[token] = 1
    return row


def _uniform(generator: torch.Generator) -> float:
    """In [0, 1) with 53 random bits, so that a multiple of a total stays below the total."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()
