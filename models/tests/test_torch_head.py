"""TorchHead: caches, chunks, slots, trees and numbers of a draft head, on random weights."""

import dataclasses

import pytest
import torch

from models.errors import UserError
from models.speculative.model import IDS, LOGITS, Rows, Want
from models.tests.head_fixtures import head_config, random_head_tensors
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama import draft_head
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.linear import int8_works

TARGET = tiny_config(num_hidden_layers=4)
EMBEDDING = random_tensors(TARGET, 3)["model.embed_tokens.weight"]
CONFIG = head_config(TARGET, 60, taps=(1, 2, 3), norm_before_residual=True, fc_norm=True)
LENGTH = 40
CLOSE = {"rtol": 0, "atol": 2e-5}  # fp32: the same sums in another order

pytestmark = pytest.mark.usefixtures("one_thread")


def build(config=CONFIG, seed=1, **options) -> TorchHead:
    return TorchHead(
        config, random_head_tensors(config, seed), EMBEDDING, **{"dtype": "fp32", "max_seq_len": 64, **options}
    )


def text(seed=0, length=LENGTH):
    """(states [n, taps x H], tokens [n])"""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, len(CONFIG.taps) * TARGET.hidden_size, generator=generator)
    return states, torch.randint(TARGET.vocab_size, (length,), generator=generator).tolist()


def given(head, states, tokens):
    """The head after a whole text, whose logits [n - 1, V_d] are returned."""
    head.states(states, range(len(states)), 0)
    return head.forward(tokens[1:], 1)


def chain(head, tokens, position):
    """Logits [n, V_d] of tokens fed one by one, after a row computed before."""
    return torch.cat([head.forward([token], position + i) for i, token in enumerate(tokens)])


# ------------------------------------------------------------------------------------------------------------- numbers
def test_bf16_is_near_fp32():
    states, tokens = text()
    exact, rough = given(build(), states, tokens), given(build(dtype="bf16"), states, tokens).float()
    assert rough.ne(exact).any()
    error = (rough - exact).pow(2).mean().sqrt() / exact.std()
    assert error < 0.03


