"""How often is the token chosen that the exact model chooses? Top-1 and top-5, for each precision.

    python scripts/agreement.py --target tiny smollm2                          # on the board of this machine
    python -m models.board_mock N150 scripts/agreement.py --json FILE          # without one
    python scripts/agreement.py --device cpu --target smollm2                  # bf16, int8, and transformers

A model and the exact one, torch's in fp32, read the same text, and at every position their choices of the next token
are compared: top-1 is the share of positions where the choice is the exact model's, top-5 where it is one of its five
likeliest. Board and CPU read a text by forwards of some rows, as they verify drafts; transformers token by token.

On a mock board the numbers are computed with golden functions, not measured on silicon: formats of weights, activations
and cache are a board's, and so are the bits that matmuls read of them; sums and attention are exact.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.cli.command import Parser, run_command
from models.cli.console import Terminal
from models.cli.environment import check_outputs, date, machine, versions, write_json
from models.cli.prompts import read_prompt_file
from models.cli.tables import markdown_table, terminal_table
from models.errors import UserError
from models.options import DEFAULT_TARGET, describe_source, named_target
from models.ttnn_llama.shapes import MAX_ROWS
from models.ttnn_llama.weights.precision import PRECISIONS, precision_named

if TYPE_CHECKING:
    import torch

    from models.loading import OpenedModel

TEXTS = Path(__file__).resolve().parent / "suites" / "prompts"
POSITIONS = 512
TOP = 5
LOWEST, TRANSFORMERS = "bf16-lowest-id", "transformers-bf16"  # equal logits left to the lowest id; the peer
COMPILED = "-compiled"  # in compiled layers
CPU_PRECISIONS = ("bf16", LOWEST, f"bf16{COMPILED}", "int8", f"int8{COMPILED}", TRANSFORMERS)
CPU_ROWS = 6  # of a forward


@dataclass(frozen=True)
class Agreement:
    """positions: how many were compared. top1, top5: the shares of them that agree."""

    positions: int
    top1: float
    top5: float


def agreement(likeliest: "torch.Tensor", chosen: "torch.Tensor") -> Agreement:
    """likeliest [n, 5]: the exact model's ids, the likeliest first. chosen [n]: the board's ids."""
    same = likeliest == chosen[:, None]
    return Agreement(len(same), same[:, 0].float().mean().item(), same.any(1).float().mean().item())


def texts_of(opened: "OpenedModel", files: Sequence[Path], positions: int) -> list[list[int]]:
    """Token ids of all texts in the files, each cut to so many. Raises UserError without a tokenizer."""
    if opened.tokenizer is None:
        raise UserError(f"{describe_source(opened.source)} has no tokenizer.json: add it to read texts")
    return [opened.tokenizer.encode(text)[:positions] for file in files for text in read_prompt_file(file)]


def exact_choices(opened: "OpenedModel", texts: list[list[int]]) -> "torch.Tensor":
    """The exact model's likeliest ids [n, 5] after each token of the texts, one text behind the other."""
    import torch

    from models.loading import load_model

    longest = max(map(len, texts))
    model = load_model(opened, dtype="fp32", max_seq_len=longest).model
    with torch.inference_mode():
        return torch.cat([model.forward(ids, 0).topk(TOP).indices for ids in texts])


def board_choices(opened: "OpenedModel", mesh, precision: str, texts: list[list[int]]) -> "torch.Tensor":
    """The board's ids [n] after each token of the texts."""
    import torch

    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.weights.tensors import CheckpointSource

    named = precision_named(precision)
    source = CheckpointSource(opened.checkpoint, mesh, named)
    model = TtnnLlama(opened.checkpoint.config, mesh, source, precision=named, max_seq_len=max(map(len, texts)))
    chosen: list[int] = []
    for ids in texts:
        for start in range(0, len(ids), MAX_ROWS):
            chosen += model.greedy(ids[start : start + MAX_ROWS], start)
    return torch.tensor(chosen)


def cpu_choices(opened: "OpenedModel", precision: str, texts: list[list[int]]) -> "torch.Tensor":
    """The CPU's ids [n] after each token of the texts, in one of `CPU_PRECISIONS`."""
    import torch

    from models.loading import load_model

    if precision == TRANSFORMERS:
        return transformers_choices(opened, texts)
    dtype, compiled = precision.split("-")[0], precision.endswith(COMPILED)
    rows_fixed = None if compiled else CPU_ROWS
    longest = max(map(len, texts))
    model = load_model(opened, dtype=dtype, max_seq_len=longest, fixed_rows=rows_fixed, compiled=compiled).model
    chosen: list[int] = []
    for ids in texts:
        for start in range(0, len(ids), CPU_ROWS):
            rows = ids[start : start + CPU_ROWS]
            if precision == LOWEST:
                chosen += model.forward(rows, start).argmax(-1).tolist()
            else:
                chosen += model.greedy(rows, start)
    return torch.tensor(chosen)


