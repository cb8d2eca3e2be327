"""The training script: its stages on small data, and that an interrupted training ends like an uninterrupted one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models.llama.checkpoint import Checkpoint
from models.llama.tokenizer import LlamaTokenizer, check_pair

ROOT = Path(__file__).resolve().parent.parent
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Box:\n    size = 1\n"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_pair", ROOT / "scripts" / "train_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def streams(script):
    ids = torch.randint(0, script.VOCAB_SIZE, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return {"train": ids, "validation": ids}


def test_growing_a_model_changes_no_output(script):
    torch.manual_seed(0)
    shallow = script.LlamaForCausalLM(script.model_config(2)).eval()
    deep = script.grow(shallow, 4).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, after = shallow(input_ids=ids).logits, deep(input_ids=ids).logits
    assert len(deep.model.layers) == 4
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_an_interrupted_training_ends_like_an_uninterrupted_one(script, streams, tmp_path, monkeypatch):
    phases = (script.Phase(1, 3, 2, 16), script.Phase(2, 3, 2, 16))
    monkeypatch.setattr(script, "STATE_EVERY_S", 0.0)
    monkeypatch.setattr(script, "validation_loss", lambda model, stream: 0.0)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    resumed.mkdir()
    script.train_target(straight, streams, phases, seed=1)

    draw, calls = script.sample_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:  # in the middle of the second phase
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(script, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train_target(resumed, streams, phases, seed=1)
    monkeypatch.setattr(script, "sample_batch", draw)
    script.train_target(resumed, streams, phases, seed=1)

    one, two = load_file(straight / "target.safetensors"), load_file(resumed / "target.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    other = tmp_path / "other"
    other.mkdir()
    script.train_target(other, streams, phases, seed=2)
    assert not torch.equal(load_file(other / "target.safetensors")["model.norm.weight"], one["model.norm.weight"])


def test_every_stage_runs_and_the_result_is_a_pair(script, tmp_path, monkeypatch):
    """All stages at a hundredth of their length, on a few lines of text: what they write loads and fits together."""
    work, out = tmp_path / "work", tmp_path / "out"

    def small_corpus(folder):
        info = {"source": "test", "sha256": "0", "train_files": 1, "validation_files": 1, "train_characters": 1}
        (folder / "corpus.json").write_text(json.dumps(info))
        return {"train": [TEXT * 60], "validation": [TEXT * 30]}

    monkeypatch.setattr(script, "collect_corpus", small_corpus)
    monkeypatch.setattr(script, "TARGET_PHASES", (script.Phase(1, 2, 2, 32), script.Phase(2, 2, 2, 32)))
    monkeypatch.setattr(script, "DRAFT_PHASE", script.Phase(1, 2, 2, 32))
    for name, value in {"REPLY_BATCHES": 1, "REPLY_BATCH": 24, "REPLY_PROMPT": 8, "REPLY_LENGTH": 24}.items():
        monkeypatch.setattr(script, name, value)
    assert script.command(["--work-dir", str(work), "--output", str(out)]) == 0
    checkpoints = [Checkpoint.open(out / f"tiny-{role}") for role in ("target", "draft")]
    tokenizers = [LlamaTokenizer.load(checkpoint.path) for checkpoint in checkpoints]
    check_pair(*tokenizers, *(checkpoint.config for checkpoint in checkpoints))
    assert [checkpoint.config.num_hidden_layers for checkpoint in checkpoints] == [2, 1]
    assert tokenizers[0].decode(tokenizers[0].encode(TEXT)) == TEXT
    assert "by drafted position" in (out / "tiny-draft" / "README.md").read_text()


def test_the_embedded_tokenizer_keeps_a_line_end_with_its_indentation():
    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "checkpoints" / "tiny-target" / "tokenizer.json"))
    assert tokenizer.encode("\n        return", add_special_tokens=False).tokens == ["ĊĠĠĠĠĠĠĠĠ", "return"]
