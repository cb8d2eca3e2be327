"""The flags that command lines share, and their environment equals. Nothing heavy is imported here."""

import argparse
import re
from collections.abc import Mapping

from models.boards import PLACEMENTS
from models.errors import UserError
from models.fetch import PACKAGED
from models.options import (
    AUTO,
    AUTO_LONGEST,
    DEVICES,
    DRAFT_TOKENS,
    DTYPES,
    MAX_THREADS,
    NAMED,
    TREE_NODES,
    VERIFICATIONS,
)
from models.speculative.drafters import MAX_DRAFT_LENGTH, registry
from models.speculative.drafters.forced import Forced, parsed_forced
from models.ttnn_llama.shapes import MAX_ATTENTION_CORES, PREFILLS
from models.ttnn_llama.weights.precision import PRECISION, PRECISIONS, SMALL_HIDDEN_SIZE

EPILOG = """\
prompt files:
  *.json   a list of strings, or of objects with a "prompt" key
  others   plain text; a line that holds only --- parts one prompt from the next (the line end before it
           belongs to the separator, so end a prompt with an empty line to give it a final line end)

environment:
  HF_MODEL       same as --target
  DRAFT_MODEL    same as --draft
  MESH_DEVICE    the board of --device tt: N150, N300, T3K, P150, P300 or P300x2, which is a QuietBox 2
                 (default: the one that is found)
  TT_CACHE_PATH  directory of converted weights (default: tt-speculative-llama/weights in ~/.cache)
  A flag wins over its variable.

exit codes: 0 done, 1 an audit found another text than plain decoding's, 2 a mistake in the input (one line on
stderr), 130 interrupted, 143 terminated (results so far are printed and written).
"""


def integer(low: int, high: int | None = None):
    """argparse type: an integer in [low, high]."""
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} is not a whole number: give one {bounds}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{shown(text)} is out of range: give a whole number {bounds}")
        return value

    return parse


def integer_or_auto(low: int, high: int | None = None):
    """argparse type: an integer in [low, high], or AUTO."""
    whole = integer(low, high)

    def parse(text: str) -> int | str:
        try:
            return AUTO if text == AUTO else whole(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {AUTO}") from None

    return parse


def shown(text: str) -> str:
    """A value in a message: of a long one, the beginning."""
    return text if len(text) <= 40 else f"{text[:40]}.. ({len(text)} characters)"


def _count_by_length(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,17})x([1-9]\d{0,17})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is not COUNTxLENGTH: give two whole numbers, such as 10x64")
    return int(match[1]), int(match[2])


def _forced(text: str) -> Forced:
    try:
        return parsed_forced(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model_arguments(
    parser: argparse.ArgumentParser,
    environ: Mapping[str, str],
    default: str = "tiny, the small pair of this project",
) -> None:
    """Which models run where, and in what formats. default: the target where none is named, in words."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target",
        metavar="PATH|ID",
        default=environ.get("HF_MODEL") or None,
        help="checkpoint directory, GGUF file or Hugging Face id of the target model, or a name: "
        f"{', '.join((*NAMED, *PACKAGED))} (default: {default})",
    )
    group.add_argument(
        "--draft",
        metavar="PATH|ID",
        default=None,
        help="the same for the draft model, or a draft head: its files say which (default: the one that belongs to the "
        "target, if there is one)",
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="tt is a Tenstorrent board (default: %(default)s)",
    )
    group.add_argument(
        "--max-seq-len",
        type=integer(2),
        metavar="N",
        help="context to reserve, in tokens (default: the models' own, at most 2048)",
    )
    group.add_argument(
        "--threads",
        type=integer(1, MAX_THREADS),
        metavar="N",
        help="CPU threads of torch, which on a board converts weights and draws samples (default: torch's own)",
    )

    group = parser.add_argument_group("numbers on cpu and cuda")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="of the models; int8: 8-bit matrices, on cpu, another model to the last bit (default: bf16)",
    )
    group.add_argument(
        "--draft-dtype",
        choices=DTYPES,
        default=None,
        help="of the draft; a cheaper one can only lower acceptance, never change the text (default: --dtype; int8 "
        "beside compiled layers in bf16 or fp16)",
    )
    group.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run layers on the CPU as machine code of this project's own, in which a row has the same bits in any "
        "company (default: where that is faster than torch, timed once on this machine)",
    )
    group.add_argument(
        "--row-invariant",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute every row of the target in a way that does not depend on the rows beside it, so that greedy text "
        "is the same bit for bit with and without speculation (a tree's can still differ where two tokens are all but "
        "equal; default: on where that costs plain decoding at most 2 percent, tried once on this machine, and not in "
        "fp32, which hardly ever needs it)",
    )

    group = parser.add_argument_group("Tenstorrent boards (--device tt)")
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default=None,
        help="formats of the target's weights and KV cache: bf16 everywhere; accuracy: bfp8; performance: bfp8, gate "
        "and up matrices bfp4; lofi: the same formats, but the layers' matmuls read fewer bits of them; bfp4: all "
        f"layers bfp4, KV cache and output matrix bfp8 (default: {PRECISION}; of targets of hidden size up to "
        f"{SMALL_HIDDEN_SIZE}, such as 1B, accuracy)",
    )
    group.add_argument(
        "--draft-precision",
        choices=tuple(PRECISIONS),
        default=None,
        help="the same for the draft; a lower one can only lower acceptance, never change the text "
        f"(default: --precision, if given, else {PRECISION})",
    )
    group.add_argument(
        "--draft-placement",
        choices=PLACEMENTS,
        default=None,
        help="shared: the draft on the target's chips, a greedy round being one program; own-chip: on a chip of its "
        f"own, for boards with several (default: {PLACEMENTS[0]})",
    )
    group.add_argument(
        "--attention-cores",
        type=int,
        metavar="N",
        default=None,
        help="cores that share one row and KV head in decode attention: more are faster at long contexts, on a chip "
        f"they are not proved right yet; 1 to {MAX_ATTENTION_CORES}, as many as verification leaves (default: 1)",
    )
    group.add_argument(
        "--prefill",
        choices=PREFILLS,
        default=None,
        help="chunks: prompts are read by prefill kernels; rows: by decode forwards of 32 tokens, slower, a way around "
        f"prefill kernels that a board gets wrong (default: {PREFILLS[0]})",
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


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """What they are to go on with."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompts", metavar="FILE", help="file of prompts, see below (default: demo/prompts/)")
    group.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    group.add_argument(
        "--random-prompts",
        type=_count_by_length,
        metavar="COUNTxLENGTH",
        help="random token ids, for checkpoints without a tokenizer; ignores stop tokens",
    )
    group.add_argument(
        "--instruct",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put prompts through the model's chat template (default: if it has one)",
    )
    group.add_argument("--max-prompts", type=integer(1), metavar="N", help="only the first N prompts")


