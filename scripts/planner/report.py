"""A plan as tables, for a terminal or as Markdown. Every time and speed-up in them is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.cli.tables import markdown_table, terminal_table
from scripts.planner.heads import HEAD
from scripts.planner.levers import FASTEST
from scripts.planner.texts import TEXTS

Plan = dict  # what `plan.build` returns


@dataclass
class Table:
    """A table of text with a title and notes under it."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    notes: list[str] = field(default_factory=list)
    left: int = 1  # columns that are not numbers, at the left


def tables(plan: Plan) -> list[Table]:
    texts = [_texts(plan["texts"])] if plan["texts"] else []
    return [_lengths(plan), *texts, _levers(plan), _memory(plan), _fit(plan)]


def headline(plan: Plan) -> str:
    """The answer in a few lines."""
    settings, best = plan["settings"], plan["best"]
    draft = "an EAGLE-3 draft head" if settings["draft"] == HEAD else settings["draft"]
    where = f"{settings['target']} with {draft} on {settings['board']}, context {settings['context']}"
    lines = [
        f"{where}: PREDICTED, nothing measured on a board.",
        f"Acceptance: {plan['acceptance']['source']}. Device programs and bytes: {plan['counts']}.",
    ]
    asked = settings["num_draft_tokens"]
    if best["k"]:
        lines.append(
            f"{'Best draft' if asked is None else 'Draft'} length {best['k']}: {best['speedup']:.2f}x "
            f"({_band(best['speedup_band'], 2)}) over plain decoding, {best['tok_s']:.1f} tok/s "
            f"({_band(best['tok_s_band'])}). {_verdict(best['speedup_band'])}"
        )
    elif asked is None:
        lines.append("No draft length is faster than plain decoding.")
    lines.append(against_published(plan))
    if not plan["memory"]["fits"]:
        lines.append(f"DOES NOT FIT: {plan['memory']['refusal']}")
    return "\n".join(lines)


def against_published(plan: Plan) -> str:
    """In words: whether what is predicted beats the best plain decoding that anybody has published."""
    target, board = (plan["settings"][name] for name in ("target", "board"))
    best, known = plan["best"], plan["published_plain"]
    ours = f"Plain decoding by us: {plan['decode']['tok_s']:.1f} tok/s ({_band(plan['decode']['tok_s_band'])})."
    if known is None:
        return f"{ours} No plain speed of {target} on {board} has been published: nothing to compare with."
    where = "" if known["board"] == board else f", on {known['board']}"
    rate = f"{known['tok_s_user']:.1f} tok/s ({known['software']}, {known['date']}{where}; {known['source']})"
    low, high = (end / known["tok_s_user"] for end in best["tok_s_band"])
    ratio = best["tok_s"] / known["tok_s_user"]
    if ratio <= 1:
        verdict = "speculation would NOT beat it"
        verdict += ", as far as can be said" if high > 1 else ""
    else:
        verdict = "speculation would beat it" if low > 1 else "speculation may beat it, the band does not decide"
    fast = next(lever for lever in plan["levers"] if lever["name"] == FASTEST)
    return (
        f"{ours} Best plain speed published for {target} on {board}: {rate}. Predicted with speculation: {ratio:.2f}x "
        f"of it ({low:.2f}-{high:.2f}): {verdict}. With {fast['assumption'].partition(';')[0]}: "
        f"{fast['tok_s']:.1f} tok/s ({_band(fast['tok_s_band'])}), {fast['tok_s'] / known['tok_s_user']:.2f}x of it."
    )


def _verdict(band: Sequence[float]) -> str:
    if band[0] > 1:
        return "The whole band is above 1."
    return "The whole band is below 1." if band[1] < 1 else "The band does not decide whether it pays."


def _number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits if value < 100 else 0}f}"


def _percent(chance: float | None) -> str:
    return "never" if chance is None else f"{chance:.0%}"


def _band(band: Sequence[float], digits: int = 1) -> str:
    return "-".join(_number(end, digits) for end in band)


def _banded(entry: dict, name: str, digits: int = 1) -> str:
    return f"{_number(entry[name], digits)} ({_band(entry[f'{name}_band'], digits)})"


