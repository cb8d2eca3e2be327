"""The results of a demo run as types. They are the schema of its JSON file: `dataclasses.asdict` gives what is written.

Times are in the unit that their name ends with, rates in tokens per second, shares and ratios as fractions, memory in
bytes, ids from the target's vocabulary; prompts and tokens are counted from 1. A time, and what is computed from
times, is marked as `timed` and None on a mock board; what else makes a field None is said in its class.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from demo.from_json import from_json


def timed() -> Any:
    """A field that is a time or computed from times."""
    return dataclasses.field(metadata={"time": True})


@dataclass(frozen=True, kw_only=True)
class PathTotals:
    """All counted runs of one path. tok_s_user is None where no token came after the first one."""

    ttft_ms: float | None = timed()  # median over prompts
    tok_s_user: float | None = timed()
    tokens: int
    decode_tokens: int  # all but the first of each text
    decode_s: float | None = timed()
    load_s: float | None = timed()


@dataclass(frozen=True)
class SourceCounts:
    """What one source of drafts did: rounds that it drafted in, tokens drafted, tokens accepted of them."""

    rounds: int
    drafted: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Rates and means are over rounds that drafted and were not cut, and None without one; counts are over all rounds.

    A tree's length is that of its longest chain, its levels: so many of its tokens could have been accepted. Lengths,
    acceptance rate and positions go by levels; drafted and tree_tokens_per_round count all its tokens.

    Of the times of a round either draft_ms and verify_ms are known, or fused_ms: both in one device program. The
    others are None, as is tree_tokens_per_round without trees.
    """

    rounds: int
    plain_rounds: int  # drafted nothing
    drafted: int
    sources: dict[str, SourceCounts]  # "model", "lookup", ..
    mean_draft_length: float | None
    tree_tokens_per_round: float | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None  # with the token that the target adds
    acceptance_by_position: list[float]
    draft_ms: float | None = timed()
    verify_ms: float | None = timed()
    fused_ms: float | None = timed()
    host_ms: float | None = timed()
    host_share: float | None = timed()
    draft_prefill_ms: float | None = timed()


@dataclass(frozen=True, kw_only=True)
class SpeculativeTotals(Speculation, PathTotals):
    """All counted runs of the speculative path."""


@dataclass(frozen=True, kw_only=True)
class TextResults:
    """One run over one prompt. tok_s_user: as in PathTotals; finish_reason is None for an interrupted run."""

    path: str
    text: str
    token_ids: list[int]
    ttft_ms: float | None = timed()
    tok_s_user: float | None = timed()
    tokens: int
    decode_s: float | None = timed()
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class SpeculativeTextResults(Speculation, TextResults):
    """One run of the speculative path over one prompt."""


@dataclass(frozen=True, kw_only=True)
class PromptResults:
    """One prompt, complete on all paths. identical and speedup are None where one path ran; so is the other path.
    speedup is None too where no token came after the first one."""

    number: int
    prompt: str
    prompt_tokens: int
    prompt_ids: list[int]
    identical: bool | None
    speedup: float | None = timed()
    baseline: TextResults | None
    speculative: SpeculativeTextResults | None

    @property
    def runs(self) -> dict[str, TextResults]:
        """Those that there are, by path."""
        return _known(self)


@dataclass(frozen=True, kw_only=True)
class ControllerResults:
    """What automatic draft lengths were decided with.

    chosen: tokens (of trees: levels) that each round of each run drafted; lengths: those that it could choose from.
    verify_ms goes by rows of the forward, prefill_token_ms and the rest by source of drafts. break_even: the acceptance
    from which on one token of the dearest source pays, None before anything was drafted. acceptance: by position, as
    expected at the end.
    """

    chosen: list[list[int]]
    lengths: list[int]
    verify_ms: dict[str, float] | None = timed()
    draft_ms: dict[str, float] | None = timed()
    draft_step_ms: dict[str, float] | None = timed()
    prefill_token_ms: dict[str, float] | None = timed()
    break_even: float | None = timed()
    acceptance: dict[str, list[float]]
    trust: dict[str, float]  # exponent that turns a draft's path probability into the chance of acceptance


