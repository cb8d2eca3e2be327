"""All steps in their order: what each shows, and what to try where it surprises."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from models.boards import MOCK, SIMULATOR, Board
from scripts.board_steps import kernels, programs, texts
from scripts.board_steps.bench import Bench
from scripts.board_steps.record import Record

NO_FLAG = "no flag goes without it, send the report"
RESET = "try `tt-smi -r`, look with `tt-smi -ls`, and run it again"


@dataclass(frozen=True)
class Step:
    """One thing to try.

    Args:
        name: for `--from` and `--to`.
        shows: what it shows where kernels run.
        remedy: what to try where it surprises.
        run: does it, on the board.
        impossible: of a board, why it cannot be shown there; "" where it can.
    """

    name: str
    shows: str
    remedy: str
    run: Callable[[Bench, Record], None]
    impossible: Callable[[Board], str] = lambda board: ""


def _one_chip(board: Board) -> str:
    return f"{board.name} has one chip" if board.chips == 1 else ""


def _no_traces(board: Board) -> str:
    return "" if board.traces else f"a {board.medium} replays no traces"


def all_steps(target: str | None, draft: str | None) -> list[Step]:
    """In order, each only of use where all before it were as expected."""
    return [
        Step("open", "the board opens and closes, twice; tensors reach every chip and return", RESET, kernels.opening),
        Step(
            "linear",
            "a prefill matmul of 8B's gate shape at 128, 384 and 1024 rows",
            "try --prefill rows",
            kernels.prefill_linear,
        ),
        Step(
            "prefill",
            "prefill attention of short prompts and of a tree: values below 100 (tt-metal issue 52218)",
            "try --prefill rows, and no trees",
            kernels.prefill_attention,
        ),
        Step(
            "rows",
            "a row alone and beside four others, bit for bit, at positions 100 to 600",
            "try --verification sequential",
            kernels.decode_rows,
        ),
        Step(
            "decode",
            "decode attention over contexts of 1 to 1024 positions, 1 to 32 rows",
            NO_FLAG,
            kernels.decode_attention,
        ),
        Step(
            "cache",
            "rows of one tile and of two written in turn, every one in its place, 50 times",
            "try --verification sequential",
            kernels.shared_cache,
        ),
        Step("ids", "ids of more than 16 bits through argmax and embedding", NO_FLAG, kernels.token_ids),
        Step(
            "sums",
            "100 sums over all chips, 1000 more from a trace",
            "try one chip of it: MESH_DEVICE=N150, on Blackhole P150",
            programs.sums,
            _one_chip,
        ),
        Step(
            "traces",
            "a forward replayed 50 times past position 128 equals the eager one",
            "try --no-trace",
            programs.replays,
            _no_traces,
        ),
        Step(
            "text",
            "150 tokens of the embedded target, with traces and without, and as the CPU up to near-ties",
            "try --no-trace",
            texts.plain_text,
        ),
        Step(
            "identical",
            "the embedded pair's text with batched verification is its target's own",
            "try --verification sequential",
            texts.same_text,
        ),
        Step(
            "long",
            "what follows prompts of 400 and 1000 tokens, as the CPU up to near-ties",
            "try --prefill rows",
            texts.long_prompts,
        ),
        Step(
            "pair",
            "your own pair: identical texts, acceptance, speed",
            "try --verification sequential, --precision accuracy",
            partial(texts.own_pair, target=target or "", draft=draft),
            lambda board: "" if target else "no --target was given",
        ),
    ]


def never_shown(board: Board) -> list[dict[str, str]]:
    """What nothing can show on a board like this one, and why."""
    what: dict[str, str] = {}
    if board.medium == MOCK:
        what |= {
            "the arithmetic of kernels": "values come from golden functions, which say what an op means",
            "races between cores": "kernels do nothing on a mock",
            "collectives over links": "a mock has none",
        }
    if board.medium == SIMULATOR:
        what |= {
            "races that a chip's own timing makes": "a simulator runs its cores in an order of its own",
            "collectives over links": "the simulator has one chip",
        }
    if not board.traces:
        what["replayed traces"] = f"a {board.medium} replays none"
    if not board.timed:
        what["times"] = f"the clock of a {board.medium} says nothing about a chip"
    elif board.chips == 1:
        what["collectives over links"] = f"{board.name} has one chip"
    return [{"what": name, "why": why} for name, why in what.items()]
