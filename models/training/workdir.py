"""The work directory of a training: what it belongs to, its prompts, its answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from models.errors import UserError
from models.llama.config import read_json
from models.loading import OpenedModel
from models.torch_llama.model import TorchLlama
from models.training.answers import Answer, AnswerOptions, Stopwatch, write_answers
from models.training.batches import SHORTEST_ANSWER
from models.training.prompts import TrainingPrompt, training_prompts
from models.training.shards import AnswerStore, save_shard

SHARD_ANSWERS = 128
STATE_BYTES = 2  # of one number in bf16


@dataclass(frozen=True)
class DataOptions:
    """What the training data are made of; the answers of a work directory all have the same.

    Args:
        prompts: a file in the demo's format, None for the built-in ones.
        prompt_count: prompts at most. max_prompt: tokens of one, at most.
        answers: how the target answers.
    """

    answers: AnswerOptions
    prompts: Path | None = None
    prompt_count: int = 20000
    max_prompt: int = 190

    def described(self, target: OpenedModel) -> dict[str, Any]:
        """What must be the same when a training is resumed."""
        return {
            "target": target.checkpoint.digest(),
            "taps": list(self.answers.taps),
            "prompts": str(self.prompts.resolve()) if self.prompts else "built in",
            "prompt count": self.prompt_count,
            "longest prompt": self.max_prompt,
            "new tokens": self.answers.max_new_tokens,
            "temperature": self.answers.temperature,
            "greedy share": self.answers.greedy_share,
            "seed": self.answers.seed,
        }


class WorkDirectory:
    """Where a training keeps what it can go on from.

    Args:
        path: is created. target: opened. options: must be those that the directory was begun with.

    Raises:
        UserError: the directory cannot be written, or was begun for another target or with other options.
    """

    def __init__(self, path: Path, target: OpenedModel, options: DataOptions) -> None:
        self.path, self.target, self.options = path, target, options
        about = options.described(target)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / "job.json").exists():
                _check_same(path, read_json(path / "job.json"), about)
            else:
                write_json(path / "job.json", about)
        except OSError as error:
            raise UserError(f"cannot write to the work directory {path}: {error.strerror or error}") from None
        self._prompts: list[TrainingPrompt] | None = None

    @property
    def prompts(self) -> list[TrainingPrompt]:
        """Made at the first time, then read."""
        path = self.path / "prompts.json"
        if self._prompts is None and path.exists():
            self._prompts = [TrainingPrompt(kind, ids) for kind, ids in json.loads(path.read_text())]
        if self._prompts is None:
            if self.target.tokenizer is None:
                raise UserError(f"{self.target.source} has no tokenizer.json: add it beside the weights")
            options = self.options
            longest = min(options.max_prompt, self.target.checkpoint.config.max_position_embeddings - SHORTEST_ANSWER)
            logger.info("prompts: collecting")
            self._prompts = training_prompts(
                self.target.tokenizer, options.prompts, options.prompt_count, longest, options.answers.seed
            )
            write_json(path, [[prompt.kind, prompt.ids] for prompt in self._prompts])
        return self._prompts

    def answers(self) -> AnswerStore:
        """All answers that are there."""
        return AnswerStore(self.path)

    def room(self) -> int:
        """Positions that prompts with their answers take at most."""
        longest = max(len(prompt.ids) for prompt in self.prompts) + self.options.answers.max_new_tokens
        return min(longest, self.target.checkpoint.config.max_position_embeddings)

    def write_answers(
        self,
        model: TorchLlama,
        watch: Stopwatch,
        *,
        part: tuple[int, int] = (0, 1),
        most_bytes: int | None = None,
        progress: Callable[[int, int], None] = lambda tokens, answers: None,
    ) -> None:
        """Let the target answer prompts that have no answer yet, until all have one or the time is over.

        model: with slots of `room()` positions. part: (i, n): only prompts whose number is i modulo n, for
        several processes on one directory. most_bytes: the shards may take together; progress: told new tokens and
        finished answers.
        """
        index, parts = part
        store = self.answers()
        there = set(store.numbers)
        numbers = [n for n in range(len(self.prompts)) if n % parts == index and n not in there]
        used = [store.bytes]
        config = self.target.checkpoint.config
        row = (len(self.options.answers.taps) + 1) * config.hidden_size * STATE_BYTES
        shard: list[Answer] = []
        count, clock = self._next_shard(index, parts), self._clock(index, parts)
        before = read_json(clock) if clock.exists() else {}
        written = [0]

        def more(tokens: int) -> bool:
            written[0] += tokens
            progress(written[0], len(there))
            return not watch.over and (most_bytes is None or used[0] < most_bytes)

        def flush() -> None:
            nonlocal count
            if shard:
                save_shard(self.path, f"{index}of{parts}-{count:04d}", shard)
                shard.clear()
                count += 1
            spent = {"seconds": watch.used, "busy": watch.busy}
            write_json(clock, {name: before.get(name, 0.0) + value for name, value in spent.items()})

        prompts = [prompt.ids for prompt in self.prompts]
        for answer in write_answers(model, prompts, numbers, self.options.answers, more):
            shard.append(answer)
            there.add(answer.number)
            used[0] += len(answer.states) * row
            if len(shard) == SHARD_ANSWERS:
                flush()
        flush()

    def answering_seconds(self, index: int, parts: int) -> float:
        """Time that the answers of one part took so far. (0, 1) is all of them: parts of one division count as
        written side by side."""
        path = self._clock(index, parts)
        own = read_json(path)["seconds"] if path.exists() else 0.0
        if parts > 1:
            return own
        longest: dict[str, float] = {}
        for other in self.path.glob("answering-*of*.json"):
            division = other.stem.rsplit("of", 1)[1]
            if division != "1":
                longest[division] = max(longest.get(division, 0.0), read_json(other)["seconds"])
        return own + sum(longest.values())

    def answering_time(self, clock: str) -> float:
        """Seconds that all answers took: by the clock ("seconds"), or of processors ("busy")."""
        return sum(read_json(path).get(clock, 0.0) for path in self.path.glob("answering-*.json"))

    def _clock(self, index: int, parts: int) -> Path:
        return self.path / f"answering-{index}of{parts}.json"

    def _next_shard(self, index: int, parts: int) -> int:
        names = [path.stem for path in self.path.glob(f"answers-{index}of{parts}-*.safetensors")]
        return 1 + max((int(name.rsplit("-", 1)[1]) for name in names), default=-1)


def write_json(path: Path, value: object) -> None:
    """All or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{path} was begun with {name} {before.get(name)}, this run has {now[name]}: give the same options, or "
                "another --work-dir"
            )
