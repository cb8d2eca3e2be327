"""A draft head on a board equals the head in torch, given the same states; its fused round equals its parts."""

import dataclasses

import pytest
import torch
import ttnn

from models.errors import UserError
from models.speculative.model import LOGITS, DraftHead, Rows, Want
from models.tests.head_fixtures import head_config, made_to_agree, random_head_tensors
from models.tests.llama_fixtures import random_tensors
from models.tests.ttnn.model_fixtures import VOCAB, Weights, on_chips, random_ids, reduced, row_pccs
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
    "output": {"norm_output": True},
    "everything": {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
}


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
    kept = target.extend([Rows(0, IDS[:n], 0, last=True)], LOGITS._replace(taps=TAPS)).features(0)
    chunks = [torch.cat([on_chips(x)[0][0, 0] for x in chunk], -1) for chunk in kept.chunks]
    return kept, torch.cat(chunks)[:n].float()


def in_buffers(kept, n):
    return torch.cat([on_chips(buffer)[0][0, 0, :n] for buffer in kept.states.buffers], -1).float()


key_boards = pytest.mark.key_boards
# Switches of the head's arithmetic are the same on all boards: one kind with all of them, one reduced.
EVERYWHERE = ("reduced", "everything")


@pytest.fixture(params=[n if n in EVERYWHERE else pytest.param(n, marks=key_boards) for n in OPTIONS], scope="module")
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


# ------------------------------------------------------------------------------------------------------------ rounds
LENGTHS = (1, 4, 9)


class Pair:
    """A target and a head that agree some of the time, as much as `noise` leaves, with rounds of all LENGTHS."""

    def __init__(self, mesh, noise, **options):
        config = reduced("1B", mesh.get_num_devices(), layers=LAYERS, tie_word_embeddings=False)
        tensors = dict(Weights.random(config, sharp=False))
        found, head, own = made_to_agree(config, tensors, noise, taps=TAPS, **options)
        self.weights, self.config, self.tensors = Weights(config, found), head, own
        self.target = self.weights.on(mesh, max_seq_len=CONTEXT, runner=Runner(mesh, trace=False))
        self.head = head_on(self.target, self.weights, head, own)
        self.rounds = HeadRound(self.head)
        for k in reversed(LENGTHS):
            self.rounds.prepare(k)

    def begin(self, n):
        """Both have read n tokens: the text, with the first token of the target's own."""
        step = self.target.extend([Rows(0, IDS[:n], 0, last=True)], LOGITS._replace(taps=TAPS))
        self.head.states(step.features(0), range(n), 0)
        self.head.read(IDS[1:n], 1)
        return [*IDS[:n], step.ids()[0][-1]]

    def fused(self, text, k):
        """A round as one program; the head has its states then."""
        end = text[-32:]
        drafted, verified, accepted = self.rounds.run(end, len(text) - len(end), k)
        self.head.states(self.rounds.features, range(accepted + 1), len(text) - 1)
        return drafted, verified, accepted

    def in_parts(self, text, k):
        """The same by a chain and a verification."""
        first = self.head.pending(len(text))
        drafted = self.head.draft_greedy(text[first:], first, k)
        step = self.target.extend([Rows(0, [text[-1], *drafted], len(text) - 1)], Want(taps=TAPS))
        (verified,) = step.ids()
        accepted = next((i for i in range(k) if drafted[i] != verified[i]), k)
        self.head.states(step.features(0), range(accepted + 1), len(text) - 1)
        return drafted, verified, accepted

    def rows(self):
        """Keys and values of the head's cache, of all positions."""
        return [torch.cat(on_chips(kept), 1)[0].float() for kept in (self.head.cache.keys, self.head.cache.values)]


@pytest.fixture(scope="module")
def pair(mesh):
    return Pair(mesh, 0.1, draft_vocab=DRAFT_VOCAB)


def test_a_fused_round_equals_its_parts(pair):
    """Ids and how many are accepted, round for round, with every outcome and lengths that were not prepared; and what
    the head's cache holds of the text."""
    lengths = [4, 9, 1, 4, 2, 4, 7, 1, 4, 4, 9, 3, 4, 4, 4, 2]
    texts, outcomes, caches = [], [], []
    for run in (pair.fused, pair.in_parts):
        text, made = pair.begin(20), []
        for k in lengths:
            drafted, verified, accepted = run(text, k)
            made.append((drafted, verified, accepted))
            text += [*drafted[:accepted], verified[accepted]]
        texts.append(text)
        outcomes.append(made)
        caches.append([kept[:, : len(text) - 2 - accepted] for kept in pair.rows()])
    assert outcomes[0] == outcomes[1] and texts[0] == texts[1]
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    kinds = {"none" if not made[2] else "all" if made[2] == len(made[0]) else "some" for made in outcomes[0]}
    assert kinds == {"none", "some", "all"}


