"""Target and draft on a board: where they run, that generation needs no program that was not prepared, that all ways
to draft write the target's own text, and that the board is closed whatever happens.

`BoardModels` opens the board itself, so the mesh of the other tests is closed meanwhile.
"""

import contextlib

import pytest
import torch
import ttnn

from models.board_mock import cluster
from models.boards import BOARDS
from models.errors import UserError
from models.loading import OpenedModel
from models.speculative.control.policy import FixedDraftLength
from models.speculative.drafters.registry import Parts, spec_of
from models.speculative.generate import generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.tests.engine_fixtures import perturbed
from models.tests.ttnn.model_fixtures import Weights, random_ids, reduced
from models.ttnn_llama.board_models import BoardModels, memory_plans
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.programs.options import BoardOptions
from models.ttnn_llama.shapes import MAX_ROWS

K = 3
CONTEXT = 96
PROMPTS = [random_ids(length, seed=length) for length in (1, 5, 38)]
SAMPLING = SamplingParams(temperature=0.8, top_k=20, seed=3)
LENGTHS = (1, 3, 7)
KINDS = {  # (drafter, options)
    "fused": ("model", {}),
    "sequential": ("model", {"batched": False}),
    "sampling": ("model", {"greedy": False}),
    "own chip": ("model", {"placement": "own-chip"}),
    "own chip, sampling": ("model", {"placement": "own-chip", "greedy": False}),
    "several lengths": ("model", {"draft_lengths": LENGTHS}),
    "prompts in rows": ("model", {"prefill": "rows"}),
    "combined": ("combined", {"draft_lengths": LENGTHS}),
    "lookup, sampling": ("prompt-lookup", {"draft_lengths": LENGTHS, "greedy": False}),
    "early exit": ("early-exit", {"exit_layer": 1, "draft_lengths": LENGTHS}),
    "tree": ("tree", {"tree_nodes": 9}),
    "tree on its own chip, sampling": ("tree", {"tree_nodes": 9, "placement": "own-chip", "greedy": False}),
}
DRAFTER = {kind: drafter for kind, (drafter, _) in KINDS.items()}
FUSED = ("fused", "several lengths", "prompts in rows", "combined", "early exit")
# What is prepared for which drafter is the same on all boards; these have programs, or a mesh, that differ.
EVERYWHERE = ("fused", "own chip", "tree")


def on_boards(kinds):
    return [kind if kind in EVERYWHERE else pytest.param(kind, marks=pytest.mark.key_boards) for kind in kinds]


@pytest.fixture
def board(pytestconfig):
    return BOARDS[pytestconfig.getoption("--board")]


def opened(weights, name="the-target"):
    return OpenedModel(name, weights, None, 0.0)


def pair_of(board, layers, forgetful=False):
    """(target, draft): of so many layers each, the draft being the target with noise. Forgetful: the next token
    depends on the last one alone."""
    config = reduced("1B", board.chips, layers=layers)
    target = Weights.random(config)
    if forgetful:
        target = target.changed(lambda name, tensor: 0 * tensor if "o_proj" in name else tensor)
    noisy = {name: tensor.bfloat16() for name, tensor in perturbed(target, 0.03, seed=5).items()}
    return opened(target), opened(Weights(config, noisy), "the-draft")


@pytest.fixture
def pair(board):
    return pair_of(board, layers=1)


