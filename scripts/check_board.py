"""Would a model, or a pair of them, run on a Tenstorrent board? Answered without the board and without weights.

    python scripts/check_board.py --model 8B --draft 1B --mesh T3K --max-seq-len 8192
    python scripts/check_board.py --model path/to/checkpoint --mesh N150

Runs every op of the whole model on ttnn's mock of the board, at full depth, with tensors that have a shape and an
address but no values. ttnn checks each call as it would on the board: arguments, shapes, DRAM and L1 memory, program
configurations. That proves that the calls are legal and that memory suffices; it says nothing about speed, about what
kernels compute, or about hangs. Of a checkpoint only config.json is read. Exit code: 0 all legal, 1 not, 2 bad input.
"""

import argparse
import contextlib
import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from models.board_mock import cluster
from models.boards import BOARDS, PLACEMENTS, Board
from models.cli.command import Parser, run_command
from models.cli.console import Terminal, memory_table
from models.errors import UserError
from models.llama.config import NAMED_SIZES, LlamaConfig, named_config
from models.llama.head_config import HeadConfig, typical_head
from models.speculative.drafters.registry import spec_of
from models.ttnn_llama.device.mesh import first_line, open_mesh, target_chips
from models.ttnn_llama.shapes import MAX_ROWS
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.head_tensors import head_specs
from models.ttnn_llama.weights.precision import (
    PRECISION,
    PRECISIONS,
    Precision,
    default_precision,
    precision_named,
)
from models.ttnn_llama.weights.tensors import check_split

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONTEXT = 2048
MAX_SLOTS = 1024
DEFAULT_ROWS = (1, 2, 5, 8, 32)
TREES = (8, 32)  # rows that are a tree
DEFAULT_PROMPTS = (1, 127, 128, 129, 1000)
NOTE = (
    "This tells whether ttnn accepts every call and whether memory suffices. "
    "It tells nothing about speed, about what kernels compute, or about hangs."
)


# ---- the question ---------------------------------------------------------------------------------------------------


def find_config(name: str) -> LlamaConfig:
    """The architecture of a directory with a config.json, a published size ("8B", or a hub id that has its name), or
    a hub id whose config.json is downloaded. Raises UserError for anything else."""
    path = Path(name)
    if path.is_dir():
        return LlamaConfig.from_json(path / "config.json")
    size = name.rpartition("/")[2].lower().removesuffix("-instruct").removeprefix("meta-")
    if size in NAMED_SIZES or size in (key.rpartition("-")[2] for key in NAMED_SIZES):
        return named_config(size)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(
            f"no such directory or size: {name!r}: give a directory with a config.json, a hub id, or one of 1B, 3B, 8B"
        )
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json")
    except Exception as error:  # network, licence, a name that does not exist: they have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot get config.json of {name}: {text}: give a directory that has it, or one of 1B, 3B, 8B"
        ) from None
    return LlamaConfig.from_json(file)


def find_head(name: str, target: LlamaConfig) -> HeadConfig:
    """The shape of a head in a directory, or of published heads for a size. UserError if it is not the target's."""
    path = Path(name)
    config = HeadConfig.from_json(path / "config.json", target) if path.is_dir() else typical_head(find_config(name))
    config.check_target(target)
    return config


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
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Question:
    """What to check, all of it checked for sense."""

    board: Board
    configs: dict[str, LlamaConfig | HeadConfig]  # "target" and, if there is one, "draft", a model or a head
    precisions: dict[str, Precision]
    placement: str
    max_seq_len: int
    rows: list[int]
    prompts: list[int]
    draft_tokens: int
    slots: int = 1


