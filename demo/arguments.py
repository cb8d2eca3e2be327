"""Command line of the demos: flags, their environment equals, and the prompt files. Nothing heavy is imported here."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.command_line import Parser
from models.errors import UserError
from models.llama.ttnn_llama.boards import PLACEMENTS
from models.llama.ttnn_llama.precision import PRECISIONS
from models.speculative.controller import MAX_DRAFT_LENGTH

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_TARGET = ROOT / "models" / "checkpoints" / "tiny-target"
EMBEDDED_DRAFT = ROOT / "models" / "checkpoints" / "tiny-draft"
PROMPTS = Path(__file__).resolve().parent / "prompts"

MODES = ("compare", "speculative", "baseline")
DRAFTERS = ("model", "prompt-lookup", "combined", "none")
DTYPES = ("bf16", "fp32", "fp16")
PRECISION = "performance"  # as tt_transformers' demo
# Flags that have a meaning on some devices only, and what to do about one of them on another device.
TORCH_FLAGS = {
    "dtype": "use --precision or leave it out",
    "draft_dtype": "use --draft-precision or leave it out",
    "row_invariant": "leave it out, on a board all rows are computed alike",
}
BOARD_FLAGS = ("precision", "draft_precision", "draft_placement", "trace", "weight_cache")
DRAFT_FLAGS = ("draft", "draft_dtype", "draft_precision", "draft_placement")  # of a draft model
# A padded decode of so many rows costs what one row does, within 5 % (bf16; scripts/forward_cost.py: 12 rows 1.12x).
FREE_ROWS = 7
AUTO = "auto"  # draft as many tokens as measured costs and acceptance say, from none to AUTO_LONGEST
AUTO_LONGEST = FREE_ROWS - 1
DRAFT_TOKENS = 4

EPILOG = """\
prompt files:
  *.json   a list of strings, or of objects with a "prompt" key
  others   plain text; a line that holds only --- parts one prompt from the next (the line end before it
           belongs to the separator, so end a prompt with an empty line to give it a final line end)

environment:
  HF_MODEL       same as --target
  DRAFT_MODEL    same as --draft
  MESH_DEVICE    the board of --device tt: N150, N300, T3K or P150 (default: the one that is found)
  TT_CACHE_PATH  directory of converted weights (default: tt-speculative-llama/weights in ~/.cache)
  A flag wins over its variable.

exit codes: 0 done, 2 a mistake in the input (one line on stderr), 130 interrupted (results so far are printed).
"""


@dataclass(frozen=True)
class Settings:
    """What the user asked for; one field per flag. ``draft`` is None when the embedded draft is to be tried."""

    mode: str
    target: str
    draft: str | None
    device: str
    dtype: str
    draft_dtype: str
    drafter: str
    num_draft_tokens: int | str  # or AUTO
    verification: str
    row_invariant: bool
    precision: str
    draft_precision: str
    draft_placement: str
    trace: bool
    weight_cache: bool
    max_seq_len: int | None
    prompts: str | None
    prompt: list[str] | None
    random_prompts: tuple[int, int] | None
    instruct: bool
    max_prompts: int | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    threads: int | None
    json: str | None
    quiet: bool
    no_color: bool

    @property
    def auto(self) -> bool:
        """Whether the draft length is chosen while it runs."""
        return self.num_draft_tokens == AUTO

    @property
    def longest_draft(self) -> int:
        """Tokens that a round drafts at most."""
        return AUTO_LONGEST if self.auto else self.num_draft_tokens

    @property
    def drafts(self) -> bool:
        """Whether anything is to be drafted by anybody."""
        return "speculative" in self.paths and self.drafter != "none"

    @property
    def uses_draft_model(self) -> bool:
        """Whether a draft model is to be loaded."""
        return self.drafts and self.drafter != "prompt-lookup"

    @property
    def fixed_rows(self) -> int | None:
        """Rows every target forward is padded to, so that a row's bits do not depend on how many rows are computed.

        Just enough for a verification. On a board nothing has to be padded: a tile has 32 rows anyway.
        """
        return self.longest_draft + 1 if self.row_invariant and self.device != "tt" else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The generation paths to run and to count, in the order of the report."""
        return ("baseline", "speculative") if self.mode == "compare" else (self.mode,)


def _integer(low: int, high: int | None = None):
    """argparse type: an integer in [low, high]."""
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: give one {bounds}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} is out of range: give a whole number {bounds}")
        return value

    return parse


def _draft_tokens(text: str) -> int | str:
    """argparse type: a number of drafted tokens, or AUTO."""
    if text == AUTO:
        return AUTO
    try:
        return _integer(0, MAX_DRAFT_LENGTH)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {AUTO}") from None


