"""Damaged files: whatever a file holds, it is read or refused in one line, soon, and in little memory."""

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.cli.prompts import read_prompt_file
from models.llama.checkpoint import Checkpoint
from models.llama.config import LlamaConfig
from models.llama.gguf_checkpoint import GgufCheckpoint
from models.llama.head_checkpoint import HeadCheckpoint
from models.llama.head_config import HeadConfig
from models.llama.tokenizer import LlamaTokenizer
from models.llm import LLM
from models.tests.fuzzing import damaged_bytes, damaged_json, fuzzed, json_bytes, read_or_refused
from models.tests.llama_fixtures import random_tensors, tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from models.tests.test_gguf import write as write_gguf
from models.torch_llama.calibration import calibrate

CONFIG = tiny_config(num_hidden_layers=1, vocab_size=300)
HEAD = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny-head"
LONG_JSON = (b"[" * 200_000, b'{"a":' * 100_000, b"9" * 100_000, b'"' + b"x" * 500_000, b"\xff\xfe[\x00]\x00")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("sound")
    write_tiny_checkpoint(path, CONFIG)
    return write_tiny_tokenizer(path, vocab_size=300)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of it to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def written_as(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def generate(folder: Path) -> list[int]:
    with LLM.load(str(folder), drafter="prompt-lookup", max_seq_len=64) as llm:
        return llm.generate("def f(x):", max_new_tokens=3).token_ids


def test_what_is_sound_is_read(folder):
    """Else the tests below would show nothing."""
    assert len(generate(folder)) == 3
    read_weights(folder)


def read_weights(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint:
        assert checkpoint[name].shape == checkpoint.config.tensor_shapes()[name]


# ------------------------------------------------------------------------------------------------------- configurations
@fuzzed
@given(st.data())
def test_a_configuration(tmp_path, tally, data):
    value = data.draw(damaged_json(CONFIG.to_dict()))
    config = read_or_refused(
        tally, lambda: LlamaConfig.from_json(written_as(tmp_path / "config.json", json_bytes(value)))
    )
    assert config is None or config.parameter_count > 0


@fuzzed
@given(st.data())
def test_a_configuration_of_a_head(tmp_path, tally, data):
    value = data.draw(damaged_json(json.loads((HEAD / "config.json").read_text())))
    config = read_or_refused(
        tally, lambda: HeadConfig.from_json(written_as(tmp_path / "config.json", json_bytes(value)))
    )
    assert config is None or config.tensor_shapes()


@fuzzed
@given(st.data())
def test_the_bytes_of_a_configuration(tmp_path, tally, data):
    damaged = data.draw(damaged_bytes(json_bytes(CONFIG.to_dict())))
    read_or_refused(tally, lambda: LlamaConfig.from_json(written_as(tmp_path / "config.json", damaged)))


@pytest.mark.parametrize("damaged", LONG_JSON, ids=range(len(LONG_JSON)))
def test_json_that_is_very_long_or_deep(copied, damaged, tally):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        original = (copied / name).read_bytes() if (copied / name).exists() else None
        written_as(copied / name, damaged)
        assert read_or_refused(tally, lambda: generate(copied)) is None or name == "generation_config.json"
        if original is None:
            (copied / name).unlink()
        else:
            written_as(copied / name, original)


@fuzzed
@given(st.data())
def test_a_model_with_a_damaged_configuration(folder, copied, tally, data):
    """What is accepted can be run."""
    value = data.draw(damaged_json(CONFIG.to_dict()))
    written_as(copied / "config.json", json_bytes(value))
    ids = read_or_refused(tally, lambda: generate(copied))
    assert ids is None or 1 <= len(ids) <= 3


# -------------------------------------------------------------------------------------------------------------- weights
@fuzzed
@given(st.data())
def test_weights(folder, copied, tally, data):
    file = next(copied.glob("*.safetensors"))
    sound = (folder / file.name).read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    written_as(file, data.draw(damaged_bytes(sound[:header])) + sound[header:])
    read_or_refused(tally, lambda: read_weights(copied))


@fuzzed
@given(st.data())
def test_the_values_in_a_header_of_weights(folder, copied, tally, data):
    file = next(copied.glob("*.safetensors"))
    sound = (folder / file.name).read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    header = json_bytes(data.draw(damaged_json(json.loads(sound[8:end]))))
    written_as(file, len(header).to_bytes(8, "little") + header + sound[end:])
    read_or_refused(tally, lambda: read_weights(copied))


@fuzzed
@given(st.data())
def test_an_index_of_shards(copied, tally, data):
    tensors = random_tensors(CONFIG, 0)
    names = sorted(tensors)
    next(copied.glob("*.safetensors")).unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for name, part in shards.items():
        save_file({each: tensors[each] for each in part}, copied / name)
    index = {"metadata": {}, "weight_map": {each: name for name, part in shards.items() for each in part}}
    damaged = data.draw(st.one_of(damaged_json(index).map(json_bytes), damaged_bytes(json_bytes(index))))
    written_as(copied / "model.safetensors.index.json", damaged)
    read_or_refused(tally, lambda: read_weights(copied))


@fuzzed
@given(st.data())
def test_a_head(tmp_path, tally, data):
    """Its vocabulary maps and tensor header."""
    path = tmp_path / "head"
    path.mkdir(exist_ok=True)
    shutil.copy(HEAD / "config.json", path)
    sound = (HEAD / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    written_as(path / "model.safetensors", data.draw(damaged_bytes(sound[:header])) + sound[header:])
    read_or_refused(tally, lambda: list(HeadCheckpoint.open(path).values()))


# ----------------------------------------------------------------------------------------------------- tokenizers
@fuzzed
@given(st.data())
def test_a_tokenizer(folder, copied, tally, data):
    sound = (folder / "tokenizer.json").read_bytes()
    value = json.loads(sound)
    value["model"]["vocab"] = dict(list(value["model"]["vocab"].items())[:40])  # so that damage hits the rest too
    damaged = data.draw(st.one_of(damaged_json(value).map(json_bytes), damaged_bytes(sound)))
    written_as(copied / "tokenizer.json", damaged)

    def read():
        tokenizer = LlamaTokenizer.load(copied)
        return tokenizer.decode(tokenizer.encode("def f(x): 🙂 <|eot_id|>"))

    read_or_refused(tally, read)


@fuzzed
@given(st.data())
def test_what_a_tokenizers_configuration_says(folder, copied, tally, data):
    sound = (folder / "tokenizer_config.json").read_bytes()
    damaged = data.draw(st.one_of(damaged_json(json.loads(sound)).map(json_bytes), damaged_bytes(sound)))
    written_as(copied / "tokenizer_config.json", damaged)

    def read():
        tokenizer = LlamaTokenizer.load(copied)
        return tokenizer.chat([{"role": "user", "content": "hello"}]) if tokenizer.has_chat_template else []

    read_or_refused(tally, read)


@fuzzed
@given(st.data())
def test_a_chat_template(folder, copied, tally, data):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"].encode()
    written_as(copied / "chat_template.jinja", data.draw(damaged_bytes(template)))
    read_or_refused(tally, lambda: LlamaTokenizer.load(copied).chat("hello"))


# --------------------------------------------------------------------------------------------- prompts and caches
@fuzzed
@given(st.data())
def test_prompts(tmp_path, tally, data):
    value = ["one", {"prompt": "two", "category": "x"}]
    damaged = data.draw(st.one_of(damaged_json(value).map(json_bytes), damaged_bytes(json_bytes(value))))
    for name in ("prompts.json", "prompts.txt"):
        prompts = read_or_refused(tally, lambda name=name: read_prompt_file(written_as(tmp_path / name, damaged)))
        assert prompts is None or all(each.strip() for each in prompts)


@pytest.mark.parametrize("damaged", LONG_JSON, ids=range(len(LONG_JSON)))
def test_prompts_that_are_very_long_or_deep(tmp_path, damaged, tally):
    read_or_refused(tally, lambda: read_prompt_file(written_as(tmp_path / "prompts.json", damaged)))


@fuzzed
@given(st.data())
def test_a_kept_calibration(tmp_path, monkeypatch, tally, data):
    """What cannot be used is measured anew."""
    tally["cases tried"] += 1
    measured = []
    from models.torch_llama import calibration

    costs, errors = ({str(rows): value for rows in calibration.ROWS} for value in (1.0, 0.0))
    kept = {"one_row_ms": 1.0, "costs": costs, "errors": errors, "measured": "2026-01-01", "rows_alike": False}

    def measure(*_):
        measured.append(True)
        return calibration.Calibration(1.0, {2: 1.0}, {2: 0.0}, "2026-01-01")

    monkeypatch.setattr(calibration, "measure", measure)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    calibrate(CONFIG, "fp32", directory=tmp_path)
    (file,) = tmp_path.glob("*.json")
    measured.clear()
    file.write_bytes(json_bytes(kept))
    assert calibrate(CONFIG, "fp32", directory=tmp_path).free_rows and not measured  # a sound file is used
    damaged = data.draw(st.one_of(damaged_json(kept).map(json_bytes), damaged_bytes(json_bytes(kept))))
    written_as(file, damaged)
    found = calibrate(CONFIG, "fp32", directory=tmp_path)
    assert measured or found.free_rows is not None


# ----------------------------------------------------------------------------------------------------- GGUF files
@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    """A sound file, and the bytes before its first weights."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    config = replace(CONFIG, rope_scaling=None)
    write_gguf(file, config, random_tensors(config, 0), tokenizer_dir=folder)
    return file.read_bytes(), file.stat().st_size - sum(4 * prod(shape) for shape in config.tensor_shapes().values())


@fuzzed
@given(st.data())
def test_a_gguf_file(gguf_file, tmp_path, monkeypatch, tally, data):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sound, described = gguf_file
    damaged = data.draw(damaged_bytes(sound[:described])) + sound[described:]
    file = written_as(tmp_path / "model.gguf", damaged)
    read_or_refused(tally, lambda: list(GgufCheckpoint.open(file).values()))
