"""Whether rows are alike is tried once for what a choice of kernels can go by; that they are: `test_torch_llama`."""

import pytest

from models.tests.engine_fixtures import build, engine_config
from models.tests.llama_fixtures import random_tensors
from models.torch_llama import invariance


def loaded(seed=0, vocab_size=24, **options):
    config = engine_config(vocab_size, layers=1)
    return build(config, random_tensors(config, seed), row_invariant=True, **options)


@pytest.mark.parametrize("other", [{"vocab_size": 40}, {"dtype": "bf16"}, {"typical_rows": 32}])
def test_models_of_equal_sizes_are_tried_once_in_a_process(other, monkeypatch):
    tried, real = [], invariance._try

    def noted(*arguments):
        tried.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(invariance, "_tried", {})
    monkeypatch.setattr(invariance, "_try", noted)
    models = [loaded(seed) for seed in range(3)]
    assert len(tried) == 1
    assert len({model.row_invariant for model in models}) == 1
    loaded(**other)
    assert len(tried) == 2
