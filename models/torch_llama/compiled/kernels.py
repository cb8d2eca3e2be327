"""The layers of a Llama as machine code that numba makes of this file, once for each machine.

A forward of a few rows is bound by reading weights, and in small models by the number of operations. Here a layer is
six parallel loops instead of some twenty operations; weights are read once, in the order in which they lie in memory,
whatever the number of rows; activations stay in fp32.

Every product is computed by one kernel, `tile`: some rows times 16 or 64 columns. Each of its sums is added up in the
order of its terms, in a lane of its own. The bits of a row are therefore the same in any company: alone, among drafted
tokens, in a prompt, or along a path of a tree.

Layouts (fp32 unless said otherwise; a row's step is a whole number of panels, what lies behind its values is zeros):
    weights: panels of 64 outputs [in, 64], one behind the other; those of the gate and of the same outputs of "up" in
        turn. bf16 comes as uint16, fp16 as int16, fp32 as float32.
    keys: of 16 positions together [D, 16], in the cache's dtype. values: [position, D].
    rows of one sequence are together, in the order of their positions.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

LANES = 16  # numbers of a vector
PANEL = 64  # outputs of a panel
BLOCK = 128  # positions of a block of the cache
SERIAL = 16384  # so many numbers are normed or rotated by one thread: sooner than others could begin
EXACT = {"contract"}  # a product and a sum may be one operation; nothing is added up in another order

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


# ------------------------------------------------------------------------------------------------------- intrinsics
def _as_floats(builder, kind, pointer):
    """A vector of 16 numbers as they are stored, as fp32."""
    if kind == types.float32:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    halves = ir.VectorType(ir.IntType(16), LANES)
    stored = builder.load(builder.bitcast(pointer, halves.as_pointer()), align=2)
    if kind == types.int16:
        return builder.fpext(builder.bitcast(stored, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)
    return builder.bitcast(builder.shl(builder.zext(stored, _INTS), ir.Constant(_INTS, [16] * LANES)), _VECTOR)


def _tile(rows: int, vectors: int):
    """Makes the kernel for so many rows and vectors of columns."""

    @intrinsic
    def tile(typing, x, x_at, x_step, w, w_at, w_step, v_step, y, y_at, y_step, depth, add):
        signature = types.void(x, x_at, x_step, w, w_at, w_step, v_step, y, y_at, y_step, depth, add)

        def generate(context, builder, signature, args):
            def pointer(index, at):
                data = context.make_array(signature.args[index])(context, builder, args[index]).data
                return builder.gep(data, [at])

            def number(index):
                return context.cast(builder, args[index], signature.args[index], types.int64)

            x_step, w_step, v_step, y_step, depth = (number(index) for index in (2, 5, 6, 9, 10))
            xs = [pointer(0, builder.add(number(1), builder.mul(x_step, _I64(row)))) for row in range(rows)]
            ws = pointer(3, number(4))
            places = [
                [
                    builder.bitcast(
                        pointer(
                            7, builder.add(number(8), builder.add(builder.mul(y_step, _I64(row)), _I64(v * LANES)))
                        ),
                        _VECTOR.as_pointer(),
                    )
                    for v in range(vectors)
                ]
                for row in range(rows)
            ]
            multiply_add = builder.module.globals.get("llvm.fma.v16f32") or ir.Function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fma.v16f32"
            )
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            again = builder.icmp_signed("!=", number(11), _I64(0))
            loaded = builder.append_basic_block("loaded")
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            entry = builder.block
            builder.cbranch(again, loaded, loop)
            with builder.goto_block(loaded):
                before = [[builder.load(place, align=4) for place in line] for line in places]
                builder.branch(loop)

            builder.position_at_end(loop)
            step = builder.phi(_I64)
            sums = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(rows)]
            for block in (entry, loaded):
                step.add_incoming(_I64(0), block)
                for row in range(rows):
                    for v in range(vectors):
                        sums[row][v].add_incoming(zero if block is entry else before[row][v], block)
            weights_at = builder.gep(ws, [builder.mul(step, w_step)])
            weights = [
                _as_floats(builder, signature.args[3].dtype, builder.gep(weights_at, [builder.mul(v_step, _I64(v))]))
                for v in range(vectors)
            ]
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            for row in range(rows):
                value = builder.insert_element(undefined, builder.load(builder.gep(xs[row], [step])), _I32(0))
                value = builder.shuffle_vector(value, undefined, ir.Constant(_INTS, [0] * LANES))
                for v in range(vectors):
                    old = sums[row][v]
                    sums[row][v] = builder.call(multiply_add, [value, weights[v], old])
                    old.add_incoming(sums[row][v], loop)
            following = builder.add(step, _I64(1))
            step.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            for row in range(rows):
                for v in range(vectors):
                    builder.store(sums[row][v], places[row][v], align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


@intrinsic
def _power_of_two(typing, exponent):
    """2 ** exponent of a small int32, as fp32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.add(args[0], _I32(127)), _I32(23)), _F32)

    return types.float32(types.int32), generate


