"""Arguments of a wrong type: a UserError that names them, never another text, and the next request works."""

import numpy
import pytest
import torch

from models import LLM, SamplingParams, UserError
from models.options import CHECKPOINTS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.fault]


@pytest.fixture(scope="module")
def llm():
    with LLM.load("tiny", dtype="fp32", max_seq_len=64) as loaded:
        yield loaded


PROMPTS = [None, 5, 1.5, b"abc", {"role": "user", "content": "a"}, {1, 2}, [1.5], [None], [1, "a"], ("a", "b"), [[[1]]]]
OPTIONS = [
    *({"max_new_tokens": value} for value in (1.5, "3", None)),
    *({"stop": value} for value in (5, [1], b"a", [None], "", [""])),
    *({"stop_ids": value} for value in ("abc", [1.5], [None], 5)),
    *({"speculate": value} for value in ("yes", "no", "", 0, 1, None, [], {"drafter": "none"})),
    *({"sampling": value} for value in (0.5, "greedy", {"temperature": 1}, [], [SamplingParams()])),
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_a_prompt_of_another_type(llm, prompt):
    with pytest.raises(UserError, match="prompt"):
        llm.generate(prompt, max_new_tokens=2)
    assert llm.engine.idle and len(llm.generate("def", max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_an_option_of_another_type(llm, options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        llm.generate("def", **({"max_new_tokens": 2} | options))
    assert llm.engine.idle and len(llm.generate("def", max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "seed"])
@pytest.mark.parametrize("value", ["1", None, [1]])
def test_sampling_of_another_type(name, value):
    with pytest.raises(UserError, match=f"{name} .*must be a"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "seed"])
def test_half_a_number(name):
    with pytest.raises(UserError, match=f"{name} 1.5: must be a whole number"):
        SamplingParams(**{name: 1.5})


@pytest.mark.parametrize("kind", [list, tuple, numpy.array, torch.tensor])
def test_ids_of_any_whole_type_are_ids(llm, kind):
    ids = [5, 6, 7]
    expected = llm.generate(ids, max_new_tokens=3).token_ids
    assert llm.generate(kind(ids), max_new_tokens=3, stop_ids=kind([4000])).token_ids == expected


@pytest.mark.parametrize("options", [{"target": 5}, {"target": None}, {"draft": 5}, {"drafter": []}], ids=repr)
def test_a_model_or_a_drafter_of_another_type(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        LLM.load(**options)


def test_models_may_be_paths():
    with LLM.load(CHECKPOINTS / "tiny-target", CHECKPOINTS / "tiny-draft", max_seq_len=64) as llm:
        assert llm.generate("def", max_new_tokens=2).token_ids
