"""Published acceptance of EAGLE-3 heads for Llama 3.1 8B, by kind of text: measured by others, on GPUs.

What is published is the mean acceptance length of chains: tokens a round gives, the target's own among them. It is

    1 + P(1) + P(2) + .. + P(K),        P(i) the chance that the first i drafted tokens are all accepted,

so that the lengths of chains of 3, 5 and 7 give the sums of P(1..3), P(4..5) and P(6..7). Within such a stretch every
token is taken to have the same chance once those before it were accepted; that chance is the one root of the sum. The
published means come out exactly; how a stretch is shared out among its two or three positions is an assumption. Beyond
the longest chain that was measured the last chance goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.errors import UserError
from scripts.planner.speculation import Acceptance

SPECFORGE = (
    "lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge with Llama-3.1-8B-Instruct on a GPU (SGLang, batch 1), "
    "SpecForge's results of SpecBundle"
)
NEBIUS = (
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B with its target on a GPU at temperature 1, model card of "
    "nebius/EAGLE3-Llama-3.3-70B-Instruct"
)


@dataclass(frozen=True)
class Text:
    """A kind of text and what was published of it.

    Args:
        name: as a command line spells it.
        title: in a table.
        kind: of text, in a few words.
        lengths: mean acceptance length by K of the chain.
        source: head, software, who published it.
    """

    name: str
    title: str
    kind: str
    lengths: Mapping[int, float]
    source: str = SPECFORGE

    def acceptance(self) -> Acceptance:
        """By position, up to the longest chain."""
        shown = ", ".join(f"{length:.2f} at K = {k}" for k, length in self.lengths.items())
        return Acceptance(reached(self.lengths), f"published for {self.title}, {shown}: {self.source}")


TEXTS = {
    text.name: text
    for text in (
        Text("mt-bench", "MT-Bench", "chat", {3: 2.90, 5: 3.52, 7: 3.86}),
        Text("gsm8k", "GSM8K", "school maths", {3: 2.55}),
        Text("math500", "MATH500", "mathematics", {3: 3.48, 5: 4.62, 7: 5.40}),
        Text("humaneval", "HumanEval", "code", {3: 3.34, 5: 4.32, 7: 4.91}),
        Text("livecodebench", "LiveCodeBench", "contest code", {3: 3.17}),
        Text("financeqa", "FinanceQA", "questions on finance", {3: 1.91}),
        Text("mt-bench-t1", "MT-Bench, temperature 1", "chat, sampled", {7: 2.77}, NEBIUS),
        Text("humaneval-t1", "HumanEval, temperature 1", "code, sampled", {7: 3.49}, NEBIUS),
        Text("gsm8k-t1", "GSM8K, temperature 1", "school maths, sampled", {7: 3.34}, NEBIUS),
    )
}
CHAT = "mt-bench"


def text_named(name: str) -> Text:
    """The kind of text of that name. Raises UserError for any other."""
    if name not in TEXTS:
        raise UserError(f"no acceptance is published for text {name!r}: use one of {', '.join(TEXTS)}")
    return TEXTS[name]


def reached(lengths: Mapping[int, float]) -> tuple[float, ...]:
    """P(1), P(2), .. of the mean acceptance lengths of chains, the shortest first; see the module."""
    found: list[float] = []
    before = 1.0
    for k, length in lengths.items():
        n = k - len(found)
        chance = _equal_chance(n, (length - before) / (found[-1] if found else 1.0))
        for _ in range(n):
            found.append((found[-1] if found else 1.0) * chance)
        before = length
    return tuple(found)


def _equal_chance(n: int, total: float) -> float:
    """The chance a of which a + a^2 + .. + a^n is the total. ValueError where no chance gives it."""
    if not 0 <= total <= n:
        raise ValueError(f"{n} tokens do not give {total:.2f} accepted ones")
    low, high = 0.0, 1.0
    while high - low > 1e-14:
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(1, n + 1)) < total else (low, middle)
    return (low + high) / 2
