"""Fixed draft lengths beside the formula (1 - a^(K+1)) / ((1 - a) (c K + v)), and what the automatic length chooses.

a: the chance that a tried token is accepted, from the run with K itself. c: one step of drafting, v: a verification of
K + 1 rows, both relative to a plain step of the same repetition. Where formula and measurement differ, the rest is
split into what the formula leaves out, one after the other, each as a factor:

  position    tokens are not equally likely at all positions; "by position" is the formula with what was accepted there
  rounds      rounds that the end of the text cut short, and rounds that had nothing to draft from
  host        what happens outside both models
  prompt      the draft's reading of the prompt

Prompts and the drafter are chosen by the demos' flags (the default prompts, the draft model).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, AUTO_LONGEST_FIXED
from models.speculative.control.policy import MAX_DRAFT_LENGTH
from models.speculative.stats import GenerationStats
from scripts.suites import formula
from scripts.suites.measuring import spread, turns
from scripts.suites.report import header, number, percent, ranged, times
from scripts.suites.suite import Progress, Results, integer, model_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.suites.configurations import Sample

REFUSED = ("--mode", "--num-draft-tokens", "--verification")
PREDICTED = ("a", "c", "v", "formula", "formula_by_position")
PARTS = ("position", "rounds", "host", "prompt")
WORTH_A_WORD = 0.1  # deviation of the measurement from the formula


class Sweep:
    title = "Draft lengths, measured and by formula"
    repeats = 5

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--longest",
            type=integer(1, MAX_DRAFT_LENGTH),
            default=16,
            metavar="K",
            help=f"lengths from 0 to this one, at most {MAX_DRAFT_LENGTH} (%(default)s)",
        )

        parser.add_argument("--max-new-tokens", type=integer(2), default=48, metavar="N", help="(%(default)s)")

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        chosen = {"num_draft_tokens": AUTO, "max_new_tokens": options.max_new_tokens}
        if options.longest > AUTO_LONGEST_FIXED:
            if "--row-invariant" in rest:
                raise UserError(
                    f"--row-invariant computes {AUTO_LONGEST_FIXED + 1} rows: give --longest {AUTO_LONGEST_FIXED} with "
                    "it, or leave it out"
                )
            chosen["row_invariant"] = False
        else:  # rows for the longest are computed, whatever they cost
            chosen["free_rows"] = (options.longest + 1,)
        settings = model_settings("sweep", rest, REFUSED, **chosen)
        self.settings = settings if settings.drafter else dataclasses.replace(settings, drafter="model")
        self.device = settings.device
        self.configurations = []
        self.repetitions: list[dict[str, list[Sample]]] = []  # [repetition][configuration]: a sample for each prompt

    def prepare(self) -> None:
        from scripts.suites.bench import Bench

        self.bench = Bench(self.settings)
        self.settings = self.bench.settings
        self.prompts = [prompt.ids for prompt in self.bench.prompts]

    def measure(self, progress: Progress) -> None:
        from scripts.suites.configurations import drafting_configuration, plain_configuration, prepare_lengths, write

        lengths = (*range(self.options.longest + 1), AUTO)
        drafting = [drafting_configuration(self.bench, self.settings.drafter, length) for length in lengths]
        self.configurations = [plain_configuration(self.bench), *drafting]
        progress.begin(self.options.repeats * len(self.prompts) * len(self.configurations), "warm-up")
        prepare_lengths(self.bench, self.prompts)
        new_tokens, stop_ids = self.settings.max_new_tokens, self.bench.stop_ids
        for configuration in self.configurations:
            write(configuration, self.prompts[0], new_tokens, stop_ids)
        for repeat in range(self.options.repeats):
            runs: dict[str, list[Sample]] = {configuration.name: [] for configuration in self.configurations}
            for prompt, configuration in turns(repeat, len(self.prompts), self.configurations):
                runs[configuration.name].append(write(configuration, self.prompts[prompt], new_tokens, stop_ids))
                progress.step(f"repetition {repeat + 1} of {self.options.repeats}")
            self.repetitions.append(runs)

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.configurations import PLAIN
        from scripts.suites.summary import describe_models, describe_settings, summarise

        runs = {
            configuration.name: [each[configuration.name] for each in self.repetitions]
            for configuration in self.configurations
        }
        configurations = {}
        if self.repetitions:
            configurations = {
                configuration.name: summarise(configuration, runs[configuration.name], runs[PLAIN])
                for configuration in self.configurations
            }
        lengths = {
            str(configuration.length): configurations[configuration.name]
            | self._predicted(configuration.length, runs[configuration.name], runs[PLAIN])
            for configuration in self.configurations
            if configuration.drafter and configuration.length != AUTO and configurations
        }
        best = max(lengths, key=lambda k: (lengths[k]["speedup"] or {"median": 0.0})["median"]) if lengths else None
        return {
            "drafter": self.settings.drafter,
            "plain": configurations.get(PLAIN),
            "lengths": lengths,
            "best": best and int(best),
            "auto": configurations.get(f"{self.settings.drafter} {AUTO}"),
            "models": describe_models(self.bench),
            "settings": describe_settings(self.bench, self.options),
        }

    def _predicted(self, k: int, runs: "list[list[Sample]]", plain: "list[list[Sample]]") -> Results:
        """a, c, v, the formula and the factors that lead from it to the measurement, each by repetition."""
        stats = [(_merged(samples), _merged(base)) for samples, base in zip(runs, plain, strict=True)]
        explained = [each for each in (explain(k, run, base) for run, base in stats) if each]
        gathered = {key: spread([each[key] for each in explained]) for key in PREDICTED}
        factors = {part: spread([each["factors"][part] for each in explained]) for part in PARTS}
        deviations = spread([each["measured"] / each["formula"] - 1 for each in explained])
        return gathered | {"factors": factors, "deviation": deviations}

    # -------------------------------------------------------------------------------------------------- showing
    @staticmethod
    def markdown(results: Results) -> str:
        text = header(results, Sweep.title) + f"Drafter: {results['drafter']}.\n\n"
        rows = []
        for k, each in results["lengths"].items():
            factors = [number(_median(each["factors"][part]), 2) for part in PARTS]
            abc = [number(_median(each[key]), 2) for key in ("a", "c", "v")]
            measured, by_position = ranged(each["speedup"]), times(_median(each["formula_by_position"]))
            deviation = _signed(_median(each["deviation"]))
            predicted = times(_median(each["formula"])), deviation, by_position
            rows.append((k, measured, *predicted, *abc, *factors, _same(each)))
        head = ("K", "measured", "formula", "deviation", "by position", "a", "c", "v", *PARTS, "same text")
        text += markdown_table(head, rows) if rows else ""
        if auto := results["auto"]:
            drafted = number(auto["mean_draft_length"], 2)
            text += (
                f"auto: {ranged(auto['speedup'])}, {drafted} tokens in a round that drafts, {auto['plain_rounds']} of "
                f"{auto['rounds']} rounds plain. Best fixed length: {results['best']}.\n\n"
            )
        return text + "".join(_words(k, each) for k, each in results["lengths"].items())

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import COLOURS, error_bars, new_figure

        figure, [axis] = new_figure()
        lengths = [int(k) for k in results["lengths"]]
        medians, errors = error_bars([each["speedup"] for each in results["lengths"].values()])
        axis.errorbar(lengths, medians, yerr=errors, marker="o", capsize=3, color=COLOURS[0], label="measured")
        formula_line = [_median(each["formula"]) or float("nan") for each in results["lengths"].values()]
        axis.plot(
            lengths, formula_line, marker="s", linestyle="--", color=COLOURS[1], label="formula, measured a, c, v"
        )
        axis.axhline(1.0, color="black", linewidth=1)
        if (auto := results["auto"]) and auto["speedup"]:
            [height], error = error_bars([auto["speedup"]])
            place = auto["mean_draft_length"] or 0.0
            label = f"auto (K = {place:.1f} on average)"
            axis.errorbar([place], [height], yerr=error, marker="*", markersize=14, color=COLOURS[2], label=label)
        axis.set_xlabel("drafted tokens a round, K")
        axis.set_ylabel("speed-up over plain decoding")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        return figure


def explain(k: int, run: GenerationStats, plain: GenerationStats) -> Results | None:
    """From the formula to the measured speed-up of one repetition: a, c, v, formula, measured, and factors whose
    product is measured / formula. None if no round of full length was there to say what a, c and v are."""
    step = sum(round.verify_s for round in plain.rounds) / max(len(plain.rounds), 1)
    rated = [round for round in run.rounds if round.drafted and not round.cut] if k else run.rounds
    if not rated or not step:
        return None
    depth = sum(round.depth for round in rated) / len(rated)
    a = formula.acceptance(run.rounds) if k else None
    c = sum(round.draft_s for round in rated) / len(rated) / depth / step if depth else 0.0
    v = sum(round.verify_s for round in rated) / len(rated) / step
    draft_s, verify_s, host_s = (
        sum(getattr(r, name) for r in run.rounds) for name in ("draft_s", "verify_s", "host_s")
    )
    # Each with one more part of the truth, the last one being what was measured.
    chain = [
        formula.speedup(a or 0.0, k, c, v),
        run.mean_acceptance_length / (c * depth + v),
        run.decode_tokens / (draft_s + verify_s) * step,
        run.decode_tokens / (draft_s + verify_s + host_s) / plain.tok_s,
        run.tok_s / plain.tok_s,
    ]
    factors = {part: after / before for part, before, after in zip(PARTS, chain, chain[1:], strict=False)}
    predicted = {"a": a, "c": c, "v": v, "formula": chain[0], "formula_by_position": chain[1]}
    return predicted | {"measured": chain[-1], "factors": factors}


def _merged(samples: "list[Sample]") -> GenerationStats:
    return GenerationStats.merge([sample.stats for sample in samples])


def _median(values: Results | None) -> float | None:
    return values and values["median"]


def _same(each: Results) -> str:
    return number(None) if each["texts_equal"] is None else f"{each['texts_equal']} of {each['texts']}"


def _words(k: str, each: Results) -> str:
    """What the formula leaves out, where that is worth a word."""
    deviation = _median(each["deviation"])
    if deviation is None or abs(deviation) <= WORTH_A_WORD:
        return ""
    by_position = " ".join(map(percent, each["acceptance_by_position"]))
    reasons = {
        "position": f"acceptance is not equal along the draft ({by_position} get so far)",
        "rounds": "rounds cut short by the end of the text, or with nothing to draft from",
        "host": f"work outside both models ({percent(each['host_share'])} of the time)",
        "prompt": f"the draft's reading of the prompt ({each['draft_prefill_ms']:.1f} ms a text)",
    }
    parts = {part: each["factors"][part]["median"] - 1 for part in PARTS}
    told = [f"{_signed(parts[part])} {reasons[part]}" for part in PARTS if abs(parts[part]) >= 0.01]
    return f"- K = {k}: {_signed(deviation)} from the formula: {'; '.join(told)}.\n"


def _signed(share: float | None) -> str:
    return number(None) if share is None else f"{100 * share:+.0f}%"
