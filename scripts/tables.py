"""Write the tables of README.md and some documents anew from the files in docs/results.

    python scripts/tables.py            # after a benchmark, the demo or the planner has written its results there
    python scripts/tables.py --check    # change nothing, name the tables that are not what the results say

A table stands between `<!-- table NAME -->` and `<!-- /table -->`. What stands between them is replaced.
"""

import argparse
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.boards import BOARDS
from models.cli.command import Parser, run_command
from models.cli.tables import markdown_table
from models.errors import UserError
from scripts.planner import report as planned
from scripts.suites.peers import peer_lines, same_text
from scripts.suites.report import number, percent, ranged, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (
    "README.md",
    "docs/measured.md",
    "docs/batching.md",
    "docs/board.md",
    "docs/planner.md",
    "docs/reliability.md",
)
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
OUTPUT_FLAGS = ("--json", "--resume", "--markdown", "--png", "--html")  # with a file behind them
LEVERS = ("draft in bfp4", "early exit")  # of the planner, to be shown; of several alike the best
DRAFTERS = ("model", "prompt-lookup", "combined", "tree", "early-exit")
_LOST = "the drafter 'model' failed, and this text goes on without it: "  # of all warnings
ASSUMED = (0.6, 0.7, 0.8)  # acceptance of a drafted token, where random weights have none
Results = dict[str, Any]


def read(name: str) -> Results:
    """A results file."""
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): write it with the command beside its table") from error