def _fit(plan: Plan) -> Table:
    fit = plan["fit"]
    rows = [
        (
            point["model"],
            point["board"],
            _kind(point),
            point["date"],
            str(point["context"]),
            f"{point['published']:.1f}",
            f"{point['predicted']:.1f}",
            f"{point['error']:+.1%}",
            f"{point['left_out_error']:+.1%}" if "left_out_error" in point else "not fitted",
        )
        for point in (*fit["points"], *fit["excluded"])
    ]
    errors = ", ".join(f"{board} {error:.0%}" for board, error in fit["largest_error_by_board"].items())
    years = ", ".join(f"{year} {error:.1%}" for year, error in fit["leave_one_out_median_error_by_year"].items())
    reasons = dict.fromkeys(point["excluded"] for point in fit["excluded"])
    sources = dict.fromkeys(point["source"].split(", ")[0].split(": ")[0] for point in fit["points"])
    notes = [
        f"Median error {fit['median_error']:.1%}; leave-one-out {fit['leave_one_out_median_error']:.1%} ({years}); "
        f"with all figures of a model on a board left out {fit['group_left_out_median_error']:.1%} (80 % of them "
        f"within {fit['spread']:.0%}); of all that was measured, fitted or not, "
        f"{fit['all_measured_median_error']:.1%}. "
        f"Largest error of the fit: {errors}.",
        _terms(fit["forms"]),
        "Fitted: " + "; ".join(f"{name} {text}" for name, text in fit["parameters_in_words"].items()) + ".",
        f"Published: {'; '.join(sources)}. 'left out' is the error of a fit without that figure.",
        f"Not fitted: {'; '.join(reasons)}.",
        *fit["caveats"],
    ]
    columns = ("model", "board", "kind", "date", "context", "published t/s/u", "fitted", "error", "left out")
    return Table("Fit to published single-model decode speeds (not ours)", columns, rows, notes, left=4)


def _kind(point: dict) -> str:
    parts = [point["precision"], *(f"{name} {fidelity}" for name, fidelity in point["fidelities"].items())]
    return ", ".join(parts + ["served"] * point["served"] + ["host does not wait"] * (not point["waits"]))


def _terms(forms: list[dict]) -> str:
    """Why the model has the terms it has."""
    (chosen,) = (form for form in forms if form["form"].startswith("chosen"))
    name = "group_left_out_rms_error"
    fewer, others = (
        [form[name] for form in forms if form is not chosen and (len(form["terms"]) < len(chosen["terms"])) == less]
        for less in (True, False)
    )
    return (
        f"{len(chosen['terms'])} terms, one of them computed: the error of figures left out with all of their model on "
        f"their board is {chosen[name]:.1%} (root of the mean square); with fewer terms {min(fewer):.1%} to "
        f"{max(fewer):.1%}, with others or more {min(others):.1%} to {max(others):.1%}."
    )


def _lengths(plan: Plan) -> Table:
    known = plan["acceptance"]["known_positions"]
    by_position = plan["acceptance"]["measured"] or plan["acceptance"]["text"] is not None
    rows = []
    for row in plan["table"]:
        k = row["k"]
        mark = "*" * (by_position and k > known) + " <" * (k == plan["best"]["k"])
        rows.append(
            (
                f"{k}{mark}",
                _banded(row, "draft_ms") if k else "",
                _banded(row, "verify_ms"),
                f"{row['between_ms']:.1f}",
                f"{row['expected_tokens']:.2f}",
                _banded(row, "tok_s"),
                _banded(row, "speedup", 2) if k else "1.00",
                _percent(row["break_even"]) if k else "",
            )
        )
    notes = [
        "In brackets: band. 'rest': the host, and joining and comparing ids. Break-even: equal acceptance from "
        "which on K tokens pay."
    ]
    if by_position and known < plan["table"][-1]["k"]:
        notes.append(f"* acceptance beyond position {known} was not measured: taken to go on as at the last ones.")
    columns = ("K", "draft ms", "verify ms", "rest ms", "tokens/round", "tok/s", "speed-up", "break-even")
    return Table("Predicted, by number of drafted tokens K", columns, rows, notes)


