"""Drafting with the target's own first layers: no second model, no memory, no prompt to read.

Source: self-speculative decoding by early exit (LayerSkip, Elhoushi et al. 2024). It needs a target whose first layers
already say much about the next token: models trained for it (with early-exit losses), hardly any other. `choose_exit`
measures what a target can do.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.errors import UserError
from models.speculative.control.costs import CostModel
from models.speculative.drafters.model import ModelDrafter
from models.speculative.model import DraftModel, FusedRounds, SequenceModel
from models.speculative.model import EarlyExit as ExitModel
from models.speculative.sampling import SamplingParams

SHALLOW = 16  # a model of so many layers is tried at every one of them, deeper ones at SPREAD
SPREAD = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 5


class Layered(Protocol):
    """A configuration that says how many layers there are."""

    @property
    def num_hidden_layers(self) -> int:
        """Of the whole model."""
        ...


class MeasuredModel(SequenceModel, ExitModel, Protocol):
    """What `choose_exit` asks of a target."""

    @property
    def config(self) -> Layered:
        """Its configuration."""
        ...


class EarlyExit(ModelDrafter):
    """The target's first layers, its norm and its head as the draft model. One object per generation.

    It shares the target's KV cache, so that it is always up to date: whatever the target has verified is there. A
    target in torch goes on from the hidden states it leaves, so that verifying computes no layer a second time.

    confident, rounds: as of `ModelDrafter`. Raises UserError for an exit layer that is not between 1 and one less than
    the target's layers.
    """

    source = "early-exit"

    def __init__(
        self,
        target: ExitModel,
        exit_layer: int,
        sampling: SamplingParams,
        *,
        confident: bool = True,
        rounds: FusedRounds | None = None,
    ) -> None:
        super().__init__(target.first_layers(exit_layer), sampling, confident=confident, rounds=rounds)

    def read(self, tokens: list[int]) -> float:
        """The target has read all but the last token, and written rows for those that were accepted: no time."""
        self.cached = len(tokens) - 1
        return 0.0


@dataclass(frozen=True)
class ExitMeasurements:
    """What a choice is made from.

    agreed: by exit layer, for each token of a text in turn (from its second on): whether the first layers choose it,
    given the text before it. step_s: by exit layer, seconds to draft one token. verify_s: by rows, seconds of a
    forward of all layers; for one row, a step of plain decoding.
    """

    agreed: dict[int, tuple[bool, ...]]
    step_s: dict[int, float]
    verify_s: dict[int, float]


@dataclass(frozen=True)
class ExitCandidate:
    """An exit layer in numbers; speed_ups and tokens_per_round go by draft length."""

    exit_layer: int
    agreement: float  # chance that a drafted token is accepted, given that those before it were
    step_s: float
    tokens_per_round: dict[int, float]
    speed_ups: dict[int, float]  # expected tokens per second, over those of plain decoding

    @property
    def draft_length(self) -> int:
        """The one of the greatest speed-up; of equal ones the shortest."""
        return min(self.speed_ups, key=lambda k: (-self.speed_ups[k], k))

    @property
    def speed_up(self) -> float:
        return self.speed_ups[self.draft_length]


@dataclass(frozen=True)
class ExitChoice:
    """The exit layer of the greatest expected speed-up, below 1 where plain decoding is best, and all candidates."""

    exit_layer: int
    draft_length: int
    speed_up: float
    measured_tokens: int  # that agreement was counted on
    candidates: tuple[ExitCandidate, ...]


def choose_exit(
    model: MeasuredModel,
    tokens: Sequence[int],
    prompt_length: int,
    lengths: Iterable[int] = range(1, 7),
    candidates: Iterable[int] | None = None,
) -> ExitChoice:
    """Where to leave the model for the most tokens per second, by measurement on this machine.

    Overwrites the model's cache: to be called between texts.

    tokens: a text that the model itself wrote by greedy decoding, its prompt being the first prompt_length of them.
    Some hundred tokens tell agreement to a few percent. lengths: draft lengths to choose from; those that the model
    has no rows for are left out. candidates: exit layers to try (default: `exit_candidates`). Raises UserError for a
    text with less than two tokens after its prompt, no length to choose from, and exit layers that the model lacks.
    """
    return best_exit(measure_exits(model, tokens, prompt_length, lengths, candidates))


def exit_candidates(layers: int) -> list[int]:
    """Exit layers worth a try in a model of so many layers: all of a shallow one, else some, the first ones densely."""
    return [count for count in (range(1, layers) if layers <= SHALLOW else SPREAD) if count < layers]


def measure_exits(
    model: MeasuredModel,
    tokens: Sequence[int],
    prompt_length: int,
    lengths: Iterable[int] = range(1, 7),
    candidates: Iterable[int] | None = None,
) -> ExitMeasurements:
    """The measuring half of `choose_exit`: agreement on a text, and times, medians taken in turn."""
    written = len(tokens) - prompt_length
    if prompt_length < 1 or written < 2:
        raise UserError(
            f"a text of {written} tokens after a prompt of {prompt_length} is too short to choose an exit layer: "
            "give at least 2 tokens after a prompt of 1"
        )
    longest = min(model.max_rows, model.max_seq_len) - 1
    usable = sorted({k for k in lengths if 1 <= k <= longest})
    if not usable:
        raise UserError(f"no draft length between 1 and {longest}, which this model can verify: give one")
    layers = exit_candidates(model.config.num_hidden_layers) if candidates is None else sorted(set(candidates))
    if not layers:
        raise UserError("a model of one layer has none to exit from: use another drafter")
    exits = {count: model.first_layers(count) for count in layers}

    model.prefill(tokens[:prompt_length])
    agreed = {count: _agreement(first, tokens, prompt_length) for count, first in exits.items()}
    return ExitMeasurements(agreed, *_times(model, exits, tokens, usable))


def best_exit(measured: ExitMeasurements) -> ExitChoice:
    """The choosing half of `choose_exit`: the same measurements give the same choice. Of equals the first layer."""
    plain_s = measured.verify_s[1]
    candidates = []
    for count, agreed in sorted(measured.agreed.items()):
        step_s, per_round, speed_ups = measured.step_s[count], {}, {}
        for k in sorted(rows - 1 for rows in measured.verify_s if rows > 1):
            per_round[k] = tokens_per_round(agreed, k)
            speed_ups[k] = per_round[k] * plain_s / (k * step_s + measured.verify_s[k + 1])
        candidates.append(ExitCandidate(count, sum(agreed) / len(agreed), step_s, per_round, speed_ups))
    best = max(candidates, key=lambda candidate: candidate.speed_up)
    return ExitChoice(best.exit_layer, best.draft_length, best.speed_up, len(agreed), tuple(candidates))


def tokens_per_round(agreed: Sequence[bool], k: int) -> float:
    """Tokens a round emits with drafts of k tokens, by replaying greedy rounds over a text.

    What a draft continues was accepted, so that it is what agreement was counted on: the rounds are those of a real
    run, in which tokens that are easy to guess stand together.
    """
    rounds = done = 0
    while done < len(agreed):
        draft = agreed[done : done + k]
        done += next((i for i, same in enumerate(draft) if not same), len(draft)) + 1
        rounds += 1
    return len(agreed) / rounds


def _agreement(first: SequenceModel, tokens: Sequence[int], prompt_length: int) -> tuple[bool, ...]:
    """Whether the first layers choose each token after the first one written, which a prefill gives."""
    chosen: list[int] = []
    for start in range(prompt_length, len(tokens) - 1, first.max_rows):
        chosen += first.greedy(tokens[start : min(start + first.max_rows, len(tokens) - 1)], start)
    return tuple(ours == theirs for ours, theirs in zip(chosen, tokens[prompt_length + 1 :], strict=True))


def _times(
    model: SequenceModel, exits: dict[int, DraftModel], tokens: Sequence[int], lengths: list[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """(seconds of a draft step by exit layer, of a forward of all layers by rows), at the end of the text.

    In turn, so that a busy moment hits all of them alike.
    """
    fixed_rows = getattr(model, "fixed_rows", None)
    costs = CostModel(getattr(model, "computed_rows", lambda rows: rows))
    verified = {1} if fixed_rows else {1, *(k + 1 for k in lengths)}
    last = len(tokens) - 1
    steps: dict[int, list[float]] = {count: [] for count in exits}
    for repeat in range(REPEATS + 1):  # the first one may prepare kernels
        for rows in verified:
            # Not where a draft has been: the model would go on from what the first layers have left there.
            began = time.perf_counter()
            model.greedy([tokens[last]] * rows, max(0, last - rows))
            if repeat:
                costs.add("verify", rows, time.perf_counter() - began)
        for count, first in exits.items():
            began = time.perf_counter()
            first.draft_greedy([tokens[last]], last, 1)
            if repeat:
                steps[count].append(time.perf_counter() - began)
    medians = {count: statistics.median(seconds) for count, seconds in steps.items()}
    return medians, {rows: costs.verify_s(rows) for rows in sorted({1, *(k + 1 for k in lengths)})}
