"""What both demos do: read the command line, load the models, run every prompt, report.

The order of a comparison: the target is loaded once and serves both paths. The first prompt runs once on each path as
warm-up and is not counted. Then, prompt by prompt, both paths run one after the other, each first in turn, so that
whatever else the machine does hits both alike.
"""

import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from demo.settings import Settings, parse_settings
from models.cli import interrupts
from models.cli.command import BROKEN_PIPE, INTERRUPTED, USER_ERROR, discard_stdout, run_command
from models.cli.default import everyday_target
from models.cli.prompts import named_prompts
from models.errors import UserError

if TYPE_CHECKING:
    from demo.results import RunResults
    from demo.session import Session

LAST_CHANCE = 2  # signals that the final report does not end for


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
    """Run everything, then save and show what there is, whatever ended it."""
    from demo.display import make_display
    from demo.report import build_results

    settings = session.settings
    # What exists now stays: keep the garbage collector from walking through it in the middle of a measurement.
    gc.collect()
    gc.freeze()
    display = make_display(settings, session)
    code, failure = 0, None
    with interrupts.held(LAST_CHANCE):
        try:
            with display, interrupts.held(1):  # one is looked for between tokens, a second one does not wait
                session.run(display)
        except KeyboardInterrupt:
            code = INTERRUPTED
            with contextlib.suppress(OSError):
                display.interrupted(session.under_way[-1] if session.under_way else None)
        except BrokenPipeError:
            code = BROKEN_PIPE
            discard_stdout()
        except Exception as error:  # a prompt that fails, a full disk under stdout: what was written before stays
            code, failure = USER_ERROR, error
        finally:
            gc.unfreeze()
        shown = session.first_token_at
        results = build_results(
            session,
            interrupted=code != 0,
            total_s=time.perf_counter() - start,
            first_token_s=None if shown is None else shown - start,
        )
        failures = [failure, *_save(session, results)]
        if code != BROKEN_PIPE:
            try:
                display.summary(results)
                sys.stdout.flush()
            except OSError as error:
                discard_stdout()
                failures.append(error)
        for error in filter(None, failures):
            raise error
    return code


def _save(session: "Session", results: "RunResults") -> list[Exception]:
    """Write the files that were asked for; the errors of those that cannot be written."""
    from demo.html_report import write_html
    from models.cli.environment import write_json

    settings, errors = session.settings, []
    writers = {
        settings.json: lambda name: write_json(name, dataclasses.asdict(results)),
        settings.html: lambda name: write_html(name, session, results),
    }
    for name, write in writers.items():
        if name:
            try:
                write(name)
            except (UserError, OSError) as error:
                errors.append(error)
    return errors


def _check_early(settings: Settings) -> None:
    """Whatever can be found wrong without loading a model."""
    from models.cli.environment import check_outputs
    from models.device import check_device

    check_outputs(
        {"--json": settings.json, "--html": settings.html},
        {"--prompts": settings.prompts, "--target": settings.target, "--draft": settings.draft},
    )
    check_device(settings.device)
