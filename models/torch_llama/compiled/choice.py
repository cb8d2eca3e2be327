"""Whether compiled layers are faster than torch's for a model on this machine: timed once, and kept."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import statistics
import time
from pathlib import Path

import torch
from loguru import logger

from models.llama.config import LlamaConfig
from models.llama.random_weights import RandomWeights
from models.torch_llama.calibration import POSITION, keep, kept_file, part_of, torch_threads
from models.torch_llama.compiled import not_compiled
from models.torch_llama.linear import int8_works
from models.torch_llama.model import TorchLlama

READ, WRITTEN = 200, 100  # tokens of a turn of a chat
READ_TIMED = 64  # of those read, that are timed
SECONDS, LEAST_TURNS = 1.5, 3
CERTAIN = 0.05  # largest relative error of a ratio that says something
VERSION = 1  # of what is measured and kept


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A turn of a chat in torch's layers and in compiled ones, decoded plainly.

    Args:
        ratio: time in torch's over that in compiled ones.
        error: of the ratio.
        measured: when, an ISO date.
    """

    ratio: float
    error: float
    measured: str

    @property
    def faster(self) -> bool:
        """Whether compiled layers are."""
        return self.ratio > 1

    @property
    def certain(self) -> bool:
        """Whether it is worth keeping: it tells which is faster, or that both take about the same."""
        return self.error <= max(CERTAIN * self.ratio, abs(self.ratio - 1) / 3)


def compare(config: LlamaConfig, dtype: str, threads: int | None = None, directory: Path | None = None) -> Comparison:
    """The comparison for models of these sizes: kept from before, or measured now in a few seconds.

    Args:
        config: of the model; its layers can be compiled.
        dtype: as of `TorchLlama`, or "int8".
        threads: of torch (default: those it has).
        directory: where it is kept (default: in the user's cache directory).
    """
    threads = threads or torch.get_num_threads()
    file = kept_file(config, f"compiled {VERSION} {dtype}", threads, directory)
    try:
        kept = json.loads(file.read_text())
        return Comparison(float(kept["ratio"]), float(kept["error"]), str(kept["measured"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass  # not there yet, or not what it should be
    with torch_threads(threads):
        found = measure(config, dtype)
    if found.certain:
        keep(file, dataclasses.asdict(found))
    return found


def measure(config: LlamaConfig, dtype: str, seconds: float = SECONDS) -> Comparison:
    """Time a part of a model in both forms, in each turn one after the other, for so many seconds."""
    logger.info("compiling layers, and timing them beside torch's, once for this model on this machine")
    part = part_of(config)
    models = [
        TorchLlama(
            part,
            RandomWeights(part),
            dtype="fp32" if dtype == "int8" else dtype,
            max_seq_len=POSITION + READ_TIMED,
            quantize="int8" if dtype == "int8" else None,
            compiled=compiled,
        )
        for compiled in (False, True)
    ]
    order = random.Random(0)
    ratios: list[float] = []
    for model in models:  # not counted
        _turn(model)
    deadline = time.perf_counter() + seconds
    while len(ratios) < LEAST_TURNS or time.perf_counter() < deadline:
        times = {model.compiled: _turn(model) for model in order.sample(models, 2)}
        ratios.append(times[False] / times[True])
    ratio = statistics.median(ratios)
    spread = statistics.median(abs(each - ratio) for each in ratios)
    return Comparison(ratio, 1.86 * spread / len(ratios) ** 0.5, datetime.date.today().isoformat())


def _turn(model: TorchLlama) -> float:
    """Seconds of a turn, from those of a part of it."""
    began = time.perf_counter()
    model.prefill([1] * READ_TIMED)
    read = time.perf_counter()
    steps = 4
    for step in range(steps):
        model.greedy([1], POSITION + step)
    return (read - began) * READ / READ_TIMED + (time.perf_counter() - read) * WRITTEN / steps


def compiles(config: LlamaConfig, dtype: str, threads: int | None = None) -> bool:
    """Whether a model's layers are to be compiled: they can be, and are faster so."""
    if not_compiled(config, torch.device("cpu")):
        return False
    return (dtype == "int8" and not int8_works()) or compare(config, dtype, threads).faster
