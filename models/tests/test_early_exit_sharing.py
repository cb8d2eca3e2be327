"""Early exit shares layers and cache with its target: nothing is done twice, and drafts leave no trace in them."""

import random
from collections import Counter

import pytest
import torch

from models.errors import UserError
from models.speculative.drafters.early_exit import EarlyExit
from models.tests.early_exit_fixtures import EXITS, Counting, Switching, early_text, weak_tail
from models.tests.engine_fixtures import GREEDY, random_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layers, exit_layer", EXITS)
def test_no_layer_is_computed_twice_for_a_token(layers, exit_layer):
    """Each round: K rows by the draft, one by one; one more for the last token; K + 1 by the other layers, at once."""
    target = weak_tail(layers, exit_layer, seed=1)
    counters = [Counting(layer.qkv) for layer in target.layers]
    for layer, counter in zip(target.layers, counters, strict=True):
        layer.qkv = counter
    _, stats = early_text(target, exit_layer, random_prompt(6, seed=1), controller=Switching(4, 1), max_new_tokens=60)
    drafted = [r.drafted for r in stats.rounds]
    assert {0, 4} <= set(drafted)
    for number, counter in enumerate(counters):
        prompt, *rows = counter.rows
        assert prompt == 6
        assert rows == ([1] * sum(k + 1 for k in drafted) if number < exit_layer else [k + 1 for k in drafted])


def run_both(target, other, method, *arguments):
    """Call a method of two models; both results have to be equal bit by bit."""
    ours, theirs = (getattr(model, method)(*arguments) for model in (target, other))
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("seed", range(8))
def test_a_draft_never_shows_in_what_the_target_says(seed):
    """Drafts by any exit layer, then anything at all: the target says, bit by bit, what one without drafts says.

    Other prompts, rejected and changed tokens, rows that begin elsewhere, more or fewer of them than were drafted,
    trees. `text` is what both caches hold.
    """
    rng = random.Random(seed)
    target, other = (weak_tail(4, 2, seed, fixed_rows=8, max_seq_len=160) for _ in range(2))
    exits = [target.first_layers(count) for count in (1, 2, 3)]

    def some(n):
        return [rng.randrange(64) for _ in range(n)]

    text, offered, seen = some(5), [], Counter()
    run_both(target, other, "prefill", text)
    for _ in range(150):
        what = rng.choice(["draft", "draft", "draft", "go on", "go on", "go on", "elsewhere", "tree", "prefill"])
        if len(text) > 130 or (what == "prefill" and rng.random() < 0.3):
            if not offered:  # else the same rows might follow another prompt of this length
                text = text[: rng.randint(1, 20)]
            text = some(len(text))
            run_both(target, other, "prefill", text)
        elif what == "draft":
            first = rng.choice(exits)
            position = rng.choice([len(text), len(text), rng.randint(1, len(text))])
            text, offered = text[:position], some(rng.randint(1, 3))
            if rng.random() < 0.3:  # it has drafted here before
                first.forward(offered, position)
            offered += first.draft_greedy(offered, position, rng.randint(1, 4))
        elif what in ("go on", "elsewhere"):
            position = len(text) if what == "go on" else rng.randint(0, len(text))
            block = [*offered, *some(8)][: rng.randint(1, 8)]
            if rng.random() < 0.3:
                block[rng.randrange(len(block))] = rng.randrange(64)
            seen["same"] += what == "go on" and bool(offered) and block[: len(offered)] == offered[: len(block)]
            run_both(target, other, "forward", block, position)
            text, offered = text[:position] + block[: rng.randint(1, len(block))], []
        elif what == "tree":
            position, tokens = len(text), [*offered[:1], *some(4)][:4]
            run_both(target, other, "forward", tokens, position, [-1, 0, 0, 2])
            run_both(target, other, "keep", position, [0, 2, 3])
            block = [*offered, *some(3)][:3]
            if rng.random() < 0.5:  # the tree came to nothing: what was drafted before it is read after all
                run_both(target, other, "forward", block, position)
                text += block
            else:
                text += [tokens[i] for i in (0, 2, 3)]
            offered = []
        seen[what] += 1
        if not offered:
            assert torch.equal(target.kv[:, : len(text)], other.kv[:, : len(text)])
    assert min(seen.values()) > 3 and len(seen) >= 6, seen


def test_an_interrupted_draft_leaves_nothing_to_go_on_from():
    """Its rows are in the first layer's cache already, over those that an earlier draft had left."""
    target, other = (weak_tail(3, 2, seed=1, fixed_rows=8) for _ in range(2))
    for model in (target, other):
        model.prefill([1, 2, 3])
    first = target.first_layers(2)
    first.forward([4, 5], 3)
    down = target.layers[0].down

    def interrupted(x):
        raise KeyboardInterrupt

    target.layers[0].down = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.forward([6, 7], 3)
    target.layers[0].down = down
    run_both(target, other, "forward", [4, 5, 8], 3)


@pytest.mark.parametrize("exit_layer", [-1, 0, 3, 4])
def test_an_exit_layer_outside_the_model_is_refused(exit_layer):
    target = weak_tail(3, 1, seed=0)
    with pytest.raises(UserError, match=f"exit layer {exit_layer}: must be between 1 and 2"):
        EarlyExit(target, exit_layer, GREEDY)
