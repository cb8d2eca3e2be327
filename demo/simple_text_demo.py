"""Speculative decoding of a Llama beside its own single-model baseline, in one process: `--help` lists the options."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo.harness import main

    sys.exit(main())
