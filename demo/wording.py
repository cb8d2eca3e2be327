"""The numbers of a demo run in words: headings, figures, table cells, explanations. Plain strings, no layout."""

from demo.arguments import AUTO_LONGEST, describe_source
from demo.report import Results
from demo.session import Row, Run, Session

MOCK = "mock board: the texts come from golden functions on this machine's CPU, times would say nothing"

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
        load_time = "" if session.mock else f", {loaded.load_s:.1f} s"
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
        limits = f", top-k {sampling.top_k}" * bool(sampling.top_k) + f", top-p {sampling.top_p}" * (sampling.top_p < 1)
        parts.append(f"temperature {sampling.temperature}{limits}, seed {sampling.seed}")
    if settings.drafts:
        length = f"auto, 0 to {AUTO_LONGEST}" if settings.auto else settings.num_draft_tokens
        verification = "verified in the same program" if session.fused else f"{settings.verification} verification"
        parts.append(f"drafter {settings.drafter}, draft {length}, {verification}")
    elif "speculative" in settings.paths:
        parts.append("drafter none: plain decoding")
    if settings.fixed_rows:
        parts.append(f"{settings.fixed_rows} fixed row" + "s" * (settings.fixed_rows > 1))
    parts.append(f"{len(session.prompts)} x {settings.max_new_tokens} tokens")
    return ", ".join(parts)


def pace(run: Run, session: Session) -> str:
    """How fast a run is or was, how much of its drafts is accepted and, where that varies, how much is drafted now or
    was on average; "" where nothing of it can be said."""
    stats = run.stats
    parts = [] if session.mock else [f"{stats.tok_s:.1f} tok/s"]
    if stats.acceptance_by_position:
        parts.append(f"{stats.acceptance_rate:.0%} accepted")
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
        if baseline and speculative and not session.mock:
            figures.append(f"{speculative / baseline:.2f}x")
        figures.append("same text" if row.identical else "other text")
    return figures


def explain_slowdown(results: Results) -> list[str]:
    """Plain words, with the measured costs, on why speculation was slower here and what to change; [] if it was not."""
    speedup, speculative, baseline = results["speedup"], results["speculative"], results["baseline"]
    settings = results["settings"]
    if speedup is None or speedup >= 1 or settings["num_draft_tokens"] == 0:
        return []
    if not speculative["drafted"] and speculative["plain_rounds"]:
        return [_nothing_drafted(settings)]
    if speculative["acceptance_rate"] is None:
        length, fewer = "draft tokens", ""
        if not results["controller"]:
            length, fewer = f"{settings['num_draft_tokens']} draft tokens", "draft fewer (--num-draft-tokens) or "
        return [
            f"Speculation was slower here, and every text was too short for a whole round of {length}: "
            f"{fewer}write more (--max-new-tokens)."
        ]
    plain_ms = 1000 / baseline["tok_s_user"]
    forwards_ms, rest_ms, prompt_ms = _costs(results)
    round_ms = forwards_ms + rest_ms
    needed = round_ms / plain_ms
    emitted = speculative["mean_acceptance_length"]
    if speculative["fused_ms"] is None:
        parts = [f"draft {speculative['draft_ms']:.2f}, verify {speculative['verify_ms']:.2f}"]
    else:
        parts = [f"draft and verify {forwards_ms:.2f} in one program"]
    parts.append(f"host {speculative['host_ms']:.2f}")
    if settings["draft"]:
        parts.append(f"its share of the draft's prefill {prompt_ms:.2f}")
    mixed = speculative["plain_rounds"] > 0
    lines = [
        f"Speculation was slower here: a round {'that drafts ' * mixed}takes {round_ms:.2f} ms ({', '.join(parts)}), "
        f"{needed:.2f} times a plain step of {plain_ms:.2f} ms, and emits {emitted:.2f} tokens.",
    ]
    drafted = speculative["mean_draft_length"]
    rate = (needed - 1) / drafted
    if emitted >= needed:
        pays = "Whole rounds pay; it is the cut ones at the ends of the texts that do not: write longer texts."
        if mixed:
            pays = (
                "Rounds that draft pay; it is the rest that does not (cut rounds at the ends of the texts, plain ones "
                "where nothing was drafted): write longer texts."
            )
        return [*lines, pays]
    count = f"{drafted:.1f}".removesuffix(".0") + " draft tokens" + " on average" * bool(results["controller"])
    if rate > 1:
        lines.append(f"With {count} not even full acceptance would pay for that.")
    else:
        lines.append(
            f"It breaks even at an acceptance rate of {rate:.0%} with {count}; "
            f"measured were {speculative['acceptance_rate']:.0%}."
        )
    return [*lines, _advice(results, plain_ms)]


