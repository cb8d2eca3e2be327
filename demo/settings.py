"""What the user asked for on a demo's command line. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from models.cli.arguments import (
    EPILOG,
    add_drafting_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_sampling_arguments,
)
from models.cli.command import Parser
from models.cli.default import CHAT_MODEL, CHAT_TOKENS, TOKENS, is_open
from models.cli.settings import RunSettings, settings_of
from models.errors import UserError

MODES = ("compare", "speculative", "baseline")
# What has no meaning in plain decoding. Who drafts how many tokens has one: forwards have as many rows as a run with
# that drafter, so that the text is the same bit for bit.
DRAFTING_ONLY = (
    *("draft", "draft_dtype", "draft_precision", "draft_placement"),
    *("exit_layer", "force_acceptance", "verification"),
)


@dataclass(frozen=True)
class Settings(RunSettings):
    """A run's settings and those of the demo; one field per flag."""

    mode: str = "compare"
    json: str | None = None
    html: str | None = None
    audit: bool = False
    quiet: bool = False
    no_color: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The generation paths to run and to count, in the order of the report."""
        return ("baseline", "speculative") if self.mode == "compare" else (self.mode,)


def build_parser(mode: str | None, environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Parser of one demo. `mode` fixes the mode and takes the flag away; None offers --mode."""
    about = "Plain decoding of one Llama model." if mode else "Speculative decoding of a Llama beside its own baseline."
    parser = Parser(
        description=f"{about}\nWithout arguments: ten questions to SmolLM2-135M, a small chat model (93 MB, fetched "
        f"once), answers of {CHAT_TOKENS} tokens;\nwhere it cannot be fetched, the small pair of this project.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if mode is None:
        parser.add_argument("--mode", choices=MODES, default="compare", help="what to run (default: %(default)s)")
    else:
        parser.set_defaults(mode=mode)
    add_model_arguments(parser, environ, f"{CHAT_MODEL}; on a board, and where it cannot be fetched, tiny")
    add_prompt_arguments(parser)
    add_drafting_arguments(parser)
    add_sampling_arguments(parser, f"{CHAT_TOKENS} where no model is named, else {TOKENS}")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write all results, per prompt and in total, to this file")
    group.add_argument(
        "--html", metavar="FILE", help="write a page with charts and with the texts token by token, round by round"
    )
    group.add_argument(
        "--audit",
        action="store_true",
        help="afterwards replay every text against plain decoding, and say whether it is the target's own; exit code 1 "
        "where it is not (docs/reliability.md)",
    )
    group.add_argument("--quiet", action="store_true", help="print only the final table")
    group.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    return parser


def parse_settings(
    argv: Sequence[str] | None,
    mode: str | None = None,
    environ: Mapping[str, str] = os.environ,
    choose: Callable[[argparse.Namespace], str] | None = None,
) -> Settings | None:
    """Settings from a command line, or None for --version. Raises UserError for anything wrong in it.

    choose: names the target where the command line leaves it open; None: the embedded pair.
    """
    parser = build_parser(mode, environ)
    options = parser.parse_args(argv)
    if options.version:
        return None
    if options.mode == "baseline":
        _check_baseline(options, parser)
    new_tokens = options.max_new_tokens
    options.max_new_tokens = new_tokens or TOKENS
    if choose and is_open(options):
        settings_of(Settings, options, environ)  # a mistake is answered before anything is fetched
        options.target = choose(options)
        if options.target == CHAT_MODEL:
            options.max_new_tokens = new_tokens or CHAT_TOKENS
    return settings_of(Settings, options, environ, speculative=options.mode != "baseline")


def _check_baseline(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise UserError for a flag that plain decoding would ignore."""
    for name in DRAFTING_ONLY:
        value = getattr(options, name)
        if value != parser.get_default(name):
            raise UserError(
                f"--{name.replace('_', '-')} {value} has no meaning in plain decoding, which drafts nothing: leave it "
                "out, or run demo/simple_text_demo.py with --mode speculative"
            )
