"""A draft head on a board through the front door: plain decoding's text, one host round trip a round."""

import contextlib
import json

import pytest
import ttnn
from safetensors.torch import save_file

from models import LLM, SamplingParams, UserError
from models.board_mock import cluster
from models.boards import BOARDS
from models.llama.checkpoint import save_checkpoint
from models.tests.head_fixtures import made_to_agree
from models.tests.ttnn.model_fixtures import Weights, random_ids, reduced
from models.ttnn_llama.draft_head import TtnnHead

PROMPT = random_ids(20, seed=4)
CONTEXT = 160


@pytest.fixture
def values(mesh_opener):
    """Numbers on a mock too; the mesh of other tests is closed, since an LLM opens its own."""
    mesh_opener.close()
    if not cluster.is_mock():
        yield
        return
    from models.board_mock import shadow

    with shadow.shadowed():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, pytestconfig):
    """Directories of a target and of a head that agrees with it some of the time."""
    chips = BOARDS[pytestconfig.getoption("--board")].chips
    config = reduced("1B", chips, layers=3, tie_word_embeddings=False)
    found, head, own = made_to_agree(
        config, dict(Weights.random(config, sharp=False)), 0.1, taps=(0, 1, 3), draft_vocab=768
    )
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "target", config, found)
    (folder / "head").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / "head/model.safetensors")
    (folder / "head/config.json").write_text(json.dumps(head.to_dict()), encoding="utf-8")
    return str(folder / "target"), str(folder / "head")


def load(files, **options):
    target, head = files
    chosen = {"max_seq_len": CONTEXT, "weight_cache": False, "precision": "bf16", "draft_precision": "bf16", **options}
    return LLM.load(target, head, device="tt", **chosen)


def text_and_rounds(llm, count=40, **options):
    ids = [piece.id for piece in llm.stream(PROMPT, max_new_tokens=count, **options)]
    return ids, llm.stats.rounds


key_boards = pytest.mark.key_boards  # the loop is the same on all boards


@pytest.mark.parametrize(
    ("drafter", "tokens"),
    [
        pytest.param(None, 4, marks=key_boards),
        pytest.param(None, "auto", marks=key_boards),
        ("head", 6),
        pytest.param("combined", 4, marks=key_boards),
        pytest.param("combined", "auto", marks=key_boards),
    ],
)
def test_text_with_a_head_equals_plain_text(values, files, drafter, tokens):
    """With rounds as one program, with prompt lookup between them, and with lengths that a controller chooses."""
    with load(files, drafter=drafter, num_draft_tokens=tokens) as llm:
        assert llm.fused and isinstance(llm.draft.model, TtnnHead)
        assert llm.options.drafter == (drafter or "head")
        plain, _ = text_and_rounds(llm, speculate=False)
        ids, rounds = text_and_rounds(llm)
        assert ids == plain
        by_head = [each for each in rounds if each.source == "head" and each.drafted]
        if tokens != "auto":  # a controller on a mock's clock drafts as it likes
            assert sum(each.accepted for each in by_head) > 0
            assert any(each.accepted < each.drafted for each in by_head)
        if drafter == "combined" and tokens != "auto":
            assert any(each.source.startswith("lookup") for each in rounds)
        again, _ = text_and_rounds(llm)
        assert again == plain


@key_boards
def test_sampled_text_repeats_with_its_seed_and_drafts_are_accepted(values, files):
    with load(files, greedy=False) as llm:
        assert not llm.fused
        params = SamplingParams(temperature=0.7, seed=4)
        first, rounds = text_and_rounds(llm, 16, sampling=params)
        second, _ = text_and_rounds(llm, 16, sampling=params)
        assert first == second and sum(each.accepted for each in rounds) > 0
        assert text_and_rounds(llm, 16)[0] == text_and_rounds(llm, 16, speculate=False)[0]


@key_boards
def test_a_prompt_of_one_token_and_a_long_one(values, files):
    with load(files) as llm:
        for prompt in ([5], random_ids(133, seed=8)):
            texts = [
                [piece.id for piece in llm.stream(prompt, max_new_tokens=14, speculate=speculate)]
                for speculate in (False, True)
            ]
            assert texts[0] == texts[1]


@pytest.mark.key_boards
def test_a_round_moves_inputs_to_the_device_and_ids_to_the_host_once(values, files, monkeypatch):
    """No hidden state leaves the device: what is read in a round are ids, after the program, in one go."""
    with load(files, num_draft_tokens=4) as llm:
        text_and_rounds(llm)
        calls, shapes = [], []
        for name in ("copy_host_to_device_tensor", "to_torch"):
            real = getattr(ttnn, name)

            def noted(tensor, *rest, name=name, real=real, **options):
                if name == "to_torch":
                    shapes.append((tensor.dtype, tensor.volume() if hasattr(tensor, "volume") else None))
                calls.append(name)
                return real(tensor, *rest, **options)

            monkeypatch.setattr(ttnn, name, noted)
        run = llm.board.fused.run
        rounds = []

        def whole(*arguments):
            calls.clear()
            shapes.clear()
            made = run(*arguments)
            rounds.append((list(calls), list(shapes)))
            return made

        monkeypatch.setattr(llm.board.fused, "run", whole)
        text_and_rounds(llm)
        assert rounds
        for order, read in rounds:
            copies = order.count("copy_host_to_device_tensor")
            assert order == ["copy_host_to_device_tensor"] * copies + ["to_torch"] * 2
            assert all(dtype == ttnn.uint32 for dtype, _ in read)


def test_what_a_head_on_a_board_cannot_do_is_refused_before_anything_is_opened(files, monkeypatch):
    from models.ttnn_llama.device import mesh

    monkeypatch.setattr(mesh, "_open", lambda *_: pytest.fail("the board was opened"))
    for options, words in (
        ({"drafter": "tree"}, "a draft head on a board drafts chains: use --drafter head or combined, not tree"),
        ({"verification": "sequential"}, "needs batched verification"),
        ({"draft_placement": "own-chip"}, "use --draft-placement shared"),
        ({"prefill": "rows"}, "use --prefill chunks"),
    ):
        with pytest.raises(UserError, match=words), contextlib.closing(load(files, **options)):
            pass


def test_a_head_too_large_for_the_board_is_refused_with_what_would_fit(files, monkeypatch):
    from dataclasses import replace

    from models.ttnn_llama import board_models

    small = board_models.detect_board
    monkeypatch.setattr(board_models, "detect_board", lambda: replace(small(), dram_bytes=2**22))
    with pytest.raises(UserError, match="target and draft need .* GB too little"):
        load(files)
