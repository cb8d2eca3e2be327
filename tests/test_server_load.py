"""Many requests at once: every text is the one that it is alone, whatever happens to the others."""

import asyncio
import json
import os
import random

import httpx
import pytest

from tests.server_fixtures import metrics_of, until

REQUESTS = 32
WORDS = "def add self value return total + while not in range of the list and number".split()
MANY = int(os.environ.get("SERVER_REQUESTS", "200"))  # 2000 for the long version


def prompts(count, seed):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.choice((2, 8, 30, 60)))) for _ in range(count)]


def client(server):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def complete(http, body):
    """The text of a request, streamed or not."""
    if not body.get("stream"):
        return (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


async def leave(http, body, after):
    """Read some events of a stream and hang up."""
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            after -= line.startswith("data: ")
            if after <= 0:
                return


def test_texts_under_load_are_those_alone_while_half_the_clients_hang_up(server, alone):
    source = random.Random(4)
    bodies, expected = [], []
    for i, prompt in enumerate(prompts(REQUESTS // 2, seed=3)):
        tokens = source.choice((5, 20, 50))
        stop = ["e", "the"][: i % 3]
        spoken = ["auto", "off", {"drafter": "model", "num_draft_tokens": 3}, {"drafter": "prompt-lookup"}][i % 4]
        bodies.append({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stop": stop, "speculation": spoken})
        bodies[-1]["stream"] = i % 2 == 0
        expected.append(alone.generate(prompt, max_new_tokens=tokens, stop=stop).text)

    async def all_at_once():
        async with client(server) as http:
            leavers = [
                leave(http, {"prompt": prompt, "max_tokens": 400, "temperature": 1}, i % 4)
                for i, prompt in enumerate(prompts(REQUESTS // 2, seed=5))
            ]
            wanted = [complete(http, body) for body in bodies]
            return (await asyncio.gather(*wanted, *leavers))[: len(wanted)]

    assert asyncio.run(all_at_once()) == expected
    until(lambda: metrics_of(server.url)["vllm:num_requests_running"] == 0)


def test_a_client_that_hangs_up_frees_its_slot_at_once(server):
    body = {"prompt": "def", "max_tokens": 500, "temperature": 0, "speculation": "off"}
    before = metrics_of(server.url)["vllm:generation_tokens_total"]

    async def four_leave():
        async with client(server) as http:
            await asyncio.gather(*(leave(http, body, 3) for _ in range(4)))
            task = asyncio.create_task(http.post("/v1/completions", json=body))  # not a stream
            await asyncio.sleep(0.3)
            task.cancel()

    asyncio.run(four_leave())
    until(lambda: metrics_of(server.url)["vllm:num_requests_running"] == 0, 1.0)
    assert metrics_of(server.url)["vllm:generation_tokens_total"] - before < 5 * 500 / 2


def test_waiting_requests_are_counted(server):
    body = {"prompt": "def", "max_tokens": 100, "temperature": 0, "speculation": "off"}
    seen = []

    async def eight():
        async with client(server) as http:
            tasks = [asyncio.create_task(complete(http, body)) for _ in range(8)]
            while not all(task.done() for task in tasks):
                text = (await http.get("/metrics")).text
                values = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if "{" in line}
                names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc")
                seen.append([values[name] for name in names])
                await asyncio.sleep(0.02)
            assert len({task.result() for task in tasks}) == 1

    asyncio.run(eight())
    assert max(running for running, *_ in seen) == 4 and max(waiting for _, waiting, _ in seen) >= 3
    assert 0 < max(share for *_, share in seen) <= 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_stays_where_it_is(server):
    async def many(count):
        async with client(server) as http:
            gate = asyncio.Semaphore(8)

            async def one(i):
                spoken = ["off", "auto", {"drafter": "model", "num_draft_tokens": 2}][i % 3]
                body = {"prompt": f"def {i}", "max_tokens": 3, "speculation": spoken, "stream": i % 2 == 0}
                async with gate:
                    await (leave(http, body, 1) if i % 10 == 9 else complete(http, body))

            await asyncio.gather(*map(one, range(count)))

    asyncio.run(many(MANY // 2))
    before = server.memory
    asyncio.run(many(MANY))
    assert server.memory - before < 20 * 2**20
