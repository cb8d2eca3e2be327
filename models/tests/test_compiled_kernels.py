"""Compiled layers against plain formulas, bit by bit in any company, and their threads."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("llvmlite")

from models.llama.rope import rope_tables
from models.speculative.tree import tree_depths
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.attention import Part
from models.torch_llama.compiled import LANES, network, threads
from models.torch_llama.compiled.builder import F32, INT, Module
from models.torch_llama.compiled.kernels import FUNCTIONS, Layers
from models.torch_llama.compiled.machine_code import Machine, load
from models.torch_llama.compiled.network import CompiledLayers
from models.torch_llama.kv_cache import KVCache, Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
# Of numbers of about 1; a cache of 16 bits rounds keys and values.
CLOSE = {
    "fp32": 2e-5,
    "bf16": 0.05,
    "fp16": 0.01,
    "int8": 2e-5,
}
SIZES = {  # hidden, intermediate, query heads, KV heads, D
    "odd": (80, 200, 5, 1, 16),
    "wide": (128, 192, 4, 2, 32),
    "eighty": (64, 64, 2, 1, 80),
    "ninety-six": (96, 160, 3, 3, 96),
    "sixty-four": (192, 320, 3, 1, 64),
}
TREE = [-1, 0, 0, 1, 1, 2, 4, 6]  # the paths of its rows begin at row 0
TALL = list(range(-1, 19)) + [3, 3, 20]


def config_of(size):
    hidden, inner, heads, kv, dim = SIZES[size]
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv)
    return tiny_config(**sizes, head_dim=dim, vocab_size=100, tie_word_embeddings=True)


def rounded(weight):
    """A matrix [out, in] whose rows are whole multiples of their scales, the largest of 127."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round() * scales


