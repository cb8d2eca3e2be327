"""The front door on a board: the same calls as on a CPU, the same promises.

It knows nothing of a board but its name: one text is written on each, the rest is shown on one.
"""

import pytest

from models import LLM, SamplingParams, UserError
from models.boards import BOARDS
from models.options import NAMED
from models.speculative.drafters import registry

PROMPT = "def add(a, b):"


@pytest.fixture
def board(pytestconfig, mesh_opener):
    """The board's name; the mesh of other tests is closed, since an LLM opens its own."""
    name = pytestconfig.getoption("--board")
    if BOARDS[name].chips > 2:
        pytest.skip("the shipped pair has 2 KV heads, too few for 4 or 8 chips")
    mesh_opener.close()
    return name


@pytest.fixture
def shadowed():
    """Numbers on a mock too."""
    from models.board_mock import cluster, shadow

    if not cluster.is_mock():
        yield
        return
    with shadow.shadowed():
        yield


@pytest.mark.parametrize(
    ("drafter", "asked", "precisions"),
    [
        ("combined", None, ("accuracy", "performance")),  # a target as small as this one
        pytest.param("prompt-lookup", None, ("accuracy", "performance"), marks=pytest.mark.once),
        pytest.param("combined", "lofi", ("lofi", "lofi"), marks=pytest.mark.once),
    ],
)
def test_the_same_calls_write_plain_decodings_text(board, shadowed, drafter, asked, precisions):
    options = {"device": "tt", "max_seq_len": 128, "drafter": drafter, "weight_cache": False, "precision": asked}
    with LLM.load("tiny", **options) as llm:
        assert llm.board is not None and (llm.options.num_draft_tokens, llm.options.dtype) == (4, "bf16")
        assert (llm.options.precision, llm.options.draft_precision) == precisions
        assert llm.target.model.layout.precision.name == precisions[0]
        plain = llm.generate(PROMPT, max_new_tokens=10, speculate=False)
        pieces = list(llm.stream(PROMPT, max_new_tokens=10))
        assert "".join(piece.text for piece in pieces) == plain.text
        assert [piece.id for piece in pieces] == plain.token_ids
        drafted = {round.source for round in llm.stats.rounds if round.drafted}
        assert drafted <= set(registry.spec_of(drafter).sources)
        stopped = llm.generate(PROMPT, max_new_tokens=10, stop=plain.text[4:8])
        assert stopped.text == plain.text[:4] and stopped.finish_reason == "stop"
    assert llm.engine.idle


@pytest.mark.once
def test_a_longer_prompt_is_prepared_before_its_clock_starts(board, shadowed):
    with LLM.load("tiny", device="tt", max_seq_len=256, drafter="model", weight_cache=False) as llm:
        llm.generate(PROMPT, max_new_tokens=3)
        warm = set(llm.board._warm)
        long = [llm.tokenizer.bos_id, *llm.encode(PROMPT)[1:] * 20][:140]
        plain = llm.generate(long, max_new_tokens=4, speculate=False).token_ids
        assert llm.board._warm > warm
        assert llm.generate(long, max_new_tokens=4).token_ids == plain


@pytest.mark.once
def test_sampled_text_repeats_with_its_seed(board, shadowed):
    options = {"device": "tt", "max_seq_len": 128, "drafter": "model", "greedy": False, "weight_cache": False}
    with LLM.load("tiny", **options) as llm:
        params = SamplingParams(temperature=0.8, seed=4)
        first, second = (llm.generate(PROMPT, params, max_new_tokens=6).token_ids for _ in range(2))
        assert first == second


@pytest.mark.once
def test_what_a_board_cannot_do_is_refused_in_one_line(board):
    for options, words in (
        ({"dtype": "fp32"}, "dtype has no meaning with device tt: use precision"),
        ({"slots": 2, "drafter": "early-exit", "exit_layer": 1}, "2 texts at once .* cannot be drafted by early exit"),
        ({"slots": 2, "drafter": "tree"}, "2 texts at once .* cannot be drafted by a tree"),
        ({"max_seq_len": 10**6}, "max_seq_len 1000000"),
        ({"drafter": "early-exit"}, "exit_layer"),
    ):
        with pytest.raises(UserError, match=words):
            LLM.load(str(NAMED["tiny"][0]), device="tt", **options)


