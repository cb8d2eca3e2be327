"""The kinds of text that the suite `compare` keeps apart: what a drafter is good for depends on them."""

import random
from dataclasses import dataclass
from pathlib import Path

from models.cli.prompts import read_prompts
from models.cli.settings import RunSettings

PROMPTS = Path(__file__).resolve().parent / "prompts"
RANDOM_COUNT, RANDOM_LENGTH = 4, 64


@dataclass(frozen=True)
class Category:
    """Some prompts of one kind.

    about: for the reader of the report. file: of the prompts' texts, in the format of the demos; None: random ids.
    new_tokens: at most so many; None: as the suite is told. unrelated_draft: the draft model is replaced by one of
    random weights, and drafts alone. passes: over the prompts in one repetition, more where little is written or
    little is to be told apart.
    """

    about: str
    file: str | None
    new_tokens: int | None = None
    unrelated_draft: bool = False
    passes: int = 1


CHAT = "chat"  # for targets that have a chat template
CATEGORIES = {
    "code-completion": Category("code is gone on with", "code-completion.txt"),
    "editing": Category("code is shown, then written again with a small change", "editing.txt"),
    "summarising": Category("what was said is said again in other words", "summarising.txt"),
    "docstring-prose": Category("new prose, nothing of which stands in the prompt", "docstring-prose.txt"),
    "random-tokens": Category("random token ids as prompts, nothing to be right about", None),
    "short-output": Category("8 new tokens: hardly time to earn anything", "short-output.txt", 8, passes=4),
    CHAT: Category("everyday questions to a chat model", "../../../demo/prompts/instruct.txt"),
    "unrelated-draft": Category(
        "a draft model of random weights alone, of whose tokens none can be right",
        "code-completion.txt",
        unrelated_draft=True,
        passes=3,
    ),
}


def read_texts(name: str, settings: RunSettings) -> list[str]:
    """The texts of a category's prompts, cut to --max-prompts."""
    category = CATEGORIES[name]
    if category.file is None:
        return []
    return read_prompts(settings, PROMPTS / category.file)


def random_ids(vocab_size: int, seed: int, count: int | None) -> list[list[int]]:
    """Prompts of random token ids, at most `count`."""
    draw = random.Random(seed)
    rows = [[draw.randrange(vocab_size) for _ in range(RANDOM_LENGTH)] for _ in range(RANDOM_COUNT)]
    return rows[:count]
