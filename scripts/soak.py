"""Write mixed texts for a long time, and say whether memory grows, speed falls, or a token is ever wrong.

    python scripts/soak.py --minutes 60 --json soak.json

Requests of many kinds come at random times, more than there are slots: short and long prompts, greedy and sampled,
every drafter that the models allow, fixed and automatic draft lengths, stop tokens; one in ten is aborted at a random
step. Every greedy text is compared with what plain decoding wrote for its prompt before, alone.

Memory (resident) and speed are sampled in windows; their slopes come with 95 % confidence intervals. The exit code is
1 if a token was wrong, a request ended in an error, or memory grows for certain by more than --memory-mb-per-hour.

In the first minutes memory grows by up to a gigabyte and is no leak: oneDNN keeps a kernel of about half a megabyte for
every matrix and number of rows that it meets, at most 1,024 of them, and caches are touched for the first time.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from models.cli.command import Parser, run_command
from models.cli.environment import date, machine, versions, write_json
from models.errors import UserError

WARM_UP = 0.15  # of the time, which no slope counts: caches fill and threads start
KINDS = ("none", "prompt-lookup", "model", "combined", "tree", "head", "early-exit")


@dataclasses.dataclass(frozen=True)
class Slope:
    """A straight line through samples: change an hour with the bounds of its 95 % confidence interval."""

    an_hour: float
    low: float
    high: float


@dataclasses.dataclass
class Counts:
    """What has happened."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    errors: int = 0
    tokens: int = 0
    compared: int = 0
    wrong: int = 0


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt and its greedy text, written plainly and alone."""

    ids: list[int]
    text: list[int]


def resident_mb() -> float:
    """Memory of this process that is in RAM, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise UserError("/proc/self/status has no VmRSS: memory can be watched on Linux alone")


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope | None:
    """Of values sampled at these times; None for fewer than three."""
    if len(values) < 3:
        return None
    from scipy import stats

    line = stats.linregress(seconds, values)
    spread = stats.t.ppf(0.975, len(values) - 2) * line.stderr
    return Slope(*(float(3600 * x) for x in (line.slope, line.slope - spread, line.slope + spread)))


class Soak:
    """Requests for one loaded pair.

    Args:
        llm: with several slots.
        seed: of everything that is drawn.
        prompts: how many there are; each one's greedy text is known.
        longest: tokens of a text.
    """

    def __init__(self, llm: Any, seed: int, prompts: int, longest: int) -> None:
        self.llm, self.counts, self._longest = llm, Counts(), longest
        self._draw = random.Random(seed)
        self._expected: dict[Any, list[int]] = {}  # greedy texts under way
        positions = llm.engine.target.limits.positions
        self._known = []
        for _ in range(prompts):
            length = min(int(2 ** self._draw.uniform(0, 9)), positions - 2)
            ids = [self._draw.randrange(llm.engine.target.limits.vocabulary) for _ in range(length)]
            text = llm.generate(ids, max_new_tokens=longest, stop_ids=(), speculate=False).token_ids
            self._known.append(Known(ids, text))
        llm.choose_exit(self._known[0].ids)  # early exit asks for it, and it takes an idle engine
        self._configurations = self._drafters()

    def _drafters(self) -> list[Any]:
        """Every configuration that the loaded models allow, once: requests share them."""
        made = []
        for name in KINDS:
            for length in ("auto", 1, 4, 7):
                try:
                    made.append(self.llm.drafting(name, length))
                except UserError:
                    break
        return made

    def add(self) -> None:
        """Ask for a text."""
        from models import SamplingParams

        draw, engine = self._draw, self.llm.engine
        known = draw.choice(self._known)
        greedy = draw.random() < 0.7
        sampling = None
        if not greedy:
            sampling = SamplingParams(
                temperature=draw.uniform(0.1, 2), top_k=draw.choice((0, 1, 20)), top_p=draw.uniform(0.1, 1), seed=1
            )
        count = draw.randint(1, self._longest)
        stop = draw.choice(known.text) if draw.random() < 0.3 else None
        request, _ = self.llm.request(
            known.ids,
            sampling,
            max_new_tokens=count,
            stop_ids=() if stop is None else (stop,),
            speculate=draw.choice(self._configurations),
        )
        sequence = engine.add(request)
        self.counts.requests += 1
        if greedy:
            text = known.text[:count]
            self._expected[sequence] = text if stop not in text else text[: text.index(stop) + 1]

    def step(self) -> int:
        """Take all texts a round further; how many tokens came."""
        engine, counts, came = self.llm.engine, self.counts, 0
        for sequence, tokens in engine.step():
            came += len(tokens)
            expected = self._expected.get(sequence)
            if sequence.error is not None:
                counts.errors += 1
                logger.error(f"a text ended with {type(sequence.error).__name__}: {sequence.error}")
            if expected is not None:
                written = sequence.tokens[len(sequence.request.prompt) :]
                new = slice(len(written) - len(tokens), len(written))
                counts.compared += len(tokens)
                counts.wrong += sum(a != b for a, b in zip(written[new], expected[new], strict=False))
                counts.wrong += max(0, len(written) - len(expected))
                if sequence.finished and sequence.error is None:
                    counts.wrong += len(expected) - len(written)
            if sequence.finished:
                counts.finished += 1
                self._expected.pop(sequence, None)
        counts.tokens += came
        if engine.running and self._draw.random() < 0.02:
            sequence = self._draw.choice([*engine.running, *engine.waiting])
            engine.abort(sequence)
            self._expected.pop(sequence, None)
            counts.aborted += 1
        return came

    def run(self, seconds: float, window: float) -> list[dict[str, float]]:
        """Go on for so long: samples of memory and speed, one a window."""
        engine = self.llm.engine
        began = mark = time.monotonic()
        samples, came = [], 0
        while (now := time.monotonic()) - began < seconds or not engine.idle:
            slots = engine.target.limits.slots
            if now - began < seconds and len(engine.running) + len(engine.waiting) < 2 * slots:
                for _ in range(self._draw.choice((0, 0, 1, 1, 2))):
                    self.add()
            came += self.step()
            if (spent := time.monotonic() - mark) >= window:
                samples.append({"seconds": time.monotonic() - began, "rss_mb": resident_mb(), "tok_s": came / spent})
                mark, came = time.monotonic(), 0
        return samples