def _nothing_drafted(settings: Results) -> str:
    """Why both paths decoded plainly."""
    reason = "drafting would not have paid, by the costs measured"
    if settings["drafter"] == "prompt-lookup":
        reason = "no passage came again that was worth a copy (prompt-lookup; --drafter model drafts new text too)"
    return f"Nothing was drafted: {reason}. Both paths decoded plainly, and their difference is chance."


def _costs(results: Results) -> tuple[float, float, float]:
    """Milliseconds of a round's forwards, of its rest, and, within that, of its share of the draft's prefill."""
    speculative = results["speculative"]
    forwards_ms = speculative["fused_ms"]
    if forwards_ms is None:
        forwards_ms = speculative["draft_ms"] + speculative["verify_ms"]
    prompt_ms = speculative["draft_prefill_ms"] / speculative["rounds"]
    return forwards_ms, speculative["host_ms"] + prompt_ms, prompt_ms


def _advice(results: Results, plain_ms: float) -> str:
    """What to change, from the costs and the acceptance by position measured in this run."""
    settings, speculative = results["settings"], results["speculative"]
    if settings["verification"] == "sequential":
        return "Sequential verification is the reason: every token costs a target forward. Leave --verification out."
    if speculative["fused_ms"] is not None:  # what one draft step takes of it is not known
        return "Try fewer draft tokens (--num-draft-tokens), or a draft that is cheaper or closer to the target."
    better = "use a draft that is cheaper or closer to the target."
    if not settings["draft"]:
        better = "this text repeats itself too little for prompt-lookup, use --drafter model or combined."
    if results["controller"]:
        return f"Its length is already chosen by these costs: write longer texts, from which it learns; or {better}"
    accepted, longest = speculative["acceptance_by_position"], settings["num_draft_tokens"]
    _, rest_ms, _ = _costs(results)
    step_ms = speculative["draft_ms"] / speculative["mean_draft_length"]
    fixed_ms = speculative["verify_ms"] + rest_ms
    gains = {k: (1 + sum(accepted[:k])) * plain_ms / (k * step_ms + fixed_ms) for k in range(1, longest)}
    best = max(gains, key=gains.get, default=None)
    if best and gains[best] > 1:
        return f"Draft fewer tokens: --num-draft-tokens {best} would give about {gains[best]:.2f}x (predicted)."
    return f"Fewer draft tokens would not pay either: {better}"


def summary_sections(results: Results) -> list[list[Cells]]:
    """The final table as text: rows of (label, baseline, speculative, ratio), grouped. A row in which nothing is
    known, such as a time on a mock board, is left out."""
    spec = results["speculative"]
    sections = [_speed_rows(results), _cost_rows(results)]
    if spec and spec["acceptance_by_position"]:
        sections.insert(1, _speculation_rows(spec, results["controller"]))
    return [[cells for cells in section if any(cells[1:])] for section in sections]


def _both(results: Results, label: str, key: str, form: str, ratio: float | None = None) -> Cells:
    values = [path and path[key] for path in (results["baseline"], results["speculative"])]
    cells = ["" if value is None else form.format(value) for value in values]
    return label, *cells, "" if ratio is None else f"{ratio:.2f}x"


def _speed_rows(results: Results) -> list[Cells]:
    return [
        _both(results, "time to first token", "ttft_ms", "{:.1f} ms", results["ttft_ratio"]),
        _both(results, "tokens/s per user", "tok_s_user", "{:.1f}", results["speedup"]),
        _both(results, "tokens written", "tokens", "{}"),
        _both(results, "decode time", "decode_s", "{:.2f} s"),
    ]


