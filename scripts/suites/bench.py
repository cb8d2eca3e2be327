"""Models that are loaded, prompts for them, and how texts are written: what a suite measures with."""

from collections.abc import Sequence
from pathlib import Path

from models.cli.prompts import default_prompts, encode_prompts, is_instruct, named_prompts
from models.cli.settings import RunSettings
from models.llm import LLM
from models.loading import LoadedModel, open_pair

PROMPTS = Path(__file__).resolve().parents[2] / "demo" / "prompts"


class Bench:
    """Opens and loads what settings ask for.

    Args:
        settings: as a suite chose them.
        texts: of the prompts; None: those that the settings name.

    Attributes:
        settings: as they took effect.
        prompts: with their ids. instruct: whether they are a chat's.
        llm: the models. target, draft, stop_ids, sampling, max_seq_len: theirs; draft is a
            draft model, a draft head, or None.
    """

    def __init__(self, settings: RunSettings, texts: Sequence[str] | None = None) -> None:
        named = named_prompts(settings) if texts is None else texts
        pair = open_pair(settings.engine)
        texts = default_prompts(settings, pair, PROMPTS) if named is None else named
        self.settings = settings.resolved_as(pair.options)
        self.instruct = is_instruct(self.settings, pair)
        self.prompts = encode_prompts(self.settings, texts, pair) if texts or settings.random_prompts else []
        self.llm = LLM(pair)
        self.target, self.draft = self.llm.target, self.llm.draft
        self.sampling, self.max_seq_len = self.settings.sampling, self.llm.max_seq_len
        self.stop_ids = () if settings.random_prompts else self.llm.stop_ids

    @property
    def draft_model(self) -> LoadedModel | None:
        """The draft, where it is a model."""
        return self.draft if isinstance(self.draft, LoadedModel) else None

    @property
    def drafts_alone(self) -> str:
        """The drafter in which the draft drafts alone."""
        return "model" if self.draft_model else "head"
