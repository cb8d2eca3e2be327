"""`--audit-every`: texts are replayed against plain decoding when there is time, and what is found is counted."""

import asyncio
import re

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from models import LLM
from models.loading import open_pair
from models.server.app import create_app
from models.server.audits import ATTEMPTS, WAITING, Audits
from models.server.jobs import Choice
from models.server.metrics import Metrics
from models.server.settings import parse_settings
from models.speculative.sampling import SamplingParams
from tests.server_fixtures import ServerProcess, flags_for, metrics_of, until

PROMPT = "def add(self, value):"
FIXED = {"drafter": "model", "num_draft_tokens": 3}
# A server whose greedy acceptance takes the first token of every draft, whatever the target says.
BROKEN = """
import sys
import models.speculative.verify as verify
from models.cli.command import run_command
from models.server.running import command

verify.accept_greedy = lambda drafted, ids: (1, ids[1]) if drafted else (0, ids[0])
sys.exit(run_command(command))
"""


def write(server, **fields):
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "speculation": FIXED, **fields}
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def verdicts(server):
    """Texts by verdict, as far as there are any."""
    found = metrics_of(server.url).items()
    by_name = {re.sub(r'.*verdict="([a-z-]+)".*', r"\1", name): count for name, count in found if "verdict=" in name}
    return {name: int(count) for name, count in by_name.items() if count}


def served(*flags, **options):
    running = ServerProcess(*flags, "--slots", "2", "--queue", "8", **options)
    try:
        yield running.ready()
    finally:
        running.close()


@pytest.fixture(scope="module")
def audited(chat_pair):
    yield from served(*flags_for(chat_pair), "--audit-every", "1")


def test_texts_are_replayed_and_counted(audited):
    before = verdicts(audited)
    assert before == {} and 'verdict="diverged"' in httpx.get(audited.url + "/metrics").text
    stopped = write(audited, stop=["e", "the"], max_tokens=60)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    write(audited, n=2)
    write(audited, prompt=[5] * 480, max_tokens=600)  # to the end of the context
    until(lambda: verdicts(audited) == {"identical": 4}, 60)
    tokens = metrics_of(audited.url)["speculative_audited_tokens_total"]
    assert tokens == metrics_of(audited.url)["vllm:generation_tokens_total"]


def test_sampled_tokens_are_placed_in_the_targets_distribution(audited):
    before = verdicts(audited).get("consistent", 0)
    for seed in range(4):
        write(audited, temperature=1.0, top_p=0.9, seed=seed)
    until(lambda: verdicts(audited).get("consistent", 0) == before + 4, 60)
    found = metrics_of(audited.url)
    buckets = [found[f'speculative_audit_transform_bucket{{le="{i / 10}"}}'] for i in range(1, 10)]
    assert found["speculative_audit_transform_count"] == 96 and buckets == sorted(buckets)
    assert 0 < buckets[0] < 40 and 60 < buckets[8] < 96
    assert "audit of" not in audited.log


def test_requests_go_first_and_replays_begin_again(audited):
    done = sum(verdicts(audited).values())
    for i in range(3):  # each ends the replay of the one before
        write(audited, prompt=f"{PROMPT} {i}", max_tokens=60)
    until(lambda: sum(verdicts(audited).values()) == done + 3, 60)
    assert set(verdicts(audited)) <= {"identical", "consistent", "skipped"}


def test_a_request_finds_all_slots_free(chat_pair):
    """In this process: a replay is under way when a request comes that needs them all."""
    settings = parse_settings([*flags_for(chat_pair), "--slots", "2", "--audit-every", "1"], {})
    seen = []

    async def test():
        app = create_app(settings, lambda: LLM(open_pair(settings.engine)), seen.append)
        thread = app.state.context.engine
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as http,
        ):
            while thread.state == "loading":
                await asyncio.sleep(0.01)
            engine = thread.llm.engine
            step = engine.step

            def watched(*args):
                seen.append((len(engine.running) + len(engine.waiting), len(thread._texts)))
                return step(*args)

            engine.step = watched
            body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "speculation": "off"}
            await http.post("/v1/completions", json=body)
            while engine.idle:  # until the replay has begun
                await asyncio.sleep(0.001)
            await http.post("/v1/completions", json=body | {"n": 2, "max_tokens": 4})

    asyncio.run(test())
    assert seen and all(sequences == texts for sequences, texts in seen)


def test_a_text_that_is_not_the_targets_is_counted_and_told_in_one_line(chat_pair, tmp_path, alone):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    for server in served(*flags_for(chat_pair), "--audit-every", "2", program=(str(program),), env={"PYTHONPATH": "."}):
        plain = write(server, speculation="off")
        wrong = write(server)
        assert plain["choices"][0]["text"] == alone.generate(PROMPT, max_new_tokens=24).text
        assert wrong["choices"][0]["text"] != plain["choices"][0]["text"]
        until(lambda server=server: verdicts(server) == {"diverged": 1}, 60)
        (line,) = [line for line in server.log.splitlines() if "audit of" in line]
        assert wrong["id"] in line and "drafter model" in line and re.search(r"token \d+: \d+ in place of \d+", line)
        assert metrics_of(server.url)["speculative_audited_tokens_total"] == 24


# ---------------------------------------------------------------------------------------------- without a server
@pytest.fixture
def audits(alone):
    return Audits(alone, 1, Metrics("pair"))


def ended(audits, llm, tokens=12):
    """A text has been written, and its end is told."""
    request, _ = llm.request(PROMPT, max_new_tokens=tokens, stop_ids=())
    sequence = llm.engine.add(request)
    while not sequence.finished:
        llm.engine.step()
    choice = Choice(0, request.prompt, SamplingParams(), tokens, (), frozenset())
    audits.ended("cmpl-1", choice, "combined", sequence)


def run(audits):
    while audits.step() is not None:
        pass


def test_a_replay_gives_its_slot_back_at_once_and_is_left_out_in_the_end(audits, alone):
    ended(audits, alone)
    for _ in range(ATTEMPTS - 1):
        assert audits.step() == 0 and not alone.engine.idle
        audits.give_way()
        assert alone.engine.idle
    run(audits)
    assert audits._counts["identical"] == 1
    ended(audits, alone)
    for _ in range(ATTEMPTS):
        audits.step()
        audits.give_way()
    assert audits.step() is None and audits._counts["skipped"] == 1


def test_no_more_texts_wait_than_there_is_room_for(audits, alone):
    for _ in range(WAITING + 3):
        ended(audits, alone, tokens=1)
    run(audits)
    assert (audits._counts["identical"], audits._counts["skipped"]) == (WAITING, 3)


def test_a_replay_that_fails_is_counted_and_the_next_one_goes_on(audits, alone, monkeypatch):
    ended(audits, alone)
    ended(audits, alone)
    advance, calls = alone.engine.advance, []

    def broken(sequence):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return advance(sequence)

    monkeypatch.setattr(alone.engine, "advance", broken)
    run(audits)
    assert (audits._counts["failed"], audits._counts["identical"]) == (1, 1) and alone.engine.idle
