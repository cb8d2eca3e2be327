"""The numbers of a demo run in words: headings, figures, table cells, explanations. Plain strings, no layout."""

from demo.arguments import describe_source
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
    if session.draft:
        verification = "verified in the same program" if session.fused else f"{settings.verification} verification"
        parts.append(f"draft {settings.num_draft_tokens}, {verification}")
    if settings.fixed_rows:
        parts.append(f"{settings.fixed_rows} fixed rows")
    parts.append(f"{len(session.prompts)} x {settings.max_new_tokens} tokens")
    return ", ".join(parts)


def pace(run: Run, session: Session) -> str:
    """How fast a run is or was, and how much of its drafts is accepted; "" where neither can be said."""
    parts = [] if session.mock else [f"{run.stats.tok_s:.1f} tok/s"]
    if run.stats.acceptance_by_position:
        parts.append(f"{run.stats.acceptance_rate:.0%} accepted")
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
    drafted = results["settings"]["num_draft_tokens"]
    if speedup is None or speedup >= 1 or not drafted:
        return []
    if speculative["acceptance_rate"] is None:
        return [
            f"Speculation was slower here, and every text was too short for a whole round of {drafted} draft tokens: "
            "draft fewer (--num-draft-tokens) or write more (--max-new-tokens)."
        ]
    plain_ms = 1000 / baseline["tok_s_user"]
    forwards_ms, rest_ms, prompt_ms = _costs(results)
    round_ms = forwards_ms + rest_ms
    needed = round_ms / plain_ms
    emitted = speculative["mean_acceptance_length"]
    if speculative["fused_ms"] is None:
        forwards = f"draft {speculative['draft_ms']:.2f}, verify {speculative['verify_ms']:.2f}"
    else:
        forwards = f"draft and verify {forwards_ms:.2f} in one program"
    lines = [
        f"Speculation was slower here: a round takes {round_ms:.2f} ms ({forwards}, host "
        f"{speculative['host_ms']:.2f}, its share of the draft's prefill {prompt_ms:.2f}), {needed:.2f} times a plain "
        f"step of {plain_ms:.2f} ms, and emits {emitted:.2f} tokens.",
    ]
    rate = (needed - 1) / drafted
    if emitted >= needed:
        return [
            *lines,
            "Whole rounds pay; it is the cut ones at the ends of the texts that do not: write longer texts.",
        ]
    if rate > 1:
        lines.append(f"With {drafted} draft tokens not even full acceptance would pay for that.")
    else:
        lines.append(
            f"It breaks even at an acceptance rate of {rate:.0%} with {drafted} draft tokens; "
            f"measured were {speculative['acceptance_rate']:.0%}."
        )
    return [*lines, _advice(results, plain_ms)]


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
    settings, accepted = results["settings"], results["speculative"]["acceptance_by_position"]
    if settings["verification"] == "sequential":
        return "Sequential verification is the reason: every token costs a target forward. Leave --verification out."
    if results["speculative"]["fused_ms"] is not None:  # what one draft step takes of it is not known
        return "Try fewer draft tokens (--num-draft-tokens), or a draft that is cheaper or closer to the target."
    _, rest_ms, _ = _costs(results)
    step_ms = results["speculative"]["draft_ms"] / settings["num_draft_tokens"]
    fixed_ms = results["speculative"]["verify_ms"] + rest_ms
    gains = {
        k: (1 + sum(accepted[:k])) * plain_ms / (k * step_ms + fixed_ms) for k in range(1, settings["num_draft_tokens"])
    }
    best = max(gains, key=gains.get, default=None)
    if best and gains[best] > 1:
        return f"Draft fewer tokens: --num-draft-tokens {best} would give about {gains[best]:.2f}x (predicted)."
    return "Fewer draft tokens would not pay either: use a draft that is cheaper or closer to the target."


def summary_sections(results: Results) -> list[list[Cells]]:
    """The final table as text: rows of (label, baseline, speculative, ratio), grouped. A row in which nothing is
    known, such as a time on a mock board, is left out."""
    spec = results["speculative"]
    sections = [_speed_rows(results), _cost_rows(results)]
    if spec and spec["acceptance_by_position"]:
        sections.insert(1, _speculation_rows(spec))
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


def _speculation_rows(spec: Results) -> list[Cells]:
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
        only("mean acceptance length", f"{spec['mean_acceptance_length']:.2f} tokens"),
        milliseconds("draft per round", "draft_ms"),
        milliseconds("verify per round", "verify_ms"),
        milliseconds("draft + verify per round", "fused_ms", "{:.2f} ms (one program)"),
        milliseconds("host per round", "host_ms", f"{{:.3f}} ms ({spec['host_share'] or 0:.1%})"),
    ]


def _cost_rows(results: Results) -> list[Cells]:
    target, draft = results["memory"]["target"], results["memory"]["draft"]
    several_chips = target.get("chips", 1) > 1

    def memory(label: str, key: str) -> Cells:
        alone = size(target[key])
        both = f"{alone} + {size(draft[key])}" if results["speculative"] else ""
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
