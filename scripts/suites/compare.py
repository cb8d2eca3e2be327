"""Every configuration of drafting beside plain decoding, by kind of text.

Configurations: plain decoding; the drafter of --auto-drafter with every fixed length and with its automatic one; the
other drafters with the lengths of --other-lengths and automatically; the draft model verified token by token. Prompt by
prompt all of them take turns. A configuration's speed-up is its tokens per second over plain decoding's within one
repetition, all prompts of a category together; the median over repetitions is reported, with the smallest and the
largest.

Where the draft is unrelated, the draft model drafts alone whatever --auto-drafter says, so that nothing is accepted.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.cli.prompts import Prompt
from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, DRAFT_TOKENS
from models.speculative.control.policy import MAX_DRAFT_LENGTH
from models.speculative.drafters import registry
from scripts.suites.categories import CATEGORIES, CHAT, random_ids, read_texts
from scripts.suites.measuring import ratios, spread, turns, winner
from scripts.suites.report import header, number, percent, ranged, times
from scripts.suites.suite import Progress, Results, integer, integers, model_settings, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.suites.configurations import Configuration, Sample

NEW_TOKENS = 48
REFUSED = ("--mode", "--drafter", "--num-draft-tokens", "--verification", "--prompts", "--prompt", "--random-prompts")
DRAFTING = tuple(spec.name for spec in registry.specs())


class Compare:
    title = "Speculative decoding beside plain decoding, by kind of text"
    repeats = 5

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        lengths = integers(0, MAX_DRAFT_LENGTH)
        for flag, known, default in (
            ("--categories", tuple(CATEGORIES), [name for name in CATEGORIES if name != CHAT]),
            ("--drafters", DRAFTING, [name for name in DRAFTING if name != "head"]),
        ):
            left = ", ".join(set(known) - set(default))
            parser.add_argument(
                flag,
                type=names(known),
                default=default,
                metavar="LIST",
                help=f"of {', '.join(known)} (all but {left})",
            )
        parser.add_argument(
            "--auto-drafter",
            choices=DRAFTING,
            default="combined",
            help="whose automatic length is compared with all its fixed ones (%(default)s)",
        )
        parser.add_argument(
            "--lengths",
            type=lengths,
            metavar="LIST",
            help="fixed lengths of that drafter (all that it may choose from)",
        )
        parser.add_argument(
            "--other-lengths",
            type=lengths,
            default=[DRAFT_TOKENS],
            metavar="LIST",
            help=f"fixed lengths of the other drafters ({DRAFT_TOKENS})",
        )
        parser.add_argument("--max-prompts", type=integer(1), metavar="N", help="only the first N of each category")
        parser.add_argument("--max-new-tokens", type=integer(2), default=NEW_TOKENS, metavar="N", help="(%(default)s)")

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.drafters = [name for name in DRAFTING if name in (*options.drafters, options.auto_drafter)]
        self.drafts_by_model = any(registry.spec_of(name).needs_draft_model for name in self.drafters)
        drafter = "combined" if self.drafts_by_model else options.auto_drafter
        if "head" in self.drafters:
            if "model" in self.drafters:
                raise UserError("--drafters model and head need two drafts: compare one of them at a time")
            drafter = "head"
        self.settings = model_settings(
            "compare",
            rest,
            REFUSED,
            drafter=drafter,
            num_draft_tokens=AUTO,
            max_new_tokens=options.max_new_tokens,
            max_prompts=options.max_prompts,
        )
        self.lengths: list[int] = options.lengths or []
        self.device = self.settings.device
        self.categories = [
            name for name in options.categories if self.drafts_by_model or not CATEGORIES[name].unrelated_draft
        ]
        if not self.categories:
            raise UserError(f"--categories {options.categories[0]} needs a drafter with a draft model: add model")
        self.configurations: dict[str, list[Configuration]] = {}  # by category
        self.first: dict[
            str, dict[str, Sample]
        ] = {}  # by category and configuration: the uncounted text of its warm-up
        # [category][repetition][configuration]: a sample for each prompt and pass; complete repetitions only
        self.samples: dict[str, list[dict[str, list[Sample]]]] = {name: [] for name in self.categories}

    def prepare(self) -> None:
        from scripts.suites.bench import Bench
        from scripts.suites.configurations import with_unrelated_draft

        texts = {name: read_texts(name, self.settings) for name in self.categories}
        self.bench = Bench(self.settings, [text for some in texts.values() for text in some])
        self.lengths = self.lengths or list(range(self.bench.settings.longest_draft + 1))
        rows, longest = self.bench.settings.fixed_rows, max(self.lengths + self.options.other_lengths)
        if rows and longest >= rows:
            raise UserError(
                f"a draft length of {longest} is more than the {rows} fixed rows of a forward hold: give lengths up to "
                f"{rows - 1}, or --no-row-invariant"
            )
        ids = iter([prompt.ids for prompt in self.bench.prompts])
        self.prompts = {name: [next(ids) for _ in some] for name, some in texts.items()}
        for name in self.prompts:
            if name == CHAT and not self.bench.instruct:
                raise UserError("--categories chat needs a target with a chat template: leave it out")
            if CATEGORIES[name].file is None:
                vocab_size = self.bench.target.model.vocab_size
                self.prompts[name] = random_ids(vocab_size, self.settings.seed, self.options.max_prompts)
        if not self.bench.prompts:  # early exit chooses its layers by the first
            self.bench.prompts = [Prompt(1, "random token ids", ids) for ids in self.prompts["random-tokens"]]
        unrelated = any(CATEGORIES[name].unrelated_draft for name in self.prompts)
        self.unrelated = with_unrelated_draft(self.bench) if unrelated else None

    # -------------------------------------------------------------------------------------------------- measuring
    def measure(self, progress: Progress) -> None:
        from scripts.suites import configurations

        own, unrelated = self._own_configurations(), self._unrelated_configurations()
        self.configurations = {name: unrelated if CATEGORIES[name].unrelated_draft else own for name in self.prompts}
        texts = {name: CATEGORIES[name].passes * prompts for name, prompts in self.prompts.items()}
        total = sum(len(texts[name]) * len(self.configurations[name]) for name in texts)
        every = [ids for prompts in self.prompts.values() for ids in prompts]
        progress.begin(total * self.options.repeats, "warm-up")
        for bench in filter(None, (self.bench, self.unrelated)):
            configurations.prepare_lengths(bench, every)
        first: dict[int, tuple[str, Configuration]] = {}
        for name in self.prompts:
            first |= {
                id(configuration): (name, configuration)
                for configuration in self.configurations[name]
                if id(configuration) not in first
            }
        for name, configuration in first.values():
            self.first.setdefault(name, {})[configuration.name] = self._write(
                name, configuration, self.prompts[name][0]
            )
        for repeat in range(self.options.repeats):
            for name, ids in texts.items():
                runs: dict[str, list[Sample]] = {configuration.name: [] for configuration in self.configurations[name]}
                for text, configuration in turns(repeat, len(ids), self.configurations[name]):
                    runs[configuration.name].append(self._write(name, configuration, ids[text]))
                    progress.step(f"{name}, repetition {repeat + 1} of {self.options.repeats}")
                self.samples[name].append(runs)

    def _own_configurations(self) -> "list[Configuration]":
        from scripts.suites.configurations import drafting_configuration, plain_configuration, sequential_configuration

        configurations = [plain_configuration(self.bench)]
        if self.drafts_by_model:
            configurations.append(sequential_configuration(self.bench))
        for drafter in self.drafters:
            lengths = self.lengths if drafter == self.options.auto_drafter else self.options.other_lengths
            configurations += [drafting_configuration(self.bench, drafter, length) for length in (*lengths, AUTO)]
        return configurations

    def _unrelated_configurations(self) -> "list[Configuration]":
        from scripts.suites.configurations import drafting_configuration, plain_configuration

        if self.unrelated is None:
            return []
        lengths = (*self.lengths, AUTO)
        return [
            plain_configuration(self.unrelated),
            *(drafting_configuration(self.unrelated, "model", length) for length in lengths),
        ]

    def _write(self, category: str, configuration: "Configuration", ids: list[int]) -> "Sample":
        from scripts.suites.configurations import write

        asked = self.options.max_new_tokens
        new_tokens = min(CATEGORIES[category].new_tokens or asked, asked)
        return write(configuration, ids, new_tokens, self.bench.stop_ids if CATEGORIES[category].file else ())

    # -------------------------------------------------------------------------------------------------- results
    def results(self) -> Results:
        from scripts.suites.summary import describe_models, describe_settings

        categories = {name: self._category(name) for name, repetitions in self.samples.items() if repetitions}
        return {
            "mean_auto_speedup": _mean([each["auto_speedup"] for each in categories.values()]),
            "mean_best_fixed_speedup": _mean([each["best_fixed_speedup"] for each in categories.values()]),
            "auto_drafter": self.options.auto_drafter,
            "categories": categories,
            "overall": self._overall(),
            "models": describe_models(self.bench),
            "settings": describe_settings(self.bench, self.options),
        }

    def _overall(self) -> Results:
        """The configurations over all categories with the pair's own draft, in the repetitions that all completed."""
        from scripts.suites.configurations import PLAIN
        from scripts.suites.summary import summarise

        own = [name for name in self.samples if not CATEGORIES[name].unrelated_draft]
        repetitions = list(zip(*(self.samples[name] for name in own), strict=False))
        if not repetitions:
            return {}
        configurations = self.configurations[own[0]]
        runs = {
            configuration.name: [[s for runs in some for s in runs[configuration.name]] for some in repetitions]
            for configuration in configurations
        }
        return {
            configuration.name: summarise(configuration, runs[configuration.name], runs[PLAIN])
            for configuration in configurations
        }

    def _category(self, name: str) -> Results:
        from scripts.suites.configurations import PLAIN
        from scripts.suites.summary import rate, summarise

        category, repetitions = CATEGORIES[name], self.samples[name]
        runs = {
            configuration.name: [runs[configuration.name] for runs in repetitions]
            for configuration in self.configurations[name]
        }
        configurations = {
            configuration.name: summarise(configuration, runs[configuration.name], runs[PLAIN])
            for configuration in self.configurations[name]
        }
        first = self.first.get(name, {}).items()
        rates = {configuration: [rate(samples) or 0.0 for samples in some] for configuration, some in runs.items()}
        drafter = "model" if category.unrelated_draft else self.options.auto_drafter
        auto, fixed = f"{drafter} {AUTO}", [f"{drafter} {length}" for length in self.lengths]
        best_fixed = max(fixed, key=lambda configuration: _median(configurations[configuration]["speedup"]) or 0.0)
        by_drafter: dict[str, list[float]] = {}
        for configuration in self.configurations[name]:
            who = (
                configuration.drafter
                if configuration.verification == "batched" and configuration.length
                else configuration.name
            )
            who = PLAIN if configuration.length == 0 else who
            by_drafter[who] = list(map(max, rates[configuration.name], by_drafter.get(who, rates[configuration.name])))
        return {
            "about": category.about,
            "prompts": len(self.prompts[name]),
            "repetitions": len(repetitions),
            "auto_drafter": drafter,
            "auto_speedup": _median(configurations[auto]["speedup"]),
            "best_fixed": best_fixed,
            "best_fixed_speedup": _median(configurations[best_fixed]["speedup"]),
            "auto_over_best_fixed": spread(ratios(rates[auto], rates[best_fixed])),
            "winner": winner(rates),
            "winner_speedup": _median(configurations[winner(rates)["name"]]["speedup"]),
            "winner_drafter": winner(by_drafter),
            "drafted_in_first_text": {
                configuration: [round.drafted for round in each.stats.rounds] for configuration, each in first
            },
            "ways": configurations,
        }

    # -------------------------------------------------------------------------------------------------- showing
    @staticmethod
    def markdown(results: Results) -> str:
        text = header(results, Compare.title)
        rows = []
        for name, each in results["categories"].items():
            won, drafter = each["winner"], each["winner_drafter"]
            rows.append(
                (
                    name,
                    ranged(each["ways"][f"{each['auto_drafter']} {AUTO}"]["speedup"]),
                    f"{times(each['best_fixed_speedup'])} {each['best_fixed']}",
                    ranged(each["auto_over_best_fixed"]),
                    f"{times(each['winner_speedup'])} {won['name']}, {won['won']} of {won['repetitions']}",
                    f"{drafter['name']}, {drafter['won']} of {drafter['repetitions']}",
                )
            )
        rows.append(
            ("mean", times(results["mean_auto_speedup"]), times(results["mean_best_fixed_speedup"]), "", "", "")
        )
        head = (
            "speed-up over plain",
            "auto",
            "best fixed length",
            "auto / best fixed",
            "fastest configuration",
            "fastest drafter",
        )
        text += markdown_table(head, rows)
        text += (
            "Speed-ups over plain decoding, median (smallest to largest) over repetitions. The best fixed length is "
            "known only afterwards. Wait: what the reader of the stream waits for a token; no wait: tokens that came "
            "in one block with the one before.\n\n"
        )
        if results["overall"]:
            text += "## All kinds of text together\n\n" + markdown_table(OVERALL, overall_rows(results["overall"]))
        for name, each in results["categories"].items():
            text += f"## {name}\n\n{each['about']}; {each['prompts']} prompts\n\n"
            text += markdown_table(_HEAD, _rows(each["ways"]))
            if CATEGORIES[name].unrelated_draft:
                text += _learning(each)
        return text + _models(results["models"])

    @staticmethod
    def figure(results: Results) -> "Figure":
        from scripts.suites.figures import grouped_bars

        bars = {"auto": [], "best fixed length": [], "fastest of all configurations": []}
        for each in results["categories"].values():
            configurations = each["ways"]
            bars["auto"].append(configurations[f"{each['auto_drafter']} {AUTO}"]["speedup"])
            bars["best fixed length"].append(configurations[each["best_fixed"]]["speedup"])
            bars["fastest of all configurations"].append(configurations[each["winner"]["name"]]["speedup"])
        return grouped_bars(list(results["categories"]), bars, "speed-up over plain decoding", line=1.0)