def add_drafting_arguments(parser: argparse.ArgumentParser) -> None:
    """Who drafts, and how much."""
    group = parser.add_argument_group("drafting")
    group.add_argument(
        "--drafter",
        choices=registry.names(),
        default=None,
        help="who guesses the next tokens. "
        + "; ".join(f"{spec.name}: {spec.help}" for spec in registry.specs())
        + f"; {registry.NONE}: nobody, plain decoding (default: combined; on a board model; where there is no draft "
        "model prompt-lookup)",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=integer_or_auto(0, MAX_DRAFT_LENGTH),
        default=None,
        metavar=f"{AUTO}|K",
        help=f"tokens drafted per round, 0 to {MAX_DRAFT_LENGTH}, of a tree its levels; {AUTO}: before every round "
        f"whatever pays best of 0 to as many as padded rows check ({AUTO_LONGEST} without padding), by the costs and "
        f"the acceptance measured so far (default: {AUTO}; with --verification sequential, and on a board, "
        f"{DRAFT_TOKENS})",
    )
    group.add_argument(
        "--tree-nodes",
        type=integer(1, MAX_DRAFT_LENGTH),
        default=None,
        metavar="N",
        help=f"tokens of a tree at most (--drafter tree), 1 to {MAX_DRAFT_LENGTH} (default: as many as padded rows "
        f"check, {TREE_NODES} without padding; as many as levels are asked for, if that is more)",
    )
    group.add_argument(
        "--exit-layer",
        type=integer_or_auto(1),
        default=None,
        metavar=f"{AUTO}|E",
        help=f"layers of the target that draft (--drafter early-exit), below the number it has; {AUTO}: by what each "
        f"number costs and gets accepted, measured on the first prompt (default: {AUTO}; a board needs a number)",
    )
    group.add_argument(
        "--force-acceptance",
        type=_forced,
        default=None,
        metavar="P|N,N,..",
        help="for measurements: draft the target's own next tokens, known from a plain run of the same prompt, each "
        "right with this chance, or as many right in each round in turn; what is reported is labelled as forced",
    )
    group.add_argument(
        "--verification",
        choices=VERIFICATIONS,
        default="batched",
        help="check a round's drafted tokens in one forward, or one by one to see what that costs "
        "(default: %(default)s)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, new_tokens: str = "") -> None:
    """How long a text is, and how its tokens are chosen. new_tokens: a default length that is found later, in words."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=integer(1),
        default=None if new_tokens else 30,
        metavar="N",
        help=f"(default: {new_tokens or '%(default)s'})",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is off (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default: %(default)s)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of sampling and random prompts; a sampled speculative text repeats only where --num-draft-tokens (and "
        f"with early exit --exit-layer) is a number, as {AUTO} goes by times (default: 0)",
    )
