"""Replay a recorded run of the demo against plain decoding, and say whether its texts are the target's own.

    python demo/simple_text_demo.py --json run.json
    python scripts/audit.py run.json

A greedy text is identical, or its first divergence is shown with the target's top-2 margin in fp32 and whether it is a
near-tie of the precision. Sampled texts are tested together: every token against the target's distribution at its
place, with p-values corrected for the number of tests. docs/reliability.md says how.

Exit code: 0 identical, consistent, or near-ties that are named; 1 different; 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.cli.command import Parser, run_command
from models.cli.environment import check_outputs, date, machine, versions, write_json
from models.errors import UserError
from models.options import CHECKPOINTS
from models.speculative.sampling import SamplingParams

PATHS = ("speculative", "baseline")
# Settings of a run that say how the target computes.
SETTINGS = (
    *("device", "dtype", "max_seq_len", "drafter", "num_draft_tokens", "tree_nodes", "row_invariant", "verification"),
    *("precision", "attention_cores", "prefill", "trace"),
)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What an audit needs of a run: options of the target, how texts were written, and the texts."""

    options: dict[str, Any]
    sampling: SamplingParams
    stops: bool  # whether stop tokens end texts
    texts: list[dict[str, Any]]  # number, path, prompt ids, token ids, finish reason


def read_run(name: str, target: str | None, path: str | None) -> Recorded:
    """A run's file. target: takes the place of the one named there. path: only that one of PATHS.

    Raises UserError for a file that is none, or that holds no text.
    """
    try:
        run = json.loads(Path(name).read_text(encoding="utf-8"))
        settings = run["settings"]
        texts = [
            {
                "number": int(row["number"]),
                "path": each,
                "prompt": [int(id) for id in row["prompt_ids"]],
                "tokens": [int(id) for id in row[each]["token_ids"]],
                "finish_reason": str(row[each]["finish_reason"]),
            }
            for row in run["prompts"]
            for each in PATHS
            if row[each] is not None and each in (path or each)
        ]
        sampling = SamplingParams(*(settings[key] for key in ("temperature", "top_k", "top_p", "seed")))
        options = _options(settings, target)
        stops = not settings["random_prompts"]
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{name} is no run of the demo ({what}): write it with demo/simple_text_demo.py --json"
        ) from None
    if not texts:
        raise UserError(f"{name} holds no complete text{f' of the {path} path' if path else ''}: nothing to audit")
    return Recorded(options, sampling, stops, texts)


def _options(settings: Mapping[str, Any], target: str | None) -> dict[str, Any]:
    options = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    rows = settings.get("fixed_rows")
    if rows:  # what padding cost when the run was made decided it: not measured again
        options["free_rows"] = tuple(range(1, rows + 1))
    elif settings.get("rows_alike"):
        options["rows_alike"] = True
    if settings.get("device") == "cpu":  # as it was, not as this machine would choose
        options["compiled"] = bool(settings.get("compiled"))
    named = CHECKPOINTS.parent.parent / settings["target"]
    shipped = named.is_relative_to(CHECKPOINTS) and named.is_dir()
    return options | {"target": target or (str(named) if shipped else settings["target"]), "speculative": False}


def audit(recorded: Recorded, alpha: float) -> tuple[Any, list[dict[str, Any]], Any]:
    """(the report, its texts as they go to a file, the machine)."""
    from models.audit import Auditor, report
    from models.cli import interrupts
    from models.llm import LLM

    options = recorded.options
    with LLM.load(**options) as llm:
        auditor, found = Auditor(llm), []
        for text in recorded.texts:
            interrupts.check()
            prompt, tokens = text["prompt"], text["tokens"]
            if recorded.sampling.greedy:
                stops = llm.stop_ids if recorded.stops else ()
                found.append(auditor.greedy(prompt, tokens, finish_reason=text["finish_reason"], stop_ids=list(stops)))
            else:
                found.append(auditor.sampled(prompt, tokens, recorded.sampling))
        board = llm.board and llm.board.board
        where = machine(llm.options.device, board, llm.board is None or llm.board.timed)
    told = [
        {"number": text["number"], "path": text["path"], "verdict": each.verdict, **dataclasses.asdict(each)}
        for text, each in zip(recorded.texts, found, strict=True)
    ]
    return report(found, alpha), told, where


def command(argv: Sequence[str] | None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN.json", help="a file of the demo's --json")
    parser.add_argument("--target", metavar="PATH|ID", help="where the target is now (default: as the run names it)")
    parser.add_argument("--path", choices=PATHS, help="only these texts (default: both)")
    parser.add_argument(
        "--alpha", type=float, default=0.001, metavar="P", help="of sampled runs: chance of a false alarm (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was found to this file")
    options = parser.parse_args(argv)
    if not 0 < options.alpha < 1:
        raise UserError(f"--alpha {options.alpha}: give a number between 0 and 1")
    check_outputs({"--json": options.json}, {"RUN.json": options.run})
    recorded = read_run(options.run, options.target, options.path)
    found, texts, where = audit(recorded, options.alpha)
    for line in found.lines():
        print(line)
    if options.json:
        tests = [dataclasses.asdict(test) for test in found.tests]
        circumstances = {"date": date(), "versions": versions(), "machine": where, "command": sys.argv}
        results = {"verdict": found.verdict, "alpha": options.alpha, "tests": tests, "texts": texts}
        write_json(options.json, circumstances | {"run": options.run} | results)
    return found.exit_code


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
