"""What a forward of n rows costs, by context and size: verification pays only if K + 1 rows cost about what one does.

    python scripts/benchmark.py verify-cost 1b 3b 8b     # sizes, with random weights made in memory
    python scripts/benchmark.py verify-cost DIR          # a checkpoint, beside transformers on the same weights

Configurations that take turns: this project's compiled layers, which have weights of their own; its layers in torch
with any number of rows, and with fixed rows (row-invariant arithmetic: every forward computes the same number);
transformers' LlamaForCausalLM, but for int8, which it does not have. A forward starts at position `context` of a cache
that holds nothing, which takes as long as one that does. Gigabytes per second: the weights over the time of one row, to
compare with what the machine reads at best.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.cli.tables import markdown_table
from models.errors import UserError
from models.llama.config import LlamaConfig, named_config
from models.options import FREE_ROWS, MAX_THREADS
from scripts.suites.measuring import shuffled, spread
from scripts.suites.report import header, number
from scripts.suites.suite import Progress, Results, integer, integers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPILED, ANY, HF = "compiled", "any rows", "HF"
LAYERS = (COMPILED, "torch")
MAX_ROWS = 32
WARM_UP = 1  # uncounted repetitions
Cell = tuple[str, int, int]  # configuration, context, rows


class VerifyCost:
    title = "Forwards by number of rows, context and size"
    repeats = 3
    device = "cpu"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "models",
            nargs="*",
            default=["1b", "3b", "8b"],
            metavar="SIZE|DIR",
            help="1b, 3b, 8b (random weights), or a checkpoint directory or hub id (1b 3b 8b)",
        )
        parser.add_argument("--dtype", choices=("bf16", "fp32", "int8"), default="bf16", help="(%(default)s)")
        parser.add_argument(
            "--rows", type=integers(1, MAX_ROWS), default=[1, 2, 3, 4, 5, 7, 8, 16, 32], metavar="LIST",
            help="row counts from 1 to 32 (1,2,3,4,5,7,8,16,32)",
        )  # fmt: skip
        parser.add_argument(
            "--contexts", type=integers(1), default=[128, 1024, 4096], metavar="LIST",
            help="positions of the first row (128,1024,4096)",
        )  # fmt: skip
        parser.add_argument("--fixed-rows", type=integer(1, MAX_ROWS), default=FREE_ROWS, help="(%(default)s)")
        parser.add_argument(
            "--layers", choices=(*LAYERS, "both"), default="both", help="own forms; both take the memory of two (both)"
        )
        parser.add_argument("--no-hf", action="store_true", help="leave transformers out, which doubles the memory")
        parser.add_argument(
            "--threads", type=integer(1, MAX_THREADS), metavar="N", help="CPU threads of torch (torch's own)"
        )

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        if rest:
            raise UserError(f"{rest[0]} is unknown to the suite verify-cost: see verify-cost --help")
        self.options = options
        self.beside_hf = not (options.no_hf or options.dtype == "int8")
        self.sources = [self._find(name) for name in options.models]
        self.bandwidth: float | None = None
        self.models: dict[str, Results] = {}
        self.skipped: list[Results] = []

    def _find(self, name: str) -> "tuple[str, LlamaConfig, object]":
        """Name, configuration, and the opened checkpoint or None for random weights."""
        from models.loading import open_model

        if not Path(name).expanduser().exists() and "/" not in name:
            try:
                config = named_config(name)
            except UserError as error:
                raise UserError(f"{error}, or a checkpoint directory") from error
            opened = None
        else:
            opened = open_model(name)
            config = opened.checkpoint.config
        longest = config.max_position_embeddings
        if max(self.options.contexts) + MAX_ROWS > longest:
            raise UserError(
                f"--contexts {max(self.options.contexts)} and {MAX_ROWS} rows are more than the context of {name}, "
                f"{longest} tokens: lower it"
            )
        return name, config, opened

    def prepare(self) -> None:
        import torch

        if self.options.threads:
            torch.set_num_threads(self.options.threads)

    # -------------------------------------------------------------------------------------------------- measuring
    def measure(self, progress: Progress) -> None:
        from loguru import logger

        from scripts.suites.hardware import available_bytes, read_bandwidth

        progress.begin(1, "reading memory")
        self.bandwidth = read_bandwidth()
        for name, config, opened in self.sources:
            free = available_bytes()
            forms = self._forms(config, opened, free)
            needed = self._needed_bytes(config, opened, len(forms))
            if needed > 0.95 * free:
                logger.warning(f"{name} skipped: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
                self.skipped.append({"model": name, "needed_bytes": needed, "free_bytes": free})
                continue
            self._measure_model(name, config, opened, forms, progress)
            gc.collect()  # the memory is for the next one
        if not self.models:
            raise UserError("no model fits into memory: choose a smaller size, or --no-hf for a checkpoint")

    def _forms(self, config: LlamaConfig, opened, free: float) -> tuple[str, ...]:
        """The forms of layers to time: where both are asked for and do not fit or do not work, compiled ones."""
        import torch

        from models.torch_llama.compiled import not_compiled
        from models.torch_llama.linear import int8_works

        asked = LAYERS if self.options.layers == "both" else (self.options.layers,)
        if not_compiled(config, torch.device("cpu")):
            return ("torch",)
        if self.options.dtype == "int8" and self.options.layers == "both" and not int8_works():
            return (COMPILED,)
        return asked if self._needed_bytes(config, opened, len(asked)) <= 0.95 * free else asked[:1]

    def _needed_bytes(self, config: LlamaConfig, opened, forms: int) -> int:
        """Weights as they are held (a tied table twice) in so many forms, caches, and one matrix more while loading."""
        value = {"int8": 1, "bf16": 2, "fp32": 4}[self.options.dtype]
        table = config.vocab_size * config.hidden_size
        tied = table * config.tie_word_embeddings
        weights = forms * (config.parameter_count + tied) + table
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        caches = forms * position * (max(self.options.contexts) + 2 * MAX_ROWS)
        if opened and self.beside_hf:
            weights += config.parameter_count
            caches += position * sum(self.options.contexts)
        if self.options.dtype == "int8":  # embedding and caches are fp32
            return weights + 4 * (table + caches)
        return value * (weights + caches)

    def _measure_model(self, name: str, config: LlamaConfig, opened, forms: Sequence[str], progress: Progress) -> None:
        from models.llama.random_weights import RandomWeights
        from models.torch_llama.model import TorchLlama

        options = self.options
        progress.begin(1, f"loading {name}")
        began = time.perf_counter()
        loaded: dict[str, TorchLlama] = {}
        for layers in forms:
            loaded[layers] = TorchLlama(
                config,
                opened.checkpoint if opened else RandomWeights(config),
                dtype="fp32" if options.dtype == "int8" else options.dtype,
                quantize="int8" if options.dtype == "int8" else None,
                max_seq_len=max(options.contexts) + MAX_ROWS,
                typical_rows=options.fixed_rows,
                compiled=layers == COMPILED,
            )
            loaded[layers].cache.fill(0.01)  # memory that was never written is read faster than any other
        load_s = time.perf_counter() - began
        forwards: dict[Cell, Callable] = {}
        for model in loaded.values():
            forwards |= own_forwards(model, options.rows, options.contexts, options.fixed_rows)
        if opened and self.beside_hf:
            forwards |= hf_forwards(opened.checkpoint, options.dtype, options.rows, options.contexts)
        seconds: dict[Cell, list[float]] = {cell: [] for cell in forwards}
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.models[name] = {
            "random_weights": opened is None,
            "parameters": config.parameter_count,
            "weight_bytes": model.weight_bytes,
            "kv_bytes_per_position": position * model.dtype.itemsize,
            "load_s": load_s,
            "seconds": seconds,
        }
        progress.begin(len(forwards) * (WARM_UP + options.repeats), f"{name}, warm-up")
        for repeat in range(-WARM_UP, options.repeats):
            for cell in shuffled(list(forwards), repeat):
                began = time.perf_counter()
                forwards[cell]()
                if repeat >= 0:
                    seconds[cell].append(time.perf_counter() - began)
                progress.step(f"{name}, repetition {repeat + 1} of {options.repeats}" if repeat >= 0 else "")

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        models = {name: self._model_results(model) for name, model in self.models.items()}
        settings = {
            name: getattr(self.options, name) for name in ("dtype", "rows", "contexts", "fixed_rows", "threads")
        }
        bandwidth = self.bandwidth and self.bandwidth / 1e9
        return {"read_gb_s": bandwidth, "models": models, "skipped": self.skipped, "settings": settings}

    def _model_results(self, model: Results) -> Results:
        configurations: Results = {}
        for (configuration, context, rows), seconds in model["seconds"].items():
            if not seconds:
                continue
            cell = spread([1000 * value for value in seconds])
            one = model["seconds"].get((configuration, context, 1))
            cell["ratio"] = spread([s / o for s, o in zip(seconds, one, strict=False)])["median"] if one else None
            configurations.setdefault(configuration, {}).setdefault(str(context), {})[str(rows)] = cell
        speed = {}
        for context, cells in configurations.get(COMPILED, configurations.get(ANY, {})).items():
            if one := cells.get("1"):
                kv = model["kv_bytes_per_position"] * int(context)
                speed[context] = {
                    "weights_gb_s": model["weight_bytes"] / one["median"] / 1e6,
                    "weights_and_kv_gb_s": (model["weight_bytes"] + kv) / one["median"] / 1e6,
                }
        return {key: value for key, value in model.items() if key != "seconds"} | {
            "ms": configurations,
            "one_row": speed,
        }

    # -------------------------------------------------------------------------------------------------- showing
    @staticmethod
    def markdown(results: Results) -> str:
        text = header(results, VerifyCost.title)
        if results["read_gb_s"]:
            text += f"The machine reads {results['read_gb_s']:.1f} GB/s at best.\n\n"
        for each in results["skipped"]:
            needed, free = each["needed_bytes"] / 1e9, each["free_bytes"] / 1e9
            text += f"{each['model']}: skipped, it needs {needed:.1f} GB and {free:.1f} GB were free.\n\n"
        for name, model in results["models"].items():
            kind = ", random weights" if model["random_weights"] else ""
            text += (
                f"## {name}: {model['weight_bytes'] / 1e9:.2f} GB of weights, {results['settings']['dtype']}{kind}\n\n"
            )
            rows = [str(n) for n in results["settings"]["rows"]]
            lines = []
            for configuration, contexts in model["ms"].items():
                for context, cells in contexts.items():
                    ms = [_cell(cells.get(n)) for n in rows]
                    fastest = COMPILED if COMPILED in model["ms"] else ANY
                    speed = model["one_row"].get(context) if configuration == fastest else None
                    lines.append((configuration, context, *ms, number(speed and speed["weights_and_kv_gb_s"])))
            text += markdown_table(("ms (ratio to one row)", "context", *rows, "GB/s"), lines) if lines else ""
        return text + "GB/s: weights and KV cache over the time of one row.\n"

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import COLOURS, new_figure

        models = results["models"]
        figure, axes = new_figure(width=5 * max(len(models), 1), columns=max(len(models), 1))
        styles = {COMPILED: "-", ANY: "-.", HF: ":"}
        for axis, (name, model) in zip(axes, models.items(), strict=False):
            for configuration, contexts in model["ms"].items():
                for index, (context, cells) in enumerate(contexts.items()):
                    rows = [int(n) for n in cells]
                    ratio = [cell["ratio"] or float("nan") for cell in cells.values()]
                    style, colour = styles.get(configuration, "--"), COLOURS[index % len(COLOURS)]
                    axis.plot(rows, ratio, style, color=colour, marker="o", label=f"{configuration}, context {context}")
            axis.axhline(1.0, color="black", linewidth=1)
            axis.set_title(name)
            axis.set_xlabel("rows of a forward")
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize=7)
        axes[0].set_ylabel("time relative to one row")
        return figure


def _cell(cell: Results | None) -> str:
    if cell is None:
        return ""
    ratio = "" if cell["ratio"] is None else f" ({cell['ratio']:.2f})"
    return f"{cell['median']:.1f}{ratio}"


def own_forwards(model, rows: Sequence[int], contexts: Sequence[int], fixed_rows: int) -> dict[Cell, Callable]:
    """Functions that run one forward. One set of weights serves both configurations of torch's layers."""

    def run(n: int, context: int, fixed: int | None) -> None:
        model.fixed_rows = fixed
        model.greedy([1] * n, context)

    forwards: dict[Cell, Callable] = {}
    for context in contexts:
        for n in rows:
            if model.compiled:
                forwards[COMPILED, context, n] = lambda n=n, context=context: run(n, context, None)
                continue
            forwards[ANY, context, n] = lambda n=n, context=context: run(n, context, None)
            if n <= fixed_rows:
                configuration = f"fixed {fixed_rows} rows"
                forwards[configuration, context, n] = lambda n=n, context=context: run(n, context, fixed_rows)
    return forwards


def hf_forwards(checkpoint, dtype: str, rows: Sequence[int], contexts: Sequence[int]) -> dict[Cell, Callable]:
    """The same through transformers, with a DynamicCache for each context, cropped back after each forward."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    from models.torch_llama.model import DTYPES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    ).eval()

    def filled(context: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.ones(1, context, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        return cache

    def run(n: int, cache: DynamicCache) -> None:
        out = model(input_ids=torch.ones(1, n, dtype=torch.long), past_key_values=cache)
        out.logits[0].argmax(-1).tolist()
        cache.crop(-n)

    caches = {context: filled(context) for context in contexts}
    return {(HF, context, n): lambda n=n, cache=cache: run(n, cache) for context, cache in caches.items() for n in rows}
