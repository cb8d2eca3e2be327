"""Runs the demo several times in this process, on the board it finds; prints what came of each run as JSON.

    python -m models.board_mock N150 tests/demo_tt_cases.py <cases.json

A case: argv; mode (of the demo, null for simple_text_demo.py); environ, on top of this process's; and interrupt, a
number of tokens after which Ctrl-C is pressed in the last run of a prompt.
"""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import ttnn

import demo.session
import models.llm
from demo.harness import main

calls: list[str] = []  # what was opened and closed
sessions = []  # kept until their calls are looked at: a board that is only forgotten is closed too


class Kept(demo.session.Session):
    def __init__(self, *args):
        sessions.append(self)
        super().__init__(*args)


demo.session.Session = Kept


def note(name):
    real = getattr(ttnn, name)

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(name)
        return result

    setattr(ttnn, name, call)


def pressing_ctrl_c(after):
    real = models.llm.stream

    def generate(engine, sequence):
        for number, token in enumerate(real(engine, sequence), 1):
            yield token
            if sequence.request.drafter and number == after:
                signal.raise_signal(signal.SIGINT)

    return generate


def run(case, folder):
    """code, out, err, results (None if no JSON was written) and calls of one run."""
    calls.clear()
    path = Path(folder, "results.json")
    path.unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    before, stream = dict(os.environ), models.llm.stream
    os.environ.update(case.get("environ", {}))
    if case.get("interrupt"):
        models.llm.stream = pressing_ctrl_c(case["interrupt"])
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*case["argv"], "--json", str(path)], case.get("mode"))
    finally:
        models.llm.stream = stream
        os.environ.clear()
        os.environ.update(before)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    noted = list(calls)
    sessions.clear()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "results": results, "calls": noted}


if __name__ == "__main__":
    for name in ("set_fabric_config", "open_mesh_device", "close_mesh_device"):
        note(name)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: run(case, folder) for name, case in json.load(sys.stdin).items()}))
