"""The numbers of a demo run: totals per path, comparison, and what they mean. Definitions as in tt_transformers:

TTFT is the prefill including the first token, warm-up excluded; tok/s/user is decode tokens (all but the first) over
decode seconds, host work included, printing excluded. Totals weigh prompts by their tokens; TTFT is a median.
"""

import statistics
import sys
from typing import Any

from demo.results import (
    BoardModelMemory,
    ControllerResults,
    Divergence,
    EarlyExitResults,
    ExitCandidateResults,
    Memory,
    ModelMemory,
    PathTotals,
    PromptResults,
    RunResults,
    SourceCounts,
    SpeculativeTextResults,
    SpeculativeTotals,
    TextResults,
    without_times,
)
from demo.runs import Row, Run
from demo.session import Session
from models.cli.environment import date, machine, peak_memory, versions
from models.cli.settings import describe_settings
from models.speculative.stats import GenerationStats, Round


def build_results(
    session: Session, interrupted: bool, total_s: float, first_token_s: float | None = None
) -> RunResults:
    """Everything the JSON file holds. A path that was not run is None, and so is every time where times say nothing."""
    results = _results(session, interrupted, total_s, first_token_s)
    return results if session.timed else without_times(results)


def _results(session: Session, interrupted: bool, total_s: float, first_token_s: float | None) -> RunResults:
    settings, rows = session.settings, session.rows
    runs: dict[str, list[Run]] = {"baseline": [], "speculative": []}
    for path in settings.paths:
        # An interrupted run counts only where there is nothing complete to report.
        runs[path] = [row.runs[path] for row in rows] or [run for run in session.under_way if run.path == path]
    baseline = _path_totals(session, "baseline", runs["baseline"])
    speculative = _path_totals(session, "speculative", runs["speculative"])
    compared = len(settings.paths) == 2 and bool(rows)
    identical = sum(row.identical for row in rows) if compared and session.sampling.greedy else None
    return RunResults(
        baseline=baseline,
        speculative=speculative,
        controller=_controller(session, runs["speculative"]) if settings.auto and speculative else None,
        early_exit=_early_exit(session),
        speedup=_speedup(baseline, speculative),
        speedup_median=_median([_row_speedup(row) for row in rows]) if compared else None,
        ttft_ratio=_median([_row_ttft_ratio(row) for row in rows]) if compared else None,
        outputs_identical=None if identical is None else identical == len(rows),
        identical_prompts=identical,
        divergence=None if identical is None else _first_divergence(session),
        interrupted=interrupted,
        total_s=total_s,
        first_token_s=first_token_s,
        warm_up_s=session.warm_up_s,
        memory=_memory(session),
        settings=describe_settings(settings, session.llm),
        date=date(),
        versions=versions(),
        machine=machine(settings.device, session.board and session.board.board, session.timed),
        command=sys.argv,
        prompts=[_row_results(row, session.fused) for row in rows],
        partial=[_text_results(run, session.fused) for run in session.under_way],
    )


def _path_totals(session: Session, path: str, runs: list[Run]) -> PathTotals | None:
    if not runs:
        return None
    stats = GenerationStats.merge([run.stats for run in runs])
    totals: dict[str, Any] = {
        "ttft_ms": _median([run.stats.ttft_s * 1000 for run in runs]),
        "tok_s_user": _rate(stats),
        "tokens": stats.tokens,
        "decode_tokens": stats.decode_tokens,
        "decode_s": stats.decode_s,
        "load_s": session.target.load_s,
    }
    if path == "baseline":
        return PathTotals(**totals)
    totals["load_s"] += session.draft.load_s if session.draft else 0
    return SpeculativeTotals(**totals, **_speculation(stats, session.fused))


def _speculation(stats: GenerationStats, fused: bool) -> dict[str, Any]:
    """The fields of `demo.results.Speculation`."""
    rated = rated_rounds(stats)
    trees = [round.drafted for round in rated if round.parents is not None]
    return {
        "rounds": len(stats.rounds),
        "plain_rounds": sum(not round.drafted and not round.cut for round in stats.rounds),
        "drafted": sum(round.drafted for round in stats.rounds),
        "sources": _sources(stats),
        "mean_draft_length": statistics.mean(round.depth for round in rated) if rated else None,
        "tree_tokens_per_round": statistics.mean(trees) if trees else None,
        "acceptance_rate": acceptance_rate(stats),
        "mean_acceptance_length": stats.mean_acceptance_length if rated else None,
        "acceptance_by_position": stats.acceptance_by_position,
        "draft_ms": None if fused else stats.draft_ms,
        "verify_ms": None if fused else stats.verify_ms,
        "fused_ms": stats.draft_ms + stats.verify_ms if fused else None,
        "host_ms": stats.host_ms,
        "host_share": stats.host_share,
        "draft_prefill_ms": stats.draft_prefill_s * 1000,
    }


def rated_rounds(stats: GenerationStats) -> list[Round]:
    """The rounds that rates are taken over: they drafted, and nothing cut them short."""
    return [round for round in stats.rounds if round.drafted and not round.cut]


