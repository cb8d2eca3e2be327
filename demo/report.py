"""The numbers of a demo run: totals per path, comparison, and what they mean. Definitions as in tt_transformers:

TTFT is the prefill including the first token, warm-up excluded; tok/s/user is decode tokens (all but the first) over
decode seconds, host work included, printing excluded. Totals weigh prompts by their tokens; TTFT is a median.
"""

import dataclasses
import re
import statistics
import sys
from typing import Any

from demo.runs import Row, Run
from demo.session import Session
from models.cli.environment import date, machine, peak_memory, versions
from models.cli.settings import describe_settings
from models.speculative.stats import GenerationStats, Round

Results = dict[str, Any]

# Keys of times, and of what is computed from times.
TIMES = re.compile(r".*_(s|ms)|tok_s_user|host_share|speedup(_median)?|speed_ups?|draft_length|ttft_ratio|break_even")


def build_results(session: Session, interrupted: bool, total_s: float) -> Results:
    """Everything the JSON file holds. Times are in the unit their name ends with, memory in bytes, ids from the
    target's vocabulary, prompts and tokens counted from 1. A path that was not run is null, and so is every time on a
    mock board."""
    results = _results(session, interrupted, total_s)
    return _without_times(results) if session.mock else results


def _results(session: Session, interrupted: bool, total_s: float) -> Results:
    settings = session.settings
    rows = session.rows
    totals: dict[str, Results | None] = {"baseline": None, "speculative": None}
    runs: dict[str, list[Run]] = {"baseline": [], "speculative": []}
    for path in settings.paths:
        # An interrupted run counts only where there is nothing complete to report.
        runs[path] = [row.runs[path] for row in rows] or [run for run in session.under_way if run.path == path]
        totals[path] = _path_totals(session, path, runs[path]) if runs[path] else None
    baseline, speculative = totals["baseline"], totals["speculative"]
    compared = len(settings.paths) == 2 and bool(rows)
    greedy = session.sampling.greedy
    return {
        **totals,
        "controller": _controller(session, runs["speculative"]) if settings.auto and speculative else None,
        "early_exit": dataclasses.asdict(session.exit) if session.exit else None,
        "speedup": _ratio(speculative, baseline, "tok_s_user"),
        "speedup_median": _median([_row_speedup(row) for row in rows]) if compared else None,
        "ttft_ratio": _median([_row_ttft_ratio(row) for row in rows]) if compared else None,
        "outputs_identical": all(row.identical for row in rows) if compared and greedy else None,
        "identical_prompts": sum(row.identical for row in rows) if compared and greedy else None,
        "divergence": _first_divergence(session) if compared and greedy else None,
        "interrupted": interrupted,
        "total_s": total_s,
        "warm_up_s": session.warm_up_s,
        "memory": _memory(session),
        "settings": describe_settings(settings, session.llm),
        "date": date(),
        "versions": versions(),
        "machine": machine(settings.device, session.board and session.board.board, session.mock),
        "command": sys.argv,
        "prompts": [_row_results(row, session.fused) for row in rows],
        "partial": [_run_results(run, session.fused) for run in session.under_way],
    }


def _without_times(value: Any) -> Any:
    """The same results with null for every time."""
    if isinstance(value, dict):
        return {key: None if TIMES.fullmatch(str(key)) else _without_times(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_times(item) for item in value]
    return value


def _path_totals(session: Session, path: str, runs: list[Run]) -> Results:
    stats = GenerationStats.merge([run.stats for run in runs])
    load_s = session.target.load_s + (session.draft.load_s if session.draft and path == "speculative" else 0)
    totals = {
        "ttft_ms": _median([run.stats.ttft_s * 1000 for run in runs]),
        "tok_s_user": _rate(stats),
        "tokens": stats.tokens,
        "decode_tokens": stats.decode_tokens,
        "decode_s": stats.decode_s,
        "load_s": load_s,
    }
    return totals | (_speculation(stats, session.fused) if path == "speculative" else {})


def _speculation(stats: GenerationStats, fused: bool) -> Results:
    """Of the times of a round either draft_ms and verify_ms are known, or fused_ms: both in one device program. Rates
    and means are over rounds that drafted and were not cut, counts over all; plain rounds drafted nothing.

    A tree's length is that of its longest chain, its levels: so many of its tokens could have been accepted. Lengths,
    acceptance rate and positions go by levels; drafted and tree_tokens_per_round count all its tokens.
    """
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


def _sources(stats: GenerationStats) -> Results:
    """What drafted ("model", "lookup", ..), in how many rounds, how many tokens, and how many of them were accepted."""
    sources: Results = {}
    for round in stats.rounds:
        if round.drafted:
            counts = sources.setdefault(round.source, {"rounds": 0, "drafted": 0, "accepted": 0})
            counts["rounds"] += 1
            counts["drafted"] += round.drafted
            counts["accepted"] += round.accepted
    return sources


def _controller(session: Session, runs: list[Run]) -> Results:
    """Of automatic draft lengths: how many tokens (of trees: levels) each round of each run drafted, and what that was
    decided with."""
    return {"chosen": [[round.depth for round in run.stats.rounds] for run in runs], **session.controller.report()}


def _run_results(run: Run, fused: bool) -> Results:
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
    return results | (_speculation(stats, fused) if run.path == "speculative" else {})


def _row_results(row: Row, fused: bool) -> Results:
    return {
        "number": row.prompt.number,
        "prompt": row.prompt.text,
        "prompt_tokens": len(row.prompt.ids),
        "prompt_ids": row.prompt.ids,
        "identical": row.identical if len(row.runs) == 2 else None,
        "speedup": _row_speedup(row),
        "baseline": None,
        "speculative": None,
        **{path: _run_results(run, fused) for path, run in row.runs.items()},
    }


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


def _ratio(speculative: Results | None, baseline: Results | None, key: str) -> float | None:
    if not speculative or not baseline or not speculative[key] or not baseline[key]:
        return None
    return speculative[key] / baseline[key]


def _first_divergence(session: Session) -> Results | None:
    """Where greedy texts part for the first time, and how close the target's two best tokens were there."""
    for row in session.rows:
        baseline, speculative = row.runs["baseline"].tokens, row.runs["speculative"].tokens
        if baseline == speculative:
            continue
        shared = next(
            (i for i, (a, b) in enumerate(zip(baseline, speculative, strict=False)) if a != b),
            min(len(baseline), len(speculative)),
        )
        return {
            "prompt": row.prompt.number,
            "token": shared + 1,
            "baseline_id": baseline[shared] if shared < len(baseline) else None,
            "speculative_id": speculative[shared] if shared < len(speculative) else None,
            "top2_margin": session.top_two_margin(row.prompt.ids + baseline[:shared]),
        }
    return None


def _memory(session: Session) -> Results:
    """Of each model over all its chips and, on a board, of one chip."""
    memory: Results = {}
    for role, loaded in (("target", session.target), ("draft", session.draft)):
        memory[role] = loaded and {
            "weight_bytes": loaded.model.weight_bytes,
            "kv_cache_bytes": loaded.model.kv_cache_bytes,
        }
        if loaded and session.board:
            plan = session.board.plans[role]
            memory[role] |= {
                "chips": plan.chips,
                "weight_bytes_per_chip": plan.weights,
                "kv_cache_bytes_per_chip": plan.kv_cache,
            }
    return memory | {f"peak_{name}": value for name, value in peak_memory(session.settings.device).items()}
