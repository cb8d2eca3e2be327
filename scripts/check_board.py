"""Would a model, or a pair of them, run on a Tenstorrent board? Answered without the board and without weights.

    python scripts/check_board.py --model 8B --draft 1B --mesh T3K --max-seq-len 8192
    python scripts/check_board.py --model path/to/checkpoint --mesh N150

Runs every op of the whole model on ttnn's mock of the board, at full depth, with tensors that have a shape and an
address but no values. ttnn checks each call as it would on the board: arguments, shapes, DRAM and L1 memory, program
configurations. That proves that the calls are legal and that memory suffices; it says nothing about speed, about what
kernels compute, or about hangs. Of a checkpoint only config.json is read. Exit code: 0 all legal, 1 not, 2 bad input.
"""

import argparse
import sys
from collections.abc import Sequence

from models.board_mock import cluster
from models.boards import BOARDS, PLACEMENTS
from models.cli.command import Parser, run_command
from models.errors import UserError
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import PRECISION, PRECISIONS
from scripts.board_check.answer import NOTE, line, show_plans, show_usage, ttnn_silenced, write_results
from scripts.board_check.checks import Check, Usage, run_checks
from scripts.board_check.question import DEFAULT_CONTEXT, memory_plans, question


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = "checkpoint directory, hub id, or 1B, 3B, 8B"
    parser.add_argument("--model", required=True, help=f"the target: {model}")
    parser.add_argument("--draft", help=f"the draft: {model} (default: none)")
    parser.add_argument(
        "--draft-head", help="a draft head: its directory, or 1B, 3B, 8B for the shape of published ones"
    )
    meshes = f"one of {', '.join(BOARDS)}; {', '.join(cluster.VARIANTS)}: a P150 with other grids of cores"
    parser.add_argument("--mesh", required=True, help=meshes)
    parser.add_argument("--max-seq-len", type=int, help=f"context in tokens (default: {DEFAULT_CONTEXT})")
    parser.add_argument("--precision", help=f"{', '.join(PRECISIONS)} (default: the demo's, by the target's size)")
    parser.add_argument("--draft-precision", help=f"the draft's (default: --precision, if given, else {PRECISION})")
    parser.add_argument("--draft-placement", default="shared", choices=PLACEMENTS, help="(default: %(default)s)")
    parser.add_argument("--num-draft-tokens", type=int, default=4, help="K (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="positions in one forward (default: 1 2 5 8 32, as far as they fit)"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        help="prompt lengths (default: 1 127 128 129 1000 as far as they fit, and the context)",
    )
    parser.add_argument("--slots", type=int, default=1, help="texts at once, each of that context (default: 1)")
    parser.add_argument(
        "--pool-size", type=int, metavar="N", help="tokens of all texts together (default: --slots times the context)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    return parser.parse_args(argv)


def command(argv: Sequence[str] | None) -> int:
    options = parse(argv)
    if options.json:
        from models.cli.environment import check_writable

        check_writable(options.json)
    asked = question(options)
    models = " + ".join(
        name for name in (options.model, options.draft, options.draft_head and f"{options.draft_head} head") if name
    )
    subject = f"{models} on {options.mesh}, context {asked.max_seq_len}"
    if asked.slots > 1:
        subject += f", {asked.slots} slots" + (f" of {asked.pool} tokens together" if asked.pool else "")
    checks: list[Check] = []
    usages: dict[str, Usage] = {}
    cluster.activate(options.mesh)
    with ttnn_silenced() as console:
        plans = memory_plans(asked)
        show_plans(console, asked.board, plans)
        try:
            memory.check_fit(asked.board, plans, asked.placement)
        except UserError as refusal:
            verdict = f"NOT LEGAL: {subject}: {refusal}"
        else:
            for result in run_checks(asked, plans["target"].traces):
                if isinstance(result, Check):
                    checks.append(result)
                    console.print(line(result), markup=False, soft_wrap=True)
                else:
                    usages = result
            show_usage(console, usages, checks)
            failed = sum(not check.legal for check in checks)
            counted = f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks"
            verdict = f"{'NOT LEGAL' if failed else 'LEGAL'}: {subject}: {counted}"
        console.print(verdict, markup=False, soft_wrap=True)
        console.print(NOTE, soft_wrap=True)
    if options.json:
        write_results(options, asked, plans, checks, usages, verdict)
    return 0 if verdict.startswith("LEGAL") else 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
