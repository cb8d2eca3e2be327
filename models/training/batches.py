"""Answers as batches of rows: sequences stand one after another, nothing is padded.

Slot i of a sequence pairs the states of token i with the embedding of token i + 1; after r drafted tokens it stands at
position i + r and predicts token i + 2 + r. Rows are the slots that draft while an answer is written: from the last
token of the prompt on. The target's next-token distribution that row m learns after r drafted tokens is the one of row
m + r, so that one table serves all steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from models.training.shards import AnswerStore

SHORTEST_ANSWER = 3  # tokens; a shorter one has no row


@dataclass(frozen=True)
class Span:
    """Where one sequence stands in a batch: slots [slot, slot + slots), rows [row, row + rows); the first row's slot
    within the sequence is `first`."""

    slot: int
    slots: int
    row: int
    rows: int
    first: int


@dataclass(frozen=True)
class Batch:
    """Sequences one after another.

    Args:
        spans: one per sequence.
        states: [slots, taps H] at the taps. next_ids: [slots] the token after each.
        final: [R, H] normed last states of the tokens after the rows' slots: they give the target's distribution.
        labels: [R] the tokens that follow these. row_ids: [R] the tokens whose final state that is.
        left: [R] rows of the same sequence from here on, this one included.
    """

    spans: list[Span]
    states: torch.Tensor
    next_ids: torch.Tensor
    final: torch.Tensor
    labels: torch.Tensor
    row_ids: torch.Tensor
    left: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On a device; states in `dtype`."""
        return Batch(
            self.spans,
            self.states.to(device, dtype),
            self.next_ids.to(device),
            self.final.to(device, dtype),
            self.labels.to(device),
            self.row_ids.to(device),
            self.left.to(device),
        )


def rows_of(store: AnswerStore, number: int) -> int:
    """Rows that an answer gives."""
    return store.length(number) - store.prompt(number) - 1


def usable(store: AnswerStore) -> list[int]:
    """Numbers of the answers that are long enough."""
    return [n for n in store.numbers if store.length(n) - store.prompt(n) >= SHORTEST_ANSWER and store.prompt(n) > 0]


def read_batch(store: AnswerStore, numbers: Sequence[int], hidden: int) -> Batch:
    """The answers with these numbers. hidden: width of one state, H."""
    spans, states, next_ids, final, labels, row_ids, left = [], [], [], [], [], [], []
    slot = row = 0
    for number in numbers:
        ids, stored, prompt = store.ids(number), store.states(number), store.prompt(number)
        slots, first = len(ids) - 2, prompt - 1
        rows = slots - first
        spans.append(Span(slot, slots, row, rows, first))
        states.append(stored[:slots, :-hidden])
        next_ids.append(ids[1 : slots + 1])
        final.append(stored[prompt:, -hidden:])
        labels.append(ids[prompt + 1 :])
        row_ids.append(ids[prompt:-1])
        left.append(torch.arange(rows, 0, -1))
        slot, row = slot + slots, row + rows
    columns = (torch.cat(part) for part in (states, next_ids, final, labels, row_ids, left))
    return Batch(spans, *columns)


class BatchOrder:
    """Which answers make up batch number `step`: a function of the answers, the seed and the step alone.

    Every epoch has another order; a batch has sequences until it has at least `rows` rows.
    """

    def __init__(self, rows_by_number: dict[int, int], rows: int, seed: int) -> None:
        self._rows_by_number, self._rows, self._seed = rows_by_number, rows, seed
        self._epochs: list[int] = []  # batches in each epoch, as far as known
        self._current: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> list[int]:
        epoch = 0
        while True:
            if epoch == len(self._epochs):
                self._epochs.append(len(self._batches(epoch)))
            if step < self._epochs[epoch]:
                return self._batches(epoch)[step]
            step -= self._epochs[epoch]
            epoch += 1

    def epoch(self, step: int) -> float:
        """Epochs that are over before a step."""
        return step / max(1, self._epochs[0] if self._epochs else len(self._batches(0)))

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._current[0] != epoch:
            key = hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest()[:7]
            numbers = list(self._rows_by_number)
            order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(int.from_bytes(key, "big")))
            self._current = (epoch, list(self._grouped(numbers[i] for i in order.tolist())))
        return self._current[1]

    def _grouped(self, numbers: Iterator[int]) -> Iterator[list[int]]:
        group, rows = [], 0
        for number in numbers:
            group.append(number)
            rows += self._rows_by_number[number]
            if rows >= self._rows:
                yield group
                group, rows = [], 0
        if group:
            yield group
