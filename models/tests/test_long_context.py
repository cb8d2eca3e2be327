"""The longest contexts: 131,072 positions that are really filled, and the memory that long prompts take.

LONG_CONTEXT=1 in the environment runs what takes minutes: all attention of the 131,072 positions, and peak memory.
"""

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.errors import UserError
from models.llama.config import RopeScaling
from models.speculative.model import LOGITS, Rows
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config
from models.torch_llama.attention import Attention
from models.torch_llama.kv_cache import KV_BLOCK
from models.torch_llama.model import PREFILL_CHUNK, TorchLlama

POSITIONS = 131072
LAST = 24  # rows at the end of the context that are compared
CONFIG = tiny_config(
    num_hidden_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=8192),
    max_position_embeddings=POSITIONS,
)
ON_DEMAND = pytest.mark.skipif(not os.environ.get("LONG_CONTEXT"), reason="takes minutes: set LONG_CONTEXT=1")

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def last_logits(hf, ids: list[int], count: int) -> torch.Tensor:
    """Logits [count, V] of the last rows by transformers' parts: what they are made of in a model of one layer.

    Keys and values are those of all positions, scores those of the last rows alone.
    """
    (layer,), tokens = hf.model.layers, torch.tensor([ids])
    x, attention = hf.model.embed_tokens(tokens), layer.self_attn
    normed = layer.input_layernorm(x)
    cos, sin = hf.model.rotary_emb(x, torch.arange(len(ids))[None])

    def heads(linear):
        return linear(normed).view(1, len(ids), -1, attention.head_dim).transpose(1, 2)

    queries, keys = apply_rotary_pos_emb(heads(attention.q_proj), heads(attention.k_proj), cos, sin)
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(groups, 1) for each in (keys, heads(attention.v_proj)))
    scores = queries[:, :, -count:] @ keys.transpose(2, 3) * attention.scaling
    hidden = torch.full((count, count), float("-inf")).triu(1)
    scores[..., -count:] += hidden
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(1, count, -1)
    x = x[:, -count:] + attention.o_proj(mixed)
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return hf.lm_head(hf.model.norm(x))[0]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG, 11)


@pytest.fixture(scope="module")
def text():
    return torch.randint(CONFIG.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(11)).tolist()


@pytest.fixture(scope="module")
def expected(tensors, text):
    hf = hf_model(CONFIG, tensors)
    with torch.no_grad():
        whole = hf(torch.tensor([text[:300]])).logits[0, -LAST:]
    torch.testing.assert_close(last_logits(hf, text[:300], LAST), whole, rtol=0, atol=1e-4)
    return last_logits(hf, text, LAST)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=ON_DEMAND)])
def test_all_131072_positions_are_exact(tensors, text, expected, everything, monkeypatch):
    """A prompt in chunks up to the last rows, then a verification that ends with the context.

    Keys and values of a single layer do not depend on attention: where not everything is computed, it is left out
    until the last chunk.
    """
    model = TorchLlama(CONFIG, tensors, dtype="fp32", max_seq_len=POSITIONS)
    assert model.reserve(0, text, POSITIONS) == 0
    first = 0 if everything else POSITIONS - 2 * PREFILL_CHUNK
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "attend", lambda self, kv, queries, plan: torch.zeros_like(queries))
        if first:
            model.extend([Rows(0, text[:first], 0, last=True)], LOGITS)
    verified = 5
    prompt = model.extend([Rows(0, text[first:-verified], first, last=True)], LOGITS).logits(0)
    rows = model.extend([Rows(0, text[-verified:], POSITIONS - verified)], LOGITS).logits(0)
    found = torch.cat((prompt, rows))
    assert (found - expected[-verified - 1 :]).abs().max() < 2e-4 < 1.0 < expected.abs().max()
    again = model.forward(text[-LAST:], POSITIONS - LAST)
    assert (again - expected).abs().max() < 2e-4
    for step in range(2):  # one by one
        row = model.forward([text[step - 2]], POSITIONS - 2 + step)
        assert (row - expected[step - 2]).abs().max() < 2e-4
    usage = model.cache.usage
    assert usage.live == usage.position * POSITIONS  # what a tree may write beyond is not
    assert usage.capacity == usage.position * (POSITIONS + KV_BLOCK)
    assert model.network.attention.mask_bytes < 3 * KV_BLOCK * model.fold * POSITIONS * 4
    with pytest.raises(UserError, match="do not fit the context of 131072"):
        model.forward([1, 2], POSITIONS - 1)


