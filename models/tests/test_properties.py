"""The whole engine on any model, any texts in any company: plain decoding's tokens, sums that add up, pages returned.

How many cases: FUZZ_EXAMPLES, as for files. Each case is an engine with one to five texts.
"""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
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
from models.tests.engine_fixtures import build, engine_config, perturbed, plain
from models.tests.fuzzing import EXAMPLES
from models.tests.head_fixtures import build_head, head_config
from models.tests.llama_fixtures import random_tensors
from models.torch_llama.kv_cache import KV_BLOCK

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, SLOTS, POSITIONS = 24, 3, 160
# Query heads, KV heads, head size, tied embeddings, rope base, rope scaling.
SHAPES = (
    (2, 1, 16, False, 1e4, True),
    (4, 4, 8, True, 5e5, False),
    (4, 2, 16, True, 1e4, True),
    (6, 2, 4, False, 100.0, False),
    (1, 1, 32, False, 1e4, True),
)
_models: dict = {}


def models_of(shape, pool):
    """(target, draft, head) of a shape and a pool of pages, built once."""
    if (shape, pool) not in _models:
        heads, kv_heads, head_dim, tied, theta, scaled = SHAPES[shape]
        config = dataclasses.replace(
            engine_config(VOCAB),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tied,
            rope_theta=theta,
        )
        if not scaled:
            config = dataclasses.replace(config, rope_scaling=None)
        tensors = random_tensors(config, shape)
        options = {"max_seq_len": POSITIONS, "slots": SLOTS}
        target = build(config, tensors, pool=pool, **options)
        draft = build(config, perturbed(tensors, 0.05, 1), **options)
        head = build_head(head_config(config), target, slots=SLOTS)
        _models[shape, pool] = target, draft, head, build(config, tensors, max_seq_len=POSITIONS)
    return _models[shape, pool]


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
        "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        "repeats": st.sampled_from((1, 1, 3)),
        "kind": st.sampled_from(KINDS),
        "length": st.sampled_from((0, 1, 2, 3, 5, 8, "auto")),
        "nodes": st.integers(1, 9),
        "new": st.integers(1, 20),
        "stop_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=1),
        "stop": st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=2),
        "arrives": st.sampled_from((0, 0, 0, 1, 5)),
        "leaves": st.sampled_from((None, None, None, 0, 2, 4)),
    }
)


def expected(alone, prompt, wish):
    """What plain decoding of one text writes, cut where it ends."""
    text = plain(alone, prompt, max_new_tokens=wish["new"])
    for end in range(1, len(text) + 1):
        stop = wish["stop"]
        if text[end - 1] in wish["stop_ids"] or (stop and text[max(0, end - len(stop)) : end] == stop):
            return text[:end], "stop"
    return text, "length"


@settings(
    max_examples=EXAMPLES * 2,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(
    shape=st.integers(0, len(SHAPES) - 1),
    pool=st.sampled_from((None, 2 * KV_BLOCK)),
    prompt_rows=st.sampled_from((1, 4, 512)),
    wishes=st.lists(texts, min_size=1, max_size=5),
)
def test_every_text_is_plain_decodings_and_everything_is_given_back(tally, shape, pool, prompt_rows, wishes):
    tally["cases tried"] += 1
    target, draft, head, alone = models_of(shape, pool)
    idle = target.cache.idle
    engine = Engine(target, prompt_rows=prompt_rows)
    sequences: dict = {}
    for step in range(2000):
        for number, wish in enumerate(wishes):
            if wish["arrives"] == step:
                length = wish["length"]
                sequences[number] = engine.add(
                    Request(
                        wish["prompt"] * wish["repeats"],
                        max_new_tokens=wish["new"],
                        stop_ids=wish["stop_ids"],
                        watcher=EndsWith(wish["stop"]) if wish["stop"] else None,
                        drafter=drafter_of(wish["kind"], target, draft, head, wish["nodes"]),
                        controller=AutoDraftLength() if length == "auto" else FixedDraftLength(length),
                    )
                )
            if wish["leaves"] is not None and step == wish["arrives"] + wish["leaves"]:
                engine.abort(sequences[number])
        if len(sequences) == len(wishes) and engine.idle:
            break
        engine.step()
    assert engine.idle and target.cache.idle == idle
    for number, wish in enumerate(wishes):
        sequence = sequences[number]
        stats, prompt = sequence.stats, sequence.request.prompt
        text = sequence.tokens[len(prompt) :]
        whole, reason = expected(alone, prompt, wish)
        assert sequence.error is None
        tally["tokens compared"] += len(text)
        tally["tokens wrong"] += sum(mine != right for mine, right in zip(text, whole, strict=False))
        if stats.finish_reason == "interrupted":
            assert wish["leaves"] is not None and text == whole[: len(text)]
        else:
            assert (text, stats.finish_reason) == (whole, reason)
        assert stats.tokens == len(text) and stats.prompt_tokens == len(prompt)
        assert sum(each.emitted for each in stats.rounds) == max(0, len(text) - 1)
        for each in stats.rounds:
            assert 0 <= each.accepted <= each.depth <= each.drafted == len(each.proposed)
            assert each.emitted == each.accepted + 1 or each.cut
