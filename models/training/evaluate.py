"""What a head is worth on answers that it has not seen: acceptance by position, tokens per verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from models.training.batches import Batch, read_batch
from models.training.head import TrainedHead
from models.training.loss import DraftVocabulary, SoftCrossEntropy, target_probabilities
from models.training.shards import AnswerStore

POSITIONS = 6


@dataclass(frozen=True)
class Evaluation:
    """Along the target's own answers; all of them greedy, unless told otherwise.

    Args:
        answers, rows: how many answers, and positions in them from which K tokens can be drafted.
        accepted: for each drafted position, its acceptance rate where all before it were accepted.
        tokens_per_verify: for K = 1, 2, ...: 1 + accepted tokens, averaged over all positions of the answers.
        tokens_per_round: the same, averaged over rounds as decoding makes them: the next begins where one ended.
        second: for each drafted position, how often the second choice is right where the first was not.
        loss: soft cross-entropy of the first drafted token, in nats.
    """

    answers: int
    rows: int
    accepted: list[float]
    tokens_per_verify: list[float]
    tokens_per_round: list[float]
    second: list[float]
    loss: float


@torch.no_grad()
def evaluate(
    head: TrainedHead,
    store: AnswerStore,
    numbers: Sequence[int],
    vocabulary: DraftVocabulary,
    teacher: torch.Tensor,
    *,
    positions: int = POSITIONS,
    together: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Draft from every position of the answers with these numbers and see how far the answers agree.

    teacher: [V, H] the target's lm_head rows of the draft vocabulary.
    """
    device, hidden = head.embedding.device, head.config.target_hidden_size
    right = torch.zeros(positions)  # whole starts that got a position right, and all before it
    seconds, tried, whole = torch.zeros(positions), torch.zeros(positions), 0
    loss, count = 0.0, 0
    rounds = [[0, 0] for _ in range(positions)]  # (rounds, tokens) for each K
    for begin in range(0, len(numbers), together):
        group = numbers[begin : begin + together]
        batch = read_batch(store, group, hidden).to(device, head.compute)
        depth, first_loss, guesses = _agreement(head, batch, vocabulary, teacher, positions)
        full = (batch.left >= positions).cpu()
        whole += int(full.sum())
        for position in range(positions):
            right[position] += int((full & (depth > position)).sum())
            rows, ranks = guesses[position]
            some = full[rows]
            tried[position] += int(some.sum())
            seconds[position] += int((ranks[some] == 1).sum())
        loss, count = loss + first_loss, count + len(depth)
        for span in batch.spans:
            _add_rounds(depth[span.row : span.row + span.rows].tolist(), rounds)
        progress(min(len(numbers), begin + together))
    share = right / max(1, whole)
    reached = torch.cat((torch.ones(1), share[:-1]))
    return Evaluation(
        answers=len(numbers),
        rows=whole,
        accepted=_rounded(share / reached.clamp_min(1e-9)),
        tokens_per_verify=_rounded(1 + share.cumsum(0)),
        tokens_per_round=[round(tokens / max(1, n), 4) for n, tokens in rounds],
        second=_rounded(seconds / tried.clamp_min(1)),
        loss=round(loss / max(1, count), 4),
    )


def _agreement(
    head: TrainedHead, batch: Batch, vocabulary: DraftVocabulary, teacher: torch.Tensor, positions: int
) -> tuple[torch.Tensor, float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """([R] how many drafted tokens agree from each row on, the loss of the first, (rows, ranks) for each position)."""
    p = target_probabilities(batch.final, teacher)
    labels = vocabulary.inverse[batch.labels]
    depth = torch.zeros(len(labels), dtype=torch.long)
    guesses: list[tuple[torch.Tensor, torch.Tensor]] = []
    losses: list[float] = []

    def judge(step: int, rows: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        later = rows + step
        known = (labels[later] >= 0).float()
        weights = known if step == 0 else torch.zeros_like(known)
        loss, ranks = SoftCrossEntropy.apply(
            normed, head.weights["lm_head.weight"], p[later], weights, labels[later], head.compute
        )
        losses.append(float(loss))
        hit = ranks == 0
        depth[rows[hit].cpu()] += 1
        guesses.append((rows.cpu(), ranks.cpu()))
        return hit

    head.unroll(batch, positions, judge)
    none = torch.zeros(0, dtype=torch.long)
    guesses += [(none, none)] * (positions - len(guesses))
    return depth, losses[0], guesses


def _add_rounds(depth: list[int], rounds: list[list[int]]) -> None:
    """Decode one answer in rounds of K drafted tokens, for every K."""
    for k, totals in enumerate(rounds, 1):
        at = 0
        while at + k <= len(depth):  # the last, shorter round is left out
            tokens = 1 + min(k, depth[at])
            totals[0] += 1
            totals[1] += tokens
            at += tokens


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
