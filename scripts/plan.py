"""Would speculative decoding pay on a Tenstorrent board? Predicted, with bands, without the board.

    python scripts/plan.py --target 8B --draft 1B --board N150 --acceptance 0.8
    python scripts/plan.py --target 8B --draft 1B --board T3K --acceptance-from run.json --markdown
    python scripts/plan.py --target 8B --draft head --board N150 --text humaneval      # an EAGLE-3 draft head
    python scripts/plan.py --heads              # heads of all targets on all boards, by kind of text
    python scripts/plan.py --attention          # ways of reading the cache of one text for 8 rows, on all boards
    python scripts/plan.py --capture            # count programs and bytes again, on mock boards (needs ttnn)

The time of a step is computed from the DRAM bytes and layers of our own forwards, counted in ttnn's graph on mock
boards, with coefficients fitted to published speeds of other implementations: the bands say how far predictions differ
between models of step time that explain those alike. Nothing here is measured on a board.
What is predicted is compared with the best plain decoding that anybody has published for the model on that board.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence

import numpy as np

from models.board_mock import cluster
from models.boards import BOARDS, Board, board_named
from models.cli.command import Parser, run_command
from models.errors import UserError
from models.llama.config import named_config
from models.speculative.formulas import break_even
from models.ttnn_llama.shapes import MAX_ATTENTION_CORES
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import PRECISION, PRECISIONS, default_precision, precision_named
from scripts.planner import attention, describe, heads, overview, report
from scripts.planner import counts as counting
from scripts.planner.counts import SIZES, Counts
from scripts.planner.heads import HEAD
from scripts.planner.levers import LOWEST, levers, memory_of
from scripts.planner.predict import Family, Figure, Pair, Times
from scripts.planner.published import best_plain
from scripts.planner.speculation import (
    MAX_DRAFT_LENGTH,
    Acceptance,
    Round,
    best,
    chain,
    speedup,
)
from scripts.planner.texts import CHAT, TEXTS, text_named

DEFAULT_ACCEPTANCE = 0.8
DEFAULT_CONTEXT = 1024
LONGEST_CONTEXT = 131072


# ---- what is asked --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ", ".join(SIZES)
    parser.add_argument("--target", help=f"one of {sizes}")
    parser.add_argument("--draft", help=f"one of {sizes}, not larger than the target, or {HEAD}: an EAGLE-3 draft head")
    parser.add_argument("--board", help=f"one of {', '.join(BOARDS)}")
    parser.add_argument(
        "--acceptance",
        type=float,
        help=f"chance of a drafted token, 0 to 1 (default: {DEFAULT_ACCEPTANCE}; of a head: --text)",
    )
    parser.add_argument("--acceptance-from", metavar="RUN.json", help="take it from a run of the demo, by position")
    parser.add_argument(
        "--text", metavar="KIND", help=f"of a head: as published for {', '.join(TEXTS)} (default: {CHAT})"
    )
    parser.add_argument(
        "--context", type=int, default=DEFAULT_CONTEXT, help="tokens in the KV cache (default: %(default)s)"
    )
    default = f"{PRECISION}, for a target of 1B {default_precision(named_config('1B').hidden_size)}"
    parser.add_argument("--precision", help=f"{', '.join(PRECISIONS)} (default: {default})")
    parser.add_argument("--draft-precision", help=f"the draft's (default: --precision if given, else {PRECISION})")
    parser.add_argument(
        "--attention-cores", type=int, default=1, metavar="N", help="cores for a row and KV head (default: %(default)s)"
    )
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="K", help=f"plan for K, 0 to {MAX_DRAFT_LENGTH} (default: the best)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--heads", action="store_true", help="predict draft heads for all targets and boards, and one-pass heads"
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="predict ways for 8 rows of one text to read its cache, by board",
    )
    parser.add_argument("--recount", action="store_true", help="count this pair on this board now; needs ttnn")
    parser.add_argument(
        "--capture", action="store_true", help=f"count everything and write {counting.SHIPPED.name}; needs ttnn"
    )
    options = parser.parse_args(argv)
    if options.heads or options.attention:
        plans = "--heads plans all targets, boards and texts" if options.heads else "--attention plans all boards"
        refused = ("target", "draft", "board", "acceptance", "acceptance_from", "text", "num_draft_tokens", "recount")
        values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in refused}
        given = [name for name, value in values.items() if value is not None and value is not False]
        given += [name for name, value in (("--heads", options.heads), ("--attention", options.attention)) if value][1:]
        if given or options.capture:
            parser.error(f"{plans}: leave out {', '.join(given) or '--capture'}")
    elif not options.capture:
        missing = [f"--{name}" for name in ("target", "draft", "board") if getattr(options, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    return options


def check(options: argparse.Namespace) -> Acceptance:
    """UserError for what makes no sense; completes the options."""
    options.target = size_named(options.target)
    headed = options.draft.strip().lower() == HEAD
    options.draft = HEAD if headed else size_named(options.draft)
    board_named(options.board)
    if not headed and SIZES.index(options.draft) > SIZES.index(options.target):
        raise UserError(f"the draft {options.draft} is larger than the target {options.target}: swap them")
    check_settings(options, options.target)
    k = options.num_draft_tokens
    if k is not None and not 0 <= k <= MAX_DRAFT_LENGTH:
        raise UserError(f"--num-draft-tokens {k} is outside 0..{MAX_DRAFT_LENGTH}: 16 rows are what is planned for")
    return _acceptance(options)


def check_settings(options: argparse.Namespace, target: str) -> None:
    """UserError for a precision, a context or cores that make no sense; completes the precisions for a target."""
    options.draft_precision = precision_named(options.draft_precision or options.precision or PRECISION).name
    chosen = options.precision or default_precision(named_config(target).hidden_size)
    options.precision = precision_named(chosen).name
    if not 1 <= options.context <= LONGEST_CONTEXT:
        raise UserError(f"--context {options.context} is outside 1..{LONGEST_CONTEXT}, what Llama 3.x is trained for")
    if not 1 <= options.attention_cores <= MAX_ATTENTION_CORES:
        raise UserError(f"--attention-cores {options.attention_cores} is outside 1..{MAX_ATTENTION_CORES}")


def _acceptance(options: argparse.Namespace) -> Acceptance:
    given = [name for name in ("acceptance", "acceptance_from", "text") if getattr(options, name) is not None]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise UserError(f"{first} and {second} exclude each other: give one")
    if options.text is not None and options.draft != HEAD:
        raise UserError(f"--text {options.text} is published acceptance of draft heads: use it with --draft {HEAD}")
    if options.acceptance_from is not None:
        return Acceptance.of_run(options.acceptance_from)
    if options.acceptance is None and options.draft == HEAD:
        options.text = text_named(options.text or CHAT).name
        return TEXTS[options.text].acceptance()
    return Acceptance.equal(DEFAULT_ACCEPTANCE if options.acceptance is None else options.acceptance)


def size_named(name: str) -> str:
    """The size, such as 8B, that a published model's name stands for. Raises UserError for any other."""
    config = named_config(name)
    return next(size for size in SIZES if named_config(size) == config)


