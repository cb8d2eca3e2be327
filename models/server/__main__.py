"""`python -m models.server`: see `--help`."""

import sys

from models.cli.command import run_command
from models.server.running import command

if __name__ == "__main__":
    sys.exit(run_command(command))
