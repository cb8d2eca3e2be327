"""The single model alone, measured as in simple_text_demo.py: `--help` lists the options."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo.harness import main

    sys.exit(main(mode="baseline"))