def _texts(texts: list[dict]) -> Table:
    rows = []
    for each in texts:
        text = TEXTS[each["text"]]
        lengths = ", ".join(f"{length:.2f} ({k})" for k, length in text.lengths.items())
        k = f"{each['k']}{'*' * (each['k'] > each['known_positions'])}"
        rates = _banded(each, "speedup", 2), _banded(each, "tok_s")
        rows.append((text.title, lengths, k, f"{each['expected_tokens']:.2f}", *rates))
    columns = ("text", "published: tokens (K)", "best K", "tokens/round", "speed-up", "tok/s")
    return Table("Predicted, by kind of text", columns, rows, _sources())


def _sources() -> list[str]:
    titles: dict[str, list[str]] = {}
    for text in TEXTS.values():
        titles.setdefault(text.source, []).append(text.title)
    return [
        "Published: tokens a round gave chains of K, on GPUs. "
        + "; ".join(f"{', '.join(names)}: {source}" for source, names in titles.items())
        + ".",
        "* longer than any chain that was measured: the chance of the last position goes on.",
    ]


def _levers(plan: Plan) -> Table:
    rows = []
    for lever in plan["levers"]:
        rows.append(
            (
                lever["name"] + " (does not fit)" * (not lever["fits"]),
                lever["assumption"],
                str(lever["k"]),
                _banded(lever, "speedup", 2),
                "" if lever["gain"] is None else _banded(lever, "gain", 2),
                _percent(lever["break_even"]) if lever["k"] else "",
            )
        )
    columns = ("change", "assumed", "best K", "speed-up", "tok/s over plan", "break-even")
    return Table("Predicted: what else would pay", columns, rows, list(plan["assumptions"]), left=2)


def _memory(plan: Plan) -> Table:
    memory = plan["memory"]
    fits = "It fits, by the check that is made before a board is opened."
    title = f"Memory of each chip, context {plan['settings']['context']}"
    return Table(title, memory["columns"], memory["rows"], [memory["refusal"] or fits], left=2)


# ---- out ------------------------------------------------------------------------------------------------------------


def markdown(plan: Plan) -> str:
    return _markdown(headline(plan), tables(plan))


def _markdown(head: str, tables: list[Table]) -> str:
    parts = [head.replace("\n", "  \n")]
    for table in tables:
        notes = "\n".join(f"- {note}" for note in table.notes)
        parts.append(f"### {table.title}\n\n{markdown_table(table.columns, table.rows, table.left)}{notes}")
    return "\n\n".join(parts) + "\n"


# ---- heads of all targets on all boards -----------------------------------------------------------------------------

SHOWN = ("mt-bench", "humaneval", "math500", "financeqa", "mt-bench-t1")  # in the overview; its JSON has all


def heads_tables(found: dict) -> list[Table]:
    """The overview: speed-ups by kind of text, and one-pass heads beside the chain of 8B's."""
    return [heads_table(found), one_pass_table(found)]


def heads_table(found: dict) -> Table:
    """Speed-ups with a head beside a draft of 1B."""
    settings = found["settings"]
    rows = []
    for entry in found["entries"]:
        texts = {each["text"]: each for each in entry["texts"]}
        model = entry["draft_model"]
        rows.append(
            (
                entry["target"],
                entry["board"] + " (does not fit)" * (not entry["fits"]),
                _number(entry["decode"]["tok_s"]),
                _best_of(model) if model else "",
                _best_of(entry["at_draft_acceptance"]),
                *(_best_of(texts[name]) for name in SHOWN),
            )
        )
    alike = f"{settings['draft_acceptance']:.0%}"
    heads = (f"head, {TEXTS[name].title}" for name in SHOWN)
    note = "Speed-up over our plain decoding, its band, and the best number K of drafted tokens."
    columns = ("target", "board", "plain tok/s", f"{settings['draft']} draft at {alike}", f"head at {alike}", *heads)
    return Table("Predicted: draft heads", columns, rows, [note, *_sources(), *found["assumptions"]], left=2)


