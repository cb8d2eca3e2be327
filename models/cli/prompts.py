"""The prompts of a run: from flags, or from files; as texts, then as token ids."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.cli.settings import RunSettings
from models.errors import UserError, is_text
from models.options import describe_source

if TYPE_CHECKING:
    from models.loading import OpenedPair


MOST_RANDOM = 10**7  # token ids of all random prompts together


@dataclass
class Prompt:
    """One prompt: its place from 1, what the user sees, and what the models get."""

    number: int
    text: str
    ids: list[int]


def read_prompts(settings: RunSettings, default: Path) -> list[str]:
    """Prompt texts in order, cut to max_prompts; none for random prompts. default: the file where none is named.

    Raises UserError for a bad file.
    """
    if settings.random_prompts:
        return []
    if settings.prompt:
        prompts = settings.prompt
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("--prompt '' is empty: give some text")
        for number, prompt in enumerate(prompts, 1):
            if not is_text(prompt):
                raise UserError(f"--prompt {number} holds bytes that are no UTF-8 text: give UTF-8, or a file of it")
    else:
        prompts = read_prompt_file(Path(settings.prompts) if settings.prompts else default)
    return prompts[: settings.max_prompts]


def is_instruct(settings: RunSettings, pair: OpenedPair) -> bool:
    """Whether prompts are a conversation's: as asked for, else where the target has a chat template."""
    if settings.instruct is None:
        return bool(pair.target.tokenizer and pair.target.tokenizer.has_chat_template and not settings.random_prompts)
    return settings.instruct


def named_prompts(settings: RunSettings) -> list[str] | None:
    """Prompt texts that were asked for; None for the default ones. Raises UserError for a bad file."""
    named = settings.prompts or settings.prompt or settings.random_prompts
    return read_prompts(settings, Path()) if named else None


def default_prompts(settings: RunSettings, pair: OpenedPair, folder: Path) -> list[str]:
    """The prompts in a folder that suit the target: everyday questions for a chat model, else code to go on with."""
    return read_prompts(settings, folder / ("instruct.txt" if is_instruct(settings, pair) else "python.txt"))


def encode_prompts(settings: RunSettings, texts: Sequence[str], pair: OpenedPair) -> list[Prompt]:
    """Texts, or random token ids, as prompts for a pair.

    Raises UserError without a tokenizer, and for a prompt that leaves no room in the context.
    """
    tokenizer, target = pair.target.tokenizer, pair.target
    vocab = target.checkpoint.config.vocab_size
    if settings.random_prompts:
        count, length = settings.random_prompts
        count = min(count, settings.max_prompts or count)
        if length >= pair.max_seq_len:  # before so many numbers are drawn
            raise _too_long(1, length, pair.max_seq_len)
        if count * length > MOST_RANDOM:
            raise UserError(f"--random-prompts {count}x{length} are more than {MOST_RANDOM} token ids: give fewer")
        draw = random.Random(settings.seed)
        rows = [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]
        prompts = [Prompt(i, f"({length} random token ids)", ids) for i, ids in enumerate(rows, 1)]
    elif tokenizer is None:
        raise UserError(
            f"{describe_source(target.source)} has no tokenizer.json: add it, or run on token ids with "
            "--random-prompts 10x64"
        )
    else:
        encode = tokenizer.chat if is_instruct(settings, pair) else tokenizer.encode
        prompts = [Prompt(i, text, encode(text)) for i, text in enumerate(texts, 1)]
    for prompt in prompts:
        if len(prompt.ids) >= pair.max_seq_len:
            raise _too_long(prompt.number, len(prompt.ids), pair.max_seq_len)
        if outside := [id for id in prompt.ids if id >= vocab]:
            raise UserError(
                f"prompt {prompt.number} has the token id {outside[0]}, the target's vocabulary is {vocab}: "
                f"{describe_source(target.source)} has the tokenizer.json of another model, copy its own there"
            )
    return prompts


def _too_long(number: int, tokens: int, context: int) -> UserError:
    return UserError(
        f"prompt {number} has {tokens} tokens, the context is {context}: shorten it or raise --max-seq-len"
    )


def read_prompt_file(path: Path) -> list[str]:
    """The texts of a prompt file. Raises UserError for a bad one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the prompt file {path}: {reason}") from error
    if path.suffix == ".json":
        prompts = _from_json(path, text)
    else:
        parts = re.split(r"^---[ \t]*\n", text.replace("\r\n", "\n") + "\n", flags=re.MULTILINE)
        # each part but the last ends with the line end that belongs to its separator; the last has the one added
        # here, and the file's own final line end is no part of the prompt either
        prompts = [part[:-1] for part in parts[:-1]] + [parts[-1].removesuffix("\n").removesuffix("\n")]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt: see --help for its format")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the prompt file {path} is not JSON ({error}): see --help for its format") from None
    if not isinstance(items, list):
        raise UserError(f"the prompt file {path} holds {type(items).__name__}, not a list: see --help for its format")
    prompts = []
    for number, item in enumerate(items, 1):
        prompt = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(prompt, str):
            raise UserError(f'entry {number} of {path} is neither a string nor an object with a "prompt" string')
        if not is_text(prompt):
            raise UserError(f"entry {number} of {path} holds half of a surrogate pair, which is no text: write it anew")
        prompts.append(prompt)
    return prompts