@pytest.fixture
def calls(mesh_opener, monkeypatch):
    """What opens and closes the board, in order; the calls are real."""
    mesh_opener.close()
    noted = []

    def note(name):
        real = getattr(ttnn, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            noted.append(name)
            return result

        monkeypatch.setattr(ttnn, name, call)

    for name in ("set_fabric_config", "open_mesh_device", "close_mesh_device"):
        note(name)
    return noted


@pytest.fixture
def opened_and_closed(board):
    """The calls of a board that was opened, with all chips for both models, and closed."""
    fabric = ["set_fabric_config"] * (board.chips > 1)
    return [*fabric, "open_mesh_device", "close_mesh_device", *fabric]


@pytest.fixture
def values():
    """Numbers on a mock too."""
    if cluster.is_mock():
        from models.board_mock import shadow

        with shadow.shadowed():
            yield
    else:
        yield


def options_of(kind, board, **changes):
    """A kind's options, K drafted tokens if it says nothing else, exact and without files; skips what the board
    cannot do."""
    drafter, own = KINDS[kind]
    options = {"precision": "bf16", "draft_precision": "bf16", "weight_cache": False, "draft_lengths": (K,)}
    options |= {"workload": spec_of(drafter).workload, **own, **changes}
    if options.get("placement") == "own-chip" and board.chips == 1:
        pytest.skip(f"{board.name} has no chip for the draft alone")
    return BoardOptions(**options)


def load(pair, options, **rest):
    target, draft = pair
    if options.workload.drafts_with != "draft":
        draft = None
    return BoardModels(target, draft, **{"max_seq_len": CONTEXT, "options": options, **rest})


def drafter_of(models, kind, sampling):
    """As the registry makes it."""
    options = models.options
    parts = Parts(
        target=models.target.model,
        draft=models.draft.model if models.draft else None,
        sampling=sampling or SamplingParams(),
        slot=0,
        rounds=models.fused,
        confident=False,
        settings={"tree_nodes": options.tree_nodes, "exit_layer": options.exit_layer},
    )
    return spec_of(DRAFTER[kind]).make(parts)


class Changing(FixedDraftLength):
    """Drafts a little, nothing for two rounds, so that a draft model falls behind, then all lengths in turn."""

    def __init__(self, lengths):
        super().__init__(0)
        self.lengths, self.rounds = [lengths[1], 0, 0, *lengths[2:]], 0

    def draft_length(self, source):
        return self.lengths[self.rounds % len(self.lengths)]

    def update(self, round):
        self.rounds += 1


def write(models, prompt, kind=None, sampling=None, max_new_tokens=12):
    """(ids, stats) that these models write; kind: of drafts, None for plain decoding."""
    stats = GenerationStats()
    models.select("speculative" if kind else "baseline")
    tokens = generate(
        models.target.model,
        drafter_of(models, kind, sampling) if kind else None,
        prompt,
        sampling=sampling,
        controller=FixedDraftLength(K) if len(models.options.draft_lengths) == 1 else Changing(models.lengths),
        max_new_tokens=max_new_tokens,
        verification="batched" if models.options.batched else "sequential",
        stats=stats,
    )
    return [token.id for token in tokens], stats


# ------------------------------------------------------------------------------------------ memory, before all else
def test_models_that_do_not_fit_are_refused_before_anything_is_opened(board, calls):
    config = reduced("1B", board.chips, layers=1, max_position_embeddings=2**30)
    weights = Weights(config, {})  # nothing is read either
    with pytest.raises(UserError, match="GB too little: use --max-seq-len") as caught:
        load((opened(weights), opened(weights)), options_of("fused", board), max_seq_len=2**30)
    assert "\n" not in str(caught.value)
    assert calls == []


def test_a_placement_that_the_board_has_no_chip_for_is_refused_before_anything_is_opened(board, calls, pair):
    if board.chips > 1:
        pytest.skip(f"{board.name} has one")
    with pytest.raises(UserError, match=f"needs 2 chips, {board.name} has 1"):
        load(pair, BoardOptions(placement="own-chip", weight_cache=False, workload=spec_of("model").workload))
    assert calls == []


def test_an_exit_layer_that_the_target_has_not_is_refused_before_anything_is_opened(board, calls):
    with pytest.raises(UserError, match="exit layer 2: must be between 1 and 1"):
        load(pair_of(board, layers=2), options_of("early exit", board, exit_layer=2))
    assert calls == []


def test_every_chip_reserves_the_trace_region(pair):
    target, draft = (opened(Weights(reduced("1B", 2), {})) for _ in range(2))
    n300 = BOARDS["N300"]

    def traces(**changes):
        options = BoardOptions(**{"workload": spec_of("model").workload, "draft_lengths": (4,), **changes})
        return {role: plan.traces for role, plan in memory_plans(n300, target, draft, CONTEXT, options).items()}

    shared, own_chip = traces(), traces(placement="own-chip")
    assert shared["target"] > 0 and shared["draft"] == 0  # the same chips
    assert own_chip["target"] == own_chip["draft"] > 0
    assert traces(trace=False) == {"target": 0, "draft": 0}
    assert traces(draft_lengths=(8,))["target"] > shared["target"]
    assert memory_plans(n300, target, None, CONTEXT, BoardOptions(placement="own-chip"))["target"].chips == 2


# ------------------------------------------------------------------------------------------------ errors on the way
def test_more_attention_cores_than_a_verification_leaves_are_refused(board, pair, calls, opened_and_closed):
    """Rows of a verification would have fewer cores than plain decoding, and other bits."""
    with pytest.raises(UserError, match=r"--attention-cores 16: 16 rows of \d KV heads leave each \d of the \d+ cores"):
        load(pair, options_of("fused", board, draft_lengths=(15,), attention_cores=16))
    assert calls == opened_and_closed


@pytest.mark.key_boards
@pytest.mark.parametrize("role", ["target", "draft"])
def test_an_error_while_loading_closes_the_board(role, board, pair, calls, opened_and_closed):
    broken = dict(zip(("target", "draft"), pair, strict=True))[role].checkpoint
    del broken["model.norm.weight"]
    with pytest.raises(UserError, match=f"the-{role} could not be loaded: .*model.norm.weight") as caught:
        load(pair, options_of("fused", board))
    assert "\n" not in str(caught.value)
    assert calls == opened_and_closed


@pytest.mark.key_boards
def test_ctrl_c_while_loading_closes_the_board(board, pair, calls, opened_and_closed):
    def pressed(role, done, total, name):
        if (role, done) == ("draft", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(pair, options_of("fused", board), progress=pressed)
    assert calls == opened_and_closed


@pytest.mark.key_boards
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_warming_up_closes_the_board(error, board, pair, calls, opened_and_closed, monkeypatch):
    models = load(pair, options_of("fused", board))

    def fail(self):
        raise error("TT_FATAL @ a.cpp:1: condition\ninfo:\nno room.\nbacktrace:\n")

    monkeypatch.setattr(Runner, "capture", fail)
    with pytest.raises(UserError if error is RuntimeError else error) as caught:
        models.warm_up([5])
    if error is RuntimeError:
        assert str(caught.value).startswith("programs could not be compiled: no room: ")
    assert calls == opened_and_closed
    models.close()
    assert calls == opened_and_closed


@pytest.mark.key_boards
def test_an_error_while_warming_up_is_not_hidden_by_one_while_closing(board, pair, calls, monkeypatch):
    models = load(pair, options_of("fused", board))
    close = ttnn.close_mesh_device

    def close_and_fail(mesh):
        close(mesh)
        raise RuntimeError("closing went wrong")

    def fail(self):
        raise RuntimeError("compiling went wrong")

    monkeypatch.setattr(ttnn, "close_mesh_device", close_and_fail)
    monkeypatch.setattr(Runner, "capture", fail)
    with pytest.raises(UserError, match="compiling went wrong"):
        models.warm_up([5])
    assert "close_mesh_device" in calls


@pytest.mark.key_boards
def test_closing_releases_traces_first_and_a_second_time_does_nothing(
    board, pair, calls, opened_and_closed, monkeypatch
):
    monkeypatch.setattr(Runner, "release", lambda self: calls.append("release"))
    models = load(pair, options_of("fused", board))
    models.close()
    models.close()
    at = opened_and_closed.index("close_mesh_device")
    assert calls == [*opened_and_closed[:at], "release", *opened_and_closed[at:]]


@pytest.mark.key_boards
def test_loading_is_told_tensor_by_tensor(board, pair, calls):
    told = []
    load(pair, options_of("fused", board), progress=lambda *event: told.append(event)).close()
    for role in ("target", "draft"):
        steps = [(done, total) for who, done, total, _ in told if who == role]
        assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    assert [who for who, *_ in told] == sorted((who for who, *_ in told), reverse=True)  # the target first


# ------------------------------------------------------------------------------------- what is prepared, and where
def programs_of(models):
    """How many programs are registered and how many compiled, on the meshes of both models."""
    used = [loaded.model for loaded in (models.target, models.draft) if loaded]
    meshes = {id(model.mesh_device): model.mesh_device for model in used}.values()
    return [len(model.runner._bodies) for model in used] + [mesh.num_program_cache_entries() for mesh in meshes]


@pytest.fixture
def guesses(monkeypatch):
    """Three tokens at random in place of what the device says: drafts end in every way, and no numbers are needed."""
    draw = torch.Generator().manual_seed(1)

    def logits(model, _):
        return torch.cat((9 + torch.randn(MAX_ROWS, 3, generator=draw), torch.zeros(MAX_ROWS, model.vocab_size - 3)), 1)

    monkeypatch.setattr(Decoder, "read", staticmethod(lambda ids: torch.randint(0, 3, (70,), generator=draw).tolist()))
    monkeypatch.setattr(Decoder, "_logits_of", logits)


@pytest.mark.parametrize("kind", on_boards(KINDS))
def test_after_warming_up_nothing_is_compiled(kind, board, calls, guesses):
    """A kernel that came to the device after traces were captured could lie where their replay writes."""
    options = options_of(kind, board)
    sampling = None if options.greedy else SAMPLING
    layers = 2 if options.exit_layer else 1
    with contextlib.closing(load(pair_of(board, layers), options)) as models:
        models.warm_up(len(prompt) for prompt in PROMPTS)
        before, rounds = programs_of(models), []
        for prompt in PROMPTS:
            for path in (None, kind):
                ids, stats = write(models, prompt, path, sampling, max_new_tokens=40)
                assert len(ids) == 40
            rounds += stats.rounds
        assert programs_of(models) == before
    assert any(r.accepted for r in rounds) and any(r.accepted < r.drafted for r in rounds)
    sources = {r.source.partition("-")[0] for r in rounds if r.drafted}
    expected = {"model": {"model"}, "combined": {"model", "lookup"}, "prompt-lookup": {"lookup"}}
    assert sources == expected.get(DRAFTER[kind], {DRAFTER[kind].partition("-")[0]})


@pytest.mark.parametrize("kind", on_boards(["fused", "prompts in rows", "combined", "own chip"]))
def test_both_paths_write_the_targets_own_text(kind, board, calls, values):
    """Trees and early exit have tests of their own."""
    looks_up = kind == "combined"
    rounds, prompts = [], PROMPTS[1:]
    with contextlib.closing(load(pair_of(board, layers=1, forgetful=looks_up), options_of(kind, board))) as models:
        if looks_up:
            written, _ = write(models, prompts[0])
            prompts = [prompts[0], [*prompts[0], *written[:6], *prompts[0]]]  # the answer to the second begins in it
        for prompt in prompts:
            plain, _ = write(models, prompt)
            speculative, stats = write(models, prompt, kind)
            assert speculative == plain and len(plain) == 12
            rounds += stats.rounds
    assert any(r.accepted for r in rounds) and any(r.accepted < r.drafted for r in rounds)
    assert any(r.source.startswith("lookup") for r in rounds) == looks_up


@pytest.mark.key_boards
def test_a_draft_that_reads_late_finds_its_programs(board, calls):
    """What it reads then is longer than any prompt; of other sizes than the target, it shares no kernels with it."""
    target, _ = pair_of(board, layers=1)
    draft = opened(Weights.random(reduced("3B", board.chips, layers=1)))
    prompt = random_ids(120, seed=1)

    class Late(FixedDraftLength):
        def draft_length(self, source):
            self.asked = getattr(self, "asked", 0) + 1
            return 3 if self.asked > 12 else 0

    with contextlib.closing(load((target, draft), options_of("several lengths", board), max_seq_len=290)) as models:
        models.warm_up([len(prompt)], max_new_tokens=20)
        mesh = models.target.model.mesh_device
        before = mesh.num_program_cache_entries()
        stats = GenerationStats()
        models.select("speculative")
        list(
            generate(
                models.target.model,
                drafter_of(models, "several lengths", None),
                prompt,
                controller=Late(0),
                max_new_tokens=20,
                stats=stats,
            )
        )
        assert mesh.num_program_cache_entries() == before
    assert [r.drafted for r in stats.rounds[:13]] == [0] * 12 + [3]


def verifying(models, kind):
    """The program that verifies, where it is not part of a round."""
    what = "ids" if models.options.greedy else "logits"
    if not models.options.batched:
        return models.target.model.prepare(what, 1)
    if models.options.workload.tree:
        return models.target.model.prepare("tree-" + what, 9 + K + 1)
    return models.target.model.prepare(what, max(models.lengths) + 1)


@pytest.mark.parametrize("kind", on_boards(KINDS))
def test_each_path_selects_the_program_that_it_spends_its_time_in(kind, board, calls, monkeypatch):
    selected = []
    monkeypatch.setattr(Runner, "select", lambda self, key: selected.append((self, key)))
    options = options_of(kind, board)
    layers = 2 if options.exit_layer else 1
    with contextlib.closing(load(pair_of(board, layers), options)) as models:
        target, runner = models.target.model, models.target.model.runner
        alone = target.prepare("ids" if models.options.greedy else "logits", 1)
        count = len(runner._bodies)
        expected = models.fused.key(max(models.lengths)) if kind in FUSED else verifying(models, kind)
        for path in ("baseline", "speculative"):
            models.select(path)
        assert selected == [(runner, alone), (runner, expected)]
        assert len(runner._bodies) == count  # they were prepared already
        assert (models.fused is not None) == (kind in FUSED)


@pytest.mark.key_boards
def test_a_controller_is_given_the_lengths_that_there_are_programs_for(board, pair, calls):
    with contextlib.closing(load(pair, options_of("several lengths", board))) as models:
        lengths = (0, *LENGTHS) if board.chips == 1 or not models.trace else (0, 3)
        assert models.lengths == lengths
        assert tuple(models.fused.draft_lengths) == lengths[1:]
    with contextlib.closing(load(pair, options_of("lookup, sampling", board))) as models:
        assert models.lengths == (0, *LENGTHS)
        assert [models.computed_rows(n) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8, 8]
    with contextlib.closing(load(pair, options_of("tree", board))) as models:
        assert [models.computed_rows(n) for n in (1, 2, 14)] == [1, 16, 16]


@pytest.mark.key_boards
@pytest.mark.parametrize("no_draft", ["no model", "no tokens"])
def test_without_drafts_both_paths_are_plain_decoding(no_draft, board, pair, calls):
    draft, length = (None, K) if no_draft == "no model" else (pair[1], 0)
    with contextlib.closing(load((pair[0], draft), options_of("fused", board, draft_lengths=(length,)))) as models:
        assert models.fused is None and models.lengths == (0,)
        assert list(models.target.model.runner._bodies) == [models.target.model.prepare("ids", 1)]
        models.select("speculative")
        models.warm_up([4])


def test_shared_models_have_one_mesh_and_one_runner(board, pair, calls):
    with contextlib.closing(load(pair, options_of("fused", board))) as models:
        target, draft = models.target.model, models.draft.model
        assert target.mesh_device is draft.mesh_device and target.runner is draft.runner
        assert target.mesh_device.get_num_devices() == board.chips


def test_a_draft_on_its_own_chip_runs_there_and_nowhere_else(board, pair, calls):
    with contextlib.closing(load(pair, options_of("own chip", board))) as models:
        target, draft = models.target.model, models.draft.model
        chips = [set(model.mesh_device.get_device_ids()) for model in (target, draft)]
        assert not chips[0] & chips[1]
        assert [len(of) for of in chips] == [models.plans["target"].chips, 1]
        before = target.mesh_device.num_program_cache_entries()
        draft.prefill([1, 2, 3])
        draft.draft_greedy([4], 3, K)
        assert target.mesh_device.num_program_cache_entries() == before
        assert draft.mesh_device.num_program_cache_entries() > 0
    assert calls == ["set_fabric_config", "open_mesh_device", *["close_mesh_device"] * 3, "set_fabric_config"]


def test_a_board_without_traces_runs_eagerly_and_says_what_it_is(board, pair, calls):
    with contextlib.closing(load(pair, options_of("fused", board, trace=True))) as models:
        assert (models.board, models.timed) == (board, models.board.medium == "silicon")
        assert models.trace is models.board.traces is not cluster.is_mock()
        stands_for = "" if models.timed else f"{models.board.medium} of a"
        assert models.describe().startswith(stands_for) and f"{board.name}, " in models.describe()
