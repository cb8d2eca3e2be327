"""The numbers of a demo run in words: headings, figures, table cells. Plain strings, no layout."""

from collections.abc import Callable
from typing import Any

from demo.report import acceptance_rate
from demo.results import BoardModelMemory, ModelMemory, PathTotals, RunResults, SourceCounts
from demo.runs import Row, Run
from demo.session import Session
from models.boards import MOCK, SIMULATOR
from models.cli.text import plural
from models.options import LEAST_FREE_ROWS, describe_source
from models.speculative.drafters.registry import NONE, drafts_trees, source_of

# Where times say nothing, by what the board is made of: said with every result.
UNTIMED = {
    MOCK: "mock board: the texts come from golden functions on this machine's CPU, times would say nothing",
    SIMULATOR: "simulated board: its kernels ran on this machine's CPU, times would say nothing",
}

Cells = tuple[str, str, str, str]  # label, baseline, speculative, ratio


def about(session: Session) -> list[tuple[str, str]]:
    """What the run is made of, each thing with one line about it: the models, the board, the settings."""
    lines = models(session)
    if session.board:
        lines.append(("board", session.board.describe()))
    return [*lines, ("run", run_settings(session))]


def models(session: Session) -> list[tuple[str, str]]:
    """Role and one line about each loaded model."""
    lines = []
    for role, loaded in (("target", session.target), ("draft", session.draft)):
        if loaded is None:
            continue
        config, model = loaded.model.config, loaded.model
        load_time = f", {loaded.load_s:.1f} s" if session.timed else ""
        lines.append(
            (
                role,
                f"{describe_source(loaded.opened.source)}: {config.num_hidden_layers} layers x {config.hidden_size}, "
                f"{config.parameter_count / 1e6:,.1f} M parameters, {loaded.dtype}, {size(model.weight_bytes)} + "
                f"{size(model.kv_cache_bytes)} KV{load_time}",
            )
        )
    return lines


def run_settings(session: Session) -> str:
    settings, sampling = session.settings, session.sampling
    parts = [settings.device]
    if sampling.greedy:
        parts.append("greedy")
    else:
        parts.append(f"temperature {sampling.temperature}")
        if sampling.top_k:
            parts.append(f"top-k {sampling.top_k}")
        if sampling.top_p < 1:
            parts.append(f"top-p {sampling.top_p}")
        parts.append(f"seed {sampling.seed}")
    if settings.drafts:
        verification = "verified in the same program" if session.fused else f"{settings.verification} verification"
        parts.append(f"{drafter_name(session)}, {_draft_lengths(session)} a round, {verification}")
    elif "speculative" in settings.paths:
        parts.append("drafter none: plain decoding")
    if settings.compiled:
        parts.append("compiled layers")
    elif settings.fixed_rows:
        parts.append(plural(settings.fixed_rows, "fixed row") + _padding_cost(session, settings.fixed_rows))
    elif settings.row_invariant and settings.rows_alike:
        parts.append("row-invariant" + _padding_cost(session, 1))
    elif session.calibration and settings.row_invariant is False:
        rows = 1 if session.calibration.rows_alike else LEAST_FREE_ROWS
        what = "bits that do not depend on other rows" if rows == 1 else plural(rows, "row")
        parts.append(f"rows not padded ({what} would cost plain decoding {session.calibration.costs[rows]:.2f}x)")
    parts.append(f"{len(session.prompts)} x {settings.max_new_tokens} tokens")
    return ", ".join(parts)


def _padding_cost(session: Session, rows: int) -> str:
    """What padding to so many rows costs plain decoding, where it was measured."""
    calibration = session.calibration
    if calibration is None or rows not in calibration.costs:
        return ""
    return f" ({calibration.costs[rows]:.2f}x the time of one)"


def _draft_lengths(session: Session) -> str:
    """How much a round may draft."""
    settings = session.settings
    lengths = list(session.controller.lengths) if settings.auto else [settings.longest_draft]
    longest = plural(lengths[-1], "level" if settings.spec.workload.tree else "token")
    if not settings.auto:
        return longest
    if lengths == list(range(len(lengths))):
        return f"auto: 0 to {longest}"
    return f"auto: {', '.join(map(str, lengths[:-1]))} or {longest}"


def drafter_name(session: Session) -> str:
    """Who drafts, and what is known of its size by now."""
    settings = session.settings
    if settings.spec is None:
        return NONE
    layer = session.exit_layer or "(to be chosen)"
    name = settings.spec.label.format(**(settings.drafter_settings | {"exit_layer": layer}))
    return f"{name}s" if name.endswith(" token") and settings.tree_nodes != 1 else name