# ------------------------------------------------------------------------------------------------------- peak memory
MEASURED = """
import gc, math, sys, tempfile, threading, time
from pathlib import Path

import torch

from models.cache_size import announced
from models.llama.config import LlamaConfig, RopeScaling
from models.loading import load_model, open_model
from models.speculative.model import IDS, Rows
from models.torch_llama.attention import Attention
from models.torch_llama.model import PREFILL_CHUNK, TorchLlama
from models.torch_llama.working_set import Form

torch.set_num_threads(1)
name, dtype, compiled, length = sys.argv[1], sys.argv[2], sys.argv[3] == "compiled", int(sys.argv[4])


def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Mapped(dict):
    # Zeros in files, as the weights of a checkpoint are: what stays there takes no memory of its own.
    def __getitem__(self, name):
        shape = self.shapes[name]
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(2 * math.prod(shape))
            return torch.from_file(file.name, True, math.prod(shape), dtype=torch.bfloat16).view(shape)


def model_of(length, **sizes):
    config = LlamaConfig(
        **sizes, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=RopeScaling(factor=8.0),
        tie_word_embeddings=False, bos_token_id=0, eos_token_ids=(1,), dtype="bfloat16",
    )
    weights = Mapped()
    weights.shapes = config.tensor_shapes()
    return TorchLlama(config, weights, dtype=dtype, max_seq_len=length, compiled=compiled)


def modest(length):
    return model_of(
        length, vocab_size=8192, hidden_size=512, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64,
    )


def eight_billion(length):
    return model_of(
        length, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )


def smollm2(length):
    return load_model(open_model("smollm2"), dtype=dtype, max_seq_len=length, compiled=compiled).model


def read(model, length):
    ids = torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    first = 0
    model.reserve(0, (), length)
    if length > 8 * PREFILL_CHUNK and not compiled:
        # Before the last chunks zeros are written into the pages, which takes them all the same.
        first = length // PREFILL_CHUNK * PREFILL_CHUNK - PREFILL_CHUNK
        sizes = (model.config.num_attention_heads + 2 * model.config.num_key_value_heads) * model.config.head_dim
        widths = {"qkv": sizes, "gate_up": 2 * model.config.intermediate_size}
        attend = Attention.attend
        Attention.attend = lambda self, kv, queries, plan: torch.zeros_like(queries)
        matrices = [(layer, name) for layer in model.layers for name in ("qkv", "output", "gate_up", "down")]
        whole = [getattr(*each) for each in matrices]
        for layer, name in matrices:
            width = widths.get(name, model.config.hidden_size)
            setattr(layer, name, lambda x, width=width: x.new_zeros(len(x), width))
        model.extend([Rows(0, ids[:first], 0, last=True)], IDS)
        Attention.attend = attend
        for each, matrix in zip(matrices, whole):
            setattr(*each, matrix)
    model.extend([Rows(0, ids[first:], first, last=True)], IDS)


warm = globals()[name](PREFILL_CHUNK + 100)  # imports and kernels are what they will be
read(warm, PREFILL_CHUNK + 100)
needed = announced(warm.config, dtype, length, Form("cpu", compiled, 1))
del warm
gc.collect()
if compiled:
    from models.torch_llama.compiled.threads import pool

    pool()._buffers.clear()
peak = before = anonymous()
done = threading.Event()


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())


watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
read(globals()[name](length), length)
done.set()
watcher.join()
print(needed.bytes, needed.working, peak - before, time.perf_counter() - began)
"""
FORMS = [("bf16", "torch"), ("fp32", "torch"), ("bf16", "compiled"), ("fp32", "compiled")]
LONG = [("eight_billion", 32000), ("smollm2", 8000)]
CASES = [("modest", 1500, *form) for form in FORMS[:3]]
CASES += [pytest.param(*model, *form, marks=ON_DEMAND) for model in LONG for form in (FORMS[0], FORMS[2])]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("model", "length", "dtype", "form"), CASES)
def test_peak_memory_of_a_long_prompt_is_what_was_announced(model, length, dtype, form):
    """Weights, pages, and what forwards work with, from loading to the end of the prompt.

    As the kernel counts what belongs to no file; what a process takes for any model (imports, kernels) has been taken
    before. A chunk takes the more the later it is. The allocator gives back at once what is not needed.
    """
    if form == "compiled":
        pytest.importorskip("llvmlite")
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED, model, dtype, form, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | at_once)
    assert done.returncode == 0, done.stderr
    needed, working, peak, seconds = map(float, done.stdout.split())
    print(
        f"{model}, {length} tokens, {form}, {dtype}: announced {needed / 1e6:.0f} MB, of which {working / 1e6:.0f} MB "
        f"to work with; peak {peak / 1e6:.0f} MB, {seconds:.0f} s"
    )
    assert peak == pytest.approx(needed, rel=0.05)
    if model == "modest":  # where what a forward works with is much of it
        assert working > 0.2 * needed