# ---- the plan -------------------------------------------------------------------------------------------------------


@functools.cache
def fitted() -> tuple[Counts, Family, dict]:
    """The shipped counts, the models of step time fitted with them, and how well they fit."""
    shipped = Counts.shipped()
    family = Family.of(shipped)
    return shipped, family, describe.fitted(shipped, family)


def build(options: argparse.Namespace, acceptance: Acceptance, counts: Counts, family: Family, fit: dict) -> dict:
    """The plan as JSON has it, by ``counts`` of the pair on its board."""
    board = board_named(options.board)
    places = counting.places(board, False, board.chips)
    pair = Pair(
        *(options.target, options.draft, options.precision, options.draft_precision, places, options.context),
        attention_cores=options.attention_cores,
    )
    times = heads.times_of(family, counts, board, pair)
    lengths = range(MAX_DRAFT_LENGTH + 1)
    allowed = lengths if options.num_draft_tokens is None else [options.num_draft_tokens]
    rounds = [chain(times, acceptance, k) for k in lengths]
    chosen = best(rounds.__getitem__, allowed)
    decode = times.decode()
    plain = best_plain(options.target, board.name)
    return {
        "kind": "predicted",
        "settings": {
            "target": options.target,
            "draft": options.draft,
            "board": board.name,
            "context": options.context,
            "precision": options.precision,
            "draft_precision": options.draft_precision,
            "attention_cores": options.attention_cores,
            "num_draft_tokens": options.num_draft_tokens,
        },
        "acceptance": {
            "source": acceptance.source,
            "measured": options.acceptance_from is not None,
            "text": options.text,
            "known_positions": acceptance.known,
            "chances": acceptance.chances(MAX_DRAFT_LENGTH),
        },
        "counts": counts.source + "; of the head from its design, not recorded" * (pair.draft == HEAD),
        "best": {"k": chosen.k, **_figure("speedup", speedup(times, chosen)), **_rate(family, chosen)},
        "decode": {**_figure("ms", family.figure(decode)), **_rate(family, rounds[0])},
        "published_plain": dataclasses.asdict(plain) if plain else None,
        "table": [_row(times, round, decode) for round in rounds],
        "levers": [
            {
                "name": lever.name,
                "assumption": lever.assumption,
                "k": lever.k,
                **_figure("tok_s", lever.tok_s),
                **_figure("speedup", lever.speedup),
                **(_figure("gain", lever.gain) if lever.gain else {"gain": None, "gain_band": None}),
                "break_even": lever.break_even,
                "fits": lever.fits,
            }
            for lever in levers(times, acceptance, list(allowed), chosen)
        ],
        "texts": overview.by_text(times) if pair.draft == HEAD else None,
        "memory": _memory(board, pair, chosen.k),
        "fit": fit,
        "assumptions": [*describe.ASSUMPTIONS, *(heads.ASSUMPTIONS if pair.draft == HEAD else [])],
    }


