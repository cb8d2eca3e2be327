"""Checkpoints that change under a program, processes that share a cache: an error or what is right, nothing else."""

import shutil
from pathlib import Path

import pytest

import models
from models.errors import UserError
from models.llama.checkpoint import Checkpoint
from models.llm import LLM

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