@dataclass(frozen=True, kw_only=True)
class ExitCandidateResults:
    """One exit layer. Dicts go by draft length; speed_ups are expected ones over plain decoding."""

    exit_layer: int
    agreement: float  # chance that a drafted token is accepted, given that those before it were
    step_s: float | None = timed()
    tokens_per_round: dict[str, float]
    speed_ups: dict[str, float] | None = timed()


@dataclass(frozen=True, kw_only=True)
class EarlyExitResults:
    """How the layers of early exit were chosen: the best of the candidates, by the tokens measured."""

    exit_layer: int
    draft_length: int | None = timed()
    speed_up: float | None = timed()
    measured_tokens: int
    candidates: list[ExitCandidateResults]


@dataclass(frozen=True)
class Divergence:
    """Where greedy texts part for the first time. An id is None where that text had ended before. top2_margin: by how
    much the target's best token was ahead of its second one, in logits."""

    prompt: int
    token: int
    baseline_id: int | None
    speculative_id: int | None
    top2_margin: float


@dataclass(frozen=True)
class ModelMemory:
    """Of one model, over all its chips."""

    weight_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class BoardModelMemory(ModelMemory):
    """Of one model on a board, over all its chips and on each."""

    chips: int
    weight_bytes_per_chip: int
    kv_cache_bytes_per_chip: int


@dataclass(frozen=True)
class Memory:
    """draft is None without a draft model, peak_cuda_bytes without CUDA."""

    target: ModelMemory | BoardModelMemory
    draft: ModelMemory | BoardModelMemory | None
    peak_process_bytes: int
    peak_cuda_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """A whole run. A path that was not run is None.

    controller is None with fixed draft lengths, early_exit where no layer was chosen by measurement. speedup,
    speedup_median and ttft_ratio need both paths; outputs_identical, identical_prompts and divergence need greedy
    decoding too, divergence also a text that differs. warm_up_s (compiling and capturing) is None off boards. partial
    holds the runs of a prompt that an interruption left incomplete.
    """

    baseline: PathTotals | None
    speculative: SpeculativeTotals | None
    controller: ControllerResults | None
    early_exit: EarlyExitResults | None
    speedup: float | None = timed()
    speedup_median: float | None = timed()
    ttft_ratio: float | None = timed()
    outputs_identical: bool | None
    identical_prompts: int | None
    divergence: Divergence | None
    interrupted: bool
    total_s: float | None = timed()
    first_token_s: float | None = timed()  # from the start of the program to the first token on screen
    warm_up_s: float | None = timed()
    memory: Memory
    settings: dict[str, Any]  # the flags that mattered, as they took effect
    date: str  # ISO 8601, UTC
    versions: dict[str, Any]
    machine: dict[str, Any]
    command: list[str]
    prompts: list[PromptResults]
    partial: list[TextResults | SpeculativeTextResults]

    @classmethod
    def from_dict(cls, values: Any, source: str = "results") -> "RunResults":
        """Read back what a JSON file of a run holds. source: its name, for messages.

        Raises:
            UserError: a key is missing, unknown, or has a value of another type.
        """
        return from_json(cls, values, source, "write it with demo/simple_text_demo.py --json")

    @property
    def totals(self) -> dict[str, PathTotals]:
        """Of the paths that were run, by path."""
        return _known(self)


def _known(results: Any) -> dict[str, Any]:
    paths = {"baseline": results.baseline, "speculative": results.speculative}
    return {path: value for path, value in paths.items() if value is not None}


def without_times(value: Any) -> Any:
    """The same results with None for all that is `timed`."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    kept = {}
    for field in dataclasses.fields(value):
        kept[field.name] = None if field.metadata.get("time") else without_times(getattr(value, field.name))
    return type(value)(**kept)
