"""The page of a demo run (--html): what is in it, and how it looks and works in a real browser."""

import base64
import html
import json
import re
import struct
import zlib

import pytest
from markupsafe import Markup, escape

import demo.session
import models.llm
from demo.harness import main
from demo.html_page import Figure, Heading, Paragraph, Table, simple_page
from demo.html_report import report
from demo.html_texts import texts
from demo.report import build_results
from demo.wording import UNTIMED
from models.speculative.stats import Round
from tests.browser import start_browser
from tests.demo_fixtures import write_pair

HOSTILE = 'a </script><script>document.title = "broken"</script><!-- <b>bold</b> <script> & "quoted" \u2028 </p>'
THREE = ("--num-draft-tokens", "3")  # by default what is drafted may depend on times
ORIGINS = ["prefill", "plain", "drafted", "corrected", "bonus"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def sessions(monkeypatch):
    """The sessions of the runs that follow."""
    kept = []

    class Kept(demo.session.Session):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(demo.session, "Session", Kept)
    return kept


@pytest.fixture
def run(pair, tmp_path):
    """Run the demo on the tiny pair, 12 tokens a prompt; returns its exit code, JSON results and page."""

    def call(*argv, models=pair, mode=None):
        files = [tmp_path / "out.json", tmp_path / "out.html"]
        drafts = mode is None and "none" not in argv
        chosen = ["--target", str(models[0]), *(["--draft", str(models[1])] if drafts else [])]
        output = ["--quiet", "--json", str(files[0]), "--html", str(files[1])]
        code = main([*chosen, "--max-new-tokens", "12", *output, *argv], mode)
        return code, json.loads(files[0].read_text("utf-8")), files[1].read_text("utf-8")

    return call


def data_of(page):
    """What the page hands to its script."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def words_of(page):
    """The page's visible words, without scripts and styles."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def origins_of(data):
    """Where each token of a run's data came from."""
    origins = ["prefill"]
    for emitted, _, own, *proposal in data["rounds"]:
        kept = len(proposal[1]) if proposal else 0
        origins += ["drafted" if i < kept else own for i in range(emitted)]
    return origins


# ------------------------------------------------------------------------------------------------- what is in it
def test_the_page_has_the_numbers_of_the_json(run):
    code, results, page = run("--prompt", "def add", "--prompt", "self", *THREE)
    assert code == 0
    words = words_of(page)
    for path in ("baseline", "speculative"):
        assert f"{results[path]['tok_s_user']:.1f}" in words
        assert f"{results[path]['ttft_ms']:.1f}" in words
        for row in results["prompts"]:
            assert f"{row[path]['tok_s_user']:.1f}" in words
    cards = words_of(page[page.index('<dl class="cards">') : page.index('<div class="columns">')])
    assert f"{results['speedup']:.2f}x" in cards and f"{results['speculative']['acceptance_rate']:.1%}" in cards
    assert "identical" in words and "2 of 2 prompts" in words
    assert results["machine"]["cpu"] in words and results["versions"]["torch"] in words
    assert words.count("--max-new-tokens") == 0 and results["command"][0] in words


@pytest.mark.parametrize("drafter", ["model", "combined", "none"])
def test_tokens_texts_and_origins_are_those_of_the_run(drafter, run, monkeypatch):
    written = []
    stream = models.llm.stream

    def noting(engine, sequence):
        written.append(([], []) if sequence.request.controller else None)
        for token in stream(engine, sequence):
            if written[-1]:
                written[-1][0].append(token.id)
                written[-1][1].append(token.origin)
            yield token

    monkeypatch.setattr(models.llm, "stream", noting)
    length = () if drafter == "none" else THREE
    code, results, page = run("--drafter", drafter, *length, "--prompt", "def add(self", "--prompt", "value value")
    assert code == 0
    data = data_of(page)
    speculative = [each for each in written if each][1:]  # the first is the warm-up
    assert [(each["tokens"], origins_of(each)) for each in data["runs"]] == speculative
    for each, row in zip(data["runs"], results["prompts"], strict=True):
        text = [each["text"].get(str(i), data["vocab"][str(id)]) for i, id in enumerate(each["tokens"])]
        assert "".join(text) == row["speculative"]["text"]
        drafted = sum(len(round[3]) for round in each["rounds"] if len(round) > 3)
        assert drafted == row["speculative"]["drafted"]
        assert all(len(round[1]) == 3 for round in each["rounds"])
        assert {str(id) for round in each["rounds"] if len(round) > 3 for id in round[3]} <= set(data["vocab"])


def test_text_of_a_prompt_is_never_markup(run):
    code, _, page = run("--prompt", HOSTILE)
    assert code == 0
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>" not in page and "<!--" not in page
    assert data_of(page)["runs"][0]["prompt"] == HOSTILE


def test_a_sampled_run_says_that_texts_are_not_compared(run):
    code, results, page = run("--prompt", "def", "--temperature", "1", "--seed", "3", *THREE)
    assert code == 0
    assert "not compared" in words_of(page)
    row, each = results["prompts"][0], data_of(page)["runs"][0]
    assert row["baseline"]["token_ids"] != row["speculative"]["token_ids"]
    assert each["baseline"]["tokens"] == row["baseline"]["token_ids"]
    assert each["tokens"][: each["baseline"]["differs"]] == row["baseline"]["token_ids"][: each["baseline"]["differs"]]
    assert each["tokens"][each["baseline"]["differs"]] != row["baseline"]["token_ids"][each["baseline"]["differs"]]


def test_a_run_of_one_path_leaves_the_other_out(run):
    code, results, page = run("--prompt", "def", mode="baseline")
    assert code == 0
    words = words_of(page)
    assert "Plain decoding" in words and f"{results['baseline']['tok_s_user']:.1f}" in words
    assert "acceptance" not in words and "speed-up" not in words
    assert set(origins_of(data_of(page)["runs"][0])) == {"prefill", "plain"}
    code, _, page = run("--prompt", "def", "--mode", "speculative", *THREE)
    assert code == 0
    assert "acceptance" in words_of(page) and "speed-up" not in words_of(page)


def test_automatic_lengths_are_drawn_with_their_break_even(run):
    code, results, page = run("--prompt", "def", "--drafter", "combined", "--num-draft-tokens", "auto")
    assert code == 0
    assert ("Draft length, round by round" in page) == any(results["controller"]["chosen"])
    told = results["controller"]["break_even"] is not None and results["speculative"]["acceptance_by_position"]
    assert ("drafting one token" in page) == bool(told)


@pytest.mark.parametrize(("count", "label"), [(4, "1: def (warm-up, interrupted)"), (19, "1: def (interrupted)")])
def test_an_interrupted_run_shows_what_there_is(count, label, run, monkeypatch):
    stream = models.llm.stream
    written = 0

    def interrupted(engine, sequence):
        nonlocal written
        for token in stream(engine, sequence):
            yield token
            written += sequence.request.controller is not None
            if written == count:
                raise KeyboardInterrupt

    monkeypatch.setattr(models.llm, "stream", interrupted)
    code, results, page = run("--prompt", "def")
    assert code == 130
    assert "interrupted before a prompt was complete: what had been begun is shown" in words_of(page)
    (each,) = data_of(page)["runs"]
    assert each["label"] == label
    assert each["tokens"] == results["partial"][-1]["token_ids"]
    assert len(origins_of(each)) == len(each["tokens"]) == (count % 12)


def test_a_run_interrupted_before_its_first_token_has_a_page(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.session.Session, "run", interrupted)
    code, _, page = run("--prompt", "def")
    assert code == 130
    assert "nothing was written" in words_of(page) and "<script" not in page


def test_complete_prompts_come_before_the_interrupted_one(run, monkeypatch):
    stream = models.llm.stream
    calls = 0

    def interrupted(engine, sequence):
        nonlocal calls
        calls += 1
        for number, token in enumerate(stream(engine, sequence), 1):
            yield token
            if calls == 6 and number == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(models.llm, "stream", interrupted)
    code, _, page = run("--prompt", "def", "--prompt", "self")
    assert code == 130
    assert [each["label"] for each in data_of(page)["runs"]] == ["1: def", "2: self (interrupted)"]
    assert "1 of 2 prompts are complete" in words_of(page)
    cut = data_of(page)["runs"][1]  # the baseline, which runs second there, was cut short: not another text
    assert len(cut["tokens"]) == 12 and cut["baseline"] is None
    assert "on the baseline path after 5 tokens" in cut["note"]


def test_a_mock_board_has_no_times_on_its_page(run, monkeypatch):
    monkeypatch.setattr(demo.session.Session, "timed", False)
    code, _, page = run("--prompt", "def", "--prompt", "self")
    assert code == 0
    words = words_of(page).replace(UNTIMED["mock"], "")
    assert UNTIMED["mock"] in words_of(page)
    assert not re.search(r"tok/s|tokens/s|\d m?s\b|\d\.\d+x|seconds?\b", words), words
    for each in data_of(page)["runs"]:
        assert each["ttft"] is None and {round[1] for round in each["rounds"]} == {0}


def test_without_a_tokenizer_ids_are_shown(tmp_path, run):
    models = write_pair(tmp_path / "bare")
    for folder in models:
        (folder / "tokenizer.json").unlink()
    code, results, page = run("--random-prompts", "2x5", models=models)
    assert code == 0
    data = data_of(page)
    assert data["vocab"] is None
    assert [each["tokens"] for each in data["runs"]] == [row["speculative"]["token_ids"] for row in results["prompts"]]


def test_characters_of_several_tokens_are_shown_where_they_end(run, sessions):
    run("--prompt", "def")
    (session,) = sessions
    ids = session.tokenizer.encode("é <eos>\u2581")[1:]
    made = session.rows[0].runs["speculative"]
    made.tokens, made.stats.rounds = ids, [Round(0, 0, len(ids) - 1)]
    data = texts(session)
    (each,) = data["runs"]
    assert each["text"] == {0: "", 1: "é", 4: "", 5: "", 6: "\u2581"}
    assert [data["vocab"][id] for id in ids[2:4]] == [" ", "<eos>"] and data["special"] == [ids[3]]


def test_a_page_of_ten_prompts_is_small(run):
    code, _, page = run(*("--prompt", "self.value = value\n" * 20) * 10, "--max-new-tokens", "30", *THREE)
    assert code == 0
    assert len(data_of(page)["runs"]) == 10 and len(page) < 100_000


def test_a_page_that_cannot_be_written_is_refused_before_the_run(run, tmp_path, capsys):
    assert main(["--html", str(tmp_path / "missing" / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write --html ") and "choose another file" in line


# ------------------------------------------------------------------------------------------------- pages of blocks
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><style>rect { fill: #ff0000 }</style>'
    '<rect style="stroke: none" width="20" height="10"/></svg>'
)


def png(width=3, height=2):
    """A PNG of black pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(width)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def simple():
    blocks = [
        Heading("A & B"),
        Paragraph(HOSTILE),
        Table(["name", "<i>"], [[["a<b", "1"], ["c", Markup("<em>2</em>")]]], caption="cap & tion"),
        Figure(png(), 'black "picture"', "as it is"),
        Figure(SVG, "red"),
    ]
    return simple_page("Title <1>", blocks)


def test_blocks_are_text_unless_they_are_markup():
    page = simple()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    words = words_of(page)
    assert all(text in words for text in ("Title <1>", "A & B", "a<b", "<i>", "cap & tion", "as it is"))
    assert escape(HOSTILE) in page and "<em>2</em>" in page
    assert base64.b64encode(png()).decode() in page and "script-src 'none'" in page


@pytest.mark.parametrize("image", ["<b>no picture</b>", b"GIF89a"])
def test_a_figure_is_a_png_or_an_svg(image):
    with pytest.raises(ValueError, match="figure"):
        Figure(image, "")


# --------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser():
    started = start_browser()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def ordinary_window(request):
    if "browser" in request.fixturenames:
        window = request.getfixturevalue("browser")
        window.resize(1100)
        window.media()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The page and JSON of the embedded pair, with every origin in it."""
    folder = tmp_path_factory.mktemp("embedded")
    argv = ["--drafter", "combined", "--num-draft-tokens", "4", "--max-prompts", "3", "--quiet"]
    assert main([*argv, "--html", str(folder / "page.html"), "--json", str(folder / "page.json")]) == 0
    return folder / "page.html", json.loads((folder / "page.json").read_text("utf-8"))


def shown(browser):
    """Of the text: how many tokens are to be seen, and how many of them belong to the chosen round."""
    tokens = (
        "[...document.querySelectorAll('#text .token')].filter((e) => getComputedStyle(e).visibility === 'visible')"
    )
    return browser.run(f"const seen = {tokens}; return [seen.length, seen.filter((e) => e.matches('.now')).length]")


def set_slider(browser, value):
    browser.run(
        "const e = document.getElementById('round'); e.value = arguments[0]; e.dispatchEvent(new Event('input'))", value
    )


def test_the_page_loads_nothing_and_complains_about_nothing(browser, embedded):
    browser.open(embedded[0])
    assert browser.requests() == [embedded[0].resolve().as_uri()]
    assert browser.console() == []
    assert browser.text("h1") == "Speculative decoding beside its baseline"
    assert browser.run("return document.querySelectorAll('figure svg[role=img][aria-label]').length") >= 3


def test_the_page_may_not_load_anything(browser, embedded):
    browser.open(embedded[0])
    blocked = browser.run(
        "return new Promise((tell) => { addEventListener('securitypolicyviolation', (e) => tell(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => 0); })"
    )
    assert blocked == "connect-src"


def test_every_round_shows_what_the_run_did(browser, embedded):
    page, results = embedded
    browser.open(page)
    data = data_of(page.read_text("utf-8"))
    for index, each in enumerate(data["runs"]):
        browser.run(
            "const e = document.getElementById('prompt'); e.value = arguments[0]; e.dispatchEvent(new Event('change'))",
            index,
        )
        classes = browser.run("return [...document.querySelectorAll('#text .token')].map((e) => e.className)")
        assert [next(o for o in ORIGINS if o in name.split()) for name in classes] == origins_of(each)
        written = 1
        for number, (emitted, times, own, *proposal) in enumerate(each["rounds"], 1):
            set_slider(browser, number)
            written += emitted
            assert shown(browser) == [written, emitted]
            proposed, kept = (proposal[0], proposal[1]) if proposal else ([], [])
            status = browser.text("#status")
            assert status.startswith(f"Round {number} of {len(each['rounds'])}: ")
            assert (f"{len(proposed)} drafted" in status) == bool(proposed)
            verdicts = [text.split("\n")[-1] for text in browser.texts("#proposal .step")]
            assert verdicts.count("✓ accepted") == min(len(kept), emitted)
            assert verdicts.count("✗ rejected") == (len(kept) < len(proposed))
            assert len(verdicts) == len(proposed) + (emitted > len(kept))
            shown_ms = re.search(r"verify ([\d.]+) ms", browser.text("#times"))
            # A half in the last digit is rounded up in the page and to even by Python.
            assert not proposed or float(shown_ms[1]) == pytest.approx(times[1], abs=0.0051)
            if emitted > len(kept):
                assert f"({own})" in verdicts[-1]
        assert written == results["prompts"][index]["speculative"]["tokens"]
    assert {origin for each in data["runs"] for origin in origins_of(each)} == set(ORIGINS)


def test_the_slider_and_buttons_work_from_the_keyboard(browser, embedded):
    browser.open(embedded[0])
    last = browser.text("#status")
    browser.run("document.getElementById('text').focus()")
    browser.press("TAB", "TAB", "HOME")  # over the button for the previous round to the slider
    assert browser.run("return document.activeElement.id") == "round"
    assert browser.text("#status").startswith("Prefill") and shown(browser) == [1, 1]
    assert "ms" in browser.text("#times")
    browser.press("RIGHT", "RIGHT")
    assert browser.text("#status").startswith("Round 2 of ")
    assert browser.run("return document.getElementById('round').getAttribute('aria-valuetext')") == browser.text(
        "#status"
    )
    browser.press("TAB", "ENTER")  # the button for the next round
    assert browser.text("#status").startswith("Round 3 of ")
    browser.click("#previous")
    assert browser.text("#status").startswith("Round 2 of ")
    browser.run("document.getElementById('round').focus()")
    browser.press("END")
    assert browser.text("#status") == last
    assert browser.run("return document.getElementById('next').disabled") is True


def test_a_token_leads_to_its_round(browser, embedded):
    browser.open(embedded[0])
    browser.click("#text .token.drafted")
    now = browser.run("return document.querySelector('#text .token.drafted').matches('.now')")
    assert now and shown(browser)[0] < 30


def test_the_chosen_round_is_in_sight_in_a_long_text(browser, run, tmp_path):
    run("--prompt", "a\n" * 100, *THREE)
    browser.open(tmp_path / "out.html")
    browser.run("document.getElementById('text').scrollTop = 0")
    browser.run("document.getElementById('round').focus()")
    browser.press("HOME")
    inside = browser.run(
        "const [box, token] = ['#text', '#text .now'].map((s) => document.querySelector(s).getBoundingClientRect());"
        "return box.top <= token.top && token.bottom <= box.bottom"
    )
    assert inside and browser.run("const e = document.getElementById('text'); return e.scrollHeight > e.clientHeight")


def test_another_prompt_is_chosen_from_the_keyboard(browser, embedded):
    page, results = embedded
    browser.open(page)
    browser.run("document.getElementById('prompt').focus()")
    browser.press("DOWN")
    assert "longest_common_prefix" in browser.text("#text .prompt")
    said = browser.run("getSelection().selectAllChildren(document.getElementById('text')); return '' + getSelection()")
    row = results["prompts"][1]
    assert said.replace("\xa0", " ").rstrip() == (row["prompt"] + row["speculative"]["text"]).rstrip()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_in_one_direction_only(width, browser, embedded, run, tmp_path):
    browser.resize(width, 700, phone=True)
    run("--prompt", "x" * 200 + " " + HOSTILE, "--drafter", "combined", "--num-draft-tokens", "auto")
    for page in (embedded[0], tmp_path / "out.html"):
        browser.open(page)
        browser.run("document.querySelectorAll('details').forEach((e) => (e.open = true))")
        assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme, browser, embedded):
    browser.media(scheme=scheme)
    browser.open(embedded[0])
    page = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", page)[0]) > 128) == (scheme == "light")
    browser.run("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    ratios = browser.contrasts()
    assert len(ratios) > 15
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_hostile_text_stays_text_in_the_browser(browser, run, tmp_path):
    code, _, _ = run("--prompt", HOSTILE)
    assert code == 0
    browser.open(tmp_path / "out.html")
    assert browser.console() == []
    assert browser.run("return document.title") == "Speculative decoding beside its baseline"
    prompt = browser.run("return document.querySelector('#text .prompt').textContent")
    assert prompt == HOSTILE.replace("\u2028", "⟨U+2028⟩")


def test_what_is_printed_is_the_whole_text(browser, embedded):
    browser.open(embedded[0])
    set_slider(browser, 0)
    assert shown(browser) == [1, 1]
    browser.media("print")
    assert shown(browser)[0] == 30
    assert browser.run("return getComputedStyle(document.querySelector('.stepper')).display") == "none"


def test_without_scripts_the_numbers_are_there(browser, embedded):
    page, results = embedded
    browser.open(page)  # in the process that loads it again: a new one may not know yet that scripts are off
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.reload()
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
    assert "need this page's own script" in browser.text("noscript")
    assert f"{results['speedup']:.2f}x" in browser.text(".cards")


def test_a_tree_is_drawn_with_what_became_of_each_token(browser, run, sessions, tmp_path):
    run("--prompt", "def")
    (session,) = sessions
    row = session.rows[0]
    a, b, c, d = session.tokenizer.encode("abcd")[1:]
    made = row.runs["speculative"]
    #  a ─ c ─ d (d stays in the draft)      b was the other choice for a's place, its child b was never looked at
    tree = Round(
        *(5, 2, 3, 0.001, 0.002, 0.0001),
        proposed=(b, a, b, c, d),
        parents=(-1, -1, 0, 1, 3),
        kept=(1, 3),
        source="tree",
    )
    made.tokens, made.stats.rounds, made.stats.tokens = [d, a, c, b], [tree], 4
    page = tmp_path / "tree.html"
    page.write_text(report(session, build_results(session, False, 1.0)), encoding="utf-8")
    browser.open(page)
    assert browser.console() == []
    assert browser.text("#status") == "Round 1 of 1: 5 drafted by tree, 2 accepted, 3 tokens written"
    steps = browser.run(
        "return [...document.querySelectorAll('#proposal .step')].map((step) => {"
        "  const above = step.parentElement.parentElement.closest('li')?.querySelector('.chip');"
        "  return [above?.textContent ?? '', ...[...step.children].map((part) => part.textContent)]; })"
    )
    assert steps == [
        ["", "b", "✗ rejected"],
        ["b", "b", "– after a rejected one"],
        ["", "a", "✓ accepted"],
        ["a", "c", "✓ accepted"],
        ["c", "d", "✗ rejected"],
        ["c", "b", "target wrote instead (corrected)"],
    ]


def test_a_draft_that_went_on_after_the_end_of_the_text_is_shown(browser, run, sessions, tmp_path):
    run("--prompt", "def")
    (session,) = sessions
    a, b, c = session.tokenizer.encode("abc")[1:]
    made = session.rows[0].runs["speculative"]
    made.tokens, made.stats.tokens = [c, a, b], 3
    made.stats.rounds = [Round(3, 3, 2, cut=True, proposed=(a, b, c), kept=(0, 1, 2))]
    page = tmp_path / "cut.html"
    page.write_text(report(session, build_results(session, False, 1.0)), encoding="utf-8")
    browser.open(page)
    steps = [text.split("\n") for text in browser.texts("#proposal .step")]
    assert steps == [["a", "✓ accepted"], ["b", "✓ accepted"], ["c", "✓ accepted, not written"]]
    assert "The text ended here" in browser.text("#proposal")


def test_rounds_that_are_one_program_have_one_time(browser, run, sessions, monkeypatch, tmp_path):
    run("--prompt", "def", *THREE)
    monkeypatch.setattr(demo.session.Session, "fused", True)
    page = tmp_path / "fused.html"
    page.write_text(report(sessions[0], build_results(sessions[0], False, 1.0)), encoding="utf-8")
    browser.open(page)
    set_slider(browser, 1)
    round = data_of(page.read_text("utf-8"))["runs"][0]["rounds"][0]
    assert browser.text("#times").startswith(f"draft + verify {round[1][0] + round[1][1]:.2f} ms (one program), host ")
    assert "draft and target in one program" in browser.text(".figures")


def test_ids_are_shown_in_the_browser_where_there_is_no_tokenizer(browser, run, tmp_path):
    models = write_pair(tmp_path / "bare")
    for folder in models:
        (folder / "tokenizer.json").unlink()
    _, results, _ = run("--random-prompts", "1x5", models=models)
    browser.open(tmp_path / "out.html")
    assert browser.console() == []
    ids = [int(text) for text in browser.texts("#text .token")]
    assert ids == results["prompts"][0]["speculative"]["token_ids"]


def test_a_simple_page_shows_its_pictures(browser, tmp_path):
    page = tmp_path / "simple.html"
    page.write_text(simple(), encoding="utf-8")
    browser.open(page)
    assert browser.console() == []
    assert browser.run("return [...document.images].map((e) => [e.naturalWidth, e.naturalHeight])") == [
        [3, 2],
        [20, 10],
    ]
    red = browser.run(
        "const c = document.createElement('canvas').getContext('2d'); c.drawImage(document.images[1], 0, 0);"
        "return [...c.getImageData(5, 5, 1, 1).data]"
    )
    assert red == [255, 0, 0, 255]
