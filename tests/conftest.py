"""Fixtures of the demos' tests from end to end."""

import json

import pytest

import demo.display
import demo.session
import models.drafting
import models.llm
from demo.harness import main
from tests.demo_fixtures import write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(target, draft): tiny, random, with a context of 512 and no stop token."""
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def deep_target(tmp_path_factory):
    """A tiny random target of four layers."""
    return write_pair(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)[0]


@pytest.fixture
def run(pair, tmp_path):
    """Run the demo in this process on the tiny pair; returns its exit code and JSON results (None if not written)."""

    def call(*argv, mode=None, models=True, max_new_tokens=8):
        path = tmp_path / "results.json"
        path.unlink(missing_ok=True)
        chosen = ["--target", str(pair[0])] if models else []
        if models and "baseline" not in (mode, *argv):
            chosen += ["--draft", str(pair[1])]
        limit = ["--max-new-tokens", str(max_new_tokens)]
        code = main([*chosen, *limit, "--json", str(path), *argv], mode)
        return code, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    return call


@pytest.fixture
def all_lengths(monkeypatch):
    """Automatic draft lengths that are 0, 1, .. in turn instead of going by times; the controllers that were made."""
    made = []

    class InTurn(models.drafting.AutoDraftLength):
        def __init__(self, *args):
            super().__init__(*args)
            self.generations = self.rounds = 0
            made.append(self)

        def begin(self, *args):
            super().begin(*args)
            self.generations += 1
            return self

        def draft_length(self, source):
            return self.lengths[self.rounds % len(self.lengths)]

        def pays(self, *args):
            return True

        def pays_from(self, *args):
            return 0.0

        def update(self, round):
            super().update(round)
            self.rounds += 1

    monkeypatch.setattr(models.drafting, "AutoDraftLength", InTurn)
    return made


@pytest.fixture
def wrong_third_token(monkeypatch):
    """Speculative text whose third token is not the target's."""
    stream = models.llm.stream

    def wrong_at_third_token(engine, sequence):
        for number, token in enumerate(stream(engine, sequence), 1):
            yield token._replace(id=(token.id + 1) % 256) if sequence.request.drafter and number == 3 else token

    monkeypatch.setattr(models.llm, "stream", wrong_at_third_token)


@pytest.fixture
def terminal(monkeypatch):
    """Output as on a terminal, every change of it."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo.display, "REDRAW_S", 0)


@pytest.fixture
def as_on_a_mock(monkeypatch):
    """Runs on the CPU that are told as if they had been on a mock board."""
    monkeypatch.setattr(demo.session.Session, "timed", False)


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory):
    """(target, draft) of the server's tests."""
    from tests.server_fixtures import write_chat_pair

    return write_chat_pair(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def server(chat_pair):
    """A server with four slots, for tests that leave it as it is."""
    pytest.importorskip("fastapi", reason="the extra server is not installed")
    from tests.server_fixtures import ServerProcess, flags_for

    running = ServerProcess(*flags_for(chat_pair), "--slots", "4", "--queue", "40")
    try:
        yield running.ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def alone(chat_pair):
    """The same models in this process: what texts have to be."""
    from models import LLM
    from tests.server_fixtures import COMPILED

    with LLM.load(str(chat_pair[0]), str(chat_pair[1]), dtype="fp32", compiled=COMPILED) as llm:
        yield llm
