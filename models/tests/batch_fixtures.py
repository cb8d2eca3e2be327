"""Many sequences in one engine: a small random pair with several slots, drafters of all kinds, and their company."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import Drafter, PerSequence
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.draft_head import HeadDrafter
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.engine import Engine
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request, Sequence
from models.tests.engine_fixtures import build, engine_config, perturbed, random_prompt
from models.tests.head_fixtures import build_head, head_config
from models.tests.llama_fixtures import random_tensors
from models.torch_llama.model import TorchLlama

KINDS = ("none", "model", "model-ids", "prompt-lookup", "combined", "tree", "head", "head-tree", "early-exit")
VOCAB = 24
SLOTS = 4
LONGEST = 24  # new tokens of a text
PROMPTS = 30


class Spy(TorchLlama):
    """A real model that notes the rows of each of its joint forwards; `fail` is asked before each."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.forwards = []
        self.fail = lambda rows: None

    def extend(self, rows, *want):
        self.forwards.append(list(rows))
        self.fail(rows)
        return super().extend(rows, *want)


class Company:
    """A target of several slots, all that can draft for it, and prompts with the texts that follow them.

    Args:
        vocab: few tokens, so that a random draft is often right.
        noise: of the draft's weights, beside the target's.
    """

    def __init__(self, vocab: int = VOCAB, noise: float = 0.04, layers: int = 2, **options) -> None:
        config = engine_config(vocab, layers)
        tensors = random_tensors(config, 0)
        chosen = {"dtype": "fp32", "max_seq_len": 96, "slots": SLOTS, **options}
        self.target = Spy(config, tensors, **chosen)
        chosen.pop("pool", None)
        self.draft = Spy(config, perturbed(tensors, noise, 1), **chosen)
        self.head = build_head(head_config(config), self.target, slots=self.target.slots)
        alone = build(config, tensors, max_seq_len=96)
        self.prompts = [random_prompt(1 + 3 * (i % 12), i, vocab) for i in range(PROMPTS)]
        # One that repeats itself, for lookup.
        self.prompts[::5] = [prompt * (1 + 30 // len(prompt)) for prompt in self.prompts[::5]]
        self.texts = [self.plain(alone, prompt) for prompt in self.prompts]

    @staticmethod
    def plain(model: TorchLlama, prompt: list[int]) -> list[int]:
        """The target's own greedy text, by prefills of ever longer prompts: no loop of ours."""
        text: list[int] = []
        while len(text) < LONGEST:
            text.append(int(model.prefill([*prompt, *text]).argmax()))
        return text

    def drafter(self, kind: str) -> Drafter | None:
        """A drafter for any number of sequences."""
        target, draft, head = self.target, self.draft, self.head

        def model(sequence):
            return ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling)

        def model_ids(sequence):
            return ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling, confident=False)

        def heads(sequence):
            return HeadDrafter(head.slot(sequence.slot), sequence.request.sampling)

        def head_trees(sequence):
            from models.speculative.drafters.draft_head import HeadTreeDrafter

            return HeadTreeDrafter(head.slot(sequence.slot), sequence.request.sampling, 5)

        def trees(sequence):
            return TreeDrafter(draft.slot(sequence.slot), sequence.request.sampling, 6)

        def early(sequence):
            return EarlyExit(target.slot(sequence.slot), 1, sequence.request.sampling)

        makers = {
            "model": lambda: InStep(model, draft),
            "model-ids": lambda: InStep(model_ids, draft),
            "prompt-lookup": lambda: PerSequence(lambda sequence: PromptLookup()),
            "combined": lambda: InStep(lambda sequence: Combined(PromptLookup(), model(sequence)), draft),
            "tree": lambda: InStep(trees, draft),
            "head": lambda: InStep(heads, head, head.taps),
            "head-tree": lambda: InStep(head_trees, head, head.taps),
            "early-exit": lambda: PerSequence(early),
            "none": lambda: None,
        }
        return makers[kind]()

    def expected(self, wish: Wish) -> list[int]:
        """The text of a wish when it is written alone."""
        text = self.texts[wish.prompt][: wish.max_new_tokens]
        stops = [i for i, token in enumerate(text) if token in wish.stop_ids]
        return text[: stops[0] + 1] if stops else text


@dataclass(frozen=True)
class Wish:
    """A text that is asked for: of which prompt, how it is drafted, when it comes, and when it is given up if ever."""

    prompt: int
    kind: str
    length: int | str
    max_new_tokens: int = LONGEST
    stop_ids: frozenset[int] = frozenset()
    arrives: int = 0
    leaves: int | None = None
    verification: str = "batched"
    sampling: SamplingParams = field(default_factory=SamplingParams)


def random_wish(draw: random.Random, vocab: int = VOCAB) -> Wish:
    """Any text."""
    kind = draw.choice(KINDS)
    trees = kind in ("tree", "head-tree")
    return Wish(
        prompt=draw.randrange(PROMPTS),
        kind=kind,
        length=0 if kind == "none" else draw.choice([0, 1, 2, 3, 5, 8, "auto"]),
        max_new_tokens=draw.choice([1, 6, 15, LONGEST, LONGEST]),
        stop_ids=frozenset(draw.sample(range(vocab), draw.choice([0, 0, 0, 1]))),
        arrives=draw.choice([0, 0, 0, draw.randrange(12)]),
        leaves=draw.choice([None, None, None, None, draw.randrange(14)]),
        verification="sequential" if not trees and draw.random() < 0.1 else "batched",
    )


def request_of(company: Company, wish: Wish, drafters: dict[str, Drafter | None], controllers: dict) -> Request:
    """A wish for the engine; those of a kind share a drafter, those of an automatic length a controller."""
    if wish.kind not in drafters:
        drafters[wish.kind] = company.drafter(wish.kind)
    if wish.length not in controllers:
        controllers[wish.length] = AutoDraftLength() if wish.length == "auto" else FixedDraftLength(int(wish.length))
    return Request(
        company.prompts[wish.prompt],
        wish.sampling,
        wish.max_new_tokens,
        wish.stop_ids,
        drafter=drafters[wish.kind],
        controller=controllers[wish.length],
        verification=wish.verification,
    )


def write(company: Company, wishes: list[Wish], prompt_rows: int = 512) -> list[Sequence]:
    """Let one engine fulfil all wishes, each coming and going in its own step: their sequences, in their order."""
    engine = Engine(company.target, prompt_rows=prompt_rows)
    drafters: dict[str, Drafter | None] = {}
    controllers: dict = {}
    sequences: dict[int, Sequence] = {}
    step = 0
    while len(sequences) < len(wishes) or not engine.idle:
        for number, wish in enumerate(wishes):
            if wish.arrives <= step and number not in sequences:
                sequences[number] = engine.add(request_of(company, wish, drafters, controllers))
            if wish.leaves is not None and step == wish.arrives + wish.leaves:
                engine.abort(sequences[number])
        lengths = {each: len(each.tokens) for each in sequences.values()}
        for sequence, tokens in engine.step():
            assert sequence.tokens[lengths[sequence] :] == [token.id for token in tokens]
        step += 1
        assert step < 1000, "the engine does not come to an end"
    assert not engine.running and all(each.finished for each in sequences.values())
    return [sequences[number] for number in range(len(wishes))]


def text_of(sequence: Sequence) -> list[int]:
    """What was written."""
    return sequence.tokens[len(sequence.request.prompt) :]
