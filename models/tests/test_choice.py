"""Choosing ids by logits: as argmax does, and in fp32 where logits are equal."""

import pytest
import torch

from models.speculative.model import LOGITS, Rows
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.choice import MOST_CANDIDATES, Head, greatest
from models.torch_llama.model import TorchLlama


@pytest.mark.parametrize("size", [64, 4096, 49152, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greatest_is_that_of_argmax(size, dtype):
    generator = torch.Generator().manual_seed(size)
    logits = (4 * torch.randn(32, size, generator=generator)).to(dtype)
    logits[5, 3] = logits[5, -1] = logits[5].max() + 1  # equal, far apart
    logits[6, 10] = logits[6, 11] = logits[6].max() + 1  # equal, side by side
    logits[7] = 0
    logits[8, 20] = logits[8, 40] = float("nan")
    logits[9] = float("-inf")
    ids, equal = greatest(logits)
    assert torch.equal(ids, logits.argmax(-1))
    counts = (logits == logits.max(-1, keepdim=True).values).sum(-1)
    assert torch.equal(equal, counts > 1)
    assert equal[5] and equal[6] and equal[7] and not equal[8]


def test_equal_logits_are_decided_by_what_they_were_computed_from():
    weight = torch.zeros(256, 8, dtype=torch.bfloat16)
    weight[3, 0] = weight[200, 0] = 1.0
    weight[200, 1] = 2**-12
    hidden = torch.ones(2, 8, dtype=torch.bfloat16)
    hidden[1, 1] = -1
    logits = (hidden.float() @ weight.float().T).bfloat16()
    assert logits[0, 3] == logits[0, 200] == logits[1, 3] == logits[1, 200]
    assert Head(weight).choose(logits, hidden) == [200, 3]
    assert Head(None).choose(logits, hidden) == [3, 3]


def test_too_many_equal_logits_are_left_to_the_lowest_id():
    weight = torch.zeros(256, 8)
    weight[9] = 1.0
    logits = torch.zeros(1, 256)
    logits[0, : MOST_CANDIDATES + 1] = 1.0
    assert Head(weight).choose(logits, torch.ones(1, 8)) == [0]
    logits[0, MOST_CANDIDATES] = 0.0
    assert Head(weight).choose(logits, torch.ones(1, 8)) == [9]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_decides_equal_logits_alike_in_all_its_forwards(tied):
    """Another token is made to score what the best does, but for a little that bf16 does not show."""
    config = tiny_config(tie_word_embeddings=tied)
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(config, 0).items()}
    rows = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    model = TorchLlama(config, tensors, max_seq_len=256, fixed_rows=5)
    ids = torch.randint(0, config.vocab_size, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    model.prefill(ids[:-1])
    best = model.forward(ids[-1:], len(ids) - 1).argmax().item()
    other = 3 if best > 3 else best + 5
    rows[other] = rows[best]
    scores = model._scored[0].float()
    column = (scores * rows[best].float()).abs().argmin().item()  # hardly matters
    up = 9 if scores[column] > 0 else -9
    step = torch.nextafter(rows[best, column], torch.tensor(up, dtype=torch.bfloat16))
    rows[max(best, other), column] = step
    model = TorchLlama(config, tensors, max_seq_len=256, fixed_rows=5)
    logits = model.extend([Rows(0, ids, 0, last=True)], LOGITS)
    assert logits.logits(0)[0, best] == logits.logits(0)[0, other]
    assert logits.logits(0)[0].argmax().item() == min(best, other)
    assert logits.ids()[0] == [max(best, other)]
    assert model.greedy(ids[-1:], len(ids) - 1) == [max(best, other)]
    assert model.greedy([*ids[-1:], 1, 2], len(ids) - 1)[0] == max(best, other)
