"""Requests that should not be: each gets the error that it deserves, in OpenAI's form, and the server lives on."""

import json
import socket
import time

import httpx
import pytest

JSON = {"Content-Type": "application/json"}
DEEP = "[" * 100_000
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def body(path=TEXT, **fields):
    base = {"messages": HELLO, "max_tokens": 1} if path == CHAT else {"prompt": "a", "max_tokens": 1}
    return path, json.dumps(base | fields)


BODIES = {
    "nothing": (TEXT, ""),
    "no JSON": (TEXT, "hello"),
    "half of it": (TEXT, '{"prompt": "a'),
    "null": (TEXT, "null"),
    "a list": (TEXT, "[]"),
    "a number": (TEXT, "7"),
    "a text": (TEXT, '"prompt"'),
    "an empty object": (TEXT, "{}"),
    "not UTF-8": (TEXT, b'{"prompt": "\xff\xfe"}'),
    "a lone surrogate": (TEXT, '{"prompt": "\\ud800"}'),
    "a lone surrogate as a name": (TEXT, '{"prompt": "a", "\\ud800": 1}'),
    "deep lists": (TEXT, DEEP),
    "deep lists in a field": (TEXT, '{"prompt": ' + DEEP + "}"),
    "deep objects": (TEXT, '{"a":' * 100_000),
    "NaN": (TEXT, '{"prompt": "a", "temperature": NaN}'),
    "infinity": (TEXT, '{"prompt": "a", "top_p": Infinity}'),
    "a float beyond all": (TEXT, '{"prompt": "a", "temperature": 1e999}'),
    "an int beyond all": (TEXT, '{"prompt": "a", "seed": ' + "9" * 5000 + "}"),
    "a seed too large": body(seed=10**30),
    "a prompt of null": body(prompt=None),
    "a prompt of nothing": body(prompt=[]),
    "a prompt of an object": body(prompt={"a": 1}),
    "a prompt of floats": body(prompt=[1.5, 2.5]),
    "a prompt of negative ids": body(prompt=[-1]),
    "a prompt of ids beyond the vocabulary": body(prompt=[10**6]),
    "a prompt of ids and texts": body(prompt=[1, "a"]),
    "a prompt too long": body(prompt="word " * 5000),
    "too many prompts": body(prompt=["a"] * 1000),
    "too many choices": body(n=1000),
    "too many choices in all": body(prompt=["a"] * 8, n=8),
    "no choices": body(n=0),
    "true choices": body(n=True),
    "choices as a text": body(n="2"),
    "no tokens": body(max_tokens=0),
    "negative tokens": body(max_tokens=-5),
    "half a token": body(max_tokens=1.5),
    "hot": body(temperature=99),
    "cold": body(temperature=-1),
    "nearly greedy": body(temperature=1e-9),
    "temperature as a text": body(temperature="1"),
    "no mass": body(top_p=0),
    "too much mass": body(top_p=1.5),
    "negative top_k": body(top_k=-2),
    "an empty stop string": body(stop=""),
    "an empty stop string among others": body(stop=["a", ""]),
    "a stop string too long": body(stop="a" * 10_000),
    "too many stop strings": body(stop=["a"] * 100),
    "stop as a number": body(stop=5),
    "too many log-probabilities": body(logprobs=100),
    "log-probabilities as a text": body(CHAT, logprobs="yes"),
    "top log-probabilities alone": body(CHAT, top_logprobs=2),
    "a stream as a text": body(stream="yes"),
    "stream options without a stream": body(stream_options={"include_usage": True}),
    "unknown stream options": body(stream=True, stream_options={"a": 1}),
    "an unknown drafter": body(speculation={"drafter": "magic"}),
    "a drafter as a number": body(speculation={"drafter": 1}),
    "speculation unknown": body(speculation="maybe"),
    "a draft too long": body(speculation={"drafter": "model", "num_draft_tokens": 1000}),
    "a negative draft": body(speculation={"drafter": "model", "num_draft_tokens": -1}),
    "echo": body(echo=True),
    "best_of": body(best_of=3),
    "a bias": body(logit_bias={"5": 1}),
    "a penalty": body(CHAT, presence_penalty=0.5),
    "a tool": body(CHAT, tools=[{"type": "function", "function": {"name": "f"}}]),
    "a format": body(CHAT, response_format={"type": "json_object"}),
    "an unknown field": body(CHAT, magic=1),
    "no messages": body(CHAT, messages=[]),
    "messages as a text": body(CHAT, messages="hello"),
    "a message without a role": body(CHAT, messages=[{"content": "a"}]),
    "an unknown role": body(CHAT, messages=[{"role": "king", "content": "a"}]),
    "a message of null": body(CHAT, messages=[{"role": "user", "content": None}]),
    "an image": body(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    "two limits": body(CHAT, max_tokens=2, max_completion_tokens=3),
    "a message with a name": body(CHAT, messages=[{"role": "user", "content": "a", "name": "b"}]),
    "ids beyond the vocabulary": ("/detokenize", '{"tokens": [99999999]}'),
    "ids as texts": ("/detokenize", '{"tokens": ["a"]}'),
    "nothing to tokenize": ("/tokenize", "{}"),
    "too much to tokenize": ("/tokenize", json.dumps({"prompt": "a", "messages": HELLO})),
}


def checked(answer, status):
    """It has this status, and an error as OpenAI has them."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    return error


@pytest.fixture(autouse=True)
def alive(server):
    yield
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    answer = httpx.post(server.url + TEXT, json={"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200


def test_bodies_that_have_no_meaning(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for name, (path, content) in BODIES.items():
            answer = http.post(path, content=content, headers=JSON)
            assert answer.status_code == 400, (name, answer.status_code, answer.text)
            checked(answer, 400)


def test_an_error_names_the_field(server):
    def param(path, content):
        return httpx.post(server.url + path, content=content, headers=JSON).json()["error"]["param"]

    assert param(*BODIES["hot"]) == "temperature"
    assert param(*BODIES["an unknown field"]) == "magic"
    assert param(*BODIES["an unknown role"]) == "messages[0].role"
    assert param(*BODIES["a message with a name"]) == "messages[0].name"
    assert param(*BODIES["a draft too long"]) == "speculation.num_draft_tokens"
    assert param(*BODIES["an unknown drafter"]) == "speculation"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("GET", TEXT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", CHAT, 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/v1/models/\x00".replace("\x00", "%00"), 404),
        ("GET", "/docs", 404),
    ],
)
def test_paths_that_are_not(server, method, path, status):
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert int(answer.split()[1]) == status
    if path != "/docs":
        assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_path_without_v1_says_where_the_api_is(server):
    wrong = httpx.post(server.url + "/chat/completions", json={"messages": HELLO})
    assert "/v1" in checked(wrong, 404)["message"]
    assert "below" not in checked(httpx.post(server.url + "/v1/responses", json={}), 404)["message"]


def test_an_unknown_model(server):
    for path, request in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "a"})):
        answer = httpx.post(server.url + path, json=request | {"model": "gpt-9"})
        assert checked(answer, 404)["code"] == "model_not_found"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_too_long(server, declared):
    content = b'{"prompt": "' + b"a" * 10 * 2**20 + b'"}'
    sent = content if declared else iter([content[i : i + 2**16] for i in range(0, len(content), 2**16)])
    try:
        answer = httpx.post(server.url + TEXT, content=sent, headers=JSON, timeout=60)
    except httpx.TransportError:  # it may hang up while the body is still on its way
        return
    checked(answer, 413)


def test_a_wrong_content_type(server):
    answer = httpx.post(server.url + TEXT, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type" in checked(answer, 400)["message"]


def raw(server, data, wait=5.0):
    """What the server answers to these bytes; b"" where it has hung up without one, None where it waits."""
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.settimeout(wait)
        connection.sendall(data)
        try:
            return connection.recv(65536)
        except TimeoutError:
            return None


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1e9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_request(server, data):
    answer = raw(server, data)
    assert answer is not None and (answer == b"" or answer.split()[1] == b"400")


def test_half_a_request_takes_nothing_from_others(server):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection(address) as head, socket.create_connection(address) as rest:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHos")
        rest.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{")
        answer = httpx.post(server.url + TEXT, json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200


def test_a_reader_that_does_not_read_takes_nothing_from_others(server):
    address = server.url.removeprefix("http://").split(":")
    request = json.dumps({"prompt": "a", "stream": True, "max_tokens": 500, "n": 3, "speculation": {"origins": True}})
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address[0], int(address[1])))
        head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(request)}"
        slow.sendall(f"{head}\r\n\r\n{request}".encode())
        began = time.monotonic()
        answer = httpx.post(server.url + TEXT, json={"prompt": "b", "max_tokens": 5}, timeout=60)
        assert answer.status_code == 200 and time.monotonic() - began < 20
