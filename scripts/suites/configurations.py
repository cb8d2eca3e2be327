"""How text is written: plain decoding, and every drafter with a fixed or an automatic draft length."""

import copy
import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing

from models.errors import UserError
from models.llama.random_weights import RandomWeights
from models.llm import Drafting
from models.loading import LoadedModel
from models.options import AUTO, DRAFT_TOKENS
from models.speculative.drafters.registry import NONE, spec_of
from models.speculative.stats import GenerationStats
from models.torch_llama.model import TorchLlama
from scripts.suites.bench import Bench

PLAIN, SEQUENTIAL = "plain", "sequential"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """How text is written. ``drafting`` lives as long as the configuration does, so that an automatic length learns.

    init_s: seconds before it can write: loading its models, and what it measures.
    """

    name: str
    drafter: str | None  # its name in the registry
    length: int | str | None  # tokens drafted a round, or AUTO
    bench: Bench
    drafting: Drafting
    init_s: float
    verification: str = "batched"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generation: its tokens, what happened, and when the reader of the stream got them."""

    tokens: list[int]
    stats: GenerationStats
    waits: list[float]  # seconds the reader waited for each token, the first one included
    seconds: float  # of the whole call


def plain_configuration(bench: Bench) -> Configuration:
    """Plain decoding."""
    return Configuration(PLAIN, None, None, bench, bench.llm.drafting(NONE), bench.target.load_s)


def drafting_configuration(bench: Bench, drafter: str, length: int | str) -> Configuration:
    """A drafter with a draft length. What is measured before a run is measured now: the costs for a length of AUTO, the
    layers of early exit."""
    llm, init_s = bench.llm, _load_s(bench, drafter)
    if "exit_layer" in spec_of(drafter).settings and bench.settings.exit_layer == AUTO:
        if llm.exit is None:
            llm.choose_exit(bench.prompts[0].ids)
        init_s += llm.exit_s
    drafting = llm.drafting(drafter, length)
    if length == AUTO:
        began = time.perf_counter()
        llm.measure_costs(drafting.controller, greedy=bench.sampling.greedy)
        init_s += time.perf_counter() - began
    return Configuration(f"{drafter} {length}", drafter, length, bench, drafting, init_s)


def sequential_configuration(bench: Bench) -> Configuration:
    """The draft model or head, verified token by token."""
    drafter = bench.drafts_alone
    name = f"{drafter} {DRAFT_TOKENS} {SEQUENTIAL}"
    drafting = bench.llm.drafting(drafter, DRAFT_TOKENS, SEQUENTIAL)
    return Configuration(name, drafter, DRAFT_TOKENS, bench, drafting, _load_s(bench, drafter), SEQUENTIAL)


def _load_s(bench: Bench, drafter: str) -> float:
    return bench.target.load_s + (bench.draft.load_s if spec_of(drafter).needs_draft_model else 0.0)


def write(
    configuration: Configuration, ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> Sample:
    """Let the configuration continue a prompt."""
    stats, tokens, waits = GenerationStats(), [], []
    clock = time.perf_counter
    began = mark = clock()
    stream = configuration.bench.llm.stream(
        ids,
        configuration.bench.sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        speculate=configuration.drafting,
        stats=stats,
    )
    with closing(stream):
        for piece in stream:
            now = clock()
            waits.append(now - mark)
            tokens.append(piece.id)
            mark = clock()
    check_drafted(stats)
    return Sample(tokens, stats, waits, clock() - began)


def check_drafted(stats: GenerationStats) -> None:
    """Raise UserError for a text that has lost its drafter: its times say nothing about drafting."""
    if stats.drafting_failure:
        raise UserError(f"the drafter failed, nothing is measured without it: {stats.drafting_failure}")


def prepare_lengths(bench: Bench, prompts: Sequence[Sequence[int]]) -> None:
    """Read a prompt of every length once: the first one of a length prepares kernels, for whichever comes first."""
    for ids in {len(ids): ids for ids in prompts}.values():
        bench.llm.warm_up(ids)


def with_unrelated_draft(bench: Bench, seed: int = 0) -> Bench:
    """The same bench with a draft of random weights, of the draft's shape: it is right by accident only.

    Its output matrix is its own. Tied to the embedding, random weights guess the last token again, which is
    sometimes right.
    """
    if not bench.draft_model:
        raise UserError("a draft head of random weights is not measured: leave out --categories unrelated-draft")
    opened = bench.draft.opened
    config = dataclasses.replace(opened.checkpoint.config, tie_word_embeddings=False)
    began = time.perf_counter()
    model = TorchLlama(
        config,
        RandomWeights(config, seed),
        device=bench.settings.device,
        dtype="fp32" if bench.draft.dtype == "int8" else bench.draft.dtype,
        max_seq_len=bench.max_seq_len,
        quantize="int8" if bench.draft.dtype == "int8" else None,
        compiled=bench.draft.model.compiled,
    )
    other = copy.copy(bench)
    other.llm = copy.copy(bench.llm)
    other.draft = other.llm.draft = LoadedModel(opened, model, bench.draft.dtype, time.perf_counter() - began)
    return other