class Model:
    """Compiled layers with a cache of six blocks, and the formulas."""

    def __init__(self, size="odd", dtype="fp32", seed=0):
        self.config = config = config_of(size)
        self.dtype = DTYPES[dtype]
        tensors = random_tensors(config, seed)
        self.tensors = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
        width = 2 * config.num_key_value_heads
        options = dict(dtype=self.dtype, device=torch.device("cpu"), slots=1, positions=768, spare=0, key_group=LANES)
        self.cache = KVCache(config.num_hidden_layers, width, config.head_dim, **options)
        self.head = head = self.tensors["model.embed_tokens.weight"]
        int8 = dtype == "int8"
        self.network = CompiledLayers(config, self.tensors.__getitem__, lambda: head, self.cache, 700, int8)
        if int8:  # what the formulas multiply with
            self.tensors = {name: rounded(t) if t.ndim == 2 else t for name, t in self.tensors.items()}
            self.head = self.tensors["model.embed_tokens.weight"]

    def rows(self, count, seed):
        return torch.randn(count, self.config.hidden_size, generator=torch.Generator().manual_seed(seed))

    def forward(self, *parts, first=0, stop=None):
        """Logits of parts (rows, blocks, position[, root of a tree, its parents])."""
        made = []
        for x, blocks, position, *tree in parts:
            table = Table(blocks)
            table.changed()
            made.append(Part(table, position, len(x), len(x), tuple(tree) or None))
        x = torch.cat([part[0] for part in parts])
        stop = self.config.num_hidden_layers if stop is None else stop
        return self.network.logits(self.network.run(x, self.network.plan(made), first, stop)[0])[1]

    def formulas(self, x, seen, stands):
        """Logits of rows that stand at these positions and see these rows [n, n]."""
        config = self.config
        heads, kv, dim, n = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(x)
        cos, sin = (table[stands][:, None] for table in rope_tables(config, 700))

        def rotate(a):
            return a * cos + torch.cat((a[..., dim // 2 :], a[..., : dim // 2]), -1) * sin

        def norm(a, name):
            return F.rms_norm(a, a.shape[-1:], self.tensors[name].float(), config.rms_norm_eps)

        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            w = {name: self.tensors[f"{prefix}{name}.weight"].float() for name in self._matrices}
            normed = norm(x, prefix + "input_layernorm.weight")
            q = rotate((normed @ w["self_attn.q_proj"].T).view(n, heads, dim))
            k = rotate((normed @ w["self_attn.k_proj"].T).view(n, kv, dim)).to(self.dtype).float()
            v = (normed @ w["self_attn.v_proj"].T).view(n, kv, dim).to(self.dtype).float()
            k, v = (each.repeat_interleave(heads // kv, 1).transpose(0, 1) for each in (k, v))
            scores = (q.transpose(0, 1) @ k.transpose(1, 2) * dim**-0.5).masked_fill(~seen, -torch.inf)
            found = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * dim)
            x = x + found @ w["self_attn.o_proj"].T
            normed = norm(x, prefix + "post_attention_layernorm.weight")
            gated = F.silu(normed @ w["mlp.gate_proj"].T) * (normed @ w["mlp.up_proj"].T)
            x = x + gated @ w["mlp.down_proj"].T
        return norm(x, "model.norm.weight") @ self.head.float().T

    _matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj") + tuple(
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    )


@pytest.fixture(autouse=True)
def torch_threads():
    """The number of threads is what it was, behind each test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def odd():
    return Model()


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def path_of(parents, row):
    """Rows from the root to this one."""
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def close(a, b, dtype):
    torch.testing.assert_close(a, b, atol=CLOSE[dtype], rtol=CLOSE[dtype])


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_is_what_the_formulas_say(size, dtype):
    """Of rows that end within a vector of positions, a panel, a block, or behind them."""
    model = Model(size, dtype)
    for n in (1, 7, 20, 40, 131, 150):
        x = model.rows(n, n)
        close(model.forward((x, [4, 0], 0)), model.formulas(x, causal(n), torch.arange(n)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tree_is_what_the_formulas_say(dtype):
    model = Model("sixty-four", dtype)
    n = 125  # its rows are in two blocks
    x = model.rows(n + len(TREE), 1)
    model.forward((x[:n], [3, 1], 0))
    seen = causal(n + len(TREE))
    for row in range(len(TREE)):
        seen[n + row, n:] = False
        seen[n + row, [n + other for other in path_of(TREE, row)]] = True
    stands = torch.tensor([*range(n), *(n + depth for depth in tree_depths(TREE))])
    close(model.forward((x[n:], [3, 1], n, n, TREE)), model.formulas(x, seen, stands)[n:], dtype)


def test_a_row_that_is_not_finite_has_logits_that_are_not(odd):
    x = odd.rows(9, 2)
    clean = odd.forward((x, [0], 0))
    x[8] = torch.nan
    logits = odd.forward((x, [0], 0))
    assert torch.isfinite(clean).all()
    assert logits[8].isnan().all()
    assert torch.equal(logits[:6], clean[:6])  # those that attention does not take together with it


def test_layers_one_by_one_are_all_layers(odd):
    x = odd.rows(5, 3)
    together = odd.forward((x, [2], 0))
    table = Table([2])
    table.changed()
    plan = odd.network.plan([Part(table, 0, 5, 5)])
    for layer in range(odd.config.num_hidden_layers):
        x, _ = odd.network.run(x, plan, layer, layer + 1)
    assert torch.equal(odd.network.logits(x)[1], together)


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["odd", "sixty-four", "eighty"])
def test_a_row_has_the_same_bits_in_any_company(size, dtype, torch_threads):
    """Alone, among any number of rows, in a prompt, beside other sequences, along a tree; whatever the threads."""
    model = Model(size, dtype)
    n, blocks, others = 170, [5, 2], [0, 3]
    x, y = model.rows(n, 4), model.rows(n, 5)
    prompt = model.forward((x, blocks, 0))
    for count in (1, 2, 3, 5, 6, 8, 13, 19, 40):
        torch_threads(1 + count % 3)
        start = 120 - count % 7  # some end in the second block
        model.forward((model.rows(count, 6), blocks, start))  # what was there is written anew
        assert torch.equal(model.forward((x[start : start + count], blocks, start)), prompt[start : start + count])
        for row in range(start, start + count, 7):
            assert torch.equal(model.forward((x[row : row + 1], blocks, row)), prompt[row : row + 1])
    torch_threads(2)
    model.forward((y[:60], others, 0))
    together = model.forward((x[100:104], blocks, 100), (y[60:90], others, 60), (x[104:106], blocks, 104))
    assert torch.equal(torch.cat((together[:4], together[-2:])), prompt[100:106])
    assert torch.equal(together[4:-2], model.forward((y[:90], others, 0))[60:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parents", [TREE, TALL], ids=["bushy", "tall"])
def test_a_path_of_a_tree_has_the_bits_of_its_text(parents, dtype):
    model = Model("sixty-four", dtype)
    n = 121
    x, rows = model.rows(n, 7), model.rows(len(parents), 8)
    model.forward((x, [1, 4], 0))
    half = len(parents) // 2
    drafted = model.forward((rows[:half], [1, 4], n, n, parents[:half]))
    drafted = torch.cat((drafted, model.forward((rows[half:], [1, 4], n + half, n, parents))))
    for row in range(len(parents)):
        path = path_of(parents, row)
        assert torch.equal(drafted[row], model.forward((rows[path], [1, 4], n))[-1])


def test_another_cpu_of_the_family_computes_the_same_formulas(odd, monkeypatch):
    """With registers of half the width, tiles are smaller."""
    host = Machine()
    if not host.triple.startswith("x86_64") or not {"+avx2", "+fma"} <= set(host.features.split(",")):
        pytest.skip("code for such a CPU does not run here")
    machine = Machine("haswell", "")
    assert machine.registers < 32
    x = odd.rows(40, 9)
    expected = odd.forward((x, [0], 0))
    code = machine.link(machine.compile(Layers(F32, machine).module), FUNCTIONS)
    monkeypatch.setattr(network, "load_layers", lambda stored: code)
    other = Model()
    logits = other.forward((x, [0], 0))
    close(logits, expected, "fp32")
    assert torch.equal(other.forward((x[:7], [0], 0)), logits[:7])


# ---- threads --------------------------------------------------------------------------------------------------------


def test_calls_from_several_threads_at_once_are_apart(odd, torch_threads):
    models = [odd, Model("wide", "bf16", 1), Model("odd", "fp32", 2)]
    torch_threads(3)
    xs = [model.rows(9, 10 + i) for i, model in enumerate(models)]
    expected = [model.forward((x, [0], 0)) for model, x in zip(models, xs, strict=True)]
    wrong = []

    def call(which):
        torch.set_num_threads(2 + which % 2)
        for _ in range(60):
            if not torch.equal(models[which].forward((xs[which], [0], 0)), expected[which]):
                wrong.append(which)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_number_of_threads_may_change_from_call_to_call(odd, torch_threads):
    x = odd.rows(30, 13)
    expected = odd.forward((x, [0], 0))
    for count in [3, 1, 2, 5, 1, 4] * 10:
        torch_threads(count)
        assert torch.equal(odd.forward((x, [0], 0)), expected)
        if count == 4:
            time.sleep(0.002)  # workers have gone to sleep


def test_threads_that_have_nothing_to_do_take_no_time(odd, torch_threads):
    torch_threads(3)
    odd.forward((odd.rows(3, 14), [0], 0))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


def test_an_interrupt_leaves_nothing_half_done(odd, torch_threads):
    torch_threads(3)
    x = odd.rows(40, 15)
    expected = odd.forward((x, [0], 0))
    interrupts = 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00003 * i)
                while True:
                    odd.forward((x, [0], 0))
            except KeyboardInterrupt:
                interrupts += 1
            assert torch.equal(odd.forward((x, [0], 0)), expected)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_child_has_threads_of_its_own(odd, torch_threads):
    torch_threads(3)
    x = odd.rows(12, 16)
    expected = odd.forward((x, [0], 0))
    locked, done = threading.Event(), threading.Event()

    def hold():  # another thread is within a call meanwhile
        with threads.pool().lock:
            locked.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(odd.forward((x, [0], 0)), expected) for _ in range(5)) else 1)
    done.set()
    holder.join()
    deadline = time.monotonic() + 60
    status = (0, 0)
    while not status[0] and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not status[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)
    assert torch.equal(odd.forward((x, [0], 0)), expected)


_ENDS = """
import torch
from models.tests.test_compiled_kernels import Model
torch.set_num_threads(4)
model = Model()
for _ in range(20):
    model.forward((model.rows(9, 0), [0], 0))
"""


def test_a_process_ends_while_workers_wait():
    done = subprocess.run([sys.executable, "-c", _ENDS], timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0


# ---- code that is kept ----------------------------------------------------------------------------------------------


SMALL = {"twice": (ctypes.c_int64, ctypes.c_int64)}


def small(machine):
    """A module with one function."""
    module = Module("small", machine.triple)

    @module.function(INT, result=INT, export=True)
    def twice(code, x):
        return x + x

    return module


def test_code_is_compiled_once_and_again_if_its_file_is_damaged(tmp_path):
    made = []

    def make(machine):
        made.append(machine)
        return small(machine)

    def works(source=b"one"):
        code = load("small", make, SMALL, (source,), tmp_path / "kept")
        return code["twice"](21) == 42

    assert works() and works() and len(made) == 1
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-100] + bytes(100), whole[:50], b""):
        made.clear()
        file.write_bytes(damaged)
        assert works() and len(made) == 1
        assert file.read_bytes() == whole
    assert works(b"two")  # other sources: another file
    assert len(made) == 2 and len(list((tmp_path / "kept").iterdir())) == 2


def test_code_is_not_kept_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert load("small", small, SMALL, (), tmp_path / "file" / "kept")["twice"](4) == 8
