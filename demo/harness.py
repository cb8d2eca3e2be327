"""What both demos do: read the command line, load the models, run every prompt, report.

The order of a comparison: the target is loaded once and serves both paths. The first prompt runs once on each path as
warm-up and is not counted. Then, prompt by prompt, both paths run one after the other, each first in turn, so that
whatever else the machine does hits both alike.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from demo.settings import Settings, parse_settings
from models.cli.command import BROKEN_PIPE, INTERRUPTED, discard_stdout, run_command
from models.cli.default import everyday_target
from models.cli.prompts import named_prompts

if TYPE_CHECKING:
    from demo.session import Session


def main(argv: Sequence[str] | None = None, mode: str | None = None) -> int:
    """Run a demo and return its exit code; ``mode`` fixes the mode (None: the user chooses)."""
    return run_command(lambda: _demo(argv, mode))


def _demo(argv: Sequence[str] | None, mode: str | None) -> int:
    start = time.perf_counter()
    settings = parse_settings(argv, mode, choose=everyday_target)
    if settings is None:
        from models.cli.environment import project_version

        print(project_version())
        return 0
    prompts = named_prompts(settings)
    _check_early(settings)

    # Only now the slow imports: a mistake above is answered at once.
    from loguru import logger

    from demo.session import Session

    logger.remove()
    logger.add(sys.stderr, level="WARNING" if settings.quiet else "INFO", format="{message}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks

    with closing(Session(settings, prompts)) as session:
        return _run(session, start)


def _run(session: "Session", start: float) -> int:
    from demo.display import make_display
    from demo.report import build_results

    settings = session.settings
    # What exists now stays: keep the garbage collector from walking through it in the middle of a measurement.
    gc.collect()
    gc.freeze()
    display = make_display(settings, session)
    code = 0
    try:
        with display:
            session.run(display)
    except KeyboardInterrupt:
        code = INTERRUPTED
        display.interrupted(session.under_way[-1] if session.under_way else None)
    except BrokenPipeError:
        code = BROKEN_PIPE
        discard_stdout()
    finally:
        gc.unfreeze()
    shown = session.first_token_at
    results = build_results(
        session,
        interrupted=code != 0,
        total_s=time.perf_counter() - start,
        first_token_s=None if shown is None else shown - start,
    )
    if settings.json:
        from models.cli.environment import write_json

        write_json(settings.json, dataclasses.asdict(results))
    if settings.html:
        from demo.html_report import write_html

        write_html(settings.html, session, results)
    if code != BROKEN_PIPE:
        display.summary(results)
        sys.stdout.flush()
    return code


def _check_early(settings: Settings) -> None:
    """Whatever can be found wrong without loading a model."""
    from models.cli.environment import check_writable
    from models.device import check_device

    if settings.json:
        check_writable(settings.json)
    if settings.html:
        check_writable(settings.html, "--html")
    check_device(settings.device)
