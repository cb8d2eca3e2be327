"""The layers of a Llama as machine code.

A forward of a few rows is bound by reading weights, and in small models by the number of operations. Here a layer is
eight phases of one job (see `threads`) instead of some twenty operations; weights are read once, in the order in which
they lie in memory, whatever the number of rows; activations stay in fp32. No sum depends on the rows beside it (see
`products`): the bits of a row are the same in any company, alone, among drafted tokens, in a prompt, or along a path of
a tree. What a row does not see counts exactly 0.

Layouts (fp32 unless said otherwise; a row's step is a whole number of panels, what lies behind its values is zeros):
    weights: panels of 64 outputs [in, 64], one behind the other; those of the gate and of the same outputs of "up" in
        turn. bf16 in pairs, fp16 or fp32, as the keys and the values; or int8 with scales in front of each panel, keys
        and values being fp32 then.
    keys: of 16 positions together [D, 16]. values: [position, D].
    rows of one sequence are together, in the order of their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace as Job
from typing import Any

from models.torch_llama.compiled.builder import (
    BF16,
    BYTE,
    F16,
    F32,
    FLOAT,
    INT,
    LANES,
    WORD,
    Code,
    Module,
    Place,
    Stored,
    Value,
    Variable,
)
from models.torch_llama.compiled.machine_code import Machine, load
from models.torch_llama.compiled.products import PANEL, WIDENED, Products, before
from models.torch_llama.compiled.threads import CALLS, JOB_CALL, Fields, add_calls, add_job

BLOCK = 128  # positions of a block of the cache
NOT_SEEN = -math.inf


def pool_form(stored: Stored) -> Stored:
    """How keys and values are stored beside such weights."""
    return F32 if stored.scaled else BF16 if stored.pairs else stored


def fields_of(stored: Stored) -> Fields:
    """What a job consists of: layers, what comes behind them, or both.

    x: residuals [n, padded H]; they are changed. rounds: layers, from `first` on. norms: [layers, 2, padded H].
    wide: numbers that queries, keys and values are made of: H, or of a draft head's layer padded H + H. Then `tokens`
        [n, padded H] are normed by the third of its norms, and stand in front of the normed x; where `normed_residual`
        is not 0, residuals begin with the normed x.
    weights: [layers, panels of all four matrices], a layer's first one being weight_step behind the one before.
    pool: [layers, 2 KV P D], a layer's numbers being pool_step, a head's `size`. cos, sin: [S, D / 2].
    stands, places, ends: [n] of each row, its position, its place in the pool, how many positions it may see.
    seen: [n, seen_step] of rows of trees, which of the positions from the tree's first on they see.
    tiles: [tile_count, 4] rows that attention takes together: first, behind the last, where their sequence's blocks
        begin, the position of a tree's row 0, from which on `seen` counts; else beyond all. blocks: of the pool.
    item_heads: query heads of a group that one thread takes together. ones: [16].
    taps: for each layer, the address [n, padded H] of where residuals before it are to be kept, or 0.
    normed, qkv, attended, gated: [n, ..], for results in between. scratch: [threads, scratch_step].
    chunk, row_chunk: rows of an item of a product, and of what has to do with single rows.

    Behind the layers: `scored` [n, padded H] are residuals behind the final norm, `logits` [n, padded V] their products
    with the matrix [panels of V]. last_alone: where it is not 0, of the last row alone.

    A chain (choose_items 1) drafts a token in each of its steps: all n rows in the first one, in each of the others one
    row for the token chosen before; its position and its place follow those of the n rows. What a step chose is in
    ids [steps + 1], whose last number is how many there are; chances [steps + 1] are those of the likeliest tokens up
    to there, the first one of what the chain begins with. It stops behind one that is below its bound, `least` [steps].
        laws: 0 where the likeliest tokens are chosen; else they are drawn, and it is [steps, text_vocabulary] zeros, in
        which what each is drawn from is written. coldness: 1 / temperature. words: [steps] of 64 random bits.
            top_k, top_p: as of `speculative.model.Draws`.
        table: embeddings [vocabulary of the text, H], in bf16, fp16 or fp32 by `form`. map: the text's id of each id,
        or 0. lanes: 0, 1, .. 15. hands_on: whether the next row joins states behind the final norm, not before.
    """
    whole = "n hidden wide heads kv dim inner size first rounds steps weight_step pool_step seen_step item_heads "
    whole += "tile_count panels vocabulary scratch_step normed_residual last_alone hands_on form map table chunk "
    whole += "laws words text_vocabulary top_k "
    whole += "row_chunk row_items qkv_items attend_items hidden_items inner_items last_items panel_items choose_items"
    floats = "x tokens norms cos sin ones lanes normed qkv attended gated scratch norm scored logits chances least"
    fields = dict.fromkeys(whole.split(), INT) | {"eps": FLOAT, "scale": FLOAT, "coldness": FLOAT, "top_p": FLOAT}
    words = "stands places ends tiles blocks taps ids"
    fields |= dict.fromkeys(floats.split(), F32) | dict.fromkeys(words.split(), WORD)
    return fields | {"seen": BYTE, "weights": stored, "pool": pool_form(stored), "matrix": stored}


FORMS = (BF16, F16, F32)  # of embeddings, by number


# -------------------------------------------------------------------------------------------------------- functions
_SMALLEST, _LOG2E, _LN2_HIGH, _LN2_LOW = -87.0, 1.44269504, 0.693359375, -2.12194440e-4
_SERIES = [1 / math.factorial(n) for n in range(7, 1, -1)]
_SHIFT = 1.5 * 2**23  # a small number to which it is added becomes a whole one, in the lower bits


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


def larger(a: Value, b: Value) -> Value:
    """The larger one of each lane."""
    return a.code.select(a > b, a, b)


def padded(width: Value) -> Value:
    """Numbers from one row to the next: whole panels."""
    return (width + (PANEL - 1)) // PANEL * PANEL


def norm_row(code: Code, job: Job, x: Place, weight: Place, out: Place) -> None:
    """RMS norm of a row."""
    step, total = padded(job.hidden), code.variable(code.spread(0.0))
    with code.loop(0, step, LANES) as i:
        total.value = code.multiply_add(x.vector(i), x.vector(i), total.value)
    mean = code.fold(total.value, lambda a, b: a + b) / job.hidden.as_float()
    scale = code.number(1.0) / code.root(mean + job.eps)
    with code.loop(0, step, LANES) as i:
        out.put(i, x.vector(i) * scale * weight.vector(i))


# ---------------------------------------------------------------------------------------------------- parts of layers
def rotate_row(code: Code, job: Job, row: Value, line: Place, pool: Place) -> None:
    """Rotate a row's queries, and write its rotated keys and its values to one layer's pool."""
    half, at = job.dim // 2, job.row_at + row
    angle, place, whole = job.stands[at] * half, job.places[at], half // LANES * LANES

    def turn(read: Callable[[Place, Value], Value], head: Place, i: Value) -> None:
        a, b, cos, sin = read(head, i), read(head, half + i), read(job.cos, angle + i), read(job.sin, angle + i)
        head.put(i, code.multiply_add(a, cos, 0.0 - b * sin))
        head.put(half + i, code.multiply_add(b, cos, a * sin))

    with code.loop(0, job.heads + job.kv) as head:
        with code.loop(0, whole, LANES) as i:
            turn(Place.vector, line + head * job.dim, i)
        with code.loop(whole, half) as i:
            turn(Place.__getitem__, line + head * job.dim, i)
    with code.loop(0, job.kv) as head:
        key = line + (job.heads + head) * job.dim
        to = pool + (head * job.size + place // LANES * LANES * job.dim + place % LANES)
        with code.loop(0, job.dim) as i:
            to.put(i * LANES, key[i])
        value, to = key + job.kv * job.dim, pool + ((job.kv + head) * job.size + place * job.dim)
        with code.loop(0, job.dim, LANES) as i:
            to.put(i, value.vector(i))


def attend(code: Code, job: Job, products: Products, tile: Place, head: Value, pool: Place, scratch: Place) -> None:
    """What some rows of one sequence find for some query heads of one group.

    scratch: room for m (2 D + 16 + whole blocks), m being rows times heads.
    """
    wide, narrow = products.multiply(pool.stored, 4), products.multiply(pool.stored, 1)
    same = products.multiply(F32, 1)
    first, last, blocks, root = tile[0], tile[1], job.blocks + tile[2], tile[3]
    dim, heads, pair = job.dim, job.item_heads, head // (job.heads // job.kv)
    step, out_step = padded((job.heads + job.kv * 2) * dim), padded(job.heads * dim)
    m, length = (last - first) * heads, job.ends[job.row_at + last - 1]
    count = (length + (BLOCK - 1)) // BLOCK
    room = count * BLOCK
    queries, found, totals = scratch, scratch + m * dim, scratch + m * dim * 2
    scores = totals + m * LANES

    with code.loop(0, m) as j:
        line, query = job.qkv + ((first + j // heads) * step + (head + j % heads) * dim), queries + j * dim
        with code.loop(0, dim, LANES) as i:
            query.put(i, line.vector(i) * job.scale)

    with code.loop(0, count) as b:
        keys, to = pool + (pair * job.size + blocks[b] * BLOCK * dim), scores + b * BLOCK
        with code.loop(0, code.least(length - b * BLOCK, BLOCK), PANEL) as p:
            wide(code, queries, dim, m, keys + p * dim, LANES, dim * LANES, to + p, room, dim, 0)

    with code.loop(0, m) as j:
        row, line = first + j // heads, scores + j * room
        end, seen = job.ends[job.row_at + row], job.seen + row * job.seen_step
        with code.loop(root, end) as p, code.when(seen[p - root].equals(0)):
            line.put(p, code.number(NOT_SEEN))
        best = code.variable(code.spread(NOT_SEEN))
        with code.loop(0, length, LANES) as p:
            score = code.select(code.below(end - p), line.vector(p), NOT_SEEN)
            line.put(p, score)
            best.value = larger(score, best.value)
        greatest = code.fold(best.value, larger)
        with code.loop(0, length, LANES) as p:
            score = line.vector(p)
            line.put(p, code.select(score.equals(NOT_SEEN), 0.0, exponential(code, score - greatest)))
    same(code, scores, room, m, job.ones, 0, 0, totals, LANES, length, 0)

    whole = dim // PANEL * PANEL
    with code.loop(0, count) as b:
        values, depth = pool + ((job.kv + pair) * job.size + blocks[b] * BLOCK * dim), length - b * BLOCK
        shares, depth = scores + b * BLOCK, code.least(depth, BLOCK)
        with code.loop(0, whole, PANEL) as i:
            wide(code, shares, room, m, values + i, dim, LANES, found + i, dim, depth, b)
        with code.loop(whole, dim, LANES) as i:
            narrow(code, shares, room, m, values + i, dim, LANES, found + i, dim, depth, b)

    with code.loop(0, m) as j:
        line, part = found + j * dim, code.number(1.0) / totals[j * LANES]
        to = job.attended + ((first + j // heads) * out_step + (head + j % heads) * dim)
        with code.loop(0, dim, LANES) as i:
            to.put(i, line.vector(i) * part)


def gate_row(code: Code, pair: Place, out: Place) -> None:
    """SiLU of a panel of gates times the one of "up" behind it."""
    for i in range(0, PANEL, LANES):
        gate = pair.vector(i)
        small = exponential(code, 0.0 - code.absolute(gate))
        share = code.select(gate >= 0.0, 1.0, small) / (small + 1.0)
        out.put(i, gate * share * pair.vector(PANEL + i))


# ------------------------------------------------------------------------------------------------------ whole layers
class Layers:
    """The code of layers and of the head, for weights that are stored in one form. Its methods are the phases: they
    make the code of one item.

    Where they find in a job the rows of their step: `rows`, and `row_at`, `tile_at`, `tiles_here`: where those of the
    arrays begin that have numbers for the rows of all steps, and how many tiles there are.
    """

    def __init__(self, stored: Stored, machine: Machine) -> None:
        self.module, self.before = Module(f"layers_{stored.name}", machine.triple), before(stored)
        self.products = Products(self.module, machine.registers)
        self.product = self.products.panel(stored)
        phases = [
            ("row_items", self._begin),
            ("qkv_items", self._qkv),
            ("row_items", self._rotate),
            ("attend_items", self._attend),
            ("hidden_items", self._output),
            ("row_items", self._norm_again),
            ("inner_items", self._gate),
            ("hidden_items", self._down),
        ]
        behind = [("last_items", self._last_norm), ("panel_items", self._logits), ("choose_items", self._choose)]
        add_job(self.module, "layers", fields_of(stored), phases, behind, self._step)
        add_calls(self.module)

    @staticmethod
    def _step(code: Code, job: Job, step: Value) -> None:
        later, one, none = step > 0, code.whole(1), code.whole(0)
        job.step = step
        job.rows = code.select(later, one, job.n)
        job.row_at = code.select(later, job.n + step - 1, none)
        job.tile_at = code.select(later, job.tile_count + step - 1, none)
        job.tiles_here = code.select(later, one, job.tile_count)
        job.skipped = code.select(job.last_alone.differs(0), job.rows - 1, none)  # rows whose logits are not wanted

    @staticmethod
    def _each(code: Code, job: Job, item: Value, rows: Value) -> Any:
        """The loop over an item's rows, for what has to do with single rows."""
        first = item * job.row_chunk
        return code.loop(first, code.least(first + job.row_chunk, rows))

    @staticmethod
    def _panel(code: Code, job: Job, item: Value, panels: Value, rows: Value) -> tuple[Value, Value, Value]:
        """(panel, first row, rows) of an item of a product with so many panels."""
        row = item // panels * job.chunk
        return item % panels, row, code.least(rows - row, job.chunk)

    def _matrices(self, job: Job, turn: Value) -> tuple[Place, Place, Place, Place]:
        """The panels of one layer: queries, keys and values; output; gate and "up"; down."""
        qkv = job.weights + (job.first + turn) * job.weight_step
        output = qkv + padded((job.heads + job.kv * 2) * job.dim) * (job.wide + self.before)
        gate = output + padded(job.hidden) * (job.heads * job.dim + self.before)
        return qkv, output, gate, gate + padded(job.inner) * (job.hidden + self.before) * 2

    def _multiply(
        self,
        code: Code,
        job: Job,
        item: Value,
        thread: Value,
        x: Place,
        depth: Value,
        w: Place,
        y: Place,
        width: Value,
        rows: Value | None = None,
    ) -> None:
        """An item of rows x times w: into y, or added to it where it is the residuals. rows: if not all of the step."""
        x_step, y_step = padded(depth), padded(width)
        panel, row, count = self._panel(code, job, item, y_step // PANEL, rows or job.rows)
        line, scratch = y + (row * y_step + panel * PANEL), job.scratch + thread * job.scratch_step
        add, w = int(y is job.x), w + panel * PANEL * (depth + self.before)
        self.product(code, x + row * x_step, x_step, count, w, line, y_step, depth, add, scratch)

    def _begin(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        step, joined = padded(job.hidden), job.wide.differs(job.hidden)
        norms, tap = job.norms + (job.first + turn) * 2 * step, job.taps[job.first + turn]
        with self._each(code, job, item, job.rows) as row:
            x = job.x + row * step
            with code.when(tap.differs(0)), code.loop(0, step, LANES) as i:
                (code.place(tap, F32) + row * step).put(i, x.vector(i))
            with code.when(~joined):
                norm_row(code, job, x, norms, job.normed + row * step)
            with code.when(joined):
                line = job.normed + row * step * 2
                norm_row(code, job, job.tokens + row * step, norms + step * 2, line)
                norm_row(code, job, x, norms, line + step)
                with code.when(job.normed_residual.differs(0)), code.loop(0, step, LANES) as i:
                    x.put(i, line.vector(step + i))

    def _norm_again(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        step = padded(job.hidden)
        with self._each(code, job, item, job.rows) as row:
            weight = job.norms + ((job.first + turn) * 2 + 1) * step
            norm_row(code, job, job.x + row * step, weight, job.normed + row * step)

    def _qkv(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        w, width = self._matrices(job, turn)[0], (job.heads + job.kv * 2) * job.dim
        self._multiply(code, job, item, thread, job.normed, job.wide, w, job.qkv, width)

    def _rotate(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        step, pool = padded((job.heads + job.kv * 2) * job.dim), job.pool + (job.first + turn) * job.pool_step
        with self._each(code, job, item, job.rows) as row:
            rotate_row(code, job, row, job.qkv + row * step, pool)

    def _attend(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        splits = job.heads // job.item_heads
        number, head = item // splits, item % splits * job.item_heads
        pool, scratch = job.pool + (job.first + turn) * job.pool_step, job.scratch + thread * job.scratch_step
        with code.when(number < job.tiles_here):
            tile = job.tiles + (job.tile_at + number) * 4
            attend(code, job, self.products, tile, head, pool, scratch)

    def _output(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        w, depth = self._matrices(job, turn)[1], job.heads * job.dim
        self._multiply(code, job, item, thread, job.attended, depth, w, job.x, job.hidden)

    def _gate(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        step, out_step = padded(job.hidden), padded(job.inner)
        panel, row, rows = self._panel(code, job, item, out_step // PANEL, job.rows)
        w, scratch = self._matrices(job, turn)[2], job.scratch + thread * job.scratch_step
        pairs, x = scratch + WIDENED * PANEL, job.normed + row * step
        for which in range(2):
            mine, y = w + (panel * 2 + which) * PANEL * (job.hidden + self.before), pairs + which * PANEL
            self.product(code, x, step, rows, mine, y, 2 * PANEL, job.hidden, 0, scratch)
        with code.loop(0, rows) as i:
            gate_row(code, pairs + i * (2 * PANEL), job.gated + ((row + i) * out_step + panel * PANEL))

    def _down(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        w = self._matrices(job, turn)[3]
        self._multiply(code, job, item, thread, job.gated, job.inner, w, job.x, job.hidden)

    def _last_norm(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        step = padded(job.hidden)
        with self._each(code, job, item, job.rows - job.skipped) as row:
            norm_row(code, job, job.x + (job.skipped + row) * step, job.norm, job.scored + row * step)

    def _logits(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        width, rows = job.panels * PANEL, job.rows - job.skipped
        self._multiply(code, job, item, thread, job.scored, job.hidden, job.matrix, job.logits, width, rows)

    def _choose(self, code: Code, job: Job, turn: Value, item: Value, thread: Value) -> None:
        size, step = job.vocabulary, job.step
        best = code.variable(code.spread(NOT_SEEN))
        with code.loop(0, size, LANES) as i:
            score = code.select(code.below(size - i), job.logits.vector(i), NOT_SEEN)
            best.value = larger(score, best.value)
        greatest = code.fold(best.value, larger)
        chosen, share = code.variable(code.whole(0)), code.variable(code.number(0.0))  # of the likeliest one
        with code.when(job.laws.equals(0)):
            self._likeliest(code, job, greatest, chosen, share)
        with code.when(job.laws.differs(0)):
            self._drawn(code, job, greatest, chosen, share)
        chance = job.chances[step] * share.value
        job.chances.put(step + 1, chance)
        told = code.variable(chosen.value)
        goes_on = (chance >= job.least[step]) & (step + 1 < job.steps)  # not, if it is no number
        with code.when((chance >= 0.0) & job.map.differs(0)):
            told.value = code.place(job.map, WORD)[chosen.value]
        job.ids.put(step, told.value)
        job.ids.put(job.steps, step + 1)
        with code.when(~goes_on):
            job.stop()
        with code.when(goes_on):
            self._next_row(code, job, told.value)

    @staticmethod
    def _likeliest(code: Code, job: Job, greatest: Value, chosen: Variable, share: Variable) -> None:
        """The lowest id of those with the greatest logit, and its probability."""
        size, lanes = job.vocabulary, job.lanes.vector(0)
        total, lowest = code.variable(code.spread(0.0)), code.variable(code.spread(float(_BEYOND)))
        with code.loop(0, size, LANES) as i:
            score, known = job.logits.vector(i), code.below(size - i)
            part = code.select(known, exponential(code, score - greatest), 0.0)
            total.value = total.value + part
            place = code.select(known & score.equals(greatest), lanes + i.as_float(), float(_BEYOND))
            lowest.value = code.select(place < lowest.value, place, lowest.value)
        chosen.value = code.fold(lowest.value, lambda a, b: code.select(a < b, a, b)).as_whole()
        share.value = code.number(1.0) / code.fold(total.value, lambda a, b: a + b)

    @staticmethod
    def _drawn(code: Code, job: Job, greatest: Value, chosen: Variable, share: Variable) -> None:
        """An id that is drawn, and the probability of the likeliest one. Logits become parts of the likeliest one's.

        What top-k and top-p leave out is found to a power of two. Parts are added as whole numbers, so that an id is
        drawn exactly as often as is written down.
        """
        size, step = job.vocabulary, job.step
        sane = code.variable(code.spread(0.0))
        with code.loop(0, size, LANES) as i:
            score = (job.logits.vector(i) - greatest) * job.coldness
            part = code.select(code.below(size - i), exponential(code, score), 0.0)
            job.logits.put(i, part)
            sane.value = sane.value + part
        all_parts = code.fold(sane.value, lambda a, b: a + b)
        nothing = all_parts - all_parts  # or no number, if one of them is none
        with code.when((job.top_p < 1.0) | (job.top_k > 0)):
            bound = code.variable(code.number(1.0))
            with code.forever() as leave:
                mass, count = code.variable(code.spread(0.0)), code.variable(code.spread(0.0))
                with code.loop(0, size, LANES) as i:
                    part = job.logits.vector(i)
                    mass.value = mass.value + code.select(part >= bound.value, part, 0.0)
                    count.value = count.value + code.select(part >= bound.value, 1.0, 0.0)
                held, found = (code.fold(each.value, lambda a, b: a + b) for each in (mass, count))
                leave((held >= all_parts * job.top_p) & (job.top_p < 1.0))
                leave((found >= job.top_k.as_float()) & (job.top_k > 0))
                leave(bound.value < 1 / _WHOLE)  # a part of nothing, or no number
                bound.value = bound.value * 0.5
            with code.loop(0, size, LANES) as i:
                part = job.logits.vector(i)
                job.logits.put(i, code.select(part >= bound.value, part, 0.0))

        def whole(i: Value) -> Value:
            part = job.logits[i]
            return (code.select(part >= 0.0, part, 0.0) * _WHOLE).as_whole()

        total, seen, place = (code.variable(code.whole(0)) for _ in range(3))
        with code.loop(0, size) as i:
            total.value = total.value + whole(i)
        mark = code.share(total.value, code.place(job.words, WORD)[step])
        with code.forever() as leave:
            seen.value = seen.value + whole(place.value)
            leave((seen.value > mark) | (place.value >= size - 1))
            place.value = place.value + 1
        chosen.value = place.value
        share.value = code.number(_WHOLE) / total.value.as_float() + nothing
        law = code.place(job.laws, F32) + step * job.text_vocabulary
        with code.when(job.map.differs(0)), code.loop(0, size) as i:
            law.put(code.place(job.map, WORD)[i], job.logits[i] * share.value)
        with code.when(job.map.equals(0)), code.loop(0, size) as i:
            law.put(i, job.logits[i] * share.value)

    @staticmethod
    def _next_row(code: Code, job: Job, token: Value) -> None:
        """Make the row of a token that was chosen the first one."""
        step, whole, joined = padded(job.hidden), job.hidden // LANES * LANES, job.wide.differs(job.hidden)
        with code.when(joined), code.loop(0, step, LANES) as i:
            with code.when(job.hands_on.differs(0)):
                job.x.put(i, job.scored.vector(i))
            with code.when(job.hands_on.equals(0)):
                job.x.put(i, (job.x + (job.rows - 1) * step).vector(i))
        for number, form in enumerate(FORMS):
            embedding = code.place(job.table, form) + token * job.hidden
            for is_joined, to in ((joined, job.tokens), (~joined, job.x)):
                with code.when(is_joined & job.form.equals(number)):
                    with code.loop(0, whole, LANES) as i:
                        to.put(i, embedding.vector(i))
                    with code.loop(whole, job.hidden) as i:
                        to.put(i, embedding[i])


_WHOLE = 2.0**40  # a part that is 1 as a whole number
_BEYOND = 2**24  # more ids than there are; whole numbers up to it are exact in fp32

FUNCTIONS = {"layers": JOB_CALL} | CALLS
# As they were imported: files that change while a process runs do not name the code that it makes.
_SOURCES = tuple(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


@cache
def load_layers(stored: Stored) -> dict[str, Any]:
    """The functions for weights that are stored so."""
    return load(f"layers-{stored.name}", lambda machine: Layers(stored, machine).module, FUNCTIONS, _SOURCES)
