"""Drafters that do one thing wrong after some sound rounds.

One list for `test_faults.py` and for `tests/record_refusals.py`, which writes the warnings down.
"""

import torch

from models.speculative.drafters import PerSequence
from models.speculative.drafters.model import ModelDrafter

SOUND_ROUNDS = 3
NAN, INF = float("nan"), float("inf")


def raises(draft):
    """A fault: an error of its own."""
    raise RuntimeError("broken")


def _one(value):
    def change(probs):
        probs[-1, 0] = value
        return probs

    return change


def faults(vocabulary):
    """What a drafter may do wrong: (what it makes of a sound draft, words of the one warning)."""

    def damaged(change):
        """A draft whose probabilities a function has changed; of a greedy text, made up first."""

        def fault(draft):
            made_up = torch.full((len(draft.tokens), vocabulary), 1 / vocabulary)
            return draft._replace(probs=change(made_up if draft.probs is None else draft.probs.clone()))

        return fault

    return {
        "raises": (raises, "RuntimeError: broken"),
        "out of memory": (lambda draft: torch.empty(2**60), "RuntimeError"),
        "id beyond the vocabulary": (
            lambda draft: draft._replace(tokens=[*draft.tokens[:-1], vocabulary]),
            f"drafted id {vocabulary}",
        ),
        "negative id": (lambda draft: draft._replace(tokens=[-1, *draft.tokens[1:]]), "drafted id -1"),
        "too many tokens": (lambda draft: draft._replace(tokens=[1] * 40), "40 drafted tokens"),
        "no tree": (lambda draft: draft._replace(parents=[5] * len(draft.tokens)), "no tree"),
        "parents missing": (lambda draft: draft._replace(parents=[-1] * (len(draft.tokens) + 1)), "no tree"),
        "NaN everywhere": (damaged(lambda probs: probs * NAN), "not finite"),
        "one NaN": (damaged(_one(NAN)), "not finite"),
        "one infinity": (damaged(_one(INF)), "not finite"),
        "too few rows of probabilities": (damaged(lambda probs: probs[1:]), "probabilities of shape"),
        "another vocabulary": (damaged(lambda probs: probs[:, :-1]), "probabilities of shape"),
        "probabilities without rows": (damaged(lambda probs: probs[0]), "probabilities of shape"),
        "no draft": (lambda draft: None, "AttributeError"),
    }


FAULTS = faults(64)


class Faulty:
    """A real drafter that does one thing wrong after a few rounds."""

    def __init__(self, drafter, fault):
        self.drafter, self.fault, self.left = drafter, fault, SOUND_ROUNDS

    def propose(self, tokens, limit):
        draft = self.drafter.propose(tokens, limit)
        self.left -= 1
        return self.fault(draft) if self.left < 0 and draft.tokens else draft

    def observe(self, accepted):
        self.drafter.observe(accepted)


def drafting(draft, fault=None, which=None):
    """A drafter for all sequences, faulty for all or for those of one prompt."""

    def make(sequence):
        model = ModelDrafter(draft.slot(sequence.slot), sequence.request.sampling)
        return Faulty(model, fault) if fault and which in (None, sequence.request.prompt) else model

    return PerSequence(make)
