"""What bounds decoding on this machine with this pair, and from which acceptance drafting pays.

A forward of the target is compared with the parts it consists of: its bare matrix products, its bare attention, and
the rest, which is the overhead of many small operations. Two lower bounds are beside it: weights and KV cache at the
rate the machine reads memory, its arithmetic at the rate of large matrix products. c and v are one step of
drafting and a verification of K + 1 rows, relative to a plain step; a draft of K tokens pays from the acceptance a on
for which (1 - a^(K+1)) / (1 - a) = c K + v. The pair's own acceptance is measured on the first prompts.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, DRAFT_TOKENS
from models.speculative.stats import GenerationStats
from scripts.suites import formula
from scripts.suites.measuring import shuffled, spread
from scripts.suites.report import header, number, percent, ranged, times
from scripts.suites.suite import Progress, Results, integer, model_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFUSED = ("--mode", "--drafter", "--num-draft-tokens", "--verification", "--temperature", "--top-k", "--top-p")
LENGTHS = (1, 2, 4, 6)  # for which break-even is told
PROMPTS = 4  # whose acceptance is measured
FORWARD, MATMULS, ATTENTION, DRAFT_STEP = "forward", "matmuls", "attention", "draft step"
MOST = 0.5  # of a forward's time


class Bottleneck:
    title = "What bounds this machine with this pair"
    repeats = 30

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--context", type=integer(1), default=256, metavar="N", help="position of the forwards (%(default)s)"
        )

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.settings = model_settings("bottleneck", rest, REFUSED, drafter="model", num_draft_tokens=AUTO)
        self.device = self.settings.device
        self.machine: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.operations: int | None = None
        self.stats: list[GenerationStats] = []

    def prepare(self) -> None:
        from scripts.suites.bench import Bench

        self.bench = Bench(self.settings)
        self.bench.prompts = self.bench.prompts[:PROMPTS]
        longest = self.bench.max_seq_len - max(LENGTHS) - 1
        if self.options.context > longest:
            raise UserError(f"--context {self.options.context} is more than {longest}: lower it or raise --max-seq-len")
        model = self.bench.target.model
        model.cache.fill(0.01)  # memory that was never written is read faster than any other
        self.computed_rows = model.computed_rows(1)

    # -------------------------------------------------------------------------------------------------- measuring
    def measure(self, progress: Progress) -> None:
        from scripts.suites import hardware, parts

        progress.begin(2, "reading memory, multiplying matrices")
        model, draft, context = self.bench.target.model, self.bench.draft.model, self.options.context
        self.machine["read_bytes_s"] = hardware.read_bandwidth(self.device)
        progress.step()
        self.machine["flops"] = hardware.gemm_flops(model.dtype, self.device)
        progress.step()
        self.operations = parts.count_operations(lambda: model.greedy([1], context))
        runs = {f"{FORWARD} {n}": lambda n=n: model.greedy([1] * n, context) for n in range(1, max(LENGTHS) + 2)}
        runs[MATMULS] = parts.bare_matmuls(model, self.computed_rows)
        runs[ATTENTION] = parts.bare_attention(model, self.computed_rows, context)
        runs[DRAFT_STEP] = lambda: draft.greedy([1], context)
        self._time(runs, progress)
        self._measure_acceptance(progress)

    def _time(self, runs: dict, progress: Progress) -> None:
        import time

        self.seconds = {name: [] for name in runs}
        progress.begin(len(runs) * (self.options.repeats + 2), "parts of a forward")
        for repeat in range(-2, self.options.repeats):  # two uncounted
            for name in shuffled(list(runs), repeat):
                began = time.perf_counter()
                runs[name]()
                if repeat >= 0:
                    self.seconds[name].append(time.perf_counter() - began)
                progress.step()

    def _measure_acceptance(self, progress: Progress) -> None:
        from scripts.suites.configurations import drafting_configuration, write

        configuration = drafting_configuration(self.bench, "model", DRAFT_TOKENS)
        progress.begin(len(self.bench.prompts), "acceptance")
        for prompt in self.bench.prompts:
            stats = write(configuration, prompt.ids, self.settings.max_new_tokens, self.bench.stop_ids).stats
            self.stats.append(stats)
            progress.step()

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.summary import describe_models, describe_settings

        circumstances = {
            "models": describe_models(self.bench),
            "settings": describe_settings(self.bench, self.options),
        }
        ms = {name: spread([1000 * value for value in values]) for name, values in self.seconds.items()}
        if not ms or not all(ms.values()):
            return {"machine_best": self.machine, "ms": ms, "bound": None, "lengths": {}, **circumstances}
        bounds = self._bounds({name: each["median"] / 1000 for name, each in ms.items()})
        a = formula.acceptance([round for stats in self.stats for round in stats.rounds])
        return {
            "machine_best": self.machine,
            "ms": ms,
            **bounds,
            "acceptance": a,
            "lengths": {str(k): self._length(k, a, ms) for k in LENGTHS},
            **circumstances,
        }

    def _bounds(self, seconds: dict[str, float]) -> Results:
        from scripts.suites import parts

        model = self.bench.target.model
        forward = seconds[f"{FORWARD} 1"]
        config, positions = model.config, self.options.context + self.computed_rows
        kv_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions
        reading_s = (model.weight_bytes + kv_values * model.dtype.itemsize) / self.machine["read_bytes_s"]
        arithmetic_s = parts.matmul_flops(model, self.computed_rows) / self.machine["flops"]
        rest_s = max(forward - seconds[MATMULS] - seconds[ATTENTION], 0.0)
        return {
            "bound": bound(forward, seconds[MATMULS], reading_s, arithmetic_s),
            "computed_rows": self.computed_rows,
            "weight_bytes": model.weight_bytes,
            "weights_gb_s": model.weight_bytes / forward / 1e9,
            "reading_ms": 1000 * reading_s,
            "arithmetic_ms": 1000 * arithmetic_s,
            "matmuls_share": seconds[MATMULS] / forward,
            "attention_share": seconds[ATTENTION] / forward,
            "rest_share": rest_s / forward,
            "operations": self.operations,
            "rest_us_per_operation": 1e6 * rest_s / max(self.operations or 1, 1),
        }

    def _length(self, k: int, a: float | None, ms: Results) -> Results:
        step = ms[f"{FORWARD} 1"]["median"]
        c, v = ms[DRAFT_STEP]["median"] / step, ms[f"{FORWARD} {k + 1}"]["median"] / step
        predicted = formula.speedup(a, k, c, v) if a is not None else None
        return {"c": c, "v": v, "break_even": formula.break_even(k, c, v), "predicted_speedup": predicted}

    # -------------------------------------------------------------------------------------------------- showing
    @staticmethod
    def markdown(results: Results) -> str:
        text = header(results, Bottleneck.title)
        if results["bound"] is None:
            return text
        text += f"**Bound by {results['bound']}.** {_WORDS[results['bound']]}\n\n"
        best, ms = results["machine_best"], results["ms"]
        lines = [
            ("forward of one token", ranged(ms[f"{FORWARD} 1"], number), "100%"),
            ("- matrix products alone", ranged(ms[MATMULS], number), percent(results["matmuls_share"])),
            ("- attention alone", ranged(ms[ATTENTION], number), percent(results["attention_share"])),
            (f"- the rest of {results['operations']} operations", "", percent(results["rest_share"])),
            ("weights and KV cache at the best reading rate", number(results["reading_ms"], 2), ""),
            ("arithmetic at the best rate", number(results["arithmetic_ms"], 2), ""),
            ("one step of the draft", ranged(ms[DRAFT_STEP], number), ""),
        ]
        text += markdown_table(("", "ms", "share"), lines)
        text += (
            f"Weights ({results['weight_bytes'] / 1e6:,.0f} MB) are read at {results['weights_gb_s']:.1f} GB/s; the "
            f"machine reads {best['read_bytes_s'] / 1e9:.1f} GB/s from memory, more where they stay in a cache, and "
            f"computes {best['flops'] / 1e9:,.0f} GFLOP/s. A forward computes {results['computed_rows']} rows. The "
            f"rest is {results['rest_us_per_operation']:.1f} µs an operation.\n\n"
        )
        lines = [
            (k, number(each["c"], 3), number(each["v"], 3), _pays_from(each), times(each["predicted_speedup"]))
            for k, each in results["lengths"].items()
        ]
        text += markdown_table(("K", "c", "v", "pays from acceptance", "by formula"), lines)
        return text + _advice(results)

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import COLOURS, new_figure

        figure, [parts, costs] = new_figure(width=10, columns=2)
        if results["bound"] is None:
            return figure
        forward = results["ms"][f"{FORWARD} 1"]["median"]
        bottom = 0.0
        for index, part in enumerate(("matmuls", "attention", "rest")):
            height = results[f"{part}_share"] * forward
            parts.bar(["forward"], [height], bottom=bottom, label=part, color=COLOURS[index])
            bottom += height
        parts.bar(["reading at\nbest rate"], [results["reading_ms"]], color=COLOURS[6])
        parts.bar(["arithmetic at\nbest rate"], [results["arithmetic_ms"]], color=COLOURS[7])
        parts.set_ylabel("ms")
        parts.legend(frameon=False)
        lengths = list(results["lengths"])
        levels = [1.0 if each["break_even"] is None else each["break_even"] for each in results["lengths"].values()]
        costs.bar(lengths, levels, color=COLOURS[0])
        if results["acceptance"] is not None:
            costs.axhline(results["acceptance"], color=COLOURS[1], label="measured acceptance")
            costs.legend(frameon=False)
        costs.set_xlabel("drafted tokens a round, K")
        costs.set_ylabel("acceptance from which drafting pays")
        costs.set_ylim(0, 1)
        return figure


def bound(forward_s: float, matmuls_s: float, reading_s: float, arithmetic_s: float) -> str:
    """What a forward is bound by: "weights" (reading them) or "compute" where that needs most of its time even at the
    machine's best rate; else "overhead" where most of it lies outside the matrix products, or "kernels" inside."""
    if max(reading_s, arithmetic_s) >= MOST * forward_s:
        return "weights" if reading_s >= arithmetic_s else "compute"
    return "overhead" if forward_s - matmuls_s > MOST * forward_s else "kernels"


