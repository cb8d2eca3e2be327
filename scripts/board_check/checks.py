"""Everything that generation does with models on a board, tried on ttnn's mock of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from models.llama.head_config import HeadConfig
from models.ttnn_llama.device.mesh import first_line, open_mesh
from models.ttnn_llama.shapes import KV_BLOCK, MAX_ROWS
from scripts.board_check.question import Question

ROOT = Path(__file__).resolve().parents[2]
TREES = (8, 32)  # rows that are a tree


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
                pool=asked.pool if name == "target" else None,
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
        users = min(asked.slots, MAX_ROWS // rows, model.pages.count)
        share = model.pages.count // users * KV_BLOCK  # positions that each can have, of a pool
        step = [Rows(slot, [1] * rows, min(asked.max_seq_len, share) - rows) for slot in range(users)]
        yield f"{users} users, {rows} rows each, in one forward", lambda step=step: _alone(model, step)


def _alone(model, step) -> None:
    """Rows of texts that have the cache to themselves."""
    for slot in range(model.limits.slots):
        model.free(slot)
    model.extend(step)


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
