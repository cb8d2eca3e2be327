"""Products of rows and weights, or of whatever else is stored: each sum in the order of its terms.

One kernel computes them all, `tile`: a few rows times 16 or 64 columns. A sum has a lane of a vector for itself, so its
bits depend neither on the rows beside it nor on how many columns a tile takes.

A panel of weights in int8 begins with the scales of its outputs, in fp32; a sum is multiplied by its scale when it is
whole. In bf16 a panel has the numbers of its first and its second vector in turn, then those of the third and the
fourth (`Stored.pairs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.torch_llama.compiled.builder import F32, INT, LANES, Array, Code, Module, Place, Stored, Value

PANEL = 64  # outputs of a panel of weights
TILE_ROWS = 6  # of the largest tile
MANY = 18  # more rows than these are many
AHEAD = 2048  # bytes of weights that are being loaded before they are needed
WIDENED = 64  # depth of the part of a panel that is made fp32 for many rows: it stays in the first cache

Kernel = Callable[..., Value]


def before(stored: Stored) -> int:
    """Rows of numbers that a panel has in front of its weights: its scales."""
    return F32.size // stored.size if stored.scaled else 0


def _weights(w: Place, at: Value, step: Value, number: int) -> Value:
    """A vector of a term, which begins at `at`: step numbers behind the one before, but for pairs."""
    if not w.stored.pairs:
        return w.vector(at + step * number)
    return w.two(at + number // 2 * 2 * LANES)[number % 2]


def scaled(code: Code, total: Value, scale: Value, add: Value, y: Place) -> None:
    """Put sums times their scales to y, or add them."""
    with code.when(add.differs(0)):
        y.put(0, code.multiply_add(total, scale, y.vector(0)))
    with code.when(add.equals(0)):
        y.put(0, total * scale)


class Products:
    """Makes the kernels that multiply, each one when it is first asked for.

    Args:
        module: they belong to.
        registers: vectors that the machine's registers hold.
    """

    def __init__(self, module: Module, registers: int) -> None:
        self.module = module
        self.sums = registers * 3 // 4  # the others hold weights and what is multiplied
        self._made: dict[tuple[Any, ...], Kernel] = {}

    def _once(self, make: Callable[..., Kernel], *how: Any) -> Kernel:
        key = (make.__name__, *how)
        if key not in self._made:
            self._made[key] = make(*how)
        return self._made[key]

    def tile(self, stored: Stored, vectors: int, ahead: bool, rows: int) -> Kernel:
        """So many rows times 16 columns, or 64 as 4 vectors: into y, or added to it.

        Its arguments: x, numbers from one of its rows to the next; w, numbers from one term to the next, from one
        vector to the next; y, numbers from one of its rows to the next; depth, whether to add. ahead: w is a panel of
        weights, which come from memory, and may have scales in front.
        """
        return self._once(self._tile, stored, vectors, ahead, rows)

    def _tile(self, stored: Stored, vectors: int, ahead: bool, rows: int) -> Kernel:
        at_once = next(v for v in (4, 2, 1) if v <= vectors and (rows * v <= self.sums or v == 1))
        kinds = (Array(F32), INT, Array(stored), INT, INT, Array(F32), INT, INT, INT)

        @self.module.function(*kinds, name=f"tile_{stored.name}_{vectors}_{ahead}_{rows}")
        def tile(code: Code, *given: Any) -> None:
            x, x_step, w, w_step, v_step, y, y_step, depth, add = given
            xs, ys = [x + x_step * row for row in range(rows)], [y + y_step * row for row in range(rows)]
            scales = code.place_of(w, F32)
            w = w + before(stored) * PANEL
            for first in range(0, vectors, at_once):
                columns = range(first, first + at_once)
                sums = [[code.variable(code.spread(0.0)) for _ in columns] for _ in range(rows)]
                if not stored.scaled:
                    with code.when(add.differs(0)):
                        for line, place in zip(sums, ys, strict=True):
                            for total, v in zip(line, columns, strict=True):
                                total.value = place.vector(v * LANES)
                with code.loop(0, depth) as i:
                    if ahead and not first:
                        code.prefetch(w + i * w_step, AHEAD, PANEL)
                    weights = [_weights(w, i * w_step, v_step, v) for v in columns]
                    for line, place in zip(sums, xs, strict=True):
                        value = code.spread(place[i])
                        for total, weight in zip(line, weights, strict=True):
                            total.value = code.multiply_add(value, weight, total.value)
                for line, place in zip(sums, ys, strict=True):
                    for total, v in zip(line, columns, strict=True):
                        if stored.scaled:
                            scaled(code, total.value, scales.vector(v * LANES), add, place + v * LANES)
                        else:
                            place.put(v * LANES, total.value)

        return tile

    def multiply(self, stored: Stored, vectors: int, ahead: bool = False) -> Kernel:
        """The same for any number of rows: x, step, rows, then as above."""
        return self._once(self._multiply, stored, vectors, ahead)

    def _multiply(self, stored: Stored, vectors: int, ahead: bool) -> Kernel:
        kinds = (Array(F32), INT, INT, Array(stored), INT, INT, Array(F32), INT, INT, INT)

        @self.module.function(*kinds, name=f"multiply_{stored.name}_{vectors}_{ahead}")
        def multiply(code: Code, *given: Any) -> None:
            x, x_step, rows, w, w_step, v_step, y, y_step, depth, add = given

            def some(count: int, row: Value) -> None:
                tile = self.tile(stored, vectors, ahead, count)
                tile(code, x + row * x_step, x_step, w, w_step, v_step, y + row * y_step, y_step, depth, add)

            whole = rows // TILE_ROWS * TILE_ROWS
            with code.loop(0, whole, TILE_ROWS) as row:
                some(TILE_ROWS, row)
            for left in range(1, TILE_ROWS):
                with code.when((rows - whole).equals(left)):
                    some(left, whole)

        return multiply

    def panel(self, stored: Stored) -> Kernel:
        """Any number of rows times a panel of weights: x, step, rows, w, y, step, depth, whether to add, scratch
        [WIDENED, PANEL], and as many rows [PANEL] behind it if they are to be added."""
        return self._once(self._panel, stored)

    def _panel(self, stored: Stored) -> Kernel:
        few, many = self.multiply(stored, 4, True), self.multiply(F32, 4)

        @self.module.function(*(Array(F32), INT, INT, Array(stored), Array(F32), INT, INT, INT, Array(F32)))
        def panel(code: Code, *given: Any) -> None:
            x, x_step, rows, w, y, y_step, depth, add, scratch = given
            with code.when(rows <= MANY):
                few(code, x, x_step, rows, w, PANEL, LANES, y, y_step, depth, add)
            to, to_step, first = y, y_step, add
            if stored.scaled:  # what is to be added to has no scale: sums are apart until they are whole
                adds, first = add.differs(0), code.whole(0)
                to = code.select_place(adds, scratch + WIDENED * PANEL, y)
                to_step = code.select(adds, code.whole(PANEL), y_step)
            with code.when(rows > MANY), code.loop(0, depth, WIDENED) as i:
                part, widened = code.least(depth - i, WIDENED), w + (i + before(stored)) * PANEL
                if stored is not F32:
                    with code.loop(0, part * PANEL, PANEL) as j:
                        code.prefetch(widened + j, AHEAD, PANEL)
                        for k in range(0, PANEL, 2 * LANES):
                            for number, vector in enumerate(widened.two(j + k)):
                                scratch.put(j + (k + number * LANES), vector)
                    widened = scratch
                again = code.select(i > 0, code.whole(1), first)
                many(code, x + i, x_step, rows, widened, PANEL, LANES, to, to_step, part, again)
            if stored.scaled:
                scales = code.place_of(w, F32)
                with code.when(rows > MANY), code.loop(0, rows) as row:
                    for k in range(0, PANEL, LANES):
                        total = (to + row * to_step).vector(k)
                        scaled(code, total, scales.vector(k), add, y + row * y_step + k)

        return panel
