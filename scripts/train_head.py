"""Train an EAGLE-3 draft head for your own model, from its own answers.

    python scripts/train_head.py --target smollm2 --out heads/smollm2 --hours 2

Stages; each leaves its result in the work directory, and the same command goes on where it stopped:

1. prompts     of --prompts, or built in: questions for a chat model, beginnings of source files else
2. answers     the target's, with its hidden states, until a third of the time is over
3. training    until the time is over; the state is saved every few minutes
4. checkpoint  in --out: weights in the layout that SGLang and SpecForge read, and a model card with
               what it is worth on answers that were held out

--init-head begins with a head that there is, and trains it on: with other prompts, or with more.

With --steps a run that was killed ends in the same head, bit for bit, as one that was not; with
--hours alone the learning rate follows the clock. More time later: the same command with more --hours.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from models.cli.arguments import shown
from models.cli.command import Parser, run_command
from models.cli.console import stage_bars
from models.errors import UserError
from models.options import MAX_THREADS
from models.training.job import JobOptions, train_head
from models.training.trainer import TrainingOptions


def command(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", required=True, help="checkpoint directory, hub id, GGUF file, or a name (tiny, smollm2)")
    add("--out", type=Path, required=True, help="where the head's checkpoint is written")
    add("--work-dir", type=Path, help="state and answers (default: in the user's cache, by the target's name)")
    add("--hours", type=float, help="time of all stages and all runs together (default 1, without --steps)")
    add(
        "--answer-hours",
        type=float,
        help="of it for answers (default: a third; with --steps alone: until all are written)",
    )
    add("--steps", type=int, help="training steps, instead of as many as there is time for")
    add("--prompts", type=Path, help="a file of prompts, as for the demo: texts between lines of ---, or JSON")
    add("--prompt-count", type=int, default=20000, help="prompts at most (default %(default)s)")
    add("--max-prompt", type=int, default=190, help="tokens of a prompt at most; longer ones are left out")
    add("--max-new-tokens", type=int, default=200, help="tokens of an answer at most")
    add("--part", type=_part, help="I/N: only answer the I-th of N parts of the prompts; for several processes")
    add("--batch", type=int, default=48, help="answers written side by side (default %(default)s)")
    add("--disk-gb", type=float, default=20.0, help="answers stop at so many gigabytes (default %(default)s)")
    add("--draft-vocab", type=int, default=8192, help="ids that the head can draft (default %(default)s)")
    add("--taps", type=_taps, help="layers read, as 2,15,27 (default: the second, the middle one, the last but two)")
    add("--init-head", help="a head to begin with, its weights and draft vocabulary: directory, hub id, or name")
    add("--peak", type=float, help="share of the usual learning rates (default 1; with --init-head 0.5)")
    add("--rows", type=int, default=TrainingOptions.rows, help="positions in a training step (default %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="bf16", choices=("bf16", "fp32"))
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.threads is not None:
        if not 1 <= args.threads <= MAX_THREADS:
            raise UserError(f"--threads {shown(str(args.threads))}: give a whole number from 1 to {MAX_THREADS}")
        torch.set_num_threads(args.threads)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} must be at least 1")
    peak = (0.5 if args.init_head else 1.0) if args.peak is None else args.peak
    if not 0 < peak <= 10:
        raise UserError(f"--peak {peak:g} must be more than 0 and at most 10")
    options = JobOptions(
        target=args.target,
        out=args.out,
        work=args.work_dir,
        hours=1.0 if args.hours is None and args.steps is None else args.hours,
        answer_hours=args.answer_hours,
        steps=args.steps,
        device=args.device,
        dtype=args.dtype,
        batch=args.batch,
        draft_vocab=args.draft_vocab,
        taps=args.taps,
        part=args.part,
        disk_gb=args.disk_gb,
        init_head=args.init_head,
        prompts=args.prompts,
        prompt_count=args.prompt_count,
        max_prompt=args.max_prompt,
        max_new_tokens=args.max_new_tokens,
        training=TrainingOptions(rows=args.rows, peak=peak, seed=args.seed),
    )
    with stage_bars() as watcher:
        result = train_head(options, watcher)
    if result:
        print(f"wrote {args.out}")
        print("K drafted       ", *(f"{k:6d}" for k in range(1, len(result.accepted) + 1)))
        print("acceptance rate ", *(f"{value:6.3f}" for value in result.accepted))
        print("tokens a verify ", *(f"{value:6.3f}" for value in result.tokens_per_verify))
        print("tokens a round  ", *(f"{value:6.3f}" for value in result.tokens_per_round))
    return 0


def _part(text: str) -> tuple[int, int]:
    try:
        index, parts = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no part: give 1/2 for the first of two") from None
    return index - 1, parts


def _taps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no layers: give them as 2,15,27") from None


if __name__ == "__main__":
    sys.exit(run_command(command, interrupted="interrupted: the same command goes on where this stopped"))
