"""Inputs, outputs and circumstances that nobody plans: one line, or results as always; never a traceback."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import demo.display
import demo.report
import demo.session
import models.loaded
import models.loading
from demo.harness import main
from demo.settings import parse_settings
from models.cli import interrupts
from models.cli.arguments import shown
from models.cli.command import run_command
from models.cli.environment import check_outputs, check_writable, write_json, write_text
from models.cli.prompts import encode_prompts
from models.errors import NotFinite, UserError
from models.loading import open_pair
from tests.demo_fixtures import refused
from tests.test_demo import DEMO, change_config
from tests.test_demo_units import prompts_of, settings

pytestmark = pytest.mark.fault


# ---------------------------------------------------------------------------------------------- outputs over inputs
@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_an_output_that_is_an_input_is_refused_and_the_input_stays(flag, pair, tmp_path, capsys):
    prompts, link = tmp_path / "p.txt", tmp_path / "link"
    prompts.write_text("def f():")
    link.symlink_to(prompts)
    models = ["--target", str(pair[0]), "--draft", str(pair[1])]
    for name in (prompts, link, os.path.relpath(prompts)):
        refused(capsys, [*models, "--prompts", str(prompts), flag, str(name)], flag, "--prompts", "overwrite")
    assert prompts.read_text() == "def f():"
    for role, path in zip(("--target", "--draft"), pair, strict=True):
        config = (path / "config.json").read_bytes()
        refused(capsys, [*models, flag, str(path / "config.json")], flag, role, "overwrite")
        assert (path / "config.json").read_bytes() == config


def test_outputs_that_are_one_file_are_refused(tmp_path):
    name, link = tmp_path / "x", tmp_path / "link"
    link.symlink_to(name)
    for other in (name, link, tmp_path / "y" / ".." / "x"):
        (tmp_path / "y").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="--json and --html both write"):
            check_outputs({"--json": str(name), "--html": str(other)})
    check_outputs({"--json": os.devnull, "--html": os.devnull}, {"--prompts": os.devnull})
    check_outputs({"--json": str(name), "--html": str(tmp_path / "z"), "--png": None})


# ------------------------------------------------------------------------------------------------- odd output paths
def test_a_stream_that_is_a_file_gets_results_behind_what_was_printed(tmp_path):
    script = (
        "from models.cli.environment import check_writable, write_json; print('first'); "
        "[check_writable(n) or write_json(n, {'n': n}) for n in ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1')]; "
        "print('last')"
    )
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True, cwd=demo.session.PROMPTS.parent.parent)
    text = (tmp_path / "out").read_text()
    assert text.startswith("first\n{") and text.endswith("}\nlast\n") and text.count('"n"') == 3


def test_a_pipe_and_a_process_substitution_get_the_results(tmp_path):
    reader, writer = os.pipe()
    check_writable(f"/dev/fd/{writer}")
    write_json(f"/dev/fd/{writer}", {"a": 1})
    os.close(writer)
    with open(reader, "rb") as file:
        assert json.loads(file.read()) == {"a": 1}
    with pytest.raises(UserError, match="cannot write --json /dev/fd/"):
        check_writable(f"/dev/fd/{writer}")


def test_a_stream_that_is_only_read_is_refused(tmp_path):
    (tmp_path / "x").write_text("kept")
    with (tmp_path / "x").open() as file, pytest.raises(UserError, match="open for reading only"):
        check_writable(f"/dev/fd/{file.fileno()}")


def test_names_as_long_as_the_system_takes_are_written_and_longer_ones_refused(tmp_path):
    for name in ("a" * 255, "é" * 127):
        check_writable(str(tmp_path / name))
        write_text(str(tmp_path / name), "x", "--html")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(UserError, match="too long"):
        check_writable(str(tmp_path / ("a" * 256)))


def test_loops_of_links_and_links_into_nowhere_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing/file")
    for name in ("loop", "nowhere"):
        for act in (check_writable, lambda name: write_text(name, "", "--json")):
            with pytest.raises(UserError, match=f"cannot write --json .*{name}"):
                act(str(tmp_path / name))


def test_names_and_texts_that_are_no_utf8_are_written(tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.json")
    check_writable(name)
    write_json(name, {"command": [name]})
    assert json.loads(Path(name).read_text(encoding="utf-8")) == {"command": [name]}


def test_a_file_whose_directory_allows_no_renaming_is_written_directly(tmp_path, monkeypatch):
    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "x.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", refuses)
    check_writable(str(path))
    write_json(str(path), {"new": 1})
    assert json.loads(path.read_text()) == {"new": 1} and os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(str(path), {"new": 1})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


# ------------------------------------------------------------------------------------------ results are never lost
def test_results_that_cannot_be_written_do_not_take_the_others_with_them(pair, tmp_path, monkeypatch, capsys):
    argv = ["--target", str(pair[0]), "--draft", str(pair[1]), "--prompt", "def", "--max-new-tokens", "4"]
    assert main([*argv, "--json", "/dev/full", "--html", str(tmp_path / "x.html")]) == 2
    told = capsys.readouterr()
    assert "cannot write --json /dev/full: No space left" in told.err and "outputs identical: yes" in told.out
    assert "<html" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("error", [NotFinite("logits are not finite"), RuntimeError("out of memory")])
def test_a_prompt_that_fails_does_not_take_the_others_with_it(error, run, monkeypatch, capsys, tmp_path):
    stream, calls = demo.session.LLM.stream, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:  # two of the warm-up, two of the first prompt
            raise error
        return stream(self, *args, **options)

    monkeypatch.setattr(demo.session.LLM, "stream", failing)
    path = tmp_path / "results.json"
    if isinstance(error, UserError):
        assert run("--prompt", "def", "--prompt", "class")[0] == 2
        assert "error: logits are not finite" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            run("--prompt", "def", "--prompt", "class")
    results = json.loads(path.read_text())
    assert len(results["prompts"]) == 1 and results["interrupted"] is True
    assert "outputs identical: yes (1 of 1" in capsys.readouterr().out or isinstance(error, UserError)


# ----------------------------------------------------------------------------------------------------------- signals
def interrupted_at(monkeypatch, place, number, times=1):
    """Signals at a place of a run: "token", or a function of `demo.report` or the display."""
    if place == "token":
        stream = demo.session.LLM.stream

        def sending(self, *args, **options):
            for count, piece in enumerate(stream(self, *args, **options)):
                if count == 3 and options["stats"].rounds:
                    for _ in range(times):
                        signal.raise_signal(number)
                yield piece

        monkeypatch.setattr(demo.session.LLM, "stream", sending)
        return
    owner, name = {"report": (demo.report, "build_results"), "summary": (demo.display.QuietView, "summary")}[place]
    original = getattr(owner, name)

    def sending_first(*args, **options):
        for _ in range(times):
            signal.raise_signal(number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, sending_first)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_a_text_keeps_what_there_is(number, code, run, monkeypatch, capsys):
    interrupted_at(monkeypatch, "token", number)
    found, results = run("--prompt", "def", "--max-new-tokens", "60")
    assert found == code
    (partial,) = results["partial"] or [None]
    assert partial["tokens"] == len(partial["token_ids"]) == 4 and partial["finish_reason"] == "interrupted"
    assert "interrupted in the warm-up" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "place",
    [
        (demo.session, "open_pair"),
        (models.loading, "calibrate"),
        (models.loading, "TorchLlama"),
        (models.loaded, "Engine"),
    ],
    ids=lambda place: place[1],
)
def test_a_signal_while_models_are_loaded_is_one_line(place, number, code, run, monkeypatch, capsys):
    sent = []

    def sending(*_, **__):
        sent.append(number)
        signal.raise_signal(number)
        pytest.fail("the signal was lost")

    sending.from_checkpoint = sending
    monkeypatch.setattr(*place, sending)
    assert run("--prompt", "def") == (code, None)
    assert sent == [number]
    told = capsys.readouterr()
    assert told.out == "" and [x for x in told.err.splitlines() if not x.startswith("loading ")] == ["interrupted"]


@pytest.mark.parametrize("place", ["report", "summary"])
def test_signals_in_the_final_report_do_not_cut_it(place, run, monkeypatch, capsys):
    interrupted_at(monkeypatch, place, signal.SIGINT, times=2)
    code, results = run("--prompt", "def")
    assert code == 130
    assert len(results["prompts"]) == 1 and results["interrupted"] is False
    assert "outputs identical: yes" in capsys.readouterr().out


def test_a_second_signal_in_a_text_does_not_wait_and_a_third_one_does_not_cut_the_report(run, monkeypatch, capsys):
    interrupted_at(monkeypatch, "token", signal.SIGINT, times=2)
    interrupted_at(monkeypatch, "report", signal.SIGTERM)
    code, results = run("--prompt", "def", "--max-new-tokens", "60")
    assert code == 130 and results["interrupted"] is True  # the first signal's
    assert "tokens written" in capsys.readouterr().out


def test_a_signal_outside_of_texts_is_raised_at_once_and_told_in_one_line(capsys):
    def command():
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(command, interrupted="nothing was written") == 143
    assert capsys.readouterr().err == "nothing was written\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_something_swallows_is_not_lost():
    def command():
        with contextlib.suppress(KeyboardInterrupt):  # as an import does, or a destructor
            signal.raise_signal(signal.SIGINT)
        interrupts.check()
        raise AssertionError("the signal was lost")

    assert run_command(command) == 130
    assert run_command(lambda: interrupts.check() or 0) == 0  # the next command knows nothing of it


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_demo_is_imported_is_one_line(number, code):
    script = (
        "import sys, signal, runpy\n"
        "class Sender:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'demo.harness': signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Sender())\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, DEMO[1]], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "interrupted\n")


# ------------------------------------------------------------------------------------------------ streams and locale
def run_demo(pair, *argv, shell="", env=None):
    """The demo as a process of its own, its streams redirected by a shell."""
    models = ["--target", str(pair[0]), "--draft", str(pair[1]), "--max-new-tokens", "4"]
    command = ["bash", "-c", f'"$@" {shell}', "bash", *DEMO, *models, *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})


@pytest.mark.parametrize("shell", [">&- 2>&- <&-", "2>/dev/full"])
def test_results_are_written_whatever_streams_there_are(shell, pair, tmp_path):
    path = tmp_path / "x.json"
    done = run_demo(pair, "--prompt", "def", "--json", str(path), shell=shell)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(path.read_text())["outputs_identical"] is True


def test_a_full_stdout_is_one_line_and_what_was_written_is_kept(pair, tmp_path):
    path = tmp_path / "x.json"
    done = run_demo(pair, "--prompt", "def", "--quiet", "--json", str(path), shell=">/dev/full")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    assert json.loads(path.read_text())["outputs_identical"] is True


def test_a_mistake_without_a_stderr_has_its_exit_code(pair):
    for shell in ("2>&-", "2>/dev/full"):
        assert run_demo(pair, "--dtype", "int4", shell=shell).returncode == 2


def test_in_the_c_locale_prompts_and_names_are_utf8(pair, tmp_path):
    path = tmp_path / "é.json"
    done = run_demo(pair, "--prompt", "é = 'ü'", "--json", str(path), env={"LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text(encoding="utf-8"))["prompts"][0]["prompt"] == "é = 'ü'"
    off = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_demo(pair, "--prompt", "é", env=off)
    assert done.returncode == 2 and "--prompt 1 holds bytes that are no UTF-8" in done.stderr
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "not JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not JSON"),
        ('["\\ud800"]', "entry 1"),
        ('["fine", {"prompt": "x\\udfff"}]', "entry 2"),
        ("[" + "9" * 5000 + "]", "not JSON"),
    ],
    ids=["arrays", "objects", "surrogate", "second", "digits"],
)
def test_deep_and_odd_json_is_one_line(content, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        prompts_of(tmp_path / "p.json", content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert prompts_of(tmp_path / "p.txt", "\ufeffdef f():") == ["def f():"]
    assert prompts_of(tmp_path / "p.json", '\ufeff["def"]') == ["def"]


def test_ids_outside_of_the_vocabulary_are_found_in_all_prompts_before_the_first_runs(pair, tmp_path, capsys):
    """A vocabulary with holes has fewer entries than its largest id: it passes where entries are counted."""
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["z"] = 5000
    file.write_text(json.dumps(tokenizer))
    argv = ["--target", str(target), "--drafter", "prompt-lookup", "--prompt", "def", "--prompt", "xyz"]
    refused(capsys, argv, "prompt 2 has the token id 5000", "vocabulary is 286")


# ------------------------------------------------------------------------------------------------------- big numbers
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--threads", "1000000000"], ["--threads", "1024"]),
        (["--threads", "1" + "0" * 30], ["--threads", "1024"]),
        (["--threads", "9" * 5000], ["--threads", "5000 characters"]),
        (["--random-prompts", "9" * 5000 + "x1"], ["--random-prompts", "characters"]),
        (["--num-draft-tokens", "9" * 30], ["--num-draft-tokens", "0 to 31"]),
    ],
)
def test_numbers_beyond_the_machine_are_short_lines(argv, words):
    with pytest.raises(UserError) as caught:
        settings(*argv)
    assert all(word in str(caught.value) for word in words) and len(str(caught.value)) < 300


def test_random_prompts_cost_what_is_used_of_them(pair):
    """A list of a billion prompts would take minutes and all memory: the test's own time is the proof."""

    def encoded(*argv):
        chosen = parse_settings(["--target", str(pair[0]), "--drafter", "prompt-lookup", *argv], environ={})
        return encode_prompts(chosen, [], open_pair(chosen.engine))

    (prompt,) = encoded("--random-prompts", "999999999x9", "--max-prompts", "1")
    assert prompt.ids == encoded("--random-prompts", "1x9")[0].ids
    with pytest.raises(UserError, match="999999999x9 are more than 10000000"):
        encoded("--random-prompts", "999999999x9")
    with pytest.raises(UserError, match="prompt 1 has 99999999999 tokens, the context is 512"):
        encoded("--random-prompts", "1x99999999999")


