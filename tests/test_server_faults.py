"""What goes wrong inside the server: a drafter, a request's own text, a step of the engine, a model that is damaged."""

import asyncio
import json

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from fastapi import FastAPI

from models import LLM
from models.errors import UserError
from models.server.app import add_page, create_app
from models.server.errors import add_handlers
from models.server.settings import parse_settings
from models.speculative.drafters import Draft
from models.speculative.drafters.registry import DrafterSpec, Source, register, unregister
from tests.server_fixtures import flags_for

pytestmark = pytest.mark.fault

PROMPT = "def add(self, value):"


class Fragile:
    """Right about nothing, and broken at its third draft."""

    def __init__(self):
        self.drafts = 0

    def propose(self, tokens, limit):
        self.drafts += 1
        if self.drafts == 3:
            raise ZeroDivisionError("a drafter of mine")
        return Draft([tokens[-1]] * limit("fragile"), source="fragile")

    def observe(self, accepted):
        pass


@pytest.fixture(scope="module", autouse=True)
def fragile():
    sources = {"fragile": Source("fragile", "a broken thing")}
    register(DrafterSpec("fragile", "fragile", "nobody", lambda parts: Fragile(), sources))
    yield
    unregister("fragile")


@pytest.fixture(scope="module")
def served(chat_pair):
    """A function that runs an async test with a client of a server in this process, and its models."""
    settings = parse_settings([*flags_for(chat_pair), "--slots", "3"], {})
    llm = LLM.load(str(chat_pair[0]), str(chat_pair[1]), dtype="fp32", slots=3)

    def run(test, load=lambda: llm):
        async def inside():
            failed = []
            app = create_app(settings, load, failed.append)
            async with app.router.lifespan_context(app):
                engine = app.state.context.engine
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                    while engine.state == "loading" and not failed:
                        await asyncio.sleep(0.01)
                    return await test(http, engine, failed)

        llm._closed = False  # the server closes what it has loaded
        return asyncio.run(inside())

    return run


def body(**fields):
    return {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, **fields}


async def write(http, **fields):
    return (await http.post("/v1/completions", json=body(**fields))).json()


def test_a_drafter_that_fails_costs_a_warning_and_the_text_goes_on(served, alone):
    from loguru import logger

    warnings = []
    sink = logger.add(lambda message: warnings.append(message.record), level="WARNING")

    async def test(http, engine, failed):
        fragile = {"drafter": "fragile", "num_draft_tokens": 2}
        answers = await asyncio.gather(write(http, speculation=fragile), write(http, speculation="on"), write(http))
        counted = (await http.get("/metrics")).text
        return answers, counted

    try:
        (broken, *others), counted = served(test)
    finally:
        logger.remove(sink)
    expected = alone.generate(PROMPT, max_new_tokens=20).text
    for answer in (broken, *others):
        assert answer["choices"][0]["text"] == expected
    assert broken["speculation"]["state"] == "failed"
    assert broken["speculation"]["failure"] == "ZeroDivisionError: a drafter of mine"
    assert broken["speculation"]["rounds_that_drafted"] == 2
    assert [answer["speculation"]["failure"] for answer in others] == [None, None]
    assert len(warnings) == 1 and warnings[0]["level"].name == "WARNING"
    assert 'speculative_drafter_failures_total{model_name="pair"} 1.0' in counted


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_one_text_ends_that_one_alone(served, alone, monkeypatch, stream):
    from models.speculative.text import TextStream

    push = TextStream.push

    def pushed(self, token):
        if "boom" in self._stop and len(self._certain) > 0:
            raise RuntimeError("inside one text")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", pushed)
    fixed = {"drafter": "model", "num_draft_tokens": 3}

    async def test(http, engine, failed):
        wrong = http.post("/v1/completions", json=body(stop="boom", stream=stream, speculation=fixed))
        answers = await asyncio.gather(write(http, speculation=fixed), wrong, write(http, speculation="off"))
        again = await write(http)
        return [answers[0], answers[2], again], answers[1], engine.open

    others, wrong, left = served(test)
    expected = alone.generate(PROMPT, max_new_tokens=20).text
    assert [answer["choices"][0]["text"] for answer in others] == [expected] * 3
    assert left == 0
    if stream:
        told = json.loads([line for line in wrong.text.splitlines() if line.startswith("data: {")][-1][6:])
        assert wrong.status_code == 200
    else:
        told = wrong.json()
        assert wrong.status_code == 500
    assert told["error"]["code"] == "internal_error" and "inside one text" not in told["error"]["message"]


