"""Drafting with a smaller model of the same vocabulary."""

import math
import time
from collections.abc import Generator
from typing import cast

import torch

from models.speculative.acceptance import distribution, is_distribution, sample
from models.speculative.drafters import Draft, Limit
from models.speculative.drafters.in_step import Answer, Ask, Reads, Steps, alone, answer_of
from models.speculative.model import ChainsWhile, DraftHead, DraftModel, Draws, FusedRounds
from models.speculative.sampling import SamplingParams


class ModelDrafter:
    """A model that runs ahead of the target. One object per generation: it owns the model's cache meanwhile.

    Greedy drafts are chosen by argmax and move only ids; sampled ones are drawn with the target's own temperature,
    top-k and top-p, from a stream of random numbers of their own. A model that chains draws them itself (`Draws`).

    Where tokens have a price (`Limit.pays`) it stops by its own confidence: after the first token, before a step or a
    row that its probabilities so far do not pay for. The probability of a token's distribution counts, never that of
    the token drawn: so sampling stays lossless.

    Where draft and target share a device, a greedy round may be one program (`rounds`). Every such round feeds the
    last two tokens, whether the model has seen the first of them or not, so that there is one program for all rounds
    of a length. Asked for a length between two that there are programs for, it drafts the shorter: a program costs the
    same whatever is used of it. What fits no round (a text of one token, or no program) is drafted as ever.

    A model whose logits are not finite (damaged weights, an overflow) drafts nothing more for the text, as its cache
    may hold such numbers from then on.

    Args:
        model: owned for the time of a text.
        sampling: the target's.
        confident: False where probabilities are dear to get (they would leave the device): never stops by itself.
        rounds: of this model and the target; only for greedy texts with batched verification.
    """

    source = "model"

    def __init__(
        self,
        model: DraftModel,
        sampling: SamplingParams,
        *,
        confident: bool = True,
        rounds: FusedRounds | None = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.cached = 0  # leading tokens of the sequence that the model's cache holds rightly
        self._ahead = 0  # drafted tokens that it holds beyond those
        self._generator = sampling.generator("draft")
        self._confident = confident
        self._broken = False  # the model's logits were not finite
        self._chains = model if isinstance(model, ChainsWhile) and model.chains else None
        self._words: list[int] = []  # random bits of drafts to come, where the model draws them itself
        self._rounds = rounds if rounds is not None and rounds.draft_lengths else None
        self._target_ids: torch.Tensor | None = None  # of the model's ids, where it drafts a part of the vocabulary
        if isinstance(model, DraftHead):
            self._target_ids, self._target_vocab_size = model.target_ids, model.target_vocab_size

    def propose(self, tokens: list[int], limit: Limit) -> Draft:
        """Draft as many tokens as allowed and as the model's own context has room for, after catching up."""
        return alone(self._steps(tokens, limit, company=False), self._answer)

    def steps(self, tokens: list[int], limit: Limit) -> Steps:
        """As `propose`, in company: see `in_step.DraftsInSteps`."""
        return self._steps(tokens, limit, company=True)

    def _steps(self, tokens: list[int], limit: Limit, company: bool) -> Steps:
        k = min(limit(self.source), self.model.max_seq_len - len(tokens) + 1)  # the last one drafted is not written
        if k < 1 or self._broken:
            return Draft([])
        prefill_s = yield from self._reading(tokens, company)
        if self._broken:
            return Draft([], None, prefill_s, source=self.source)
        if self._rounds is not None and len(tokens) > 1:
            return self._fused(self._rounds, tokens, k, prefill_s)
        position, pending = self.cached, tokens[self.cached :]
        if not company and (draft := self._chained(tokens, k, prefill_s, limit)):
            return draft
        if self.sampling.greedy and not company and not (self._confident and limit.priced):
            self.fed(tokens, k)
            return Draft(self.model.draft_greedy(pending, position, k), None, prefill_s, source=self.source)
        return (yield from self._step_by_step(tokens, pending, position, k, prefill_s, limit))

    def resume(self, held: int) -> None:
        """The model's cache holds the first `held` tokens of the text."""
        self.cached = held

    def observe(self, accepted: int) -> None:
        """Advance over the kept tokens: all kept leaves the last, which was never fed, and its successor to feed."""
        self.cached += min(accepted, self._ahead)

    def fed(self, tokens: list[int], k: int) -> None:
        """Note that the cache now holds all of `tokens`, and of k tokens drafted after them all but the last."""
        self.cached, self._ahead = len(tokens), k - 1

    def read(self, tokens: list[int]) -> float:
        """Before the first draft read all but the last token, which every round feeds itself; later, what one forward
        does not take at once. Returns seconds."""
        rows = self.model.max_rows
        if self.cached and len(tokens) - self.cached <= rows:
            return 0.0
        began = time.perf_counter()
        if not self.cached:
            if len(tokens) > 1:
                # Reading a number waits for the device.
                self._broken = not math.isfinite(self.model.prefill(tokens[:-1])[0].item())
            self.cached = len(tokens) - 1
        while len(tokens) - self.cached > rows:
            self.model.greedy(tokens[self.cached : self.cached + rows], self.cached)
            self.cached += rows
        return time.perf_counter() - began

    def _reading(self, tokens: list[int], company: bool) -> Generator[Ask, Answer, float]:
        """As `read`; in company it is others that compute, and clock it."""
        if not company:
            return self.read(tokens)
        if self.cached and len(tokens) - self.cached <= self.model.max_rows:
            return 0.0
        if len(tokens) - 1 > self.cached:
            chance, _ = cast("tuple[float, int]", (yield Ask(tokens[self.cached : -1], self.cached, Reads.NOTHING)))
            self._broken = not math.isfinite(chance)
        self.cached = len(tokens) - 1
        return 0.0

    def read_before_round(self, tokens: list[int]) -> None:
        """Read all that a fused round does not feed itself: all but the last two tokens."""
        if len(tokens) - self.cached > 2:
            self.model.greedy(tokens[self.cached : -2], self.cached)

    def _fused(self, rounds: FusedRounds, tokens: list[int], k: int, prefill_s: float) -> Draft:
        """A round for the engine to run, of the longest length up to k that there is a program for, else of k."""
        k = max((length for length in rounds.draft_lengths if length <= k), default=k)
        self.read_before_round(tokens)
        self.fed(tokens, k)
        return Draft([], None, prefill_s, self.source, fused=(rounds, k))

    def _chained(self, tokens: list[int], k: int, prefill_s: float, limit: Limit) -> Draft | None:
        """A draft by one call of the model, if it can do that: as step by step."""
        priced = self._confident and limit.priced
        if self._chains is None or (priced and limit.pays_from is None):
            return None
        taken, least = [0.0] * k, [0.0] * k  # path probabilities from which a token is drafted, and a next one begun
        if priced and limit.pays_from is not None:
            for i in range(k):
                taken[i] = limit.pays_from(self.source, 0, i + 2) if i else 0.0
                least[i] = max(taken[i], limit.pays_from(self.source, 1, i + 3) if i + 1 < k else 0.0)
        draws = None if self.sampling.greedy else self._draws(k)
        ids, chances, laws = self._chains.draft_while(tokens[self.cached :], self.cached, least, draws)
        self.fed(tokens, len(ids))
        self._broken = not math.isfinite(chances[-1])
        if self._broken:
            ids, chances = ids[:-1], chances[:-1]
        elif chances[-1] < taken[len(ids) - 1]:
            ids = ids[:-1]
        if laws is not None:
            laws = laws[: len(ids)] if ids else None
            del self._words[: len(ids)]
        return Draft(ids, laws, prefill_s, source=self.source, path_probs=chances if priced else ())

    def _step_by_step(
        self, tokens: list[int], pending: list[int], position: int, k: int, prefill_s: float, limit: Limit
    ) -> Steps:
        drafted: list[int] = []
        drawn_from: list[torch.Tensor] = []
        path_probs: list[float] = []  # likeliest token of each distribution, and those before
        greedy, priced = self.sampling.greedy, self._confident and limit.priced
        reads = Reads.LOGITS
        if greedy:
            reads = Reads.LIKELIEST if priced else Reads.BEST if self._confident else Reads.ID
        looked = 0  # tokens fed after `tokens`
        while len(drafted) < k:
            if priced and drafted and not limit.pays(self.source, path_probs[-1], 1, len(drafted) + 2):
                break
            answer = yield Ask(pending, position, reads)
            looked, drawn = len(drafted), None
            if isinstance(answer, torch.Tensor):
                if self._chains is not None:
                    drawn = self._chains.draw(answer, self._draws(1))
                    chance = drawn.chances[0]
                    self._broken = not math.isfinite(chance)
                elif self._usable(answer):
                    probs = self._drawn_from(answer)
                    chance = probs.max().item() if priced else 1.0
                if self._broken:
                    break
            else:
                chance, token = answer
                self._broken = not math.isfinite(chance)
                if self._broken:
                    break
            if priced:
                path_probs.append(chance * (path_probs[-1] if path_probs else 1.0))
                if drafted and not limit.pays(self.source, path_probs[-1], 0, len(drafted) + 2):
                    break
            if greedy:
                token = token if reads is Reads.ID else self._id(token)
            elif drawn is not None and drawn.laws is not None:
                drawn_from.append(drawn.laws)
                token = drawn.ids[0]
                del self._words[0]
            else:
                drawn_from.append(self._spread(probs))
                token = self._id(sample(probs[0], self._generator))
            drafted.append(token)
            position, pending = position + len(pending), [token]
        self.fed(tokens, looked + 1)
        laws = torch.cat(drawn_from) if drawn_from else None
        return Draft(drafted, laws, prefill_s, source=self.source, path_probs=path_probs)

    def _draws(self, count: int) -> Draws:
        """How the next so many tokens are drawn."""
        while len(self._words) < count:
            self._words += torch.empty(64, dtype=torch.long).random_(generator=self._generator).tolist()
        words = [word << 1 for word in self._words[:count]]  # they have 63 bits
        return Draws(self.sampling.temperature, words, self.sampling.top_k, self.sampling.top_p)

    def _answer(self, ask: Ask) -> Answer:
        """Compute what is asked for in the sequence's own slot."""
        if ask.reads is Reads.ID:
            return 1.0, self.model.greedy(ask.tokens, ask.position)[-1]
        return answer_of(self._last_logits(list(ask.tokens), ask.position), ask.reads)

    def _last_logits(self, tokens: list[int], position: int) -> torch.Tensor:
        """Logits [1, V] after the last of tokens at position.. ."""
        return self.model.forward(tokens, position)[-1:]

    def _usable(self, logits: torch.Tensor) -> bool:
        """Whether logits [n, V] can be drafted from; if not, this was the last try."""
        self._broken = not is_distribution(logits)
        return not self._broken

    def _drawn_from(self, logits: torch.Tensor) -> torch.Tensor:
        """Distributions [n, V], by the places in the model's logits."""
        params = self.sampling
        return distribution(logits, params.temperature, params.top_k, params.top_p)

    def _spread(self, probs: torch.Tensor) -> torch.Tensor:
        """Distributions [n, V] over the target's vocabulary: 0 for ids that the model cannot draft."""
        if self._target_ids is None:
            return probs
        return probs.new_zeros(len(probs), self._target_vocab_size).index_copy_(1, self._target_ids, probs)

    def _id(self, place: int) -> int:
        """The target's id for a place in the model's logits."""
        return place if self._target_ids is None else int(self._target_ids[place])

    def _ids(self, ids: torch.Tensor) -> torch.Tensor:
        """The target's ids for places in the model's logits."""
        return ids if self._target_ids is None else self._target_ids[ids]
