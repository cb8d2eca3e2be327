"""Draft heads of all targets on all boards, by kind of text, beside a draft of 1B; and one-pass heads on paper."""

from __future__ import annotations

from collections.abc import Callable

from models.boards import BOARDS, Board
from scripts.planner.counts import SIZES, Counts
from scripts.planner.heads import ASSUMPTIONS, DRAFT_VOCABULARY, HEAD, DFlashTimes, HeadTimes, PEagleTimes, times_of
from scripts.planner.levers import memory_of
from scripts.planner.predict import Family, Figure, Pair, Times
from scripts.planner.speculation import MAX_DRAFT_LENGTH, Acceptance, Round, best, chain, speedup
from scripts.planner.texts import TEXTS

DRAFT = "1B"
# Texts for which one-pass heads are compared: chat, and what heads are best at.
COMPARED = ("mt-bench", "math500")
# Draft lengths of one-pass heads: P-EAGLE's are free, DFlash fills the block of its published drafter.
ONE_PASS: dict[type[HeadTimes], range] = {PEagleTimes: range(1, MAX_DRAFT_LENGTH + 1), DFlashTimes: range(9, 10)}


def heads(counts: Counts, family: Family, pair: Callable[[str, str, Board], Pair], acceptance: float) -> dict:
    """The overview as JSON has it.

    Args:
        pair: of a target, a draft and a board.
        acceptance: of a draft of 1B, at every position; a head at the same is beside it.
    """
    entries = []
    for target in reversed(SIZES):
        for board in BOARDS.values():
            own = pair(target, HEAD, board)
            times = HeadTimes(family, counts, board, own)
            decode = family.figure(1000 / times.decode())
            entry = {
                "target": target,
                "board": board.name,
                "precision": own.precision,
                "draft_precision": own.draft_precision,
                "decode": _figure("tok_s", decode),
                "draft_model": None,
                "at_draft_acceptance": _best(times, Acceptance.equal(acceptance)),
                "texts": by_text(times),
                "one_pass": [_one_pass(each, times) for each in ONE_PASS],
            }
            if SIZES.index(DRAFT) < SIZES.index(target):
                beside = times_of(family, counts, board, pair(target, DRAFT, board))
                entry["draft_model"] = _best(beside, Acceptance.equal(acceptance))
            longest = max(each["k"] for each in entry["texts"])
            entry["fits"] = memory_of(board, own, longest).refusal is None
            entries.append(entry)
    return {
        "kind": "predicted",
        "settings": {
            "context": own.context,
            "attention_cores": own.attention_cores,
            "draft": DRAFT,
            "draft_acceptance": acceptance,
            "draft_vocabulary": DRAFT_VOCABULARY,
        },
        "counts": f"{counts.source}; of heads from their design, not recorded",
        "acceptance": [
            {
                "text": text.name,
                "title": text.title,
                "kind": text.kind,
                "mean_acceptance_length": {str(k): length for k, length in text.lengths.items()},
                "chances": text.acceptance().chances(text.acceptance().known),
                "source": text.source,
            }
            for text in TEXTS.values()
        ],
        "entries": entries,
        "assumptions": ASSUMPTIONS,
    }


def by_text(times: Times) -> list[dict]:
    """The best draft length for every kind of text."""
    return [{"text": text.name, **_best(times, text.acceptance())} for text in TEXTS.values()]


def _best(times: Times, acceptance: Acceptance) -> dict:
    round = best(lambda k: chain(times, acceptance, k), range(MAX_DRAFT_LENGTH + 1))
    return {
        "k": round.k,
        "known_positions": acceptance.known,
        "expected_tokens": round.tokens,
        "draft_ms": float(round.drafting[0]),
        "round_ms": float(round.ms()[0]),
        **_figure("speedup", speedup(times, round)),
        **_figure("tok_s", times.family.figure(round.tok_s)),
    }


def _one_pass(kind: type[HeadTimes], chains: HeadTimes) -> dict:
    """A one-pass head beside the chain: what it would give if it were accepted as often at each position, and how many
    tokens a round must give to equal the chain."""
    times = kind(chains.family, chains.counts, chains.board, chains.pair)
    found = []
    for name in COMPARED:
        acceptance = TEXTS[name].acceptance()
        chained = best(lambda k, a=acceptance: chain(chains, a, k), range(MAX_DRAFT_LENGTH + 1))
        alike = best(lambda k, a=acceptance: chain(times, a, k), ONE_PASS[kind])
        found.append(
            {
                "text": name,
                "k": alike.k,
                "draft_ms": float(alike.drafting[0]),
                "round_ms": float(alike.ms()[0]),
                "tokens_if_alike": alike.tokens,
                "speedup_if_alike": speedup(times, alike).value,
                "tokens_to_equal": float(alike.ms()[0] * chained.tok_s[0] / 1000),
                "chain": _short(chains, chained),
            }
        )
    return {"name": times.drafter.name, "layers": times.drafter.layers, "texts": found}


def _short(times: Times, round: Round) -> dict:
    value = speedup(times, round).value
    return {"k": round.k, "draft_ms": float(round.drafting[0]), "tokens": round.tokens, "speedup": value}


def _figure(name: str, figure: Figure) -> dict:
    return {name: figure.value, f"{name}_band": [figure.low, figure.high]}
