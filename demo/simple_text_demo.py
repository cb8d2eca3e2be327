"""Speculative decoding of a Llama beside its own single-model baseline, in one process: `--help` lists the options."""

import sys

from demo.harness import main

if __name__ == "__main__":
    sys.exit(main())