def path_name(run: Run, session: Session) -> str:
    """What is writing now."""
    return drafter_name(session) if run.path == "speculative" and session.settings.drafts else run.path


def pace(run: Run, session: Session) -> str:
    """How fast a run is or was, how much of its drafts is accepted and, where that varies, how much is drafted now or
    was on average; "" where nothing of it can be said."""
    stats = run.stats
    parts = [f"{stats.tok_s:.1f} tok/s"] if session.timed else []
    rate = acceptance_rate(stats)
    if rate is not None:
        parts.append(f"{rate:.0%} accepted")
    if session.settings.auto and run.path == "speculative" and stats.rounds:
        if stats.finish_reason:
            parts.append(f"{sum(round.drafted for round in stats.rounds) / len(stats.rounds):.1f} drafted a round")
        else:
            parts.append(f"drafting {stats.rounds[-1].drafted}")
    return ", ".join(parts)


def figures(row: Row, session: Session) -> list[str]:
    """What is worth saying about one prompt."""
    figures = [f"{path} {said}" for path, run in row.runs.items() if (said := pace(run, session))]
    if len(row.runs) == 2:
        baseline, speculative = (run.stats.tok_s for run in row.runs.values())
        if baseline and speculative and session.timed:
            figures.append(f"{speculative / baseline:.2f}x")
        figures.append("same text" if row.identical else "other text")
    if any(run.stats.drafting_failure for run in row.runs.values()):
        figures.append("the drafter failed: plain from there")
    return figures


def summary_sections(results: RunResults) -> list[list[Cells]]:
    """The final table as text: rows of (label, baseline, speculative, ratio), grouped. A row in which nothing is
    known, such as a time on a mock, is left out."""
    spec = results.speculative
    sections = [_speed_rows(results), _cost_rows(results)]
    if spec and (spec.acceptance_by_position or results.controller):
        sections.insert(1, _speculation_rows(results))
    return [[cells for cells in section if any(cells[1:])] for section in sections]


def _both(
    results: RunResults,
    label: str,
    value: Callable[[PathTotals], float | None],
    form: str,
    ratio: float | None = None,
) -> Cells:
    baseline, speculative = (total and value(total) for total in (results.baseline, results.speculative))
    return label, _cell(baseline, form), _cell(speculative, form), _cell(ratio, "{:.2f}x")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _speed_rows(results: RunResults) -> list[Cells]:
    return [
        _both(results, "time to first token", lambda path: path.ttft_ms, "{:.1f} ms", results.ttft_ratio),
        _both(results, "tokens/s per user", lambda path: path.tok_s_user, "{:.1f}", results.speedup),
        _both(results, "tokens written", lambda path: path.tokens, "{}"),
        _both(results, "decode time", lambda path: path.decode_s, "{:.2f} s"),
    ]


def _speculation_rows(results: RunResults) -> list[Cells]:
    spec, settings = results.speculative, results.settings
    tree = drafts_trees(settings["drafter"])

    def only(label: str, value: float | None, form: str) -> Cells:
        return label, "", _cell(value, form), ""

    rates = [f"{rate:.0%}" for rate in spec.acceptance_by_position]
    forced = ", forced" if settings.get("force_acceptance") is not None else ""
    rows = [only(f"acceptance rate{forced}", spec.acceptance_rate, "{:.1%}")]
    for start in range(0, len(rates), 4):
        shown = rates[start : start + 4]
        places = f"{start + 1}-{start + len(shown)}" if len(shown) > 1 else f"{start + 1}"
        rows.append((f"  at {'level' if tree else 'position'} {places}", "", " ".join(shown), ""))
    if len(spec.sources) > 1:
        rows += [(f"  by {source_of(name).label}", "", _kept(counts), "") for name, counts in spec.sources.items()]
    rows.append(only("mean acceptance length", spec.mean_acceptance_length, "{:.2f} tokens"))
    if settings["exit_layer"]:
        rows.append(("early exit after layer", "", str(settings["exit_layer"]), ""))
    if tree or results.controller:
        rows.append(only("mean draft length", spec.mean_draft_length, "{:.2f} levels" if tree else "{:.2f} tokens"))
    rows.append(only("tree tokens per round", spec.tree_tokens_per_round, "{:.2f}"))
    if results.controller:  # how often nothing was drafted, from where on that would have paid
        rows.append(("plain rounds", "", f"{spec.plain_rounds} of {spec.rounds}", ""))
        rows.append(only("break-even acceptance", results.controller.break_even, "{:.1%}"))
    return [
        *rows,
        only("draft per round", spec.draft_ms, "{:.2f} ms"),
        only("verify per round", spec.verify_ms, "{:.2f} ms"),
        only("draft + verify per round", spec.fused_ms, "{:.2f} ms (one program)"),
        only("host per round", spec.host_ms, f"{{:.3f}} ms ({spec.host_share or 0:.1%})"),
    ]


