"""The draft head of the embedded target: what it is worth, and that feeding accepted positions again matters."""

import pytest

from models import LLM
from models.options import HEADS, NAMED
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.draft_head import HeadDrafter
from models.speculative.drafters.model import ModelDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats

PROMPTS = (
    "def add(a, b):",
    "class Stack:\n    def push(self",
    "import os\n\ndef read_file(path):",
    "for i in range(10):\n",
)
GREEDY = SamplingParams()
pytestmark = pytest.mark.usefixtures("one_thread")


class FedOnce(HeadDrafter):
    """Keeps the rows of accepted tokens as the head made them of its own states."""

    observe = ModelDrafter.observe


@pytest.fixture(scope="module")
def llm():
    with LLM.load("tiny", drafter="head", dtype="fp32", max_seq_len=512) as llm:
        yield llm


def tokens_a_round(llm, drafter, k):
    every = []
    for prompt in PROMPTS:
        stats = GenerationStats()
        ids = llm.encode(prompt)
        written = generate(
            llm.target.model, drafter(), ids, max_new_tokens=150, controller=FixedDraftLength(k), stats=stats
        )
        every.append(([token.id for token in written], stats))
    merged = GenerationStats.merge([stats for _, stats in every])
    return merged.tokens / len(merged.rounds), [ids for ids, _ in every]


def test_the_embedded_targets_head_drafts_better_than_its_draft_model(llm):
    with LLM.load("tiny", drafter="model", dtype="fp32", max_seq_len=512) as pair:
        model, expected = tokens_a_round(pair, lambda: ModelDrafter(pair.draft.model, GREEDY), 4)
    head, ids = tokens_a_round(llm, lambda: HeadDrafter(llm.draft.model, GREEDY), 4)
    assert ids == expected
    assert head > 1.05 * model


def test_accepted_positions_that_are_not_fed_again_cost_acceptance(llm):
    again, ids = tokens_a_round(llm, lambda: HeadDrafter(llm.draft.model, GREEDY), 8)
    once, same = tokens_a_round(llm, lambda: FedOnce(llm.draft.model, GREEDY), 8)
    assert ids == same
    assert again > 1.05 * once


def test_every_shipped_head_has_a_card_and_belongs_to_a_target_with_a_name():
    for name, path in HEADS.items():
        card = (path / "README.md").read_text(encoding="utf-8")
        assert "license:" in card and "tokens per verify" in card
        assert name in NAMED or name == "smollm2"
    assert sum(file.stat().st_size for file in HEADS["smollm2"].iterdir()) < 24 * 2**20
