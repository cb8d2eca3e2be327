"""The charts of a page as inline SVG, coloured by the page's style sheet. Every value stands beside its bar as text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from demo.html_page import Markup

WIDTH = 300  # of a chart that fits a phone; on a wide screen three stand side by side
WIDE = 720
LETTER = 7.4  # width of one at 12 px in a wide font


class Bar(NamedTuple):
    """``kind`` is a class of style.css; ``text`` what stands beside it."""

    kind: str
    value: float
    text: str


class Limit(NamedTuple):
    """A line across the bars, at a value of theirs."""

    value: float
    text: str


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, limit: Limit | None = None) -> Markup:
    """Horizontal bars from 0, in labelled groups."""
    left = 8 + LETTER * max(len(label) for label, _ in groups)
    right = 8 + LETTER * max(len(bar.text) for _, bars in groups for bar in bars)
    largest = max([bar.value for _, bars in groups for bar in bars] + [limit.value if limit else 0]) or 1
    scale = (WIDTH - left - right) / largest
    y = top = 20.0 if limit else 4.0
    drawn, texts = [], []  # a limit lies over the bars and under the texts
    for label, bars in groups:
        texts.append(_text(left - 8, y + 7.5 * len(bars) + 4, label, anchor="end"))
        for bar in bars:
            width = bar.value * scale
            drawn.append(f'<rect class="{bar.kind}" x="{left:.1f}" y="{y + 1:.1f}" width="{width:.1f}" height="13"/>')
            texts.append(_text(left + width + 5, y + 12, bar.text))
            y += 15
        y += 7
    vertical = f'y1="{top - 2:.0f}" y2="{y - 4:.0f}"'
    drawn.append(f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" {vertical}/>')
    if limit:
        x, room = left + limit.value * scale, LETTER * len(limit.text) / 2
        drawn += [f'<line class="{name}" x1="{x:.1f}" x2="{x:.1f}" {vertical}/>' for name in ("halo", "limit")]
        texts.append(_text(min(max(x, room), WIDTH - room), 12, limit.text, anchor="middle"))
    return _svg(WIDTH, y, title, drawn + texts)


def stacked_chart(rows: Sequence[tuple[str, Sequence[Bar]]], title: str) -> Markup:
    """One bar per row, made of parts one after the other; the row's label stands above it."""
    largest = max(sum(part.value for part in parts) for _, parts in rows) or 1
    scale = (WIDTH - 2) / largest
    drawn, y = [], 0.0
    for label, parts in rows:
        drawn.append(_text(1, y + 14, label))
        x = 1.0
        for part in parts:
            width = part.value * scale
            drawn.append(f'<rect class="{part.kind}" x="{x:.1f}" y="{y + 20:.0f}" width="{width:.1f}" height="18"/>')
            x += width
        y += 50
    return _svg(WIDTH, y - 8, title, drawn)


def rounds_chart(texts: Sequence[Sequence[tuple[int, int]]], longest: int, title: str) -> Markup:
    """Of each round of each text, in order: how many tokens were drafted (outline) and accepted (filled)."""
    left, top, height = 26.0, 6.0, 120.0
    count = sum(map(len, texts)) or 1
    step, unit = (WIDE - left - 4) / count, height / max(longest, 1)
    parts = []
    for k in range(longest + 1):
        y = top + height - k * unit
        parts.append(f'<line class="axis" x1="{left:.0f}" x2="{WIDE - 4}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if k % max(1, -(-longest // 8)) == 0:
            parts.append(_text(left - 6, y + 4, str(k), anchor="end"))
    rounds = [each for text in texts for each in text]
    for which, kind in enumerate(("proposed", "accepted")):
        path = f"M{left:.1f} {top + height:.1f}"
        for i, each in enumerate(rounds):
            path += f"V{top + height - each[which] * unit:.1f}H{left + (i + 1) * step:.2f}"
        parts.append(f'<path class="{kind}" d="{path}V{top + height:.1f}Z"/>')
    x = left
    for number, text in enumerate(texts, 1):
        width = len(text) * step
        if number > 1:
            parts.append(
                f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{top + height + 16:.0f}"/>'
            )
        if width > LETTER * len(str(number)) + 4:
            parts.append(_text(x + width / 2, top + height + 16, str(number), anchor="middle"))
        x += width
    return _svg(WIDE, top + height + 22, title, parts)


def key(kinds: Mapping[str, str]) -> Markup:
    """What the kinds of bars mean."""
    items = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="{kind}" x="0.5" y="0.5" width="9" height="9"/>'
        f"</svg>{escape(text)}</li>"
        for kind, text in kinds.items()
    )
    return Markup(f'<ul class="key">{items}</ul>')


def chart_figure(title: str, chart: Markup, notes: Sequence[str | Markup] = (), *, wide: bool = False) -> Markup:
    """A chart with its title above it and keys or sentences under it."""
    below = "".join(note if isinstance(note, Markup) else f"<figcaption>{escape(note)}</figcaption>" for note in notes)
    if wide:
        chart = Markup(f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">{chart}</div>')
    size = ' class="wide"' * wide
    return Markup(f"<figure{size}><h3>{escape(title)}</h3>{chart}{below}</figure>")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