_WORDS = {
    "weights": "A forward takes about as long as reading the weights, so further rows are nearly free: verification "
    "costs what a step does, and drafting pays from a low acceptance on. To change it: fewer bytes a weight, a machine "
    "that reads faster.",
    "compute": "A forward takes about as long as its arithmetic, so every further row costs: keep drafts short, and "
    "leave rows unpadded (--no-row-invariant). To change it: more threads, or a device with more arithmetic.",
    "overhead": "Most of a forward goes into many small operations, whatever the number of rows: verification is "
    "nearly free, but a draft step is dearer than the draft's size says, as its operations cost the same. To change "
    "it: a draft with fewer layers, prompt lookup, fewer and larger operations (fusion); larger models spend less.",
    "kernels": "The matrix products take much longer than memory or arithmetic would need: their shapes do not suit "
    "the kernels, or threads share them badly. To change it: another number of threads, other row counts.",
}


def _pays_from(each: Results) -> str:
    return "never" if each["break_even"] is None else number(each["break_even"], 2)


def _advice(results: Results) -> str:
    """What the measured acceptance says about this pair."""
    a = results["acceptance"]
    if a is None:
        return ""
    paying = {k: each for k, each in results["lengths"].items() if each["predicted_speedup"] > 1}
    text = f"The draft model's tokens are accepted with a chance of {a:.2f} each. "
    if not paying:
        return text + "By formula no length pays: use --drafter prompt-lookup, a cheaper draft, or plain decoding.\n"
    best = max(paying, key=lambda k: paying[k]["predicted_speedup"])
    return text + f"By formula K = {best} is best of these, {times(paying[best]['predicted_speedup'])}.\n"
