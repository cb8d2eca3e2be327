"""A draft head on a board equals the head in torch, given the same states; its fused round equals its parts."""

import dataclasses

import pytest
import torch
import ttnn

from models.errors import UserError
from models.speculative.model import LOGITS, PROMPT, DraftHead, Rows, Want
from models.tests.head_fixtures import head_config, random_head_tensors
from models.tests.ttnn.model_fixtures import VOCAB, Weights, board, on_chips, random_ids, reduced, row_pccs
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.model import TorchLlama
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.draft_head import TtnnHead
from models.ttnn_llama.programs.head_round import HeadRound
from models.ttnn_llama.weights.head_tensors import EMBEDDING, HeadTensors, head_specs
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import CheckpointSource

CONTEXT = 352
LAYERS = 3
TAPS = (0, 1, 3)
IDS = random_ids(CONTEXT, seed=31)
DRAFT_VOCAB = 768
OPTIONS = {
    "plain": {"draft_vocab": VOCAB},
    "reduced": {},
    "before residual": {"norm_before_residual": True},
    "each state": {"fc_norm": True},
    "all states": {"norm_before_fc": True},
    "output": {"norm_output": True},
    "everything": {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
}


@pytest.fixture(scope="module")
def mesh(mesh_opener):
    with board(mesh_opener) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def weights(mesh):
    return Weights.random(reduced("1B", mesh.get_num_devices(), layers=LAYERS, tie_word_embeddings=False), sharp=False)


@pytest.fixture(scope="module")
def target(mesh, weights):
    model = weights.on(mesh, max_seq_len=CONTEXT, runner=Runner(mesh, trace=False))
    model.keep_states(TAPS)
    return model


def config_of(weights, **options):
    chosen = {"taps": TAPS, "draft_vocab": DRAFT_VOCAB, **options}
    return head_config(weights.config, chosen.pop("draft_vocab"), **chosen)


def tensors_of(config, seed=3):
    return {name: t if name == "d2t" else t.bfloat16() for name, t in random_head_tensors(config, seed).items()}


def head_on(target, weights, config, tensors, precision="bf16"):
    named = precision_named(precision)
    both = HeadTensors(config, tensors, weights)
    total = len(head_specs(config, target.layout.chips, named))
    source = CheckpointSource(both, target.mesh_device, named, total=total)
    return TtnnHead(config, target, source, target_ids=both.target_ids, precision=named, max_seq_len=CONTEXT)


def reference(config, tensors, weights):
    return TorchHead(config, tensors, weights[EMBEDDING].float(), dtype="fp32", max_seq_len=CONTEXT)


def prefill(target, n):
    """The target reads n tokens: its states, on the board and in torch [n, taps x H]."""
    kept = target.extend([Rows(0, IDS[:n], 0)], PROMPT._replace(taps=TAPS)).features(0)
    chunks = [torch.cat([on_chips(x)[0][0, 0] for x in chunk], -1) for chunk in kept.chunks]
    return kept, torch.cat(chunks)[:n].float()


def in_buffers(kept, n):
    return torch.cat([on_chips(buffer)[0][0, 0, :n] for buffer in kept.states.buffers], -1).float()


@pytest.fixture(params=OPTIONS, scope="module")
def heads(request, target, weights):
    """A head of one kind on the board and in torch."""
    config = config_of(weights, **OPTIONS[request.param])
    tensors = tensors_of(config)
    return head_on(target, weights, config, tensors), reference(config, tensors, weights)


def test_a_head_on_a_board_is_a_draft_head(heads):
    assert isinstance(heads[0], DraftHead)


@pytest.mark.parametrize("n", [5, 128, 200])
def test_kept_states_are_the_models_hidden_states(target, weights, n):
    """Of a prompt all, and its last row in the buffers; of a decode or a verification the rows, each forward anew."""
    torch_target = TorchLlama(weights.config, weights, dtype="fp32", max_seq_len=CONTEXT)
    with torch_target.tap(TAPS) as expected:
        torch_target.prefill(IDS[:n])
    expected = torch.cat(expected, -1)
    kept, states = prefill(target, n)
    assert min(row_pccs(states, expected)) > 0.998
    assert torch.equal(in_buffers(kept, 1)[0], states[-1])
    for rows in (1, 4, 9):
        with torch_target.tap(TAPS) as expected:
            torch_target.forward(IDS[n : n + rows], n)
        for want in (Want(taps=TAPS), LOGITS._replace(taps=TAPS)):
            before = kept
            kept = target.extend([Rows(0, IDS[n : n + rows], n)], want).features(0)
            assert not before.lasting and kept.lasting
            assert min(row_pccs(in_buffers(kept, rows), torch.cat(expected, -1))) > 0.998


def test_plain_forwards_keep_nothing(target):
    kept, _ = prefill(target, 40)
    held = in_buffers(kept, 32)
    target.greedy(IDS[40:43], 40)
    assert kept.lasting and torch.equal(in_buffers(kept, 32), held)


@pytest.mark.parametrize("n", [2, 3, 130, 300])
def test_a_head_equals_the_torch_head(heads, target, n):
    """Prompt, first token, seven steps on its own states, rows after a verification, reading, rows again."""
    head, torch_head = heads
    kept, states = prefill(target, n)
    head.states(kept, range(n), 0)
    torch_head.states(states, range(n), 0)
    for each in heads:
        each.read(IDS[1:n], 1)
    compared = []

    def compare(tokens, position):
        mine, theirs = (each.forward(tokens, position) for each in heads)
        compared.extend(row_pccs(mine, theirs))
        return theirs

    compare(IDS[n : n + 1], n)
    for step in range(7):
        compare(IDS[n + 1 + step : n + 2 + step], n + 1 + step)
    for rows, taken in ((5, 3), (9, 9), (1, 1)):
        kept = target.extend([Rows(0, IDS[n : n + rows], n)], Want(taps=TAPS)).features(0)
        head.states(kept, range(taken), n)
        torch_head.states(in_buffers(kept, rows), range(taken), n)
        n += taken
        if taken == 9:
            for each in heads:
                each.read(IDS[n - 8 : n - 3], n - 8)
            compare(IDS[n - 3 : n + 1], n - 3)
        else:
            compare(IDS[n + 1 - taken : n + 1], n + 1 - taken)
        compare(IDS[n + 1 : n + 2], n + 1)
    assert min(compared) > 0.998


def test_states_of_rows_in_any_places_are_found(heads, target):
    """As of a tree's path."""
    head, torch_head = heads
    kept, states = prefill(target, 20)
    for each, given in zip(heads, (kept, states), strict=True):
        each.states(given, range(20), 0)
        each.read(IDS[1:21], 1)
    kept = target.extend([Rows(0, IDS[20:28], 20)], Want(taps=TAPS)).features(0)
    for each, given in zip(heads, (kept, in_buffers(kept, 8)), strict=True):
        each.states(given, [0, 3, 7], 20)
    mine, theirs = (each.forward(IDS[30:33], 21) for each in heads)
    assert min(row_pccs(mine, theirs)) > 0.998
