"""What a demo run is made of: for every prompt a generation on each path."""

from dataclasses import dataclass, field
from typing import Protocol

from models.cli.prompts import Prompt
from models.speculative.stats import GenerationStats


@dataclass
class Run:
    """One generation on one path ("baseline" or "speculative"), growing while it runs."""

    path: str
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)  # text and where it came from (Token.origin)
    stats: GenerationStats = field(default_factory=GenerationStats)
    counted: bool = True  # False for the warm-up

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass
class Row:
    """One prompt's complete runs, by path."""

    prompt: Prompt
    runs: dict[str, Run]

    @property
    def identical(self) -> bool:
        """Whether all paths wrote the same tokens."""
        first, *others = self.runs.values()
        return all(first.tokens == other.tokens for other in others)


class Viewer(Protocol):
    """What the session tells while it runs. Time spent here is not measured."""

    def begin_prompt(self, prompt: Prompt) -> None: ...
    def begin_run(self, run: Run) -> None: ...
    def token(self, run: Run) -> None: ...
    def end_run(self, run: Run) -> None: ...
    def end_prompt(self, row: Row) -> None: ...