def transformers_choices(opened: "OpenedModel", texts: list[list[int]]) -> "torch.Tensor":
    """The ids [n] of transformers' model in bf16 with the same weights."""
    import torch
    import transformers

    from scripts.suites.hf_peer import load

    model = load(opened.checkpoint, "bf16", "cpu")
    chosen = []
    with torch.inference_mode():
        for ids in texts:
            cache = transformers.DynamicCache(config=model.config)
            for token in ids:
                step = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
                chosen.append(step.logits[0, -1].argmax().item())
    return torch.tensor(chosen)


def measure_cpu(targets: Sequence[str], precisions: Sequence[str], files: Sequence[Path], positions: int) -> dict:
    """What goes into the JSON file, of the CPU."""
    from models.loading import open_model

    found: dict[str, dict] = {}
    for target in targets:
        opened = open_model(named_target(target))
        texts = texts_of(opened, files, positions)
        exact = exact_choices(opened, texts)
        found[target] = {}
        for precision in precisions:
            found[target][precision] = asdict(agreement(exact, cpu_choices(opened, precision, texts)))
            print(f"{target} {precision}: {found[target][precision]}", file=sys.stderr)
    return {"machine": machine("cpu"), "targets": found}


def measure(targets: Sequence[str], precisions: Sequence[str], files: Sequence[Path], positions: int) -> dict:
    """What goes into the JSON file, of a board. Raises UserError where there is none, or a model does not fit it."""
    from models.loading import open_model
    from models.ttnn_llama.device.mesh import detect_board, open_mesh
    from models.ttnn_llama.weights.tensors import check_split

    opened = {target: open_model(named_target(target)) for target in targets}
    texts = {target: texts_of(model, files, positions) for target, model in opened.items()}
    board = detect_board()
    for model in opened.values():
        check_split(model.checkpoint.config, board.chips)
    found: dict[str, dict] = {}
    with open_mesh(board, trace_region_bytes=0) as meshes:
        for target, model in opened.items():
            exact = exact_choices(model, texts[target])
            found[target] = {}
            for precision in precisions:
                chosen = board_choices(model, meshes.target, precision, texts[target])
                found[target][precision] = asdict(agreement(exact, chosen))
                print(f"{target} {precision}: {found[target][precision]}", file=sys.stderr)
    return {"machine": machine("tt", board, board.timed), "targets": found}


def table(targets: dict) -> tuple[list[str], list[tuple]]:
    """Head and rows: a precision a row."""
    head, names = ["precision"], list(targets)
    for name in names:
        positions = next(iter(targets[name].values()))["positions"]
        head += [f"{name}: top-1 of {positions}", "top-5"]
    rows = []
    for precision in targets[names[0]]:
        shares = (targets[name][precision][key] for name in names for key in ("top1", "top5"))
        rows.append((precision, *(f"{100 * share:.1f}%" for share in shares)))
    return head, rows


def precisions_of(options: argparse.Namespace) -> list[str]:
    """Those asked for, each once. Raises UserError for one that the device has not."""
    on_board = options.device == "tt"
    names = options.precision or (list(PRECISIONS) if on_board else CPU_PRECISIONS)
    for name in names:
        if on_board:
            precision_named(name)
        elif name not in CPU_PRECISIONS:
            raise UserError(f"--precision {name} is none of the CPU's: use one of {', '.join(CPU_PRECISIONS)}")
    return list(dict.fromkeys(names))


def command(argv: Sequence[str] | None) -> int:
    """Compare, show, write; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", nargs="+", default=[DEFAULT_TARGET], help="as of the demo, several (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("tt", "cpu"), default="tt", help="(default: %(default)s)")
    parser.add_argument(
        "--precision",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}; with --device cpu of {', '.join(CPU_PRECISIONS)} (default: all of them)",
    )
    parser.add_argument("--texts", nargs="+", metavar="FILE", help="prompt files (default: those of the benchmarks)")
    parser.add_argument(
        "--positions", type=int, default=POSITIONS, metavar="N", help="of a text, at most (default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    options = parser.parse_args(argv)
    if options.positions < 1:
        raise UserError(f"--positions {options.positions}: give a whole number of at least 1")
    precisions = precisions_of(options)
    files = [Path(name) for name in options.texts or sorted(TEXTS.glob("*.txt"))]
    read = {f"file {file}": str(file) for file in files} | {f"--target {name}": name for name in options.target}
    check_outputs({"--json": options.json}, read)
    measured = measure_cpu if options.device == "cpu" else measure
    results = measured(list(dict.fromkeys(options.target)), precisions, files, options.positions)
    head, rows = table(results["targets"])
    if options.markdown:
        print(markdown_table(head, rows))
    else:
        Terminal(highlight=False).print(terminal_table(head, rows))
    if options.json:
        circumstances = {"date": date(), "versions": versions(), "command": sys.argv}
        write_json(options.json, circumstances | results)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