@pytest.mark.once
def test_texts_at_once_are_what_each_is_alone(board, shadowed):
    """The second starts while the first is under way, and needs programs of its own, whose preparation leaves the
    first one's cache as it is; then two of a list, in step."""
    options = {"device": "tt", "max_seq_len": 256, "drafter": "model", "slots": 2, "weight_cache": False}
    with LLM.load("tiny", num_draft_tokens=2, **options) as llm:
        long = [llm.tokenizer.bos_id, *llm.encode(PROMPT)[1:] * 20][:140]
        first = llm.stream(PROMPT, max_new_tokens=6)
        ids = [next(first).id, next(first).id]
        programs = len(llm.target.model._inputs)
        second = llm.stream(long, max_new_tokens=3)
        written = [piece.id for piece in second]
        ids += [piece.id for piece in first]
        assert len(llm.target.model._inputs) == programs  # all had been prepared
        assert ids == llm.generate(PROMPT, max_new_tokens=6, speculate=False).token_ids
        assert written == llm.generate(long, max_new_tokens=3, speculate=False).token_ids
        together = llm.generate([PROMPT, "import"], max_new_tokens=4)
        assert len(llm.target.model._inputs) == programs
        assert [each.token_ids for each in together] == [
            llm.generate(prompt, max_new_tokens=4, speculate=False).token_ids for prompt in (PROMPT, "import")
        ]
        assert llm.target.model.pages.free_count == llm.target.model.pages.count


@pytest.mark.once
def test_an_error_in_one_text_of_a_list_leaves_the_others_whole(board, shadowed, monkeypatch):
    """One slot: prompts are written one after the other. One is too long, one meets an error in its middle."""
    options = {"device": "tt", "max_seq_len": 128, "drafter": "prompt-lookup", "weight_cache": False}
    with LLM.load("tiny", **options) as llm:
        prompts = [PROMPT, "x " * 200, "import os", "class A:"]
        whole = [llm.generate(prompt, max_new_tokens=4) for prompt in (PROMPT, "class A:")]
        step, steps = llm.engine.step, []

        def failing(chosen):
            mine = [each for each in chosen if each.request.prompt == llm.encode("import os")]
            steps.extend(mine)
            if mine and len(steps) == 3:
                raise MemoryError("no memory")
            return step(chosen)

        monkeypatch.setattr(llm.engine, "step", failing)
        with pytest.raises(UserError, match="context is 128") as raised:
            llm.generate(prompts, max_new_tokens=4)
        completions = raised.value.completions
        assert [completions[0].token_ids, completions[3].token_ids] == [each.token_ids for each in whole]
        assert [each.finish_reason for each in completions] == ["length", "interrupted", "interrupted", "length"]
        assert completions[1].token_ids == [] and "context is 128" in completions[1].error
        assert len(completions[2].token_ids) >= 2
        assert llm.stats.tokens == sum(len(each.token_ids) for each in completions)
        assert llm.engine.idle


@pytest.mark.once
def test_texts_share_a_pool_and_the_beginning_of_a_prompt(board, shadowed):
    options = {"device": "tt", "max_seq_len": 256, "drafter": "prompt-lookup", "slots": 3, "weight_cache": False}
    with pytest.raises(UserError, match="pool_size 200 cannot hold one text of max_seq_len 256"):
        LLM.load("tiny", pool_size=200, **options)
    with LLM.load("tiny", pool_size=300, **options) as llm:
        assert llm.target.model.limits.pool == 300 and llm.target.model.pages.count == 3
        plan, model = llm.board.plans["target"], llm.target.model
        assert plan.kv_cache * plan.chips == model.kv_cache_bytes
        prompt = [llm.tokenizer.bos_id, *llm.encode(PROMPT)[1:] * 20][:140]
        first = llm.generate(prompt, max_new_tokens=5)
        again = llm.generate(prompt, max_new_tokens=5)
        assert (first.stats.reused_tokens, again.stats.reused_tokens) == (0, 128)
        assert again.token_ids == first.token_ids