@intrinsic
def _stored(typing, value, like):
    """An fp32 number as an array like that stores it: rounded to even."""

    def generate(context, builder, signature, args):
        kind = signature.return_type
        if kind == types.float32:
            return args[0]
        if kind == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
        broken = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(broken, _I32(0x7FC0), rounded), ir.IntType(16))

    return like.dtype(value, like), generate


_T1, _T2, _T4, _T6 = (_tile(rows, 4) for rows in (1, 2, 4, 6))
_N1, _N2, _N4, _N6 = (_tile(rows, 1) for rows in (1, 2, 4, 6))
_compiled = njit(nogil=True, error_model="numpy", fastmath=EXACT)


# --------------------------------------------------------------------------------------------------- rows of a layer
@_compiled
def _multiply(x, x_at, x_step, rows, w, w_at, w_step, v_step, y, y_at, y_step, depth, add):
    """Rows of x times 64 columns of w: into y, or added to it."""
    row = 0
    while row < rows:
        a, b, left = x_at + row * x_step, y_at + row * y_step, rows - row
        if left >= 6:
            _T6(x, a, x_step, w, w_at, w_step, v_step, y, b, y_step, depth, add)
            row += 6
        elif left >= 4:
            _T4(x, a, x_step, w, w_at, w_step, v_step, y, b, y_step, depth, add)
            row += 4
        elif left >= 2:
            _T2(x, a, x_step, w, w_at, w_step, v_step, y, b, y_step, depth, add)
            row += 2
        else:
            _T1(x, a, x_step, w, w_at, w_step, v_step, y, b, y_step, depth, add)
            row += 1


@_compiled
def _multiply_narrow(x, x_at, x_step, rows, w, w_at, w_step, y, y_at, y_step, depth, add):
    """The same with 16 columns."""
    row = 0
    while row < rows:
        a, b, left = x_at + row * x_step, y_at + row * y_step, rows - row
        if left >= 6:
            _N6(x, a, x_step, w, w_at, w_step, 0, y, b, y_step, depth, add)
            row += 6
        elif left >= 4:
            _N4(x, a, x_step, w, w_at, w_step, 0, y, b, y_step, depth, add)
            row += 4
        elif left >= 2:
            _N2(x, a, x_step, w, w_at, w_step, 0, y, b, y_step, depth, add)
            row += 2
        else:
            _N1(x, a, x_step, w, w_at, w_step, 0, y, b, y_step, depth, add)
            row += 1


_SMALLEST, _HALF, _ONE, _ZERO = np.float32(-87), np.float32(0.5), np.float32(1), np.float32(0)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(7, 1, -1))


@_compiled
def _exp(x):
    """e ** x of an fp32 number x <= 0: to the last place or two; what is below e ** -87 is that."""
    x = max(x, _SMALLEST)
    whole = np.floor(x * _LOG2E + _HALF)
    part = x - whole * _LN2_HIGH - whole * _LN2_LOW
    power = _SERIES[0]
    for n in range(1, 6):
        power = power * part + _SERIES[n]
    return (power * part * part + part + _ONE) * _power_of_two(np.int32(whole))


