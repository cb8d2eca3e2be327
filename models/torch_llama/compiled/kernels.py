"""The layers of a Llama as machine code.

A forward of a few rows is bound by reading weights, and in small models by the number of operations. Here a layer is
eight phases of one job (see `threads`) instead of some twenty operations; weights are read once, in the order in which
they lie in memory, whatever the number of rows; activations stay in fp32.

Every product is computed by one kernel, `tile`: some rows times 16 or 64 columns. Each of its sums is added up in the
order of its terms, in a lane of its own. The bits of a row are therefore the same in any company: alone, among drafted
tokens, in a prompt, or along a path of a tree.

Layouts (fp32 unless said otherwise; a row's step is a whole number of panels, what lies behind its values is zeros):
    weights: panels of 64 outputs [in, 64], one behind the other; those of the gate and of the same outputs of "up" in
        turn. bf16, fp16 or fp32, as the keys and the values.
    keys: of 16 positions together [D, 16]. values: [position, D].
    rows of one sequence are together, in the order of their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from models.torch_llama.compiled.builder import (
    BYTE,
    F32,
    FLOAT,
    INT,
    LANES,
    WORD,
    Array,
    Code,
    Module,
    Place,
    Stored,
    Value,
)
from models.torch_llama.compiled.machine_code import Machine, load
from models.torch_llama.compiled.threads import CALLS, JOB_CALL, add_calls, add_job

PANEL = 64  # outputs of a panel
BLOCK = 128  # positions of a block of the cache
WIDENED = 64  # depth of the part of a panel that is made fp32 for many rows: it stays in the first cache
TILE_ROWS = 6  # of the largest tile
MANY = 12  # more rows than these are many
NOT_SEEN = -math.inf

Kernel = Callable[..., Value]


# --------------------------------------------------------------------------------------------------------- products
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

    def tile(self, rows: int, stored: Stored, vectors: int) -> Kernel:
        """Some rows times 16 columns, or 64 as 4 vectors: into y, or added to it."""
        key = (rows, stored, vectors)
        if key not in self._made:
            self._made[key] = self._tile(*key)
        return self._made[key]

    def _tile(self, rows: int, stored: Stored, vectors: int) -> Kernel:
        at_once = next(v for v in (4, 2, 1) if v <= vectors and (rows * v <= self.sums or v == 1))

        @self.module.function(
            *(Array(F32), INT, Array(stored), INT, INT, Array(F32), INT, INT, INT),
            name=f"tile_{rows}_{vectors}_{stored.name}",
        )
        def tile(
            code: Code,
            x: Place,
            x_step: Value,
            w: Place,
            w_step: Value,
            v_step: Value,
            y: Place,
            y_step: Value,
            depth: Value,
            add: Value,
        ) -> None:
            xs, ys = [x + x_step * row for row in range(rows)], [y + y_step * row for row in range(rows)]
            for first in range(0, vectors, at_once):
                columns = range(first, first + at_once)
                sums = [[code.variable(code.spread(0.0)) for _ in columns] for _ in range(rows)]
                with code.when(add.differs(0)):
                    for line, place in zip(sums, ys, strict=True):
                        for total, v in zip(line, columns, strict=True):
                            total.value = place.vector(v * LANES)
                with code.loop(0, depth) as i:
                    weights = [w.vector(i * w_step + v_step * v) for v in columns]
                    for line, place in zip(sums, xs, strict=True):
                        value = code.spread(place[i])
                        for total, weight in zip(line, weights, strict=True):
                            total.value = code.multiply_add(value, weight, total.value)
                for line, place in zip(sums, ys, strict=True):
                    for total, v in zip(line, columns, strict=True):
                        place.put(v * LANES, total.value)

        return tile

    def multiply(self, stored: Stored, vectors: int) -> Kernel:
        """The same of any number of rows."""
        key = (stored, vectors)
        if key not in self._made:
            self._made[key] = self._multiply(*key)
        return self._made[key]

    def _multiply(self, stored: Stored, vectors: int) -> Kernel:
        @self.module.function(
            *(Array(F32), INT, INT, Array(stored), INT, INT, Array(F32), INT, INT, INT),
            name=f"multiply_{vectors}_{stored.name}",
        )
        def multiply(
            code: Code, x: Place, x_step: Value, rows: Value, w: Place, w_step: Value, v_step: Value, y: Place, *rest: Value
        ) -> None:
            y_step, depth, add = rest

            def some(count: int, row: Value) -> None:
                tile = self.tile(count, stored, vectors)
                tile(code, x + row * x_step, x_step, w, w_step, v_step, y + row * y_step, y_step, depth, add)

            whole = rows // TILE_ROWS * TILE_ROWS
            with code.loop(0, whole, TILE_ROWS) as row:
                some(TILE_ROWS, row)
            for left in range(1, TILE_ROWS):
                with code.when((rows - whole).equals(left)):
                    some(left, whole)

        return multiply

    def panel(self, stored: Stored) -> Kernel:
        """Any number of rows times a panel of weights."""
        key = ("panel", stored)
        if key not in self._made:
            self._made[key] = self._panel(stored)
        return self._made[key]

    def _panel(self, stored: Stored) -> Kernel:
        few, many = self.multiply(stored, 4), self.multiply(F32, 4)

        @self.module.function(*(Array(F32), INT, INT, Array(stored), Array(F32), INT, INT, INT, Array(F32)))
        def panel(
            code: Code, x: Place, x_step: Value, rows: Value, w: Place, y: Place, y_step: Value, depth: Value, *rest: Any
        ) -> None:
            add, scratch = rest
            with code.when(rows <= MANY):
                few(code, x, x_step, rows, w, PANEL, LANES, y, y_step, depth, add)
            with code.when(rows > MANY), code.loop(0, depth, WIDENED) as i:
                part, widened = code.least(depth - i, WIDENED), w + i * PANEL
                if stored is not F32:
                    with code.loop(0, part * PANEL, LANES) as j:
                        scratch.put(j, widened.vector(j))
                    widened = scratch
                again = code.select(i > 0, code.whole(1), add)
                many(code, x + i, x_step, rows, widened, PANEL, LANES, y, y_step, part, again)

        return panel


# -------------------------------------------------------------------------------------------------------- functions
_SMALLEST, _LOG2E, _LN2_HIGH, _LN2_LOW = -87.0, 1.44269504, 0.693359375, -2.12194440e-4
_SERIES = [1 / math.factorial(n) for n in range(7, 1, -1)]
_SHIFT = 1.5 * 2**23  # added to a small number it leaves a whole one in the lower bits


def exponential(code: Code, x: Value) -> Value:
    """e ** x of vectors <= 0: to the last place or two; what is below e ** -87 is that. Not a number stays so."""
    x = code.select(x < _SMALLEST, _SMALLEST, x)
    shifted = code.multiply_add(x, code.spread(_LOG2E), code.spread(_SHIFT))
    whole = shifted - _SHIFT
    part = code.multiply_add(whole, code.spread(-_LN2_HIGH), x)
    part = code.multiply_add(whole, code.spread(-_LN2_LOW), part)
    power = code.spread(_SERIES[0])
    for factor in _SERIES[1:]:
        power = code.multiply_add(power, part, code.spread(factor))
    return (code.multiply_add(power * part, part, part) + 1.0) * code.power_of_two(shifted)


def _larger(code: Code) -> Callable[[Value, Value], Value]:
    return lambda a, b: code.select(a > b, a, b)


def norm_kernel(module: Module) -> Kernel:
    """RMS norm of some rows."""

    @module.function(INT, INT, Array(F32), Array(F32), INT, INT, FLOAT, Array(F32))
    def norm(
        code: Code, first: Value, last: Value, x: Place, weight: Place, width: Value, step: Value, eps: Value, out: Place
    ) -> None:
        with code.loop(first, last) as row:
            line, result = x + row * step, out + row * step
            total = code.variable(code.spread(0.0))
            with code.loop(0, step, LANES) as i:
                total.value = code.multiply_add(line.vector(i), line.vector(i), total.value)
            squares = code.fold(total.value, lambda a, b: a + b)
            scale = code.number(1.0) / code.root(squares / width.as_float() + eps)
            with code.loop(0, step, LANES) as i:
                result.put(i, line.vector(i) * scale * weight.vector(i))

    return norm


# ---------------------------------------------------------------------------------------------------- parts of layers
def rotate_kernel(module: Module, stored: Stored) -> Kernel:
    """Rotate the queries of some rows, and write their rotated keys and their values to one layer's pool."""

    @module.function(
        *(INT, INT, Array(F32), INT, Array(WORD), Array(WORD), Array(F32), Array(F32)),
        *(INT, INT, INT, Array(stored), INT),
    )
    def rotate(
        code: Code,
        first: Value,
        last: Value,
        qkv: Place,
        step: Value,
        stands: Place,
        places: Place,
        cos: Place,
        sin: Place,
        heads: Value,
        dim: Value,
        kv: Value,
        pool: Place,
        size: Value,
    ) -> None:
        half = dim // 2

        def turn(read: Callable[[Place, Value], Value], line: Place, angle: Value, i: Value) -> None:
            a, b = read(line, i), read(line, half + i)
            c, s = read(cos, angle + i), read(sin, angle + i)
            line.put(i, code.multiply_add(a, c, 0.0 - b * s))
            line.put(half + i, code.multiply_add(b, c, a * s))

        with code.loop(first, last) as row:
            angle, place = stands[row] * half, places[row]
            with code.loop(0, heads + kv) as head:
                line = qkv + (row * step + head * dim)
                whole = half // LANES * LANES
                with code.loop(0, whole, LANES) as i:
                    turn(Place.vector, line, angle, i)
                with code.loop(whole, half) as i:
                    turn(Place.__getitem__, line, angle, i)
            with code.loop(0, kv) as head:
                key = qkv + (row * step + (heads + head) * dim)
                to = pool + (head * size + place // LANES * LANES * dim + place % LANES)
                with code.loop(0, dim) as i:
                    to.put(i * LANES, key[i])
                value, to = key + kv * dim, pool + ((kv + head) * size + place * dim)
                with code.loop(0, dim, LANES) as i:
                    to.put(i, value.vector(i))

    return rotate


def attend_kernel(products: Products, stored: Stored) -> Kernel:
    """What some rows of one sequence find for some query heads of one group."""
    wide, narrow, same = products.multiply(stored, 4), products.multiply(stored, 1), products.multiply(F32, 1)

    @products.module.function(
        *(INT, INT, INT, INT, Array(F32), INT, Array(WORD), INT, Array(BYTE), INT, Array(WORD)),
        *(INT, INT, INT, FLOAT, Array(F32), Array(stored), INT, Array(F32), Array(F32), INT),
    )
    def attend(
        code: Code,
        first: Value,
        last: Value,
        head: Value,
        heads: Value,
        qkv: Place,
        step: Value,
        ends: Place,
        root: Value,
        seen: Place,
        seen_step: Value,
        blocks: Place,
        dim: Value,
        kv: Value,
        group: Value,
        scale: Value,
        ones: Place,
        pool: Place,
        size: Value,
        scratch: Place,
        out: Place,
        out_step: Value,
    ) -> None:
        m, length, pair = (last - first) * heads, ends[last - 1], head // group
        count = (length + (BLOCK - 1)) // BLOCK
        room = count * BLOCK
        queries, found, totals = scratch, scratch + m * dim, scratch + m * dim * 2
        scores = totals + m * LANES
        with code.loop(0, m) as j:
            line, query = qkv + ((first + j // heads) * step + (head + j % heads) * dim), queries + j * dim
            with code.loop(0, dim, LANES) as i:
                query.put(i, line.vector(i) * scale)

        with code.loop(0, count) as b:
            keys, left = pool + (pair * size + blocks[b] * BLOCK * dim), code.least(length - b * BLOCK, BLOCK)
            with code.loop(0, left, PANEL) as p:
                to = scores + (b * BLOCK + p)
                wide(code, queries, dim, m, keys + p * dim, LANES, dim * LANES, to, room, dim, 0)

        with code.loop(0, m) as j:
            row, line = first + j // heads, scores + j * room
            end = ends[row]
            sight = seen + row * seen_step
            with code.loop(root, end) as p, code.when(sight[p - root].equals(0)):
                line.put(p, code.number(NOT_SEEN))
            best = code.variable(code.spread(NOT_SEEN))
            with code.loop(0, length, LANES) as p:
                score = code.select(code.below(end - p), line.vector(p), NOT_SEEN)
                line.put(p, score)
                best.value = code.select(score > best.value, score, best.value)
            greatest = code.fold(best.value, _larger(code))
            with code.loop(0, length, LANES) as p:
                score = line.vector(p)
                power = exponential(code, score - greatest)
                line.put(p, code.select(score.equals(NOT_SEEN), 0.0, power))
        same(code, scores, room, m, ones, 0, 0, totals, LANES, length, 0)

        whole = dim // PANEL * PANEL
        with code.loop(0, count) as b:
            values, depth = pool + ((kv + pair) * size + blocks[b] * BLOCK * dim), code.least(length - b * BLOCK, BLOCK)
            shares = scores + b * BLOCK
            with code.loop(0, whole, PANEL) as i:
                wide(code, shares, room, m, values + i, dim, LANES, found + i, dim, depth, b)
            with code.loop(whole, dim, LANES) as i:
                narrow(code, shares, room, m, values + i, dim, LANES, found + i, dim, depth, b)

        with code.loop(0, m) as j:
            line, part = found + j * dim, code.number(1.0) / totals[j * LANES]
            to = out + ((first + j // heads) * out_step + (head + j % heads) * dim)
            with code.loop(0, dim, LANES) as i:
                to.put(i, line.vector(i) * part)

    return attend


def gate_kernel(products: Products, stored: Stored) -> Kernel:
    """SiLU of some rows' gates times "up", for one panel of each."""
    product = products.panel(stored)

    @products.module.function(Array(F32), INT, INT, Array(stored), INT, Array(F32), INT, Array(F32))
    def gate(
        code: Code,
        x: Place,
        step: Value,
        rows: Value,
        w: Place,
        depth: Value,
        out: Place,
        out_step: Value,
        scratch: Place,
    ) -> None:
        pairs = scratch + WIDENED * PANEL
        for which in range(2):
            product(code, x, step, rows, w + depth * (which * PANEL), pairs + which * PANEL, 2 * PANEL, depth, 0, scratch)
        with code.loop(0, rows) as row:
            pair, to = pairs + row * (2 * PANEL), out + row * out_step
            for i in range(0, PANEL, LANES):
                value = pair.vector(i)
                small = exponential(code, 0.0 - code.absolute(value))
                share = code.select(value >= 0.0, 1.0, small) / (small + 1.0)
                to.put(i, value * share * pair.vector(PANEL + i))

    return gate


# ------------------------------------------------------------------------------------------------------ whole layers
def layer_fields(stored: Stored) -> dict[str, Any]:
    """What the job of some layers consists of.

    x: residuals [n, padded H]; they are changed. layers: from `first` on. norms: [layers, 2, padded H].
    weights: [layers, panels of all four matrices], a layer's first one being weight_step behind the one before.
    pool: [layers, 2 KV P D], a head's D P = size. cos, sin: [S, D / 2].
    stands, places, ends: [n] of each row, its position, its place in the pool, how many positions it may see.
    seen: [n, seen_step] of rows of trees, which of the positions from the tree's first on they see.
    tiles: [m, 4] rows that attention takes together: first, behind the last, where their sequence's blocks begin, the
        position of a tree's row 0, from which on `seen` counts; else beyond all. blocks: of the pool.
    item_heads: query heads of a group that one thread takes together.
    normed, qkv, attended, gated: [n, ..], for results in between. scratch: [threads, scratch_step].
    chunk, row_chunk: rows of an item of a product, and of what has to do with single rows.
    """
    whole = "n hidden heads kv dim inner size first layers weight_step pool_step seen_step item_heads scratch_step"
    whole += " chunk row_chunk row_items qkv_items attend_items hidden_items inner_items"
    floats = "x norms cos sin ones normed qkv attended gated scratch"
    return (
        dict.fromkeys(whole.split(), INT)
        | {"eps": FLOAT, "scale": FLOAT}
        | dict.fromkeys(floats.split(), F32)
        | dict.fromkeys(("stands", "places", "ends", "tiles", "blocks"), WORD)
        | {"seen": BYTE, "weights": stored, "pool": stored}
    )


def head_fields(stored: Stored) -> dict[str, Any]:
    """What the job of the final norm and the head consists of: residuals x [n, padded H], `scored` behind the norm,
    weights [panels of V], logits [n, padded V]."""
    whole = "n hidden panels chunk row_chunk scratch_step row_items panel_items"
    floats = dict.fromkeys("x norm scored logits scratch".split(), F32)
    return dict.fromkeys(whole.split(), INT) | {"eps": FLOAT} | floats | {"weights": stored}


def _padded(width: Value) -> Value:
    return (width + (PANEL - 1)) // PANEL * PANEL


def layers_module(stored: Stored, machine: Machine) -> Module:
    """All code for weights that are stored so."""
    module = Module(f"layers_{stored.name}", machine.triple)
    products = Products(module, machine.registers)
    product, norm = products.panel(stored), norm_kernel(module)
    rotate, attend, gate = rotate_kernel(module, stored), attend_kernel(products, stored), gate_kernel(products, stored)

    def rows_of(code: Code, job: SimpleNamespace, item: Value, chunk: Value) -> tuple[Value, Value]:
        first = item * chunk
        return first, code.least(first + chunk, job.n)

    def panel_of(code: Code, job: SimpleNamespace, item: Value, panels: Value) -> tuple[Value, Value, Value]:
        """(panel, first row, rows) of an item of a product."""
        first, last = rows_of(code, job, item // panels, job.chunk)
        return item % panels, first, last - first

    def steps(job: SimpleNamespace) -> SimpleNamespace:
        q_width = job.heads * job.dim
        made = SimpleNamespace(x=_padded(job.hidden), inner=_padded(job.inner), q_width=q_width)
        made.qkv, made.attended = _padded(q_width + job.kv * job.dim * 2), _padded(q_width)
        made.output_at = made.qkv * job.hidden
        made.gate_at = made.output_at + made.x * q_width
        made.down_at = made.gate_at + made.inner * job.hidden * 2
        return made

    def norms(which: int) -> Any:
        def phase(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
            first, last = rows_of(code, job, item, job.row_chunk)
            step = steps(job).x
            weight = job.norms + ((job.first + turn) * 2 + which) * step
            norm(code, first, last, job.x, weight, job.hidden, step, job.eps, job.normed)

        return phase

    def multiplied(source: str, target: str, source_step: str, target_step: str, at: str, depth: str, add: int) -> Any:
        def phase(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
            step = steps(job)
            x_step, y_step = getattr(step, source_step), getattr(step, target_step)
            panel, row, rows = panel_of(code, job, item, y_step // PANEL)
            width = getattr(job, depth) if hasattr(job, depth) else getattr(step, depth)
            w = job.weights + ((job.first + turn) * job.weight_step + panel * PANEL * width)
            if at:
                w = w + getattr(step, at)
            y = getattr(job, target) + (row * y_step + panel * PANEL)
            scratch = job.scratch + thread * job.scratch_step
            product(code, getattr(job, source) + row * x_step, x_step, rows, w, y, y_step, width, add, scratch)

        return phase

    def rotated(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
        first, last = rows_of(code, job, item, job.row_chunk)
        pool = job.pool + (job.first + turn) * job.pool_step
        rows = (first, last, job.qkv, steps(job).qkv, job.stands, job.places, job.cos, job.sin)
        rotate(code, *rows, job.heads, job.dim, job.kv, pool, job.size)

    def attended(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
        splits = job.heads // job.item_heads
        tile, head = job.tiles + item // splits * 4, item % splits * job.item_heads
        pool, step = job.pool + (job.first + turn) * job.pool_step, steps(job)
        queries = (tile[0], tile[1], head, job.item_heads, job.qkv, step.qkv)
        sights = (job.ends, tile[3], job.seen, job.seen_step, job.blocks + tile[2])
        sizes = (job.dim, job.kv, job.heads // job.kv, job.scale, job.ones)
        scratch = job.scratch + thread * job.scratch_step
        attend(code, *queries, *sights, *sizes, pool, job.size, scratch, job.attended, step.attended)

    def gated(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
        step = steps(job)
        panel, row, rows = panel_of(code, job, item, step.inner // PANEL)
        w = job.weights + ((job.first + turn) * job.weight_step + step.gate_at + panel * (2 * PANEL) * job.hidden)
        out = job.gated + (row * step.inner + panel * PANEL)
        scratch = job.scratch + thread * job.scratch_step
        gate(code, job.normed + row * step.x, step.x, rows, w, job.hidden, out, step.inner, scratch)

    phases = [
        ("row_items", norms(0)),
        ("qkv_items", multiplied("normed", "qkv", "x", "qkv", "", "hidden", 0)),
        ("row_items", rotated),
        ("attend_items", attended),
        ("hidden_items", multiplied("attended", "x", "attended", "x", "output_at", "q_width", 1)),
        ("row_items", norms(1)),
        ("inner_items", gated),
        ("hidden_items", multiplied("gated", "x", "inner", "x", "down_at", "inner", 1)),
    ]
    add_job(module, "layers", layer_fields(stored), lambda job: job.layers, phases)

    def scored(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
        first, last = rows_of(code, job, item, job.row_chunk)
        norm(code, first, last, job.x, job.norm, job.hidden, _padded(job.hidden), job.eps, job.scored)

    def rated(code: Code, job: SimpleNamespace, turn: Value, item: Value, thread: Value) -> None:
        step, y_step = _padded(job.hidden), job.panels * PANEL
        panel, row, rows = panel_of(code, job, item, job.panels)
        w, y = job.weights + panel * PANEL * job.hidden, job.logits + (row * y_step + panel * PANEL)
        scratch = job.scratch + thread * job.scratch_step
        product(code, job.scored + row * step, step, rows, w, y, y_step, job.hidden, 0, scratch)

    head = [("row_items", scored), ("panel_items", rated)]
    add_job(module, "head", head_fields(stored), lambda job: job.row_items * 0 + 1, head)
    add_calls(module)
    return module


_SOURCES = tuple(Path(__file__).with_name(f"{name}.py") for name in ("builder", "kernels", "threads", "machine_code"))
FUNCTIONS = {"layers": JOB_CALL, "head": JOB_CALL} | CALLS


@cache
def load_layers(stored: Stored) -> dict[str, Any]:
    """The functions for weights that are stored so."""
    return load(f"layers-{stored.name}", lambda machine: layers_module(stored, machine), FUNCTIONS, _SOURCES)
