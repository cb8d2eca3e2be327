"""Answers on disk: shards of safetensors, each of some hundred answers, written whole or not at all.

A shard holds, of all its answers one after another, ``ids`` [sum T] int32 and ``states`` [sum (T - 1), W] bf16, and per
answer ``number``, ``length`` (T), ``prompt`` and ``greedy``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import UserError
from models.training.answers import Answer

PATTERN = "answers-*.safetensors"


def save_shard(folder: Path, name: str, answers: Sequence[Answer]) -> Path:
    """Write answers as answers-`name`.safetensors in `folder`."""
    path = folder / PATTERN.replace("*", name)
    partial = path.with_suffix(".partial")
    tensors = {
        "ids": torch.cat([answer.ids for answer in answers]),
        "states": torch.cat([answer.states for answer in answers]),
        "number": torch.tensor([answer.number for answer in answers]),
        "length": torch.tensor([len(answer.ids) for answer in answers]),
        "prompt": torch.tensor([answer.prompt for answer in answers]),
        "greedy": torch.tensor([answer.greedy for answer in answers]),
    }
    save_file(tensors, partial)
    os.replace(partial, path)
    return path


class AnswerStore:
    """The answers in the shards of a folder, in the order of their numbers; states are read when they are wanted.

    An answer that is there twice counts once. Raises UserError for a damaged shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found: dict[int, tuple[Path, int, int, int, bool, torch.Tensor]] = {}
        self.bytes = 0
        self.width = 0
        for path in sorted(folder.glob(PATTERN)):
            try:
                with safe_open(path, framework="pt") as file:
                    ids = file.get_tensor("ids")
                    table = [file.get_tensor(name).tolist() for name in ("number", "length", "prompt", "greedy")]
                    self.width = file.get_slice("states").get_shape()[1]
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is damaged ({error}): delete it, its prompts are then answered again"
                ) from None
            self.bytes += path.stat().st_size
            at = row = 0
            for number, length, prompt, greedy in zip(*table, strict=True):
                found.setdefault(number, (path, row, length, prompt, greedy, ids[at : at + length]))
                at, row = at + length, row + length - 1
        self._found = dict(sorted(found.items()))
        self._files: dict[Path, object] = {}

    @property
    def numbers(self) -> list[int]:
        """Of the prompts that are answered."""
        return list(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def reply_tokens(self, numbers: Iterable[int] | None = None) -> int:
        """Tokens of answers without their prompts."""
        chosen = self._found if numbers is None else numbers
        return sum(self._found[n][2] - self._found[n][3] for n in chosen)

    def length(self, number: int) -> int:
        return self._found[number][2]

    def prompt(self, number: int) -> int:
        return self._found[number][3]

    def greedy(self, number: int) -> bool:
        return self._found[number][4]

    def ids(self, number: int) -> torch.Tensor:
        """[T] int64, the prompt's and the answer's."""
        return self._found[number][5].long()

    def states(self, number: int) -> torch.Tensor:
        """[T - 1, W] bf16."""
        path, row, length = self._found[number][:3]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path].get_slice("states")[row : row + length - 1]  # type: ignore[attr-defined]
