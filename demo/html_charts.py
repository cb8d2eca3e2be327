"""The charts of a page as shapes of inline SVG, coloured by the page's style sheet; html/charts.j2 writes them.

Every value stands beside its bar as text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Shape(NamedTuple):
    """An element of SVG."""

    tag: str
    attributes: Mapping[str, str]
    text: str = ""


class Chart(NamedTuple):
    """Shapes in drawing order, on width x height. title says in words what they show."""

    width: float
    height: float
    title: str
    shapes: Sequence[Shape]


class ChartFigure(NamedTuple):
    """A chart with its title above it and, below, what its kinds of bars mean and sentences."""

    title: str
    chart: Chart
    key: Mapping[str, str] = {}
    notes: Sequence[str] = ()
    wide: bool = False


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, limit: Limit | None = None) -> Chart:
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
            drawn.append(_rect(bar.kind, left, y + 1, width, 13))
            texts.append(_text(left + width + 5, y + 12, bar.text))
            y += 15
        y += 7
    drawn.append(_line("axis", left, left, top - 2, y - 4))
    if limit:
        x, room = left + limit.value * scale, LETTER * len(limit.text) / 2
        drawn += [_line(name, x, x, top - 2, y - 4) for name in ("halo", "limit")]
        texts.append(_text(min(max(x, room), WIDTH - room), 12, limit.text, anchor="middle"))
    return Chart(WIDTH, y, title, drawn + texts)


def stacked_chart(rows: Sequence[tuple[str, Sequence[Bar]]], title: str) -> Chart:
    """One bar per row, made of parts one after the other; the row's label stands above it."""
    largest = max(sum(part.value for part in parts) for _, parts in rows) or 1
    scale = (WIDTH - 2) / largest
    drawn, y = [], 0.0
    for label, parts in rows:
        drawn.append(_text(1, y + 14, label))
        x = 1.0
        for part in parts:
            width = part.value * scale
            drawn.append(_rect(part.kind, x, y + 20, width, 18))
            x += width
        y += 50
    return Chart(WIDTH, y - 8, title, drawn)


def rounds_chart(texts: Sequence[Sequence[tuple[int, int]]], longest: int, title: str) -> Chart:
    """Of each round of each text, in order: how many tokens were drafted (outline) and accepted (filled)."""
    left, top, height = 26.0, 6.0, 120.0
    count = sum(map(len, texts)) or 1
    step, unit = (WIDE - left - 4) / count, height / max(longest, 1)
    parts = []
    for k in range(longest + 1):
        y = top + height - k * unit
        parts.append(_line("axis", left, WIDE - 4, y, y))
        if k % max(1, -(-longest // 8)) == 0:
            parts.append(_text(left - 6, y + 4, str(k), anchor="end"))
    rounds = [each for text in texts for each in text]
    for which, kind in enumerate(("proposed", "accepted")):
        path = f"M{left:.1f} {top + height:.1f}"
        for i, each in enumerate(rounds):
            path += f"V{top + height - each[which] * unit:.1f}H{left + (i + 1) * step:.2f}"
        parts.append(Shape("path", {"class": kind, "d": f"{path}V{top + height:.1f}Z"}))
    x = left
    for number, text in enumerate(texts, 1):
        width = len(text) * step
        if number > 1:
            parts.append(_line("border", x, x, top, top + height + 16))
        if width > LETTER * len(str(number)) + 4:
            parts.append(_text(x + width / 2, top + height + 16, str(number), anchor="middle"))
        x += width
    return Chart(WIDE, top + height + 22, title, parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> Shape:
    return Shape("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}, text)


def _rect(kind: str, x: float, y: float, width: float, height: float) -> Shape:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return Shape("rect", {"class": kind} | place)


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Shape:
    return Shape("line", {"class": kind, "x1": f"{x1:.1f}", "x2": f"{x2:.1f}", "y1": f"{y1:.1f}", "y2": f"{y2:.1f}"})
