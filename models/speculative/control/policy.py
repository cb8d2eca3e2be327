"""How many tokens to draft now: a fixed number, or what measured costs and acceptance say pays best.

Tokens per second with K drafted tokens, for the costs of this machine and the acceptance of this text:

    rate(K) = (1 + a1 + a1 a2 + ... + a1..aK) / (draft(K) + verify(K + 1))

a_i is the chance that token i is accepted once those before it are. K = 0 is plain decoding. Where n sequences share a
step, each is charged its share of one in which all draft as it does: draft(K, n) / n, where the drafter drafts for all
of them together, and verify(n (K + 1)) / n. Rows that are free for one sequence are not for many, so that K shrinks as
slots fill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from models.errors import UserError
from models.speculative.control.costs import CostModel
from models.speculative.control.estimates import Acceptance, Trust
from models.speculative.drafters import MAX_DRAFT_LENGTH, always
from models.speculative.drafters.registry import reads_prompt
from models.speculative.formulas import tokens_by_length
from models.speculative.stats import Round


class DraftPolicy(Protocol):
    """One text's policy. Asked before every round, told about every round. It may learn from rounds and times, never
    from tokens ahead.

    fits_forward: whether drafts are cut where the rows of all texts of a step would not fit one forward; else texts
    take turns.
    """

    fits_forward: bool

    def holds(self, tokens: int) -> None:
        """What drafts need not read so many tokens of the prompt: its cache holds them from another text."""
        ...

    def shares(self, sequences: int, context: int) -> None:
        """A round begins: so many sequences share its forward, whose texts have so many tokens together."""
        ...

    def draft_length(self, source: str) -> int:
        """Tokens that this source of drafts may propose now; 0: none, decode one token plainly."""
        ...

    def pays(self, source: str, path_prob: float, steps: int, rows: int) -> bool:
        """Whether a further token of a draft is worth its time: see `drafters.Limit`."""
        ...

    @property
    def pays_from(self) -> Callable[[str, int, int], float] | None:
        """(source, steps, rows) -> the path probability from which a further token is worth its time, if it is so."""
        ...

    def read(self, source: str, seconds: float) -> None:
        """What drafts has read the prompt, or what was emitted since it last drafted, in that time."""
        ...

    def update(self, round: Round) -> None:
        """A round has been decided; its tokens are about to be emitted, so that host_s is not known yet."""
        ...


class Controller(Protocol):
    """Makes the policies of a run's texts; what they share is its own."""

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> DraftPolicy:
        """The policy of a text that starts: how many tokens its prompt has, how many will be emitted at most."""
        ...


class FixedDraftLength:
    """The same number in every round, 0 (never draft) to 31, whoever is beside it: a policy for any text."""

    fits_forward = False
    pays = staticmethod(always)
    pays_from = None

    def __init__(self, k: int = 4) -> None:
        if not 0 <= k <= MAX_DRAFT_LENGTH:
            raise UserError(f"draft length {k}: must be between 0 (no speculation) and {MAX_DRAFT_LENGTH}")
        self.k = k

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> DraftPolicy:
        """Itself."""
        return self

    def holds(self, tokens: int) -> None:
        """Nothing that would change the number."""

    def shares(self, sequences: int, context: int) -> None:
        """Nothing that would change the number."""

    def draft_length(self, source: str) -> int:
        """The number."""
        return self.k

    def read(self, source: str, seconds: float) -> None:
        """Nothing to learn."""

    def update(self, round: Round) -> None:
        """Nothing to learn."""


class _Outlook(NamedTuple):
    """What a source promises: tokens per second without it and with its best draft length, seconds of one more step,
    the chance of one more token."""

    plain: float
    best: float
    length: int
    step_s: float
    next_chance: float


