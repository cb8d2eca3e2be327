"""The front door with the pair that ships: load, stream, generate, chat."""

import itertools
import re
import shutil
import subprocess
import sys

import pytest

import models
from models import LLM, GenerationStats, SamplingParams, UserError
from models.options import NAMED
from models.speculative.drafters import registry
from models.tests.engine_fixtures import registered_last_token
from models.tests.head_fixtures import write_head
from models.tests.llama_fixtures import write_tiny_checkpoint, write_tiny_tokenizer

PROMPT = "def add(a, b):"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm():
    with LLM.load("tiny", max_seq_len=512, slots=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain_text(llm):
    return llm.generate(PROMPT, max_new_tokens=60, speculate=False)


# ---------------------------------------------------------------------------------------------------- texts
def test_pieces_of_a_stream_are_the_text_of_plain_decoding(llm, plain_text):
    pieces = list(llm.stream(PROMPT, max_new_tokens=60))
    assert "".join(piece.text for piece in pieces) == plain_text.text
    assert [piece.id for piece in pieces] == plain_text.token_ids
    assert {piece.finish_reason for piece in pieces[:-1]} == {""} and pieces[-1].finish_reason == "length"
    assert {piece.origin for piece in pieces} >= {"prefill", "drafted"}
    assert llm.stats.tokens == 60 and llm.stats.acceptance_rate > 0.2
    assert {piece.origin for piece in llm.stream(PROMPT, max_new_tokens=9, speculate=False)} == {"prefill", "plain"}


# A tree's side branches lie elsewhere in a bf16 cache, so that near-ties can differ: its identity is tested in fp32.
@pytest.mark.parametrize(
    "spec",
    [spec for spec in registry.specs() if not spec.workload.tree and not spec.needs_head],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize("length", [0, 3, "auto"])
def test_every_drafter_writes_the_same_text(llm, plain_text, spec, length):
    drafting = llm.drafting(spec.name, length)
    for _ in range(2):  # a drafting goes on learning
        assert llm.generate(PROMPT, max_new_tokens=60, speculate=drafting).text == plain_text.text
    drafted = {round.source for round in llm.stats.rounds if round.drafted}
    assert drafted <= set(spec.sources)
    assert bool(drafted) == (length != 0) or length == "auto"


@pytest.mark.parametrize("drafter", [None, "head", "tree"])
def test_a_draft_directory_may_be_a_heads(plain_text, tmp_path, drafter):
    draft = write_head(tmp_path / "head", NAMED["tiny"][0], draft_vocab=300)
    dtype = "fp32" if drafter == "tree" else "bf16"
    with LLM.load("tiny", str(draft), drafter=drafter, max_seq_len=512, dtype=dtype) as llm:
        assert llm.head is not None and llm.options.drafter == (drafter or "combined")
        for length in (3, "auto"):
            written = llm.generate(PROMPT, max_new_tokens=60, speculate=llm.drafting(num_draft_tokens=length))
            assert written.text == llm.generate(PROMPT, max_new_tokens=60, speculate=False).text
        sources = {each.source for each in written.stats.rounds if each.drafted}
        assert sources <= set(registry.spec_of(llm.options.drafter).sources)
        with pytest.raises(UserError, match="needs a draft model, and a head is loaded"):
            llm.drafting("model")


def test_drafts_of_the_wrong_kind_are_refused_with_what_to_do(llm, tmp_path):
    head = str(write_head(tmp_path / "head", NAMED["tiny"][0], draft_vocab=300))
    other = str(write_tiny_checkpoint(tmp_path / "other"))
    for arguments, said in (
        ({"target": "tiny", "draft": head, "drafter": "model"}, "is a draft head, not a model: use drafter head"),
        ({"target": "tiny", "draft": str(NAMED["tiny"][1]), "drafter": "head"}, "is a draft model, not a head"),
        ({"target": other, "drafter": "head"}, "needs a draft head for target"),
        ({"target": other, "draft": head}, "vocabulary 4096, this one has 128"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            LLM.load(**arguments)
    with pytest.raises(UserError, match="needs a draft head, and a draft model is loaded"):
        llm.drafting("head")


@pytest.mark.parametrize("row_invariant", [None, False])
def test_a_target_in_int8_writes_the_same_text_with_and_without_drafts(row_invariant):
    """Rows are quantised apart, so that the drafts beside a token do not change it."""
    with LLM.load(dtype="int8", row_invariant=row_invariant, max_seq_len=512) as llm:
        plain = llm.generate(PROMPT, max_new_tokens=150, speculate=False)
        assert llm.generate(PROMPT, max_new_tokens=150).token_ids == plain.token_ids
        assert llm.stats.acceptance_rate > 0.2 and llm.draft.dtype == "int8"


def test_a_prompt_is_a_text_or_token_ids(llm, plain_text):
    ids = llm.encode(PROMPT)
    assert llm.generate(ids, max_new_tokens=60).text == plain_text.text
    first, second = llm.generate([PROMPT, "class A:"], max_new_tokens=5)
    assert second.token_ids == llm.generate("class A:", max_new_tokens=5).token_ids
    assert first.token_ids == plain_text.token_ids[:5] and second.token_ids != first.token_ids


def test_a_list_of_prompts_is_written_side_by_side_in_its_order():
    """Texts, token ids and limits as alone; each with its own sampling; those beyond the slots wait."""
    prompts = [PROMPT, "class A:", "import os\n", "x = 1\n", "def f():"]
    with LLM.load("tiny", max_seq_len=256, slots=3, dtype="fp32", num_draft_tokens=3) as llm:
        warm = [SamplingParams(), *(SamplingParams(temperature=0.9, top_k=30, seed=seed) for seed in range(4))]
        for sampling in (None, SamplingParams(temperature=0.8, seed=4), warm):
            each = sampling if isinstance(sampling, list) else [sampling] * 5
            alone = [llm.generate(p, s, max_new_tokens=20, stop="(") for p, s in zip(prompts, each, strict=True)]
            written = llm.generate(prompts, sampling, max_new_tokens=20, stop="(")
            assert [(w.text, w.token_ids, w.finish_reason) for w in written] == [
                (a.text, a.token_ids, a.finish_reason) for a in alone
            ]
            assert llm.stats.tokens == sum(len(w.token_ids) for w in written)
            assert any(r.joint and r.joint.sequences == 3 for r in llm.stats.rounds)
        ids = [llm.encode(prompt) for prompt in prompts]
        assert [w.text for w in llm.generate(ids, max_new_tokens=9)] == [
            w.text for w in llm.generate(prompts, max_new_tokens=9)
        ]


def test_a_list_leaves_open_streams_alone_and_says_when_there_is_no_room():
    with LLM.load("tiny", max_seq_len=256, slots=2, dtype="fp32") as llm:
        expected = [llm.generate(prompt, max_new_tokens=12).text for prompt in (PROMPT, "class A:", "x = ")]
        first = llm.stream(PROMPT, max_new_tokens=12)
        text = next(first).text
        assert [w.text for w in llm.generate(["class A:", "x = "], max_new_tokens=12)] == expected[1:]
        second = llm.stream("class A:", max_new_tokens=12)
        next(second)
        with pytest.raises(UserError, match="slots are taken"):
            llm.generate(["x = ", "y = "], max_new_tokens=3)
        assert text + "".join(piece.text for piece in first) == expected[0]
        second.close()
        assert llm.engine.idle


def test_a_list_that_cannot_be_written_is_refused_before_anything_is(llm):
    for prompts, sampling, said in (
        (["a", "b"], [SamplingParams()], "1 sampling parameters for 2 prompts"),
        ("a", [SamplingParams()], "1 sampling parameters for one prompt"),
        (["a", "b" * 5000], None, "context is"),
    ):
        with pytest.raises(UserError, match=said):
            llm.generate(prompts, sampling, max_new_tokens=3)
    with pytest.raises(UserError, match="each completion has its own"):
        llm.generate(["a", "b"], stats=GenerationStats())
    assert llm.engine.idle


def test_sampled_text_repeats_with_a_seed_and_a_fixed_length(llm):
    drafting = llm.drafting(num_draft_tokens=3)
    texts = [
        llm.generate(PROMPT, SamplingParams(temperature=0.9, seed=seed), max_new_tokens=30, speculate=drafting).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_streams_in_turn_write_what_each_writes_alone(llm):
    prompts = [PROMPT, "class Stack:\n"]
    expected = [llm.generate(prompt, max_new_tokens=40).text for prompt in prompts]
    streams, texts = [llm.stream(prompt, max_new_tokens=40) for prompt in prompts], ["", ""]
    for pieces in zip(*streams, strict=True):
        texts = [text + piece.text for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected


def test_nothing_is_measured_in_the_cache_of_a_text_under_way():
    """Costs and exit layers are found out by forwards from position 0 of the first slot."""
    with LLM.load("tiny", max_seq_len=256, slots=2) as llm:
        expected = llm.generate(PROMPT, max_new_tokens=30, speculate=False).text
        for drafting in (llm.drafting("prompt-lookup", "auto"), llm.drafting("early-exit", 2)):
            first = llm.stream(PROMPT, max_new_tokens=30, speculate=False)
            text = "".join(next(first).text for _ in range(12))
            if drafting.name == "early-exit":
                with pytest.raises(UserError, match="no other text is under way"):
                    llm.stream("class A:", max_new_tokens=9, speculate=drafting)
            else:
                assert len(list(llm.stream("class A:", max_new_tokens=9, speculate=drafting))) == 9
            assert text + "".join(piece.text for piece in first) == expected


def test_a_stream_that_is_left_frees_its_slot(llm):
    for _ in range(5):
        stats = GenerationStats()
        stream = llm.stream(PROMPT, max_new_tokens=40, stats=stats)
        for _ in range(7):
            next(stream)
        stream.close()
        assert (stats.tokens, stats.finish_reason) == (7, "interrupted")
    assert llm.engine.idle


# --------------------------------------------------------------------------------------------------- stop strings
def test_a_stop_string_ends_a_text_wherever_it_lies_in_a_block(llm):
    """Stop strings that begin inside a token and end with the next one, for all origins."""
    drafting, ends = llm.drafting("model", 3), set()
    for prompt in (PROMPT, "class Stack:\n", "import os\n\n", "# Sum of squares\n", "for i in range(10):\n"):
        whole, at = list(llm.stream(prompt, max_new_tokens=60, speculate=drafting)), 0
        text = "".join(piece.text for piece in whole)
        for i, (piece, following) in enumerate(itertools.pairwise(whole), 1):
            at += len(piece.text)
            start = at - len(piece.text[1:] or piece.text)
            stop = text[start : at + len(following.text)]
            if not (piece.text and following.text) or text.find(stop) != start:
                continue
            pieces = list(llm.stream(prompt, max_new_tokens=60, stop=stop, speculate=drafting))
            assert "".join(each.text for each in pieces) == text[:start]
            assert [each.id for each in pieces] == [each.id for each in whole[: i + 1]]
            assert pieces[-1].finish_reason == llm.stats.finish_reason == "stop"
            assert sum(round.emitted for round in llm.stats.rounds) == len(pieces) - 1
            ends.add((piece.origin, following.origin))
    assert ends >= {("drafted", "bonus"), ("drafted", "drafted")}


def test_of_several_stop_strings_the_first_complete_one_counts(llm, plain_text):
    text = plain_text.text
    longer, shorter = text[10:16], text[12:14]
    done = llm.generate(PROMPT, max_new_tokens=60, stop=[longer, shorter])
    cut = min(text.index(longer) + len(longer), text.index(shorter) + len(shorter))
    assert text[:cut].startswith(done.text) and done.finish_reason == "stop"
    assert not done.text.endswith(shorter)


def test_a_stop_string_that_never_comes_costs_nothing_of_the_text(llm, plain_text):
    assert llm.generate(PROMPT, max_new_tokens=60, stop=["\x00never"]).text == plain_text.text


# ------------------------------------------------------------------------------------------------------- chat
@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    from models.tests.llama_fixtures import tiny_config

    path = tmp_path_factory.mktemp("chat")
    write_tiny_checkpoint(path, tiny_config(vocab_size=400))
    return str(write_tiny_tokenizer(path))


def test_a_conversation_goes_through_the_chat_template(chat_model):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello, llama!"}]
    with LLM.load(chat_model, dtype="fp32") as llm:
        assert (llm.options.drafter, llm.draft) == ("prompt-lookup", None)  # no draft model fits
        ids = llm.tokenizer.chat(messages)
        assert llm.encode(messages) == ids
        answer = llm.chat(messages, max_new_tokens=12)
        assert answer.token_ids == llm.generate(ids, max_new_tokens=12).token_ids
        assert "".join(piece.text for piece in llm.stream(messages, max_new_tokens=12)) == answer.text
        question = [{"role": "user", "content": "Hello, llama!"}]
        assert llm.chat("Hello, llama!", max_new_tokens=5).token_ids == llm.chat(question, max_new_tokens=5).token_ids


# ------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "/no/such/place"}, ["/no/such/place"]),
        ({"device": "gpu"}, ["device 'gpu'", "cpu, cuda, tt"]),
        ({"dtype": "int4"}, ["dtype 'int4'", "bf16"]),
        ({"drafter": "oracle"}, ["drafter 'oracle'", "combined"]),
        ({"num_draft_tokens": 32}, ["num_draft_tokens 32", "0 to 31"]),
        ({"num_draft_tokens": "some"}, ["num_draft_tokens 'some'", "'auto'"]),
        ({"tree_nodes": 4}, ["tree_nodes has no meaning", "drafter tree"]),
        ({"draft": "x", "drafter": "prompt-lookup"}, ["draft has no meaning", "prompt-lookup"]),
        ({"precision": "bf16"}, ["precision has no meaning", "device"]),
        ({"max_seq_len": 10**9}, ["max_seq_len 1000000000", "tiny-target"]),
        ({"slots": 0}, ["slots 0", "from 1 to"]),
        ({"temperature": 1}, ["unknown option 'temperature'", "drafter"]),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(options, words):
    with pytest.raises(UserError) as error:
        LLM.load(**options)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and "--" not in str(error.value)


def test_what_cannot_be_written_is_refused_at_the_call(llm):
    for prompt, options, word in (
        ("", {}, None),
        ([], {}, "empty"),
        ([1] * 512, {}, "context is 512"),
        ([10**6], {}, "vocabulary"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens 0"),
        (PROMPT, {"stop": ""}, "stop string"),
        ([{"role": "user", "content": "hi"}], {}, "chat template"),
    ):
        if word is None:  # an empty text has a BOS
            assert llm.generate(prompt, max_new_tokens=2).token_ids
            continue
        with pytest.raises(UserError, match=word):
            llm.stream(prompt, **options)
    with pytest.raises(UserError, match="drafter 'oracle'"):
        llm.drafting("oracle")
    assert llm.engine.idle


def test_a_drafter_without_its_model_is_refused():
    with LLM.load("tiny", drafter="prompt-lookup") as llm:
        assert llm.draft is None
        with pytest.raises(UserError, match="'model' needs a draft model"):
            llm.drafting("model")
        llm.close()
        with pytest.raises(UserError, match="closed"):
            llm.stream(PROMPT)


def test_a_draft_with_a_smaller_context_only_stops_helping(tmp_path):
    shutil.copytree(NAMED["tiny"][1], tmp_path / "draft")
    config = tmp_path / "draft" / "config.json"
    import json

    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"max_position_embeddings": 32}))
    with LLM.load("tiny", str(tmp_path / "draft"), drafter="model") as llm:
        expected = llm.generate(PROMPT, max_new_tokens=60, speculate=False).token_ids
        assert llm.generate(PROMPT, max_new_tokens=60).token_ids == expected
        assert any(round.drafted for round in llm.stats.rounds)
        assert not llm.stats.rounds[-1].drafted


# ------------------------------------------------------------------------------------------------- a new drafter
@pytest.fixture
def again():
    with registered_last_token():
        yield


def test_a_new_drafter_is_a_row_in_the_registry(again, plain_text):
    with LLM.load("tiny", drafter="again", num_draft_tokens=2) as llm:
        assert llm.generate(PROMPT, max_new_tokens=60).text == plain_text.text
        assert {round.source for round in llm.stats.rounds if round.drafted} == {"again"}


# -------------------------------------------------------------------------------------------------------- the package
def test_the_package_answers_at_once_and_names_what_it_has():
    code = (
        "import sys, time; began = time.perf_counter(); import models; spent = time.perf_counter() - began; "
        "assert not {'torch', 'transformers', 'numpy', 'ttnn'} & set(sys.modules), 'heavy'; print(spent)"
    )
    spent = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert spent < 0.1
    assert set(models.__all__) <= set(dir(models))
    for name in models.__all__:
        assert getattr(models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        models.Nothing  # noqa: B018
