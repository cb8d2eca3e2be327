"""Measurements of speculative decoding. Each suite is one process; every comparison is made inside it.

    python scripts/benchmark.py compare --json compare.json --markdown compare.md --png compare.png
    python scripts/benchmark.py SUITE --help

  compare      every configuration to draft beside plain decoding, by kind of text
  sweep        fixed draft lengths 0 to 16 beside what the formula says
  verify-cost  what a forward of n rows costs, by context and size of the model
  peers        beside transformers, llama.cpp and OpenVINO on the same weights
  batch        many texts at once: by their number, and by how many arrive
  bottleneck   what bounds this machine with this pair, and from which acceptance drafting pays

Configurations that are compared take turns prompt by prompt after an uncounted warm-up; medians are shown with the
smallest and the largest repetition. Ctrl-C ends a suite early: what was complete is shown and written. Model flags are
those of demo/simple_text_demo.py.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence

from models.cli.command import INTERRUPTED, Parser, run_command
from scripts.suites.batch import Batch
from scripts.suites.bottleneck import Bottleneck
from scripts.suites.compare import Compare
from scripts.suites.peers import Peers
from scripts.suites.report import check_outputs, document, write_outputs
from scripts.suites.suite import Progress, Suite, integer
from scripts.suites.sweep import Sweep
from scripts.suites.verify_cost import VerifyCost

SUITES: dict[str, type[Suite]] = {
    "compare": Compare,
    "sweep": Sweep,
    "verify-cost": VerifyCost,
    "peers": Peers,
    "batch": Batch,
    "bottleneck": Bottleneck,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know belongs to the demos' parser."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    commands = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    for name, suite in SUITES.items():
        about = sys.modules[suite.__module__].__doc__
        command = commands.add_parser(name, description=about, formatter_class=kind, allow_abbrev=False)
        group = command.add_argument_group("every suite")
        group.add_argument(
            "--repeats", type=integer(1), default=suite.repeats, metavar="N", help="counted repetitions (%(default)s)"
        )
        group.add_argument("--json", metavar="FILE", help="write all results to this file")
        group.add_argument("--markdown", metavar="FILE", help="write the report to this file")
        group.add_argument("--png", metavar="FILE", help="write a chart to this file")
        group.add_argument("--quiet", action="store_true", help="no progress bar and no messages")
        suite.add_arguments(command)
    return parser


def command(argv: Sequence[str] | None = None) -> int:
    """Run one suite and return the exit code: 0, or 130 after Ctrl-C. Raises UserError for a wrong command line."""
    options, rest = build_parser().parse_known_args(argv)
    chosen = SUITES[options.suite]
    suite = chosen(options, rest)
    check_outputs(options)

    from loguru import logger

    from models.cli.console import measuring_bar

    logger.remove()
    logger.add(sys.stderr, level="WARNING" if options.quiet else "INFO", format="{message}")
    began = time.perf_counter()
    suite.prepare()
    code = 0
    gc.collect()
    gc.freeze()  # what exists now stays: it is not to be walked through in the middle of a measurement
    try:
        with measuring_bar(options.quiet) as progress:
            measure(suite, progress)
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("interrupted: what was complete follows", file=sys.stderr)
    finally:
        gc.unfreeze()
    results = document(
        options.suite,
        suite.results(),
        device=suite.device,
        repeats=options.repeats,
        interrupted=code != 0,
        total_s=time.perf_counter() - began,
    )
    text = suite.markdown(results)
    try:
        write_outputs(options, results, text, suite.figure)
    finally:  # what was measured is shown even if no file can be written any more
        print(text, end="")
        sys.stdout.flush()
    return code


def measure(suite: Suite, progress: Progress) -> None:
    """Measure with torch's book-keeping of gradients off."""
    import torch

    with torch.inference_mode():
        suite.measure(progress)


if __name__ == "__main__":
    sys.exit(run_command(command))
