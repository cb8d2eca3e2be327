"""The single model alone, measured as in simple_text_demo.py: `--help` lists the options."""

import sys

from demo.harness import main

if __name__ == "__main__":
    sys.exit(main(mode="baseline"))
