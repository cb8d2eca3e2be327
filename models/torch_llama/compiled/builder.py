"""Machine code written as Python: a function of this module runs once, and what it does with values becomes
instructions of LLVM.

A kernel's body gets a `Code`, which makes loops and conditions, and one value for each argument. Operators on values
make instructions; Python's own loops and conditions are unrolled and decided while the kernel is made.

    @module.function(Array(F32), Array(BF16), INT)
    def scale(code, x, weights, count):
        with code.loop(0, count, LANES) as i:
            x.put(i, x.vector(i) * weights.vector(i))

Values are whole numbers of 64 bits, which are never negative where they are divided; fp32 numbers; vectors of 16 fp32
numbers; and truths. A number that meets a vector counts for all of its lanes. LLVM makes of vectors whatever the
machine has.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from models.torch_llama.compiled import LANES

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
INT, FLOAT, POINTER = ir.IntType(64), ir.FloatType(), ir.PointerType()
VECTOR, _TRUTHS = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES)


class Stored:
    """How numbers lie in memory: 16 or 32 bits of a float, 8 bits that are parts of a scale, or a whole number of 8 or
    64 bits.

    scaled: numbers are to be multiplied by scales, which lie in front of them (see `products`). pairs: 16 bits of a
    float; of two vectors in turn, so that one load and one operation for each make them fp32.
    """

    def __init__(self, name: str, type: ir.Type, size: int, *, scaled: bool = False, pairs: bool = False) -> None:
        self.name, self.type, self.size, self.scaled, self.pairs = name, type, size, scaled, pairs

    def load(self, code: Code, pointer: Any, lanes: int = 1) -> Value:
        """What lies there: one number, or a vector of fp32 numbers."""
        raw = code.ir.load(pointer, align=self.size, typ=_wide(self.type, lanes))
        if self is F16:
            raw = code.ir.fpext(raw, _wide(FLOAT, lanes))
        elif self is BF16:
            bits = code.ir.zext(raw, _wide(_I32, lanes))
            raw = code.ir.bitcast(code.ir.shl(bits, _same(_I32, 16, lanes)), _wide(FLOAT, lanes))
        elif self is INT8:
            raw = code.ir.sitofp(code.ir.sext(raw, _wide(_I32, lanes)), _wide(FLOAT, lanes))
        elif self is BYTE:
            raw = code.ir.zext(raw, INT)
        return Value(code, raw)

    def load_two(self, code: Code, pointer: Any) -> tuple[Value, Value]:
        """Two vectors that lie there one behind the other, or as pairs."""
        if not self.pairs:
            behind = code.ir.gep(pointer, [INT(LANES)], source_etype=self.type)
            return self.load(code, pointer, LANES), self.load(code, behind, LANES)
        both = code.ir.load(pointer, align=self.size, typ=_wide(_I32, LANES))
        lower = code.ir.shl(both, _same(_I32, 16, LANES))
        upper = code.ir.and_(both, _same(_I32, 0xFFFF0000, LANES))
        return Value(code, code.ir.bitcast(lower, VECTOR)), Value(code, code.ir.bitcast(upper, VECTOR))

    def store(self, value: Value, pointer: Any) -> None:
        """Put a number or a vector there; floats are rounded to the nearest, ties to even."""
        code, raw, lanes = value.code, value.raw, value.lanes
        if self is F16:
            raw = code.ir.fptrunc(raw, _wide(self.type, lanes))
        elif self is BF16:
            bits = code.ir.bitcast(raw, _wide(_I32, lanes))
            odd = code.ir.and_(code.ir.lshr(bits, _same(_I32, 16, lanes)), _same(_I32, 1, lanes))
            rounded = code.ir.add(bits, code.ir.add(odd, _same(_I32, 0x7FFF, lanes)))
            quiet = code.ir.or_(bits, _same(_I32, 0x400000, lanes))
            rounded = code.ir.select(code.ir.fcmp_unordered("uno", raw, raw), quiet, rounded)
            raw = code.ir.trunc(code.ir.lshr(rounded, _same(_I32, 16, lanes)), _wide(_I16, lanes))
        code.ir.store(raw, pointer, align=self.size)


F32, F16, BF16 = Stored("fp32", FLOAT, 4), Stored("fp16", ir.HalfType(), 2), Stored("bf16", _I16, 2)
BF16_PAIRS, INT8 = Stored("bf16_pairs", _I16, 2, pairs=True), Stored("int8", _I8, 1, scaled=True)
BYTE, WORD = Stored("byte", _I8, 1), Stored("word", INT, 8)


def _wide(type: ir.Type, lanes: int) -> ir.Type:
    return type if lanes == 1 else ir.VectorType(type, lanes)


def _same(type: ir.Type, number: float, lanes: int) -> ir.Constant:
    return ir.Constant(_wide(type, lanes), number if lanes == 1 else [number] * lanes)


class Value:
    """A number, a vector or a truth of the code that is being made."""

    def __init__(self, code: Code, raw: Any) -> None:
        self.code, self.raw = code, raw

    @property
    def lanes(self) -> int:
        """Numbers in it."""
        return LANES if isinstance(self.raw.type, ir.VectorType) else 1

    def _with(self, other: Value | float) -> tuple[Any, Any, bool]:
        """(both in the same form, whether they are whole numbers)"""
        code = self.code
        if not isinstance(other, Value):
            scalar = self.raw.type.element if self.lanes > 1 else self.raw.type
            other = Value(code, _same(scalar, other, self.lanes))
        a, b = (code.spread(self) if other.lanes > 1 else self), (code.spread(other) if self.lanes > 1 else other)
        return a.raw, b.raw, a.raw.type == INT

    def _make(self, other: Value | float, whole: str, floating: str, turned: bool = False) -> Value:
        a, b, ints = self._with(other)
        if turned:
            a, b = b, a
        return Value(self.code, getattr(self.code.ir, whole if ints else floating)(a, b))

    def __add__(self, other: Value | float) -> Value:
        return self._make(other, "add", "fadd")

    def __sub__(self, other: Value | float) -> Value:
        return self._make(other, "sub", "fsub")

    def __rsub__(self, other: Value | float) -> Value:
        return self._make(other, "sub", "fsub", turned=True)

    def __mul__(self, other: Value | float) -> Value:
        return self._make(other, "mul", "fmul")

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._make(other, "", "fdiv")

    def __rtruediv__(self, other: Value | float) -> Value:
        return self._make(other, "", "fdiv", turned=True)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._make(other, "udiv", "")

    def __mod__(self, other: Value | int) -> Value:
        return self._make(other, "urem", "")

    def __rshift__(self, other: int) -> Value:
        return self._make(other, "lshr", "")

    def __and__(self, other: Value) -> Value:
        return Value(self.code, self.code.ir.and_(self.raw, other.raw))

    def __or__(self, other: Value) -> Value:
        return Value(self.code, self.code.ir.or_(self.raw, other.raw))

    def _compare(self, sign: str, other: Value | float) -> Value:
        a, b, ints = self._with(other)
        made = self.code.ir.icmp_signed if ints else self.code.ir.fcmp_ordered
        return Value(self.code, made(sign, a, b))

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Value | float) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Value | float) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Value | float) -> Value:
        """Whether they are the same number."""
        return self._compare("==", other)

    def differs(self, other: Value | float) -> Value:
        """Whether they are not the same number."""
        return self._compare("!=", other)

    def __invert__(self) -> Value:
        return Value(self.code, self.code.ir.not_(self.raw))

    def as_float(self) -> Value:
        """A whole number as fp32."""
        return Value(self.code, self.code.ir.sitofp(self.raw, FLOAT))

    def as_whole(self) -> Value:
        """A number that is a whole one, as such."""
        return Value(self.code, self.code.ir.fptosi(self.raw, INT))


class Variable:
    """A value that changes: a register, or several."""

    def __init__(self, code: Code, first: Value) -> None:
        with code.ir.goto_entry_block():
            self._place = code.ir.alloca(first.raw.type)
        self._code, self._type = code, first.raw.type
        self.value = first

    @property
    def value(self) -> Value:
        """What it is now."""
        return Value(self._code, self._code.ir.load(self._place, typ=self._type))

    @value.setter
    def value(self, value: Value) -> None:
        self._code.ir.store(value.raw, self._place)


class Array:
    """A type of argument: where numbers lie that are stored in one form."""

    type = POINTER

    def __init__(self, stored: Stored) -> None:
        self.stored = stored


class Place:
    """Where numbers lie. place + n is n numbers further."""

    type = POINTER

    def __init__(self, code: Code, raw: Any, stored: Stored) -> None:
        self.code, self.raw, self.stored = code, raw, stored

    def __add__(self, offset: Value | int) -> Place:
        by = offset.raw if isinstance(offset, Value) else INT(offset)
        return Place(self.code, self.code.ir.gep(self.raw, [by], source_etype=self.stored.type), self.stored)

    def __getitem__(self, index: Value | int) -> Value:
        """The number there."""
        return self.stored.load(self.code, (self + index).raw)

    def vector(self, index: Value | int) -> Value:
        """The 16 numbers from there on."""
        return self.stored.load(self.code, (self + index).raw, LANES)

    def two(self, index: Value | int) -> tuple[Value, Value]:
        """The 32 numbers from there on, as two vectors."""
        return self.stored.load_two(self.code, (self + index).raw)

    def put(self, index: Value | int, value: Value) -> None:
        """Store a number, or 16 from there on."""
        self.stored.store(value, (self + index).raw)


class Code:
    """The code of one function that is being made."""

    def __init__(self, module: Module, builder: ir.IRBuilder) -> None:
        self.module, self.ir = module, builder

    # -------------------------------------------------------------------------------------------------- values
    def whole(self, number: int) -> Value:
        """A whole number."""
        return Value(self, INT(number))

    def number(self, number: float) -> Value:
        """An fp32 number."""
        return Value(self, FLOAT(number))

    def variable(self, first: Value) -> Variable:
        """A value that changes."""
        return Variable(self, first)

    def spread(self, value: Value | float) -> Value:
        """A vector with this number in all lanes."""
        if not isinstance(value, Value):
            return Value(self, _same(FLOAT, value, LANES))
        if value.lanes > 1:
            return value
        undefined = ir.Constant(VECTOR, ir.Undefined)
        one = self.ir.insert_element(undefined, value.raw, _I32(0))
        return Value(self, self.ir.shuffle_vector(one, undefined, _same(_I32, 0, LANES)))

    def below(self, count: Value) -> Value:
        """Which lanes have a number below `count`: truths."""
        number = self.ir.trunc(self.least(count, self.whole(LANES)).raw, _I32)
        lanes = ir.VectorType(_I32, LANES)
        undefined = ir.Constant(lanes, ir.Undefined)
        spread = self.ir.shuffle_vector(
            self.ir.insert_element(undefined, number, _I32(0)), undefined, _same(_I32, 0, LANES)
        )
        return Value(self, self.ir.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), spread))

    # ------------------------------------------------------------------------------------------------ arithmetic
    def _intrinsic(self, name: str, *values: Value) -> Value:
        type = values[0].raw.type
        name = f"llvm.{name}.{'v16f32' if values[0].lanes > 1 else 'i64' if type == INT else 'f32'}"
        return Value(self, self.ir.call(self.module.declare(name, type, [type] * len(values)), [v.raw for v in values]))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once where the machine can do that."""
        if c.lanes > 1:
            a, b = self.spread(a), self.spread(b)
        return self._intrinsic("fmuladd", a, b, c)

    def root(self, x: Value) -> Value:
        """The square root."""
        return self._intrinsic("sqrt", x)

    def absolute(self, x: Value) -> Value:
        """Without its sign."""
        return self._intrinsic("fabs", x)

    def select(self, truth: Value, a: Value | float, b: Value | float) -> Value:
        """a where it is true, else b."""
        if not isinstance(a, Value):
            a = self.spread(a) if truth.lanes > 1 else self.number(a)
        if not isinstance(b, Value):
            b = self.spread(b) if truth.lanes > 1 else self.number(b)
        return Value(self, self.ir.select(truth.raw, a.raw, b.raw))

    def select_place(self, truth: Value, a: Place, b: Place) -> Place:
        """a where it is true, else b, where numbers are stored in the same form."""
        return Place(self, self.ir.select(truth.raw, a.raw, b.raw), a.stored)

    def least(self, a: Value, b: Value | int) -> Value:
        """The smaller one of two whole numbers."""
        b = b if isinstance(b, Value) else self.whole(b)
        return self.select(a < b, a, b)

    def share(self, whole: Value, word: Value) -> Value:
        """whole * word / 2 ** 64: one of 0, .. whole - 1, all alike where the word is 64 random bits."""
        wide = ir.IntType(128)
        product = self.ir.mul(self.ir.zext(whole.raw, wide), self.ir.zext(word.raw, wide))
        return Value(self, self.ir.trunc(self.ir.lshr(product, wide(64)), INT))

    def float_of(self, word: Value) -> Value:
        """The fp32 number whose bits are the lower ones of a word."""
        return Value(self, self.ir.bitcast(self.ir.trunc(word.raw, _I32), FLOAT))

    def power_of_two(self, shifted: Value) -> Value:
        """2 ** n of vectors, n being a small whole number to which 1.5 * 2 ** 23 has been added."""
        bits = self.ir.bitcast(shifted.raw, ir.VectorType(_I32, LANES))
        bits = self.ir.add(self.ir.shl(bits, _same(_I32, 23, LANES)), _same(_I32, 127 << 23, LANES))
        return Value(self, self.ir.bitcast(bits, VECTOR))

    def fold(self, vector: Value, join: Callable[[Value, Value], Value]) -> Value:
        """All lanes joined to one number, half of them with the other half."""
        undefined = ir.Constant(VECTOR, ir.Undefined)
        width = LANES // 2
        while width:
            order = [(i + width) % LANES for i in range(LANES)]
            other = self.ir.shuffle_vector(vector.raw, undefined, ir.Constant(ir.VectorType(_I32, LANES), order))
            vector = join(vector, Value(self, other))
            width //= 2
        return Value(self, self.ir.extract_element(vector.raw, _I32(0)))

    # ---------------------------------------------------------------------------------------------------- control
    @contextmanager
    def loop(self, first: Value | int, last: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """For first, first + step, .. below last."""
        first, last, step = (v if isinstance(v, Value) else self.whole(v) for v in (first, last, step))
        body, behind = self.ir.append_basic_block("body"), self.ir.append_basic_block("behind")
        before = self.ir.block
        self.ir.cbranch((first < last).raw, body, behind)
        self.ir.position_at_end(body)
        index = self.ir.phi(INT)
        index.add_incoming(first.raw, before)
        yield Value(self, index)
        following = Value(self, index) + step
        index.add_incoming(following.raw, self.ir.block)
        self.ir.cbranch((following < last).raw, body, behind)
        self.ir.position_at_end(behind)

    @contextmanager
    def forever(self) -> Iterator[Callable[[Value], None]]:
        """Again and again, until the function that is yielded leaves the loop because something is true."""
        body, behind = self.ir.append_basic_block("again"), self.ir.append_basic_block("left")
        self.ir.branch(body)
        self.ir.position_at_end(body)

        def leave(truth: Value) -> None:
            on = self.ir.append_basic_block("on")
            self.ir.cbranch(truth.raw, behind, on)
            self.ir.position_at_end(on)

        yield leave
        self.ir.branch(body)
        self.ir.position_at_end(behind)

    @contextmanager
    def when(self, truth: Value) -> Iterator[None]:
        """If something is true."""
        then, behind = self.ir.append_basic_block("then"), self.ir.append_basic_block("behind")
        self.ir.cbranch(truth.raw, then, behind)
        self.ir.position_at_end(then)
        yield
        self.ir.branch(behind)
        self.ir.position_at_end(behind)

    # ---------------------------------------------------------------------------------------- memory of all threads
    def take(self, place: Place) -> Value:
        """A word that other threads change; what they wrote before is seen behind."""
        return Value(self, self.ir.load_atomic(place.raw, "acquire", 8, typ=INT))

    def give(self, place: Place, value: Value) -> None:
        """Change a word for other threads, after all that was written before."""
        self.ir.atomic_rmw("xchg", place.raw, value.raw, "acq_rel")

    def count(self, place: Place) -> None:
        """Add one to a word that other threads change."""
        self.ir.atomic_rmw("add", place.raw, INT(1), "acq_rel")

    def exchange(self, place: Place, old: Value, new: Value) -> Value:
        """Change a word from old to new: whether it was the old one."""
        pair = self.ir.cmpxchg(place.raw, old.raw, new.raw, "acq_rel", "acquire")
        return Value(self, self.ir.extract_value(pair, 1))

    def pause(self) -> None:
        """Let the other threads of this core go first."""
        name, arguments = _PAUSE.get(platform.machine().lower(), ("", []))
        if name:
            function = self.module.declare(name, ir.VoidType(), [a.type for a in arguments])
            self.ir.call(function, arguments)

    def prefetch(self, place: Place, ahead: int, count: int) -> None:
        """Begin to load so many numbers that lie a number of bytes ahead."""
        function = self.module.declare("llvm.prefetch.p0", ir.VoidType(), [POINTER, _I32, _I32, _I32])
        for byte in range(ahead, ahead + count * place.stored.size, 64):
            self.ir.call(function, [(place + byte // place.stored.size).raw, _I32(0), _I32(3), _I32(1)])

    def call(self, address: Value, result: ir.Type, *values: Value | Place) -> Value:
        """Call the function at an address."""
        kind = ir.FunctionType(result, [v.raw.type for v in values])
        pointer = self.ir.inttoptr(address.raw, kind.as_pointer())
        return Value(self, self.ir.call(pointer, [v.raw for v in values]))

    def place_of(self, place: Place, stored: Stored) -> Place:
        """The same place, where numbers are stored in another form."""
        return Place(self, place.raw, stored)

    def place(self, address: Value, stored: Stored) -> Place:
        """Where an address points to."""
        return Place(self, self.ir.inttoptr(address.raw, POINTER), stored)


_PAUSE: dict[str, tuple[str, list[Any]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [_I32(1)]),
    "arm64": ("llvm.aarch64.hint", [_I32(1)]),
}


class Module:
    """Functions that are compiled together."""

    def __init__(self, name: str, triple: str) -> None:
        self._ir = ir.Module(name)
        self._ir.triple = triple
        self.exported: list[str] = []

    def __str__(self) -> str:
        return str(self._ir)

    def declare(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """A function of LLVM."""
        kind = ir.FunctionType(result, arguments)
        return self._ir.globals.get(name) or ir.Function(self._ir, kind, name)

    def function(
        self, *kinds: Any, result: Any = None, export: bool = False, name: str = ""
    ) -> Callable[[Any], Callable[..., Any]]:
        """Make a function of the one that is decorated, which gets a Code and a value for each of these types.

        result: its type, if it returns a value. export: whether Python calls it. name: if not that of the one.
        """

        def make(body: Any) -> Callable[..., Any]:
            kind = ir.FunctionType(result or ir.VoidType(), [k.type if isinstance(k, Array) else k for k in kinds])
            made = ir.Function(self._ir, kind, name or body.__name__)
            if export:
                self.exported.append(made.name)
            else:
                made.linkage = "internal"
            made.attributes.add("nounwind")
            code = Code(self, ir.IRBuilder(made.append_basic_block("entry")))
            # What a function begins with is apart: variables are made in front of it.
            start = code.ir.append_basic_block("start")
            code.ir.branch(start)
            code.ir.position_at_end(start)
            values = [
                Place(code, raw, k.stored) if isinstance(k, Array) else Value(code, raw)
                for k, raw in zip(kinds, made.args, strict=True)
            ]
            returned = body(code, *values)
            if result is None:
                code.ir.ret_void()
            else:
                code.ir.ret(returned.raw)

            def call(code: Code, *values: Value | Place | int) -> Value:
                raw = [INT(v) if isinstance(v, int) else v.raw for v in values]
                return Value(code, code.ir.call(made, raw))

            return call

        return make
