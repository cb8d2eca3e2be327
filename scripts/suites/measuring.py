"""Turns, medians and percentiles: how every suite measures."""

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def shuffled(items: Sequence[T], turn: int) -> list[T]:
    """The same items in another order each turn, the same one in every run.

    Mixed, not rotated: what stands before an item changes the caches it finds (here by some percent), and is not to be
    the same one always.
    """
    return random.Random(turn).sample(items, len(items))


def turns(repeat: int, items: int, configurations: Sequence[T]) -> Iterator[tuple[int, T]]:
    """(item, configuration) of one repetition: item by item every configuration takes its turn, in another order each
    time.

    Whatever else the machine does for a while then hits all configurations alike.
    """
    for item in range(items):
        for configuration in shuffled(configurations, repeat * items + item):
            yield item, configuration


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Median, smallest and largest of what was measured, and the values themselves; None if there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "values": list(values)}


def ratios(above: Sequence[float | None], below: Sequence[float | None]) -> list[float | None]:
    """Repetition by repetition, so that a slow moment of the machine divides out; None where one is missing."""
    return [a / b if a is not None and b else None for a, b in zip(above, below, strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, straight lines between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def winner(rates: dict[str, list[float]]) -> dict[str, Any] | None:
    """Who has the highest median, and in how many repetitions it came first; rates [repetition] by name."""
    rates = {name: values for name, values in rates.items() if values}
    if not rates:
        return None
    best = max(rates, key=lambda name: statistics.median(rates[name]))
    rounds = list(zip(*rates.values(), strict=True))
    won = sum(rates[best][repeat] == max(round) for repeat, round in enumerate(rounds))
    return {"name": best, "won": won, "repetitions": len(rounds)}