def question(options: argparse.Namespace) -> Question:
    """Raises UserError for whatever is wrong with the options, or with the models for this board."""
    board = cluster.board_of(options.mesh)
    drafts = options.draft is not None or options.draft_head is not None
    if not drafts and (options.draft_precision or options.draft_placement != "shared"):
        raise UserError("--draft-precision and --draft-placement are about a draft: name it with --draft")
    if options.draft is not None and options.draft_head is not None:
        raise UserError("--draft and --draft-head are both given: a target has one draft")
    if options.draft_head is not None and options.draft_placement != "shared":
        raise UserError("a draft head lies on its target's chips: use --draft-placement shared")
    of_target = find_config(options.model)
    configs: dict[str, LlamaConfig | HeadConfig] = {"target": of_target}
    default = default_precision(of_target.hidden_size)
    precisions = {"target": precision_named(options.precision or default)}
    chips = {"target": board.chips}
    if options.draft is not None:
        own_chip = options.draft_placement == "own-chip"
        draft_config = configs["draft"] = find_config(options.draft)
        precisions["draft"] = precision_named(options.draft_precision or options.precision or PRECISION)
        chips = {
            "target": target_chips(board, own_chip_for_draft=own_chip),
            "draft": 1 if own_chip else board.chips,
        }
        target, draft = of_target.vocab_size, draft_config.vocab_size
        if target != draft:
            raise UserError(f"target vocabulary {target} != draft vocabulary {draft}: the pair must share a tokenizer")
    if options.draft_head is not None:
        configs["draft"] = find_head(options.draft_head, of_target)
        precisions["draft"] = precision_named(options.draft_precision or options.precision or PRECISION)
        chips["draft"] = board.chips
    drafted = options.num_draft_tokens
    if not 1 <= drafted < MAX_ROWS:
        raise UserError(
            f"--num-draft-tokens {drafted} is outside 1..{MAX_ROWS - 1}: a forward verifies at most {MAX_ROWS} rows"
        )
    shortest, longest = (
        drafted + 3 if options.draft_head is None else 2 * drafted + 5,
        min(config.max_position_embeddings for config in configs.values() if isinstance(config, LlamaConfig)),
    )
    length = options.max_seq_len if options.max_seq_len is not None else min(DEFAULT_CONTEXT, longest)
    if not shortest <= length <= longest:
        raise UserError(
            f"--max-seq-len {length} is outside {shortest}..{longest}: {drafted} drafted tokens need {shortest}, and "
            f"the models have been trained for {longest}"
        )
    most = min(MAX_ROWS, length)
    rows = options.rows or [count for count in DEFAULT_ROWS if count <= most]
    prompts = options.prompts or [*(count for count in DEFAULT_PROMPTS if count < length), length]
    for flag, counts, limit in (("--rows", rows, most), ("--prompts", prompts, length)):
        wrong = [count for count in counts if not 1 <= count <= limit]
        if wrong:
            raise UserError(
                f"{flag} {wrong[0]} is outside 1..{limit}, for a context of {length}: use one in that range"
            )
    if not 1 <= options.slots <= MAX_SLOTS:
        raise UserError(f"--slots {options.slots} is outside 1..{MAX_SLOTS}: use a number in that range")
    if options.slots > 1 and options.draft_head is not None:
        raise UserError("several texts at once are drafted by a model, not by a head: use --draft, or --slots 1")
    for name, config in configs.items():
        if isinstance(config, HeadConfig):
            head_specs(config, chips[name], precisions[name])
        else:
            check_split(config, chips[name])
    return Question(
        board=board,
        configs=configs,
        precisions=precisions,
        placement=options.draft_placement,
        max_seq_len=length,
        rows=sorted(set(rows)),
        prompts=sorted(set(prompts)),
        draft_tokens=drafted,
        slots=options.slots,
    )


def memory_plans(asked: Question) -> dict[str, memory.MemoryPlan]:
    """What the demo would plan for these models, by "target" and "draft"; imports ttnn."""
    from models.ttnn_llama import board_models as pair
    from models.ttnn_llama.programs.options import BoardOptions

    options = BoardOptions(
        precision=asked.precisions["target"].name,
        draft_precision=asked.precisions.get("draft", asked.precisions["target"]).name,
        placement=asked.placement,
        workload=spec_of("head" if isinstance(asked.configs.get("draft"), HeadConfig) else "model").workload,
        draft_lengths=(asked.draft_tokens,),
        slots=asked.slots,
    )
    # of an opened model only the configuration is looked at
    opened = [
        SimpleNamespace(checkpoint=SimpleNamespace(config=asked.configs[name])) if name in asked.configs else None
        for name in ("target", "draft")
    ]
    return pair.memory_plans(asked.board, *opened, asked.max_seq_len, options)


