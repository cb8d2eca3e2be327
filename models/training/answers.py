"""The target answers the prompts, many at a time, and its hidden states are kept with the answers.

A place in the batch takes the next prompt as soon as its answer ends, so that every forward has all its rows. An answer
is a function of its prompt, its number and the seed alone, up to the last bits that depend on the batch's size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from models.torch_llama.model import TorchLlama


@dataclass(frozen=True)
class AnswerOptions:
    """How prompts are answered.

    Args:
        max_new_tokens: an answer's length, at most.
        temperature: of the answers that are sampled. greedy_share: of answers that are greedy.
        taps: after how many layers hidden states are kept, rising.
        seed: decides which answers are sampled, and how.
    """

    taps: tuple[int, ...]
    max_new_tokens: int = 200
    temperature: float = 0.7
    greedy_share: float = 0.7
    seed: int = 1

    def is_greedy(self, number: int) -> bool:
        """Whether the answer to prompt `number` is greedy."""
        return random.Random(f"{self.seed}/{number}/greedy").random() < self.greedy_share


@dataclass
class Answer:
    """A prompt and what the target said.

    Args:
        number: of the prompt. prompt: its tokens. greedy: whether it was decoded greedily.
        ids: [T] int32, the prompt's and the answer's.
        states: [T - 1, (taps + 1) H] bf16: hidden states at the taps, and the normed last one, of all tokens but the
            last, which was never fed.
    """

    number: int
    prompt: int
    greedy: bool
    ids: torch.Tensor
    states: torch.Tensor


@dataclass
class _Open:
    """An answer that is being written."""

    number: int
    prompt: int
    greedy: bool
    ids: list[int]
    draws: list[float]
    states: list[torch.Tensor] = field(default_factory=list)

    def closed(self) -> Answer:
        states = torch.cat(self.states)
        assert len(states) == len(self.ids) - 1
        return Answer(self.number, self.prompt, self.greedy, torch.tensor(self.ids, dtype=torch.int32), states)


def write_answers(
    model: TorchLlama,
    prompts: Sequence[Sequence[int]],
    numbers: Collection[int],
    options: AnswerOptions,
    more: Callable[[int], bool] = lambda tokens: True,
) -> Iterator[Answer]:
    """Answer the prompts with these numbers, in their order, and yield the answers as they end.

    model: made with a `batch`, the number of answers that are written side by side. more: asked with the tokens written
    since it was last asked; when it says no, the writing stops and unfinished answers are lost.
    """
    writer = _Writer(model, options)
    waiting = iter(numbers)
    places: list[_Open | None] = [None] * model.batch
    while True:
        for place, current in enumerate(places):
            while current is None:
                number = next(waiting, None)
                if number is None:
                    break
                current = writer.begin(place, number, prompts[number])
                if writer.ended(current):
                    yield current.closed()
                    current = None
            places[place] = current
        busy = [place for place, current in enumerate(places) if current]
        if not busy or not more(len(busy)):
            return
        writer.step(places)
        for place in busy:
            current = places[place]
            assert current is not None
            if writer.ended(current):
                yield current.closed()
                places[place] = None


class _Writer:
    """A batched model, and how it goes on."""

    def __init__(self, model: TorchLlama, options: AnswerOptions) -> None:
        self.model, self.options = model, options
        self.taps = (*options.taps, len(model.layers))

    @torch.inference_mode()
    def begin(self, place: int, number: int, prompt: Sequence[int]) -> _Open:
        """Read a prompt into one place of the batch, and choose the first token."""
        greedy = self.options.is_greedy(number)
        draw = random.Random(f"{self.options.seed}/{number}/draws")
        draws = [] if greedy else [draw.random() for _ in range(self.options.max_new_tokens)]
        current = _Open(number, len(prompt), greedy, list(prompt), draws)
        single = self.model.sequence(place)
        with single.tap(self.taps) as kept:
            logits = single.prefill(current.ids)
        current.states.append(self._joined(kept))
        current.ids.append(self._choose(logits[None], [current])[0])
        return current

    @torch.inference_mode()
    def step(self, places: Sequence[_Open | None]) -> None:
        """One more token for every answer; empty places go along at position 0."""
        device = self.model.device
        tokens = torch.tensor([[current.ids[-1] if current else 0] for current in places], device=device)
        positions = [len(current.ids) - 1 if current else 0 for current in places]
        with self.model.tap(self.taps) as kept:
            logits = self.model.forward(tokens, positions)[:, -1]
        states = self._joined(kept)
        ids = self._choose(logits, places)
        for place, current in enumerate(places):
            if current:
                current.states.append(states[place : place + 1])
                current.ids.append(ids[place])

    def ended(self, current: _Open) -> bool:
        """Whether an answer is whole: its end was said, or there is no room for more."""
        stop = self.model.config.eos_token_ids
        full = len(current.ids) - current.prompt >= self.options.max_new_tokens
        return current.ids[-1] in stop or full or len(current.ids) >= self.model.max_seq_len

    def _joined(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, (taps + 1) H]: the tapped states as they are, the last one after the final norm."""
        *tapped, last = kept
        config = self.model.config
        scored = F.rms_norm(last, (config.hidden_size,), self.model.norm, config.rms_norm_eps)
        return torch.cat((*tapped, scored), dim=-1).to("cpu", torch.bfloat16)

    def _choose(self, logits: torch.Tensor, places: Sequence[_Open | None]) -> list[int]:
        """The next id of every place. logits: [B, V]."""
        ids = logits.argmax(-1).tolist()
        sampled = [place for place, current in enumerate(places) if current and not current.greedy]
        if sampled:
            open_ones = [places[place] for place in sampled]
            drawn = torch.tensor([[o.draws[len(o.ids) - o.prompt]] for o in open_ones if o], device=logits.device)
            sums = (logits[sampled].float() / self.options.temperature).softmax(-1).cumsum(-1)
            picks = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)[:, 0].clamp_max(logits.shape[1] - 1)
            for place, pick in zip(sampled, picks.tolist(), strict=True):
                ids[place] = pick
        return ids


class Stopwatch:
    """Says when a time is over, and how much was used. seconds: None never ends."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._began, self._busy = seconds, time.monotonic(), time.process_time()

    @property
    def used(self) -> float:
        return time.monotonic() - self._began

    @property
    def busy(self) -> float:
        """Processor time of this process, of all its threads together."""
        return time.process_time() - self._busy

    @property
    def over(self) -> bool:
        return self.seconds is not None and self.used >= self.seconds
