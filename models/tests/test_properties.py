"""The whole engine on any model, any texts in any company: plain decoding's tokens, sums that add up, pages returned.

A case is one text of an engine, compared token by token with what the target writes for its prompt by itself. How many
there are: CASES of each of FUZZ_EXAMPLES, as for files.
"""

import dataclasses
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.speculative.control.policy import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.draft_head import HeadDrafter, HeadTreeDrafter
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.engine import Engine
from models.speculative.sequence import Request
from models.tests.batch_fixtures import KINDS
from models.tests.engine_fixtures import build, engine_config, perturbed, random_prompt
from models.tests.fuzzing import EXAMPLES, fuzzed
from models.tests.head_fixtures import build_head, head_config
from models.tests.llama_fixtures import random_tensors
from models.torch_llama.kv_cache import KV_BLOCK

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = 50  # texts for each example that is asked for
VOCAB, SLOTS, POSITIONS = 24, 8, 160
PROMPTS, LONGEST = 40, 16  # prompts of a shape, new tokens of a text
# Query heads, KV heads, head size, tied embeddings, rope base, rope scaling.
SHAPES = (
    (2, 1, 16, False, 1e4, True),
    (4, 4, 8, True, 5e5, False),
    (4, 2, 16, True, 1e4, True),
    (6, 2, 4, False, 100.0, False),
    (1, 1, 32, False, 1e4, True),
)