def source(results: Results) -> str:
    """The command that wrote results, where and when, to stand above a table."""
    words = _without_files(results["command"])
    machine, versions = results["machine"], results["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"
    return f"`{shlex.join(words)}`; {where}, {results['date'][:10]}"


def _without_files(command: Sequence[str]) -> list[str]:
    """A command without the flags that say where results go."""
    words, given = [], iter(command)
    for word in given:
        if word in OUTPUT_FLAGS:
            next(given, None)
        elif word != "--quiet":
            words.append(word)
    return words


def median(values: Results | None) -> float | None:
    return values and values["median"]


# ---- measured on this kind of machine -------------------------------------------------------------------------------


def compare() -> str:
    """Speed-ups over plain decoding by kind of text."""
    results = read("compare")
    rows = []
    for name, each in results["categories"].items():
        auto = [each["ways"].get(f"{drafter} auto") for drafter in DRAFTERS]
        fixed = f"{times(each['best_fixed_speedup'])} ({each['best_fixed']})"
        over = times(median(each["auto_over_best_fixed"]))
        rows.append(
            (name, *(times(configuration and median(configuration["speedup"])) for configuration in auto), fixed, over)
        )
    mean_auto, mean_fixed = results["mean_auto_speedup"], results["mean_best_fixed_speedup"]
    head = ("auto with", *DRAFTERS, "best fixed length", "auto / best fixed")
    means = f"auto {times(mean_auto)}, best fixed {times(mean_fixed)}"
    text = f"{source(results)}; {results['repeats']} repetitions\n\n{markdown_table(head, rows)}"
    return (
        text + f"Mean of the categories with {results['auto_drafter']} (model where the draft is unrelated): {means}.\n"
    )


def configurations() -> str:
    """Every configuration over all kinds of text."""
    from scripts.suites.compare import OVERALL, overall_rows

    results = read("compare")
    table = markdown_table(OVERALL, overall_rows(results["overall"]))
    return f"{source(results)}; {results['repeats']} repetitions\n\n{table}"


def sweep() -> str:
    """Fixed lengths beside the formula."""
    results = read("sweep")
    rows = []
    for k, each in results["lengths"].items():
        deviation = median(each["deviation"])
        apart = number(None) if deviation is None else f"{deviation:+.0%}"
        abc = (number(median(each[key]), 2) for key in ("a", "c", "v"))
        rows.append((k, ranged(each["speedup"]), times(median(each["formula"])), apart, *abc))
    auto, best = results["auto"], results["best"]
    text = markdown_table(("K", "measured", "formula", "apart", "a", "c", "v"), rows)
    return f"{source(results)}\n\n{text}auto: {ranged(auto['speedup'])}; best fixed length: {best}.\n"


def verify_cost(name: str = "verify-cost") -> str:
    """Forwards by number of rows, of the published sizes."""
    results = read(name)
    rows_asked, lines = [str(n) for n in results["settings"]["rows"]], []
    for size, model in results["models"].items():
        for configuration, contexts in model["ms"].items():
            for context, cells in contexts.items():
                ms = [f"{cells[n]['median']:.0f} ({cells[n]['ratio']:.2f})" if n in cells else "" for n in rows_asked]
                lines.append((f"{size}, {configuration}", context, *ms))
    skipped = "".join(f" {each['model']} did not fit into memory." for each in results["skipped"])
    return (
        f"{source(results)}\n\n" + markdown_table(("ms (ratio to one row)", "context", *rows_asked), lines)
        + f"The machine reads {results['read_gb_s']:.1f} GB/s at best." + skipped + "\n"
    )  # fmt: skip


def pairs() -> str:
    """What the measured costs of random weights make of the real pairs, at assumed acceptance.

    A forward of n rows may be padded to more rows where that is faster, plain decoding and drafting included: else
    speculation would look better than it is.
    """
    from scripts.suites import formula

    results = read("verify-cost")
    context = str(min(results["settings"]["contexts"]))
    forms = {name: model["ms"].get("compiled") or model["ms"]["any rows"] for name, model in results["models"].items()}
    ms = {name: form[context] for name, form in forms.items()}
    cost = {
        name: {int(n): min(cells[m]["median"] for m in cells if int(m) >= int(n)) for n in cells}
        for name, cells in ms.items()
    }
    rows = []
    for target in ("3b", "8b"):
        if not {"1b", target} <= cost.keys():
            continue
        step = cost[target][1]
        c = cost["1b"][1] / step
        costs = {n - 1: cost[target][n] / step for n in cost[target] if 1 < n <= 8}
        cells = []
        for a in ASSUMED:
            best = max(costs, key=lambda k: formula.speedup(a, k, c, costs[k]))
            cells.append(f"{formula.speedup(a, best, c, costs[best]):.2f}x (K = {best})")
        least = min((b for k, v in costs.items() if (b := formula.break_even(k, c, v)) is not None), default=None)
        pair = f"1B -> {target.upper()}"
        rows.append((pair, number(step, 0), number(c, 2), number(costs.get(4), 2), percent(least), *cells))
    head = ("pair", "step ms", "c", "v at K = 4", "pays from", *(f"predicted at {percent(a)}" for a in ASSUMED))
    return f"{source(results)}, context {context}, bf16\n\n" + markdown_table(head, rows)


def peers(name: str = "peers") -> str:
    """Beside transformers, llama.cpp and OpenVINO."""
    results = read(name)
    rows = []
    for label, configuration in results["ways"].items():
        same = same_text(configuration, results)
        own = (
            f"{ranged(configuration['own_over_this'])} {configuration['counterpart']}"
            if configuration["counterpart"]
            else ""
        )
        rows.append((label, ranged(configuration["tok_s"], number), same, own))
    head = ("", "tok/s", "same text as own baseline", "own counterpart / this")
    others = "; ".join(peer_lines(results)) or f"transformers {results['versions']['transformers']}"
    return f"{source(results)}; {others}\n\n" + markdown_table(head, rows)


EXPECTED = {
    "own plain": "own baseline",
    "own best (combined, auto)": "own combined, auto",
    "transformers": "HF generate",
    "transformers, assisted": "HF assisted, defaults",
    "llama.cpp": "llama.cpp",
}


def expect() -> str:
    """The few figures that a newcomer asks for first."""
    results = read("peers")
    plain = median(results["ways"]["own baseline"]["tok_s"])
    rows = []
    for label, name in EXPECTED.items():
        rate = median(results["ways"][name]["tok_s"])
        rows.append((label, number(rate, 0), times(rate / plain)))
    head = ("embedded pair, 13.6 M parameters", "tok/s, prefill included", "of own plain")
    return f"{source(results)}\n\n" + markdown_table(head, rows)


def batch(name: str = "batch") -> str:
    """Plain and speculative decoding by number of texts at once."""
    from scripts.suites.batch import SEQUENCES, sequence_rows

    results = read(name)
    table = markdown_table(SEQUENCES, sequence_rows(results))
    forced = "**forced**; " if results["forced"] else ""
    return f"{source(results)}; {results['repeats']} repetitions; {forced}{results['drafter']}\n\n{table}"


def batch_arrivals(name: str = "batch") -> str:
    """The same for requests that arrive at random."""
    from scripts.suites.batch import ARRIVALS, arrival_rows

    results = read(name)
    table = markdown_table(ARRIVALS, arrival_rows(results))
    return f"{source(results)}; load 1 is {results['plain_requests_s']:.2f} requests a second\n\n{table}"


def bottleneck() -> str:
    """What bounds a forward, and from which acceptance drafting pays."""
    results = read("bottleneck")
    shares = ", ".join(f"{part} {percent(results[f'{part}_share'])}" for part in ("matmuls", "attention", "rest"))
    rows = [
        (k, number(each["c"], 2), number(each["v"], 2), percent(each["break_even"]), times(each["predicted_speedup"]))
        for k, each in results["lengths"].items()
    ]
    text = markdown_table(("K", "c", "v", "pays from acceptance", "by formula"), rows)
    forward, acceptance = results["ms"]["forward 1"]["median"], percent(results["acceptance"])
    bound = f"Bound by {results['bound']} ({shares} of {forward:.1f} ms); acceptance measured: {acceptance}."
    return f"{source(results)}\n\n{bound}\n\n{text}"


def mutants() -> str:
    """Faults that were put into the sources, and the test that each fell to."""
    from scripts.mutants import CAUGHT, MUTANTS

    results = read("mutants")
    tried = {each["name"]: each for each in results["mutants"]}
    rows, untried, caught = [], [], 0
    for mutant in MUTANTS:
        each = tried.get(mutant.name)
        if each is None or each["digest"] != mutant.digest:
            untried.append(f"`{mutant.name}`")
            continue
        caught += each["verdict"] == CAUGHT
        rows.append((f"`{mutant.name}`", mutant.breaks, _test(each["by"]), f"{each['seconds']:.0f}"))
    table = markdown_table(("mutant", "what is broken", "caught by", "s"), rows, left=3)
    left = f"\nNot tried as they are now:\n{textwrap.fill(', '.join(untried), 100)}.\n" if untried else ""
    return f"{source(results)}\n\n{table}{caught} of {len(rows)} were caught.\n{left}"


def _test(failed: Sequence[str]) -> str:
    """A test's name without its folder and parameters."""
    return f"`{failed[0].partition('[')[0].rpartition('/')[2].replace('.py::', ': ')}`" if failed else "none"


def refusals(kind: str, head: str, words: str = "") -> str:
    """What is answered to bad inputs of a kind; `words` begin all answers and are left out."""
    results = read("refusals")
    versions = results["versions"]
    rows = [(what, f"`{_shortened(answer.removeprefix(words))}`") for what, answer in results[kind].items()]
    where = f"Python {versions['python']}, torch {versions['torch']}, {results['date'][:10]}"
    return f"`{shlex.join(results['command'])}`; {where}\n\n{markdown_table((head, 'answer'), rows, left=2)}"


def _shortened(answer: str) -> str:
    """Of a character that is repeated many times the first three."""
    return re.sub(r"(.)\1{40,}", r"\1\1\1…", answer).replace("|", "\\|")


# ---- counted and predicted for boards -------------------------------------------------------------------------------


def op_counts() -> str:
    """Operations and bytes of a forward, from ttnn's graph."""
    results = read("op-counts")
    entries = {(each["model"], each["board"], each["rows"]): each for each in results["entries"]}
    rows = []
    for size, board in (("1B", "N150"), ("3B", "N150"), *(("8B", board) for board in BOARDS)):
        one, five = entries[size, board, 1], entries[size, board, 5]
        reduces = " + 2 all-reduce" if one["layer"]["collectives"] else ""
        mb = (f"{each['dram_bytes'] / 1e6:.0f}" for each in (one, five))
        rows.append(
            (
                f"{size} {board}",
                f"{one['layer']['ops']}{reduces}",
                " / ".join(mb),
                f"{one['bound_ms']:.1f} / {five['bound_ms']:.1f}",
            )
        )
    head = ("", "ops a layer, 1 to 16 rows", "MB read and written, 1 / 5 rows", "ms at published bandwidth, 1 / 5 rows")
    where = f"`scripts/op_counts.py`; ttnn {results['versions']['ttnn']}, {results['date'][:10]}"
    return f"{where}\n\n{markdown_table(head, rows)}"


def users() -> str:
    """Operations and bytes of forwards that users share, on one chip and on several."""
    results = read("op-counts-users")
    boards = list(dict.fromkeys(each["board"] for each in results["entries"]))
    rows = []
    for shape in dict.fromkeys(each["users_by_rows"] for each in results["entries"]):
        entries = [each for each in results["entries"] if each["users_by_rows"] == shape]
        columns = (
            [str(each["layer"]["ops"]) for each in entries],
            [f"{each['forward']['kv_cache'] / 1e6:.0f}" for each in entries],
            [f"{each['dram_bytes'] / 1e6:.0f}" for each in entries],
            [f"{each['bound_ms']:.1f}" for each in entries],
        )
        rows.append((shape, *(" / ".join(column) for column in columns)))
    heads = ("ops a layer", "KV MB", "all MB", "ms at published bandwidth")
    settings, where = results["settings"], " / ".join(boards)
    said = (
        f"`{shlex.join(_without_files(results['command']))}`; ttnn {results['versions']['ttnn']}, "
        f"{results['date'][:10]}; precision `{settings['precision']}`, position {settings['position']}, per chip. "
        "The last two columns are computed from bytes, not measured."
    )
    return f"{said}\n\n{markdown_table(('users x rows', *(f'{head}, {where}' for head in heads)), rows)}"


def cpu_agreement() -> str:
    """Choices of the CPU beside the exact model's, by data type."""
    from scripts.agreement import table

    results = read("agreement-cpu")
    where = f"{results['machine']['cpu']}, torch {results['versions']['torch']}, {results['date'][:10]}"
    words = _without_files(results["command"])
    return f"`python {shlex.join(words)}`; {where}\n\n{markdown_table(*table(results['targets']))}"


def agreement() -> str:
    """Choices of a board beside the exact model's, by precision."""
    from scripts.agreement import table

    results = read("agreement-N150")
    board, mock, ttnn = (results["machine"][key] for key in ("board", "mock", "ttnn"))
    words = [*(("-m", "models.board_mock", board) if mock else ()), *_without_files(results["command"])]
    where = f"{'mock of an ' if mock else ''}{board}, ttnn {ttnn}, {results['date'][:10]}"
    return f"`python {shlex.join(words)}`; {where}\n\n{markdown_table(*table(results['targets']))}"


def plan(target: str) -> str:
    """Predicted speed-ups of a published pair on boards."""
    rows = []
    for board in BOARDS:
        results = read(f"plan-{target}-1B-{board}")
        best = results["best"]
        at = next(row for row in results["table"] if row["k"] == best["k"])
        cells = [_banded(best["speedup"], best["speedup_band"], 2), _banded(best["tok_s"], best["tok_s_band"], 1)]
        others = [_lever(results["levers"], name) for name in LEVERS]
        plain = f"{results['decode']['tok_s']:.1f}"
        rows.append((board, plain, str(best["k"]), *cells, percent(at["break_even"]), *others, _published(results)))
    assumed = f"acceptance {results['acceptance']['chances'][0]:g}, context {results['settings']['context']}"
    head = (
        *(f"{target} + 1B: **predicted**", "plain", "best K", "speed-up (band)", "tok/s (band)", "break-even"),
        *(*LEVERS, "best plain published; of it"),
    )
    return (
        f"`scripts/plan.py --target {target} --draft 1B --board BOARD`; {assumed}, {results['date'][:10]}\n\n"
        + markdown_table(head, rows)
    )


def _lever(levers: Sequence[Results], name: str) -> str:
    best = max((each for each in levers if each["name"].startswith(name)), key=lambda each: each["speedup"])
    detail = best["name"].removeprefix(name)
    return _banded(best["speedup"], best["speedup_band"], 2) + f",{detail}" * bool(detail)


def plan_heads() -> str:
    """Predicted speed-ups with draft heads, by kind of text."""
    return _planned(planned.heads_table)


def plan_one_pass() -> str:
    """Predicted for heads that draft all tokens in one pass."""
    return _planned(planned.one_pass_table)


def plan_attention() -> str:
    """Predicted forwards by how the cache of a text is read, on one chip of each kind and on several."""
    results = read("plan-attention")
    shown = [each for each in results["entries"] if each["board"] in ("N150", "P150", "T3K")]
    table = planned.attention_table(results | {"entries": shown})
    said = f"`{shlex.join(_without_files(results['command']))}`; {results['date'][:10]}; {table.title}"
    return f"{said}\n\n{markdown_table(table.columns, table.rows, table.left)}"


def plan_texts() -> str:
    """Published acceptance of heads, and what is made of it."""
    rows = []
    for text in read("plan-heads")["acceptance"]:
        lengths = ", ".join(f"{length:.2f} ({k})" for k, length in text["mean_acceptance_length"].items())
        chances = " ".join(f".{100 * chance:.0f}" for chance in text["chances"])
        rows.append((text["title"], text["kind"], lengths, chances))
    return markdown_table(("text", "kind", "published: tokens a round (K)", "chance by position"), rows, left=2)


def _planned(make: Callable[[Results], planned.Table]) -> str:
    results = read("plan-heads")
    table = make(results)
    where = f"`scripts/plan.py --heads`; context {results['settings']['context']}, {results['date'][:10]}"
    return f"{where}; all **predicted**\n\n{markdown_table(table.columns, table.rows, table.left)}"


def plan_fit() -> str:
    """How well the planner's model explains published speeds."""
    fit = read(f"plan-8B-1B-{next(iter(BOARDS))}")["fit"]
    by_year = fit["leave_one_out_median_error_by_year"]
    years = ", ".join(f"{year}: {error:.1%}" for year, error in by_year.items())
    measured = len(fit["points"]) + sum(point["possible"] for point in fit["excluded"])
    rows = [
        (f"fit to {len(fit['points'])} figures", f"{fit['median_error']:.1%}"),
        (f"each figure left out ({years})", f"{fit['leave_one_out_median_error']:.1%}"),
        (
            f"all figures of a model on a board left out (four in five within {fit['spread']:.0%})",
            f"{fit['group_left_out_median_error']:.1%}",
        ),
        (f"all {measured} that were measured, fitted or not", f"{fit['all_measured_median_error']:.1%}"),
    ]
    return markdown_table(("of published decode speeds", "median error"), rows)


def _published(results: Results) -> str:
    """The best plain speed that has been published, and how many times as fast what is predicted would be."""
    known = results["published_plain"]
    if known is None:
        return "none"
    ratio = results["best"]["tok_s"] / known["tok_s_user"]
    return f"{known['tok_s_user']:.1f} ({known['date'][:7]}); {ratio:.2f}x"


def _banded(value: float, band: Sequence[float], digits: int) -> str:
    return f"{value:.{digits}f} ({band[0]:.{digits}f}-{band[1]:.{digits}f})"


TABLES: dict[str, Callable[[], str]] = {
    "compare": compare,
    "configurations": configurations,
    "sweep": sweep,
    "verify-cost": verify_cost,
    "pairs": pairs,
    "peers": peers,
    "batch": batch,
    "batch-arrivals": batch_arrivals,
    "peers-smollm2": lambda: peers("peers-smollm2"),
    "peers-1b": lambda: peers("peers-1b"),
    "verify-cost-1b": lambda: verify_cost("verify-cost-1b"),
    "verify-cost-1b-int8": lambda: verify_cost("verify-cost-1b-int8"),
    "expect": expect,
    "bottleneck": bottleneck,
    "mutants": mutants,
    "refused-inputs": lambda: refusals("inputs", "on the demo's command line", "error: "),
    "refused-requests": lambda: refusals("requests", "in a request"),
    "faulty-drafters": lambda: refusals("faults", "what the drafter does", _LOST),
    "op-counts": op_counts,
    "op-counts-users": users,
    "plan-fit": plan_fit,
    "agreement": agreement,
    "agreement-cpu": cpu_agreement,
    "plan-8B": lambda: plan("8B"),
    "plan-3B": lambda: plan("3B"),
    "plan-heads": plan_heads,
    "plan-one-pass": plan_one_pass,
    "plan-texts": plan_texts,
    "plan-attention": plan_attention,
}


def filled(text: str) -> str:
    """The document with every table as the results have it. Raises UserError for a name that has no table."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name}: choose from {', '.join(TABLES)}")
        return begin + TABLES[name]().rstrip("\n") + "\n" + end

    return MARKED.sub(fill, text)


def stale(old: str, new: str) -> list[str]:
    """Names of the tables that differ."""
    return [a[2] for a, b in zip(MARKED.finditer(old), MARKED.finditer(new), strict=True) if a[0] != b[0]]


def command(argv: Sequence[str] | None = None) -> int:
    """Fill in all documents; with --check only compare, exit code 1 if one is not up to date."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is not up to date")
    options = parser.parse_args(argv)
    code = 0
    for name in DOCUMENTS:
        old = (ROOT / name).read_text(encoding="utf-8")
        new = filled(old)
        changed = stale(old, new)
        if changed and options.check:
            print(f"{name}: not what docs/results says: {', '.join(changed)}; run scripts/tables.py", file=sys.stderr)
            code = 1
        elif changed:
            (ROOT / name).write_text(new, encoding="utf-8")
            print(f"{name}: {', '.join(changed)}")
    return code


if __name__ == "__main__":
    sys.exit(run_command(command))
