"""The target answers the prompts, many at a time, and its hidden states are kept with the answers.

A slot takes the next prompt as soon as its answer ends, and reads it in the forward in which the others go on. An
answer is a function of its prompt, its number and the seed alone, where rows do not depend on those beside them; else
up to the last bits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from models.speculative.model import Rows, Want
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

    model: its slots are the answers that are written side by side. more: asked with the tokens that are about to be
    written; when it says no, the writing stops and unfinished answers are lost.
    """
    writer = _Writer(model, options)
    waiting = iter(numbers)
    under_way: dict[int, _Open] = {}  # by slot
    try:
        while True:
            for slot in range(model.slots):
                if slot not in under_way and (number := next(waiting, None)) is not None:
                    under_way[slot] = writer.begin(slot, number, prompts[number])
            if not under_way or not more(len(under_way)):
                return
            writer.step(under_way)
            for slot in [slot for slot, current in under_way.items() if writer.ended(current)]:
                yield under_way.pop(slot).closed()
    finally:
        for slot in range(model.slots):
            model.free(slot)


class _Writer:
    """A model, and how it goes on."""

    def __init__(self, model: TorchLlama, options: AnswerOptions) -> None:
        self.model, self.options = model, options
        self.taps = (*options.taps, len(model.layers))

    def begin(self, slot: int, number: int, prompt: Sequence[int]) -> _Open:
        """A prompt for a slot, which reads it in the next step."""
        greedy = self.options.is_greedy(number)
        draw = random.Random(f"{self.options.seed}/{number}/draws")
        draws = [] if greedy else [draw.random() for _ in range(self.options.max_new_tokens)]
        self.model.reserve(slot, (), min(len(prompt) + self.options.max_new_tokens, self.model.max_seq_len))
        return _Open(number, len(prompt), greedy, list(prompt), draws)

    @torch.inference_mode()
    def step(self, under_way: Mapping[int, _Open]) -> None:
        """One more token for every answer."""
        fed = [len(current.ids) - 1 if current.states else 0 for current in under_way.values()]
        rows = [
            Rows(slot, current.ids[start:], start, last=True)
            for (slot, current), start in zip(under_way.items(), fed, strict=True)
        ]
        step = self.model.extend(rows, Want(logits=True, taps=self.taps))
        answers = list(under_way.values())
        ids = self._choose(torch.cat([step.logits(i) for i in range(len(answers))]), answers)
        features = [step.features(i) for i in range(len(answers))]
        states = self._scored(torch.cat(features)).split([len(each) for each in features])
        for current, state, chosen in zip(answers, states, ids, strict=True):
            current.states.append(state)
            current.ids.append(chosen)

    def ended(self, current: _Open) -> bool:
        """Whether an answer is whole: its end was said, or there is no room for more."""
        stop = self.model.config.eos_token_ids
        full = len(current.ids) - current.prompt >= self.options.max_new_tokens
        return current.ids[-1] in stop or full or len(current.ids) >= self.model.max_seq_len

    def _scored(self, features: torch.Tensor) -> torch.Tensor:
        """[n, (taps + 1) H] as they are but for the last layer's, which are normed."""
        config, width = self.model.config, self.model.config.hidden_size
        tapped, last = features[:, :-width], features[:, -width:]
        scored = F.rms_norm(last.to(self.model.norm.dtype), (width,), self.model.norm, config.rms_norm_eps)
        return torch.cat((tapped, scored.to(tapped.dtype)), dim=-1).to("cpu", torch.bfloat16)

    def _choose(self, logits: torch.Tensor, answers: Sequence[_Open]) -> list[int]:
        """The next id of every answer. logits: [n, V]."""
        ids = logits.argmax(-1).tolist()
        sampled = [i for i, answer in enumerate(answers) if not answer.greedy]
        if sampled:
            draws = [answers[i].draws[len(answers[i].ids) - answers[i].prompt] for i in sampled]
            drawn = torch.tensor(draws, device=logits.device)[:, None]
            sums = (logits[sampled].float() / self.options.temperature).softmax(-1).cumsum(-1)
            picks = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)[:, 0].clamp_max(logits.shape[1] - 1)
            for i, pick in zip(sampled, picks.tolist(), strict=True):
                ids[i] = pick
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