def _speculation_rows(spec: Results, controller: Results | None) -> list[Cells]:
    def only(label: str, text: str) -> Cells:
        return label, "", text, ""

    def milliseconds(label: str, key: str, form: str = "{:.2f} ms") -> Cells:
        return only(label, "" if spec[key] is None else form.format(spec[key]))

    rates = [f"{rate:.0%}" for rate in spec["acceptance_by_position"]]
    return [
        only("acceptance rate", f"{spec['acceptance_rate']:.1%}"),
        *(
            only(f"  at position {start + 1}-{min(start + 4, len(rates))}", " ".join(rates[start : start + 4]))
            for start in range(0, len(rates), 4)
        ),
        *(only(f"  by {name}", _kept(counts)) for name, counts in spec["sources"].items() if len(spec["sources"]) > 1),
        only("mean acceptance length", f"{spec['mean_acceptance_length']:.2f} tokens"),
        *(_controller_rows(spec, controller) if controller else ()),
        milliseconds("draft per round", "draft_ms"),
        milliseconds("verify per round", "verify_ms"),
        milliseconds("draft + verify per round", "fused_ms", "{:.2f} ms (one program)"),
        milliseconds("host per round", "host_ms", f"{{:.3f}} ms ({spec['host_share'] or 0:.1%})"),
    ]


def _kept(counts: Results) -> str:
    return f"{counts['accepted'] / counts['drafted']:.1%} in {counts['rounds']} rounds"


def _controller_rows(spec: Results, controller: Results) -> list[Cells]:
    """Of automatic draft lengths: how long they were, how often none was made, from where on they pay."""
    rows = [
        ("mean draft length", "", f"{spec['mean_draft_length']:.2f} tokens", ""),
        ("plain rounds", "", f"{spec['plain_rounds']} of {spec['rounds']}", ""),
    ]
    if controller["break_even"] is not None:
        rows.append(("break-even acceptance", "", f"{controller['break_even']:.1%}", ""))
    return rows


def _cost_rows(results: Results) -> list[Cells]:
    target, draft = results["memory"]["target"], results["memory"]["draft"]
    several_chips = target.get("chips", 1) > 1

    def memory(label: str, key: str) -> Cells:
        alone = size(target[key])
        both = alone + (f" + {size(draft[key])}" if draft else "") if results["speculative"] else ""
        return label, alone if results["baseline"] else "", both, ""

    rows = [_both(results, "load time", "load_s", "{:.2f} s")]
    for label, key in (("weights", "weight_bytes"), ("KV cache", "kv_cache_bytes")):
        rows.append(memory(label, key))
        if several_chips:
            rows.append(memory("  per chip", f"{key}_per_chip"))
    return rows


def closing_lines(results: Results) -> list[tuple[str, str]]:
    """What stands under the table (speed-up, identity, memory, time, or why there is none), each with its style."""
    lines = []
    if results["speedup"] is not None:
        line = f"speed-up: {results['speedup']:.2f}x"
        if results["speedup_median"] is not None:
            line += f" (median over prompts {results['speedup_median']:.2f}x)"
        lines.append((line, "bold green" if results["speedup"] >= 1 else "bold yellow"))
    if results["prompts"] and results["baseline"] and results["speculative"]:
        lines.append(("outputs identical: " + _identity(results), "yellow" * (results["outputs_identical"] is False)))
    memory = results["memory"]
    peak = f"peak memory: {size(memory['peak_process_bytes'])} of the process"
    if memory["peak_cuda_bytes"]:
        peak += f", {size(memory['peak_cuda_bytes'])} on the GPU"
    lines.append((peak, ""))
    if results["total_s"] is not None:
        compiling = results["warm_up_s"]
        included = "loading" + ("" if compiling is None else f", compiling ({compiling:.1f} s)") + " and warm-up"
        lines.append((f"total time: {results['total_s']:.1f} s, {included} included", ""))
    if results["machine"]["mock"]:
        lines.append((MOCK, "bold yellow"))
    return lines


def _identity(results: Results) -> str:
    count = len(results["prompts"])
    if results["outputs_identical"] is None:
        return "n/a (sampling)"
    if results["outputs_identical"]:
        return f"yes ({count} of {count} prompts)"
    where = results["divergence"]
    return (
        f"no ({results['identical_prompts']} of {count} prompts; first divergence: prompt {where['prompt']}, "
        f"token {where['token']}, top-2 margin {where['top2_margin']:.3g})"
    )


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