@pytest.mark.skipif(not int8_works(), reason="no int8 kernels for this CPU")
def test_int8_is_near_fp32_and_smaller():
    states, tokens = text()
    plain, small = build(), build(quantize="int8")
    exact, rough = given(plain, states, tokens), given(small, states, tokens)
    error = (rough - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < error < 0.05
    assert small.weight_bytes < 0.5 * plain.weight_bytes
    head = build(quantize="int8")
    head.states(states[:10], range(10), 0)
    assert len(head.draft_greedy(tokens[1:11], 1, 5)) == 5


def test_weights_are_counted_without_the_embedding():
    assert build().weight_bytes == 4 * CONFIG.parameter_count
    assert build(dtype="bf16").weight_bytes == 2 * CONFIG.parameter_count


def test_the_targets_embedding_is_shared_unless_the_head_has_its_own():
    assert build().embedding is EMBEDDING
    own = torch.randn(TARGET.vocab_size, TARGET.hidden_size)
    tensors = random_head_tensors(CONFIG, 1) | {"embed_tokens.weight": own}
    head = TorchHead(CONFIG, tensors, EMBEDDING, dtype="fp32", max_seq_len=64)
    states, tokens = text()
    assert not torch.allclose(given(head, states, tokens), given(build(), states, tokens), **CLOSE)
    head.embedding = EMBEDDING
    torch.testing.assert_close(given(head, states, tokens), given(build(), states, tokens), **CLOSE)


# --------------------------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("sizes", [[1] * 39, [5, 1, 20, 13], [32, 7]])
def test_rows_by_chunks_equal_one_pass(sizes):
    states, tokens = text()
    expected, head = given(build(), states, tokens), build()
    found, position = [], 1
    head.states(states[:1], range(1), 0)
    for size in sizes:
        if position > 1:
            head.states(states[position - 1 :], range(1), position - 1)
        rows = states[position : position + size - 1]
        head.states(rows, range(len(rows)), position)
        found.append(head.forward(tokens[position : position + size], position))
        position += size
    assert position == LENGTH
    torch.testing.assert_close(torch.cat(found), expected, **CLOSE)


def test_a_prompt_of_several_chunks_equals_one_pass(monkeypatch):
    states, tokens = text()
    expected = given(build(), states, tokens)[-1]
    monkeypatch.setattr(draft_head, "READ_CHUNK", 7)
    head = build()
    head.states(states, range(LENGTH), 0)
    torch.testing.assert_close(head.prefill(tokens), expected, **CLOSE)


def test_rows_of_the_text_may_be_any_rows_of_a_forward():
    states, tokens = text()
    head, mixed = build(), torch.full((3 * LENGTH, states.shape[-1]), float("nan"))
    rows = [3 * i + 1 for i in range(LENGTH)]
    mixed[rows] = states
    head.states(mixed, rows, 0)
    torch.testing.assert_close(head.forward(tokens[1:], 1), given(build(), states, tokens), **CLOSE)


def test_stale_rows_are_never_read():
    """Drafted rows are fed again with the target's states; nothing of them, nor of what lies behind, is left."""
    states, tokens = text()
    expected, head = given(build(), states, tokens), build()
    head.cache.fill(float("nan"))  # what other texts left
    head.states(states[:20], range(20), 0)
    head.forward(tokens[1:21], 1)
    chain(head, [7, 7, 7, 7, 7], 21)
    head.states(states[20:23], range(3), 20)
    found = head.forward(tokens[21:24], 21)
    torch.testing.assert_close(found, expected[20:23], **CLOSE)
    chain(head, [9, 9], 24)
    head.states(states[23:], range(LENGTH - 23), 23)
    torch.testing.assert_close(head.forward(tokens[24:], 24), expected[23:], **CLOSE)


def test_feeding_true_states_again_changes_the_rows_that_follow():
    """What a head made of its own guesses differs from what the target's states make of the same tokens."""
    states, tokens = text()
    expected, head = given(build(), states, tokens), build()
    head.states(states[:20], range(20), 0)
    head.forward(tokens[1:21], 1)
    guessed = chain(head, tokens[21:24], 21)
    assert not torch.allclose(guessed, expected[20:23], rtol=0, atol=1e-2)


def test_states_of_other_rejected_tokens_are_replaced():
    states, tokens = text()
    head, (other, _) = build(), text(seed=5)
    head.states(states[:20], range(20), 0)
    head.read(tokens[1:21], 1)
    head.states(other[:5], range(5), 20)
    head.states(states[20:], range(LENGTH - 20), 20)
    found = head.forward(tokens[21:], 21)
    torch.testing.assert_close(found, given(build(), states, tokens)[20:], **CLOSE)


def test_position_0_begins_another_text():
    states, tokens = text()
    head = build()
    other_states, other = text(seed=5)
    given(head, other_states, other)
    chain(head, [3, 4], LENGTH)
    torch.testing.assert_close(given(head, states, tokens), given(build(), states, tokens), **CLOSE)


# --------------------------------------------------------------------------------------------------------------- slots
def test_slots_do_not_mix():
    texts = [text(seed) for seed in range(3)]
    expected = []
    for states, tokens in texts:
        alone = build()
        rows = given(alone, states[:20], tokens[:21])
        expected.append(torch.cat((rows, chain(alone, tokens[21:25], 21))))
    head = build(slots=3)
    found = [[given(head.slot(i), states[:20], tokens[:21])] for i, (states, tokens) in enumerate(texts)]
    for step in range(4):
        for i in (2, 0, 1):
            found[i].append(head.slot(i).forward([texts[i][1][21 + step]], 21 + step))
    for i in range(3):
        torch.testing.assert_close(torch.cat(found[i]), expected[i], **CLOSE)


def test_a_freed_slot_leaves_the_others_alone():
    head = build(slots=2)
    states, tokens = text()
    for i in range(2):
        given(head.slot(i), states[:20], tokens[:21])
    head.free(1)
    expected = build()
    given(expected, states[:20], tokens[:21])
    torch.testing.assert_close(chain(head.slot(0), [5, 6], 21), chain(expected, [5, 6], 21), **CLOSE)
    with pytest.raises(ValueError, match="not known"):
        head.slot(1).forward([5], 21)
    with pytest.raises(IndexError, match="slot 2 of a head with 2"):
        head.slot(2)


@pytest.fixture
def forwards(monkeypatch):
    """Sequences of each forward of any head."""
    noted, compute = [], TorchHead._rows

    def counted(self, shares, scored):
        noted.append(len(shares))
        return compute(self, shares, scored)

    monkeypatch.setattr(TorchHead, "_rows", counted)
    return noted


def test_rows_of_all_kinds_in_one_forward_equal_each_alone(forwards):
    """Accepted rows with the target's states, a drafted one, a level of a tree and a text, on both sides of a page."""
    texts = [text(seed, length) for seed, length in enumerate((20, 126, 40, 130, 60))]
    rows = [
        Rows(0, [11, 12, 13], 20, last=True),
        Rows(1, [14], 127),
        Rows(2, [15, 16], 40, [-1, 0, 0]),
        Rows(3, [17], 131),
        Rows(4, texts[4][1], 0, last=True),
    ]

    def ready(head, i):
        states, tokens = texts[i]
        if i == 4:
            head.states(states, range(len(states)), 0)
            return
        given(head, states, [*tokens, 5])
        if i == 0:
            head.states(text(9)[0], range(3), 19)
        if i == 2:
            head.forward([7], 41)  # a chain that was drafted before is stale
            head.states(states[39:], range(1), 39)
            head.forward([5], 40)

    head = build(slots=5, max_seq_len=200)
    for i in range(5):
        ready(head.slot(i), i)
    forwards.clear()
    step = head.extend(rows, LOGITS)
    assert forwards == [5]
    for i, each in enumerate(rows):
        alone = build(max_seq_len=200)
        ready(alone, i)
        if i == 4:
            expected = alone.prefill(texts[4][1])[None]
        else:
            expected = alone.forward(each.tokens, each.position, each.parents)
        torch.testing.assert_close(step.logits(i), expected[-1:] if each.last else expected, **CLOSE)
        assert step.ids()[i] == alone._ids(step.logits(i).argmax(-1)).tolist()
    again = head.extend([Rows(1, [14], 128), Rows(3, [17], 132)], IDS).ids()
    for (slot, position, token), found in zip(((1, 128, 14), (3, 132, 17)), again, strict=True):
        alone = build(max_seq_len=200)
        ready(alone, slot)
        assert found == [alone.greedy([token], at)[0] for at in (position - 1, position)][1:]


def test_a_row_that_fails_leaves_the_others_as_they_were():
    states, tokens = text()
    head, alone = build(slots=2), build()
    for each in (head, alone):
        given(each, states[:20], tokens[:21])
        each.states(states[20:22], range(2), 20)
    good = Rows(0, [*tokens[21:23]], 21, last=True)
    with pytest.raises(ValueError, match="not known"):
        head.extend([good, Rows(1, [1, 2], 5)], LOGITS)
    torch.testing.assert_close(head.extend([good], LOGITS).logits(0), alone.forward(tokens[21:23], 21)[1:], **CLOSE)
    with pytest.raises(ValueError, match="several Rows of one slot"):
        head.extend([good, good])
    with pytest.raises(ValueError, match="keeps no hidden states"):
        head.extend([good], Want(taps=(0,)))
    refused(UserError, "33 rows exceed the 32", head.extend, [Rows(0, [1] * 33, 21)])


def test_memory_grows_with_use_and_is_given_back():
    head = build(slots=4, max_seq_len=1000)
    assert head.cache.usage.live == 0
    page = head.cache.position_bytes * 128
    for slot, length in enumerate((20, 129, 130, 300)):
        given(head.slot(slot), *text(slot, length))
    assert head.cache.usage.live == head.cache.usage.held == (1 + 1 + 2 + 3) * page
    for slot in (3, 1, 0, 2):
        head.free(slot)
    assert head.cache.usage.held == 0
    head.slot(2).warm_up(text()[1])
    assert head.cache.usage.held == 0


# --------------------------------------------------------------------------------------------------------------- trees
#          0
#      1       2
#    3   4     5
#    6
PARENTS = [-1, 0, 0, 1, 1, 2, 3]
LEVELS = [1, 3, 6, 7]


def test_rows_of_a_tree_equal_chains_of_the_same_paths():
    states, tokens = text()
    nodes = [tokens[20], 11, 12, 13, 14, 15, 16]
    head = build()
    head.states(states[:20], range(20), 0)
    found = [head.forward(tokens[1:21], 1)[-1:]]
    for done, end in zip(LEVELS, LEVELS[1:], strict=False):
        found.append(head.forward(nodes[done:end], 20, PARENTS[:end]))
    rows = torch.cat(found)
    for leaf in range(1, len(PARENTS)):
        path, node = [], leaf
        while node:
            path, node = [node, *path], PARENTS[node]
        alone = build()
        alone.states(states[:20], range(20), 0)
        alone.read(tokens[1:21], 1)
        expected = chain(alone, [nodes[i] for i in path], 21)
        torch.testing.assert_close(rows[path], expected, **CLOSE)


def test_a_trees_rows_are_not_read_afterwards():
    states, tokens = text()
    head = build()
    head.states(states[:20], range(20), 0)
    head.forward(tokens[1:21], 1)
    head.forward([11, 12], 20, PARENTS[:3])
    assert head.keep(20, [0, 2]) == 1
    head.states(states[20:23], range(3), 20)
    expected = given(build(), states, tokens)[20:23]
    torch.testing.assert_close(head.forward(tokens[21:24], 21), expected, **CLOSE)


@pytest.mark.parametrize(
    ("tokens", "position", "parents"),
    [([1], 19, [-1, 0]), ([1], 20, [-1, 0, 1]), ([1, 2], 20, [-1, 0, 1]), ([1], 20, [-1])],
)
def test_a_tree_without_its_parents_is_refused(tokens, position, parents):
    states, ids = text()
    head = build()
    head.states(states[:20], range(20), 0)
    head.forward(ids[1:21], 1)
    with pytest.raises(ValueError, match="parents have not been computed"):
        head.forward(tokens, position, parents)


# -------------------------------------------------------------------------------------------------------------- chains
@pytest.mark.parametrize("draft", [60, None])
def test_a_greedy_chain_feeds_the_targets_ids(draft):
    states, tokens = text()
    config = dataclasses.replace(CONFIG, draft_vocab_size=draft or TARGET.vocab_size)
    head, by_hand = build(config), build(config)
    for each in (head, by_hand):
        each.states(states[:20], range(20), 0)
    found = head.draft_greedy(tokens[1:21], 1, 6)
    ids = [by_hand.greedy(tokens[1:21], 1)[-1]]
    for position in range(21, 26):
        ids += by_hand.greedy([ids[-1]], position)
    assert found == ids
    if draft:
        known = (torch.arange(draft) + random_head_tensors(config, 1)["d2t"]).tolist()
        assert set(found) <= set(known) and max(known) > draft


# ---------------------------------------------------------------------------------------------------------- what fails
def refused(kind, said, call, *args, **options):
    with pytest.raises(kind, match=said) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_a_context_ends():
    states, tokens = text()
    head = build(max_seq_len=24)
    head.states(states[:23], range(23), 0)
    head.forward(tokens[1:24], 1)
    refused(UserError, "1 rows of a draft head at position 24 are outside 1..23", head.forward, [1], 24)
    head.states(states[:24], range(24), 0)
    refused(UserError, "24 rows of a draft head at position 1 are outside 1..23", head.forward, tokens[1:25], 1)
    refused(UserError, "at position 0 are outside", head.forward, [1], 0)
    refused(UserError, "0 rows", head.forward, [], 1)


def test_a_tree_past_the_contexts_end_is_refused():
    states, tokens = text()
    head = build(max_seq_len=24)
    head.states(states[:22], range(22), 0)
    head.forward(tokens[1:23], 1)
    head.forward([1], 22, [-1, 0])
    refused(UserError, "outside 1..23: shorten the prompt or raise", head.forward, [1], 22, [-1, 0, 1])


def test_states_that_do_not_fit_are_refused():
    states, _ = text()
    head = build()
    refused(ValueError, "features 191 wide: the head reads 192", head.states, states[:, 1:], range(3), 0)
    head.states(states[:5], range(5), 0)
    refused(ValueError, r"states of position 7: those known are of 0..4", head.states, states, range(3), 7)
    refused(ValueError, "states before them are not known", head.forward, [1, 2], 7)


def test_what_cannot_be_run_is_refused():
    refused(UserError, "int8 weights run on the CPU only", build, device="meta", quantize="int8")
    refused(ValueError, "give at least two tokens", build().prefill, [1])
