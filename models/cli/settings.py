"""A run's settings, as a command line gives them: the engine's options, prompts, and how texts are written."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from models.errors import OptionError, UserError
from models.options import (
    BOARD_OPTIONS,
    DEFAULT_TARGET,
    DRAFT_MODEL_OPTIONS,
    TORCH_OPTIONS,
    EngineOptions,
    describe_source,
    named_target,
)
from models.speculative.drafters.registry import FORCED, NONE, spec_of
from models.speculative.sampling import SamplingParams

if TYPE_CHECKING:
    from models.llm import LLM

NO_SETTINGS = ("quiet", "no_color", "json", "html", "greedy", "speculative", "slots", "reuse")  # in no report
Settings = TypeVar("Settings", bound=EngineOptions)
Run = TypeVar("Run", bound="RunSettings")


@dataclass(frozen=True)
class RunSettings(EngineOptions):
    """The engine's options and those of a run; one field per flag.

    Args:
        prompts: a file of them. prompt: texts. random_prompts: (how many, of how many token ids). None: defaults.
        instruct: put prompts through the chat template; None: if there is one.
        max_prompts: only the first ones.
        max_new_tokens, temperature, top_k, top_p, seed: how texts are written.

    Raises:
        UserError: for what has no meaning.
    """

    reuse: bool = False  # what is measured begins afresh
    prompts: str | None = None
    prompt: list[str] | None = None
    random_prompts: tuple[int, int] | None = None
    instruct: bool | None = None
    max_prompts: int | None = None
    max_new_tokens: int = 30
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplingParams(self.temperature, self.top_k, self.top_p, self.seed)
        sources = [flag for flag in ("prompts", "prompt", "random_prompts") if getattr(self, flag)]
        if len(sources) > 1:
            flags = " and ".join("--" + flag.replace("_", "-") for flag in sources)
            raise UserError(f"{flags} were given together: give one kind of prompts")
        if self.instruct and self.random_prompts:
            raise UserError("--instruct has no meaning with --random-prompts: give one of them")

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def engine(self) -> EngineOptions:
        """The engine's options alone."""
        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})

    def resolved_as(self: Run, options: EngineOptions) -> Run:
        """The same run with the engine's options as they took effect."""
        settings = copy.copy(self)
        vars(settings).update(vars(options))
        return settings


def settings_of(
    kind: type[Settings], options: argparse.Namespace, environ: Mapping[str, str], **chosen: Any
) -> Settings:
    """Settings from parsed flags. chosen: fields that the command decides itself.

    DRAFT_MODEL counts where a target is named and the drafter may use a draft model. Raises UserError for what has no
    meaning.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in vars(options).items() if name in known} | chosen
    if values.get("force_acceptance") is not None and values.get("drafter") is None:
        values["drafter"] = FORCED
    drafter = values.get("drafter")
    takes_draft = drafter is None or (drafter != NONE and spec_of(drafter).needs_draft_model)
    if values["target"] and takes_draft:
        values["draft"] = values["draft"] or environ.get("DRAFT_MODEL") or None
    values["target"] = named_target(values["target"] or DEFAULT_TARGET)
    try:
        return kind(**{"greedy": values.get("temperature", 0) == 0} | values)
    except OptionError as error:
        raise UserError(error.as_flags) from None


def describe_settings(settings: RunSettings, llm: LLM) -> dict[str, Any]:
    """The flags that mattered on this device, as they took effect."""
    values = dataclasses.asdict(settings)
    elsewhere = TORCH_OPTIONS if llm.board else BOARD_OPTIONS
    for name in (*NO_SETTINGS, *elsewhere):
        values.pop(name, None)
    values["target"] = describe_source(settings.target)
    values["draft"] = llm.draft and describe_source(llm.draft.opened.source)
    for name in DRAFT_MODEL_OPTIONS[1:]:
        if name in values and llm.draft is None:
            values[name] = None
    own = settings.drafter_settings
    values["tree_nodes"] = settings.tree_nodes if "tree_nodes" in own else None
    values["exit_layer"] = llm.exit_layer if "exit_layer" in own else None
    if settings.force_acceptance is None:
        del values["force_acceptance"]
    values["max_seq_len"] = llm.max_seq_len
    if llm.board:
        values["trace"], values["fused"] = llm.board.trace, llm.fused
    else:
        values["fixed_rows"] = settings.fixed_rows
    values["warm_up"] = "the first prompt, once on each path, not counted"
    return values