@_compiled
def _norm_rows(first, last, x, weight, width, step, eps, out):
    """RMS norm of rows first..last-1."""
    for row in range(first, last):
        at = row * step
        total = _sum_of_squares(x, at, width)
        scale = _ONE / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[at + i] = x[at + i] * scale * weight[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _sum_of_squares(x, at, width):
    total = _ZERO
    for i in range(width):
        total += x[at + i] * x[at + i]
    return total


@_compiled
def _rotate_rows(first, last, qkv, step, stands, places, cos, sin, heads, dim, kv, pool):
    """Rotate the queries of rows, and write their rotated keys and their values to one layer's pool.

    kv: KV heads. places: of the pool's positions.
    """
    half = dim // 2
    size = len(pool) // (2 * kv)  # of one head's keys, or values
    for row in range(first, last):
        angle = stands[row] * half
        for head in range(heads + kv):
            at = row * step + head * dim
            for i in range(half):
                a, b = qkv[at + i], qkv[at + half + i]
                qkv[at + i] = a * cos[angle + i] - b * sin[angle + i]
                qkv[at + half + i] = b * cos[angle + i] + a * sin[angle + i]
        place = places[row]
        for head in range(kv):
            at = row * step + (heads + head) * dim
            to = head * size + place // LANES * LANES * dim + place % LANES
            for i in range(dim):
                pool[to + i * LANES] = _stored(qkv[at + i], pool)
            at += kv * dim
            to = (kv + head) * size + place * dim
            for i in range(dim):
                pool[to + i] = _stored(qkv[at + i], pool)


_ONES = np.ones(LANES, np.float32)


@_compiled
def _attend_rows(
    first, last, head, heads, qkv, step, ends, root, seen, blocks, dim, kv, group, pool, scratch, out, out_step
):
    """What rows first..last-1 of one sequence find for some query heads of one group: into `out`.

    ends: how many positions each row sees. root: the position of a tree's row 0, from which on a row sees those that
    `seen` [rows, R] says; else beyond all. blocks: of the pool, of this sequence. scratch: fp32, room for
    m (2 D + 16 + whole blocks), m being rows times heads.
    """
    m, length = (last - first) * heads, ends[last - 1]
    room = (length + BLOCK - 1) // BLOCK * BLOCK
    size, g = len(pool) // (2 * kv), head // group
    queries, found, totals, scores = 0, m * dim, 2 * m * dim, 2 * m * dim + m * LANES
    scale = _ONE / np.sqrt(np.float32(dim))
    for j in range(m):
        at = (first + j // heads) * step + (head + j % heads) * dim
        for i in range(dim):
            scratch[queries + j * dim + i] = qkv[at + i] * scale
    for b in range(room // BLOCK):
        at = g * size + blocks[b] * BLOCK * dim
        for p in range(0, min(BLOCK, length - b * BLOCK), PANEL):
            _multiply(
                scratch,
                queries,
                dim,
                m,
                pool,
                at + p * dim,
                LANES,
                LANES * dim,
                scratch,
                scores + b * BLOCK + p,
                room,
                dim,
                0,
            )
    for j in range(m):
        row = first + j // heads
        at, end = scores + j * room, ends[row]
        for p in range(root, end):
            if not seen[row, p - root]:
                scratch[at + p] = -np.inf
        best = _greatest(scratch, at, at + end)
        for p in range(at, at + end):
            scratch[p] = _exp(scratch[p] - best)
        for p in range(root, end):
            if not seen[row, p - root]:
                scratch[at + p] = _ZERO
        scratch[at + end : at + length] = _ZERO
    _multiply_narrow(scratch, scores, room, m, _ONES, 0, 0, scratch, totals, LANES, length, 0)
    for b in range(room // BLOCK):
        at, depth = (kv + g) * size + blocks[b] * BLOCK * dim, min(BLOCK, length - b * BLOCK)
        whole = dim // PANEL * PANEL
        for i in range(0, whole, PANEL):
            _multiply(
                scratch,
                scores + b * BLOCK,
                room,
                m,
                pool,
                at + i,
                dim,
                LANES,
                scratch,
                found + i,
                dim,
                depth,
                b,
            )
        for i in range(whole, dim, LANES):
            _multiply_narrow(scratch, scores + b * BLOCK, room, m, pool, at + i, dim, scratch, found + i, dim, depth, b)
    for j in range(m):
        at = (first + j // heads) * out_step + (head + j % heads) * dim
        part = _ONE / scratch[totals + j * LANES]
        for i in range(dim):
            out[at + i] = scratch[found + j * dim + i] * part


@njit(nogil=True, error_model="numpy", fastmath={"nnan", "nsz", "reassoc"})
def _greatest(x, first, last):
    best = x[first]
    for i in range(first + 1, last):
        best = max(best, x[i])
    return best


@_compiled
def _gate_rows(first, last, x, step, rows, w, w_at, depth, out, out_step, scratch):
    """SiLU of the gates times "up", for panels first..last-1 of each."""
    for panel in range(first, last):
        for which in range(2):
            at = w_at + (2 * panel + which) * depth * PANEL
            _multiply(x, 0, step, rows, w, at, PANEL, LANES, scratch, which * PANEL, 2 * PANEL, depth, 0)
        for row in range(rows):
            at, to = row * 2 * PANEL, row * out_step + panel * PANEL
            for i in range(PANEL):
                gate = scratch[at + i]
                small = _exp(-abs(gate))
                share = (_ONE if gate >= _ZERO else small) / (_ONE + small)
                out[to + i] = gate * share * scratch[at + PANEL + i]


@_compiled
def _product(first, last, x, step, rows, w, w_at, depth, out, out_step, add):
    """Rows of x times panels first..last-1."""
    for panel in range(first, last):
        at = w_at + panel * depth * PANEL
        _multiply(x, 0, step, rows, w, at, PANEL, LANES, out, panel * PANEL, out_step, depth, add)


# ------------------------------------------------------------------------------------------------------ whole layers
@_compiled
def _padded(width):
    return (width + PANEL - 1) // PANEL * PANEL


_parallel = njit(parallel={"fusion": False}, nogil=True, error_model="numpy", fastmath=EXACT, cache=True)


@_parallel
def run_layers(
    x,
    first,
    stop,
    sizes,
    eps,
    norms,
    weights,
    pool,
    cos,
    sin,
    stands,
    places,
    ends,
    seen,
    tiles,
    blocks,
    item_heads,
    normed,
    qkv,
    attended,
    gated,
    scratch,
    threads,
):
    """Layers first..stop-1 for some rows: their residuals x are changed, their keys and values written.

    Args:
        x: [n, padded H] flat.
        sizes: n, H, query heads, KV heads, D, intermediate.
        eps: of the norms.
        norms: [layers, 2, H].
        weights: [layers, panels of all four matrices].
        pool: [layers, 2 KV P D].
        cos, sin: [S, D / 2] flat.
        stands, places, ends: [n] of each row, its position, its place in the pool, how many positions it may see.
        seen: [n, R] of rows of trees, which of the positions from the tree's first on they see.
        tiles: [m, 4] rows that attention takes together: first, behind the last, where their sequence's blocks begin,
            where its tree begins.
        blocks: of the pool.
        item_heads: query heads of a group that one thread takes together.
        normed, qkv, attended, gated: [n, ..] flat, for results in between. scratch: [threads, ..].
        threads: how many.
    """
    n, hidden, heads, kv, dim, inner = sizes
    group = heads // kv
    x_step, q_width = _padded(hidden), heads * dim
    qkv_step, a_step, inner_step = _padded(q_width + 2 * kv * dim), _padded(q_width), _padded(inner)
    qkv_panels, x_panels, inner_panels = qkv_step // PANEL, x_step // PANEL, inner_step // PANEL
    output_at = qkv_step * hidden
    gate_at = output_at + x_step * q_width
    down_at = gate_at + 2 * inner_step * hidden
    splits = heads // item_heads
    items = len(tiles) * splits
    few = n * x_step <= SERIAL
    for layer in range(first, stop):
        w, cached = weights[layer], pool[layer]
        if few:
            _norm_rows(0, n, x, norms[layer, 0], hidden, x_step, eps, normed)
        else:
            for t in prange(threads):
                _norm_rows(n * t // threads, n * (t + 1) // threads, x, norms[layer, 0], hidden, x_step, eps, normed)
        for t in prange(threads):
            a, b = qkv_panels * t // threads, qkv_panels * (t + 1) // threads
            _product(a, b, normed, x_step, n, w, 0, hidden, qkv, qkv_step, 0)
        if few:
            _rotate_rows(0, n, qkv, qkv_step, stands, places, cos, sin, heads, dim, kv, cached)
        else:
            for t in prange(threads):
                a, b = n * t // threads, n * (t + 1) // threads
                _rotate_rows(a, b, qkv, qkv_step, stands, places, cos, sin, heads, dim, kv, cached)
        for t in prange(threads):
            for item in range(t, items, threads):
                tile, head = tiles[item // splits], item % splits * item_heads
                _attend_rows(
                    tile[0],
                    tile[1],
                    head,
                    item_heads,
                    qkv,
                    qkv_step,
                    ends,
                    tile[3],
                    seen,
                    blocks[tile[2] :],
                    dim,
                    kv,
                    group,
                    cached,
                    scratch[t],
                    attended,
                    a_step,
                )
        for t in prange(threads):
            a, b = x_panels * t // threads, x_panels * (t + 1) // threads
            _product(a, b, attended, a_step, n, w, output_at, q_width, x, x_step, 1)
        if few:
            _norm_rows(0, n, x, norms[layer, 1], hidden, x_step, eps, normed)
        else:
            for t in prange(threads):
                _norm_rows(n * t // threads, n * (t + 1) // threads, x, norms[layer, 1], hidden, x_step, eps, normed)
        for t in prange(threads):
            a, b = inner_panels * t // threads, inner_panels * (t + 1) // threads
            _gate_rows(a, b, normed, x_step, n, w, gate_at, hidden, gated, inner_step, scratch[t])
        for t in prange(threads):
            a, b = x_panels * t // threads, x_panels * (t + 1) // threads
            _product(a, b, gated, inner_step, n, w, down_at, inner, x, x_step, 1)


@_parallel
def run_head(x, n, hidden, eps, norm, weights, scored, logits, threads):
    """The final norm of rows x [n, padded H] into `scored`, and their logits [n, padded V]."""
    step, panels = _padded(hidden), len(weights) // (hidden * PANEL)
    _norm_rows(0, n, x, norm, hidden, step, eps, scored)
    for t in prange(threads):
        a, b = panels * t // threads, panels * (t + 1) // threads
        _product(a, b, scored, step, n, weights, 0, hidden, logits, panels * PANEL, 0)
