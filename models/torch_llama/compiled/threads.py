"""Threads that share a job, and the calls of compiled code.

A job is rounds of phases, the layers of a model for instance; a phase is a number of items that may be computed in any
order, once all items before it are done. Behind the rounds come phases that are computed once. All of it may be
repeated in steps, until the last one or one that stops the job.

Two counters are enough: the next item that nobody has taken, and how many are done. Whoever is free takes the next one.
The calling thread takes items like all others; workers only help, and a worker that comes late, or that the operating
system has put aside, holds nobody up unless it is within an item.

    ticket = generation << 32 | next item. A thread takes an item by changing this word, which succeeds only while the
    job of that generation is under way: then, and only then, what it has read of the job before is right. Behind its
    end a job's ticket is closed, and the words may be written anew.

A worker is a Python thread without the interpreter's lock. Between jobs it waits in compiled code for a fraction of a
millisecond, then sleeps until the next call wakes it. A call is one call of compiled code: an interrupt is seen behind
it. A forked child begins with threads of its own.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int64
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from models.torch_llama.compiled.builder import FLOAT, INT, WORD, Array, Code, Module, Place, Stored, Value

_TICKET, _DONE, _JOB = 0, 8, 16  # words of a context; the first two have a cache line each
_HEAD = ("function", "threads", "sched_yield", "stopped")
_WORDS = 128
_CLOSED = (1 << 32) - 1
_PATIENCE = 1000  # turns of waiting, some 40 ns each, before the operating system may run somebody else
_IDLE_SECONDS = 0.0002  # that a worker waits for the next job before it sleeps
_MEASURED = 2000  # turns

Fields = Mapping[str, Any]  # of a job: INT, FLOAT, or how what lies there is stored


# --------------------------------------------------------------------------------------------------- compiled code
def _read(code: Code, context: Place, fields: Fields) -> SimpleNamespace:
    """The words of a job."""
    job = SimpleNamespace()
    for i, (name, kind) in enumerate(fields.items(), _JOB + len(_HEAD)):
        if isinstance(kind, Stored):
            setattr(job, name, code.place(context[i], kind))
        elif kind is FLOAT:
            setattr(job, name, code.float_of(context[i]))
        else:
            setattr(job, name, context[i])
    return job


def _wait(code: Code, context: Place, turns: Any) -> None:
    """One turn of waiting."""
    code.pause()
    turns.value = turns.value + 1
    with code.when(turns.value > _PATIENCE):
        code.call(context[_JOB + _HEAD.index("sched_yield")], INT)


Phase = tuple[str, Callable[[Code, SimpleNamespace, Value, Value, Value], None]]


def add_job(
    module: Module,
    name: str,
    fields: Fields,
    phases: Sequence[Phase],
    behind: Sequence[Phase],
    begin: Callable[[Code, SimpleNamespace, Value], None],
) -> None:
    """A function that takes items of a job while there are any.

    Args:
        module: it belongs to.
        name: of the function.
        fields: what a job consists of; two of them are `steps`, and `rounds` of each.
        phases: of a round: the field that says how many items it has, and the code of one of them, given the job, the
            number of the round, of the item, and of the thread. A round has items.
        behind: phases behind the rounds of a step. One that has a single item may call the job's `stop`: its step is
            then the last one.
        begin: given the job and the number of the step before each item: what items of this step are told by the job.
    """

    @module.function(Array(WORD), INT, INT, result=INT, export=True, name=name)
    def work(code: Code, context: Place, thread: Value, generation: Value) -> Value:
        """Take items until none is left for this thread: whether it took any."""
        job, threads = _read(code, context, fields), context[_JOB + _HEAD.index("threads")]
        stopped = context + (_JOB + _HEAD.index("stopped"))
        job.stop = lambda: code.give(stopped, code.whole(1))
        ends, last = [getattr(job, count) for count, _ in phases], [getattr(job, count) for count, _ in behind]
        for line in (ends, last):
            for i in range(1, len(line)):
                line[i] = line[i - 1] + line[i]
        whole = job.rounds * ends[-1] + last[-1]
        turns, helped = code.variable(code.whole(0)), code.variable(code.whole(0))
        with code.forever() as leave:
            ticket = code.take(context + _TICKET)
            number = ticket % (1 << 32)
            leave((ticket >> 32).differs(generation))
            leave(number.equals(_CLOSED))  # what was read of the job may be half of the next one's
            leave(number >= job.steps * whole)
            leave(thread >= threads)
            step = number // whole
            of_step = number - step * whole
            turn = code.least(of_step // ends[-1], job.rounds)
            item, in_round = of_step - turn * ends[-1], turn < job.rounds
            before = number - item
            for line, here in ((ends, in_round), (last, ~in_round)):
                for begun, end in zip(line[:-1], line[1:], strict=True):
                    before = before + code.select(here & (item >= begun) & (item < end), begun, code.whole(0))
            ready = code.take(context + _DONE) >= before
            leave(ready & code.take(stopped).differs(0))
            with code.when(~ready):
                _wait(code, context, turns)
            with code.when(ready), code.when(code.exchange(context + _TICKET, ticket, ticket + 1)):
                begin(code, job, step)
                for line, here, which in ((ends, in_round, phases), (last, ~in_round, behind)):
                    start = code.whole(0)
                    for (_, compute), end in zip(which, line, strict=True):
                        with code.when(here & (item >= start) & (item < end)):
                            compute(code, job, turn, item - start, thread)
                        start = end
                code.count(context + _DONE)
                turns.value = code.whole(0)
                helped.value = code.whole(1)
        return helped.value


def add_calls(module: Module) -> None:
    """The functions `run` of the calling thread and `serve` of the workers, whatever the job."""

    def work(code: Code, context: Place, thread: Value | int, generation: Value) -> Value:
        function = context[_JOB + _HEAD.index("function")]
        thread = thread if isinstance(thread, Value) else code.whole(thread)
        return code.call(function, INT, context, thread, generation)

    @module.function(Array(WORD), INT, export=True)
    def run(code: Code, context: Place, generation: Value) -> None:
        """Compute a job that is written in the context."""
        code.give(context + _DONE, code.whole(0))
        code.give(context + _TICKET, generation * (1 << 32))
        work(code, context, 0, generation)
        turns = code.variable(code.whole(0))
        with code.forever() as leave:  # nobody takes items anymore: until all that were taken are done
            leave(code.take(context + _DONE).equals(code.take(context + _TICKET) % (1 << 32)))
            _wait(code, context, turns)
        code.give(context + _TICKET, generation * (1 << 32) + _CLOSED)

    @module.function(Array(WORD), INT, INT, export=True)
    def serve(code: Code, context: Place, thread: Value, turns: Value) -> None:
        """Help with jobs until there has been none for so many turns."""
        idle = code.variable(code.whole(0))
        with code.forever() as leave:
            leave(idle.value >= turns)
            idle.value = idle.value + 1
            ticket = code.take(context + _TICKET)
            with code.when((ticket % (1 << 32)).differs(_CLOSED)):
                helped = work(code, context, thread, ticket >> 32)
                idle.value = code.select(helped.differs(0), code.whole(0), idle.value)
            code.pause()


# -------------------------------------------------------------------------------------------------------- its calls
CALLS = {"run": (None, c_int64, c_int64), "serve": (None, c_int64, c_int64, c_int64)}

JOB_CALL = (c_int64, c_int64, c_int64, c_int64)  # of a function that `add_job` makes


class Prepared:
    """A job as far as it is the same from run to run.

    Args:
        code: functions that were loaded.
        function: of them, that `add_job` made.
        fields: of it.
        constants: numbers of fields, and addresses where something lies in memory; of others it is 0.
    """

    def __init__(self, code: Mapping[str, Any], function: str, fields: Fields, constants: Mapping[str, float]) -> None:
        self.code = code
        self.places = {name: i for i, name in enumerate(fields, len(_HEAD))}
        self.words = np.zeros(len(_HEAD) + len(fields), np.int64)
        self.words[_HEAD.index("function")] = code[function + "_at"]
        for name, number in constants.items():
            self.words[self.places[name]] = bits(number) if fields[name] is FLOAT else number


class Pool:
    """The threads of this process, and the words and the memory of the job that they compute."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        words = np.zeros(_WORDS + 8, np.int64)
        self._words = words[-words.ctypes.data % 64 // 8 :]
        self._context = self._words.ctypes.data
        self._words[_TICKET] = _CLOSED
        self._generation = 0
        self._doors: list[Any] = []  # a lock for each worker: it sleeps before it
        self._turns = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._yield = ctypes.cast(_sched_yield(), ctypes.c_void_p).value or 0

    def buffer(self, name: str, size: int) -> int:
        """The address of room for so many fp32 numbers. It is the caller's while it holds the lock."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size)
        return self._buffers[name].data_ptr()

    def run(self, job: Prepared, threads: int, changes: Mapping[str, int]) -> None:
        """Compute a job with so many threads, for the caller that holds the lock.

        changes: whole numbers, addresses and `bits`, of this run alone.
        """
        words, places = self._words, job.places
        words[_JOB : _JOB + len(job.words)] = job.words
        words[_JOB + _HEAD.index("threads")], words[_JOB + _HEAD.index("sched_yield")] = threads, self._yield
        for name, number in changes.items():
            words[_JOB + places[name]] = number
        for thread in range(1, threads):
            if thread > len(self._doors):
                self._start(job.code, thread)
            if self._doors[thread - 1].locked():
                self._doors[thread - 1].release()
        self._generation = (self._generation + 1) % (1 << 31)
        job.code["run"](self._context, self._generation)

    def _start(self, code: Mapping[str, Any], thread: int) -> None:
        if not self._turns:
            seconds = []
            for _ in range(3):  # nobody else is there: it waits in vain
                start = time.perf_counter()
                code["serve"](self._context, thread, _MEASURED)
                seconds.append(time.perf_counter() - start)
            self._turns = max(1, int(_MEASURED * _IDLE_SECONDS / min(seconds)))
        door = threading.Lock()
        door.acquire()
        self._doors.append(door)
        arguments = (door, code["serve"], self._context, thread, self._turns)
        threading.Thread(target=_help, args=arguments, name=f"layers-{thread}", daemon=True).start()


def _help(door: Any, serve: Any, context: int, thread: int, turns: int) -> None:
    """What a worker does."""
    while True:
        serve(context, thread, turns)
        door.acquire()


def bits(number: float) -> int:
    """Those of an fp32 number, as a field of a job has them."""
    return int.from_bytes(struct.pack("<f", number), "little")


def _sched_yield() -> Any:
    if sys.platform == "win32":
        return ctypes.windll.kernel32.SwitchToThread
    return ctypes.CDLL(None).sched_yield


_pool = Pool()


def pool() -> Pool:
    """The threads of this process."""
    return _pool


def _new_pool() -> None:
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_pool)
