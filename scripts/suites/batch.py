"""Many texts at once: plain beside speculative decoding, by number of sequences and by load.

Each number of sequences is written in one go, from prompts that are taken in turn: tokens per second of all of them
together, prompts included; how long a reader waits for a token (a step's wait, shared out among the tokens that it
gave); the draft length that was chosen. Texts go on past stop tokens, so that as many sequences run to the end.

Then requests arrive at random, as a Poisson process, at shares of the rate that plain decoding keeps up with at the
largest number of sequences: time to first token from arrival on, waiting included, and tokens per second of a text.
Both configurations get the same requests at the same moments.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.cli.tables import markdown_table
from scripts.suites.configurations import check_drafted
from scripts.suites.measuring import percentile, ratios, shuffled, spread
from scripts.suites.report import header, number, percent, ranged
from scripts.suites.suite import Progress, Results, integer, integers, model_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from models.speculative.stats import GenerationStats

PLAIN, SPECULATIVE = "plain", "speculative"
REFUSED = ("--mode", "--verification", "--max-new-tokens")
SHARES = {"p50": 0.5, "p95": 0.95}
MOST = 256


def _loads(text: str) -> list[float]:
    """argparse type: shares of what plain decoding keeps up with, with commas between them; none for 0."""
    try:
        loads = sorted({float(part) for part in text.split(",")})
    except ValueError:
        loads = [-1.0]
    if not all(0 <= load <= 10 for load in loads):
        raise argparse.ArgumentTypeError(f"{text!r} are not loads: give numbers from 0 to 10, such as 0.3,0.6,0.9")
    return [load for load in loads if load]


@dataclass
class Written:
    """What became of one request: its tokens, and when each of them came, in seconds after it had come itself."""

    stats: "GenerationStats"
    arrived: float
    tokens: list[int] = field(default_factory=list)
    came: list[tuple[float, int]] = field(default_factory=list)  # seconds, tokens that came then

    @property
    def ttft_s(self) -> float:
        return self.came[0][0]

    @property
    def tok_s(self) -> float | None:
        """Of its decoding; None for a text of one step."""
        seconds = self.came[-1][0] - self.came[0][0]
        return (len(self.tokens) - self.came[0][1]) / seconds if seconds else None

    @property
    def waits(self) -> list[float]:
        """For each token but the first, its share of the wait for the step that gave it."""
        pairs = zip(self.came, self.came[1:], strict=False)
        return [(now - before) / count for (before, _), (now, count) in pairs for _ in range(count)]


@dataclass
class Run:
    """Requests that were written together, and seconds from the first arrival to the last token."""

    texts: list[Written]
    seconds: float

    @property
    def tok_s(self) -> float:
        return sum(len(each.tokens) for each in self.texts) / self.seconds


class Batch:
    """The suite."""

    title = "Many texts at once"
    repeats = 3

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--sequences",
            type=integers(1, MOST),
            default=[1, 2, 4, 8, 16, 32],
            metavar="N,N,..",
            help="numbers of texts that are written at once (1,2,4,8,16,32)",
        )
        parser.add_argument(
            "--pool-size",
            type=integer(2),
            metavar="N",
            help="tokens that the KV cache holds of all texts together (as many as they may have, if they fit)",
        )
        parser.add_argument("--new-tokens", type=integer(2), default=64, metavar="N", help="of each (%(default)s)")
        parser.add_argument(
            "--loads",
            type=_loads,
            default=[0.3, 0.6, 0.9],
            metavar="X,X,..",
            help="arrivals, as shares of the rate that plain decoding keeps up with; 0: none (0.3,0.6,0.9)",
        )
        parser.add_argument(
            "--requests", type=integer(2), default=64, metavar="N", help="that arrive at each load (%(default)s)"
        )

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.settings = model_settings(
            "batch",
            rest,
            REFUSED,
            slots=max(options.sequences),
            pool_size=options.pool_size,
            max_new_tokens=options.new_tokens,
        )
        self.device = self.settings.device
        self.runs: dict[int, list[dict[str, Run]]] = {n: [] for n in options.sequences}
        self.arrivals: dict[float, dict[str, Run]] = {}
        self.capacity: float | None = None

    def prepare(self) -> None:
        from scripts.suites.bench import Bench

        self.bench = Bench(self.settings)
        self.settings = self.bench.settings
        self.prompts = [prompt.ids for prompt in self.bench.prompts]
        self.draftings = {PLAIN: self.bench.llm.drafting("none"), SPECULATIVE: self.bench.llm.drafting()}

    # ------------------------------------------------------------------------------------------------- measuring
    def measure(self, progress: Progress) -> None:
        options = self.options
        progress.begin(2 * len(options.sequences) * (1 + options.repeats), "warm-up")
        for repeat in range(-1, options.repeats):  # one uncounted
            for n in shuffled(options.sequences, repeat):
                found = {}
                for name in shuffled(list(self.draftings), repeat * MOST + n):
                    found[name] = self._together(name, n)
                    progress.step("warm-up" if repeat < 0 else f"repetition {repeat + 1} of {options.repeats}")
                if repeat >= 0:
                    self.runs[n].append(found)
        rates = [each[PLAIN].tok_s for each in self.runs[max(options.sequences)]]
        self.capacity = sorted(rates)[len(rates) // 2] / options.new_tokens  # requests a second
        progress.begin(2 * len(options.loads), "arrivals")
        for load in options.loads:
            found = {}
            for name in self.draftings:
                found[name] = self._arriving(name, load * self.capacity)
                progress.step(f"arrivals at {load:g} of what plain decoding keeps up with")
            self.arrivals[load] = found

    def _together(self, name: str, n: int) -> Run:
        """Texts that all begin at once."""
        return self._written(name, [(0.0, i, self.options.new_tokens) for i in range(n)])

    def _arriving(self, name: str, rate: float) -> Run:
        """Requests at random moments, so many a second; each wants between a quarter and all of the new tokens."""
        draw, now, wanted = random.Random(self.settings.seed), 0.0, []
        most = self.options.new_tokens
        for i in range(self.options.requests):
            wanted.append((now, i, draw.randint(max(2, most // 4), most)))
            now += draw.expovariate(rate)
        return self._written(name, wanted)

    def _written(self, name: str, wanted: Sequence[tuple[float, int, int]]) -> Run:
        """Write requests, each (seconds after the beginning, which prompt, new tokens)."""
        llm, drafting, clock = self.bench.llm, self.draftings[name], time.perf_counter
        requests = []
        for arrives, i, new_tokens in wanted:
            ids = self.prompts[i % len(self.prompts)]
            request, _ = llm.request(
                ids, self.bench.sampling, max_new_tokens=new_tokens, stop_ids=(), speculate=drafting
            )
            requests.append((arrives, request))
        texts: dict[Any, Written] = {}
        coming = requests[::-1]
        began = clock()
        try:
            while coming or not llm.engine.idle:
                while coming and coming[-1][0] <= clock() - began:
                    arrives, request = coming.pop()
                    sequence = llm.engine.add(request)
                    texts[sequence] = Written(sequence.stats, arrives)
                if llm.engine.idle:
                    time.sleep(max(0.0, coming[-1][0] - (clock() - began)))
                    continue
                emissions = llm.engine.step()
                now = clock() - began
                for sequence, tokens in emissions:
                    if sequence.error is not None:
                        raise sequence.error
                    check_drafted(sequence.stats)
                    if tokens:
                        written = texts[sequence]
                        written.tokens += [token.id for token in tokens]
                        written.came.append((now - written.arrived, len(tokens)))
        finally:
            for sequence in texts:
                llm.engine.abort(sequence)
        return Run(list(texts.values()), clock() - began)

    # --------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.summary import describe_models, describe_settings

        settings, spec = self.settings, self.settings.spec
        assert spec is not None  # `model_settings` refuses a run without
        return {
            "drafter": spec.label.format(**settings.drafter_settings | {"exit_layer": self.bench.llm.exit_layer}),
            "forced": settings.force_acceptance is not None,
            "draft_length": settings.num_draft_tokens,
            "sequences": {str(n): self._compared(runs) for n, runs in self.runs.items() if runs},
            "plain_requests_s": self.capacity,
            "arrivals": {
                f"{load:g}": {name: _served(run) for name, run in found.items()}
                for load, found in self.arrivals.items()
            },
            "models": describe_models(self.bench) | {"kv_cache_held_bytes": held_bytes(self.bench.target.model)},
            "settings": describe_settings(self.bench, self.options),
        }

    def _compared(self, runs: Sequence[dict[str, Run]]) -> Results:
        """One number of sequences: both configurations, and one over the other, repetition by repetition."""
        rates = {name: [each[name].tok_s for each in runs] for name in self.draftings}
        pairs = [
            (a.tokens, b.tokens)
            for each in runs
            for a, b in zip(each[PLAIN].texts, each[SPECULATIVE].texts, strict=True)
        ]
        greedy = self.bench.sampling.greedy
        return {
            **{name: _written(rates[name], [each[name] for each in runs]) for name in self.draftings},
            "speedup": spread(ratios(rates[SPECULATIVE], rates[PLAIN])),
            "texts_equal": sum(a == b for a, b in pairs) if greedy else None,
            "texts": len(pairs),
        }

    @staticmethod
    def markdown(results: Results) -> str:
        text = header(results, Batch.title)
        if results["forced"]:
            text += f"**Forced:** {results['drafter']}; nothing here says how good a draft is.\n\n"
        text += f"Drafter: {results['drafter']}, draft length {results['draft_length']}.\n\n"
        if rows := sequence_rows(results):
            text += markdown_table(SEQUENCES, rows) + "\n"
        if rows := arrival_rows(results):
            rate = number(results["plain_requests_s"], 2)
            text += f"Arrivals; load 1 is {rate} requests a second.\n\n" + markdown_table(ARRIVALS, rows)
        return text

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import COLOURS, error_bars, new_figure

        figure, axes = new_figure(columns=2)
        numbers = [int(n) for n in results["sequences"]]
        for colour, name in zip(COLOURS, (PLAIN, SPECULATIVE), strict=False):
            medians, errors = error_bars([each[name]["tok_s"] for each in results["sequences"].values()])
            label = f"{results['drafter']}, K {results['draft_length']}" if name == SPECULATIVE else name
            axes[0].errorbar(numbers, medians, yerr=errors, marker="o", capsize=3, color=colour, label=label)
        axes[0].set_ylabel("tok/s of all texts, prompts included")
        medians, errors = error_bars([each["speedup"] for each in results["sequences"].values()])
        axes[1].errorbar(numbers, medians, yerr=errors, marker="o", capsize=3, color=COLOURS[2])
        axes[1].axhline(1.0, color="black", linewidth=1)
        axes[1].set_ylabel("speculative over plain")
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xticks(numbers, [str(n) for n in numbers])
            axis.set_xlabel("texts at once")
            axis.set_ylim(bottom=0)
        axes[0].legend(frameon=False)
        return figure


SEQUENCES = (
    *("texts at once", "plain tok/s", "speculative tok/s", "speculative / plain", "drafted a round", "accepted"),
    *("ms a token, plain p50 / p95", "speculative p50 / p95", "same text"),
)
ARRIVALS = (
    *("load", "TTFT ms, plain p50 / p95", "speculative p50 / p95"),
    *("tok/s of a text, plain p50 / p5", "speculative p50 / p5"),
)


def sequence_rows(results: Results) -> list[tuple]:
    """Of the table by number of sequences."""
    rows = []
    for n, each in results["sequences"].items():
        plain, speculative = each[PLAIN], each[SPECULATIVE]
        same = number(None) if each["texts_equal"] is None else f"{each['texts_equal']} of {each['texts']}"
        drafted = number(speculative["mean_draft_length"])
        rates = (ranged(every["tok_s"], lambda value: number(value, 0)) for every in (plain, speculative))
        waits = (_pair(every["wait_ms"], "p50", "p95") for every in (plain, speculative))
        accepted = percent(speculative["acceptance_rate"])
        rows.append((n, *rates, ranged(each["speedup"]), drafted, accepted, *waits, same))
    return rows


def arrival_rows(results: Results) -> list[tuple]:
    """Of the table by load."""
    return [
        (
            load,
            *(_pair(each[name]["ttft_ms"], "p50", "p95", 0) for name in (PLAIN, SPECULATIVE)),
            *(_pair(each[name]["tok_s"], "p50", "p5") for name in (PLAIN, SPECULATIVE)),
        )
        for load, each in results["arrivals"].items()
    ]


def _pair(values: Results | None, first: str, second: str, digits: int = 1) -> str:
    return number(None) if values is None else f"{number(values[first], digits)} / {number(values[second], digits)}"


def _percentiles(values: Sequence[float], shares: dict[str, float]) -> Results | None:
    return {name: percentile(values, share) for name, share in shares.items()} if values else None


def _written(rates: Sequence[float], runs: Sequence[Run]) -> Results:
    """One configuration at one number of sequences, over all repetitions."""
    from models.speculative.stats import GenerationStats

    texts = [text for run in runs for text in run.texts]
    stats = GenerationStats.merge(text.stats for text in texts)
    drafted = sum(round.drafted for round in stats.rounds)
    return {
        "tok_s": spread(rates),
        "wait_ms": _percentiles([1000 * wait for text in texts for wait in text.waits], SHARES),
        "ttft_ms": _percentiles([1000 * text.ttft_s for text in texts], SHARES),
        "mean_draft_length": drafted / len(stats.rounds) if stats.rounds else None,  # plain rounds included
        "plain_rounds": sum(not round.drafted for round in stats.rounds),
        "rounds": len(stats.rounds),
        "acceptance_rate": stats.acceptance_rate if drafted else None,
        "reused_tokens": stats.reused_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "host_share": stats.host_share,
    }


def _served(run: Run) -> Results:
    """One configuration at one load."""
    return {
        "requests": len(run.texts),
        "tok_s_all": run.tok_s,
        "ttft_ms": _percentiles([1000 * text.ttft_s for text in run.texts], SHARES),
        "tok_s": _percentiles([r for text in run.texts if (r := text.tok_s) is not None], {"p50": 0.5, "p5": 0.05}),
        "wait_ms": _percentiles([1000 * wait for text in run.texts for wait in text.waits], SHARES),
    }


def held_bytes(model: Any) -> int | None:
    """Memory that the model says its KV cache holds now; None where it does not tell."""
    usage = getattr(getattr(model, "cache", None), "usage", None)
    return None if usage is None else usage.held