class AutoDraftLength:
    """The draft length with the highest expected rate (see the module), learnt while it runs; one object for a run.

    - Costs are those of the whole run. Acceptance is learnt anew in each text, beginning from what the run has shown
      so far; texts may overlap.
    - A draft that knows its own probabilities stops, or grows as a tree, only as far as a further token pays (`pays`):
      the tokens it is expected to add against those that its time would give otherwise. How far its probabilities can
      be trusted is measured. It may go on to the longest length, as it stops by itself.
    - Of several sources that could draft, one with a lower expected rate than another leaves the round to that one.
    - A draft model has to read the prompt before its first draft, and later what was emitted without it. If what is
      still to be emitted could not earn that back, none is made.
    - While plain decoding is best, a short draft is tried now and then: each plain round saves up PROBE_SHARE of its
      time, and a probe waits until its own time is saved, the reading included. One that fails makes the next wait
      twice as long.
    - While several texts draft in every step, nothing is learnt about plain ones, and a machine changes: now and then,
      seldom where drafting gains much, all decode plainly for REFRESHED steps.

    It is itself a policy, that of the text begun last.

    Args:
        lengths: draft lengths to choose from; 0 is always among them.
        costs: known from before, e.g. measured at warm-up.
    """

    PROBE_SHARE = 0.01
    PROBE_LENGTH = 1
    PRIOR = 0.6  # chance of acceptance before anything is known
    RUN_DECAY = 0.99
    LONGEST_WAIT = 8
    REFRESH, REFRESHED = 32, 2  # joint steps
    MUCH = 1.3  # a gain that need not be looked at so often
    KEPT = 8  # plain rounds, after which it is looked again whether a draft pays
    fits_forward = True

    def __init__(self, lengths: Iterable[int] = range(7), costs: CostModel | None = None) -> None:
        self.lengths = sorted({0, *lengths})
        if self.lengths[0] < 0 or self.lengths[-1] > MAX_DRAFT_LENGTH:
            wrong = self.lengths[0] if self.lengths[0] < 0 else self.lengths[-1]
            raise UserError(f"draft length {wrong}: must be between 0 and {MAX_DRAFT_LENGTH}")
        self.costs = costs or CostModel()
        self.saved = 0.0  # seconds, for a probe
        self.trust: dict[str, Trust] = {}
        self._run: dict[str, Acceptance] = {}  # by source, of all texts
        self._nodes: dict[str, float] = {}  # by source of trees: tokens that one has, on average
        self._together: dict[str, int] = {}  # by source: sequences that it drafted for at once last, among several
        self._since_plain = self._refreshing = 0  # joint steps: since a plain one, and still to be plain
        self._seen = (0.0, 0.0)  # seconds of the joint verification and drafting that were noted last
        self.latest = AutoPolicy(self, 0, 0)

    def begin(self, prompt_tokens: int, max_new_tokens: int) -> DraftPolicy:
        """A policy that learns this text and, with all others, the run."""
        self.latest = AutoPolicy(self, prompt_tokens, max_new_tokens - 1)
        return self.latest

    @property
    def chosen(self) -> list[int]:
        """Tokens drafted in the rounds of the text begun last."""
        return self.latest.chosen

    def holds(self, tokens: int) -> None:
        """As of the text begun last."""
        self.latest.holds(tokens)

    def shares(self, sequences: int, context: int) -> None:
        """As of the text begun last."""
        self.latest.shares(sequences, context)

    def draft_length(self, source: str) -> int:
        """As of the text begun last."""
        return self.latest.draft_length(source)

    def pays(self, source: str, path_prob: float, steps: int, rows: int) -> bool:
        """As of the text begun last."""
        return self.latest.pays(source, path_prob, steps, rows)

    def pays_from(self, source: str, steps: int, rows: int) -> float:
        """As of the text begun last."""
        return self.latest.pays_from(source, steps, rows)

    def read(self, source: str, seconds: float) -> None:
        """As of the text begun last."""
        self.latest.read(source, seconds)

    def update(self, round: Round) -> None:
        """As of the text begun last."""
        self.latest.update(round)

    def break_even(self, source: str = "model") -> float | None:
        """The acceptance from which drafting one token pays: above 1 none does. None before it is known."""
        plain = self.round_s(source, 0)
        return self.round_s(source, 1) / plain - 1 if plain and self.costs.draft_s(source) else None

    def report(self) -> dict:
        """What it decided with, for people: costs in ms, acceptance by position of the text begun last."""

        def milliseconds(what: str) -> dict[str, float]:
            return {str(which): 1000 * seconds for which, seconds in self.costs.known(what).items()}

        drafted = list(dict.fromkeys(source for source, *_ in self.costs.known("draft")))
        source = next((name for name in drafted if reads_prompt(name)), next(iter(drafted), None))  # the dearest
        return {
            "lengths": self.lengths,
            "verify_ms": milliseconds("verify"),
            "draft_ms": {name: 1000 * self.costs.draft_s(name) for name in drafted},
            "draft_step_ms": {name: 1000 * self.costs.draft_step_s(name) for name in drafted},
            "prefill_token_ms": milliseconds("prefill"),
            "break_even": self.break_even(source) if source else None,
            "acceptance": self.latest.chances(),
            "trust": {name: trust.power for name, trust in self.trust.items()},
        }

    # ------------------------------------------------------------------------------------- what its texts share
    def acceptance(self, source: str) -> Acceptance:
        """How likely drafts of a source are accepted, in all texts."""
        if source not in self._run:
            self._run[source] = Acceptance(self.PRIOR, decay=self.RUN_DECAY)
        return self._run[source]

    def trust_in(self, source: str, path_prob: float) -> float:
        """How likely a token is accepted to which a draft gives this probability."""
        return self.trust[source].chance(path_prob) if source in self.trust else path_prob

    def path_prob_of(self, source: str, chance: float) -> float:
        """What probability a draft gives a token that is accepted with this chance, not below 0."""
        return self.trust[source].path_prob(chance) if source in self.trust else chance

    def round_s(self, source: str, k: int, sequences: int = 1, context: int = 0) -> float:
        """One sequence's share of a round that drafts k tokens, or k levels, from this source for so many sequences."""
        if k and reads_prompt(source) and (whole := self.costs.whole_round_s(k)) is not None:
            return whole
        nodes = max(k, self._nodes.get(source, 0)) if k else 0
        verify_s = self.costs.verify_s(sequences * (1 + round(nodes)), context)
        return self.draft_s(source, k, sequences) + verify_s / sequences

    def draft_s(self, source: str, k: float, sequences: int = 1) -> float:
        """One sequence's share of drafting k tokens. Until it is known whether a source drafts for several at once, it
        is taken to: that shows with the first draft."""
        together = 1 if sequences == 1 else min(self._together.get(source, sequences), sequences)
        if together <= 1:
            return self.costs.draft_s(source, k)
        return self.costs.draft_s(source, k, together) / together

    def add_round(self, round: Round, context: int) -> float:
        """Note what the forwards of a round cost: seconds of its verification that are this sequence's share."""
        joint = round.joint
        if joint is None:
            if round.verify_s or not round.drafted:
                self.costs.add("verify", round.drafted + 1, round.verify_s, context)
            return round.verify_s
        seen = self._seen
        if joint.verify_s != seen[0]:
            self._since_plain = 0 if joint.rows == joint.sequences else self._since_plain + 1
            self._refreshing = max(0, self._refreshing - 1)
        if joint.prompt_rows == 0 and joint.verify_s != seen[0]:  # once for all that shared it
            self.costs.add("verify", joint.rows, joint.verify_s, joint.context)
        if round.drafted and joint.sequences > 1:
            self._together[round.source] = joint.drafting
            if joint.drafting > 1 and joint.draft_s != seen[1]:
                self.costs.add("draft", (round.source, joint.draft_steps, joint.drafting), joint.draft_s)
        self._seen = joint.verify_s, joint.draft_s
        return joint.verify_s / joint.sequences

    def plain_due(self, gain: float, sequences: int, context: int) -> bool:
        """Whether it is time that several texts that draft, at this expected gain, decode plainly."""
        often = self.REFRESH * (4 if gain > self.MUCH else 1)
        if not self._refreshing and self._since_plain >= often:
            self._refreshing, self._since_plain = self.REFRESHED, 0
            self.costs.doubt(sequences, context)
        return self._refreshing > 0

    def add_nodes(self, source: str, drafted: int) -> None:
        """A tree had so many tokens."""
        self._nodes[source] = 0.9 * self._nodes.get(source, drafted) + 0.1 * drafted

    def _outlook(self, source: str) -> _Outlook:
        return self.latest.outlook(source)

    def _of(self, source: str) -> Acceptance:
        return self.latest.acceptance(source)


