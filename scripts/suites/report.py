"""What a suite leaves behind: JSON with its circumstances, Markdown, a picture."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.cli import environment
from models.cli.environment import date, machine, versions, write_json, write_text
from models.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("json", "markdown", "png")  # flags that name a file
NOTHING = "–"


def document(suite: str, results: dict[str, Any], *, device: str, repeats: int, interrupted: bool, total_s: float):
    """The JSON document of a run: the suite's results behind where, when and how they were measured."""
    return {
        "suite": suite,
        "date": date(),
        "command": sys.argv,
        "repeats": repeats,
        "interrupted": interrupted,
        "total_s": total_s,
        "machine": machine(device),
        "versions": versions(),
        **results,
    }


def header(results: dict[str, Any], title: str) -> str:
    """Title and circumstances, as Markdown."""
    where, packages, settings = results["machine"], results["versions"], results["settings"]
    pair = f"Target {settings['target']}, draft {settings['draft'] or 'none'}, " if "target" in settings else ""
    repeated = f"{results['repeats']} repetition{'s' * (results['repeats'] > 1)}, {results['total_s']:.0f} s"
    cut = "**Interrupted:** what was complete by then.\n\n" if results["interrupted"] else ""
    return (
        f"# {title}\n\n{pair}{settings['dtype']}; {where['gpu'] or where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} threads, torch {packages['torch']}, {results['date'][:10]}; {repeated}.\n\n{cut}"
    )


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table's cell."""
    return NOTHING if value is None else f"{value:.{digits}f}{unit}"


def times(value: float | None) -> str:
    """A ratio: 1.81x."""
    return number(value, 2, "x")


def percent(value: float | None) -> str:
    """A share: 38%."""
    return NOTHING if value is None else f"{100 * value:.0f}%"


def ranged(values: dict[str, Any] | None, show: Callable[[float | None], str] = times) -> str:
    """A spread: 1.81x (1.74x to 1.86x)."""
    if values is None:
        return NOTHING
    return f"{show(values['median'])} ({show(values['min'])} to {show(values['max'])})"


def check_outputs(options: Any) -> None:
    """UserError unless every file that was asked for can be written, found out before the run."""
    environment.check_outputs({f"--{name}": getattr(options, name) for name in FORMATS})


def write_outputs(options: Any, results: dict[str, Any], text: str, draw: Callable) -> None:
    """Write the files that were asked for, each whole or not at all."""
    if options.json:
        write_json(options.json, results)
    if options.markdown:
        write_text(options.markdown, text, "--markdown")
    if options.png:
        _write_png(options.png, draw(results))


def _write_png(name: str, figure: "Figure") -> None:
    path = Path(name).resolve()
    special = path.exists() and not path.is_file()  # a device or a pipe
    part = path if special else path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=120, bbox_inches="tight")
        if not special:
            part.replace(path)
    except OSError as error:
        if not special:
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write --png {name}: {error.strerror}") from error
