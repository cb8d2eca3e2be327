"""Every way to write text beside plain decoding, by kind of text.

Ways: plain decoding; the drafter of --auto-drafter with every fixed length and with its automatic one; the other
drafters with the lengths of --other-lengths and automatically; the draft model verified token by token. Prompt by
prompt all of them take turns. A way's speed-up is its tokens per second over plain decoding's within one repetition,
all prompts of a category together; the median over repetitions is reported, with the smallest and the largest.

Where the draft is unrelated, the draft model drafts alone whatever --auto-drafter says, so that nothing is accepted.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.cli.prompts import Prompt
from models.cli.tables import markdown_table
from models.errors import UserError
from models.options import AUTO, AUTO_LONGEST_FIXED, DRAFT_TOKENS
from models.speculative.control.policy import MAX_DRAFT_LENGTH
from models.speculative.drafters import registry
from scripts.suites.categories import CATEGORIES, random_ids, read_texts
from scripts.suites.measuring import ratios, spread, turns, winner
from scripts.suites.report import header, number, percent, ranged, times
from scripts.suites.suite import Progress, Results, integer, integers, model_settings, names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.suites.ways import Sample, Way

NEW_TOKENS = 48
REFUSED = ("--mode", "--drafter", "--num-draft-tokens", "--verification", "--prompts", "--prompt", "--random-prompts")
DRAFTING = tuple(spec.name for spec in registry.specs())


class Compare:
    title = "Speculative decoding beside plain decoding, by kind of text"
    repeats = 5

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        lengths = integers(0, MAX_DRAFT_LENGTH)
        for flag, known in (("--categories", tuple(CATEGORIES)), ("--drafters", DRAFTING)):
            parser.add_argument(
                flag, type=names(known), default=list(known), metavar="LIST", help=f"of {', '.join(known)} (all)"
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
            default=list(range(AUTO_LONGEST_FIXED + 1)),
            metavar="LIST",
            help=f"fixed lengths of that drafter (all from 0 to {AUTO_LONGEST_FIXED})",
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
        self.settings = model_settings(
            "compare",
            rest,
            REFUSED,
            drafter=drafter,
            num_draft_tokens=AUTO,
            max_new_tokens=options.max_new_tokens,
            max_prompts=options.max_prompts,
        )
        longest = max(options.lengths + options.other_lengths)
        rows = self.settings.resolved(drafter).fixed_rows
        if rows and longest >= rows:
            raise UserError(
                f"a draft length of {longest} is more than the {rows} fixed rows of a forward hold: give lengths up to "
                f"{rows - 1}, or --no-row-invariant"
            )
        self.device = self.settings.device
        self.categories = [
            name for name in options.categories if self.drafts_by_model or not CATEGORIES[name].unrelated_draft
        ]
        if not self.categories:
            raise UserError(f"--categories {options.categories[0]} needs a drafter with a draft model: add model")
        self.ways: dict[str, list[Way]] = {}  # by category
        self.first: dict[str, dict[str, Sample]] = {}  # by category and way: the uncounted text of its warm-up
        # [category][repetition][way]: a sample for each prompt and pass; complete repetitions only
        self.samples: dict[str, list[dict[str, list[Sample]]]] = {name: [] for name in self.categories}

    def prepare(self) -> None:
        from scripts.suites.bench import Bench
        from scripts.suites.ways import with_unrelated_draft

        texts = {name: read_texts(name, self.settings) for name in self.categories}
        self.bench = Bench(self.settings, [text for some in texts.values() for text in some])
        ids = iter([prompt.ids for prompt in self.bench.prompts])
        self.prompts = {name: [next(ids) for _ in some] for name, some in texts.items()}
        for name in self.prompts:
            if CATEGORIES[name].file is None:
                vocab_size = self.bench.target.model.vocab_size
                self.prompts[name] = random_ids(vocab_size, self.settings.seed, self.options.max_prompts)
        if not self.bench.prompts:  # early exit chooses its layers by the first
            self.bench.prompts = [Prompt(1, "random token ids", ids) for ids in self.prompts["random-tokens"]]
        unrelated = any(CATEGORIES[name].unrelated_draft for name in self.prompts)
        self.unrelated = with_unrelated_draft(self.bench) if unrelated else None

    # -------------------------------------------------------------------------------------------------- measuring
    def measure(self, progress: Progress) -> None:
        from scripts.suites import ways

        own, unrelated = self._own_ways(), self._unrelated_ways()
        self.ways = {name: unrelated if CATEGORIES[name].unrelated_draft else own for name in self.prompts}
        texts = {name: CATEGORIES[name].passes * prompts for name, prompts in self.prompts.items()}
        total = sum(len(texts[name]) * len(self.ways[name]) for name in texts)
        every = [ids for prompts in self.prompts.values() for ids in prompts]
        progress.begin(total * self.options.repeats, "warm-up")
        for bench in filter(None, (self.bench, self.unrelated)):
            ways.prepare_lengths(bench, every)
        first: dict[int, tuple[str, Way]] = {}
        for name in self.prompts:
            first |= {id(way): (name, way) for way in self.ways[name] if id(way) not in first}
        for name, way in first.values():
            self.first.setdefault(name, {})[way.name] = self._write(name, way, self.prompts[name][0])
        for repeat in range(self.options.repeats):
            for name, ids in texts.items():
                runs: dict[str, list[Sample]] = {way.name: [] for way in self.ways[name]}
                for text, way in turns(repeat, len(ids), self.ways[name]):
                    runs[way.name].append(self._write(name, way, ids[text]))
                    progress.step(f"{name}, repetition {repeat + 1} of {self.options.repeats}")
                self.samples[name].append(runs)

    def _own_ways(self) -> "list[Way]":
        from scripts.suites.ways import drafting_way, plain_way, sequential_way

        ways = [plain_way(self.bench)]
        if self.drafts_by_model:
            ways.append(sequential_way(self.bench))
        for drafter in self.drafters:
            lengths = self.options.lengths if drafter == self.options.auto_drafter else self.options.other_lengths
            ways += [drafting_way(self.bench, drafter, length) for length in (*lengths, AUTO)]
        return ways

    def _unrelated_ways(self) -> "list[Way]":
        from scripts.suites.ways import drafting_way, plain_way

        if self.unrelated is None:
            return []
        lengths = (*self.options.lengths, AUTO)
        return [plain_way(self.unrelated), *(drafting_way(self.unrelated, "model", length) for length in lengths)]

    def _write(self, category: str, way: "Way", ids: list[int]) -> "Sample":
        from scripts.suites.ways import write

        asked = self.options.max_new_tokens
        new_tokens = min(CATEGORIES[category].new_tokens or asked, asked)
        return write(way, ids, new_tokens, self.bench.stop_ids if CATEGORIES[category].file else ())

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
        """The ways over all categories with the pair's own draft, in the repetitions that all of them completed."""
        from scripts.suites.summary import summarise
        from scripts.suites.ways import PLAIN

        own = [name for name in self.samples if not CATEGORIES[name].unrelated_draft]
        repetitions = list(zip(*(self.samples[name] for name in own), strict=False))
        if not repetitions:
            return {}
        ways = self.ways[own[0]]
        runs = {way.name: [[s for runs in some for s in runs[way.name]] for some in repetitions] for way in ways}
        return {way.name: summarise(way, runs[way.name], runs[PLAIN]) for way in ways}

    def _category(self, name: str) -> Results:
        from scripts.suites.summary import rate, summarise
        from scripts.suites.ways import PLAIN

        category, repetitions = CATEGORIES[name], self.samples[name]
        runs = {way.name: [runs[way.name] for runs in repetitions] for way in self.ways[name]}
        ways = {way.name: summarise(way, runs[way.name], runs[PLAIN]) for way in self.ways[name]}
        first = self.first.get(name, {}).items()
        rates = {way: [rate(samples) or 0.0 for samples in some] for way, some in runs.items()}
        drafter = "model" if category.unrelated_draft else self.options.auto_drafter
        auto, fixed = f"{drafter} {AUTO}", [f"{drafter} {length}" for length in self.options.lengths]
        best_fixed = max(fixed, key=lambda way: _median(ways[way]["speedup"]) or 0.0)
        by_drafter: dict[str, list[float]] = {}
        for way in self.ways[name]:
            who = way.drafter if way.verification == "batched" and way.length else way.name
            who = PLAIN if way.length == 0 else who
            by_drafter[who] = list(map(max, rates[way.name], by_drafter.get(who, rates[way.name])))
        return {
            "about": category.about,
            "prompts": len(self.prompts[name]),
            "repetitions": len(repetitions),
            "auto_drafter": drafter,
            "auto_speedup": _median(ways[auto]["speedup"]),
            "best_fixed": best_fixed,
            "best_fixed_speedup": _median(ways[best_fixed]["speedup"]),
            "auto_over_best_fixed": spread(ratios(rates[auto], rates[best_fixed])),
            "winner": winner(rates),
            "winner_speedup": _median(ways[winner(rates)["name"]]["speedup"]),
            "winner_drafter": winner(by_drafter),
            "drafted_in_first_text": {way: [round.drafted for round in each.stats.rounds] for way, each in first},
            "ways": ways,
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
            "fastest way",
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

        bars = {"auto": [], "best fixed length": [], "fastest of all ways": []}
        for each in results["categories"].values():
            ways = each["ways"]
            bars["auto"].append(ways[f"{each['auto_drafter']} {AUTO}"]["speedup"])
            bars["best fixed length"].append(ways[each["best_fixed"]]["speedup"])
            bars["fastest of all ways"].append(ways[each["winner"]["name"]]["speedup"])
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
ADVICE = {
    (None, "batched"): "there is nothing to draft from",
    ("model", "sequential"): "never: it is the mistake to compare with",
    ("model", "batched"): "the text is new",
    ("prompt-lookup", "batched"): "the answer repeats its prompt, or no draft model fits",
    ("combined", "batched"): "texts are mixed",
    ("tree", "batched"): "the draft is unsure, and rows are cheap",
    ("early-exit", "batched"): "the target was trained to be left early",
}


def overall_rows(ways: Results) -> list[tuple[str, ...]]:
    """Cells of OVERALL. init: loading the models of the way and measuring what it goes by; total: all texts of a
    repetition, whole calls."""
    return [
        (
            name,
            number(_median(way["ttft_ms"])),
            number(_median(way["tok_s"]), 0),
            percent(way["acceptance_rate"]),
            number(way["init_s"], 2),
            number(_median(way["total_s"]), 2),
            ranged(way["speedup"]),
            "only to compare" if way["draft_length"] == 0 else ADVICE[way["drafter"], way["verification"]],
        )
        for name, way in ways.items()
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
    "way",
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


def _rows(ways: Results) -> list[tuple[str, ...]]:
    rows = []
    for name, way in ways.items():
        waits = way["wait_ms"]
        rows.append(
            (
                name,
                ranged(way["speedup"]),
                ranged(way["tok_s"], lambda value: number(value, 0)),
                number(_median(way["ttft_ms"])),
                " / ".join(number(value) for value in waits.values()) if waits else number(None),
                percent(way["no_wait_share"]),
                percent(way["acceptance_rate"]),
                " ".join(percent(value) for value in way["acceptance_by_position"]),
                number(way["mean_acceptance_length"], 2),
                f"{way['draft_ms']:.2f} + {way['verify_ms']:.2f} + {way['host_ms']:.3f}",
                number(None) if way["texts_equal"] is None else f"{way['texts_equal']} of {way['texts']}",
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
