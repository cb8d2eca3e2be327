"""What a forward of n rows costs against one row, here and in transformers, on the same weights in one process.

    python scripts/make_checkpoint.py --size 3b build/random-3b
    python scripts/forward_cost.py build/random-3b

Verification pays only if reading K + 1 rows costs about what reading one does. Three ways take turns: this project
with fixed rows (row-invariant arithmetic: every forward computes the same number of rows), without, and transformers'
LlamaForCausalLM. All start at position --context of an unfilled cache; the median over --repeats rounds is shown.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.command_line import Parser, run_command
from models.errors import UserError


def own_forwards(model, rows: Sequence[int], context: int) -> dict[tuple[str, int], Callable[[], object]]:
    """Functions that run one forward, by (way, rows). One set of weights serves both ways."""
    fixed = model.fixed_rows

    def run(n: int, fixed_rows: int | None) -> None:
        model.fixed_rows = fixed_rows
        model.greedy([1] * n, context)

    forwards = {("own, any rows", n): lambda n=n: run(n, None) for n in rows}
    forwards |= {(f"own, fixed {fixed} rows", n): lambda n=n: run(n, fixed) for n in rows if n <= fixed}
    return forwards


def hf_forwards(checkpoint, dtype: str, rows: Sequence[int], context: int) -> dict[tuple[str, int], Callable]:
    """The same through transformers, with a DynamicCache cropped back after each forward."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    from models.llama.torch_llama import DTYPES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    ).eval()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, context, dtype=torch.long), past_key_values=cache, logits_to_keep=1)

    def run(n: int) -> None:
        out = model(input_ids=torch.ones(1, n, dtype=torch.long), past_key_values=cache)
        out.logits[0].argmax(-1).tolist()
        cache.crop(-n)

    return {("HF", n): lambda n=n: run(n) for n in rows}


def measure(forwards: dict[tuple[str, int], Callable], repeats: int) -> dict[tuple[str, int], list[float]]:
    """Seconds [repeats] of each forward, in turn; two uncounted rounds first."""
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in forwards}
    for repeat in range(-2, repeats):
        for key, forward in forwards.items():
            began = time.perf_counter()
            forward()
            if repeat >= 0:
                seconds[key].append(time.perf_counter() - began)
    return seconds


def command(argv: Sequence[str] | None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint directory or hub id")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rows", default="1,2,5,8,16,32", help="row counts (default: %(default)s)")
    parser.add_argument("--fixed-rows", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="position of the first row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--no-hf", action="store_true", help="leave transformers out (half the memory)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    options = parser.parse_args(argv)
    try:
        rows = [int(n) for n in options.rows.split(",")]
    except ValueError:
        raise UserError(f"--rows {options.rows}: give whole numbers with commas, such as 1,2,5,8") from None
    if min(rows) < 1 or max(rows) > 32 or options.repeats < 1:
        raise UserError("--rows must be within 1..32 and --repeats at least 1")

    import torch

    from demo.environment import check_writable, machine, versions, write_json
    from models.llama.loading import load_model, open_model

    if options.json:
        check_writable(options.json)
    opened = open_model(options.checkpoint)
    loaded = load_model(opened, dtype=options.dtype, max_seq_len=options.context + 128, fixed_rows=options.fixed_rows)
    print(f"loaded in {loaded.load_s:.1f} s, {loaded.model.weight_bytes / 1e9:.2f} GB of weights", file=sys.stderr)
    with torch.inference_mode():
        forwards = own_forwards(loaded.model, rows, options.context)
        if not options.no_hf:
            forwards |= hf_forwards(opened.checkpoint, options.dtype, rows, options.context)
        seconds = {key: statistics.median(values) for key, values in measure(forwards, options.repeats).items()}

    ways = list(dict.fromkeys(way for way, _ in seconds))
    print("milliseconds (ratio to the way's own one row)")
    print(f"{'rows':22}" + "".join(f"{n:>16}" for n in rows))
    for way in ways:
        cells = [(seconds.get((way, n)), seconds.get((way, 1))) for n in rows]
        texts = [f"{s * 1e3:.1f}" + (f" ({s / one:.2f})" if one else "") if s else "" for s, one in cells]
        print(f"{way:22}" + "".join(f"{text:>16}" for text in texts))
    best = min(s for (way, n), s in seconds.items() if n == 1 and way != "HF")
    print(f"weights read per second at one row: {loaded.model.weight_bytes / best / 1e9:.1f} GB/s")
    if options.json:
        results = {way: {n: seconds[way, n] * 1e3 for n in rows if (way, n) in seconds} for way in ways}
        extra = {"checkpoint": options.checkpoint, "versions": versions(), "machine": machine("cpu")}
        write_json(options.json, {"milliseconds": results, **extra, "settings": vars(options)})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