# ---- the checks -----------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """One thing that was tried, and what came of it."""

    what: str
    legal: bool
    seconds: float
    op: str = ""  # that was refused
    where: str = ""  # file and line that called it
    reason: str = ""  # ttnn's own
    dram_while_running: int = 0  # bytes per chip, at most, beside what stays allocated
    l1_per_core: int = 0  # bytes at most: tensors and, as far as the graph records them, circular buffers


def refused(error: BaseException) -> tuple[str, str]:
    """(op, file:line of this project) of an error that ttnn raised."""
    op = where = ""
    trace = error.__traceback__
    while trace is not None:
        frame, line = trace.tb_frame, trace.tb_lineno
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "models/ttnn_llama"):
            where = f"{file.relative_to(ROOT)}:{line}"
        elif frame.f_globals.get("__name__") == "ttnn.decorators":
            op = getattr(frame.f_locals.get("self"), "python_fully_qualified_name", op)
        trace = trace.tb_next
    return op, where


def try_out(what: str, mesh_device, body: Callable[[], object]) -> Check:
    """Run one thing on a mesh, and note whether it was legal and what it took."""
    import ttnn

    from models.board_mock import graph

    check = Check(what, True, 0.0)
    l1_before = ttnn.get_memory_view(mesh_device, ttnn.BufferType.L1).total_bytes_allocated_per_bank
    began = time.perf_counter()
    nodes: graph.Nodes = []
    try:
        with graph.recorded() as nodes:
            body()
    except Exception as error:  # ttnn raises several classes
        check.legal = False
        check.reason = first_line(error)
        check.op, check.where = refused(error)
    check.seconds = time.perf_counter() - began
    check.dram_while_running = graph.peak_dram(nodes)
    check.l1_per_core = l1_before + graph.peak_l1(nodes)
    return check


@dataclass(frozen=True)
class Usage:
    """Memory of one mesh, bytes per chip and per core."""

    dram_kept: int  # what models hold
    dram: int
    l1_per_core: int


def dram_in_use(mesh_device) -> int:
    """Bytes per chip."""
    import ttnn

    view = ttnn.get_memory_view(mesh_device, ttnn.BufferType.DRAM)
    return view.num_banks * view.total_bytes_allocated_per_bank


def usage(mesh_device, dram_before: int) -> Usage:
    import ttnn

    dram = ttnn.get_memory_view(mesh_device, ttnn.BufferType.DRAM)
    l1 = ttnn.get_memory_view(mesh_device, ttnn.BufferType.L1)
    return Usage(
        dram_kept=dram_in_use(mesh_device) - dram_before,
        dram=dram.num_banks * dram.total_bytes_per_bank,
        l1_per_core=l1.total_bytes_per_bank,
    )


