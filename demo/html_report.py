"""A demo run as one HTML page: the numbers, charts of them, and every text token by token and round by round."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from markupsafe import Markup

from demo.explain import explain_slowdown
from demo.html_charts import Bar, ChartFigure, Limit, bar_chart, rounds_chart, stacked_chart
from demo.html_page import ASSETS, Table, page
from demo.html_texts import texts
from demo.results import PromptResults, RunResults
from demo.session import Run, Session
from demo.wording import about, closing_lines, summary_sections, untimed
from models.cli.environment import write_text
from models.cli.text import plural
from models.speculative.drafters.registry import drafts_trees, reads_prompt, source_of

TITLES = {
    "compare": "Speculative decoding beside its baseline",
    "speculative": "Speculative decoding",
    "baseline": "Plain decoding",
}
PATHS = ("baseline", "speculative")
MOST_PROMPTS = 20  # in the chart by prompt; the table has all


def write_html(path: str, session: Session, results: RunResults) -> None:
    """Write the page of a run, interrupted or not, to a file. Raises UserError if that fails."""
    write_text(path, report(session, results), "--html")


def report(session: Session, results: RunResults) -> str:
    """The page of a run, as HTML. ``results`` are those of `demo.report.build_results`; where they have no times, as
    on a mock or a simulator, the page has none."""
    told = texts(session)
    return page(
        "report.j2",
        TITLES[session.settings.mode],
        script=(ASSETS / "rounds.js").read_text(encoding="utf-8") if told["runs"] else "",
        data=told,
        notes=_notes(session, results),
        cards=_cards(results),
        totals=_totals(results),
        lines=[line for line, _ in closing_lines(results) if line != untimed(results)],
        facts=_facts(session, results),
        figures=_figures(session, results),
        prompts=_prompts(results),
        details=_details(results),
    )


# ------------------------------------------------------------------------------------------------------------ words
def _notes(session: Session, results: RunResults) -> list[str]:
    """What a reader has to know before any number."""
    lines = [] if session.timed else [untimed(results)]
    if results.interrupted:
        done, asked = len(results.prompts), len(session.prompts)
        line = f"The run was interrupted: {done} of {asked} prompts are complete, and only these are counted."
        if not done:
            begun = "what had been begun is shown" if session.under_way else "nothing was written"
            line = f"The run was interrupted before a prompt was complete: {begun}."
        lines.append(line)
    return lines + explain_slowdown(results)


def _facts(session: Session, results: RunResults) -> list[tuple[str, str]]:
    """What was run, on what."""
    machine, versions = results.machine, results.versions
    parts = (machine["gpu"], machine["cpu"], plural(machine["cores"], "core"), plural(machine["threads"], "thread"))
    return [
        *about(session),
        ("machine", ", ".join(filter(None, (*parts, machine["platform"])))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("date", datetime.fromisoformat(results.date).astimezone().isoformat(" ", "minutes")),
        ("command", shlex.join(results.command)),
    ]


class Card(NamedTuple):
    """A number with its name above it and a line below."""

    name: str
    value: str
    detail: str


def _cards(results: RunResults) -> list[Card]:
    """The few numbers that matter; only those that are known."""
    totals = results.totals.values()

    def arrow(values: Iterable[float | None], unit: str = "") -> str:
        known = [f"{value:.1f}" for value in values if value is not None]
        return " → ".join(known) + unit if known else ""

    order = " → ".join(results.totals)
    cards = []
    if results.speedup is not None:
        median = results.speedup_median
        detail = "" if median is None else f"median over prompts {median:.2f}x"
        forced = ", forced" if results.settings.get("force_acceptance") is not None else ""
        cards.append(Card(f"speed-up{forced}", f"{results.speedup:.2f}x", detail))
    cards.append(Card("tokens/s per user", arrow(total.tok_s_user for total in totals), order))
    cards.append(Card("time to first token", arrow((total.ttft_ms for total in totals), " ms"), order))
    spec = results.speculative
    if spec and spec.acceptance_rate is not None:
        detail = f"{spec.mean_acceptance_length:.2f} tokens per target forward"
        cards.append(Card("acceptance", f"{spec.acceptance_rate:.1%}", detail))
    if len(totals) == 2 and results.prompts:
        same, count = results.identical_prompts, len(results.prompts)
        if same is None:
            cards.append(Card("texts", "not compared", "sampled: they may differ"))
        else:
            cards.append(Card("texts", "identical" if same == count else "not identical", f"{same} of {count} prompts"))
    return [card for card in cards if card.value]


# ----------------------------------------------------------------------------------------------------------- tables
def _totals(results: RunResults) -> Table | None:
    """The table that the terminal shows."""
    shown = list(results.totals)
    if not shown:
        return None
    groups, sections = [], summary_sections(results)
    both = any(ratio for section in sections for *_, ratio in section)
    for section in sections:
        rows = []
        for label, *cells, ratio in section:
            values = [cell for path, cell in zip(PATHS, cells, strict=True) if path in shown]
            name = "\u2003" + label.strip() if label.startswith(" ") else label
            rows.append([name, *values, ratio] if both else [name, *values])
        groups.append(rows)
    return Table(["", *shown, "ratio"] if both else ["", *shown], groups)


def _prompts(results: RunResults) -> Table | None:
    if not results.prompts:
        return None
    columns: list[tuple[str, Callable[[PromptResults], str | Markup]]] = [
        ("prompt", lambda row: _excerpt(row.number, row.prompt)),
        ("tokens", lambda row: " / ".join(str(run.tokens) for run in row.runs.values())),
        ("baseline tok/s", lambda row: _number(row.baseline and row.baseline.tok_s_user, "{:.1f}")),
        ("speculative tok/s", lambda row: _number(row.speculative and row.speculative.tok_s_user, "{:.1f}")),
        ("speed-up", lambda row: _number(row.speedup, "{:.2f}x")),
        ("accepted", lambda row: _number(row.speculative and row.speculative.acceptance_rate, "{:.0%}")),
        ("same text", lambda row: "" if row.identical is None else "yes" if row.identical else "no"),
    ]
    made = [(name, [cell(row) for row in results.prompts]) for name, cell in columns]
    made = [(name, cells) for name, cells in made if any(cells)]  # a column in which nothing is known is left out
    rows = list(zip(*(cells for _, cells in made), strict=True))
    return Table([name for name, _ in made], [rows])


def _excerpt(number: int, prompt: str) -> Markup:
    return Markup('{} <span class="excerpt">{}</span>').format(number, " ".join(prompt[:300].split()))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _details(results: RunResults) -> list[Table]:
    details = {"settings": results.settings, "machine": results.machine, "versions": results.versions}
    return [
        Table((name, ""), [[(key, _plain(value)) for key, value in values.items() if value is not None]], words=(0, 1))
        for name, values in details.items()
    ]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ----------------------------------------------------------------------------------------------------------- charts
def _figures(session: Session, results: RunResults) -> list[ChartFigure]:
    figures = [_speed_figure(results), _acceptance_figure(results), _time_figure(session)]
    return [figure for figure in (*figures, _lengths_figure(session, results)) if figure]


def _speed_figure(results: RunResults) -> ChartFigure | None:
    """tok/s of each prompt, both paths."""
    groups = []
    for row in results.prompts:
        rates = [(path, run.tok_s_user) for path, run in row.runs.items() if run.tok_s_user]
        if rates:
            groups.append((str(row.number), [Bar(path, rate, f"{rate:.1f}") for path, rate in rates]))
    if not groups:
        return None
    shown = {path: path for path in results.totals}
    chart = bar_chart(groups[:MOST_PROMPTS], f"Tokens per second of each prompt: {', '.join(shown)}")
    notes: list[str] = []
    if len(groups) > MOST_PROMPTS:
        notes = [f"The first {MOST_PROMPTS} of {len(groups)} prompts; the table below has all."]
    return ChartFigure("Tokens per second, by prompt", chart, shown, notes)


def _acceptance_figure(results: RunResults) -> ChartFigure | None:
    """The share of drafts accepted up to each position, and where drafting one token breaks even."""
    controller, speculative = results.controller, results.speculative
    if not speculative or not speculative.acceptance_by_position:
        return None
    rates = speculative.acceptance_by_position
    place = "level" if drafts_trees(results.settings["drafter"]) else "position"
    groups = [(f"{place} {i}", [Bar("accepted", rate, f"{rate:.0%}")]) for i, rate in enumerate(rates, 1)]
    break_even = controller and controller.break_even
    limit, notes = None, ["Of the rounds that drafted this far, the share that kept the token and all before it."]
    if break_even is not None:
        known = controller.draft_step_ms
        drafted = [name for name in known if reads_prompt(name)] or known
        source = source_of(next(iter(drafted))).words  # as in the controller's own report
        when = "never pays" if break_even > 1 else f"pays if {place} 1 is above {max(break_even, 0):.0%}"
        sentence = f"drafting one token by {source} {when}"
        if len(speculative.sources) > 1:
            sentence += " (the bars are of all sources together)"
        if 0 <= break_even <= 1:
            limit, sentence = Limit(break_even, f"break-even {break_even:.0%}"), f"Dashed line: {sentence}"
        notes.append(f"{sentence}.")
    return ChartFigure(f"Accepted, by {place}", bar_chart(groups, f"Acceptance by {place}", limit), notes=notes)


def _time_figure(session: Session) -> ChartFigure | None:
    """Where the time of a decoded token goes, on each path."""
    if not session.timed:
        return None
    rows, names = [], {}
    for path in session.settings.paths:
        runs = _counted(session, path)
        tokens = sum(run.stats.decode_tokens for run in runs)
        if not tokens:
            continue
        parts = [(kind, name, 1000 * spent / tokens) for kind, name, spent in _spent(runs, session.fused)]
        names = {kind: name for kind, name, _ in parts} | names  # the longer list comes last
        split = ", ".join(f"{name} {ms:.2f}" for _, name, ms in parts)
        label = f"{path} {sum(ms for *_, ms in parts):.2f} ms"
        rows.append((label, split, [Bar(kind, ms, "") for kind, _, ms in parts]))
    if not rows:
        return None
    title = "Time of one decoded token"
    chart = stacked_chart([(label, bars) for label, _, bars in rows], f"{title}: {'; '.join(row[0] for row in rows)}")
    return ChartFigure(title, chart, names, [f"{label.split()[0]}: {split} ms" for label, split, _ in rows])


def _spent(runs: Sequence[Run], fused: bool) -> list[tuple[str, str, float]]:
    """(class, name, seconds) of each thing that took any of the decoding time."""
    rounds = [round for run in runs for round in run.stats.rounds]
    reading = sum(run.stats.draft_prefill_s for run in runs)
    if fused and any(round.drafted for round in rounds):
        forwards = [("fused", "draft and target in one program", sum(r.draft_s + r.verify_s for r in rounds))]
    else:
        drafting, verifying = sum(r.draft_s for r in rounds), sum(r.verify_s for r in rounds)
        forwards = [("draft", "draft", drafting), ("target", "target", verifying)]
    parts = [("reading", "draft reads the prompt", reading), *forwards, ("host", "host", sum(r.host_s for r in rounds))]
    return [part for part in parts if part[2] > 0]


def _lengths_figure(session: Session, results: RunResults) -> ChartFigure | None:
    """The draft lengths that the controller chose, round by round."""
    if not results.controller or not any(results.controller.chosen):
        return None
    kept = [[round.accepted for round in run.stats.rounds] for run in _counted(session, "speculative")]
    rounds = [list(zip(*both, strict=True)) for both in zip(results.controller.chosen, kept, strict=True)]
    longest = max([*results.controller.lengths, *(drafted for text in rounds for drafted, _ in text)])
    drafted = results.speculative.drafted
    title = f"Draft lengths chosen over {results.speculative.rounds} rounds: {drafted} tokens drafted in all"
    key = {"proposed": "drafted", "accepted": "accepted"}
    notes = ["Rounds from left to right, prompts numbered below."]
    return ChartFigure("Draft length, round by round", rounds_chart(rounds, longest, title), key, notes, wide=True)


def _counted(session: Session, path: str) -> list[Run]:
    """The runs that the totals are made of."""
    return [row.runs[path] for row in session.rows] or [run for run in session.under_way if run.path == path]
