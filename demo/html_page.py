"""Self-contained HTML pages from the templates in html/: one file that fetches nothing and runs no script but its own.

Templates escape whatever text they are given; only `markupsafe.Markup` is taken as HTML.
"""

import base64
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ASSETS = Path(__file__).resolve().parent / "html"
PNG = b"\x89PNG\r\n\x1a\n"
TEMPLATES = Environment(
    loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}


@dataclass(frozen=True)
class Heading:
    """A heading under the page's own."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    """Groups of rows as long as ``header``, parted by a line. Columns are right-aligned but for those in ``words``; the
    first one names its row."""

    kind: ClassVar = "table"
    header: Sequence[str]
    groups: Sequence[Sequence[Sequence[str | Markup]]]
    caption: str = ""
    words: Collection[int] = (0,)


@dataclass(frozen=True)
class Figure:
    """A picture: the bytes of a PNG, or an SVG as text. ``alt`` says in words what it shows. Raises ValueError for
    anything else. It is shown as an image on white, so an SVG of another program brings its own styles but no script.
    """

    kind: ClassVar = "figure"
    image: bytes | str
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.image, str) and "<svg" not in self.image:
            raise ValueError("a figure's text must be an SVG")
        if isinstance(self.image, bytes) and not self.image.startswith(PNG):
            raise ValueError("a figure's bytes must be a PNG")

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        kind, content = ("png", self.image) if isinstance(self.image, bytes) else ("svg+xml", self.image.encode())
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


Block = Heading | Paragraph | Table | Figure


def simple_page(title: str, blocks: Iterable[Block]) -> str:
    """A page without scripts: its title and the blocks, in order."""
    return page("simple.j2", title, blocks=list(blocks))


def page(template: str, title: str, *, script: str = "", data: Any = None, **values: Any) -> str:
    """A page from a template that extends page.j2. ``data`` is handed to ``script`` as JSON, in the element with the id
    "data".

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
    html = TEMPLATES.get_template(template).render(
        title=title, policy=Markup("; ".join(policy)), style=Markup(style), script=Markup(script), data=data, **values
    )
    return html.encode(errors="replace").decode()  # a lone surrogate, which a command line may hold, is no UTF-8


_NONE = "'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