def run_checks(asked: Question, trace_bytes: int) -> Iterator[Check | dict[str, Usage]]:
    """Each check when it is done; the last item is the memory in use, by whose mesh it is."""
    import ttnn  # noqa: F401  first, under the mock

    from models.ttnn_llama.batch_model import BatchLlama
    from models.ttnn_llama.device.runner import Runner
    from models.ttnn_llama.draft_head import TtnnHead
    from models.ttnn_llama.model import TtnnLlama
    from models.ttnn_llama.programs.fused import FusedRound
    from models.ttnn_llama.programs.head_round import HeadRound
    from models.ttnn_llama.weights.tensors import EmptySource

    own_chip = asked.placement == "own-chip"
    with open_mesh(asked.board, trace_region_bytes=trace_bytes, own_chip_for_draft=own_chip) as meshes:
        places = {"target": meshes.target, "draft": meshes.draft}
        owners = places if own_chip else {" + ".join(asked.configs): meshes.target}
        before = {name: dram_in_use(mesh) for name, mesh in owners.items()}
        runner = Runner(meshes.target, trace=False)
        models: dict[str, TtnnLlama | BatchLlama] = {}
        heads: list[TtnnHead] = []

        def build(name: str) -> None:
            mesh, config = places[name], asked.configs[name]
            if isinstance(config, HeadConfig):
                import torch

                ids = torch.arange(config.draft_vocab_size) if config.reduced else None
                options = {"precision": asked.precisions[name], "max_seq_len": asked.max_seq_len}
                heads.append(TtnnHead(config, models["target"], EmptySource(mesh), target_ids=ids, **options))
                return
            models[name] = (BatchLlama if asked.slots > 1 else TtnnLlama)(
                config,
                mesh,
                EmptySource(mesh),
                precision=asked.precisions[name],
                max_seq_len=asked.max_seq_len,
                runner=runner if mesh is meshes.target else None,
                slots=asked.slots,
            )

        for name, config in asked.configs.items():
            check = try_out(
                f"{name}: weights and cache of {config.num_hidden_layers} layers", places[name], lambda n=name: build(n)
            )
            check.dram_while_running = 0  # it stays
            yield check
        for name, model in models.items():
            drafts = name == "draft" or len(asked.configs) == 1
            for what, body in uses(model, asked, drafts=drafts, early_exit=name == "target"):
                yield try_out(f"{name}: {what}", places[name], body)
        if len(models) == 2 and not own_chip and asked.slots == 1:
            fused = FusedRound(models["target"], models["draft"])

            def one_round() -> None:
                k = asked.draft_tokens
                fused.prepare(k)
                fused.run([1, 2], asked.max_seq_len - k - 2, k)

            yield try_out(f"round of {asked.draft_tokens} drafted tokens on the device", meshes.target, one_round)
        for head in heads:
            for what, body in uses_of_head(head, HeadRound(head), asked):
                yield try_out(f"draft: {what}", meshes.target, body)
        yield {name: usage(mesh, before[name]) for name, mesh in owners.items()}


