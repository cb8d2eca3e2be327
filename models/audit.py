"""Whether a text is the target's own: it is replayed against plain decoding, after the fact.

Greedy: every token has to be what plain decoding writes there. Where one is not, the two candidates' logits in fp32 say
whether the target cannot tell them apart at its precision (a near-tie), or the text is another one. The replay then
goes on behind that token, so that a near-tie hides nothing after it.

Sampled: no single text can be right or wrong, but all tokens together can. The probability integral transform of each
token by the target's distribution at its place is uniform on 0..1 and independent of the others if, and only if, tokens
are drawn from these distributions (Rosenblatt 1952, "Remarks on a multivariate transformation"). Kolmogorov-Smirnov
tests compare it with that, for each position and for all together; their p-values are corrected for their number by
Holm's method. A token of probability 0 is wrong by itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from models.cache_size import announced
from models.errors import UserError
from models.memory import free_bytes
from models.speculative.acceptance import distribution
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import Token
from models.torch_llama.working_set import Form

if TYPE_CHECKING:
    from models.llm import LLM

IDENTICAL, NEAR_TIE, CONSISTENT, DIFFERENT = "identical", "near-tie", "consistent", "different"
DEVIATIONS = 4.0  # of what rounding adds to the difference of two logits: within so many, candidates are a near-tie
FP32_UNITS = 64  # of fp32's last place in the largest logit: what fp32 itself is trusted to
LEAST_SAMPLES = 5  # of a position, to test it by itself
ALPHA = 0.001  # of a report: the chance of a false alarm
POLL_S = 0.02  # between looks at what another thread computes

T = TypeVar("T")
Reference: TypeAlias = Callable[[Sequence[int]], Tensor]  # token ids -> fp32 logits [V] of what follows them
# A computation in pieces of one forward each: yields for how many seconds there is nothing to do, and returns a result.
Steps: TypeAlias = Generator[float, None, T]


@dataclass(frozen=True)
class Divergence:
    """A token that plain decoding does not write there.

    Args:
        token: its number in the text, from 1.
        plain_id, run_id: what plain decoding and the run wrote; None where that text had ended.
        top2_margin: by how much the target's best token is ahead of its second one in fp32, in logits.
        gap: by how much the best token is ahead of the lesser one of the two, in fp32.
        tolerance: the largest gap of a near-tie: `DEVIATIONS` of what the precision's rounding adds here.
    """

    token: int
    plain_id: int | None
    run_id: int | None
    top2_margin: float
    gap: float
    tolerance: float

    @property
    def near_tie(self) -> bool:
        """Whether the target cannot tell the two apart at its precision."""
        return self.plain_id is not None and self.run_id is not None and self.gap <= self.tolerance


@dataclass(frozen=True)
class TextAudit:
    """What the replay of one text found.

    Args:
        tokens: of the text, all of them replayed.
        greedy: how it was written.
        divergences: of a greedy text, in order; of a sampled one, tokens that the target never draws there.
        uniforms: of a sampled text, the transform of each token but those.
    """

    tokens: int
    greedy: bool
    divergences: list[Divergence] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """IDENTICAL, NEAR_TIE or DIFFERENT; of a sampled text CONSISTENT as far as it alone can tell."""
        if not all(each.near_tie for each in self.divergences):
            return DIFFERENT
        if self.divergences:
            return NEAR_TIE
        return IDENTICAL if self.greedy else CONSISTENT


@dataclass(frozen=True)
class UniformityTest:
    """One test of sampled tokens: of a position of all texts, from 1, or None for all positions together.

    p_value: as it is. corrected: for the number of tests, by Holm's method.
    """

    position: int | None
    samples: int
    statistic: float
    p_value: float
    corrected: float


@dataclass(frozen=True)
class Report:
    """What the replay of several texts found. tests: of sampled ones, most telling first."""

    texts: list[TextAudit]
    tests: list[UniformityTest]
    alpha: float = ALPHA

    @property
    def verdict(self) -> str:
        """DIFFERENT if anything is; else NEAR_TIE if there was one, else IDENTICAL or CONSISTENT."""
        verdicts = {text.verdict for text in self.texts}
        if DIFFERENT in verdicts or any(test.corrected < self.alpha for test in self.tests):
            return DIFFERENT
        if NEAR_TIE in verdicts:
            return NEAR_TIE
        return CONSISTENT if any(not text.greedy for text in self.texts) else IDENTICAL

    @property
    def exit_code(self) -> int:
        """Of a command: 1 where a text is different, else 0."""
        return int(self.verdict == DIFFERENT)

    def lines(self) -> list[str]:
        """For people: the verdict, then each divergence, then the tests that say most."""
        tokens = sum(text.tokens for text in self.texts)
        told = [f"audit: {self.verdict} ({len(self.texts)} texts, {tokens} tokens replayed against plain decoding)"]
        for number, text in enumerate(self.texts, 1):
            told += [f"  text {number}, {describe(each, text.greedy)}" for each in text.divergences]
        for test in self.tests[:3]:
            where = "all positions" if test.position is None else f"position {test.position}"
            told.append(
                f"  {where}: {test.samples} samples, p = {test.p_value:.3g}, corrected for {len(self.tests)} tests "
                f"{test.corrected:.3g} (different below {self.alpha:g})"
            )
        return told


def describe(found: Divergence, greedy: bool = True) -> str:
    """A divergence in one line."""
    kind = "a near-tie of the precision" if found.near_tie else "no near-tie"
    if greedy:
        ended = "the end of the text"
        what = f"{ended if found.run_id is None else found.run_id} in place of "
        what += ended if found.plain_id is None else str(found.plain_id)
    else:
        what = f"{found.run_id}, which the target's distribution leaves out"
    return (
        f"token {found.token}: {what}; top-2 margin {found.top2_margin:.3g} in fp32, gap {found.gap:.3g}, rounding up "
        f"to {found.tolerance:.3g}: {kind}"
    )


class Auditor:
    """Replays texts with a loaded target, which must not be writing one.

    The target is loaded a second time, in fp32 and on the CPU or its GPU, when a divergence is met. Of int8, which is
    another model to the last bit, and of fp32 the target itself says how close candidates are.

    Args:
        llm: the target, and how it was loaded.
        reference: gives fp32 logits in place of a target that is loaded for it.
        executor: in which the target is loaded in fp32, and asked; None: in the caller's thread.
    """

    def __init__(self, llm: LLM, reference: Reference | None = None, executor: Executor | None = None) -> None:
        self.llm = llm
        self._reference = reference
        self._executor = executor

    def greedy(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        *,
        finish_reason: str = "",
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> TextAudit:
        """Replay a greedy text.

        Args:
            prompt, tokens: ids; tokens with the stop token, if one ended the text.
            finish_reason: of the text; "stop": plain decoding has to stop there too.
            stop, stop_ids: as of `LLM.stream`.
        """
        sampling = SamplingParams()
        return finish(self.steps(prompt, tokens, sampling, finish_reason=finish_reason, stop=stop, stop_ids=stop_ids))

    def sampled(self, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams) -> TextAudit:
        """Replay a sampled text: where each token lies in the target's distribution at its place."""
        return finish(self.steps(prompt, tokens, sampling))

    def steps(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        finish_reason: str = "",
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Steps[TextAudit]:
        """Replay a text of either kind forward by forward, for a caller who has other things to do.

        No text may be under way while it goes on. It may be closed at any time, which gives its slot back.
        Arguments are those of `greedy` and `sampled`.
        """
        self._check_idle()
        if sampling.greedy:
            return self._greedy(prompt, tokens, finish_reason, stop, stop_ids)
        return self._sampled(prompt, tokens, sampling)

    def _greedy(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        finish_reason: str,
        stop: str | Sequence[str] | None,
        stop_ids: Sequence[int] | None,
    ) -> Steps[TextAudit]:
        found: list[Divergence] = []
        start = 0
        while True:
            rest = list(tokens[start:])
            limit = len(rest) + (finish_reason == "stop")
            written = yield from self._plain(prompt, tokens[:start], max(limit, 1), stop, stop_ids)
            plain = written[:limit]
            if plain == rest:
                return TextAudit(len(tokens), True, found)
            same = next((i for i, (a, b) in enumerate(zip(plain, rest, strict=False)) if a != b), None)
            place = min(len(plain), len(rest)) if same is None else same
            ids = [each[place] if place < len(each) else None for each in (plain, rest)]
            context = [*prompt, *tokens[: start + place]]
            found.append((yield from self._divergence(context, start + place + 1, *ids)))
            start += place + 1
            if not found[-1].near_tie or start >= len(tokens):  # behind another text there is nothing to compare
                return TextAudit(len(tokens), True, found)

    def _plain(
        self,
        prompt: Sequence[int],
        begun: Sequence[int],
        limit: int,
        stop: str | Sequence[str] | None,
        stop_ids: Sequence[int] | None,
    ) -> Steps[list[int]]:
        """What plain decoding writes behind the beginning of a text."""
        context, engine = [*prompt, *begun], self.llm.engine
        request, text = self.llm.request(context, max_new_tokens=limit, stop=stop, stop_ids=stop_ids, speculate=False)
        for id in begun:  # in which a stop string may have begun
            text.push(Token(id, "plain"))
        sequence = engine.add(request)
        try:
            while not sequence.finished:
                engine.advance(sequence)
                yield 0.0
        finally:
            engine.abort(sequence)
        return sequence.tokens[len(context) :]

    def _sampled(self, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams) -> Steps[TextAudit]:
        draw = random.Random(f"audit/{sampling.seed}/{list(prompt)}/{list(tokens)}")
        found: list[Divergence] = []
        uniforms: list[float] = []
        place = 0
        try:
            for rows in self._forwards(prompt, tokens):
                for logits in rows:
                    token = tokens[place]
                    p = (
                        distribution(logits[None], sampling.temperature, sampling.top_k, sampling.top_p)[0]
                        .double()
                        .cpu()
                    )
                    if p[token] > 0:
                        above = (p > p[token]) | ((p == p[token]) & (torch.arange(len(p)) < token))
                        uniforms.append(float(p[above].sum() + draw.random() * p[token]) / float(p.sum()))
                    else:
                        context = [*prompt, *tokens[:place]]
                        found.append((yield from self._left_out(context, place + 1, token, p)))
                    place += 1
                yield 0.0
        finally:
            self._free()
        return TextAudit(len(tokens), False, found, uniforms)

    def _forwards(self, prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[list[Tensor]]:
        """The target's logits [V] in front of each token of a text, those of one forward together."""
        model = self.llm.target.model
        yield [model.prefill(prompt)]
        position = len(prompt)
        for start in range(0, len(tokens) - 1, model.max_rows):
            chunk = list(tokens[start : min(start + model.max_rows, len(tokens) - 1)])
            yield list(model.forward(chunk, position + start))

    def _divergence(
        self, context: list[int], token: int, plain_id: int | None, run_id: int | None
    ) -> Steps[Divergence]:
        exact, tolerance = yield from self._measured(context)
        best, second = exact.topk(2).values.tolist()
        known = [float(exact[id]) for id in (plain_id, run_id) if id is not None and 0 <= id < len(exact)]
        gap = best - min(known) if len(known) == 2 else math.inf
        return Divergence(token, plain_id, run_id, best - second, gap, tolerance)

    def _left_out(self, context: list[int], token: int, run_id: int, p: Tensor) -> Steps[Divergence]:
        """Of a token of probability 0: the gap is that to the least likely token that has any."""
        exact, tolerance = yield from self._measured(context)
        best, second = exact.topk(2).values.tolist()
        inside = 0 <= run_id < len(exact)
        gap = float(exact[p > 0].min()) - float(exact[run_id]) if inside else math.inf
        return Divergence(token, int(p.argmax()), run_id, best - second, gap, tolerance)

    def _measured(self, context: list[int]) -> Steps[tuple[Tensor, float]]:
        """(fp32 logits [V] of what follows, how far apart near-ties may be).

        The precision's error is taken over the whole vocabulary. A common offset changes no choice, so that its
        standard deviation counts; of a difference of two it is sqrt(2) as large.
        """
        try:
            own = self.llm.target.model.prefill(context).double().cpu()
            exact = (yield from self._exact(context)).double().cpu()
        finally:
            self._free()
        rounding = DEVIATIONS * math.sqrt(2) * float((own - exact).std())
        return exact, max(rounding, FP32_UNITS * 2.0**-24 * float(exact.abs().max()))

    def _exact(self, context: list[int]) -> Steps[Tensor]:
        llm = self.llm
        if self._reference is None and llm.board is None and llm.options.dtype in ("fp32", "int8"):
            return llm.target.model.prefill(context)
        if self._executor is None:
            return self._asked(context)
        future = self._executor.submit(self._asked, context)
        while not future.done():
            yield POLL_S
        return future.result()

    def _asked(self, context: list[int]) -> Tensor:
        if self._reference is None:
            self._reference = self._loaded_reference()
        return self._reference(context)

    def _loaded_reference(self) -> Reference:
        from models.loading import load_model

        llm = self.llm
        device = "cpu" if llm.board else llm.options.device
        config = llm.target.opened.checkpoint.config
        needed, free = announced(config, "fp32", llm.max_seq_len, Form(device)).bytes, free_bytes(device)
        if free is not None and needed > free:
            raise UserError(
                f"whether a divergence is a near-tie is read from the target in fp32: that takes {needed / 2**30:.1f} "
                f"GiB, and {device} has {free / 2**30:.1f} free"
            )
        return load_model(llm.target.opened, device=device, dtype="fp32", max_seq_len=llm.max_seq_len).model.prefill

    def _free(self) -> None:
        """Give back what forwards beside the engine have put into the first slot."""
        self.llm.engine.target.free(0)

    def _check_idle(self) -> None:
        if self.llm.engine.running:
            raise UserError("an audit needs the target's cache: finish the texts that are under way first")


def finish(steps: Steps[T]) -> T:
    """All steps at once: their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def report(texts: Sequence[TextAudit], alpha: float = ALPHA) -> Report:
    """Judge several texts together; sampled ones by `uniformity_tests`."""
    return Report(list(texts), uniformity_tests([text.uniforms for text in texts if not text.greedy]), alpha)


def uniformity_tests(uniforms: Sequence[Sequence[float]]) -> list[UniformityTest]:
    """Test whether numbers, by text and position, are uniform: for all together and for each position that has
    LEAST_SAMPLES. Smallest p-value first."""
    from scipy.stats import kstest

    groups: dict[int | None, list[float]] = {None: [each for text in uniforms for each in text]}
    for text in uniforms:
        for number, each in enumerate(text, 1):
            groups.setdefault(number, []).append(each)
    found = []
    for position, values in groups.items():
        if len(values) >= LEAST_SAMPLES:
            result = kstest(values, "uniform")
            found.append((float(result.pvalue), position, len(values), float(result.statistic)))
    found.sort(key=lambda each: each[0])
    tests: list[UniformityTest] = []
    for rank, (p, position, samples, statistic) in enumerate(found):
        corrected = min(1.0, p * (len(found) - rank))
        corrected = max(corrected, tests[-1].corrected) if tests else corrected
        tests.append(UniformityTest(position, samples, statistic, p, corrected))
    return tests
