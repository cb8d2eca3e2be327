"""TorchLlama over trees of tokens: every row is what its path alone would give, and a kept path is the sequence."""

import random

import pytest
import torch

from models.errors import UserError
from models.speculative.model import LOGITS, Rows
from models.speculative.tree import tree_levels
from models.tests.engine_fixtures import random_prompt
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.model import TorchLlama

CONTEXT = 256
LAYOUTS = {
    "two heads a group": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "no groups": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "folded by 3": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "folded by 4": {"num_attention_heads": 8, "num_key_value_heads": 2},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(layout: str = "two heads a group", **options) -> TorchLlama:
    config = tiny_config(**LAYOUTS[layout])
    return TorchLlama(config, random_tensors(config, seed=3), **{"dtype": "fp32", "max_seq_len": CONTEXT, **options})


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request):
    """(a model, another one with the same weights and a cache of its own)"""
    model = build(request.param)
    assert model.fold == {"folded by 3": 3, "folded by 4": 4}.get(request.param, 1)
    return model, build(request.param)


def random_tree(rows: int, seed: int) -> list[int]:
    """Parents of the rows of a tree, row 0 first; long chains and broad levels are both likely."""
    rng = random.Random(seed)
    reach = rng.choice([1, 2, 4, rows])  # how far back a parent may lie
    return [-1, *(rng.randrange(max(0, row - reach), row) for row in range(1, rows))]


def path_to(parents: list[int], row: int) -> list[int]:
    """Rows from row 0 down to this one."""
    return [*path_to(parents, parents[row]), row] if row >= 0 else []


def leaves(parents: list[int]) -> list[int]:
    return sorted(set(range(len(parents))) - set(parents))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, start", [(1, 20), (2, 1), (7, 30), (12, 121), (32, 100), (32, 200)])
def test_rows_of_every_path_equal_those_of_a_chain(pair, rows, start):
    """121 and 100: the tree's rows lie across the border of two blocks of 128."""
    model, linear = pair
    prompt = random_prompt(start, seed=rows, vocab_size=128)
    for each in pair:
        each.prefill(prompt)
    for seed in range(4):
        parents, tokens = random_tree(rows, seed), random_prompt(rows, seed, vocab_size=128)
        got = model.forward(tokens, start, parents)
        assert got.shape == (rows, 128)
        assert model.greedy(tokens, start, parents) == got.argmax(-1).tolist()
        for leaf in leaves(parents):
            path = path_to(parents, leaf)
            close(got[path], linear.forward([tokens[row] for row in path], start))


def test_a_chain_with_parents_is_a_chain(pair):
    model, linear = pair
    prompt, tokens = random_prompt(40, 1, 128), random_prompt(9, 2, 128)
    for each in pair:
        each.prefill(prompt)
    close(model.forward(tokens, 40, list(range(-1, 8))), linear.forward(tokens, 40))


def test_a_row_sees_no_token_beside_its_path(pair):
    """Not even in the last bit: what is masked has no weight at all."""
    model, _ = pair
    prompt = random_prompt(30, 1, 128)
    for seed in range(6):
        parents, tokens = random_tree(10, seed), random_prompt(10, seed, 128)
        model.prefill(prompt)
        before = model.forward(tokens, 30, parents)
        for row in leaves(parents):
            others = [token if i in path_to(parents, row) else (token + 7) % 128 for i, token in enumerate(tokens)]
            assert torch.equal(model.forward(others, 30, parents)[row], before[row])