def command(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="how long (default %(default)s)")
    add("--target", default="tiny", help="as of the demo (default %(default)s)")
    add("--draft", help="as of the demo")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="bf16 may differ at near-ties (default fp32)")
    add("--slots", type=int, default=8, help="texts under way at once (default %(default)s)")
    add("--prompts", type=int, default=24, help="prompts, each with a known greedy text (default %(default)s)")
    add("--max-new-tokens", type=int, default=96, help="tokens of a text at most (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--window", type=float, default=5.0, help="seconds of a sample (default %(default)s)")
    add("--memory-mb-per-hour", type=float, default=50.0, help="growth that fails (default %(default)s)")
    add("--json", type=Path, help="where results are written")
    args = parser.parse_args(argv)
    for name in ("minutes", "window", "prompts", "max_new_tokens"):
        if not 0 < getattr(args, name) < 1e6:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be more than 0")
    from models import LLM

    with LLM.load(args.target, args.draft, dtype=args.dtype, draft_dtype=args.dtype, slots=args.slots) as llm:
        soak = Soak(llm, args.seed, args.prompts, args.max_new_tokens)
        samples = soak.run(60 * args.minutes, args.window)
    kept = [each for each in samples if each["seconds"] > 60 * args.minutes * WARM_UP]
    seconds = [each["seconds"] for each in kept]
    memory, speed = (slope(seconds, [each[name] for each in kept]) for name in ("rss_mb", "tok_s"))
    counts = soak.counts
    print(f"{counts.requests} requests, {counts.aborted} aborted, {counts.errors} errors, {counts.tokens} tokens")
    print(f"{counts.compared} tokens compared with plain decoding alone, {counts.wrong} wrong")
    for name, unit, line in (("memory", "MB", memory), ("speed", "tok/s", speed)):
        told = "too few samples" if line is None else f"{line.an_hour:+.1f} ({line.low:+.1f} to {line.high:+.1f})"
        print(f"{name}: {told} {unit} an hour")
    if args.json:
        results = {
            "kind": "soak",
            "date": date(),
            "versions": versions(),
            "machine": machine("cpu"),
            "command": ["scripts/soak.py", *(sys.argv[1:] if argv is None else map(str, argv))],
            "counts": dataclasses.asdict(counts),
            "memory_mb_per_hour": memory and dataclasses.asdict(memory),
            "tok_s_per_hour": speed and dataclasses.asdict(speed),
            "samples": samples,
        }
        write_json(str(args.json), results)
    grows = memory is not None and memory.low > args.memory_mb_per_hour
    return int(bool(counts.wrong or counts.errors or grows))


if __name__ == "__main__":
    sys.exit(run_command(command))
