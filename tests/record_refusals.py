"""Runs every bad input that the tests know and writes down what is answered, for the tables of docs/reliability.md.

    python -m tests.record_refusals            # writes docs/results/refusals.json; then scripts/tables.py
    python -m tests.record_refusals --check    # changes nothing; exit code 1 where an answer is another one

`test_refusals.py` and `test_server_hostile.py` compare these answers with what the same inputs get.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.cli.command import Parser, run_command
from models.cli.environment import date, machine, versions, write_json
from tests.bad_inputs import BAD_INPUTS, BadInput
from tests.bad_requests import BAD_REQUESTS, JSON

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results" / "refusals.json"
EXACT = ("python", "torch", "tokenizers", "safetensors")  # parts of the answers are these packages' words
Answers = dict[str, str]


def inputs() -> Answers:
    """What the demo says of every bad input."""
    answers = {}
    for bad in BAD_INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            answers[bad.what] = refusal(bad, Path(folder))
    return answers


def refusal(bad: BadInput, folder: Path) -> str:
    """What the demo says of a bad input. Raises AssertionError unless it is one line, with exit code 2."""
    code, lines = bad.run(folder)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    return lines[0]


def requests(url: str) -> Answers:
    """What a server says of every bad request."""
    import httpx

    answers = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for what, (path, content) in BAD_REQUESTS.items():
            answer = http.post(path, content=content, headers=JSON)
            assert answer.status_code == 400, (what, answer.text)
            answers[what] = answer.json()["error"]["message"]
    return answers


def faults() -> Answers:
    """What is logged of every fault of a drafter, once for a text."""
    from loguru import logger

    from models.drafting import warn_of
    from models.speculative.control.policy import FixedDraftLength
    from models.speculative.drafters.degrading import Degrading
    from models.speculative.engine import Engine
    from models.speculative.sequence import Request
    from models.tests.engine_fixtures import build_pair, random_prompt
    from models.tests.faulty_drafters import FAULTS, drafting

    target, draft = build_pair(seed=0, noise=0.07)
    answers = {}
    for what, (fault, _) in FAULTS.items():
        told: list[str] = []
        sink = logger.add(lambda message, told=told: told.append(message.record["message"]), level="WARNING")
        engine = Engine(target)
        drafter = Degrading(drafting(draft, fault), partial(warn_of, "model"))
        engine.add(
            Request(random_prompt(9, seed=9), max_new_tokens=24, drafter=drafter, controller=FixedDraftLength(3))
        )
        while not engine.idle:
            engine.step()
        logger.remove(sink)
        (answers[what],) = told
    return answers


def _served() -> Iterator[str]:
    from tests.server_fixtures import ServerProcess, flags_for, write_chat_pair

    with tempfile.TemporaryDirectory() as folder:
        running = ServerProcess(*flags_for(write_chat_pair(Path(folder))), "--slots", "4", "--queue", "40")
        try:
            yield running.ready().url
        finally:
            running.close()


def comparable(recorded: dict[str, Any]) -> bool:
    """Whether answers have to be the recorded ones to the letter: made by the same versions."""
    now = versions()
    return all(recorded["versions"].get(name) == now.get(name) for name in EXACT)


def read() -> dict[str, Any]:
    """What was recorded."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def command(argv: Sequence[str] | None = None) -> int:
    """Run all of them: the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where an answer is another one"
    )
    options = parser.parse_args(argv)
    answers = {"inputs": inputs(), "faults": faults()}
    for url in _served():
        answers["requests"] = requests(url)
    if options.check:
        recorded = read()
        changed = [
            what for kind in answers for what in answers[kind] if answers[kind][what] != recorded[kind].get(what)
        ]
        print("\n".join(changed) or "all answers are the recorded ones")
        return int(bool(changed))
    circumstances = {"date": date(), "versions": versions(), "machine": machine("cpu")}
    circumstances["command"] = ["python", "-m", "tests.record_refusals"]
    write_json(str(RECORDED), circumstances | answers)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
