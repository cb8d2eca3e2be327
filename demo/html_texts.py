"""The texts of a run as data for the page's script: tokens by id, and of every round what it proposed and wrote.

    vocab    text of each id that occurs; null without a tokenizer, where ids are shown
    special  ids of tokens that are no text, such as the end of a text
    fused    whether draft and verification have one time together
    runs     one per prompt: label, prompt (its end) and left (characters cut from its start), note, tokens (ids), text
             (of tokens that read otherwise in this text than alone: characters of several tokens), ttft (ms or null),
             rounds, and baseline, the other path's tokens and text if they differ, with the first index that does

A round is [emitted, [draft, verify, host] in ms or 0, origin of the target's own token] and, if anything was drafted,
proposed ids, indices of those accepted, parents of a tree or 0, and what drafted.
"""

from collections.abc import Sequence
from typing import Any

from demo.runs import Run
from demo.session import Session
from demo.wording import figures, pace
from models.cli.prompts import Prompt
from models.cli.text import plural
from models.llama.tokenizer import LlamaTokenizer
from models.speculative.stats import Round

LONGEST_PROMPT = 3000  # characters, of which the end is shown


def texts(session: Session) -> dict[str, Any]:
    """The data described above, of all complete prompts and of what an interruption left."""
    words = _Words(session.tokenizer)
    runs = [_run_data(row.runs, words, session, " | ".join(figures(row, session))) for row in session.rows]
    begun = {run.path: run for run in session.under_way if run.tokens}
    if begun:
        last = session.under_way[-1]
        said = pace(last, session)
        note = f"interrupted on the {last.path} path after {plural(len(last.tokens), 'token')}"
        if said:
            note += f": {said}"
        runs.append(_run_data(begun, words, session, note, "interrupted" if last.counted else "warm-up, interrupted"))
    return {"vocab": words.vocab, "special": sorted(words.special), "fused": session.fused, "runs": runs}


def _run_data(runs: dict[str, Run], words: "_Words", session: Session, note: str, state: str = "") -> dict[str, Any]:
    """One prompt: its speculative text round by round, or the baseline's where there is no other."""
    run = runs.get("speculative") or runs["baseline"]
    other = runs.get("baseline")
    prompt = run.prompt.text
    data = {
        "label": f"{_label(run.prompt)} ({state})" if state else _label(run.prompt),
        "prompt": prompt[-LONGEST_PROMPT:],
        "left": max(len(prompt) - LONGEST_PROMPT, 0),
        "note": note,
        **words.stream(run.tokens),
        "ttft": round(1000 * run.stats.ttft_s, 2) if session.timed else None,
        "rounds": [_round_data(each, words, session.timed) for each in run.stats.rounds],
        "baseline": None,
    }
    if other and other.tokens != run.tokens:
        pairs = zip(other.tokens, run.tokens, strict=False)
        ends = min(len(other.tokens), len(run.tokens))
        differs = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), ends)
        if differs < ends or not state:  # one that is only cut short says nothing else
            data["baseline"] = {**words.stream(other.tokens), "differs": differs}
    return data


def _label(prompt: Prompt) -> str:
    words = " ".join(prompt.text[:300].split())
    return f"{prompt.number}: {words[:70]}…" if len(words) > 70 else f"{prompt.number}: {words}"


def _round_data(round_: Round, words: "_Words", timed: bool) -> list:
    times = [round(1000 * seconds, 3) for seconds in (round_.draft_s, round_.verify_s, round_.host_s)]
    data: list = [round_.emitted, times if timed else 0]
    if not round_.proposed:
        return [*data, "plain"]
    words.add(round_.proposed)
    own = "bonus" if round_.accepted == round_.depth else "corrected"
    return [*data, own, round_.proposed, round_.kept, round_.parents or 0, round_.source]


class _Words:
    """Texts of token ids, gathered while they are met."""

    def __init__(self, tokenizer: LlamaTokenizer | None) -> None:
        self.vocab: dict[int, str] | None = None if tokenizer is None else {}
        self.special: set[int] = set()
        self._tokenizer = tokenizer

    def add(self, ids: Sequence[int]) -> None:
        """Make sure that these have a text."""
        if self.vocab is None:
            return
        for id in ids:
            if id not in self.vocab:
                self.vocab[id] = self._word(id)

    def stream(self, ids: Sequence[int]) -> dict[str, Any]:
        """{tokens, text} of ids that follow each other."""
        self.add(ids)
        text: dict[int, str] = {}
        if self.vocab is not None:
            detokenizer = self._tokenizer.detokenizer()
            pieces = [detokenizer.push(id) for id in ids]
            if pieces:
                pieces[-1] += detokenizer.flush()
            read = enumerate(zip(ids, pieces, strict=True))
            text = {i: piece for i, (id, piece) in read if piece != self.vocab[id] and id not in self.special}
        return {"tokens": ids, "text": text}

    def _word(self, id: int) -> str:
        spelled = self._tokenizer.token_text(id)
        text = self._tokenizer.decode([id])
        if not text:  # a special token, or an id that only pads the vocabulary
            self.special.add(id)
            return f"⟨{id}⟩" if spelled is None else spelled
        # A decoder that takes a text's first space away shows it in the middle of one.
        return " " + text if spelled and spelled.startswith("▁") and not text.startswith(" ") else text
