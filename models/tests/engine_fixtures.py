"""Helpers for tests of the engine: pairs of tiny random Llamas that agree as much or as little as a test needs."""

import contextlib
from collections.abc import Mapping

import torch

from models.llama.config import LlamaConfig
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters import Draft, Limit, registry
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.registry import DrafterSpec, Source
from models.speculative.engine import Engine
from models.speculative.generate import generate
from models.speculative.model import IDS
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Request
from models.speculative.stats import GenerationStats
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.model import TorchLlama

GREEDY = SamplingParams()


def engine_config(vocab_size: int = 64, layers: int = 2, **overrides) -> LlamaConfig:
    """Small enough for thousands of forwards in a test."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_config(**sizes, vocab_size=vocab_size, num_hidden_layers=layers, **overrides)


def perturbed(tensors: Mapping[str, torch.Tensor], noise: float, seed: int) -> dict[str, torch.Tensor]:
    """A copy of the weights with noise of `noise` times each tensor's spread: a model that agrees now and then."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


class SpyLlama(TorchLlama):
    """A real model that notes each call from outside as (method, rows, position); `fail_at` interrupts the n-th."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls: list[tuple[str, int, int]] = []
        self.fail_at: int | None = None
        self._inside = False

    def _noted(self, method: str, tokens, position: int, *rest):
        arguments = (tokens, *rest) if method == "prefill" else (tokens, position, *rest)
        return self._call(getattr(super(), method), arguments, (method, len(tokens), position))

    def _call(self, call, arguments, note: tuple[str, int, int]):
        if self._inside:
            return call(*arguments)
        self.calls.append(note)
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self._inside = True
        try:
            return call(*arguments)
        finally:
            self._inside = False

    def extend(self, rows, want=IDS):
        return self.read_prompts(rows, want) if any(each.last for each in rows) else super().extend(rows, want)

    def read_prompts(self, rows, want):
        """An `extend` that reads prompts: noted as a prefill."""
        note = ("prefill", sum(len(each.tokens) for each in rows), rows[0].position)
        return self._call(super().extend, (rows, want), note)

    def prefill(self, tokens):
        return self._noted("prefill", tokens, 0)

    def forward(self, tokens, position, *parents):
        return self._noted("forward", tokens, position, *parents)

    def greedy(self, tokens, position, *parents):
        return self._noted("greedy", tokens, position, *parents)

    def draft_greedy(self, tokens, position, k):
        return self._noted("draft_greedy", tokens, position, k)


def build(config: LlamaConfig, tensors: Mapping[str, torch.Tensor], **options) -> SpyLlama:
    return SpyLlama(config, tensors, **{"dtype": "fp32", "max_seq_len": 128, **options})


def build_pair(seed: int, noise: float | None, vocab_size: int = 64, **options) -> tuple[SpyLlama, SpyLlama]:
    """(target, draft). The draft is the target (noise 0), a perturbed copy, or None: an unrelated one-layer model."""
    config = engine_config(vocab_size)
    tensors = random_tensors(config, seed)
    target = build(config, tensors, **options)
    if noise is None:
        config = engine_config(vocab_size, layers=1)
        return target, build(config, random_tensors(config, seed + 1000), **options)
    return target, build(config, perturbed(tensors, noise, seed + 1000), **options)


def random_prompt(length: int, seed: int, vocab_size: int = 64) -> list[int]:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def upto(k: int):
    """What a drafter is given by a controller that allows k tokens."""
    return Limit(lambda source: k)


def plain(target, prompt, **options) -> list[int]:
    return [token.id for token in generate(target, None, prompt, **options)]


def draw_texts(target, drafter, prompt, params, texts, *, controller, vocab, tokens=4, counted=4, **options):
    """Texts with the seeds 0, 1, .. side by side in all of the target's slots: a forward costs no more for several.

    Args:
        drafter: the engine's, for all of them. controller: makes one for each.
        tokens: of a text. counted: of these, from its beginning.
        options: of `Request`.

    Returns:
        Counts [vocab] * counted of what the texts begin with, and the statistics of each.
    """
    engine = Engine(target)
    sequences = [
        engine.add(
            Request(
                prompt,
                SamplingParams(**params, seed=seed),
                max_new_tokens=tokens,
                drafter=drafter,
                controller=controller(),
                **options,
            )
        )
        for seed in range(texts)
    ]
    while not engine.idle:
        engine.step()
    counts = torch.zeros([vocab] * counted, dtype=torch.long)
    for each in sequences:
        counts[tuple(each.tokens[len(prompt) :][:counted])] += 1
    return counts, [each.stats for each in sequences]


def speculate(target, draft, prompt, k=4, **options):
    """(ids, origins, stats) of a speculative generation."""
    stats = GenerationStats()
    drafter = ModelDrafter(draft, options.get("sampling", GREEDY))
    tokens = list(generate(target, drafter, prompt, controller=FixedDraftLength(k), stats=stats, **options))
    return [token.id for token in tokens], [token.origin for token in tokens], stats


class LastToken:
    """Proposes the last token again: somebody else's drafter."""

    def propose(self, tokens, limit):
        return Draft([tokens[-1]] * limit("again"), source="again")

    def observe(self, accepted):
        pass


@contextlib.contextmanager
def registered_last_token():
    """While it is entered, `LastToken` is a row of the registry: "again"."""
    sources = {"again": Source("again", "repetition")}
    registry.register(
        DrafterSpec("again", "the last token again", "the last token again", lambda parts: LastToken(), sources)
    )
    yield
    registry.unregister("again")