def _figure(name: str, figure: Figure) -> dict:
    return {name: figure.value, f"{name}_band": [figure.low, figure.high]}


def _rate(family: Family, round: Round) -> dict:
    return _figure("tok_s", family.figure(round.tok_s))


def _row(times: Times, round: Round, decode: np.ndarray) -> dict:
    family = times.family
    return {
        "k": round.k,
        **_figure("draft_ms", family.figure(round.drafting)),
        **_figure("verify_ms", family.figure(round.verifying)),
        "between_ms": float(round.between[0]),
        "round_ms": float(round.ms()[0]),
        "expected_tokens": round.tokens,
        **_rate(family, round),
        **_figure("speedup", speedup(times, round)),
        "break_even": break_even(round.k, float(round.ms()[0] / decode[0])),
    }


def _memory(board: Board, pair: Pair, k: int) -> dict:
    found = memory_of(board, pair, k)
    return {
        "fits": found.refusal is None,
        "refusal": found.refusal,
        "bytes_per_chip": {name: plan.total for name, plan in found.plans.items()},
        "chip_bytes": board.dram_bytes,
        "columns": list(memory.COLUMNS),
        "rows": [list(row) for row in memory.rows(found.plans)],
    }


# ---- counts ---------------------------------------------------------------------------------------------------------


def capture_all() -> int:
    """Write docs/results/plan-counts.json anew."""
    from scripts.planner import capture

    _needs_ttnn()
    found = capture.capture(progress=lambda text: print(text, file=sys.stderr))
    counting.write(found, counting.SHIPPED)
    print(f"wrote {counting.SHIPPED.name}: {len(found['forwards'])} forwards")
    return 0


def recounted(options: argparse.Namespace) -> Counts:
    """Counts of this pair on this board, captured now."""
    from scripts.planner import capture

    _needs_ttnn()
    found = capture.capture(
        [options.board],
        list(dict.fromkeys(size for size in (options.target, options.draft) if size != HEAD)),
        list(dict.fromkeys((options.precision, options.draft_precision, LOWEST))),
        progress=lambda text: print(text, file=sys.stderr),
    )
    return Counts(found, f"captured now with ttnn {found['ttnn']}")


def _needs_ttnn() -> None:
    if not cluster.is_installed():
        raise UserError("counting needs ttnn (CPython 3.12 or 3.10 on x86-64 Linux): plan with the shipped counts")


def circumstances(arguments: Sequence[str]) -> dict:
    """What a results file says of its making."""
    from models.cli.environment import date, versions

    return {"date": date(), "versions": versions(), "command": ["scripts/plan.py", *arguments]}


def show_heads(options: argparse.Namespace, arguments: Sequence[str], counts: Counts, family: Family) -> int:
    """Heads of all targets on all boards."""
    from models.cli.environment import write_json

    def pair(target: str, draft: str, board: Board) -> Pair:
        own = argparse.Namespace(**vars(options))
        check_settings(own, target)
        places = counting.places(board, False, board.chips)
        settings = target, draft, own.precision, own.draft_precision, places, own.context
        return Pair(*settings, attention_cores=own.attention_cores)

    found = overview.heads(counts, family, pair, DEFAULT_ACCEPTANCE)
    if options.json:
        write_json(options.json, found | circumstances(arguments))
    if options.markdown:
        print(report.heads_markdown(found), end="")
    else:
        report.show_heads(found)
    return 0


def show_attention(options: argparse.Namespace, arguments: Sequence[str], counts: Counts, family: Family) -> int:
    """Ways of reading the cache on all boards."""
    from models.cli.environment import write_json

    found = attention.predicted(counts, family)
    if options.json:
        write_json(options.json, found | circumstances(arguments))
    print(report.attention_markdown(found), end="")
    return 0


def command(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parse(arguments)
    if options.capture:
        return capture_all()
    if options.heads:
        for size in SIZES:
            check_settings(argparse.Namespace(**vars(options)), size)
    elif not options.attention:
        acceptance = check(options)
    from models.cli.environment import check_outputs, write_json

    if options.json:
        check_outputs({"--json": options.json}, {"--acceptance-from": options.acceptance_from})
    shipped, family, fit = fitted()
    if options.heads:
        return show_heads(options, arguments, shipped, family)
    if options.attention:
        return show_attention(options, arguments, shipped, family)
    plan = build(options, acceptance, recounted(options) if options.recount else shipped, family, fit)
    if options.json:
        write_json(options.json, plan | circumstances(arguments))
    if options.markdown:
        print(report.markdown(plan), end="")
    else:
        report.show(plan)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run_command(lambda: command(None)))