def _count_by_length(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not COUNTxLENGTH: give two whole numbers, such as 10x64")
    return int(match[1]), int(match[2])


def build_parser(mode: str | None, environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Parser of one demo. ``mode`` fixes the mode and takes the flag away; None offers --mode."""
    about = "Plain decoding of one Llama model." if mode else "Speculative decoding of a Llama beside its own baseline."
    parser = Parser(
        description=f"{about}\nWithout arguments: the small pair of this project, ten prompts of 30 tokens.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")

    group = parser.add_argument_group("models")
    if mode is None:
        group.add_argument("--mode", choices=MODES, default="compare", help="what to run (default: %(default)s)")
    else:
        parser.set_defaults(mode=mode)
    group.add_argument(
        "--target",
        metavar="PATH|ID",
        default=environ.get("HF_MODEL") or None,
        help="checkpoint directory or Hugging Face id of the target model (default: the embedded tiny-target)",
    )
    group.add_argument(
        "--draft",
        metavar="PATH|ID",
        default=None,
        help="the same for the draft model (default: the embedded tiny-draft)",
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda", "tt"),
        default="cpu",
        help="tt is a Tenstorrent board (default: %(default)s)",
    )
    group.add_argument(
        "--max-seq-len",
        type=_integer(2),
        metavar="N",
        help="context to reserve, in tokens (default: the models' own, at most 2048)",
    )
    group.add_argument(
        "--threads",
        type=_integer(1),
        metavar="N",
        help="CPU threads of torch, which on a board converts weights and draws samples (default: torch's own)",
    )

    group = parser.add_argument_group("numbers on cpu and cuda")
    group.add_argument("--dtype", choices=DTYPES, default=None, help="of the models (default: bf16)")
    group.add_argument(
        "--draft-dtype",
        choices=(*DTYPES, "int8"),
        default=None,
        help="of the draft; a cheaper one can only lower acceptance, never change the text (default: --dtype)",
    )
    group.add_argument(
        "--row-invariant",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute every target forward on K + 1 rows, so that greedy text is the same bit for bit with and without "
        "speculation (default: on where that costs plain decoding nothing: K + 1 <= 7, and not in fp32, which hardly "
        "ever needs it)",
    )

    group = parser.add_argument_group("Tenstorrent boards (--device tt)")
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default=None,
        help="formats of the target's weights and KV cache: bf16 everywhere; accuracy: bfp8; performance: bfp8, gate "
        f"and up matrices bfp4; bfp4: all layers bfp4, KV cache and output matrix bfp8 (default: {PRECISION})",
    )
    group.add_argument(
        "--draft-precision",
        choices=tuple(PRECISIONS),
        default=None,
        help="the same for the draft; a lower one can only lower acceptance, never change the text "
        "(default: --precision)",
    )
    group.add_argument(
        "--draft-placement",
        choices=PLACEMENTS,
        default=None,
        help="shared: the draft on the target's chips, a greedy round being one program; own-chip: on a chip of its "
        f"own, for boards with several (default: {PLACEMENTS[0]})",
    )
    group.add_argument(
        "--trace",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay captured programs instead of dispatching op by op (default: on; never on mock boards)",
    )
    group.add_argument(
        "--weight-cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep converted weights on disk for the next run (default: on)",
    )

    group = parser.add_argument_group("prompts")
    group.add_argument("--prompts", metavar="FILE", help="file of prompts, see below (default: demo/prompts/)")
    group.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    group.add_argument(
        "--random-prompts",
        type=_count_by_length,
        metavar="COUNTxLENGTH",
        help="random token ids, for checkpoints without a tokenizer; ignores stop tokens",
    )
    group.add_argument("--instruct", action="store_true", help="put prompts through the model's chat template")
    group.add_argument("--max-prompts", type=_integer(1), metavar="N", help="only the first N prompts")

    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=_integer(1), default=30, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--drafter",
        choices=DRAFTERS,
        default=DRAFTERS[0],
        help="who guesses the next tokens. model: the draft model; prompt-lookup: no model, a copy of what followed "
        "the same tokens earlier in the prompt or text; combined: prompt-lookup where it finds something, else the "
        "draft model; none: nobody, plain decoding (default: %(default)s; a board has model and none for now)",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=_draft_tokens,
        default=None,
        metavar=f"{AUTO}|K",
        help=f"tokens drafted per round, 0 to {MAX_DRAFT_LENGTH}; {AUTO}: before every round whatever pays best of 0 "
        f"to {AUTO_LONGEST}, by the costs and the acceptance measured so far (default: {DRAFT_TOKENS})",
    )
    group.add_argument(
        "--verification",
        choices=("batched", "sequential"),
        default="batched",
        help="check a round's drafted tokens in one forward, or one by one to see what that costs "
        "(default: %(default)s)",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default: %(default)s)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of sampling and random prompts; a sampled speculative text repeats only where --num-draft-tokens is a "
        f"number, as {AUTO} goes by times (default: 0)",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write all results, per prompt and in total, to this file")
    group.add_argument("--quiet", action="store_true", help="print only the final table")
    group.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    return parser


def parse_settings(
    argv: Sequence[str] | None, mode: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings | None:
    """Settings from a command line, or None for --version. Raises UserError for anything wrong in it."""
    options = build_parser(mode, environ).parse_args(argv)
    if options.version:
        return None
    sources = [flag for flag in ("prompts", "prompt", "random_prompts") if getattr(options, flag)]
    if len(sources) > 1:
        flags = " and ".join("--" + flag.replace("_", "-") for flag in sources)
        raise UserError(f"{flags} were given together: give one kind of prompts")
    if options.instruct and options.random_prompts:
        raise UserError("--instruct has no meaning with --random-prompts: give one of them")
    values = vars(options)
    del values["version"]
    _check_device_flags(options)
    _check_drafter(options)
    values["draft"] = options.draft or environ.get("DRAFT_MODEL") or None
    if options.target is None:
        values["target"] = str(EMBEDDED_TARGET)
        values["draft"] = options.draft or str(EMBEDDED_DRAFT)
    for name, default in (("dtype", "bf16"), ("precision", PRECISION), ("draft_placement", PLACEMENTS[0])):
        values[name] = values[name] or default
    for name in ("dtype", "precision"):
        values[f"draft_{name}"] = values[f"draft_{name}"] or values[name]
    for name in ("trace", "weight_cache"):
        values[name] = values[name] is not False
    if options.num_draft_tokens is None:
        values["num_draft_tokens"] = 0 if options.drafter == "none" else DRAFT_TOKENS
    if options.row_invariant is None:
        free = options.num_draft_tokens == AUTO or options.num_draft_tokens < FREE_ROWS
        values["row_invariant"] = values["dtype"] != "fp32" and free
    return Settings(**values)


def _check_device_flags(options: argparse.Namespace) -> None:
    """UserError for a flag that has no meaning on the device."""
    on_board = options.device == "tt"
    given = [name for name in (TORCH_FLAGS if on_board else BOARD_FLAGS) if getattr(options, name) is not None]
    if given:
        flag = "--no-" * (getattr(options, given[0]) is False) or "--"
        flag += given[0].replace("_", "-")
        remedy = TORCH_FLAGS[given[0]] if on_board else "add --device tt or leave it out"
        raise UserError(f"{flag} has no meaning with --device {options.device}: {remedy}")


def _check_drafter(options: argparse.Namespace) -> None:
    """UserError for a way of drafting that the device or another flag rules out."""
    drafter, length = options.drafter, options.num_draft_tokens
    if options.device == "tt":
        captured = "does not work with --device tt yet, where programs are captured for"
        if drafter in ("prompt-lookup", "combined"):
            raise UserError(f"--drafter {drafter} {captured} the draft model: use --drafter model or none")
        if length == AUTO:
            raise UserError(
                f"--num-draft-tokens {AUTO} {captured} one draft length: give a number, such as {DRAFT_TOKENS}"
            )
    if drafter == "none" and length:
        raise UserError(f"--num-draft-tokens {length} has no meaning with --drafter none: leave one of them out")
    if drafter in ("prompt-lookup", "none"):
        given = [name for name in DRAFT_FLAGS if getattr(options, name) is not None]
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise UserError(f"{flag} has no meaning with --drafter {drafter}: leave it out or use --drafter model")
    if length == AUTO and options.verification == "sequential":
        raise UserError(
            f"--num-draft-tokens {AUTO} chooses by what batched verification costs: with --verification sequential "
            f"give a number, such as {DRAFT_TOKENS}"
        )


def read_prompts(settings: Settings) -> list[str]:
    """Prompt texts in order, cut to --max-prompts; none for --random-prompts. Raises UserError for a bad file."""
    if settings.random_prompts:
        return []
    if settings.prompt:
        prompts = settings.prompt
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("--prompt '' is empty: give some text")
    else:
        default = PROMPTS / ("instruct.txt" if settings.instruct else "python.txt")
        prompts = _read_file(Path(settings.prompts) if settings.prompts else default)
    return prompts[: settings.max_prompts]


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
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
    except ValueError as error:
        raise UserError(f"the prompt file {path} is not JSON ({error}): see --help for its format") from error
    if not isinstance(items, list):
        raise UserError(f"the prompt file {path} holds {type(items).__name__}, not a list: see --help for its format")
    prompts = [item.get("prompt") if isinstance(item, dict) else item for item in items]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UserError(f'entry {number} of {path} is neither a string nor an object with a "prompt" string')
    return prompts


def describe_source(source: str) -> str:
    """A checkpoint's name for people: embedded ones relative to the project, others as given."""
    path = Path(source)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else source
