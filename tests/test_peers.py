"""scripts/benchmark.py peers: files written for other programs, what is left out, and each program on a tiny pair."""

import sys

import pytest
import torch

from models.cli.console import measuring_bar
from models.errors import UserError
from models.llama.checkpoint import Checkpoint, save_checkpoint
from models.llama.config import LlamaConfig
from models.tests.llama_fixtures import random_tensors, tiny_config
from scripts import benchmark
from scripts.suites import configurations, gguf_peer, hf_peer, peer, peers
from scripts.suites.bench import Bench
from scripts.suites.suite import model_settings
from tests.demo_fixtures import write_pair

PROMPT = "for i in range(40):\n    print(i)" * 4
LENGTH = 24


def opened(folder, **changes):
    config = tiny_config(**changes)
    save_checkpoint(folder / "model", config, random_tensors(config, seed=3))
    return Checkpoint.open(folder / "model")


@pytest.fixture
def bench(tmp_path):
    """A tiny pair with scaled rotary frequencies, in fp32, so that equal weights give equal texts."""
    target, draft = write_pair(tmp_path, num_hidden_layers=2)
    assert LlamaConfig.from_json(target / "config.json").rope_scaling is not None
    flags = ["--target", str(target), "--draft", str(draft), "--dtype", "fp32", "--max-new-tokens", str(LENGTH)]
    return Bench(model_settings("peers", flags), [PROMPT])


def own_text(bench):
    ids = bench.prompts[0].ids
    return configurations.write(configurations.plain_configuration(bench), ids, LENGTH, bench.stop_ids).tokens


