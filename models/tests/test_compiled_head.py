"""The compiled layer of a draft head against the one in torch operations, and its rows in any company."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("llvmlite")

from models import loading
from models.errors import UserError
from models.llm import LLM
from models.speculative.model import LOGITS, Rows
from models.tests.engine_fixtures import random_prompt
from models.tests.head_fixtures import head_config, random_head_tensors
from models.tests.llama_fixtures import tiny_config
from models.torch_llama.draft_head import TorchHead

TREE = [-1, 0, 0, 1, 1, 2]
SWITCHES = [
    {},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True, "norm_before_residual": True},
    {"norm_output": True},
]
SIZES = [dict(hidden_size=96, intermediate_size=200), dict(hidden_size=128, intermediate_size=192)]


def heads_of(size, dtype="fp32", quantize=None, slots=1, tensors=None, **switches):
    """(in torch operations, compiled), of the same weights."""
    target = tiny_config(**size, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = head_config(target, 60, **switches)
    made = random_head_tensors(config, 1)
    embedding = torch.randn(target.vocab_size, target.hidden_size, generator=torch.Generator().manual_seed(2))
    options = dict(dtype=dtype, max_seq_len=200, slots=slots)
    plain = TorchHead(config, tensors(made) if tensors else made, embedding, **options)
    return plain, TorchHead(config, made, embedding, compiled=True, quantize=quantize, **options)


def states_of(head, count, seed=3):
    width = len(head.taps) * head.config.target_hidden_size
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def everything(head, prompt):
    """Logits of a prompt's last row, of rows of the text, of a chain after them, and of a tree's rows."""
    n = len(prompt)
    head.states(states_of(head, n), range(n), 0)
    found = [head.prefill(prompt[:-2])[None], head.forward(prompt[-2:], n - 2)]
    found += [head.forward([token], n + i) for i, token in enumerate((5, 6, 7))]
    head.states(states_of(head, 1, 4), range(1), n)
    found.append(head.forward([9], n))  # the root, computed again
    found.append(head.forward([3, 4], n, TREE[:3]))
    found.append(head.forward([5, 6, 7], n, TREE))
    return torch.cat(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("switches", SWITCHES)
def test_it_computes_what_torch_does(size, switches):
    plain, compiled = heads_of(size, **switches)
    prompt = random_prompt(40, 1)
    torch.testing.assert_close(everything(compiled, prompt), everything(plain, prompt), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("switches", SWITCHES[1:3])
def test_int8_is_that_of_rounded_matrices(switches):
    def rounded(tensors):
        scales = {name: t.abs().amax(1, keepdim=True) / 127 for name, t in tensors.items() if t.ndim == 2}
        return tensors | {name: (tensors[name] / scale).round() * scale for name, scale in scales.items()}

    plain, compiled = heads_of(SIZES[0], quantize="int8", tensors=rounded, **switches)
    prompt = random_prompt(40, 1)
    torch.testing.assert_close(everything(compiled, prompt), everything(plain, prompt), atol=2e-4, rtol=2e-4)
    assert compiled.weight_bytes < plain.weight_bytes / 2.5


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rows_are_the_same_in_any_company(dtype, quantize):
    _, compiled = heads_of(SIZES[0], dtype, quantize, slots=3)
    prompts = [random_prompt(length, length) for length in (30, 17, 41)]
    alone = []
    for prompt in prompts:
        head = compiled.slot(0)
        head.free(0)
        head.states(states_of(head, len(prompt)), range(len(prompt)), 0)
        rows = [head.forward([token], i) for i, token in enumerate(prompt[1:], 1)]  # each by itself
        alone.append(torch.cat([rows[-1], head.forward([3], len(prompt)), head.forward([4, 5], len(prompt), TREE[:3])]))
    compiled.free(0)
    for slot, prompt in enumerate(prompts):
        compiled.slot(slot).states(states_of(compiled, len(prompt)), range(len(prompt)), 0)
    last = compiled.extend([Rows(i, p, 0, last=True) for i, p in enumerate(prompts)], LOGITS)
    drafted = compiled.extend([Rows(i, [3], len(p)) for i, p in enumerate(prompts)], LOGITS)
    tree = compiled.extend([Rows(i, [4, 5], len(p), TREE[:3]) for i, p in enumerate(prompts)], LOGITS)
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([step.logits(i) for step in (last, drafted, tree)]), expected)


def test_a_head_that_cannot_be_compiled_is_refused_and_has_the_targets_dtype_by_default():
    target = tiny_config(head_dim=24)
    config = head_config(target, 60)
    with pytest.raises(UserError, match="heads of whole vectors of 16 numbers, not of 24"):
        TorchHead(config, random_head_tensors(config, 1), torch.zeros(target.vocab_size, 64), compiled=True)
    for layer, dtype in ((config, "bf16"), (head_config(tiny_config(head_dim=32), 60), "int8")):
        opened = SimpleNamespace(checkpoint=SimpleNamespace(config=layer))
        assert loading._compiled_draft_dtype(opened, "bf16") == dtype


@pytest.mark.parametrize("drafter", ["model", "head"])
def test_a_draft_beside_a_compiled_target_is_int8_unless_asked_otherwise(drafter):
    sizes = {}
    for dtype in (None, "bf16"):
        with LLM.load(compiled=True, drafter=drafter, draft_dtype=dtype, max_seq_len=256) as llm:
            assert llm.options.draft_dtype == llm.draft.dtype == (dtype or "int8")
            assert llm.draft.model.compiled
            sizes[dtype] = llm.draft.model.weight_bytes
            assert llm.generate("def add(a, b):", max_new_tokens=20).stats.acceptance_rate > 0
    assert sizes[None] < 0.6 * sizes["bf16"]
    with LLM.load(compiled=True, drafter=drafter, dtype="fp32", max_seq_len=256) as llm:
        assert llm.draft.dtype == "fp32"
