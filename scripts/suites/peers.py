"""This project beside transformers, llama.cpp and OpenVINO: same weights, prompts, threads and dtype, in one process.

    python scripts/benchmark.py peers                          # the embedded pair
    python scripts/benchmark.py peers --dtype fp32 --json peers.json
    python scripts/benchmark.py peers --target smollm2 --peers llama.cpp,openvino
    python scripts/benchmark.py peers --target DIR --draft DIR --num-draft-tokens 3 --random-prompts 4x64

All configurations write the same greedy text, prompt by prompt in turn. llama.cpp and OpenVINO take part where
`pip install -e '.[peers]'` has been run (llama.cpp also with llama-cpp-python); they get token ids and give token ids,
and the weights are written for them to a temporary folder. What cannot take part is left out, with a line that says
why; so are the rows of the draft model where no draft fits the target. transformers' assistant runs twice: with this
project's number of draft tokens (constant, no confidence threshold) and with transformers' own defaults. A rate is new
tokens over wall-clock seconds of the whole call, prefill included, the same for all; the time to the first token is
what the program itself says, where it does. Ratios are taken within one repetition; the median is reported, with the
smallest and the largest.
"""

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, AUTO_LONGEST_FIXED, DRAFT_TOKENS
from scripts.suites.measuring import spread, turns
from scripts.suites.peer import (
    COUNTERPART,
    HF_ASSISTED,
    HF_DEFAULTS,
    HF_PLAIN,
    OWN_AUTO,
    OWN_AUTO_LOOKUP,
    OWN_HEAD,
    OWN_LOOKUP,
    OWN_MODEL,
    OWN_PLAIN,
    Generate,
    Peer,
    Written,
)
from scripts.suites.report import header, number, percent, ranged
from scripts.suites.suite import Progress, Results, integer, model_settings, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.suites.bench import Bench

REFUSED = ("--mode", "--drafter", "--verification", "--draft-dtype", "--temperature", "--top-k", "--top-p")


def llama_peer(bench: "Bench", k: int) -> Peer:
    """llama.cpp through whichever binding is installed; the one that needs no compiler if both are."""
    from scripts.suites.gguf_peer import llama_cpp_python_peer
    from scripts.suites.xllamacpp_peer import xllamacpp_peer

    installed = importlib.util.find_spec
    compiled = installed("llama_cpp") and not installed("xllamacpp")
    return llama_cpp_python_peer(bench, k) if compiled else xllamacpp_peer(bench, k)


def transformers_peer(bench: "Bench", k: int) -> Peer:
    from scripts.suites.hf_peer import hf_peer

    return hf_peer(bench, k)


def openvino_peer(bench: "Bench", k: int) -> Peer:
    from scripts.suites.openvino_peer import openvino_peer

    return openvino_peer(bench, k)


PEERS: dict[str, Callable[["Bench", int], Peer]] = {
    "transformers": transformers_peer,
    "llama.cpp": llama_peer,
    "openvino": openvino_peer,
}


