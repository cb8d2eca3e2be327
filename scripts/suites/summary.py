"""The numbers of one configuration over some prompts: rates, speed-up, latency as a reader sees it, acceptance."""

import statistics
from collections.abc import Sequence
from typing import Any

from models.cli import settings as cli_settings
from models.speculative.stats import GenerationStats
from scripts.suites.configurations import Configuration, Sample
from scripts.suites.measuring import percentile, ratios, spread
from scripts.suites.report import FORMATS

Repetitions = Sequence[Sequence[Sample]]  # [repetition][prompt]


def rate(samples: Sequence[Sample]) -> float | None:
    """Decode tokens per second over some prompts; None where nothing was decoded after the first token."""
    return GenerationStats.merge([sample.stats for sample in samples]).tok_s or None


def summarise(configuration: Configuration, runs: Repetitions, plain: Repetitions) -> dict[str, Any]:
    """Of the complete repetitions; `plain` are those of plain decoding. Keys of times end with their unit.

    Rates, speed-ups and total_s (whole calls, prefill included): median, min, max and one value a repetition. Waits,
    acceptance and the parts of a round: over all repetitions. texts_equal: how many texts are plain decoding's; None
    where they are drawn at random.
    """
    rates = [rate(samples) for samples in runs]
    samples = [sample for samples in runs for sample in samples]
    stats = GenerationStats.merge([sample.stats for sample in samples])
    lengths = [round.drafted for round in stats.rounds if round.drafted and not round.cut]
    greedy = configuration.bench.sampling.greedy
    equal = sum(
        a.tokens == b.tokens for run, base in zip(runs, plain, strict=True) for a, b in zip(run, base, strict=True)
    )
    return {
        "drafter": configuration.drafter,
        "draft_length": configuration.length,
        "verification": configuration.verification,
        "tok_s": spread(rates),
        "speedup": spread(ratios(rates, [rate(samples) for samples in plain])),
        "init_s": configuration.init_s,
        "total_s": spread([sum(sample.seconds for sample in run) for run in runs]),
        "ttft_ms": spread([1000 * statistics.median(sample.stats.ttft_s for sample in run) for run in runs]),
        **latency(samples),
        "tokens": stats.tokens,
        "rounds": len(stats.rounds),
        "plain_rounds": sum(not round.drafted for round in stats.rounds),
        "mean_draft_length": statistics.mean(lengths) if lengths else None,
        "acceptance_rate": stats.acceptance_rate if lengths else None,
        "mean_acceptance_length": stats.mean_acceptance_length if lengths else None,
        "acceptance_by_position": stats.acceptance_by_position,
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "host_ms": stats.host_ms,
        "host_share": stats.host_share,
        "draft_prefill_ms": 1000 * stats.draft_prefill_s / max(len(samples), 1),
        "texts_equal": equal if greedy else None,
        "texts": len(samples),
    }


def latency(samples: Sequence[Sample]) -> dict[str, Any]:
    """How the stream looks to its reader, the first token apart: percentiles of the wait for a token, and how many
    tokens need no wait because they were accepted in one block with the token before."""
    waits = [1000 * wait for sample in samples for wait in sample.waits[1:]]
    blocks = sum(len(sample.stats.rounds) for sample in samples)
    if not waits:
        return {"wait_ms": None, "no_wait_share": None}
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
    return {
        "wait_ms": {name: percentile(waits, share) for name, share in shares.items()},
        "no_wait_share": 1 - blocks / len(waits),
    }


def describe_models(bench) -> dict[str, Any]:
    """Load time and memory of each model."""
    return {
        role: loaded
        and {
            "load_s": loaded.load_s,
            "weight_bytes": loaded.model.weight_bytes,
            "kv_cache_bytes": loaded.model.kv_cache_bytes,
        }
        for role, loaded in (("target", bench.target), ("draft", bench.draft))
    }


def describe_settings(bench, options) -> dict[str, Any]:
    """The shared flags as they took effect, then those of the suite."""
    settings = cli_settings.describe_settings(bench.settings, bench.llm)
    chosen_by_suite = ("mode", "drafter", "num_draft_tokens", "html", "warm_up")
    own = {name: value for name, value in vars(options).items() if name not in (*FORMATS, "suite", "quiet")}
    return {name: value for name, value in settings.items() if name not in chosen_by_suite} | own
