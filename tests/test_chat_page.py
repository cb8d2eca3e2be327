"""The chat page in a real browser, on a real server with the embedded pair."""

import json
import re
import shutil
from pathlib import Path

import httpx
import pytest

from demo.display import ORIGINS
from models.errors import UserError
from models.options import NAMED
from tests.browser import Browser, start_browser
from tests.chat_picture import command, take

PAGE = Path(__file__).parents[1] / "models" / "server" / "page"
REPORT_STYLE = Path(__file__).parents[1] / "demo" / "html" / "style.css"

KEY = "sesame"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
QUESTION = "class Stack:"
HOSTILE = "<script>alert(1)</script>\n<img src=x onerror=alert(2)>\n" + "<script>alert(1)</script>\n" * 5
FOUR = {"num_draft_tokens": "4"}  # what auto, the default, drafts depends on times


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server that wants a key, whose model is the embedded pair with a chat template."""
    pytest.importorskip("fastapi", reason="the extra server is not installed")
    from tests.server_fixtures import ServerProcess

    target = shutil.copytree(NAMED["tiny"][0], tmp_path_factory.mktemp("chat") / "tiny")
    settings = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    running = ServerProcess("--target", str(target), "--draft", str(NAMED["tiny"][1]), env={"SPECULATIVE_API_KEY": KEY})
    try:
        yield running.ready().url + "/"
    finally:
        running.close()


@pytest.fixture(scope="module")
def window():
    started = start_browser()
    yield started
    started.close()


class Chat:
    """The page in a browser window, as somebody uses it."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, **settings: str) -> "Chat":
        """The page of a new tab, in which settings have been made: by default greedy, and 40 tokens."""
        kept = {"message": "", "compare": False, "turns": [], "settings": {"key": KEY, "max_tokens": "40", **settings}}
        self.open_with(json.dumps(kept))
        self.greeted()
        return self

    def open_with(self, kept: str | None) -> None:
        """The page of a tab that has kept this text."""
        if not self.browser.run("return location.href").startswith(self.address):
            self.browser.open(self.address + "style.css")
        self.browser.run(
            "sessionStorage.clear(); if (arguments[0] !== null) sessionStorage.setItem('chat-1', arguments[0]);"
            "Storage.prototype.setItem = () => 0",  # the page that is left keeps nothing
            kept,
        )
        self.browser.open(self.address)

    def greeted(self) -> None:
        """Wait until the server has said what it offers."""
        self.browser.until("document.querySelectorAll('[name=drafter] option').length > 2")

    def ask(self, question: str) -> None:
        """Type a question and send it; the answer is under way after that."""
        self.browser.type("#message", question)
        self.browser.press("ENTER")

    def answered(self) -> None:
        """Wait until nothing is under way."""
        self.browser.until("!document.querySelector('#send').hidden")

    def tokens(self, answer: str = ".answer") -> list[list[str]]:
        """Origin and text of each token of the answers that match."""
        selector = f"{answer} .token"
        read = "(e) => [e.className.replace(/token ?| ?differs/g, ''), e.textContent]"
        return self.browser.run(f"return [...document.querySelectorAll(arguments[0])].map({read})", selector)

    def text(self, answer: str = ".answer") -> str:
        return "".join(text for _, text in self.tokens(answer))

    def figures(self, answer: str = ".answer") -> list[str]:
        return self.browser.texts(f"{answer} .figures li")

    def value(self, selector: str) -> str:
        return self.browser.run("return document.querySelector(arguments[0]).value", selector)

    def focused(self) -> str:
        return self.browser.run("const e = document.activeElement; return e.id || e.name || e.className")

    def post(self, body: dict) -> dict:
        """What the server answers to somebody else."""
        response = httpx.post(
            self.address + "v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        return response.raise_for_status().json()


@pytest.fixture
def chat(window, address):
    window.resize(1100)
    window.media()
    return Chat(window, address)


def test_an_answer_comes_token_by_token_with_origins_and_numbers(chat):
    chat.open(max_tokens="150", **FOUR)
    chat.ask(QUESTION)
    early = chat.browser.until(
        "!document.querySelector('#stop').hidden && document.querySelector('.turn .token.drafted') &&"
        "[document.querySelectorAll('.turn .token').length, document.querySelector('.figures').innerText]"
    )
    chat.answered()
    assert chat.browser.console() == []
    assert all(address.startswith(chat.address) for address in chat.browser.requests())

    (sent,) = chat.browser.bodies()
    whole = chat.post({name: value for name, value in sent.items() if not name.startswith("stream")})
    tokens = chat.tokens()
    assert "".join(text for _, text in tokens) == whole["choices"][0]["message"]["content"]
    assert len(tokens) == whole["usage"]["completion_tokens"] == 150 > early[0]
    assert re.search(r"tok/s\n\d+% accepted\n\d+ rounds? of [\d.]+ tokens\n\d+ tokens", early[1])
    origins = [origin for origin, _ in tokens]
    assert origins[0] == "prefill" and origins.count("prefill") == 1
    assert {"drafted", "corrected"} < set(origins) <= set(ORIGINS)
    speculation = whole["speculation"]
    assert origins.count("drafted") == whole["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    pace, accepted, rounds, count = chat.figures()[:4]
    assert re.fullmatch(r"\d+\.\d tok/s", pace) and count == "150 tokens"
    assert accepted == f"{int(100 * speculation['acceptance_rate'] + 0.5)}% accepted"
    assert rounds == f"{speculation['rounds']} rounds of {149 / speculation['rounds']:.1f} tokens"


def test_a_stopped_answer_stays_and_the_conversation_goes_on(chat):
    chat.open(max_tokens="1800")
    for stop in (lambda: chat.browser.press("ESCAPE"), lambda: chat.browser.click("#stop")):
        chat.ask(QUESTION)
        chat.browser.until("document.querySelectorAll('.turn:last-child .token').length > 5")
        stop()
        chat.answered()
        assert len(chat.tokens(".turn:last-child .answer")) < 1800 and chat.focused() == "message"
    assert chat.browser.texts(".end") == ["stopped", "stopped"]
    first, _ = chat.browser.texts(".turn .text")
    chat.browser.run("document.forms.settings.elements.max_tokens.value = 8")
    chat.ask("more")
    chat.answered()
    assert len(chat.browser.texts(".turn")) == 3
    messages = chat.browser.bodies()[-1]["messages"]
    assert [each["role"] for each in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[0]["content"] == QUESTION and messages[1]["content"].strip() == first
    assert chat.browser.console() == []


def test_compared_with_plain_the_same_request_runs_twice(chat):
    chat.open(max_tokens="120", **FOUR)
    chat.browser.click("#compare")
    chat.ask(QUESTION)
    seen = chat.browser.until("/(speed-up .*x) so far/.exec(document.querySelector('.verdict')?.textContent)?.[1]")
    chat.answered()
    assert re.fullmatch(r"speed-up \d+\.\d\dx", seen)
    one, other = chat.browser.bodies()
    assert one.pop("speculation")["drafter"] == "auto" and other.pop("speculation")["drafter"] == "off"
    assert one == other
    assert [origin for origin, _ in chat.tokens(".plain")] == ["prefill"] + ["plain"] * 119
    assert chat.text(".speculative") == chat.text(".plain")
    paces = [float(re.match(r"[\d.]+", chat.figures(kind)[0])[0]) for kind in (".speculative", ".plain")]
    speedup, same = re.fullmatch(r"speed-up ([\d.]+)x, (.*)", chat.browser.text(".verdict")).groups()
    assert float(speedup) == pytest.approx(paces[0] / paces[1], abs=0.02) and same == "same text"
    left, right = chat.browser.run(
        "return [...document.querySelectorAll('.answer')].map((e) => e.getBoundingClientRect())"
    )
    assert left["top"] == right["top"] and left["right"] < right["left"]
    assert chat.browser.console() == []


def test_sampled_answers_are_not_compared_word_by_word(chat):
    chat.open(max_tokens="12", temperature="0.9", seed="1")
    chat.browser.click("#compare")
    chat.ask(QUESTION)
    chat.answered()
    assert "same text" not in chat.browser.text(".verdict") and "other text" not in chat.browser.text(".verdict")
    assert "not compared" in chat.browser.text(".verdict") and "speed-up" in chat.browser.text(".verdict")


def test_a_reload_keeps_everything_and_a_new_conversation_nothing(chat):
    chat.open(system="Be brief.", **FOUR)
    chat.browser.click("#compare")
    chat.ask(QUESTION)
    chat.answered()
    chat.browser.type("#message", "not sent yet")
    turns, tokens = chat.browser.texts(".turn"), chat.tokens()
    chat.browser.reload()
    chat.greeted()
    assert chat.browser.texts(".turn") == turns and chat.tokens() == tokens
    assert chat.value("#message") == "not sent yet" and chat.value("[name=system]") == "Be brief."
    assert chat.value("[name=num_draft_tokens]") == "4"
    chat.browser.press("ENTER")
    chat.answered()
    assert len(chat.browser.bodies()[-1]["messages"]) == 4
    chat.browser.click("#new")
    assert chat.browser.texts(".turn") == [] and chat.browser.text("#empty")
    chat.browser.reload()
    assert chat.browser.texts(".turn") == [] and chat.value("[name=system]") == "Be brief."
    assert chat.browser.console() == []


def test_a_reload_in_the_middle_keeps_what_there_is(chat):
    chat.open(max_tokens="1800")
    chat.ask(QUESTION)
    chat.browser.until("document.querySelectorAll('.turn .token').length > 5")
    chat.browser.reload()
    chat.browser.until("document.querySelectorAll('.turn .token').length")
    assert chat.browser.texts(".end") == ["stopped"] and chat.browser.texts(".question") == [QUESTION]
    chat.ask("more")  # the slot is free: it is answered
    chat.browser.until("document.querySelectorAll('.turn:last-child .token').length > 5")
    chat.browser.press("ESCAPE")


def test_what_the_page_did_not_write_itself_is_not_restored(chat):
    for kept in ("{", "3", '{"turns": [{"question": 1, "answers": [{"pieces": 1}]}]}'):
        chat.open_with(kept)
        assert chat.browser.texts(".turn") == [] and chat.browser.text("#empty")


def test_settings_reach_the_server(chat):
    chat.open()
    chat.browser.click("#toggle")
    given = {"system": "Be brief.", "temperature": ".5", "top_p": "0.9", "top_k": "20", "seed": "7", "max_tokens": "5"}
    chat.browser.run("for (const e of document.querySelectorAll('[name=temperature], [name=max_tokens]')) e.value = ''")
    for name, text in {**given, "num_draft_tokens": "3"}.items():
        chat.browser.type(f"[name={name}]", text)
    offered = chat.browser.run("return [...document.querySelector('[name=drafter]').options].map((e) => e.value)")
    assert offered[0] == "auto" and offered[-1] == "off" and "prompt-lookup" in offered
    chat.browser.type("[name=drafter]", "prompt-lookup")
    chat.ask(QUESTION)
    chat.answered()
    (sent,) = chat.browser.bodies()
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert [sent[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")] == [0.5, 0.9, 20, 7, 5]
    assert sent["speculation"]["drafter"] == "prompt-lookup" and sent["speculation"]["num_draft_tokens"] == 3
    assert len(chat.tokens()) == 5


def test_an_empty_setting_is_left_to_the_server_and_a_wrong_one_is_not_sent(chat):
    chat.open(temperature="", max_tokens="3000000000.5")
    chat.ask(QUESTION)
    assert chat.browser.bodies() == [] and chat.value("#message") == QUESTION
    assert chat.focused() == "max_tokens"
    chat.browser.run("document.activeElement.value = 4")
    chat.browser.click("#send")
    chat.answered()
    (sent,) = chat.browser.bodies()
    assert sent["max_tokens"] == 4 and not {"temperature", "top_p", "top_k", "seed"} & set(sent)


def test_text_of_prompt_and_answer_is_never_markup(chat):
    chat.open(system=HOSTILE)
    chat.browser.run("document.getElementById('message').value = arguments[0]", HOSTILE)
    chat.browser.run("document.getElementById('message').focus()")
    chat.browser.press("ENTER")
    chat.answered()
    assert "<script>" in chat.text() and chat.browser.text(".question") == HOSTILE.strip()
    assert chat.browser.run("return document.querySelectorAll('.turn script, .turn img').length") == 0
    chat.browser.reload()
    assert "<script>" in chat.text()
    assert chat.browser.console() == []  # no policy had to stop anything


def test_characters_that_deceive_are_shown_and_others_left_alone(chat):
    chat.open()
    shown = chat.browser.run(
        "const { show } = await import('./text.js');return show(document.createElement('p'), arguments[0]).textContent",
        "a\u202eb\x00\x1b[1m\n\té \U0001f468\u200d\U0001f469",
    )
    assert shown == "a⟨U+202E⟩b⟨U+0000⟩⟨U+001B⟩[1m\n\té \U0001f468\u200d\U0001f469"


def test_a_refused_request_says_why_in_one_line_and_loses_nothing(chat):
    chat.open()
    chat.ask(QUESTION)
    chat.answered()
    before = chat.browser.texts(".turn")
    long = "x = 1\n" * 2000
    chat.browser.run("document.getElementById('message').value = arguments[0]", long)
    chat.browser.press("ENTER")
    chat.answered()
    error = chat.browser.text("#error")
    assert "tokens" in error and "\n" not in error
    assert chat.browser.run("return document.getElementById('error').getAttribute('role')") == "alert"
    assert chat.value("#message") == long and chat.browser.texts(".turn") == before
    chat.browser.run("document.getElementById('message').value = ''")
    chat.ask("more")
    chat.answered()
    assert not chat.browser.texts("#error")[0] and len(chat.browser.bodies()[-1]["messages"]) == 3


def test_a_server_that_does_not_answer_loses_nothing(chat):
    chat.open()
    chat.ask(QUESTION)
    chat.answered()
    before = chat.browser.texts(".turn")
    chat.browser.offline(True)
    try:
        chat.ask("more")
        chat.answered()
        assert "does not answer" in chat.browser.text("#error")
        assert chat.value("#message") == "more" and chat.browser.texts(".turn") == before
        chat.browser.click(".turn:last-child .again")
        chat.answered()
        assert chat.browser.texts(".turn") == before
    finally:
        chat.browser.offline(False)


def test_the_last_question_can_be_asked_again_with_other_settings(chat):
    chat.open(max_tokens="5")
    for question in ("first", "second"):
        chat.ask(question)
        chat.answered()
    assert len([text for text in chat.browser.texts(".again") if text]) == 1
    chat.browser.run("document.forms.settings.elements.max_tokens.value = 9")
    chat.browser.click(".turn:last-child .again")
    chat.answered()
    assert chat.browser.texts(".question") == ["first", "second"]
    assert len(chat.tokens(".answer")) == 5 + 9
    assert [m["content"] for m in chat.browser.bodies()[-1]["messages"]][::2] == ["first", "second"]


def test_without_the_key_the_page_asks_for_it(chat):
    chat.open_with(None)
    chat.browser.until("!document.getElementById('settings').hidden")
    assert chat.focused() == "key" and "key" in chat.browser.text("#error")
    chat.browser.type("[name=key]", KEY)
    chat.browser.press("TAB")
    chat.greeted()


def test_the_keyboard_is_enough(chat):
    chat.open()
    assert chat.focused() == "message"
    chat.browser.type("#message", "one")
    chat.browser.keys_down("SHIFT", "ENTER")
    chat.browser.type("#message", "two")
    assert chat.browser.bodies() == [] and chat.value("#message") == "one\ntwo"
    chat.browser.press("ENTER")
    chat.answered()
    assert chat.browser.texts(".question") == ["one\ntwo"] and chat.focused() == "message"
    chat.browser.run("document.getElementById('new').focus()")
    order = []
    for _ in range(5):
        chat.browser.press("TAB")
        order.append(chat.focused())
    assert order == ["toggle", "conversation", "again", "message", "compare"]
    chat.browser.run("document.getElementById('toggle').focus()")
    chat.browser.press("ENTER")
    assert chat.focused() == "system"
    chat.browser.press("ESCAPE")
    assert chat.focused() == "toggle" and not chat.browser.texts("#settings")[0]
    assert chat.browser.run("return document.getElementById('toggle').getAttribute('aria-expanded')") == "false"


def test_a_screen_reader_hears_the_whole_answer_once(chat):
    chat.open()
    chat.browser.run(
        "window.heard = []; new MutationObserver(() => heard.push(document.getElementById('announcement').textContent))"
        ".observe(document.getElementById('announcement'), {childList: true})"
    )
    chat.ask(QUESTION)
    chat.answered()
    heard = chat.browser.run("return heard")
    assert len(heard) == 2 and heard[1].startswith(chat.text())
    live = "[aria-live]:not([aria-live=off]), [role=status], [role=alert], [role=log]"
    assert chat.browser.run("return document.querySelectorAll(arguments[0]).length", f".turn :is({live})") == 0


def test_a_phone_scrolls_in_one_direction_only(chat):
    chat.browser.resize(320, 640, phone=True)
    chat.open(max_tokens="30")
    chat.browser.click("#compare")
    chat.ask("x" * 120)
    chat.answered()
    chat.browser.run("document.getElementById('toggle').click()")
    inside = "r.top >= 0 && r.left >= 0 && r.right <= innerWidth && r.bottom <= innerHeight"
    boxes = "['#send', '#message', '#toggle'].map((s) => document.querySelector(s).getBoundingClientRect())"
    answers = "return [...document.querySelectorAll('.answer')].map((e) => e.getBoundingClientRect())"
    for width in (320, 390):
        chat.browser.resize(width, 640, phone=True)
        assert chat.browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        upper, lower = chat.browser.run(answers)
        assert upper["bottom"] < lower["top"] and upper["left"] == lower["left"]
        assert chat.browser.run(f"return {boxes}.every((r) => {inside})")


def test_text_stands_out_in_light_and_dark(chat):
    chat.open(**FOUR)
    chat.browser.click("#compare")
    chat.browser.click("#toggle")
    chat.ask(QUESTION)
    chat.answered()
    chat.browser.run("document.getElementById('error').hidden = false; error.textContent = 'something'")
    for scheme in ("light", "dark"):
        chat.browser.media(scheme=scheme)
        page = chat.browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", page)[0]) > 128) == (scheme == "light")
        ratios = chat.browser.contrasts()
        assert len(ratios) > 15
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_colours_can_be_switched_off(chat):
    chat.open(**FOUR)
    chat.ask(QUESTION)
    chat.answered()
    look = "return getComputedStyle(document.querySelector('.turn .token.drafted')).textDecorationLine"
    assert chat.browser.run(look) == "underline"
    chat.browser.click("#toggle")
    chat.browser.click("[name=colours]")
    assert chat.browser.run(look) == "none"


# ------------------------------------------------------------------------------- streams that a server seldom sends
STREAM = """
const { chunks } = await import("./api.js");
const [status, headers, parts] = arguments;
const whole = parts.map((part) => Uint8Array.from(part));
const body = new ReadableStream({ start(to) { whole.forEach((part) => to.enqueue(part)); to.close(); } });
const before = window.fetch;
window.fetch = async () => new Response(body, { status, headers });
const seen = [];
try {
  for await (const chunk of chunks(["v1/chat/completions", {}], {})) seen.push(chunk);
} catch (error) {
  seen.push(error.message);
} finally {
  window.fetch = before;
}
return seen;
"""


def read_stream(chat, *parts: bytes, status: int = 200, headers: dict | None = None) -> list:
    """The chunks, or the message of the error, that the page sees in these parts of a response's body."""
    return chat.browser.run(STREAM, status, headers or {}, [list(part) for part in parts])


def test_events_are_read_wherever_they_are_cut(chat):
    chat.open()
    lines = [
        b": ping",
        b"",
        'data: {"a": "é\U0001f642"}'.encode(),
        b"",
        b'data:{"b":',
        b"data: 1}",
        b"",
        b"data: [DONE]",
    ]
    expected = [{"a": "é\U0001f642"}, {"b": 1}]
    for end in (b"\n", b"\r\n", b"\r"):
        stream = end.join([*lines, b"", b""])
        assert read_stream(chat, stream) == expected
        assert read_stream(chat, *(stream[i : i + 1] for i in range(len(stream)))) == expected


def test_what_goes_wrong_in_a_stream_is_said_in_one_line(chat):
    chat.open()
    event = b'data: {"a": 1}\n\n'
    assert read_stream(chat, event) == [{"a": 1}, "the connection ended before the answer did"]
    assert read_stream(chat, event, b'data: {"error": {"message": "a\\nb"}}\n\n') == [{"a": 1}, "a b"]
    assert read_stream(chat, b"data: <b>\n\n") == ["the server sent no JSON: <b>"]
    busy = b'{"error": {"message": "the queue is full"}}'
    assert read_stream(chat, busy, status=429, headers={"Retry-After": "3"}) == ["the queue is full (try again in 3 s)"]
    full = b'{"error": {"message": "full: try again in 3 s"}}'
    assert read_stream(chat, full, status=429, headers={"Retry-After": "3"}) == ["full: try again in 3 s"]
    assert read_stream(chat, b"<html>", status=502)[0].startswith("the server answered 502")
    (long,) = read_stream(chat, json.dumps({"error": {"message": "x " * 1000}}).encode(), status=400)
    assert len(long) == 300


def test_a_text_that_its_origins_do_not_add_up_to_is_shown_without_them(chat):
    chat.open()
    pieces = chat.browser.run(
        "const { Answer } = await import('./answer.js'); const answer = new Answer('plain', '');"
        "answer.add({choices: [arguments[0]]}, 1); return answer.pieces",
        {"delta": {"content": "abc"}, "origins": [{"text": "a", "origin": "plain"}, {"text": "b", "origin": "plain"}]},
    )
    assert pieces == [["abc", ""], ["", "plain"]]


def test_a_model_without_a_chat_template_goes_on_with_the_text(chat):
    undo = chat.browser.before_pages(
        "const real = fetch; window.fetch = async (...all) => { const got = await real(...all);"
        "if (!String(all[0]).endsWith('/v1/models')) return got; const list = await got.json();"
        "list.data[0].chat = false; return new Response(JSON.stringify(list)); }"
    )
    try:
        chat.open(max_tokens="6")
        chat.ask("def add(a, b):")
        chat.answered()
        first = chat.text()
        chat.ask(" # more")
        chat.answered()
    finally:
        undo()
    assert "without a chat template" in chat.browser.text("#server")
    assert [body["prompt"] for body in chat.browser.bodies()] == ["def add(a, b):", f"def add(a, b):{first} # more"]
    assert len(chat.tokens()) == 12 and chat.browser.console() == []


def test_a_page_that_comes_before_the_models_waits_for_them(chat):
    undo = chat.browser.before_pages(
        "const real = fetch; let early = 1; window.fetch = async (...all) => early-- > 0 ?"
        "new Response(JSON.stringify({error: {message: 'loading'}}), {status: 503}) : real(...all)"
    )
    try:
        chat.open(max_tokens="4")  # waits for what the server offers
        assert chat.browser.text("#server") == "tiny"
    finally:
        undo()


# --------------------------------------------------------------------------------------------------------- the files
def test_colours_are_those_of_the_report():
    def colours(style):
        return [
            dict(re.findall(r"(--[\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
        ]

    page, report = (colours(path.read_text("utf-8"))[:2] for path in (PAGE / "style.css", REPORT_STYLE))
    for ours, theirs in zip(page, report, strict=True):
        shared = ours.keys() & theirs.keys()
        assert {"--drafted", "--corrected", "--bonus", "--plain-mark"} < shared
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_the_words_are_those_of_the_terminal():
    legend = re.sub(r"<[^>]+>", "", (PAGE / "index.html").read_text("utf-8"))
    for origin, (_, words) in ORIGINS.items():
        assert words in legend
        assert f"  {origin}: " in (PAGE / "text.js").read_text("utf-8")


def test_no_file_makes_markup_of_text_or_names_another_place():
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".html", ".css", ".js"}
    for path in files:
        text = path.read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", text
        ), path
        assert not re.search(r"https?://|\bimport\(|url\(", text), path


# ------------------------------------------------------------------------------------------------------- its picture
def test_a_picture_is_taken_of_a_real_answer(chat, tmp_path):
    chat.open(max_tokens="20")
    take(chat.browser, tmp_path / "chat.png", QUESTION)
    assert is_small_png(tmp_path / "chat.png")
    assert "speed-up" in chat.browser.text(".verdict") and len(chat.tokens()) == 40
    chat.browser.run("document.getElementById('message').value = 'x = 1\\n'.repeat(2000)")
    with pytest.raises(UserError, match="no answer: "):
        take(chat.browser, tmp_path / "other.png", "more")
    assert not (tmp_path / "other.png").exists()


def test_the_picture_of_the_docs_is_small():
    docs = PAGE.parents[2] / "docs"
    assert is_small_png(docs / "chat.png") and "](chat.png)" in (docs / "server.md").read_text("utf-8")


@pytest.mark.parametrize("arguments", [[], ["chat.svg"], ["missing/chat.png"]])
def test_a_picture_needs_a_file_to_write(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="picture|write"):
        command(arguments)


def is_small_png(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) < 150_000
