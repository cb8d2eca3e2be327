"""Charts as matplotlib figures, without a window system."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22")
Spreads = Sequence[dict[str, Any] | None]  # as `measuring.spread` makes them


def new_figure(width: float = 9.0, height: float = 5.0, columns: int = 1) -> tuple[Figure, list]:
    """A figure and its axes, side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def error_bars(spreads: Spreads) -> tuple[list[float], list[list[float]]]:
    """Heights and their distances to the smallest and the largest; nothing measured is a height of 0."""
    medians = [each["median"] if each else 0.0 for each in spreads]
    low = [each["median"] - each["min"] if each else 0.0 for each in spreads]
    high = [each["max"] - each["median"] if each else 0.0 for each in spreads]
    return medians, [low, high]


def grouped_bars(groups: Sequence[str], bars: Mapping[str, Spreads], label: str, line: float | None = None) -> Figure:
    """Bars side by side in each group, with their smallest and largest; `line`: a level to compare with."""
    figure, [axis] = new_figure(width=max(6.0, 1.5 * len(groups) + 2))
    width = 0.8 / max(len(bars), 1)
    for index, (name, spreads) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        medians, errors = error_bars(spreads)
        axis.bar(places, medians, width, label=name, color=COLOURS[index % len(COLOURS)], yerr=errors, capsize=2)
    if line is not None:
        axis.axhline(line, color="black", linewidth=1)
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axis.set_ylabel(label)
    if len(bars) > 1:
        axis.legend(frameon=False)
    return figure