def test_steps_that_fail_make_it_unhealthy_until_one_does_not(served, monkeypatch):
    async def test(http, engine, failed):
        step, statuses = engine.llm.engine.step, []

        def broken():
            raise MemoryError("no device")

        monkeypatch.setattr(engine.llm.engine, "step", broken)
        for _ in range(3):
            statuses.append((await http.post("/v1/completions", json=body())).status_code)
        await asyncio.sleep(0.05)
        ill = (await http.get("/health")).status_code, engine.open
        monkeypatch.setattr(engine.llm.engine, "step", step)
        answer = await http.post("/v1/completions", json=body())
        await asyncio.sleep(0.05)
        return statuses, ill, answer.status_code, (await http.get("/health")).status_code

    assert served(test) == ([500] * 3, (503, 0), 200, 200)


def test_models_that_cannot_be_loaded_are_told(served):
    def load():
        raise UserError("a damaged file")

    async def test(http, engine, failed):
        return [str(error) for error in failed], (await http.get("/health")).status_code

    assert served(test, load) == (["a damaged file"], 503)


def test_the_document_of_the_api_names_every_endpoint(served):
    async def test(http, engine, failed):
        return (await http.get("/openapi.json")).json()

    document = served(test)
    paths = "/v1/models /v1/chat/completions /v1/completions /tokenize /detokenize /health /metrics".split()
    assert set(paths) < set(document["paths"])
    assert not any(
        "422" in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )


def test_a_page_is_served_where_there_is_one(tmp_path):
    (tmp_path / "index.html").write_text("<p>a page</p>")
    (tmp_path / "app.js").write_text("//")

    async def answers(folder):
        app = FastAPI()
        add_handlers(app)
        app.get("/v1/models")(lambda: {})
        add_page(app, folder)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            return [await http.get(path) for path in ("/", "/app.js", "/v1/models", "/nothing", "/%2e%2e/x")]

    assert [each.status_code for each in asyncio.run(answers(tmp_path))] == [200, 200, 200, 404, 404]
    for sent in asyncio.run(answers(tmp_path))[:2]:
        assert sent.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert sent.headers["X-Content-Type-Options"] == "nosniff"
    missing = asyncio.run(answers(tmp_path / "none"))
    assert [each.status_code for each in missing] == [404, 404, 200, 404, 404]
    assert "no chat page" in missing[0].json()["error"]["message"]


@pytest.mark.parametrize("reads", [True, False])
def test_a_stream_is_kept_open_while_nothing_comes_and_ended_where_nobody_reads(monkeypatch, reads):
    from models.server import responses

    monkeypatch.setattr(responses, "LOOK_S", 0.01)
    monkeypatch.setattr(responses, "PING_S", 0.05)
    monkeypatch.setattr(responses, "WRITE_TIMEOUT_S", 0.1)

    async def test():
        waiting, sent, gone = asyncio.Queue(), [], []

        async def chunks():
            yield b"first"
            yield await waiting.get()

        async def send(message):
            sent.append(message.get("body"))
            if message.get("body") == b"first" and not reads:
                await asyncio.sleep(60)

        stream = responses.EventStream(chunks(), lambda: gone.append(1), lambda: waiting.put_nowait(b": ping"))
        never = asyncio.Event()

        async def receive():
            await never.wait()

        try:
            await asyncio.wait_for(stream({"type": "http"}, receive, send), 10)
        except asyncio.CancelledError:
            sent.append("cancelled")
        return sent, bool(gone)

    expected = [None, b"first", b": ping", b""] if reads else [None, b"first", "cancelled"]
    assert asyncio.run(test()) == (expected, True)