def test_rounds_write_plain_text_and_draft_what_the_torch_head_drafts(pair):
    """The torch head has the states that the board kept; near-ties apart, it drafts the same."""
    torch_head = reference(pair.config, pair.tensors, pair.weights)
    text = pair.begin(20)
    kept = pair.target.extend([Rows(0, IDS[:20], 0, last=True)], LOGITS._replace(taps=TAPS)).features(0)
    states = torch.cat([torch.cat([on_chips(x)[0][0, 0] for x in chunk], -1) for chunk in kept.chunks])[:20].float()
    torch_head.states(states, range(20), 0)
    pair.begin(20)
    torch_head.read(text[1:20], 1)
    agreed, drafted_in_all, fed = 0, 0, 20
    for _ in range(6):
        theirs = torch_head.draft_greedy(text[fed:], fed, 4)
        fed = len(text)
        drafted, verified, accepted = pair.fused(text, 4)
        torch_head.states(in_buffers(pair.rounds.features, 5), range(accepted + 1), len(text) - 1)
        text += [*drafted[:accepted], verified[accepted]]
        agreed += next((i for i in range(4) if theirs[i] != drafted[i]), 4)
        drafted_in_all += 4
    assert agreed >= drafted_in_all - 4
    plain = [*IDS[:20], pair.target.prefill(IDS[:20]).argmax().item()]
    while len(plain) < len(text):
        plain += pair.target.greedy(plain[-1:], len(plain) - 1)
    assert text == plain


def test_accepted_rows_are_computed_again_with_the_targets_states(target, weights):
    """A chain leaves rows in the head's cache that it made of its own states; the next one writes over them."""
    config = config_of(weights)
    head = head_on(target, weights, config, tensors_of(config))

    def begun():
        step = target.extend([Rows(0, IDS[:20], 0, last=True)], LOGITS._replace(taps=TAPS))
        head.states(step.features(0), range(20), 0)
        head.read(IDS[1:20], 1)
        drafted = head.draft_greedy(IDS[20:21], 20, 4)
        return drafted, target.extend([Rows(0, [IDS[20], *drafted], 20)], Want(taps=TAPS)).features(0)

    drafted, kept = begun()
    guessed = on_chips(head.cache.keys)[0][0, :, :24].float()
    head.states(kept, range(5), 20)
    chained = head.draft_greedy([*drafted, 7], 21, 4)
    true = on_chips(head.cache.keys)[0][0, :, :24].float()
    changed = (guessed != true).any(-1).any(0).tolist()
    assert changed == [False] * 20 + [True] * 4  # position 21 lies at 20
    assert begun()[0] == drafted
    head.states(kept := target.extend([Rows(0, [IDS[20], *drafted], 20)], Want(taps=TAPS)).features(0), range(5), 20)
    head.read([*drafted, 7], 21)
    torch.testing.assert_close(on_chips(head.cache.keys)[0][0, :, :24].float(), true, rtol=0, atol=0)
    assert kept.lasting and len(chained) == 4


def test_more_rows_than_a_round_takes_are_read_before_it(pair):
    """After a long verification that was all accepted a short round feeds the last row alone."""
    text = pair.begin(20)
    drafts = IDS[40:52]
    features = pair.target.extend([Rows(0, [text[-1], *drafts], 20)], Want(taps=TAPS)).features(0)
    text += [*drafts, 5]
    pair.head.states(features, range(13), 20)
    short = pair.fused(text, 1)
    cache = [kept[:, : len(text) - 1] for kept in pair.rows()]
    text = pair.begin(20)
    features = pair.target.extend([Rows(0, [text[-1], *drafts], 20)], Want(taps=TAPS)).features(0)
    text += [*drafts, 5]
    pair.head.states(features, range(13), 20)
    assert pair.head.greedy(text[21:], 21)[-1] == short[0][0]
    assert all(torch.equal(kept[:, : len(text) - 1], held) for kept, held in zip(pair.rows(), cache, strict=True))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_round_may_end_with_the_context(pair, k):
    n = CONTEXT - 1 - k
    text = pair.begin(n)
    made = pair.fused(text, k)
    text = pair.begin(n)
    assert made == pair.in_parts(text, k)
    with pytest.raises(UserError, match=f"do not fit a fused round in the context of {CONTEXT}: draft fewer"):
        pair.rounds.run([*text[-1:], 5, 6], len(text) - 1, k)


