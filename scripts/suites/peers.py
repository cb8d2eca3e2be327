"""This project beside transformers and llama.cpp: same weights, prompts, threads and dtype, in one process.

    python scripts/benchmark.py peers                          # the embedded pair
    python scripts/benchmark.py peers --dtype fp32 --json peers.json
    python scripts/benchmark.py peers --target DIR --draft DIR --num-draft-tokens 3

All configurations write the same greedy text, prompt by prompt in turn. transformers' assistant runs twice: with this
project's number of draft tokens (constant, no confidence threshold) and with transformers' own defaults. llama.cpp
takes part where `pip install llama-cpp-python gguf` has been run; the weights are converted to a file of its own in a
temporary folder. A rate is new tokens over wall-clock seconds of the whole call, prefill included, the same for all.
Ratios are taken within one repetition; the median is reported, with the smallest and the largest.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, AUTO_LONGEST_FIXED, DRAFT_TOKENS
from scripts.suites.measuring import spread, turns
from scripts.suites.report import header, number, ranged
from scripts.suites.suite import Progress, Results, integer, model_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.suites.bench import Bench

OWN_PLAIN, OWN_MODEL, OWN_LOOKUP = "own baseline", "own speculative", "own prompt lookup"
OWN_AUTO = "own combined, auto"
HF_PLAIN, HF_LOOKUP = "HF generate", "HF prompt lookup, same K"
HF_ASSISTED, HF_DEFAULTS = "HF assisted, same K", "HF assisted, defaults"
LLAMA_PLAIN, LLAMA_MODEL = "llama.cpp", "llama.cpp draft model, same K"
LLAMA_LOOKUP = "llama.cpp prompt lookup, same K"
# What each is to be compared with.
COUNTERPART = {
    HF_PLAIN: OWN_PLAIN,
    HF_ASSISTED: OWN_MODEL,
    HF_DEFAULTS: OWN_MODEL,
    HF_LOOKUP: OWN_LOOKUP,
    LLAMA_PLAIN: OWN_PLAIN,
    LLAMA_MODEL: OWN_MODEL,
    LLAMA_LOOKUP: OWN_LOOKUP,
}
REFUSED = ("--mode", "--drafter", "--verification", "--draft-dtype", "--temperature", "--top-k", "--top-p")
Generate = Callable[[list[int]], list[int]]


class Peers:
    title = "Beside transformers and llama.cpp"
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
        parser.add_argument("--no-llama-cpp", action="store_true", help="leave llama.cpp out, if it is installed")

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.settings = model_settings("peers", rest, REFUSED, drafter="combined", num_draft_tokens=AUTO)
        self.device = self.settings.device
        if self.settings.dtype == "int8":
            raise UserError(
                "--dtype int8 has no meaning in the suite peers: transformers has no such matrices: use bf16"
            )
        self.rates: dict[str, list[float]] = {}
        self.texts: dict[str, list[list[int]]] = {}  # of the last complete repetition
        self.notes: list[str] = []

    def prepare(self) -> None:
        from scripts.suites.bench import Bench

        self.bench = Bench(self.settings)
        self.prompts = [prompt.ids for prompt in self.bench.prompts]

    def measure(self, progress: Progress) -> None:
        progress.begin(1, "loading the others")
        k = self.options.num_draft_tokens
        runners = {**own_runners(self.bench, k), **hf_runners(self.bench, k)}
        if not self.options.no_llama_cpp:
            runners |= self._llama_runners()
        self.rates = {name: [] for name in runners}
        progress.begin(len(runners) * len(self.prompts) * (1 + self.options.repeats), "warm-up")
        for repeat in range(-1, self.options.repeats):
            seconds, texts = dict.fromkeys(runners, 0.0), {name: [] for name in runners}
            for prompt, name in turns(repeat, len(self.prompts), list(runners)):
                began = time.perf_counter()
                ids = runners[name](self.prompts[prompt])
                seconds[name] += time.perf_counter() - began
                texts[name].append(ids)
                progress.step(f"repetition {repeat + 1} of {self.options.repeats}" if repeat >= 0 else "")
            if repeat >= 0:
                self.texts = texts
                for name, written in texts.items():
                    self.rates[name].append(sum(map(len, written)) / seconds[name])

    def _llama_runners(self) -> dict[str, Generate]:
        from scripts.suites.gguf_peer import llama_cpp_runners

        try:
            runners = llama_cpp_runners(self.bench, self.options.num_draft_tokens)
        except UserError as error:
            self.notes.append(str(error))
            return {}
        return dict(zip((LLAMA_PLAIN, LLAMA_MODEL, LLAMA_LOOKUP), runners, strict=True))

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.summary import describe_models, describe_settings

        configurations = {}
        for name, rates in self.rates.items():
            if not rates:
                continue
            same = sum(a == b for a, b in zip(self.texts[name], self.texts[OWN_PLAIN], strict=True))
            own = COUNTERPART.get(name)
            configurations[name] = {
                "tok_s": spread(rates),
                "same_text_as_own_baseline": same,
                "counterpart": own,
                "own_over_this": spread(best_ratio(self.rates, own, [name])) if own else None,
            }
        plain, model = None, None
        if configurations:
            plain = spread(best_ratio(self.rates, OWN_PLAIN, [HF_PLAIN]))
            model = spread(best_ratio(self.rates, OWN_MODEL, [HF_ASSISTED, HF_DEFAULTS]))
        return {
            "baseline_ratio": plain,
            "speculative_ratio": model,
            "ways": configurations,
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
            same = f"{configuration['same_text_as_own_baseline']} of {results['prompts']}"
            ratio = (
                f"{ranged(configuration['own_over_this'])} {configuration['counterpart']}"
                if configuration["counterpart"]
                else ""
            )
            rows.append((name, ranged(configuration["tok_s"], number), same, ratio))
        head = ("", "tok/s (median, smallest to largest)", "same text as own baseline", "own counterpart / this")
        text += markdown_table(head, rows) if rows else ""
        if results["baseline_ratio"]:
            text += (
                f"baseline / HF generate: {ranged(results['baseline_ratio'])}; speculative / best HF assisted: "
                f"{ranged(results['speculative_ratio'])}\n"
            )
        return text + "".join(f"\n{note}\n" for note in results["notes"])

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import grouped_bars

        bars = {"": [configuration["tok_s"] for configuration in results["ways"].values()]}
        return grouped_bars(list(results["ways"]), bars, "tokens per second, whole calls")


def best_ratio(rates: dict[str, list[float]], above: str, below: Sequence[str]) -> list[float]:
    """One rate over the best of some others, repetition by repetition."""
    return [own / max(others) for own, *others in zip(rates[above], *(rates[name] for name in below), strict=True)]


def own_runners(bench: "Bench", k: int) -> dict[str, Generate]:
    """This project's configurations with k draft tokens, as functions from prompt ids to new ids."""
    from scripts.suites.configurations import drafting_configuration, plain_configuration, write

    settings = bench.settings
    configurations = {
        OWN_PLAIN: plain_configuration(bench),
        OWN_MODEL: drafting_configuration(bench, "model", k),
        OWN_LOOKUP: drafting_configuration(bench, "prompt-lookup", k),
        OWN_AUTO: drafting_configuration(bench, "combined", AUTO),
    }

    def run(name: str, ids: list[int]) -> list[int]:
        return write(configurations[name], ids, settings.max_new_tokens, bench.stop_ids).tokens

    return {name: lambda ids, name=name: run(name, ids) for name in configurations}


def hf_runners(bench: "Bench", k: int) -> dict[str, Generate]:
    """transformers' configurations. Settings of assisted generation are read from the assistant's generation_config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from models.torch_llama.model import DTYPES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = bench.settings

    def load(opened):
        model = AutoModelForCausalLM.from_pretrained(
            opened.checkpoint.path, dtype=DTYPES[settings.dtype], attn_implementation="sdpa", local_files_only=True
        )
        return model.to(settings.device).eval()

    target, same_k, defaults = load(bench.target.opened), load(bench.draft.opened), load(bench.draft.opened)
    config = same_k.generation_config
    config.num_assistant_tokens = k
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0

    def run(ids: list[int], **options) -> list[int]:
        prompt = torch.tensor([ids], device=settings.device)
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=list(bench.stop_ids) or None,
            pad_token_id=0,
            use_cache=True,
            **options,
        )
        return out[0, len(ids) :].tolist()

    return {
        HF_PLAIN: run,
        HF_ASSISTED: lambda ids: run(ids, assistant_model=same_k),
        HF_DEFAULTS: lambda ids: run(ids, assistant_model=defaults),
        HF_LOOKUP: lambda ids: run(ids, prompt_lookup_num_tokens=k),
    }
