"""Targets that are worth leaving early, and texts that draft by their first layers.

A random model hardly ever agrees with its own first layers. Targets here have weak later layers: they add little to
what the first ones say, so that drafts are kept often and refused now and then.
"""

import itertools

from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.early_exit import EarlyExit
from models.speculative.generate import generate
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import GREEDY, SpyLlama, build, engine_config
from models.tests.llama_fixtures import random_tensors

EXITS = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]  # (layers, exit layer): every one


def weak_tail(layers: int, exit_layer: int, seed: int, scale: float = 0.2, vocab_size: int = 64, **options) -> SpyLlama:
    """A model whose layers from the exit on write `scale` times as much as random ones would."""
    config = engine_config(vocab_size, layers)
    tensors = random_tensors(config, seed)
    for layer, name in itertools.product(range(exit_layer, layers), ("self_attn.o_proj", "mlp.down_proj")):
        tensors[f"model.layers.{layer}.{name}.weight"] *= scale
    return build(config, tensors, **options)


def early_text(target, exit_layer, prompt, k=4, drafter=None, controller=None, sampling=GREEDY, **options):
    """(ids, stats) of a generation that drafts by early exit."""
    stats = GenerationStats()
    drafter = drafter or EarlyExit(target, exit_layer, sampling)
    controller = controller or FixedDraftLength(k)
    tokens = generate(target, drafter, prompt, controller=controller, sampling=sampling, stats=stats, **options)
    return [token.id for token in tokens], stats


def outcomes(rounds):
    """How many rounds kept (none, part, all) of a draft."""
    rounds = [r for r in rounds if r.drafted and not r.cut]
    none = sum(r.accepted == 0 for r in rounds)
    whole = sum(r.accepted == r.drafted for r in rounds)
    return none, len(rounds) - none - whole, whole


class Switching(FixedDraftLength):
    """Drafts nothing for some rounds in between."""

    def __init__(self, k: int, gap: int):
        super().__init__(k)
        self.period, self.rounds = gap + 1, 0

    def draft_length(self, source: str) -> int:
        return 0 if self.rounds % self.period else self.k

    def update(self, round) -> None:
        self.rounds += 1


class Counting:
    """Counts what goes through a linear layer: [rows of each call]."""

    def __init__(self, linear):
        self.linear, self.rows = linear, []

    def __call__(self, x):
        self.rows.append(len(x))
        return self.linear(x)
