"""What row-invariant arithmetic costs plain decoding on this machine.

It makes greedy text equal bit for bit with and without drafts. Where a single row has the bits that it has among
others, which is tried, it costs nothing. Where some matrices have to compute a second row for that, or where rows
depend on their number in any case and a forward has to be padded, a few layers of the model's own sizes are timed:
plain decoding in its fastest form, and row-invariant. All is done once for each machine, and kept in the user's cache
directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from models.llama.config import LlamaConfig
from models.llama.random_weights import RandomWeights
from models.torch_llama.model import TorchLlama
from models.user_cache import user_cache

ROWS = (2, 3, 4, 5, 6, 7, 8, 16)
SINGLE = 1  # the name of the cost of a single row that has the bits that it has among others
TOLERANCE = 1.02  # of the time of the fastest plain decoding
CERTAIN = 0.05  # largest error of a cost that says something
SECONDS, LEAST_TURNS = 1.5, 3
POSITION = 300  # where the timed rows stand: a chat's typical length
# Weights of the part that is timed, bytes: more than caches hold, so that they are read from memory as a model's are.
PART_BYTES = 400e6
VERSION = 3  # of what is measured and kept


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What row-invariant arithmetic takes, and what padding costs.

    Args:
        one_row_ms: of plain decoding in its fastest form, for the part of the model that was timed.
        costs: time of a forward padded to so many rows over that; where rows are alike, of a single row that has the
            bits that it has among others (`SINGLE`), or nothing, where that takes nothing.
        errors: of each, how uncertain it is.
        measured: when, an ISO date.
        rows_alike: whether a row can have the same bits among any number of others without padding.
    """

    one_row_ms: float | None
    costs: Mapping[int, float]
    errors: Mapping[int, float]
    measured: str
    rows_alike: bool = False

    @property
    def free_rows(self) -> tuple[int, ...]:
        """The numbers of rows that cost plain decoding at most 2 %, as far as can be told; one row always does.

        Where a cost is uncertain its rows are not free: the baseline would pay for what nobody knows.
        """
        certain = {rows: cost for rows, cost in self.costs.items() if self.errors[rows] <= CERTAIN}
        return 1, *(n for n, cost in certain.items() if n > 1 and cost - self.errors[n] <= TOLERANCE)

    @property
    def alike_for_nothing(self) -> bool:
        """Whether rows are alike at a cost of at most 2 % of plain decoding, as far as can be told.

        It is a second row in some matrices: where the machine is too busy to time that, it is taken for cheap.
        """
        cost, error = self.costs.get(SINGLE, 1.0), self.errors.get(SINGLE, 0.0)
        return self.rows_alike and (error > CERTAIN or cost - error <= TOLERANCE)

    @property
    def certain(self) -> bool:
        """Whether it is worth keeping: a busy machine tells too little."""
        return max(self.errors.values(), default=0.0) <= CERTAIN


def calibrate(
    config: LlamaConfig, dtype: str, threads: int | None = None, directory: Path | None = None
) -> Calibration:
    """The calibration of this machine for models of these sizes: kept from before, or measured now in a few seconds.

    Args:
        config: of the model.
        dtype: as of `TorchLlama`, or "int8".
        threads: of torch (default: those it has).
        directory: where it is kept (default: in the user's cache directory).
    """
    threads = threads or torch.get_num_threads()
    file = kept_file(config, f"{VERSION} {dtype}", threads, directory)
    try:
        kept = json.loads(file.read_text())
        alike, costs, errors = (kept[name] for name in ("rows_alike", "costs", "errors"))
        expected = [set(), {str(SINGLE)}] if alike else [set(map(str, ROWS))]
        if not isinstance(alike, bool) or set(costs) not in expected:
            raise ValueError(alike)
        costs, errors = ({int(n): float(each[n]) for n in costs} for each in (costs, errors))
        found = Calibration(kept["one_row_ms"], costs, errors, kept["measured"], alike)
        if found.certain:
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass  # not there yet, or not what it should be
    with torch_threads(threads):
        calibration = measure(config, dtype)
    if not calibration.certain:
        logger.info("the machine is too busy to tell what padded rows cost: they are timed again with the next start")
        return calibration
    keep(file, dataclasses.asdict(calibration))
    return calibration