def _kept(counts: SourceCounts) -> str:
    return f"{counts.accepted / counts.drafted:.1%} in {counts.rounds} rounds"


def _cost_rows(results: RunResults) -> list[Cells]:
    target, draft = results.memory.target, results.memory.draft

    def memory(label: str, value: Callable[[ModelMemory], int]) -> Cells:
        alone = size(value(target))
        both = alone + (f" + {size(value(draft))}" if draft else "") if results.speculative else ""
        return label, alone if results.baseline else "", both, ""

    load = _both(results, "load time", lambda path: path.load_s, "{:.2f} s")
    weights = memory("weights", lambda model: model.weight_bytes)
    cache = memory("KV cache", lambda model: model.kv_cache_bytes)
    if not isinstance(target, BoardModelMemory) or target.chips == 1:
        return [load, weights, cache]
    weights_per_chip = memory("  per chip", lambda model: model.weight_bytes_per_chip)
    cache_per_chip = memory("  per chip", lambda model: model.kv_cache_bytes_per_chip)
    return [load, weights, weights_per_chip, cache, cache_per_chip]


def closing_lines(results: RunResults) -> list[tuple[str, str]]:
    """What stands under the table (speed-up, identity, memory, time, or why there is none), each with its style."""
    lines = []
    if results.speedup is not None:
        forced = " with forced acceptance" if results.settings.get("force_acceptance") is not None else ""
        line = f"speed-up{forced}: {results.speedup:.2f}x"
        if results.speedup_median is not None:
            line += f" (median over prompts {results.speedup_median:.2f}x)"
        lines.append((line, "bold green" if results.speedup >= 1 else "bold yellow"))
    if results.prompts and results.baseline and results.speculative:
        style = "yellow" if results.outputs_identical is False else ""
        lines.append(("outputs identical: " + _identity(results), style))
        if results.outputs_identical is False and (reason := _why_other_text(results.settings)):
            lines.append((reason, "yellow"))
    memory = results.memory
    peak = f"peak memory: {size(memory.peak_process_bytes)} of the process"
    if memory.peak_cuda_bytes:
        peak += f", {size(memory.peak_cuda_bytes)} on the GPU"
    lines.append((peak, ""))
    if results.total_s is not None:
        compiling = results.warm_up_s
        included = "loading" + ("" if compiling is None else f", compiling ({compiling:.1f} s)") + " and warm-up"
        first = "" if results.first_token_s is None else f"; first token after {results.first_token_s:.1f} s"
        lines.append((f"total time: {results.total_s:.1f} s, {included} included{first}", ""))
    if not results.machine.get("timed", True):
        lines.append((untimed(results), "bold yellow"))
    return lines


def untimed(results: RunResults) -> str:
    """Why there are no times in results that have none."""
    return UNTIMED.get(results.machine.get("medium"), UNTIMED[MOCK])


def _identity(results: RunResults) -> str:
    count = len(results.prompts)
    if results.outputs_identical is None:
        return "n/a (sampling)"
    if results.outputs_identical:
        return f"yes ({count} of {count} prompts)"
    where = results.divergence
    return (
        f"no ({results.identical_prompts} of {count} prompts; first divergence: prompt {where.prompt}, "
        f"token {where.token}, top-2 margin {where.top2_margin:.3g})"
    )


def _why_other_text(settings: dict[str, Any]) -> str:
    """What makes a row's bits depend on its neighbours, so that near-ties fall the other way; "" where nothing does."""
    dtype = settings.get("dtype", "fp32")
    if dtype == "fp32":
        return ""
    if settings.get("compiled"):
        return ""
    if drafts_trees(settings["drafter"]):
        return (
            f"a tree's side branches lie elsewhere in the KV cache than where plain decoding writes, so {dtype} rounds "
            "them otherwise: a near-tie can fall the other way (next to never with --dtype fp32)"
        )
    if not settings["fixed_rows"] and not settings.get("rows_alike"):
        return (
            f"{dtype} rounds a row otherwise when other rows are computed with it: a near-tie can fall the other way "
            "(--row-invariant rules that out)"
        )
    return ""


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
