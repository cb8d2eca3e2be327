"""The paged cache: pages, what is shared, what is full, and that memory stays what it is said to be."""

import random

import pytest
import torch

from models.errors import UserError
from models.llama.config import RopeScaling
from models.speculative.model import LOGITS, Paged, Rows
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config
from models.torch_llama.kv_cache import KV_BLOCK, KVCache
from models.torch_llama.model import TorchLlama

CONFIG = tiny_config(num_hidden_layers=2, max_position_embeddings=1024)
TENSORS = random_tensors(CONFIG, 0)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**options) -> TorchLlama:
    return TorchLlama(CONFIG, TENSORS, **{"dtype": "fp32", "max_seq_len": 700, "slots": 3, **options})


def ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(CONFIG.vocab_size) for _ in range(count)]


def read(model: TorchLlama, slot: int, tokens: list[int], positions: int) -> tuple[int, torch.Tensor]:
    """(how many tokens were there already, logits after the last one)"""
    held = model.reserve(slot, tokens, positions)
    assert held is not None
    return held, model.extend([Rows(slot, tokens[held:], held, last=True)], LOGITS).logits(0)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "fp32"}, {"dtype": "bf16", "fixed_rows": 7}, {"dtype": "bf16", "compiled": True}],
    ids=["fp32", "bf16", "compiled"],
)
@pytest.mark.parametrize("ended", [False, True])
def test_a_shared_beginning_has_the_bits_of_one_read_anew(options, ended):
    """Of a sequence that is under way, or has ended, whatever follows and wherever it ends."""
    model, alone = build(**options), build(**options)
    assert isinstance(model, Paged)
    if not model.rows_alike:
        pytest.skip("on this machine rows depend on their number: only whole chunks are shared")
    first = ids(600, 1)
    assert read(model, 0, first, 650)[0] == 0
    if ended:
        model.free(0)
    for slot, length, common in ((1, 300, 290), (2, 560, 131), (1, 256, 256)):
        text = first[:common] + ids(length - common, length)
        held, logits = read(model, slot, text, 690)
        assert held == min(common, length - 1) // KV_BLOCK * KV_BLOCK > 0
        assert torch.equal(logits, read(alone, 0, text, 690)[1])
        alone.cache._found.clear()
        for i in range(3):
            rows = [Rows(slot, [i], length + i)]
            assert torch.equal(
                model.extend(rows, LOGITS).logits(0), alone.extend([Rows(0, [i], length + i)], LOGITS).logits(0)
            )


def test_a_block_is_found_only_behind_what_it_was_read_behind():
    """Its keys and values depend on all tokens before it, not on its own alone."""
    cpu = torch.device("cpu")
    cache = KVCache(1, 2, 4, dtype=torch.float32, device=cpu, slots=3, positions=4 * KV_BLOCK, spare=0, unit=KV_BLOCK)

    def held(slot: int, *blocks: list[int]) -> int:
        tokens = [token for block in blocks for token in block] + [0]
        count = cache.reserve(slot, tokens, len(tokens))
        cache.write(slot, count, len(tokens))
        cache.note(slot, count, tokens[count:])
        return count

    a, b, c = (ids(KV_BLOCK, seed) for seed in (1, 2, 3))
    assert held(0, a, b) == held(1, c, a) == 0
    assert held(2, c, b) == KV_BLOCK  # b was read behind a


def test_nobody_writes_into_what_others_share():
    model = build()
    text = ids(400, 2)
    read(model, 0, text, 500)
    read(model, 1, text, 500)
    before = model.slot(0).kv[:, :400].clone()
    model.extend([Rows(1, ids(20, 3), 130)], LOGITS)  # goes back behind the shared beginning
    assert torch.equal(model.slot(0).kv[:, :400], before)
    expected = build()
    expected.prefill(text[:130])
    expected.forward(ids(20, 3), 130)
    assert (model.slot(1).forward([7], 150) - expected.forward([7], 150)).abs().max() < 1e-4


def test_a_pool_that_is_full_says_so():
    model = build(pool=512)
    assert model.limits.pool == 512
    assert model.reserve(0, ids(10, 1), 300) == 0
    assert model.reserve(1, ids(10, 2), 300) is None
    model.free(0)
    assert model.reserve(1, ids(10, 2), 300) == 0
    with pytest.raises(UserError, match="513 positions exceeds the pool of 512"):
        model.reserve(2, (), 513)
    with pytest.raises(UserError, match="is full"):
        model.slot(2).prefill(ids(600, 4))


def test_a_thousand_sequences_enter_and_leave_at_constant_memory():
    model = build(pool=1024)
    draw = random.Random(5)
    prompts = [ids(200, seed) for seed in range(20)]
    for _ in range(1000):
        slot, prompt = draw.randrange(3), draw.choice(prompts)[: draw.randrange(1, 200)]
        held = model.reserve(slot, prompt, len(prompt) + draw.randrange(60))
        if held is None:
            model.free(slot)
            continue
        model.extend([Rows(slot, prompt[held:], held, last=True)])
        usage = model.cache.usage
        assert usage.live <= usage.held <= usage.capacity
        if draw.random() < 0.5:
            model.free(slot)
    for slot in range(3):
        model.free(slot)
    assert model.cache.usage.live == 0
    assert model.cache.idle == len(model.cache._owners) * KV_BLOCK


def test_many_sequences_in_one_forward_equal_each_alone():
    """One row here, seven there, a prompt beside them, and a tree."""
    model, alone = build(slots=5), build(slots=1)
    texts = [ids(length, length) for length in (20, 126, 250, 40)]
    for slot, text in enumerate(texts):
        model.slot(slot).prefill(text)
    rows = [
        Rows(0, ids(1, 1), 20),
        Rows(1, ids(7, 2), 126),
        Rows(2, ids(4, 3), 250, [-1, 0, 0, 1]),
        Rows(3, ids(1, 4), 40),
        Rows(4, ids(600, 5), 0, last=True),
    ]
    step = model.extend(rows, LOGITS)
    for i, each in enumerate(rows):
        if i < 4:
            alone.prefill(texts[i])
        expected = alone.extend([each._replace(slot=0)], LOGITS).logits(0)
        assert (step.logits(i) - expected).abs().max() < 1e-4
        assert step.ids()[i] == expected.argmax(-1).tolist()


def test_nine_thousand_positions_in_scattered_pages_equal_hf():
    scaling = RopeScaling(factor=32.0, original_max_position_embeddings=8192)
    config = tiny_config(num_hidden_layers=1, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    tensors, text = random_tensors(config, 5), ids(9000, 5)
    blocks = 75
    model = TorchLlama(config, tensors, dtype="fp32", max_seq_len=9000, slots=4, pool=blocks * KV_BLOCK - 32)
    for slot in (1, 2, 3):
        assert model.reserve(slot, (), 100) == 0
    model.free(2)
    assert read(model, 0, text[:-3], 9000)[0] == 0
    assert model.cache.tables[0].start is None  # what the others hold lies between its pages
    with torch.no_grad():
        expected = hf_model(config, tensors)(torch.tensor([text]), logits_to_keep=4).logits[0]
    again, logits = read(model, 0, text[:-3], 9000)  # all whole pages but those of the last tokens are there
    assert again == (8996 // model.cache.unit * model.cache.unit) > 8000
    assert (logits[-1] - expected[0]).abs().max() < 1e-4
    rows = model.extend([Rows(0, text[-3:], 8997)], LOGITS).logits(0)
    assert (rows - expected[1:]).abs().max() < 1e-4 < 1.0 < expected.abs().max()
