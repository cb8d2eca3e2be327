"""Requests that should not be: each gets the error that it deserves, in OpenAI's form, and the server lives on."""

import json
import socket
import time

import httpx
import pytest

from tests.bad_requests import BAD_REQUESTS, CHAT, HELLO, JSON, TEXT
from tests.record_refusals import comparable, read

pytestmark = pytest.mark.fault

RECORDED = read()


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


def test_bodies_that_have_no_meaning(server, tally):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for name, (path, content) in BAD_REQUESTS.items():
            answer = http.post(path, content=content, headers=JSON)
            assert answer.status_code == 400, (name, answer.status_code, answer.text)
            error = checked(answer, 400)
            assert not comparable(RECORDED) or error["message"] == RECORDED["requests"][name]
            tally["cases tried"] += 1


def test_an_error_names_the_field(server):
    def param(path, content):
        return httpx.post(server.url + path, content=content, headers=JSON).json()["error"]["param"]

    assert param(*BAD_REQUESTS["hot"]) == "temperature"
    assert param(*BAD_REQUESTS["an unknown field"]) == "magic"
    assert param(*BAD_REQUESTS["an unknown role"]) == "messages[0].role"
    assert param(*BAD_REQUESTS["a message with a name"]) == "messages[0].name"
    assert param(*BAD_REQUESTS["a draft too long"]) == "speculation.num_draft_tokens"
    assert param(*BAD_REQUESTS["an unknown drafter"]) == "speculation"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/chat/completions/", 404),
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
