"""What the user asked for on a demo's command line. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from demo.arguments import build_parser
from models.errors import UserError
from models.options import DEFAULT_TARGET, EngineOptions, named_target
from models.speculative.drafters.registry import NONE, spec_of
from models.speculative.sampling import SamplingParams


@dataclass(frozen=True)
class Settings(EngineOptions):
    """The engine's options and those of the run; one field per flag."""

    mode: str = "compare"
    prompts: str | None = None
    prompt: list[str] | None = None
    random_prompts: tuple[int, int] | None = None
    instruct: bool = False
    max_prompts: int | None = None
    max_new_tokens: int = 30
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    json: str | None = None
    html: str | None = None
    quiet: bool = False
    no_color: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplingParams(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def paths(self) -> tuple[str, ...]:
        """The generation paths to run and to count, in the order of the report."""
        return ("baseline", "speculative") if self.mode == "compare" else (self.mode,)

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def engine(self) -> EngineOptions:
        """The engine's options alone."""
        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})

    def resolved_as(self, options: EngineOptions) -> Settings:
        """The same run with the engine's options as they took effect."""
        settings = copy.copy(self)
        vars(settings).update(vars(options))
        return settings


def parse_settings(
    argv: Sequence[str] | None, mode: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings | None:
    """Settings from a command line, or None for --version. Raises UserError for anything wrong in it."""
    options = build_parser(mode, environ).parse_args(argv)
    if options.version:
        return None
    _check_prompts(options)
    takes_draft = options.drafter is None or (options.drafter != NONE and spec_of(options.drafter).needs_draft_model)
    if options.target and takes_draft:
        options.draft = options.draft or environ.get("DRAFT_MODEL") or None
    options.target = named_target(options.target or DEFAULT_TARGET)
    del options.version
    return Settings(**vars(options), greedy=options.temperature == 0, speculative=options.mode != "baseline")


def _check_prompts(options: argparse.Namespace) -> None:
    """UserError for prompts of several kinds."""
    sources = [flag for flag in ("prompts", "prompt", "random_prompts") if getattr(options, flag)]
    if len(sources) > 1:
        flags = " and ".join("--" + flag.replace("_", "-") for flag in sources)
        raise UserError(f"{flags} were given together: give one kind of prompts")
    if options.instruct and options.random_prompts:
        raise UserError("--instruct has no meaning with --random-prompts: give one of them")