OVERALL = (
    "configuration",
    "TTFT ms",
    "tok/s",
    "accepted",
    "init s",
    "total s",
    "speed-up",
    "use it when",
)


def _advice(configuration: Results) -> str:
    """When to use a configuration."""
    if configuration["draft_length"] == 0:
        return "only to compare"
    if configuration["drafter"] is None:
        return "there is nothing to draft from"
    if configuration["verification"] == "sequential":
        return "never: it is the mistake to compare with"
    return registry.spec_of(configuration["drafter"]).when


def overall_rows(configurations: Results) -> list[tuple[str, ...]]:
    """Cells of OVERALL. init: loading the models of the configuration and measuring what it goes by; total: all texts
    of a repetition, whole calls."""
    return [
        (
            name,
            number(_median(configuration["ttft_ms"])),
            number(_median(configuration["tok_s"]), 0),
            percent(configuration["acceptance_rate"]),
            number(configuration["init_s"], 2),
            number(_median(configuration["total_s"]), 2),
            ranged(configuration["speedup"]),
            _advice(configuration),
        )
        for name, configuration in configurations.items()
    ]


def _learning(category: Results) -> str:
    """How soon an automatic length found out that drafting does not pay."""
    name = f"{category['auto_drafter']} {AUTO}"
    drafted, auto = category["drafted_in_first_text"].get(name), category["ways"][name]
    if not drafted:
        return ""
    when = f"decoded plainly first in round {drafted.index(0) + 1}" if 0 in drafted else "never decoded plainly"
    return (
        f"{name} knew nothing in its first, uncounted text and {when} of {len(drafted)}; in the counted ones "
        f"{auto['plain_rounds']} of {auto['rounds']} rounds were plain.\n\n"
    )