class Models:
    """A target of a shape with each pool of pages, all that drafts for it, and prompts with their texts."""

    def __init__(self, shape):
        heads, kv_heads, head_dim, tied, theta, scaled = SHAPES[shape]
        self.config = dataclasses.replace(
            engine_config(VOCAB),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tied,
            rope_theta=theta,
        )
        if not scaled:
            self.config = dataclasses.replace(self.config, rope_scaling=None)
        self.tensors = random_tensors(self.config, shape)
        self.draft = self._built(perturbed(self.tensors, 0.05, 1))
        self.head = build_head(head_config(self.config), self.target(None), slots=SLOTS)
        self._alone = build(self.config, self.tensors, max_seq_len=POSITIONS)

    def _built(self, tensors, **options):
        return build(self.config, tensors, max_seq_len=POSITIONS, slots=SLOTS, **options)

    @functools.cache  # noqa: B019
    def target(self, blocks):
        """With a pool of so many blocks; None: as many as all slots may have."""
        return self._built(self.tensors, pool=blocks and blocks * KV_BLOCK)

    @functools.cache  # noqa: B019
    def prompt(self, number):
        """One of PROMPTS: most are short, some repeat themselves, some share a beginning that fills a block."""
        if number % 10 == 9:
            return random_prompt(KV_BLOCK + 2, 0, VOCAB) + random_prompt(1 + number // 10, number, VOCAB)
        short = random_prompt(1 + number // 2, number, VOCAB)
        return short * 3 if number % 3 == 2 else short

    @functools.cache  # noqa: B019
    def text(self, number):
        """What the target writes after a prompt, by prefills of ever longer prompts: no loop of ours."""
        text: list[int] = []
        while len(text) < LONGEST:
            text.append(int(self._alone.prefill([*self.prompt(number), *text]).argmax()))
        return text

    def expected(self, wish):
        """(the text of a wish, why it ends)."""
        text = self.text(wish["prompt"])[: wish["new"]]
        for end in range(1, len(text) + 1):
            stop = wish["stop"]
            if text[end - 1] in wish["stop_ids"] or (stop and text[max(0, end - len(stop)) : end] == stop):
                return text[:end], "stop"
        return text, "length"


models_of = functools.cache(Models)


def drafter_of(kind, target, draft, head, nodes):
    """A drafter for any number of sequences."""

    def model(sequence, confident=True):
        return ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling, confident=confident)

    makers = {
        "none": lambda: None,
        "model": lambda: InStep(model, draft),
        "model-ids": lambda: InStep(lambda each: model(each, False), draft),
        "prompt-lookup": lambda: PerSequence(lambda each: PromptLookup()),
        "combined": lambda: InStep(lambda each: Combined(PromptLookup(), model(each)), draft),
        "tree": lambda: InStep(lambda each: TreeDrafter(draft.slot(each.slot), each.request.sampling, nodes), draft),
        "head": lambda: InStep(lambda each: HeadDrafter(head.slot(each.slot), each.request.sampling), head, head.taps),
        "head-tree": lambda: InStep(
            lambda each: HeadTreeDrafter(head.slot(each.slot), each.request.sampling, nodes), head, head.taps
        ),
        "early-exit": lambda: PerSequence(lambda each: EarlyExit(target.slot(each.slot), 1, each.request.sampling)),
    }
    return makers[kind]()


class EndsWith:
    """A stop string's watcher: ends a text after these tokens."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def push(self, token):
        self.seen.append(token.id)
        return self.seen[-len(self.tokens) :] == self.tokens


texts = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, PROMPTS - 1),
        "kind": st.sampled_from(KINDS),
        "length": st.sampled_from((0, 1, 2, 3, 5, 8, "auto")),
        "new": st.integers(1, LONGEST),
        "stop_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=1),
        "stop": st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=2),
        "verification": st.sampled_from(("batched",) * 9 + ("sequential",)),
        "arrives": st.sampled_from((0, 0, 0, 1, 4, 9)),
        "leaves": st.sampled_from((None, None, None, None, None, 0, 2, 4)),
    }
)


def write(models, blocks, prompt_rows, nodes, wishes):
    """One engine fulfils all wishes: their sequences. Those of a kind share a drafter, of a length a controller."""
    target = models.target(blocks)
    engine = Engine(target, prompt_rows=prompt_rows)
    drafters, controllers, sequences = {}, {}, {}
    for step in range(2000):
        for number, wish in enumerate(wishes):
            kind, length = wish["kind"], wish["length"]
            if wish["arrives"] == step:
                if kind not in drafters:
                    drafters[kind] = drafter_of(kind, target, models.draft, models.head, nodes)
                if length not in controllers:
                    controllers[length] = AutoDraftLength() if length == "auto" else FixedDraftLength(length)
                sequences[number] = engine.add(
                    Request(
                        models.prompt(wish["prompt"]),
                        max_new_tokens=wish["new"],
                        stop_ids=wish["stop_ids"],
                        watcher=EndsWith(wish["stop"]) if wish["stop"] else None,
                        drafter=drafters[kind],
                        controller=controllers[length],
                        verification="batched" if "tree" in kind else wish["verification"],
                    )
                )
            if wish["leaves"] is not None and step == wish["arrives"] + wish["leaves"]:
                engine.abort(sequences[number])
        if len(sequences) == len(wishes) and engine.idle:
            return [sequences[number] for number in range(len(wishes))]
        engine.step()
    raise AssertionError("the engine does not come to an end")


def check(sequence, wish, models, tally):
    """A text is its prompt's, as far as it was written, and its statistics add up."""
    stats, prompt = sequence.stats, sequence.request.prompt
    text = sequence.tokens[len(prompt) :]
    whole, reason = models.expected(wish)
    tally["cases tried"] += 1
    tally["tokens compared"] += len(text)
    tally["tokens wrong"] += sum(mine != right for mine, right in zip(text, whole, strict=False))
    assert sequence.error is None
    if stats.finish_reason == "interrupted":
        assert wish["leaves"] is not None and text == whole[: len(text)]
    else:
        assert (text, stats.finish_reason) == (whole, reason)
    assert stats.tokens == len(text) and stats.prompt_tokens == len(prompt)
    assert sum(each.emitted for each in stats.rounds) == max(0, len(text) - 1)
    for each in stats.rounds:
        assert 0 <= each.accepted <= each.depth <= each.drafted == len(each.proposed)
        assert each.emitted == each.accepted + 1 or each.cut


def test_every_text_is_plain_decodings_and_everything_is_given_back(tally):
    @settings(fuzzed, max_examples=4 * EXAMPLES)
    @given(
        shape=st.integers(0, len(SHAPES) - 1),
        blocks=st.sampled_from((None, 2, 4)),
        prompt_rows=st.sampled_from((5, 32, 512)),
        nodes=st.integers(1, 9),
        wishes=st.sampled_from((1, 14, 14, 14)).flatmap(lambda n: st.lists(texts, min_size=n, max_size=n + 8)),
    )
    def any_company(shape, blocks, prompt_rows, nodes, wishes):
        models = models_of(shape)
        target = models.target(blocks)
        idle = target.cache.idle
        for sequence, wish in zip(write(models, blocks, prompt_rows, nodes, wishes), wishes, strict=True):
            check(sequence, wish, models, tally)
        assert target.cache.idle == idle

    any_company()
    assert tally["cases tried"] >= CASES * EXAMPLES