def one_pass_table(found: dict, target: str = "8B") -> Table:
    """What a one-pass head must give to be worth it."""
    rows = []
    for entry in found["entries"]:
        for each in entry["one_pass"] if entry["target"] == target else ():
            cells = []
            for text in each["texts"]:
                chain = text["chain"]
                cells += [
                    f"{text['k']}: {text['speedup_if_alike']:.2f} / {chain['k']}: {chain['speedup']:.2f}",
                    f"{text['tokens_to_equal']:.2f} / {chain['tokens']:.2f}",
                ]
            ms = f"{each['texts'][0]['draft_ms']:.1f} / {each['texts'][0]['chain']['draft_ms']:.1f}"
            rows.append((entry["board"], f"{each['name']}, {each['layers']} layers", ms, *cells))
    compared = [TEXTS[text["text"]].title for text in found["entries"][0]["one_pass"][0]["texts"]]
    heads = (f"{title}: {what}" for title in compared for what in ("K: speed-up", "tokens to be equal"))
    notes = [
        "Each cell: the one-pass head / the EAGLE-3 chain at its best K. Speed-up: if the one-pass head were accepted "
        "as often at each position, which is assumed. Tokens to be equal: a round must give so many to be as fast as "
        "the chain, which gives the number behind the stroke.",
        f"Drafting: ms of a round at {compared[0]}'s K.",
    ]
    columns = ("board", "one-pass head", "drafting ms", *heads)
    return Table(f"Predicted: one-pass heads for {target}, beside the chain", columns, rows, notes, left=2)


def _best_of(entry: dict) -> str:
    if not entry["k"]:
        return "1.00 (0)"
    beyond = "*" * (entry["k"] > entry.get("known_positions", 0) > 1)
    return f"{_banded(entry, 'speedup', 2)}, K {entry['k']}{beyond}"


def _heads_headline(found: dict) -> str:
    settings = found["settings"]
    return (
        f"Draft heads on boards, context {settings['context']}: PREDICTED, nothing measured on a board. "
        f"Device programs and bytes: {found['counts']}."
    )


def heads_markdown(found: dict) -> str:
    """The overview as Markdown."""
    return _markdown(_heads_headline(found), heads_tables(found))


def attention_table(found: dict) -> Table:
    """Ways of reading the cache, a column for each board: cores, MB of the cache that a chip reads, ms of a forward."""
    entries = {(each["context"], each["way"], each["board"]): each for each in found["entries"]}
    boards, ways = (list(dict.fromkeys(each[key] for each in found["entries"])) for key in ("board", "way"))
    rows = []
    for context in dict.fromkeys(each["context"] for each in found["entries"]):
        for way in ways:
            cells = (entries[context, way, board] for board in boards)
            shown = [
                f"{each['cores']} / {each['kv_mb']:.0f} / {each['ms']:.1f} ({each['ms_band'][0]:.0f}-"
                f"{each['ms_band'][1]:.0f})"
                for each in cells
            ]
            rows.append((str(context), f"{entries[context, way, boards[0]]['rows']}", way, *shown))
    title = f"{found['model']}, {found['precision']}: cores / KV MB a chip / ms of a forward (band), predicted"
    return Table(title, ("context", "rows", "how the cache is read", *boards), rows, left=3)


def attention_markdown(found: dict) -> str:
    """The ways of reading the cache as Markdown."""
    table = attention_table(found)
    return f"{table.title}\n\n{markdown_table(table.columns, table.rows, left=table.left)}"


def show_heads(found: dict) -> None:
    """The overview on stdout; as of `show`."""
    _show(_heads_headline(found), heads_tables(found))


def show(plan: Plan) -> None:
    """On stdout, with rich. Raises BrokenPipeError when the reader has gone."""
    _show(headline(plan), tables(plan))


def _show(head: str, tables: list[Table]) -> None:
    import sys

    from rich import box

    from models.cli.console import Terminal

    console = Terminal(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(head, markup=False)
    for table in tables:
        look = {"title": table.title, "title_justify": "left", "box": box.SIMPLE, "collapse_padding": True}
        console.print()
        console.print(terminal_table(table.columns, table.rows, table.left, **look))
        for note in table.notes:
            console.print(note, markup=False)
