"""A picture of a run in the terminal, as SVG: python demo/picture.py FILE.svg [arguments of the demo]

The run is a real one; its finished blocks and its final table are drawn as a terminal of 112 columns shows them.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from demo.display import TerminalView
from demo.report import build_results
from demo.session import Session
from demo.settings import parse_settings
from models.cli.command import run_command
from models.cli.environment import check_writable, write_text
from models.cli.prompts import named_prompts
from models.errors import UserError

COLUMNS = 112
TITLE = "scripts/demo.sh"


class Still(TerminalView):
    """The view of a terminal without what is redrawn while text comes."""

    def _draw(self, run) -> None:
        pass


def command() -> int:
    """Run, draw, write. Raises UserError for a missing file name and whatever the demo refuses."""
    arguments: Sequence[str] = sys.argv[1:]
    if not arguments or not arguments[0].endswith(".svg"):
        raise UserError("name the picture: python demo/picture.py FILE.svg [arguments of the demo]")
    check_writable(arguments[0], "FILE")
    settings = parse_settings(arguments[1:], None, os.environ)
    if settings is None:
        raise UserError("--version has no picture: leave it out")
    screen = io.StringIO()
    console = Console(file=screen, record=True, force_terminal=True, width=COLUMNS, highlight=False, markup=False)
    with contextlib.closing(Session(settings, named_prompts(settings))) as session:
        view = Still(console, session)
        with view:
            session.run(view)
        view.summary(build_results(session, interrupted=False, total_s=0.0))
    picture = console.export_svg(title=shlex.join([TITLE, *arguments[1:]]))
    # A picture fetches nothing: the viewer's own fixed-width font will do.
    write_text(arguments[0], re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), "FILE")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
