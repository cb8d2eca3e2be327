"""Prompts for training: of a file, or built in; as token ids.

A chat model gets questions (`templates`, `everyday`, and texts and functions of installed packages as `material`); a
base model the beginnings of the standard library's source files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from models.cli.prompts import read_prompt_file
from models.errors import UserError
from models.llama.tokenizer import LlamaTokenizer
from models.training.everyday import compose_everyday
from models.training.material import library_files, package_files, passages
from models.training.templates import compose

PACKAGE_FILES = 2500
TEXT_TASKS = (
    "Summarise this text:\n\n{x}",
    "Summarise the following in one sentence.\n\n{x}",
    "Rewrite this text in simpler words:\n\n{x}",
    "Rewrite the following in a formal style:\n\n{x}",
    "Continue this text:\n\n{x}",
    "List the key points of this text:\n\n{x}",
    "{x}\n\nWhat is this text about?",
    "Write two questions about this text and answer them:\n\n{x}",
    "Explain this text to somebody who is new to the subject:\n\n{x}",
    "Give this text a title, then shorten it:\n\n{x}",
)
CODE_TASKS = (
    "Explain this code:\n\n{x}",
    "Add a docstring to this function:\n\n{x}",
    "Rewrite this function with clearer variable names:\n\n{x}",
    "Write a test for this function:\n\n{x}",
    "Are there mistakes in this code?\n\n{x}",
    "What does this function do?\n\n{x}",
)
# Of 100 questions so many are about a text, about a function, and everyday ones; the others are of `templates`.
TEXT_SHARE, CODE_SHARE, EVERYDAY_SHARE = 8, 4, 55


@dataclass(frozen=True)
class TrainingPrompt:
    """One prompt. ``kind`` is for statistics: what sort of question it is."""

    kind: str
    ids: list[int]


def training_prompts(
    tokenizer: LlamaTokenizer, file: Path | None, count: int, longest: int, seed: int
) -> list[TrainingPrompt]:
    """Prompts for the model that has this tokenizer, at most `count`, all different, none longer than `longest` tokens.

    file: in the format of the demo's --prompts; None for the built-in ones. Same arguments, same prompts (on one
    machine: the built-in ones depend on the installed packages).

    Raises UserError for a bad file, and where too few prompts are left.
    """
    chat = tokenizer.has_chat_template
    if file:
        encode = tokenizer.chat if chat else tokenizer.encode
        made = [TrainingPrompt("file", encode(text)) for text in read_prompt_file(file)]
    elif chat:
        made = [TrainingPrompt(kind, tokenizer.chat(_messages(turns))) for kind, turns in questions(count, seed)]
    else:
        made = source_beginnings(tokenizer, count, longest, seed)
    kept = list({tuple(prompt.ids): prompt for prompt in made if len(prompt.ids) <= longest}.values())[:count]
    if len(kept) < len(made):
        logger.debug(f"{len(made) - len(kept)} prompts of {len(made)} are longer than {longest} tokens, or twice there")
    if len(kept) < 2:
        raise UserError(
            f"{len(kept)} of {len(made)} prompts have at most {longest} tokens: give shorter ones, or raise "
            "--max-prompt"
        )
    return kept


def questions(count: int, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, turns) of `count` different questions for a chat model, mixed.

    Most have one turn, the user's. Others are conversations: user and assistant take turns, and the user has the last.
    """
    draw = random.Random(seed)
    found: dict[str, list[str]] = {"text": [], "function": []}
    for kind, passage in passages([*library_files(), *package_files(PACKAGE_FILES, draw)], draw):
        found[kind].append(passage)
    made: dict[tuple[str, ...], str] = {}
    for _ in range(20 * count):  # short kinds run out of new ones
        if len(made) == count:
            break
        share = draw.randrange(100)
        if share < EVERYDAY_SHARE:
            kind, turns = compose_everyday(draw)
        elif share < EVERYDAY_SHARE + TEXT_SHARE and found["text"]:
            kind, turns = "text", (draw.choice(TEXT_TASKS).format(x=draw.choice(found["text"])),)
        elif EVERYDAY_SHARE + TEXT_SHARE <= share < EVERYDAY_SHARE + TEXT_SHARE + CODE_SHARE and found["function"]:
            kind, turns = "function", (draw.choice(CODE_TASKS).format(x=draw.choice(found["function"])),)
        else:
            kind, text = compose(draw)
            turns = (text,)
        made.setdefault(turns, kind)
    return [(kind, turns) for turns, kind in made.items()]


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def source_beginnings(tokenizer: LlamaTokenizer, count: int, longest: int, seed: int) -> list[TrainingPrompt]:
    """Pieces of the standard library's files that begin at a line, of 24 tokens to `longest`, drawn at random."""
    draw = random.Random(seed)
    texts = []
    for path in library_files():
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    if not texts:
        raise UserError("this Python has no source files of its standard library: give --prompts")
    made = []
    for _ in range(count):
        text = draw.choices(texts, [len(text) for text in texts])[0]
        start = text.rfind("\n", 0, draw.randrange(len(text))) + 1
        ids = tokenizer.encode(text[start : start + 8 * longest])
        length = draw.randint(min(24, longest), longest)
        if len(ids) >= length:
            made.append(TrainingPrompt("source", ids[:length]))
    return made