_HEAD = (
    "configuration",
    "speed-up",
    "tok/s",
    "TTFT ms",
    "wait p50 / p95 / p99 / longest ms",
    "no wait",
    "accepted",
    "by position",
    "mean length",
    "draft + verify + host ms",
    "same text",
)


def _rows(configurations: Results) -> list[tuple[str, ...]]:
    rows = []
    for name, configuration in configurations.items():
        waits = configuration["wait_ms"]
        rows.append(
            (
                name,
                ranged(configuration["speedup"]),
                ranged(configuration["tok_s"], lambda value: number(value, 0)),
                number(_median(configuration["ttft_ms"])),
                " / ".join(number(value) for value in waits.values()) if waits else number(None),
                percent(configuration["no_wait_share"]),
                percent(configuration["acceptance_rate"]),
                " ".join(percent(value) for value in configuration["acceptance_by_position"]),
                number(configuration["mean_acceptance_length"], 2),
                f"{configuration['draft_ms']:.2f} + {configuration['verify_ms']:.2f} + {configuration['host_ms']:.3f}",
                number(None)
                if configuration["texts_equal"] is None
                else f"{configuration['texts_equal']} of {configuration['texts']}",
            )
        )
    return rows


def _models(models: Results) -> str:
    rows = [
        (
            role,
            f"{each['load_s']:.2f} s",
            f"{each['weight_bytes'] / 1e6:,.1f} MB",
            f"{each['kv_cache_bytes'] / 1e6:,.1f} MB",
        )
        for role, each in models.items()
        if each
    ]
    return "## Models\n\n" + markdown_table(("model", "load time", "weights", "KV cache"), rows)


def _median(values: Results | None) -> float | None:
    return values and values["median"]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