def test_threads_and_slots_are_bounded_for_the_library_too():
    from models.options import EngineOptions

    for name in ("threads", "slots"):
        with pytest.raises(UserError, match=f"{name} 1000000000: give a whole number from 1 to 1024"):
            EngineOptions(**{name: 10**9})


def test_long_values_are_shown_by_their_beginning():
    assert shown("7") == "7" and shown("7" * 41) == "7" * 40 + ".. (41 characters)"


# --------------------------------------------------------------------------------------------- tokenizers' own files
def with_settings(path, **values):
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


TEMPLATE = "{{ messages[0].content }}"
BROKEN = {
    "bos_token": lambda path: with_settings(path, chat_template=TEMPLATE, bos_token=3),
    "extra_special_tokens": lambda path: with_settings(path, chat_template=TEMPLATE, extra_special_tokens=[1]),
    "added_tokens_decoder": lambda path: with_settings(path, chat_template=TEMPLATE, added_tokens_decoder=[1]),
    "template-list": lambda path: with_settings(path, chat_template=["x"]),
    "template-nameless": lambda path: with_settings(path, chat_template=[{"name": "default"}]),
    "template-number": lambda path: with_settings(path, chat_template=3),
    "chat_template.jinja": lambda path: (path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}"),
    "special_tokens_map.json": lambda path: (
        with_settings(path, chat_template=TEMPLATE),
        (path / "special_tokens_map.json").write_bytes(b"\xff"),
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_files_beside_a_tokenizer_that_cannot_be_used_are_one_line(fault, pair, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    BROKEN[fault](target)
    argv = ["--target", str(target), "--drafter", "prompt-lookup", "--prompt", "hi"]
    refused(capsys, argv, str(target), *([fault] if fault.endswith(("jinja", "json")) else []))


def test_a_tokenizer_that_lacks_a_character_is_one_line(pair, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    for model in (models.Unigram([("a", -1.0)]), models.WordLevel({"a": 0})):
        Tokenizer(model).save(str(target / "tokenizer.json"))
        argv = ["--target", str(target), "--drafter", "prompt-lookup", "--prompt", "é"]
        refused(capsys, argv, "tokenizer.json", "cannot encode")


def test_half_a_surrogate_is_no_text_for_a_tokenizer(pair):
    from models.llama.tokenizer import LlamaTokenizer

    with pytest.raises(UserError, match="surrogate"):
        LlamaTokenizer.load(pair[0]).encode("def \ud800")


def test_another_architecture_and_a_key_that_is_there_twice_are_refused(pair, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    change_config(target, architectures=["LlamaForSequenceClassification"])
    refused(capsys, ["--target", str(target)], "LlamaForSequenceClassification", "LlamaForCausalLM")
    change_config(target, architectures=None)
    text = (target / "config.json").read_text()
    (target / "config.json").write_text(text.replace("{", '{"hidden_size": 32, ', 1))
    refused(capsys, ["--target", str(target)], "config.json", "hidden_size", "twice")