def test_ids_beyond_what_bf16_holds_come_back_exact(mesh):
    """Drafted numbers are mapped on the host, and looked up on the device in a table of their own."""
    chips = mesh.get_num_devices()
    config = reduced("1B", chips, layers=1, tie_word_embeddings=False, vocab_size=131072, max_position_embeddings=256)
    config = dataclasses.replace(config, vocab_size=1024 * 128)
    generator = torch.Generator().manual_seed(5)
    weights = Weights(config, random_tensors(config, 2))
    head = head_config(config, 1024, taps=(1,))
    own = tensors_of(head)
    ids = torch.randperm(config.vocab_size, generator=generator)[:1024].sort().values
    own["d2t"] = ids - torch.arange(1024)
    target = weights.on(mesh, "accuracy", max_seq_len=96, runner=Runner(mesh, trace=False))
    target.keep_states((1,))
    made = head_on(target, weights, head, own, "accuracy")
    made.max_seq_len = 96
    numbers = torch.arange(32)[:, None] * 32
    pages = ttnn.from_torch(
        numbers.to(torch.int32),
        dtype=ttnn.uint32,
        layout=ttnn.ROW_MAJOR_LAYOUT,
        device=mesh,
        mesh_mapper=ttnn.ReplicateTensorToMesh(mesh),
    )
    found = on_chips(made.embed_drafted(pages))[0][0, 0]
    mapped = made.ids_of(numbers.flatten().tolist())
    assert mapped == ids[numbers.flatten()].tolist() and max(mapped) > 2**16
    assert torch.equal(found, weights[EMBEDDING][mapped].bfloat16())


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_is_no_head_or_no_round_is_refused(pair, weights, target):
    head = pair.head
    text = pair.begin(20)
    with pytest.raises(UserError, match="drafts chains: use --drafter head or combined"):
        head.forward([1], 20, [-1])
    with pytest.raises(UserError, match="drafts chains: use --drafter head or combined"):
        pair.target.extend([Rows(0, [1, 2], 20, [-1, 0])], Want(taps=TAPS))
    with pytest.raises(ValueError, match="the target's states before them are not known"):
        head.forward([1, 2], 30)
    with pytest.raises(ValueError, match="this prompt has been read"):
        head.read(text[1:20], 1)
    with pytest.raises(UserError, match=rf"outside 1\.\.{CONTEXT - 1}"):
        head.forward([1], 0)
    for k in (0, 32):
        with pytest.raises(UserError, match=rf"{k} drafted tokens are outside 1\.\.31"):
            pair.rounds.prepare(k)
    with pytest.raises(UserError, match=r"10 drafted tokens are outside 1\.\.9"):
        pair.rounds.run(text[-2:], 19, 10)
    kept = pair.target.extend([Rows(0, [1], 20)], Want(taps=TAPS)).features(0)
    head.states(kept, [0], 20)
    pair.target.extend([Rows(0, [2], 21)], Want(taps=TAPS))
    with pytest.raises(UserError, match="are overwritten: a draft head on a board needs batched verification"):
        head.forward([2], 21)
    with pytest.raises(ValueError, match="states of another target"):
        head.states(prefill(target, 5)[0], range(5), 0)
    with pytest.raises(ValueError, match="states are kept after layers"):
        target.keep_states((2,))


def test_heads_that_boards_have_no_code_for_are_refused(mesh, weights):
    config = config_of(weights)
    chips = mesh.get_num_devices()
    narrow = dataclasses.replace(config, target_hidden_size=config.hidden_size // 2)
    with pytest.raises(UserError, match="boards run heads as wide as their target, use --device cpu"):
        head_specs(narrow, chips, precision_named("bf16"))
    together = dataclasses.replace(config, norm_before_fc=True)
    with pytest.raises(UserError, match=r"\(norm_before_fc\), a row too wide for the norm's kernel: use --device cpu"):
        head_specs(together, chips, precision_named("bf16"))
    odd = dataclasses.replace(config, draft_vocab_size=config.draft_vocab_size - 8)
    with pytest.raises(UserError, match="draft head: vocab_size 760 cannot be split over"):
        head_specs(odd, chips, precision_named("bf16"))
    own = tensors_of(config)
    HeadTensors(config, own | {"embed_tokens.weight": weights[EMBEDDING]}, weights)
    with pytest.raises(UserError, match="the head has an embedding of its own"):
        HeadTensors(config, own | {"embed_tokens.weight": 1 + weights[EMBEDDING]}, weights)


def test_a_digest_tells_heads_apart(weights):
    config = config_of(weights)
    own = tensors_of(config)
    digest = HeadTensors(config, own, weights).digest()
    assert digest == HeadTensors(config, dict(reversed(own.items())), weights).digest()
    assert digest != HeadTensors(config, tensors_of(config, seed=4), weights).digest()
    assert digest != HeadTensors(config, own | {"d2t": own["d2t"] + 1}, weights).digest()
