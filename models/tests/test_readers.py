"""Logits for who wants to see them: those that every token is chosen from, with any drafter."""

import pytest
import torch

from models.speculative.drafters import OneText
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.engine import Engine
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request
from models.tests.engine_fixtures import build_pair, random_prompt


class Kept:
    def __init__(self):
        self.rows = []

    def read(self, logits):
        self.rows.append(logits.clone())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "verification"),
    [
        (None, "batched"),
        (ModelDrafter, "batched"),
        (ModelDrafter, "sequential"),
        (lambda *parts: TreeDrafter(*parts, nodes=6), "batched"),
    ],
    ids=["plain", "chain", "sequential", "tree"],
)
def test_rows_are_those_of_one_forward_over_the_text(kind, verification, temperature):
    target, draft = build_pair(3, 0.3, slots=2)
    sampling = SamplingParams(temperature=temperature, seed=2)
    drafter = None if kind is None else OneText(kind(draft.slot(0), sampling))
    engine, kept, prompt = Engine(target), Kept(), random_prompt(9, seed=4)
    other = engine.add(Request(random_prompt(5, seed=5), max_new_tokens=20))  # shares the forwards, wants ids alone
    sequence = engine.add(Request(prompt, sampling, 20, drafter=drafter, verification=verification, reader=kept))
    emitted = []
    while not engine.idle:
        for emission in engine.step():
            if emission.sequence is sequence:
                rows = torch.cat(kept.rows)
                assert len(rows) >= len(emission.tokens)
                emitted.append(rows[: len(emission.tokens)])
                kept.rows.clear()
    assert sequence.error is None and other.error is None
    found = torch.cat(emitted)
    assert len(found) == 20
    checked, _ = build_pair(3, 0.3)
    expected = torch.stack([checked.prefill(sequence.tokens[:end]) for end in range(9, 29)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if not temperature:
        assert found.argmax(-1).tolist() == sequence.tokens[9:]
    if kind is not None:
        assert any(round_.accepted for round_ in sequence.stats.rounds)