@pytest.mark.parametrize("fixed_rows", [None, 12])
def test_a_tree_fed_in_pieces_equals_one_fed_at_once(fixed_rows):
    model, rng = build(fixed_rows=fixed_rows), random.Random(5)
    prompt = random_prompt(25, 1, 128)
    for seed in range(12):
        parents, tokens = random_tree(12, seed), random_prompt(12, seed, 128)
        model.prefill(prompt)
        whole = model.forward(tokens, 25, parents)
        model.prefill(prompt)
        cuts = sorted({0, 12, *rng.sample(range(1, 12), rng.randint(1, 5))})
        pieces = [model.forward(tokens[a:b], 25, parents[:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        close(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_rows_of_every_path_have_the_bits_of_a_chain(layout, dtype):
    """Siblings lie between the rows of a path, and across blocks of the cache; also where the path moves together."""
    model, chain = (build(layout, dtype=dtype, compiled=True) for _ in range(2))
    for rows, start in ((7, 30), (12, 121), (32, 200)):
        ids, parents = random_prompt(start + rows, rows, model.vocab_size), random_tree(rows, seed=rows)
        for each in (model, chain):
            each.prefill(ids[:start])
        logits = model.forward(ids[start:], start, parents)
        for leaf in leaves(parents):
            path = path_to(parents, leaf)
            expected = chain.forward([ids[start + row] for row in path], start)
            assert torch.equal(logits[path], expected), (rows, path)
        model.keep(start, path)
        assert torch.equal(model.forward([5, 6], start + len(path)), chain.forward([5, 6], start + len(path)))


@pytest.mark.parametrize("layout", ["two heads a group", "folded by 4"])
@pytest.mark.parametrize("fixed_rows", [7, 16, 32])
def test_padding_changes_no_row(layout, fixed_rows):
    padded, exact = build(layout, fixed_rows=fixed_rows), build(layout)
    for start in (1, 60, 120, 126, 240):
        prompt = random_prompt(start, 1, 128)
        for each in (padded, exact):
            each.prefill(prompt)
        for rows in (1, 4, 7):
            parents, tokens = random_tree(rows, rows), random_prompt(rows, start, 128)
            got = padded.forward(tokens, start, parents)
            assert got.shape == (rows, 128)
            close(got, exact.forward(tokens, start, parents))


@pytest.mark.parametrize("start", [20, 122])
def test_a_kept_path_is_the_sequence_and_nothing_else_has_moved(pair, start):
    model, linear = pair
    prompt = random_prompt(start, 1, 128)
    for seed in range(8):
        parents, tokens = random_tree(10, seed), random_prompt(10, seed, 128)
        for row in range(10):  # inner rows too: a text may leave the tree anywhere
            path = path_to(parents, row)
            for each in pair:
                each.prefill(prompt)
            model.forward(tokens, start, parents)
            before = model.kv.clone()
            assert model.keep(start, path) == len(path)
            end = start + len(path)
            assert torch.equal(model.kv[:, start:end], before[:, [start + i for i in path]])
            assert torch.equal(model.kv[:, :start], before[:, :start])
            assert torch.equal(model.kv[:, end:], before[:, end:])
            linear.forward([tokens[i] for i in path], start)
            close(model.kv[:, :end], linear.kv[:, :end])
            close(model.forward([5, 6], end), linear.forward([5, 6], end))


def test_trees_one_after_the_other_keep_a_sequence():
    """What two models go through in a generation: a tree, a path of it kept, the next tree behind that."""
    model, linear = build(), build()
    sequence = random_prompt(15, 2, 128)
    model.prefill(sequence)
    for seed in range(20):
        parents, tokens = random_tree(8, seed), random_prompt(8, seed, 128)
        position = len(sequence)
        got = model.forward(tokens, position, parents)
        path = path_to(parents, random.Random(seed).randrange(8))
        close(got[path[-1]], linear.prefill(sequence + [tokens[row] for row in path]))
        model.keep(position, path)
        sequence += [tokens[row] for row in path]


def test_a_tree_in_a_model_of_several_sequences_leaves_the_others_alone():
    model, alone = build(slots=3), build()
    prompts = [random_prompt(20, seed, 128) for seed in range(3)]
    model.extend([Rows(slot, prompt, 0, last=True) for slot, prompt in enumerate(prompts)])
    before = [model.slot(slot).kv.clone() for slot in (1, 2)]
    parents, tokens = [-1, 0, 0, 1, 2], [4, 5, 6, 7, 8]
    alone.prefill(prompts[0])
    close(model.forward(tokens, 20, parents), alone.forward(tokens, 20, parents))
    model.keep(20, [0, 2, 4])
    for slot, kv in zip((1, 2), before, strict=True):
        assert torch.equal(model.slot(slot).kv, kv)
    step = model.extend([Rows(0, [9], 23), Rows(1, [9], 20), Rows(2, [9], 20)], LOGITS)
    alone.keep(20, [0, 2, 4])
    close(step.logits(0), alone.forward([9], 23))
    for slot in (1, 2):
        close(step.logits(slot)[0], alone.prefill([*prompts[slot], 9]))


def test_a_tree_needs_room_for_its_levels_not_for_its_rows():
    model, linear = build(max_seq_len=40), build(max_seq_len=40)
    prompt = random_prompt(37, 1, 128)
    parents = [-1, *[0] * 15, *[4] * 16]
    tokens = random_prompt(32, 2, 128)
    for each in (model, linear):
        each.prefill(prompt)
    got = model.forward(tokens, 37, parents)
    assert tree_levels(parents) == 3
    close(got[[0, 4, 31]], linear.forward([tokens[0], tokens[4], tokens[31]], 37))
    model.keep(37, [0, 4])
    linear.forward([tokens[0], tokens[4]], 37)
    close(model.forward([3], 39), linear.forward([3], 39))
    with pytest.raises(UserError, match="3 tokens at position 38 do not fit the context of 40"):
        model.forward(tokens, 38, parents)


@pytest.mark.parametrize("fixed_rows, most", [(None, 32), (8, 8)])
def test_a_tree_of_too_many_rows_is_refused(fixed_rows, most):
    model = build(fixed_rows=fixed_rows)
    model.prefill([1, 2, 3])
    model.forward([1] * most, 3, [-1, *range(most - 1)])
    with pytest.raises(UserError, match=f"a tree of {most + 1} rows exceeds {most}: draft fewer tokens"):
        model.forward([1], 3, [-1, *[0] * most])
