"""Compiled layers: when they are used, what they refuse, and that what was measured is kept."""

import json

import pytest
import torch

from models import LLM, loading
from models.errors import UserError
from models.options import EngineOptions
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.compiled import choice
from models.torch_llama.compiled.choice import Comparison, compare, compiles
from models.torch_llama.compiled.linear import CompiledLinear
from models.torch_llama.model import TorchLlama


def found(ratio, error=0.01):
    return Comparison(ratio, error, "2026-01-01")


@pytest.mark.parametrize(
    ("ratio", "error", "faster", "certain"),
    [
        (2.0, 0.3, True, True),
        (2.0, 0.4, True, False),
        (1.02, 0.04, True, True),
        (0.9, 0.06, False, False),
        (0.5, 0.1, False, True),
    ],
)
def test_which_is_faster_and_whether_that_is_certain(ratio, error, faster, certain):
    comparison = found(ratio, error)
    assert (comparison.faster, comparison.certain) == (faster, certain)


def test_a_comparison_is_measured_once_and_kept(tmp_path, monkeypatch):
    config, calls = tiny_config(), []

    def measure(*args):
        calls.append(args)
        return found(1.5)

    monkeypatch.setattr(choice, "measure", measure)
    assert compare(config, "bf16", 1, tmp_path) == compare(config, "bf16", 1, tmp_path) == found(1.5)
    assert len(calls) == 1
    compare(config, "fp32", 1, tmp_path)
    assert len(calls) == 2
    for file in tmp_path.iterdir():
        file.write_text(json.dumps({"ratio": "fast"}))
    compare(config, "bf16", 1, tmp_path)
    assert len(calls) == 3


def test_an_uncertain_comparison_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *_: found(1.1, 0.2))
    assert compare(tiny_config(), "bf16", 1, tmp_path).faster
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_thread")
def test_both_forms_are_really_timed():
    comparison = choice.measure(tiny_config(dtype="bfloat16"), "bf16", seconds=0.1)
    assert 0.05 < comparison.ratio < 200 and comparison.error >= 0


def test_what_cannot_be_compiled_is_not_compared(monkeypatch):
    monkeypatch.setattr(choice, "compare", lambda *_: pytest.fail("compared"))
    assert not compiles(tiny_config(head_dim=24), "bf16")
    monkeypatch.setattr(choice, "int8_works", lambda: False)
    assert compiles(tiny_config(), "int8")  # torch cannot


@pytest.mark.parametrize("faster", [False, True])
def test_a_target_is_compiled_where_that_is_faster(faster, monkeypatch):
    monkeypatch.setattr(loading, "compiles", lambda *_: faster)
    with LLM.load(max_seq_len=256) as llm:
        assert llm.options.compiled == llm.target.model.compiled == llm.draft.model.compiled == faster
        if faster:
            assert llm.options.row_invariant and llm.options.fixed_rows is None


@pytest.mark.parametrize("options", [{}, {"drafter": "tree"}, {"drafter": "head"}, {"drafter": "early-exit"}])
def test_compiled_text_is_the_same_with_and_without_drafts_in_bf16(options):
    prompts = ["def add(a, b):", "class Stack:", "import os\n"]
    with LLM.load(compiled=True, max_seq_len=256, **options) as llm:
        for prompt in prompts:
            drafted = llm.generate(prompt, max_new_tokens=60)
            plain = llm.generate(prompt, max_new_tokens=60, speculate=False)
            assert drafted.token_ids == plain.token_ids and drafted.stats.rounds


@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), ("int8", "int8"), ("int8", "fp16")])
def test_target_and_draft_may_be_of_any_dtypes(dtypes):
    with LLM.load(compiled=True, dtype=dtypes[0], draft_dtype=dtypes[1], max_seq_len=256) as llm:
        assert llm.target.model.compiled and llm.draft.model.compiled
        assert (llm.target.dtype, llm.draft.dtype) == dtypes
        drafted = llm.generate("def add(a, b):", max_new_tokens=20)
        assert drafted.stats.acceptance_rate > 0
        assert llm.generate("def add(a, b):", max_new_tokens=20, speculate=False).token_ids == drafted.token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "meta"}, "run on the CPU only, not on meta"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(options, words):
    config = tiny_config()
    with pytest.raises(UserError, match=words):
        TorchLlama(config, random_tensors(config, 0), compiled=True, max_seq_len=64, **options)
    with pytest.raises(UserError, match="heads of whole vectors of 16 numbers, not of 24"):
        TorchLlama(tiny_config(head_dim=24), {}, compiled=True, max_seq_len=64)


def test_a_board_has_no_use_for_them():
    with pytest.raises(UserError, match=r"compiled.*has no meaning with"):
        EngineOptions(device="tt", compiled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out, width", [(100, 80), (640, 1152), (64, 64)])
def test_a_linear_by_itself(dtype, out, width):
    weight = (torch.randn(out, width) * width**-0.5).to(dtype)
    linear, x = CompiledLinear(weight), torch.randn(40, width)
    expected = x @ weight.float().T
    for n in (1, 3, 7, 40):
        torch.testing.assert_close(linear(x[:n]), expected[:n], rtol=1e-4, atol=1e-4)
        assert torch.equal(linear(x[:n])[-1], linear(x[n - 1 : n].clone())[0])
    assert linear.bytes >= weight.nbytes