def acceptance_rate(stats: GenerationStats) -> float | None:
    """Accepted tokens over those that could have been accepted: all of a chain, one in each level of a tree."""
    rated = rated_rounds(stats)
    return sum(round.accepted for round in rated) / sum(round.depth for round in rated) if rated else None


def _sources(stats: GenerationStats) -> dict[str, SourceCounts]:
    """By what drafted ("model", "lookup", ..)."""
    drafts: dict[str, list[Round]] = {}
    for round in stats.rounds:
        if round.drafted:
            drafts.setdefault(round.source, []).append(round)
    return {
        source: SourceCounts(len(rounds), sum(each.drafted for each in rounds), sum(each.accepted for each in rounds))
        for source, rounds in drafts.items()
    }


def _controller(session: Session, runs: list[Run]) -> ControllerResults:
    chosen = [[round.depth for round in run.stats.rounds] for run in runs]
    return ControllerResults(chosen=chosen, **session.controller.report())


def _early_exit(session: Session) -> EarlyExitResults | None:
    if session.exit is None:
        return None
    return EarlyExitResults(
        exit_layer=session.exit.exit_layer,
        draft_length=session.exit.draft_length,
        speed_up=session.exit.speed_up,
        measured_tokens=session.exit.measured_tokens,
        candidates=[
            ExitCandidateResults(
                exit_layer=each.exit_layer,
                agreement=each.agreement,
                step_s=each.step_s,
                tokens_per_round={str(k): tokens for k, tokens in each.tokens_per_round.items()},
                speed_ups={str(k): speed_up for k, speed_up in each.speed_ups.items()},
            )
            for each in session.exit.candidates
        ],
    )


def _text_results(run: Run, fused: bool) -> TextResults:
    stats = run.stats
    results = {
        "path": run.path,
        "text": run.text,
        "token_ids": run.tokens,
        "ttft_ms": stats.ttft_s * 1000,
        "tok_s_user": _rate(stats),
        "tokens": stats.tokens,
        "decode_s": stats.decode_s,
        "finish_reason": stats.finish_reason,
    }
    if run.path == "baseline":
        return TextResults(**results)
    return SpeculativeTextResults(**results, **_speculation(stats, fused))


def _row_results(row: Row, fused: bool) -> PromptResults:
    runs = {path: _text_results(run, fused) for path, run in row.runs.items()}
    return PromptResults(
        number=row.prompt.number,
        prompt=row.prompt.text,
        prompt_tokens=len(row.prompt.ids),
        prompt_ids=row.prompt.ids,
        identical=row.identical if len(row.runs) == 2 else None,
        speedup=_row_speedup(row),
        baseline=runs.get("baseline"),
        speculative=runs.get("speculative"),
    )


def _rate(stats: GenerationStats) -> float | None:
    """Decode tokens per second; None when nothing was decoded after the first token."""
    return stats.decode_tokens / stats.decode_s if stats.decode_tokens > 0 and stats.decode_s > 0 else None


def _row_speedup(row: Row) -> float | None:
    rates = [_rate(run.stats) for run in row.runs.values()]
    return rates[1] / rates[0] if len(rates) == 2 and all(rates) else None


def _row_ttft_ratio(row: Row) -> float:
    """Within a prompt, whose two runs follow each other: what else the machine does then hits both alike."""
    return row.runs["speculative"].stats.ttft_s / row.runs["baseline"].stats.ttft_s


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _speedup(baseline: PathTotals | None, speculative: PathTotals | None) -> float | None:
    if not baseline or not speculative or not baseline.tok_s_user or not speculative.tok_s_user:
        return None
    return speculative.tok_s_user / baseline.tok_s_user


def _first_divergence(session: Session) -> Divergence | None:
    """Where greedy texts part for the first time, and how close the target's two best tokens were there."""
    for row in session.rows:
        baseline, speculative = row.runs["baseline"].tokens, row.runs["speculative"].tokens
        if baseline == speculative:
            continue
        shared = next(
            (i for i, (a, b) in enumerate(zip(baseline, speculative, strict=False)) if a != b),
            min(len(baseline), len(speculative)),
        )
        return Divergence(
            prompt=row.prompt.number,
            token=shared + 1,
            baseline_id=baseline[shared] if shared < len(baseline) else None,
            speculative_id=speculative[shared] if shared < len(speculative) else None,
            top2_margin=session.top_two_margin(row.prompt.ids + baseline[:shared]),
        )
    return None


def _memory(session: Session) -> Memory:
    peaks = {f"peak_{name}": value for name, value in peak_memory(session.settings.device).items()}
    return Memory(_model_memory(session, "target"), _model_memory(session, "draft"), **peaks)


def _model_memory(session: Session, role: str) -> ModelMemory | None:
    loaded = session.target if role == "target" else session.draft
    if loaded is None:
        return None
    sizes = (loaded.model.weight_bytes, loaded.model.kv_cache_bytes)
    if session.board is None:
        return ModelMemory(*sizes)
    plan = session.board.plans[role]
    return BoardModelMemory(*sizes, plan.chips, plan.weights, plan.kv_cache)
