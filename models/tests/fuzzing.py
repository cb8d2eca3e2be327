"""Damaged files for tests: what bytes and JSON values become when they are not what they should be."""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from models.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))  # of each kind of file
HANG = 60  # seconds after which a read is taken for one that never ends: the test run ends with a traceback
MEMORY = 512 * 1024  # kB that reading a small file may add to the largest memory the process has had
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308),
    *("", "\x00", "\ud800", "a\nb", "\u202e", "{{", "{% for", "🙂" * 50, "../x", "x" * 5000, "main\\u0000"),
    *([], {}, [[]], {"": {}}, [None], [1, "a"], {"a": [1, {"b": None}]}),
)

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file's bytes after one to four accidents: a byte changed, a piece lost, doubled, moved, or put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), at + draw(st.sampled_from((1, 2, 8, 64, 1000))))
        accident = draw(st.sampled_from(("flip", "cut", "end", "double", "insert", "swap", "number")))
        if accident == "flip":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif accident == "cut":
            data = data[:at] + data[end:]
        elif accident == "end":
            data = data[:at]
        elif accident == "double":
            data = data[:end] + data[at:]
        elif accident == "insert":
            data = data[:at] + draw(st.binary(max_size=9)) + data[at:]
        elif accident == "swap":
            data = data[end:] + data[at:end] + data[:at]
        else:  # a little-endian number, as lengths and offsets are written
            huge = draw(st.sampled_from((0, 1, 2**16, 2**31 - 1, 2**32, 2**40, 2**63, 2**64 - 1)))
            data = data[:at] + huge.to_bytes(8, "little") + data[at + 8 :]
    return data


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _somewhere(draw, value)
        if holder is None:
            return draw(st.sampled_from(ODD_VALUES))
        accident = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "wrap", "nest")))
        if accident == "remove":
            del holder[key]
        elif accident == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(key)
        elif accident == "wrap":
            holder[key] = [holder[key]]
        elif accident == "nest":
            for _ in range(draw(st.sampled_from((3, 200)))):
                holder[key] = {"a": holder[key]}
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return value


def _somewhere(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    """A place in a JSON value: (what holds it, its key or index); (None, None) for the value itself."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value:
        if holder is not None and draw(st.integers(0, 3)) == 0:
            break
        holder = value
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        value = value[key]
    return holder, key


def json_bytes(value: Any) -> bytes:
    """As a file holds it, with lone surrogates as JSON writes them."""
    return json.dumps(value).encode()


def read_or_refused(tally: Counter, read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it refuses in one line; fails for any other error, a hang, or much memory.

    tally: counts it as a case, and a refusal as a fault that was survived.
    """
    tally["cases tried"] += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip(), repr(str(error))
        tally["faults survived"] += 1
        return None
    finally:
        faulthandler.cancel_dump_traceback_later()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY, f"{grown} kB more for a small file"