def measure(config: LlamaConfig, dtype: str, seconds: float = SECONDS) -> Calibration:
    """Try whether rows are alike and, where that takes anything, time it."""
    odd = _model(part_of(config, most=1), dtype, 8).odd_alone
    if odd is not None and not any(odd):
        return Calibration(None, {}, {}, datetime.date.today().isoformat(), rows_alike=True)
    logger.info("timing row-invariant arithmetic, once for this model on this machine: a few seconds")
    return _timed(config, dtype, odd is not None, seconds)


def _timed(config: LlamaConfig, dtype: str, alike: bool, seconds: float) -> Calibration:
    """Time a part of a model, in all numbers of rows in each turn and in a mixed order, for so many seconds.

    What other work on the machine does to one turn it does to all of it: costs are medians of the turns' ratios, and
    their errors the standard errors of these medians.
    """
    part = part_of(config)
    fastest = 0  # the name of plain decoding in its fastest form, of one row
    timed = (SINGLE,) if alike else ROWS
    forwards = {fastest: _model(part, dtype, 1), **dict.fromkeys(timed, _model(part, dtype, 8, row_invariant=alike))}
    turns: list[dict[int, float]] = []
    order = random.Random(0)
    for rows, model in forwards.items():  # not counted
        model.greedy([1] * max(rows, 1), POSITION)
    deadline = time.perf_counter() + seconds
    while len(turns) < LEAST_TURNS or time.perf_counter() < deadline:
        turn = {}
        for rows in order.sample(list(forwards), len(forwards)):
            began = time.perf_counter()
            forwards[rows].greedy([1] * max(rows, 1), POSITION)
            turn[rows] = 1000 * (time.perf_counter() - began)
        turns.append(turn)
    costs, errors = {}, {}
    for rows in timed:
        ratios = [turn[rows] / turn[fastest] for turn in turns]
        costs[rows] = statistics.median(ratios)
        spread = statistics.median(abs(ratio - costs[rows]) for ratio in ratios)
        errors[rows] = 1.86 * spread / len(ratios) ** 0.5  # of a median, from the median deviation of normal noise
    one_row = statistics.median(turn[fastest] for turn in turns)
    return Calibration(one_row, costs, errors, datetime.date.today().isoformat(), alike)


def _model(config: LlamaConfig, dtype: str, typical_rows: int, row_invariant: bool = False) -> TorchLlama:
    """One of these sizes, laid out for so many rows."""
    quantize = "int8" if dtype == "int8" else None
    return TorchLlama(
        config,
        RandomWeights(config),
        dtype="fp32" if quantize else dtype,
        max_seq_len=POSITION + max(ROWS),
        typical_rows=typical_rows,
        row_invariant=row_invariant,
        quantize=quantize,
    )


def part_of(config: LlamaConfig, most: int | None = None) -> LlamaConfig:
    """A model of as many layers as are worth timing, at most so many, and a vocabulary cut in the same proportion."""
    layers = config.num_hidden_layers
    share = min(1.0, PART_BYTES / (2 * config.parameter_count))
    kept = min(most or layers, max(1, round(share * layers)))
    vocab = max(64, -(-round(config.vocab_size * kept / layers) // 64) * 64)
    return dataclasses.replace(
        config,
        num_hidden_layers=kept,
        vocab_size=min(vocab, config.vocab_size),
        bos_token_id=None,
        eos_token_ids=(),
        max_position_embeddings=max(config.max_position_embeddings, POSITION + max(ROWS)),
    )


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads of torch while it is entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kept_file(config: LlamaConfig, what: str, threads: int, directory: Path | None = None) -> Path:
    """Where what was measured for models of these sizes on this machine is kept (default: the user's cache)."""
    return (directory or user_cache("calibration")) / f"{_key(config, what, threads)}.json"


def keep(file: Path, found: Mapping[str, Any]) -> None:
    """Write what was measured, if that is possible."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(found))
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        logger.debug(f"what was measured is not kept: {error}")


def _key(config: LlamaConfig, what: str, threads: int) -> str:
    """What a calibration depends on, in short."""
    parts = (
        *(what, torch.__version__, threads, _cpu()),
        *(config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size),
        *(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The processor's name and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
