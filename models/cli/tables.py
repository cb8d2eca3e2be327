"""Tables of text, as Markdown and for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]


def markdown_table(head: Sequence[str], rows: Rows, left: int = 1) -> str:
    """A Markdown table whose columns also line up as plain text, with an empty line after it.

    Args:
        head: the columns' names.
        rows: as long as `head`.
        left: columns of words, at the left; the others are numbers, aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rules = ("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(head), f"|{'|'.join(rules)}|", *map(line, rows)]) + "\n\n"


def terminal_table(head: Sequence[str], rows: Rows, left: int = 1, **options: Any) -> "Table":
    """The same for rich. options: those of `rich.table.Table`."""
    from rich.table import Table

    table = Table(**options)
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    return table