def uses(model, asked: Question, *, drafts: bool, early_exit: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that generation does with a model, at the end of the context where there is a choice."""
    for prompt in asked.prompts:
        yield f"prefill of {prompt} tokens", lambda n=prompt: model.prefill([1] * n)
    for rows in asked.rows:
        kind = "decode" if rows == 1 else f"verify {rows} rows"
        yield kind, lambda n=rows: model.greedy([1] * n, asked.max_seq_len - n)
    if asked.slots > 1:
        yield from uses_together(model, asked)
    for rows in TREES if asked.slots == 1 else ():  # most of them beyond the context, where there is room for a tree's
        yield (
            f"verify a tree of {rows} rows",
            lambda n=rows: model.greedy([1] * n, asked.max_seq_len - 2, [-1, *[0] * (n - 1)]),
        )
    k, layers = asked.draft_tokens, len(model.layers)
    if early_exit and layers > 1 and asked.slots == 1:
        count = max(1, layers // 4)
        yield (
            f"draft {k} tokens by the first {count} of {layers} layers",
            lambda: model.first_layers(count).draft_greedy([1], asked.max_seq_len - k, k),
        )
    if drafts:
        for given in (1, 2):
            yield (
                f"draft {k} tokens after {given}",
                lambda m=given: model.draft_greedy([1] * m, asked.max_seq_len - k - m, k),
            )


def uses_together(model, asked: Question) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps and verifications that all slots share, or as many of them as 32 rows have room for."""
    from models.speculative.model import Rows

    for rows in (1, asked.draft_tokens + 1):
        users = min(asked.slots, MAX_ROWS // rows)
        step = [Rows(slot, [1] * rows, asked.max_seq_len - rows) for slot in range(users)]
        yield f"{users} users, {rows} rows each, in one forward", lambda step=step: model.extend(step)


def uses_of_head(head, rounds, asked: Question) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that generation does with a draft head and, for it, with its target."""
    from models.speculative.model import Rows, Want

    k, target = asked.draft_tokens, head.target
    position = asked.max_seq_len - 2 * k - 3

    def verified(rows: int) -> None:
        kept = target.extend([Rows(0, [1] * rows, position)], Want(taps=head.taps)).features(0)
        head.states(kept, range(rows), position)

    def one_round() -> None:
        verified(k + 1)
        rounds.prepare(k)
        rounds.run([1] * (k + 2), position, k)

    def chain() -> None:
        verified(k + 1)
        head.draft_greedy([1] * (k + 1), position + 1, k)

    def reading() -> None:
        verified(k + 1)
        head.read([1] * (k + 1), position + 1)

    def steps() -> None:
        verified(k + 1)
        head.forward([1] * (k + 1), position + 1)
        head.forward([1], position + k + 2)

    for prompt in asked.prompts:
        if prompt > 1:
            yield f"a prompt of {prompt} tokens, with the target's states", lambda n=prompt: head.warm_up([1] * n)
    yield f"rows of {k + 1} verified tokens, read", reading
    yield f"{k} tokens after {k + 1} verified ones", chain
    yield "logits of rows, and of a step", steps
    yield f"round of {k} tokens drafted by the head", one_round


# ---- the answer -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ttnn_silenced() -> Iterator[Terminal]:
    """Send the process's stdout and stderr nowhere, for what ttnn's C++ prints; yields a console on the real stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    faulthandler.enable(err)  # a crash within ttnn is not to be silent
    try:
        with open(os.devnull, "w") as nowhere, open(out, "w", encoding=sys.stdout.encoding, closefd=False) as screen:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield Terminal(file=screen, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        faulthandler.disable()
        os.close(out)
        os.close(err)


def line(check: Check) -> str:
    if check.legal:
        return f"legal      {check.what}  ({check.seconds:.1f} s)"
    at = f" ({check.where})" if check.where else ""
    return f"NOT LEGAL  {check.what}: {check.op or 'refused'}{at}: {check.reason}"


def show_plans(console: Console, board: Board, plans: dict[str, memory.MemoryPlan]) -> None:
    console.print(memory_table(board, plans))


def show_usage(console: Console, usages: dict[str, Usage], checks: list[Check]) -> None:
    columns = ("chips of", "DRAM kept", "running, at most", "of", "L1 at most", "of")
    table = Table(*columns, title="memory in use, per chip and per core", title_justify="left")
    for name, used in usages.items():
        own = [check for check in checks if len(usages) == 1 or check.what.startswith(name)]
        running, per_core = (max(getattr(c, field) for c in own) for field in ("dram_while_running", "l1_per_core"))
        table.add_row(
            name,
            *(f"{size / 1e9:.2f} GB" for size in (used.dram_kept, running, used.dram)),
            *(f"{size / 1e6:.2f} MB" for size in (per_core, used.l1_per_core)),
        )
    console.print(table)


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
    subject += f", {asked.slots} slots" * (asked.slots > 1)
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


def write_results(
    options: argparse.Namespace,
    asked: Question,
    plans: dict[str, memory.MemoryPlan],
    checks: list[Check],
    usages: dict[str, Usage],
    verdict: str,
) -> None:
    from models.cli.environment import versions, write_json

    parts = ("weights", "kv_cache", "activations", "traces", "total")
    planned = {name: {part: getattr(plan, part) for part in parts} for name, plan in plans.items()}
    results = {
        "board": options.mesh,
        "legal": verdict.startswith("LEGAL"),
        "verdict": verdict,
        "proved": NOTE,
        "planned_bytes_per_chip": planned,
        "checks": [asdict(check) for check in checks],
        "memory_in_use": {name: asdict(usage) for name, usage in usages.items()},
        "versions": versions(),
        "settings": vars(options),
    }
    write_json(options.json, results)


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
