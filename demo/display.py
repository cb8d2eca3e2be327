"""Everything that is written to the terminal: streamed text, live figures, the final table. The only user of rich.

`TerminalView` redraws a live region at most ten times a second and leaves one block per prompt behind; `PlainView`
streams plain text, for pipes and files; `QuietView` keeps still. All three end with the same table.
"""

import sys
import time

from rich.box import ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from demo.explain import explain_slowdown
from demo.results import RunResults
from demo.runs import Prompt, Row, Run
from demo.session import Session
from demo.settings import Settings
from demo.wording import about, closing_lines, figures, pace, path_name, summary_sections
from models.cli.console import Terminal
from models.cli.text import visible

# Where a token came from -> its style and, for the legend, its name.
ORIGINS = {
    "drafted": ("green", "drafted and accepted"),
    "corrected": ("yellow", "corrected by the target"),
    "bonus": ("cyan", "bonus"),
    "plain": ("", "target alone"),
    "prefill": ("", ""),
}
REDRAW_S = 0.1
PROMPT_LINES = 12  # of a long prompt only the end is shown


def make_display(settings: Settings, session: Session) -> "QuietView":
    """The view that suits stdout and --quiet."""
    console = Terminal(no_color=settings.no_color or None, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # rich assumes 80 columns for a pipe and would cut the table
    if settings.quiet:
        return QuietView(console, session)
    live = console.is_terminal and not console.is_dumb_terminal
    return TerminalView(console, session) if live else PlainView(console, session)


class QuietView:
    """Shows nothing until the end. Base of the other views; a context manager around the run."""

    def __init__(self, console: Console, session: Session):
        self.console = console
        self.session = session

    def __enter__(self) -> "QuietView":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin_prompt(self, prompt: Prompt) -> None:
        pass

    def begin_run(self, run: Run) -> None:
        pass

    def token(self, run: Run) -> None:
        pass

    def end_run(self, run: Run) -> None:
        pass

    def end_prompt(self, row: Row) -> None:
        pass

    def interrupted(self, run: Run | None) -> None:
        """Say what was cut off."""
        where = "interrupted"
        if run:
            place = f"prompt {run.prompt.number}" if run.counted else "the warm-up"
            where += f" in {place}, {run.path}, after {_so_far(run, self.session)}"
            where += "" if run.counted else " (nothing is counted yet, so the table shows the warm-up)"
        self.console.print()
        self.console.print(Text(where, style="bold yellow"))

    def summary(self, results: RunResults) -> None:
        """The final table and what it means."""
        framed = self.console.is_terminal
        shown = list(results.totals)
        if not shown:
            return
        table = Table(box=ROUNDED if framed else None, pad_edge=framed, border_style="dim")
        table.add_column("")
        for path in shown:
            table.add_column(path, justify="right")
        if len(shown) == 2:
            table.add_column("ratio", justify="right", style="bold")
        for section in summary_sections(results):
            for label, baseline, speculative, ratio in section:
                cells = {"baseline": baseline, "speculative": speculative}
                table.add_row(label, *(cells[path] for path in shown), *([ratio] if len(shown) == 2 else []))
            if framed:
                table.add_section()
        self.console.print()
        self.console.print(table)
        for line, style in closing_lines(results):
            self.console.print(Text(line, style=style))
        for line in explain_slowdown(results):
            self.console.print(Text(line, style="yellow"))


class PlainView(QuietView):
    """Plain text as it comes, into a pipe or file with its control characters. Of two equal texts the second is not
    repeated."""

    def __init__(self, console: Console, session: Session):
        super().__init__(console, session)
        self._streamed: Run | None = None  # the run whose text is being written as it comes
        self._written = 0

    def __enter__(self) -> "PlainView":
        for name, line in about(self.session):
            self._write(f"{name:<8}{line}\n")
        return self

    def begin_prompt(self, prompt: Prompt) -> None:
        self._streamed = None
        self._write(f"\n=== prompt {prompt.number}/{len(self.session.prompts)}\n{prompt.text}\n")

    def begin_run(self, run: Run) -> None:
        if self._streamed is None and run.counted:
            self._streamed, self._written = run, 0
            self._write(f"=== {run.path}\n")

    def token(self, run: Run) -> None:
        if run is self._streamed:
            self._write("".join(text for text, _ in run.pieces[self._written :]))
            self._written = len(run.pieces)

    def end_run(self, run: Run) -> None:
        if run is self._streamed:
            self.token(run)
            self._write("\n")
        elif self._streamed and run.tokens == self._streamed.tokens:
            self._write(f"=== {run.path}: the same text\n")
        elif run.counted:
            self._write(f"=== {run.path}\n{run.text}\n")

    def end_prompt(self, row: Row) -> None:
        self._write("=== " + " | ".join(figures(row, self.session)) + "\n")

    def interrupted(self, run: Run | None) -> None:
        if run and run is not self._streamed:
            self._write(f"\n=== {run.path}\n{run.text}")
        super().interrupted(run)

    def _write(self, text: str) -> None:
        self.console.file.write(visible(text) if self.console.is_terminal else text)
        self.console.file.flush()


class TerminalView(QuietView):
    """Colours by origin, a live region for the prompt under way, one block for each finished prompt."""

    def __init__(self, console: Console, session: Session):
        super().__init__(console, session)
        self._live = Live(
            console=console,
            auto_refresh=False,  # a refreshing thread would take time from the measurement
            transient=True,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._drawn = 0.0
        self._finished: Run | None = None  # the other path's run of the same prompt

    def __enter__(self) -> "TerminalView":
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, line in about(self.session):
            grid.add_row(Text(name, style="bold"), Text(visible(line)))
        self.console.print(Panel(grid, border_style="dim", expand=False))
        if self.session.settings.drafts:
            legend = Text(" ")
            legend.append("prompt", style="dim")
            for style, name in ORIGINS.values():
                if name:
                    legend.append("   ").append("■ ", style=style).append(name, style=style)
            self.console.print(legend)
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()

    def begin_prompt(self, prompt: Prompt) -> None:
        self._finished = None

    def begin_run(self, run: Run) -> None:
        self._draw(run)

    def token(self, run: Run) -> None:
        if time.perf_counter() - self._drawn >= REDRAW_S:
            self._draw(run)

    def end_run(self, run: Run) -> None:
        self._finished = run

    def end_prompt(self, row: Row) -> None:
        self._live.update(Text(""))
        shown = row.runs.get("speculative") or row.runs["baseline"]
        self.console.print(self._title(shown))
        self.console.print(_indented(_prompt_text(row.prompt), _run_text(shown)))
        if not row.identical:
            self.console.print(Padding(Text("baseline:", style="bold"), (1, 0, 0, 1)))
            self.console.print(_indented(_run_text(row.runs["baseline"])))
        line = Text()
        for figure in figures(row, self.session):
            line.append("  " + figure + " ", style="bold green" if figure == "same text" else "bold")
        self.console.print(Padding(line, (1, 0, 0, 0)))

    def interrupted(self, run: Run | None) -> None:
        if run:
            self.console.print(self._title(run))
            self.console.print(_indented(_prompt_text(run.prompt), _run_text(run)))
        super().interrupted(run)

    def _title(self, run: Run) -> Padding:
        title = f"prompt {run.prompt.number}/{len(self.session.prompts)}"
        if not run.counted:
            title = "warm-up: the first prompt, not counted"
        return Padding(Rule(Text(title, style="bold"), align="left", style="dim"), (1, 0, 0, 0))

    def _draw(self, run: Run) -> None:
        console = self.console
        status = Text(f" {path_name(run, self.session)}  ", style="bold")
        if run.tokens:
            status.append(_so_far(run, self.session, f"/{self.session.settings.max_new_tokens}"))
        else:
            status.append("reading the prompt ...")
        if self._finished and (said := pace(self._finished, self.session)):
            status.append(f"   ({self._finished.path} {said})", style="dim")
        text = Text.assemble(_prompt_text(run.prompt), _run_text(run))
        lines = text.wrap(console, console.width - 2)
        room = max(console.height - 7, 3)
        tail = Text("\n").join(lines[-room:])
        self._live.update(Group(self._title(run), _indented(tail), Text(""), status), refresh=True)
        self._drawn = time.perf_counter()


def _so_far(run: Run, session: Session, limit: str = "") -> str:
    said = pace(run, session)
    return f"{len(run.tokens)}{limit} tokens: {said}" if said else f"{len(run.tokens)}{limit} tokens"


def _prompt_text(prompt: Prompt) -> Text:
    lines = visible(prompt.text).split("\n")
    if len(lines) > PROMPT_LINES:
        lines = ["...", *lines[-PROMPT_LINES:]]
    return Text("\n".join(lines), style="dim")


def _run_text(run: Run) -> Text:
    text = Text()
    for piece, origin in run.pieces:
        text.append(visible(piece), style=ORIGINS[origin][0])
    return text


def _indented(*parts: Text) -> Padding:
    return Padding(Text.assemble(*parts), (0, 0, 0, 2))