def check_texts(bench, make):
    """Every row writes our own text; also where a stop id ends it, which is its last token."""
    ids, full = bench.prompts[0].ids, own_text(bench)
    assert len(full) == LENGTH
    rows = {name: run(ids).ids for name, run in make(bench, 3).ways.items()}
    assert rows == dict.fromkeys(rows, full)
    bench.stop_ids = (full[LENGTH // 2], full[LENGTH // 2 - 1])
    cut = own_text(bench)
    assert len(cut) < LENGTH and cut[-1] in bench.stop_ids
    stopped = {name: run(ids).ids for name, run in make(bench, 3).ways.items()}
    assert stopped == dict.fromkeys(rows, cut)
    return set(rows)


# ---- programs ----


def test_llama_cpp_from_its_wheel_writes_our_text_in_every_row(bench):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install -e '.[peers]'")
    from scripts.suites.xllamacpp_peer import xllamacpp_peer

    named = {peer.LLAMA_PLAIN, peer.LLAMA_MODEL, peer.LLAMA_LOOKUP, peer.LLAMA_LOOKUP_DEFAULTS}
    assert check_texts(bench, xllamacpp_peer) == named


def test_llama_cpp_compiled_writes_our_text_in_every_row(bench):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    rows = check_texts(bench, gguf_peer.llama_cpp_python_peer)
    assert rows == {peer.LLAMA_PLAIN, peer.LLAMA_MODEL, peer.LLAMA_LOOKUP}


def test_openvino_from_its_wheel_writes_our_text_in_every_row(bench):
    pytest.importorskip("openvino_genai", reason="openvino-genai is not installed: pip install -e '.[peers]'")
    from scripts.suites.openvino_peer import openvino_peer

    rows = check_texts(bench, openvino_peer)
    assert rows == {peer.OPENVINO_PLAIN, peer.OPENVINO_MODEL, peer.OPENVINO_LOOKUP}


def test_transformers_writes_our_text_in_every_row(bench):
    rows = check_texts(bench, hf_peer.hf_peer)
    assert rows == {peer.HF_PLAIN, peer.HF_ASSISTED, peer.HF_DEFAULTS, peer.HF_LOOKUP}


def test_transformers_gets_the_dequantised_weights_of_a_gguf_file(tmp_path, monkeypatch):
    checkpoint = opened(tmp_path, dtype="float32", tie_word_embeddings=True)
    monkeypatch.setattr(hf_peer, "GgufCheckpoint", Checkpoint)  # taken for one
    monkeypatch.setattr(checkpoint, "path", tmp_path / "nowhere")
    model = hf_peer.load(checkpoint, "bf16", "cpu")
    weights = model.state_dict()
    for name in checkpoint.names:
        assert torch.equal(weights[name], checkpoint[name].to(torch.bfloat16)), name


# ---- the GGUF file ----


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_written_file_holds_the_weights_and_a_vocabulary_of_unique_tokens(tmp_path, dtype):
    import gguf

    checkpoint = opened(tmp_path)
    config = checkpoint.config
    gguf_peer.write_gguf(tmp_path / "model.gguf", checkpoint, dtype, [7, 9])
    reader = gguf.GGUFReader(str(tmp_path / "model.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == config.vocab_size and tokens[7] == gguf_peer.made_up_token(7)
    assert len(fields["tokenizer.ggml.token_type"]) == config.vocab_size
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (7, 9)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, shape in config.tensor_shapes().items():
        tensor = tensors[gguf_peer.gguf_name(name)]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).view(shape)
        kept = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        expected = gguf_peer._interleaved(config, name, checkpoint[name].float())
        assert torch.equal(values, expected.to(kept).float() if len(shape) == 2 else expected), name


def test_no_stop_id_declares_no_end_of_text_and_too_many_are_refused(tmp_path):
    import gguf

    checkpoint = opened(tmp_path)
    gguf_peer.write_gguf(tmp_path / "model.gguf", checkpoint, "bf16", [])
    fields = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields
    assert not [name for name in fields if name.endswith(("eos_token_id", "eot_token_id", "eom_token_id"))]
    with pytest.raises(UserError, match="declares 3 ends of a text, this model has 4: use --random-prompts"):
        gguf_peer.write_gguf(tmp_path / "other.gguf", checkpoint, "bf16", [1, 2, 3, 4])


# ---- what is left out ----


def test_programs_that_are_not_installed_are_left_out_with_the_remedy(bench, monkeypatch):
    for package in ("xllamacpp", "llama_cpp", "openvino_genai"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("llama.cpp", "openvino"):
        with pytest.raises(UserError, match=r"is left out \(.*\): `pip install -e '.\[peers\]'` to have it take part"):
            peers.PEERS[name](bench, 3)


def test_a_program_that_memory_cannot_hold_is_left_out_with_both_sizes(bench, monkeypatch):
    monkeypatch.setattr(peer, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"transformers is left out: it needs .* GB are free: name fewer with --peers"):
        peers.PEERS["transformers"](bench, 3)


def test_a_full_disk_leaves_a_program_out(bench, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(peers.PEERS, "openvino", full)
    suite = peers.Peers(benchmark.build_parser().parse_args(["peers", "--peers", "openvino"]), [])
    suite.bench = bench
    with measuring_bar(quiet=True) as progress:
        progress.begin(1, "loading")
        assert suite._others(progress) == {}
    [note] = suite.notes
    assert note.startswith("openvino is left out: cannot write its weights (No space left on device): set TMPDIR")


def test_without_a_fitting_draft_and_tokenizer_plain_and_lookup_rows_are_measured(tmp_path, capsys):
    opened(tmp_path, vocab_size=96)
    flags = "--random-prompts 2x8 --max-new-tokens 8 --repeats 1 --dtype fp32 --peers transformers --quiet".split()
    assert benchmark.command(["peers", "--target", str(tmp_path / "model"), *flags]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| own") or "| HF" in line]
    assert rows == [peer.OWN_PLAIN, peer.OWN_LOOKUP, peer.OWN_AUTO_LOOKUP, peer.HF_PLAIN, peer.HF_LOOKUP]
    assert "rows of a draft model are left out" in out and "transformers 5" in out
    assert "llama.cpp in" not in out and "best HF assisted" not in out


def test_the_share_of_equal_ids_ends_at_the_first_difference():
    assert peers.same_share([[1, 2, 3, 4], [1, 2]], [[1, 2, 9, 4], [1, 2]]) == pytest.approx(4 / 6)
    assert peers.same_share([[1]], [[1, 2]]) == 0.5
