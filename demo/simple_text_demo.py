"""Speculative decoding of a Llama beside its own single-model baseline, in one process: `--help` lists the options."""

import sys

from models.cli import interrupts

interrupts.leave_at_once()  # before the imports below, which take a tenth of a second

from demo.harness import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
