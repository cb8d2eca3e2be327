"""Rows of a tree: each is what it would be as the last of its own path, and what is kept of them is the sequence."""

import pytest
import torch

from models.errors import UserError
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import perturbed, plain
from models.tests.ttnn.model_fixtures import (
    SIZES,
    VOCAB,
    Weights,
    cached,
    on_chips,
    random_ids,
    reduced,
    row_pccs,
)
from models.torch_llama.model import TorchLlama
from models.ttnn_llama.modules.rows import TreeInputs

CONTEXT = 352
IDS = random_ids(340, seed=3)
# Two chains of four and branches between them; rows 0, 1, 3, 5 and 0, 2, 6, 8 are paths.
PARENTS = [-1, 0, 0, 1, 1, 3, 2, 5, 6, 0, 6]
TOKENS = random_ids(len(PARENTS), seed=9)
POSITION = 121  # the tree lies across a border of 128


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=2))


@pytest.fixture(scope="module")
def model(mesh, weights):
    """With a bfp8 cache; the text is read."""
    model = weights.on(mesh, "accuracy")
    model.prefill(IDS[:200])  # beyond the tree too: there is something to hide
    return model


def path_to(row, parents=PARENTS):
    return [*(path_to(parents[row], parents) if row else []), row]


def random_tree(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return [-1, *(int(torch.randint(0, row, (), generator=draw)) for row in range(1, rows))]


# -------------------------------------------------------------------------------------------------- equal rows
@pytest.mark.parametrize("size", SIZES)
def test_a_tree_equals_the_torch_models(mesh, size):
    """Measured: 0.9994 at the worst."""
    weights = Weights.random(reduced(size, mesh.get_num_devices(), layers=2))
    model = weights.on(mesh, max_seq_len=CONTEXT)
    reference = TorchLlama(weights.config, weights, dtype="fp32", max_seq_len=CONTEXT)
    for each in (model, reference):
        each.prefill(IDS[:POSITION])
    for parents in (PARENTS, random_tree(32, seed=1)):
        tokens = random_ids(len(parents), seed=7)
        expected = reference.forward(tokens, POSITION, parents)
        assert min(row_pccs(model.forward(tokens, POSITION, parents), expected)) >= 0.99


def test_each_row_equals_the_last_row_of_its_path_bit_for_bit(model):
    made = model.forward(TOKENS, POSITION, PARENTS)
    assert model.greedy(TOKENS, POSITION, PARENTS) == made.argmax(-1).tolist()
    for row in range(len(PARENTS)):
        path = path_to(row)
        assert torch.equal(made[row], model.forward([TOKENS[i] for i in path], POSITION)[-1]), row


def test_a_chain_given_as_a_tree_is_a_verification(model):
    tokens, parents = IDS[POSITION : POSITION + 9], list(range(-1, 8))
    made = model.forward(tokens, POSITION, parents)
    rows = cached(model)[..., POSITION : POSITION + 9, :]
    assert torch.equal(made, model.forward(tokens, POSITION))
    assert torch.equal(cached(model)[..., POSITION : POSITION + 9, :], rows)


def test_a_tree_may_be_fed_in_parts(model):
    """As a drafter does, level by level: the last rows given, those before are in the cache."""
    expected = model.forward(TOKENS, POSITION, PARENTS)
    cache = cached(model)
    model.forward(random_ids(20, seed=8), POSITION)  # other rows, so that each has to be written
    begin = 0
    for end in (1, 2, 5, 11):
        made = model.forward(TOKENS[begin:end], POSITION, PARENTS[:end])
        assert torch.equal(made, expected[begin:end]), end
        assert model.greedy(TOKENS[begin:end], POSITION, PARENTS[:end]) == made.argmax(-1).tolist()
        begin = end
    used = POSITION + len(PARENTS)
    assert torch.equal(cached(model)[..., :used, :], cache[..., :used, :])


@pytest.mark.parametrize("position", [0, 127])
def test_a_tree_may_stand_anywhere(model, position):
    made = model.forward(TOKENS, position, PARENTS)
    for row in (0, 4, 8):
        assert torch.equal(made[row], model.forward([TOKENS[i] for i in path_to(row)], position)[-1]), row
    model.prefill(IDS[:200])


def test_a_token_changes_its_own_row_and_those_below_alone(model):
    before = model.forward(TOKENS, POSITION, PARENTS)
    changed = list(TOKENS)
    changed[2] = (changed[2] + 1) % VOCAB
    after = model.forward(changed, POSITION, PARENTS)
    for row in range(len(PARENTS)):
        assert torch.equal(before[row], after[row]) == (2 not in path_to(row)), row


def test_what_lies_behind_the_tree_and_the_rows_that_fill_it_up_change_nothing(model):
    """11 rows run in a program of 16: nothing else of the cache is written, and stale rows beyond are hidden."""
    made = model.forward(TOKENS, POSITION, PARENTS)
    before = cached(model)
    model.forward(random_ids(32, seed=5), POSITION + len(PARENTS))
    assert torch.equal(model.forward(TOKENS, POSITION, PARENTS), made)
    model.prefill(IDS[:200])
    untouched = cached(model)
    model.forward(TOKENS, POSITION, PARENTS)
    after = cached(model)
    written = slice(POSITION, POSITION + len(PARENTS))
    assert torch.equal(after[..., written, :], before[..., written, :])
    after[..., written, :] = untouched[..., written, :]
    assert torch.equal(after, untouched)


def test_rows_of_a_tree_may_lie_beyond_the_context_but_not_stand_there(model):
    position = CONTEXT - 3
    model.prefill(IDS[:1] * position)
    wide = [-1, 0, 1, *[1] * 29]  # 32 rows on three levels
    tokens = random_ids(32, seed=2)
    made = model.forward(tokens, position, wide)
    assert torch.equal(made[31], model.forward([tokens[i] for i in (0, 1, 31)], position)[-1])
    with pytest.raises(UserError, match=f"do not fit the context of {CONTEXT}"):
        model.forward(tokens[:4], position, [-1, 0, 1, 2])
    model.prefill(IDS[:200])


def test_trees_that_cannot_be_are_refused(model):
    for tokens, parents in (([1] * 33, [-1, *[0] * 32]), ([], [-1]), ([1, 2], [-1])):
        with pytest.raises(UserError, match="rows of a tree are outside 1..32: draft fewer tokens"):
            model.forward(tokens, 5, parents)


# ---------------------------------------------------------------------------------------------- what rows see
def test_masks_and_blocks_say_what_rows_see(mesh):
    parents, position, length = [-1, 0, 0, 2], 126, 384
    inputs = TreeInputs(5, 10, length, mesh)
    inputs.fill_tree([7, 8], position, parents)
    assert on_chips(inputs.positions)[0].tolist() == [128, 129, -1, -1, -1]
    assert on_chips(inputs.lookups)[0].tolist() == [[127, 128, 0, 0, 0] * 2]
    mask = on_chips(inputs.mask)[0][0, 0]
    seen = [(row == 0).nonzero().flatten().tolist() for row in mask]
    text = list(range(position))
    assert seen == [[*text, 126, 128], [*text, 126, 128, 129], *[[*text, 126]] * 3]
    assert set(mask.flatten().tolist()) == {0.0, -(2.0**30)}
    assert on_chips(inputs.blocks)[0].flatten().tolist() == [1, 1, 0]


# -------------------------------------------------------------------------------------------------- keeping
@pytest.mark.parametrize(
    ("rows", "held"), [([0], 1), ([0, 1, 3, 5], 2), ([0, 2, 6], 1), ([0, 1], 2), ([0, 1, 2, 3], 4)]
)
def test_kept_rows_are_the_sequence_once_the_others_are_fed_again(model, rows, held):
    parents = PARENTS if held < 3 else [-1, 0, 1, 2, 0, 4]
    tokens = TOKENS[: len(parents)]
    model.forward(tokens, POSITION, parents)
    assert model.keep(POSITION, rows) == held
    kept = [tokens[i] for i in rows]
    again = model.forward([*kept[held:], 5], POSITION + held)
    cache = cached(model)
    end = POSITION + len(rows) + 1
    assert torch.equal(model.forward([*kept, 5], POSITION)[held:], again)
    assert torch.equal(cached(model)[..., :end, :], cache[..., :end, :])


# ------------------------------------------------------------------------------------------------- whole texts
@pytest.fixture(scope="module")
def drafting(mesh, weights):
    """(target, draft): the draft is the target with noise."""
    noisy = {name: tensor.bfloat16() for name, tensor in perturbed(weights, 0.05, seed=5).items()}
    return tuple(each.on(mesh, max_seq_len=128) for each in (weights, Weights(weights.config, noisy)))


def written(target, draft, prompt, *, nodes, levels, sampling=None, **options):
    stats = GenerationStats()
    drafter = TreeDrafter(draft, sampling or SamplingParams(), nodes)
    controller = FixedDraftLength(levels)
    tokens = generate(target, drafter, prompt, controller=controller, sampling=sampling, stats=stats, **options)
    return [token.id for token in tokens], stats


@pytest.mark.key_boards
def test_greedy_text_from_trees_equals_plain_greedy_text(drafting):
    prompt = random_ids(14, seed=2)
    ids, stats = written(*drafting, prompt, nodes=15, levels=4, max_new_tokens=14)
    assert ids == plain(drafting[0], prompt, max_new_tokens=14)
    kept = [r.kept for r in stats.rounds if r.parents]
    assert any(len(rows) > 1 for rows in kept)
    assert any(list(rows) != list(range(len(rows))) for rows in kept)  # off the first chain: fed again


@pytest.mark.key_boards
def test_trees_go_on_to_the_end_of_the_context(drafting):
    prompt = random_ids(118, seed=4)
    ids, stats = written(*drafting, prompt, nodes=9, levels=4, max_new_tokens=50)
    assert ids == plain(drafting[0], prompt, max_new_tokens=50)
    assert (len(ids), stats.finish_reason) == (10, "context")


@pytest.mark.key_boards
def test_sampled_text_from_trees_repeats_with_its_seed(drafting):
    def text(seed):
        sampling = SamplingParams(temperature=0.8, top_k=20, seed=seed)
        return written(*drafting, random_ids(9, seed=6), nodes=6, levels=3, sampling=sampling, max_new_tokens=8)[0]

    first = text(1)
    assert len(first) == 8 and text(1) == first
    assert text(2) != first
