"""scripts/make_checkpoint.py, as a user types it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models.llama.checkpoint import Checkpoint
from models.llama.config import NAMED_SIZES
from models.llama.tokenizer import LlamaTokenizer
from models.tests.llama_fixtures import tiny_config, write_tiny_tokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_checkpoint.py"
SMALL = ["--size=1b", "--layers=2", "--hidden=64", "--heads=4", "--kv-heads=2", "--ffn=96", "--vocab-size=300"]


@pytest.fixture(scope="module")
def script():
    """The script as a module: a process of its own costs seconds for imports alone."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_embedded_pair(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "EMBEDDED", tmp_path / "no-embedded-pair")


def test_the_command_writes_a_checkpoint_and_says_what_it_is(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, str(tmp_path / "deep" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    config = Checkpoint.open(tmp_path / "deep" / "out").config
    assert f"{config.parameter_count:,} parameters in bfloat16, tokenizer: none" in done.stdout


@pytest.mark.parametrize("shard_gb", ["2", "0.00005"])
def test_both_readers_read_it(script, tmp_path, shard_gb):
    out = tmp_path / "out"
    assert script.main([*SMALL, "--seed", "3", "--dtype", "float32", "--shard-gb", shard_gb, str(out)]) == 0
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == ["model.safetensors"] if shard_gb == "2" else len(files) > 2
    checkpoint = Checkpoint.open(out)
    loaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    state = loaded.state_dict()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # tied, as the 1B is
    for name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(name), state[name]), name
    assert loaded.config.rope_parameters["factor"] == 32.0 and loaded.config.head_dim == 16


def test_a_config_file_gives_the_shape(script, tmp_path):
    config = tiny_config(rope_theta=123.0, bos_token_id=3, eos_token_ids=(4, 5))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for number, source in enumerate((tmp_path / "config.json", tmp_path)):
        assert script.main(["--config", str(source), str(tmp_path / f"out{number}")]) == 0
        assert Checkpoint.open(tmp_path / f"out{number}").config == config


def test_options_override_the_named_size(script):
    args = script.parse(["--size", "8b", "--layers", "3", "--tied", "--context", "4096", "--dtype", "float16", "out"])
    config = script.build_config(script.base_config(args), args, None)
    eight = NAMED_SIZES["llama-3.1-8b"]
    assert (config.num_hidden_layers, config.tie_word_embeddings) == (3, True)
    assert (config.max_position_embeddings, config.dtype) == (4096, "float16")
    assert (config.hidden_size, config.head_dim, config.rope_scaling) == (4096, 128, eight.rope_scaling)
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128008, 128009))


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_without_options_a_named_size_is_the_published_one(script, name):
    args = script.parse(["--size", name, "out"])
    assert script.build_config(script.base_config(args), args, None) == NAMED_SIZES[name]


def test_weights_depend_on_seed_and_name_and_have_the_scale_of_a_fresh_model(script, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert script.main([*SMALL, "--seed", seed, "--dtype", "float32", str(tmp_path / name)]) == 0
    a, b, c = (Checkpoint.open(tmp_path / name) for name in "abc")
    for name in a.names:
        assert torch.equal(a[name], b[name])
        if a[name].ndim == 1:
            assert torch.equal(a[name], torch.ones(64))
        else:
            scale = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 1/sqrt(2 * 2 layers)
            assert not torch.equal(a[name], c[name])
            assert abs(a[name].std() / scale - 1) < 0.1 and abs(a[name].mean()) < scale / 10
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], a["model.layers.0.mlp.gate_proj.weight"])


# ------------------------------------------------------------------------------------------- tokenizers
def test_a_given_tokenizer_is_copied_and_its_special_ids_taken(script, tmp_path):
    source = write_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=280)
    assert script.main([*SMALL, "--tokenizer", str(source), str(tmp_path / "out")]) == 0  # 300 rows: padded
    copied, config = LlamaTokenizer.load(tmp_path / "out"), Checkpoint.open(tmp_path / "out").config
    assert copied.encode("Hi llama") == LlamaTokenizer.load(source).encode("Hi llama")
    assert copied.chat("Hi") == LlamaTokenizer.load(source).chat("Hi")
    assert (config.bos_token_id, config.eos_token_ids) == (copied.bos_id, copied.eos_ids) == (0, (1,))


def test_the_embedded_tokenizer_is_added_where_it_fits(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "EMBEDDED", write_tiny_tokenizer(tmp_path / "embedded", vocab_size=300))
    assert LlamaTokenizer.load(tmp_path / "embedded").vocab_size == 300
    assert script.main([*SMALL, str(tmp_path / "fits")]) == 0
    assert LlamaTokenizer.load(tmp_path / "fits").eos_ids == (1,)
    assert script.main([*SMALL, "--vocab-size", "301", str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other" / "tokenizer.json").exists()
    assert Checkpoint.open(tmp_path / "other").config.eos_token_ids == ()  # 128001 and so on do not exist there


# ------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "70b"], "no Llama size is called '70b'"),
        (["--config", "no/config.json"], "cannot read no/config.json"),
        (["--layers", "0"], "num_hidden_layers is 0"),
        (["--vocab-size", "0"], "vocab_size is 0"),
        (["--heads", "5"], "num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
        (["--heads", "6"], "--hidden 64 is not a multiple of --heads 6: give --head-dim"),
        (["--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
        (["--vocab-size", str(10**12)], "vocab_size is 1000000000000: no Llama has more than 16777216"),
        (["--layers", "4096", "--ffn", str(2**20), "--hidden", "16384"], "GB free: choose another disk"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(script, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    base = SMALL[1:] if options[0] in ("--size", "--config") else SMALL
    assert script.main([*base, *options, "out"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and os.listdir(tmp_path) == []


def test_a_tokenizer_too_large_for_the_model(script, tmp_path, capsys):
    source = write_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=320)
    assert script.main([*SMALL, "--tokenizer", str(source), str(tmp_path / "out")]) == 2
    assert "has 320 tokens, the model 300: use --vocab-size 320" in capsys.readouterr().err


def test_an_existing_output_is_kept(script, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    assert script.main([*SMALL, str(tmp_path / "out")]) == 2
    assert "exists: remove it or choose another output directory" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_an_interrupt_leaves_nothing(script, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.RandomWeights, "__getitem__", interrupt)
    assert script.main([*SMALL, str(tmp_path / "out")]) == 130
    assert "nothing was written" in capsys.readouterr().err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_shard_needs_a_size(script, value, capsys):
    assert script.main([f"--shard-gb={value}", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: --shard-gb")