class Peers:
    title = "Beside transformers, llama.cpp and OpenVINO"
    repeats = 5

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--num-draft-tokens",
            type=integer(1, AUTO_LONGEST_FIXED),
            default=DRAFT_TOKENS,
            metavar="K",
            help="(%(default)s)",
        )
        parser.add_argument(
            "--peers",
            type=names(list(PEERS)),
            default=list(PEERS),
            metavar="NAMES",
            help=f"which of {','.join(PEERS)} take part, if they are installed (all)",
        )

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.settings = model_settings("peers", rest, REFUSED, num_draft_tokens=AUTO)
        self.device = self.settings.device
        if self.settings.dtype == "int8":
            raise UserError(
                "--dtype int8 has no meaning in the suite peers: transformers has no such matrices: use bf16"
            )
        self.rates: dict[str, list[float]] = {}
        self.ttft: dict[str, list[float | None]] = {}  # medians over the prompts
        self.texts: dict[str, list[list[int]]] = {}  # of the last complete repetition
        self.peers: dict[str, Results] = {}
        self.notes: list[str] = []

    def prepare(self) -> None:
        from scripts.suites.bench import Bench

        self.bench = Bench(self.settings)
        self.prompts = [prompt.ids for prompt in self.bench.prompts]

    def measure(self, progress: Progress) -> None:
        progress.begin(len(self.options.peers), "loading the others")
        runners = own_runners(self.bench, self.options.num_draft_tokens) | self._others(progress)
        self.rates, self.ttft = {name: [] for name in runners}, {name: [] for name in runners}
        progress.begin(len(runners) * len(self.prompts) * (1 + self.options.repeats), "warm-up")
        for repeat in range(-1, self.options.repeats):
            seconds = dict.fromkeys(runners, 0.0)
            texts: dict[str, list[Written]] = {name: [] for name in runners}
            for prompt, name in turns(repeat, len(self.prompts), list(runners)):
                began = time.perf_counter()
                text = runners[name](self.prompts[prompt])
                seconds[name] += time.perf_counter() - began
                texts[name].append(text)
                progress.step(f"repetition {repeat + 1} of {self.options.repeats}" if repeat >= 0 else "")
            if repeat >= 0:
                self.texts = {name: [text.ids for text in written] for name, written in texts.items()}
                for name, written in texts.items():
                    self.rates[name].append(sum(len(text.ids) for text in written) / seconds[name])
                    waits = [text.ttft_s for text in written if text.ttft_s is not None]
                    self.ttft[name].append(1000 * statistics.median(waits) if waits else None)

    def _others(self, progress: Progress) -> dict[str, Generate]:
        """Rows of the peers that take part; what is left out is noted."""
        runners: dict[str, Generate] = {}
        if not self.bench.draft_model:
            self.notes.append("rows of a draft model are left out: none fits the target")
        for name in self.options.peers:
            try:
                peer = PEERS[name](self.bench, self.options.num_draft_tokens)
            except UserError as error:
                self.notes.append(str(error))
                continue
            except OSError as error:
                why = error.strerror or error
                self.notes.append(f"{name} is left out: cannot write its weights ({why}): set TMPDIR to another disk")
                continue
            finally:
                progress.step(name)
            runners |= peer.ways
            self.notes += peer.notes
            facts = ("version", "precision", "cache", "threads")
            self.peers[name] = {fact: getattr(peer, fact) for fact in facts}
        return runners

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.summary import describe_models, describe_settings

        configurations = {}
        for name, rates in self.rates.items():
            if not rates:
                continue
            same = sum(a == b for a, b in zip(self.texts[name], self.texts[OWN_PLAIN], strict=True))
            own = COUNTERPART.get(name)
            own = own if own in self.rates else None
            configurations[name] = {
                "tok_s": spread(rates),
                "ttft_ms": spread(self.ttft[name]),
                "same_text_as_own_baseline": same,
                "same_ids_share": same_share(self.texts[name], self.texts[OWN_PLAIN]),
                "counterpart": own,
                "own_over_this": spread(best_ratio(self.rates, own, [name])) if own else None,
            }
        plain, model = None, None
        if configurations and HF_PLAIN in configurations:
            plain = spread(best_ratio(self.rates, OWN_PLAIN, [HF_PLAIN]))
        if configurations and HF_ASSISTED in configurations:
            model = spread(best_ratio(self.rates, OWN_MODEL, [HF_ASSISTED, HF_DEFAULTS]))
        return {
            "baseline_ratio": plain,
            "speculative_ratio": model,
            "ways": configurations,
            "peers": self.peers,
            "notes": self.notes,
            "prompts": len(self.prompts),
            "models": describe_models(self.bench),
            "settings": describe_settings(self.bench, self.options),
        }

    # -------------------------------------------------------------------------------------------------- showing
    @staticmethod
    def markdown(results: Results) -> str:
        text, rows = header(results, Peers.title), []
        for name, configuration in results["ways"].items():
            same = same_text(configuration, results)
            ratio = (
                f"{ranged(configuration['own_over_this'])} {configuration['counterpart']}"
                if configuration["counterpart"]
                else ""
            )
            first = ranged(configuration["ttft_ms"], number)
            rows.append((name, ranged(configuration["tok_s"], number), first, same, ratio))
        head = ("", "tok/s (median, smallest to largest)", "ms to first token", "same text as own baseline",
                "own counterpart / this")  # fmt: skip
        text += markdown_table(head, rows) if rows else ""
        compared = (
            ("baseline / HF generate", "baseline_ratio"),
            ("speculative / best HF assisted", "speculative_ratio"),
        )
        lines = [f"{label}: {ranged(results[key])}" for label, key in compared if results[key]]
        text += "; ".join(lines) + "\n" if lines else ""
        text += "".join(f"\n{line}\n" for line in peer_lines(results))
        return text + "".join(f"\n{note}\n" for note in results["notes"])

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import grouped_bars

        bars = {"": [configuration["tok_s"] for configuration in results["ways"].values()]}
        return grouped_bars(list(results["ways"]), bars, "tokens per second, whole calls")


def best_ratio(rates: dict[str, list[float]], above: str, below: Sequence[str]) -> list[float]:
    """One rate over the best of some others, repetition by repetition."""
    return [own / max(others) for own, *others in zip(rates[above], *(rates[name] for name in below), strict=True)]


def same_share(texts: list[list[int]], own: list[list[int]]) -> float:
    """The share of all ids of our own texts that stand before the first difference."""
    equal = sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=False))))
                for pair in zip(texts, own, strict=True))  # fmt: skip
    return equal / max(sum(map(len, own)), 1)


def same_text(configuration: Results, results: Results) -> str:
    """A cell: how many texts are ours, and of those that are not how much is."""
    count, share = configuration["same_text_as_own_baseline"], configuration.get("same_ids_share")
    differs = f" ({percent(share)} of ids)" if share is not None and count < results["prompts"] else ""
    return f"{count} of {results['prompts']}{differs}"


def peer_lines(results: Results) -> list[str]:
    """One line for each peer: version, precision, threads."""
    return [
        f"{peer['version']}: {peer['precision']}, KV cache {peer['cache']}, {peer['threads']} threads"
        for peer in results.get("peers", {}).values()
    ]


def own_runners(bench: "Bench", k: int) -> dict[str, Generate]:
    """This project's configurations with k draft tokens. Without a draft those that copy."""
    from scripts.suites.configurations import drafting_configuration, plain_configuration, write

    settings = bench.settings
    configurations = {OWN_PLAIN: plain_configuration(bench)}
    if bench.draft:
        name = OWN_MODEL if bench.draft_model else OWN_HEAD
        configurations[name] = drafting_configuration(bench, bench.drafts_alone, k)
    configurations[OWN_LOOKUP] = drafting_configuration(bench, "prompt-lookup", k)
    name, drafter = (OWN_AUTO, "combined") if bench.draft else (OWN_AUTO_LOOKUP, "prompt-lookup")
    configurations[name] = drafting_configuration(bench, drafter, AUTO)

    def run(name: str, ids: list[int]) -> Written:
        sample = write(configurations[name], ids, settings.max_new_tokens, bench.stop_ids)
        return Written(sample.tokens, sample.stats.ttft_s)

    return {name: lambda ids, name=name: run(name, ids) for name in configurations}