class AutoPolicy:
    """One text's policy under `AutoDraftLength`.

    Args:
        run: what all texts share.
        prompt_tokens: that a draft model has to read.
        remaining: tokens that will be emitted at most, after the first.
    """

    fits_forward = True

    def __init__(self, run: AutoDraftLength, prompt_tokens: int, remaining: int) -> None:
        self.run = run
        self.chosen: list[int] = []  # tokens drafted in the rounds so far
        self._unread, self._remaining = prompt_tokens, remaining  # tokens a draft has to read, still to be emitted
        self._acceptance: dict[str, Acceptance] = {}
        self._drafted: set[str] = set()  # sources, in this text
        self._read = False  # the draft has read the prompt
        self._wait, self._probing = 1, False
        self._asked = 0
        self._sequences, self._context = 1, 0  # that share the step, and the tokens of all their texts
        self._outlooks: dict[str, _Outlook] = {}  # by source, until a round changes them
        self._kept = 0  # plain rounds since they were looked at

    def holds(self, tokens: int) -> None:
        """There is that much less to read before the first draft."""
        self._unread = max(0, self._unread - tokens)

    def shares(self, sequences: int, context: int) -> None:
        """A round begins: its company is a part of every cost."""
        if sequences != self._sequences or context // CostModel.CONTEXT != self._context // CostModel.CONTEXT:
            self._outlooks.clear()
        self._sequences, self._context = sequences, context

    def draft_length(self, source: str) -> int:
        """The best length, 0 where plain decoding is better."""
        outlook = self.outlook(source)
        k = outlook.length
        self._probing = False
        if k and self._better_elsewhere(source):
            k = 0
        elif not k or not self._earns_its_reading(source, outlook):
            k = self._probe(source)
        elif source in self.run.trust:
            k = self.run.lengths[-1]
        n = self._sequences
        if k and n > 1 and outlook.plain and self.run.plain_due(outlook.best / outlook.plain, n, self._context):
            k = 0
        self._asked = k
        return k

    def pays(self, source: str, path_prob: float, steps: int, rows: int) -> bool:
        """Whether a further token of a draft is worth its time: see `drafters.Limit`."""
        return path_prob >= self.pays_from(source, steps, rows)

    def pays_from(self, source: str, steps: int, rows: int) -> float:
        """The path probability from which a further token of a draft is worth its time."""
        if self._probing:
            return 0.0
        outlook, verify_s, n = self.outlook(source), self.run.costs.verify_s, self._sequences
        seconds = (verify_s(n * rows, self._context) - verify_s(n * (rows - 1), self._context)) / n
        chance = 1.0
        if steps:
            seconds += steps * outlook.step_s
            chance = outlook.next_chance
        return self.run.path_prob_of(source, seconds * outlook.best / chance) if chance else math.inf

    def read(self, source: str, seconds: float) -> None:
        """A draft model has read the prompt, or what was emitted since it last drafted, in that time."""
        if reads_prompt(source):
            if not self._read:  # later on, most of what is unread comes along with the draft's first step
                self.run.costs.add("prefill", source, seconds / max(self._unread, 1))
            self._read = True

    def update(self, round: Round) -> None:
        """Learn from a round."""
        run, costs = self.run, self.run.costs
        one_program = round.drafted > 0 and not round.verify_s
        share_s = run.add_round(round, self._context)
        self.chosen.append(round.drafted)
        self._remaining -= round.emitted
        drafted_by_model = round.drafted and reads_prompt(round.source)
        self._unread = 0 if drafted_by_model else self._unread + round.emitted
        self._kept += 1
        if round.drafted or self._kept >= run.KEPT or not all(each.plain for each in self._outlooks.values()):
            self._outlooks.clear()
            self._kept = 0
        if not round.drafted:
            run.saved += run.PROBE_SHARE / self._wait * share_s
            return
        source, depth = round.source, round.depth
        # The first draft in a text prepares things that the others need not.
        if one_program:
            costs.add("round", depth, round.draft_s)
        elif source in self._drafted and (round.joint is None or round.joint.drafting <= 1):
            costs.add("draft", (source, depth), round.draft_s if round.joint is None else round.joint.draft_s)
        self._drafted.add(source)
        if round.parents is not None:
            run.add_nodes(source, round.drafted)
        stopped = depth < self._asked and not round.cut
        next_chance = self._chance_left_out(round) if stopped and round.path_probs else None
        for acceptance in (self.acceptance(source), run.acceptance(source)):
            acceptance.add(depth, round.accepted, next_chance)
        if round.path_probs:
            run.trust.setdefault(source, Trust()).add(round.path_probs[: round.drafted], round.accepted)
        if self._probing:
            self._wait = 1 if round.accepted else min(2 * self._wait, run.LONGEST_WAIT)

    def acceptance(self, source: str) -> Acceptance:
        """How likely drafts of a source are accepted in this text."""
        if source not in self._acceptance:
            self._acceptance[source] = Acceptance(self.run.PRIOR, parent=self.run.acceptance(source))
        return self._acceptance[source]

    def chances(self) -> dict[str, list[float]]:
        """Of acceptance in this text, by source and position."""
        return {name: each.chances(self.run.lengths[-1]) for name, each in self._acceptance.items()}

    def outlook(self, source: str) -> _Outlook:
        """What a source promises now."""
        if source in self._outlooks:
            return self._outlooks[source]
        run, acceptance = self.run, self.acceptance(source)
        tokens = tokens_by_length(acceptance.chances(run.lengths[-1]))
        plain, best, length = 0.0, 0.0, 0
        for k in run.lengths:
            seconds = run.round_s(source, k, self._sequences, self._context)
            rate = tokens[k] / seconds if seconds else 0.0
            plain = plain if k else rate
            if rate > best:
                best, length = rate, k
        n, next_chance = self._sequences, acceptance.next_chance()
        step_s = run.draft_s(source, 2, n) - run.draft_s(source, 1, n)
        return self._outlooks.setdefault(source, _Outlook(plain, best, length, step_s, next_chance))

    def _better_elsewhere(self, source: str) -> bool:
        """Whether a draft model promises more than a source that is asked before it; it can always draft, while
        whether those before it find anything shows only when they are asked."""
        best = self.outlook(source).best
        models = [other for other in self._acceptance if reads_prompt(other)] if self._read else []
        return not reads_prompt(source) and any(self.outlook(other).best > best for other in models)

    def _chance_left_out(self, round: Round) -> float:
        """Of the token that a draft looked at and left out, or stopped before."""
        if len(round.path_probs) > round.drafted and round.path_probs[-1]:
            before = round.path_probs[-2] if round.drafted else 1.0
            return self.run.trust_in(round.source, min(1.0, round.path_probs[-1] / before))
        return self.acceptance(round.source).next_chance()

    def _earns_its_reading(self, source: str, outlook: _Outlook) -> bool:
        """Whether what is still to be emitted saves more time than the draft takes to read what it has not read."""
        if not outlook.plain:
            return True
        return self._remaining * (1 / outlook.plain - 1 / outlook.best) > self._reading_s(source)

    def _reading_s(self, source: str) -> float:
        return self._unread * (self.run.costs.prefill_s(source) or 0.0) if reads_prompt(source) else 0.0

    def _probe(self, source: str) -> int:
        """PROBE_LENGTH if its time has been saved up, else 0."""
        run = self.run
        k = min((k for k in run.lengths if k >= run.PROBE_LENGTH), default=0)
        n, verify_s = self._sequences, run.costs.verify_s  # of which it alone may draft: all wait for that
        plain_s = verify_s(n, self._context)
        whole = run.costs.whole_round_s(k) if k and reads_prompt(source) else None
        price = (run.costs.draft_s(source, k) + verify_s(n + k, self._context) if whole is None else whole) - plain_s
        price += self._reading_s(source)
        if not k or run.saved < price or not plain_s:
            return 0
        run.saved -= price
        self._probing = True
        return k
