"""The ways in which text is written: plain decoding, and every drafter with a fixed or an automatic draft length."""

import copy
import dataclasses
import time
from collections.abc import Sequence

from demo.arguments import AUTO, DRAFT_TOKENS, MODEL_DRAFTERS
from demo.session import Session
from models.loading import LoadedModel
from models.speculative.control.policy import Controller
from models.speculative.generate import generate
from models.speculative.stats import GenerationStats
from models.torch_llama.model import TorchLlama
from scripts.suites.random_weights import RandomWeights

PLAIN, SEQUENTIAL = "plain", "sequential"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to write text. ``controller`` lives as long as the way does, so that an automatic one learns.

    init_s: seconds before it can write: loading its models, and what it measures.
    """

    name: str
    drafter: str | None  # as --drafter names it
    length: int | str | None  # tokens drafted a round, or AUTO
    session: Session
    controller: Controller | None
    init_s: float
    verification: str = "batched"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generation: its tokens, what happened, and when the reader of the stream got them."""

    tokens: list[int]
    stats: GenerationStats
    waits: list[float]  # seconds the reader waited for each token, the first one included
    seconds: float  # of the whole call


def plain_way(session: Session) -> Way:
    """Plain decoding."""
    return Way(PLAIN, None, None, session, None, session.target.load_s)


def drafting_way(session: Session, drafter: str, length: int | str) -> Way:
    """A drafter, as --drafter names it, with a draft length. What the demo measures before a run is measured now: the
    costs for a length of AUTO, the layers of early exit."""
    init_s = _load_s(session, drafter)
    if drafter == "early-exit" and session.settings.exit_layer == AUTO:
        if session.exit is None:
            session.choose_exit()
        init_s += session.exit_s
    controller = session.make_controller(length)
    if length == AUTO:
        began = time.perf_counter()
        session.measure_costs(controller)
        init_s += time.perf_counter() - began
    return Way(f"{drafter} {length}", drafter, length, session, controller, init_s)


def sequential_way(session: Session) -> Way:
    """The draft model, verified token by token."""
    name = f"model {DRAFT_TOKENS} {SEQUENTIAL}"
    controller, init_s = session.make_controller(DRAFT_TOKENS), _load_s(session, "model")
    return Way(name, "model", DRAFT_TOKENS, session, controller, init_s, SEQUENTIAL)


def _load_s(session: Session, drafter: str) -> float:
    return session.target.load_s + (session.draft.load_s if drafter in MODEL_DRAFTERS else 0.0)


def write(way: Way, ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> Sample:
    """Let the way continue a prompt."""
    session, stats, tokens, waits = way.session, GenerationStats(), [], []
    clock = time.perf_counter
    began = mark = clock()
    for token in generate(
        session.target.model,
        session.make_drafter(way.drafter) if way.drafter else None,
        ids,
        sampling=session.sampling,
        controller=way.controller,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        verification=way.verification,
        stats=stats,
    ):
        now = clock()
        waits.append(now - mark)
        tokens.append(token.id)
        mark = clock()
    return Sample(tokens, stats, waits, clock() - began)


def prepare_lengths(session: Session, prompts: Sequence[Sequence[int]]) -> None:
    """Read a prompt of every length once: the first one of a length prepares kernels, which belongs to no way."""
    for ids in {len(ids): ids for ids in prompts}.values():
        for loaded in filter(None, (session.target, session.draft)):
            loaded.model.prefill(ids)


def with_unrelated_draft(session: Session, seed: int = 0) -> Session:
    """The same session with a draft of random weights, of the draft's shape: it is right by accident only.

    Its output matrix is its own. Tied to the embedding, random weights guess the last token again, which is
    sometimes right.
    """
    opened = session.draft.opened
    config = dataclasses.replace(opened.checkpoint.config, tie_word_embeddings=False)
    began = time.perf_counter()
    model = TorchLlama(
        config,
        RandomWeights(config, seed),
        device=session.settings.device,
        dtype="fp32" if session.draft.dtype == "int8" else session.draft.dtype,
        max_seq_len=session.max_seq_len,
        quantize="int8" if session.draft.dtype == "int8" else None,
    )
    other = copy.copy(session)
    other.draft = LoadedModel(opened, model, session.draft.dtype, time.perf_counter() - began)
    return other
