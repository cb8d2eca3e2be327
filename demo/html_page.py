"""Self-contained HTML pages: one file that fetches nothing and runs no script but the project's own.

A page is a list of blocks (headings, paragraphs, tables, figures). Whatever goes into a block as a string is text, and
shows as it is; only `Markup` is taken as HTML.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent / "html"
PNG = b"\x89PNG\r\n\x1a\n"


class Markup(str):
    """HTML that is ready: whatever was text in it is escaped. As a block it stands for itself."""


@dataclass(frozen=True)
class Heading:
    """A heading under the page's own."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows as long as ``header``. Columns are right-aligned but for those in ``words``; the first one names its row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    caption: str = ""
    words: Collection[int] = (0,)


@dataclass(frozen=True)
class Figure:
    """A picture: the bytes of a PNG, or an SVG as text. ``alt`` says in words what it shows. Raises ValueError for
    anything else. It is shown as an image on white, so an SVG of another program brings its own styles but no script.
    """

    image: bytes | str
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.image, str) and "<svg" not in self.image:
            raise ValueError("a figure's text must be an SVG")
        if isinstance(self.image, bytes) and not self.image.startswith(PNG):
            raise ValueError("a figure's bytes must be a PNG")


Block = Heading | Paragraph | Table | Figure | Markup


def simple_page(title: str, blocks: Iterable[Block]) -> str:
    """A page without scripts: its title and the blocks, in order."""
    return page(title, [Markup(f"<h1>{escape(title)}</h1>"), *blocks])


def page(title: str, blocks: Iterable[Block], *, script: str = "", data: Any = None) -> str:
    """A page of blocks. ``data`` is handed to ``script`` as JSON, in the element with the id "data".

    The page's security policy lets it load nothing, and run and style itself with nothing but what stands here.
    """
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(style)}",
        f"script-src {_hash(script) if script else _NONE}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    scripts = ""
    if script:
        # In a script element "<" could open a comment or close the element.
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        scripts = f'<script type="application/json" id="data">{text}</script>\n<script>{script}</script>\n'
    body = "\n".join(map(markup, blocks))
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{scripts}</body>
</html>
"""
    return html.encode(errors="replace").decode()  # a lone surrogate, which a command line may hold, is no UTF-8


_NONE = "'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def markup(block: Block) -> Markup:
    """A block as HTML."""
    if isinstance(block, Markup):
        return block
    if isinstance(block, Heading):
        return Markup(f"<h2>{escape(block.text)}</h2>")
    if isinstance(block, Paragraph):
        return Markup(f"<p>{escape(block.text)}</p>")
    if isinstance(block, Table):
        return table(block.header, [block.rows], caption=block.caption, words=block.words)
    return _figure(block)


def table(
    header: Sequence[str],
    groups: Iterable[Sequence[Sequence[str]]],
    *,
    caption: str = "",
    words: Collection[int] = (0,),
) -> Markup:
    """Rows in groups that a line parts. A narrow screen scrolls the table, not the page."""

    def cells(row: Sequence[str], head: bool) -> str:
        made = []
        for i, cell in enumerate(row):
            tag, scope = ("th", ' scope="col"') if head else ("th", ' scope="row"') if i == 0 else ("td", "")
            alignment = ' class="words"' * (i in words)
            made.append(f"<{tag}{scope}{alignment}>{cell if isinstance(cell, Markup) else escape(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    bodies = "".join(
        f'<tbody class="group">{"".join(cells(row, head=False) for row in group)}</tbody>' for group in groups if group
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or ", ".join(filter(None, header)))
    return Markup(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table>{title}<thead>{cells(header, head=True)}</thead>{bodies}</table></div>"
    )


def _figure(figure: Figure) -> Markup:
    kind, content = ("png", figure.image) if isinstance(figure.image, bytes) else ("svg+xml", figure.image.encode())
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    return Markup(f'<figure><img src="{source}" alt="{escape(figure.alt)}">{caption}</figure>')
