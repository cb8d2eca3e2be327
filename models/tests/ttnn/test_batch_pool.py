"""Texts of a board that share a pool of pages: who waits, what is shared, and that nothing else changes."""

import pytest
import torch

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import PerSequence
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.engine import Engine
from models.speculative.model import IDS, LOGITS, Paged, Rows
from models.speculative.sequence import Request
from models.tests.ttnn.model_fixtures import Weights, random_ids, reduced
from models.tests.ttnn.test_batch import batch_of, of_user
from models.ttnn_llama.shapes import KV_BLOCK

CONTEXT = 480


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=1), sharp=False)


@pytest.fixture(scope="module")
def model(mesh, weights):
    """Four slots, and pages for the longest text and one more."""
    return batch_of(weights, mesh, 4, max_seq_len=CONTEXT, pool=CONTEXT + KV_BLOCK)


@pytest.fixture(autouse=True)
def empty(model):
    """Nothing is under way, or left behind, when a test begins."""
    for slot in range(model.slots):
        model.free(slot)
    empty_pool(model)


def written(model, requests):
    """The sequences of these requests, in one engine, and how many ran at once at most."""
    engine = Engine(model, prompt_rows=10**6)
    sequences = [engine.add(request) for request in requests]
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, len(engine.running))
    for each in sequences:
        if each.error is not None:
            raise each.error
    return sequences, most


def request(prompt, new, drafted=True):
    drafter = PerSequence(lambda sequence: PromptLookup()) if drafted else None
    return Request(prompt, max_new_tokens=new, drafter=drafter, controller=FixedDraftLength(3) if drafted else None)


def test_short_texts_leave_room_and_long_ones_wait(model):
    """Five pages for four slots of four pages each."""
    assert isinstance(model, Paged)
    assert model.limits.pool == CONTEXT + KV_BLOCK and model.pages.count == 5
    prompts = [random_ids(20 + i, seed=i) for i in range(5)]
    short, most = written(model, [request(prompt, 8) for prompt in prompts])
    assert most == 4
    long, most = written(model, [request(random_ids(300, seed=9), 60), *(request(prompt, 8) for prompt in prompts)])
    assert most == 3, "three pages and a page each"
    assert [each.tokens for each in long[1:]] == [each.tokens for each in short]
    assert model.pages.free_count == model.pages.count
    with pytest.raises(UserError, match="the cache has 608 for all texts"):
        Request([1] * 20, max_new_tokens=640).check(model.limits._replace(positions=2000))
    with pytest.raises(UserError, match="shorten the prompt or raise --max-seq-len"):
        model.reserve(0, (), CONTEXT + 1)


def test_a_known_beginning_is_not_read_again_and_changes_no_bit(model):
    """Of the prompt's logits and cache, and of the texts, whose beginner has ended or is under way."""
    beginning = random_ids(300, seed=1)
    prompts = [[*beginning, *random_ids(n, seed=n)] for n in (5, 60, 130)]
    alone = []
    for prompt in prompts:
        assert model.reserve(0, (), len(prompt)) == 0
        logits = model.extend([Rows(0, prompt, 0, last=True)], LOGITS).logits(0)
        alone.append((logits, of_user(model, 0, len(prompt))))
        model.free(0)
        empty_pool(model)
    assert model.reserve(0, prompts[0], len(prompts[0])) == 0
    model.extend([Rows(0, prompts[0], 0, last=True)], IDS)
    for prompt, (logits, kept) in zip(prompts, alone, strict=True):
        model.free(1)
        held = model.reserve(1, prompt, len(prompt))
        assert held == 2 * KV_BLOCK
        assert model.pages.of(1)[:2] == model.pages.of(0)[:2]
        step = model.extend([Rows(1, prompt[held:], held, last=True)], LOGITS)
        assert torch.equal(step.logits(0), logits)
        assert torch.equal(of_user(model, 1, len(prompt)), kept)
    model.free(0)
    model.free(1)
    texts = []
    for prompt in prompts[:2]:
        (first,), _ = written(model, [request(prompt, 12)])
        assert first.stats.reused_tokens == 2 * KV_BLOCK
        empty_pool(model)
        (plain,), _ = written(model, [request(prompt, 12, drafted=False)])
        assert plain.stats.reused_tokens == 0
        texts.append((first.tokens, plain.tokens))
    assert all(a == b for a, b in texts)


def test_a_shared_page_stays_as_it_is(model):
    """Whatever is written behind it; and rows that would change it are refused before anything is written."""
    prompt = random_ids(280, seed=4)
    model.reserve(0, prompt, 300)
    model.extend([Rows(0, prompt, 0, last=True)])
    before = of_user(model, 0, 280)
    model.reserve(1, [*prompt[:270], 3], 310)
    model.extend([Rows(1, [*prompt[256:270], 3], 256, last=True)])
    for position in range(271, 300, 4):
        model.extend([Rows(1, random_ids(4, seed=position), position)])
    assert torch.equal(of_user(model, 0, 280), before)
    with pytest.raises(ValueError, match="which another text has too"):
        model.extend([Rows(1, [1, 2], 100)])
    assert torch.equal(of_user(model, 0, 280), before)


def test_a_chunk_needs_no_program_of_its_own_for_the_place_where_it_begins(mesh, model):
    """What has been compiled for a prompt serves every prompt that is no longer, whatever is known of it."""
    model.warm_up(3 * KV_BLOCK)
    compiled = mesh.num_program_cache_entries()
    prompt = random_ids(3 * KV_BLOCK, seed=2)
    model.reserve(0, prompt, len(prompt))
    model.extend([Rows(0, prompt, 0, last=True)], IDS)
    for known in (1, 2):
        other = [*prompt[: known * KV_BLOCK], *random_ids(KV_BLOCK, seed=known)]
        model.free(1)
        held = model.reserve(1, other, len(other))
        assert held == known * KV_BLOCK
        model.extend([Rows(1, other[held:], held, last=True)], IDS)
    assert mesh.num_program_cache_entries() == compiled


def empty_pool(model):
    """Let nothing be found."""
    model.pages.write(0, 0, model.pages.count * KV_BLOCK)
    model.free(0)
