"""Whole texts: of the pair that comes with the project, then of the user's own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.llm import LLM, Completion
from models.loading import open_model
from models.options import NAMED
from models.ttnn_llama.weights.tensors import check_split
from scripts.board_steps.bench import Bench, one_chip_board
from scripts.board_steps.record import Record, Surprise

TARGET = "tiny"
PROMPTS = (
    'class Thermostat:\n    """Keeps a room between two temperatures."""\n\n    def __init__(self, low, high):\n',
    "def median(values):\n    ordered = sorted(values)\n",
)
LONG_TEXT = Path(__file__).with_name("kernels.py")  # Python, which the embedded models were trained on
# A token of the board's that the CPU's fp32 target puts so far below its own best is no near-tie: formats of few bits
# move the logits of the embedded target by less.
NEAR_TIE = 1.0


def plain_text(bench: Bench, record: Record) -> None:
    """The embedded target alone, with traces and without."""
    effort, board = bench.effort, bench.board
    texts = {}
    for trace in (False, True) if board.traces else (False,):
        with _loaded(bench, speculative=False, trace=trace) as llm:
            prompt = llm.encode(PROMPTS[0])
            texts[trace] = _written(llm, prompt, effort.tokens, speculate=False)
            _note_rate(bench, record, f"tok/s {'with' if trace else 'without'} traces", texts[trace])
    record.texts.append(texts[False].text)
    _check_near_cpu(record, prompt, texts[False].token_ids)
    if board.traces:
        _check_same(record, "text with traces and without", texts[True], texts[False])
    else:
        record.leave_out("the same text with traces", f"a {board.medium} replays none")
    _say_if_short(bench, record)


def same_text(bench: Bench, record: Record) -> None:
    """The embedded pair with batched verification and its target alone."""
    with _loaded(bench) as llm:
        for number, prompt in enumerate(PROMPTS, 1):
            ids = llm.encode(prompt)
            plain = _written(llm, ids, bench.effort.tokens, speculate=False)
            drafted = _written(llm, ids, bench.effort.tokens, speculate=True)
            _check_same(record, f"prompt {number}, outputs", drafted, plain)
            record.facts[f"accepted, prompt {number}"] = _acceptance(drafted)
    record.facts["outputs identical"] = "yes"
    _say_if_short(bench, record)


def long_prompts(bench: Bench, record: Record) -> None:
    """Prompts whose prefill cuts the rows of a core, and a second chunk of one."""
    with _loaded(bench, speculative=False) as llm:
        text = llm.encode(LONG_TEXT.read_text(encoding="utf-8"))
        for length in bench.effort.long_prompts:
            written = _written(llm, text[:length], bench.effort.after_long, speculate=False)
            _check_near_cpu(record, text[:length], written.token_ids)
    if len(bench.effort.long_prompts) < 2:
        record.leave_out("a prompt of 1000 tokens", f"it would take a {bench.board.medium} too long")


def own_pair(bench: Bench, record: Record, target: str, draft: str | None) -> None:
    """The user's own models."""
    with LLM.load(target, draft, device="tt") as llm:
        for number, prompt in enumerate(PROMPTS, 1):
            ids = llm.encode(prompt)
            plain = _written(llm, ids, bench.effort.tokens, speculate=False)
            drafted = _written(llm, ids, bench.effort.tokens, speculate=True)
            record.texts.append(plain.text)
            _check_same(record, f"prompt {number}, outputs", drafted, plain)
            record.facts[f"accepted, prompt {number}"] = _acceptance(drafted)
            for name, text in (("plain", plain), ("speculative", drafted)):
                _note_rate(bench, record, f"tok/s {name}, prompt {number}", text)
    record.facts["outputs identical"] = "yes"
    _say_if_short(bench, record)


@contextlib.contextmanager
def _loaded(bench: Bench, **options: Any) -> Iterator[LLM]:
    """The embedded pair on the board, or on one chip of it where its heads cannot be split over all."""
    with _one_chip(bench), LLM.load(TARGET, device="tt", weight_cache=False, **options) as llm:
        yield llm


@contextlib.contextmanager
def _one_chip(bench: Bench) -> Iterator[None]:
    """MESH_DEVICE of one chip where the embedded target cannot be split over all of the board's."""
    try:
        check_split(open_model(str(NAMED[TARGET][0])).checkpoint.config, bench.board.chips)
    except UserError:
        before = os.environ.get("MESH_DEVICE")
        os.environ["MESH_DEVICE"] = one_chip_board(bench.board).name
        try:
            yield
        finally:
            if before is None:
                del os.environ["MESH_DEVICE"]
            else:
                os.environ["MESH_DEVICE"] = before
        return
    yield


def _written(llm: LLM, prompt: Sequence[int], count: int, *, speculate: bool) -> Completion:
    if llm.board:
        llm.board.prepare_prompt(len(prompt), count)
        llm.board.select("speculative" if speculate else "baseline")
    return llm.generate(list(prompt), max_new_tokens=count, stop_ids=(), speculate=speculate)


def _check_near_cpu(record: Record, prompt: Sequence[int], written: Sequence[int]) -> None:
    """Each token that the board wrote is, given all before it, the CPU's own or nearly."""
    with LLM.load(TARGET, dtype="fp32", speculative=False) as llm:
        model = llm.target.model
        logits = [model.prefill(prompt)]
        logits += [model.forward([id], len(prompt) + i)[0] for i, id in enumerate(written[:-1])]
    gaps = [float(row.max() - row[id]) for row, id in zip(logits, written, strict=True)]
    same = sum(gap == 0 for gap in gaps)
    after = f"after {len(prompt)} tokens"
    record.facts[f"as the CPU {after}"] = f"{same} of {len(gaps)} tokens, {max(gaps):.3f} below at most"
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    if not gaps[worst] <= NEAR_TIE:
        expected = f"a logit on the CPU within {NEAR_TIE} of the best"
        raise Surprise(f"token {worst + 1} {after}", expected, f"{gaps[worst]:.3f} below")


def _check_same(record: Record, what: str, made: Completion, expected: Completion) -> None:
    """The same token ids."""
    pairs = zip(made.token_ids, expected.token_ids, strict=False)
    differs = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if differs is not None:
        raise Surprise(what, "identical texts", f"another token at {differs + 1} of {len(expected.token_ids)}")
    record.equal(what, torch.tensor(made.token_ids), torch.tensor(expected.token_ids))


def _acceptance(text: Completion) -> str:
    rounds = text.stats.rounds
    return f"{sum(each.accepted for each in rounds)} of {sum(each.drafted for each in rounds)} drafted tokens"


def _note_rate(bench: Bench, record: Record, what: str, text: Completion) -> None:
    if bench.board.timed and text.stats.tok_s:
        record.facts[what] = round(text.stats.tok_s, 1)


def _say_if_short(bench: Bench, record: Record) -> None:
    if bench.effort.tokens < 150:
        why = f"{bench.effort.tokens} on a {bench.board.medium}, which would take too long"
        record.leave_out("texts of 150 tokens, past position 128", why)
