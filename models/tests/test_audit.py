"""Replays of texts: the target's own are found to be that, and no other."""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import models.audit
import models.speculative.verify as verify
from models import LLM, SamplingParams
from models.audit import (
    ALPHA,
    CONSISTENT,
    DIFFERENT,
    IDENTICAL,
    NEAR_TIE,
    Auditor,
    Divergence,
    finish,
    report,
    uniformity_tests,
)
from models.errors import UserError
from models.llama.checkpoint import save_checkpoint
from models.speculative.acceptance import distribution
from models.tests.engine_fixtures import engine_config, perturbed, random_prompt
from models.tests.llama_fixtures import random_tensors

CONFIG = engine_config(layers=2)
PROMPT = random_prompt(12, seed=1)
WARM = SamplingParams(temperature=1.0, top_k=20, top_p=0.95)

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(path, tensors):
    """(target, draft) directories."""
    save_checkpoint(path / "target", CONFIG, tensors)
    save_checkpoint(path / "draft", CONFIG, perturbed(tensors, 0.2, seed=3))
    return str(path / "target"), str(path / "draft")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("pair"), random_tensors(CONFIG, 0))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def llm(request, pair):
    with LLM.load(*pair, dtype=request.param, max_seq_len=128, drafter="combined", num_draft_tokens=4) as loaded:
        yield loaded


# ------------------------------------------------------------------------------------------------------------ greedy
def test_a_speculative_text_is_identical_with_its_end(llm):
    written = llm.generate(PROMPT, max_new_tokens=30)
    assert llm.audit(PROMPT, written).verdict == IDENTICAL
    stop_ids = [written.token_ids[17]]
    written = llm.generate(PROMPT, max_new_tokens=30, stop_ids=stop_ids)
    assert written.finish_reason == "stop"
    audit = llm.audit(PROMPT, written, stop_ids=stop_ids)
    assert (audit.verdict, audit.tokens, audit.divergences) == (IDENTICAL, len(written.token_ids), [])
    told = report([audit])
    assert (told.verdict, told.exit_code, told.tests) == (IDENTICAL, 0, [])


def test_a_wrong_token_is_found_with_its_place_and_margin(llm):
    text = llm.generate(PROMPT, max_new_tokens=20).token_ids
    logits = llm.target.model.prefill([*PROMPT, *text[:9]]).float()
    wrong = int(logits.argmin())
    audit = llm.audit(PROMPT, [*text[:9], wrong, *text[10:]])
    (found,) = audit.divergences
    assert audit.verdict == DIFFERENT and not found.near_tie
    assert (found.token, found.plain_id, found.run_id) == (10, text[9], wrong)
    top = logits.topk(2).values
    assert found.top2_margin == pytest.approx(float(top[0] - top[1]), abs=0.1)
    assert found.gap == pytest.approx(float(logits.max() - logits.min()), abs=0.1)
    told = report([audit])
    assert told.exit_code == 1 and "token 10" in told.lines()[1] and "no near-tie" in told.lines()[1]


def test_a_text_that_ends_elsewhere_is_different(llm):
    text = llm.generate(PROMPT, max_new_tokens=20, stop_ids=[]).token_ids
    stop = text[7]
    first = text.index(stop) + 1
    auditor = Auditor(llm)
    beyond = auditor.greedy(PROMPT, text, stop_ids=[stop])  # a stop that was missed
    assert beyond.verdict == DIFFERENT
    assert (beyond.divergences[0].token, beyond.divergences[0].plain_id) == (first + 1, None)
    short = auditor.greedy(PROMPT, text[:5], finish_reason="stop", stop_ids=[])  # one that there was not
    assert short.verdict == DIFFERENT
    assert (short.divergences[0].token, short.divergences[0].run_id) == (6, None)


def test_a_near_tie_is_named_and_hides_nothing_behind_it(tmp_path):
    """A token and its twin have the same rows in both matrices: whichever is written, all else is the same."""
    tensors = random_tensors(CONFIG, 0)
    target, draft = saved(tmp_path / "a", tensors)
    with LLM.load(target, draft, dtype="bf16", max_seq_len=128) as llm:
        text = llm.generate(PROMPT, max_new_tokens=20).token_ids
    token = text[6]
    twin = next(id for id in range(CONFIG.vocab_size) if id not in [*PROMPT, *text])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][twin] = tensors[name][token]
    target, draft = saved(tmp_path / "b", tensors)
    with LLM.load(target, draft, dtype="bf16", max_seq_len=128) as llm:
        plain = llm.generate(PROMPT, max_new_tokens=20).token_ids
        other = [token + twin - id if i == 6 else id for i, id in enumerate(plain)]
        audit = llm.audit(PROMPT, other)
        assert audit.verdict == NEAR_TIE and report([audit]).exit_code == 0
        (found,) = audit.divergences
        assert found.token == 7 and {found.plain_id, found.run_id} == {token, twin}
        assert found.gap == 0 and found.top2_margin == pytest.approx(0, abs=1e-6) and 0 < found.tolerance < 0.5
        worst = int(llm.target.model.prefill([*PROMPT, *other[:12]]).float().argmin())
        audit = llm.audit(PROMPT, [*other[:12], worst, *other[13:]])
        assert [each.token for each in audit.divergences] == [7, 13] and audit.verdict == DIFFERENT


def test_a_stop_string_may_begin_before_a_near_tie(pair, monkeypatch):
    """Ids are texts of numbers here: the stop string is the near-tie's token, and the ones around it."""
    with LLM.load(*pair, dtype="fp32", max_seq_len=128) as llm:
        text = llm.generate(PROMPT, max_new_tokens=20, stop_ids=()).token_ids
        other = [*text[:6], text[6] ^ 1]  # the run wrote another id there
        rest = llm.generate([*PROMPT, *other], max_new_tokens=5, stop_ids=()).token_ids
        stop = f"{other[-1]} {rest[0]}"
        monkeypatch.setattr(Divergence, "near_tie", True)
        audit = Auditor(llm).greedy(PROMPT, [*other, rest[0]], finish_reason="stop", stop=stop, stop_ids=())
        assert [each.token for each in audit.divergences] == [7]


def test_a_reference_that_memory_cannot_hold_is_not_loaded(pair, monkeypatch):
    with LLM.load(*pair, dtype="bf16", max_seq_len=128) as llm:
        text = llm.generate(PROMPT, max_new_tokens=4, stop_ids=()).token_ids
        monkeypatch.setattr(models.audit, "free_bytes", lambda device: 100)
        with pytest.raises(UserError, match="fp32"):
            llm.audit(PROMPT, [*text[:3], text[3] ^ 1])
        assert llm.audit(PROMPT, text).verdict == IDENTICAL


@pytest.mark.parametrize("sampling", [SamplingParams(), WARM])
def test_a_replay_leaves_no_room_taken(pair, sampling):
    """The cache has room for one text of the whole context; a replay has used it, and a text may do so again."""
    with LLM.load(*pair, dtype="fp32", max_seq_len=128, slots=2, pool_size=128) as llm:
        written = llm.generate(PROMPT, sampling, max_new_tokens=100, stop_ids=())
        wrong = [*written.token_ids[:50], written.token_ids[50] ^ 1, *written.token_ids[51:]]
        for _ in range(3):
            llm.audit(PROMPT, wrong, sampling, stop_ids=())
            assert len(llm.generate(PROMPT, sampling, max_new_tokens=110, stop_ids=()).token_ids) == 110


def test_fp32_logits_may_come_from_another_thread(pair):
    with LLM.load(*pair, dtype="bf16", max_seq_len=128) as llm, ThreadPoolExecutor(1) as executor:
        text = llm.generate(PROMPT, max_new_tokens=8, stop_ids=()).token_ids
        wrong = [*text[:5], int(llm.target.model.prefill([*PROMPT, *text[:5]]).argmin()), *text[6:]]
        steps = Auditor(llm, executor=executor).steps(PROMPT, wrong, SamplingParams(), stop_ids=())
        waits = []
        with pytest.raises(StopIteration) as end:
            while True:
                waits.append(next(steps))
        assert end.value.value.divergences == llm.audit(PROMPT, wrong, stop_ids=()).divergences
        assert 0.0 in waits and max(waits) > 0  # forwards of its own, then waiting for the other thread's


def test_what_rounding_moves_is_measured_at_the_precision(pair):
    """bf16's tolerance is some hundred times that of fp32, and both are far below typical margins."""
    found = {}
    for dtype in ("fp32", "bf16"):
        with LLM.load(*pair, dtype=dtype, max_seq_len=128) as llm:
            found[dtype] = finish(Auditor(llm)._measured(PROMPT))[1]
    assert 10 * found["fp32"] < found["bf16"] < 0.3


def test_an_audit_waits_for_no_text_under_way(llm):
    pieces = llm.stream(PROMPT)
    next(pieces)
    with pytest.raises(UserError, match="finish the texts"):
        llm.audit(PROMPT, [1, 2])
    pieces.close()


# ----------------------------------------------------------------------------------------------------------- sampled
def sampled(llm, texts=40, tokens=10, **changed):
    """Audits of sampled texts, as if they had been written with WARM."""
    found = []
    for seed in range(texts):
        prompt = random_prompt(6, seed=seed)
        sampling = SamplingParams(**{"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": seed, **changed})
        written = llm.generate(prompt, sampling, max_new_tokens=tokens, stop_ids=())
        found.append(llm.audit(prompt, written, WARM))
    return report(found)


def test_sampled_texts_are_consistent(llm):
    told = sampled(llm)
    assert told.verdict in (CONSISTENT, NEAR_TIE) and told.exit_code == 0
    assert len(told.tests) == 11 and {test.position for test in told.tests} == {None, *range(1, 11)}
    assert all(test.samples == (400 if test.position is None else 40) for test in told.tests)


def test_texts_of_another_temperature_are_different(llm):
    told = sampled(llm, temperature=0.4)
    assert told.verdict == DIFFERENT and told.exit_code == 1
    assert told.tests[0].corrected < ALPHA and "all positions" in told.lines()[1]


@pytest.mark.parametrize("rule", ["accept everything", "no residual"])
def test_a_broken_rule_of_acceptance_is_found(rule, llm, monkeypatch):
    from models.speculative import acceptance

    def everything(drafted, p, q, generator):
        *_, last = p
        return len(drafted), acceptance.sample(last, generator)

    if rule == "accept everything":
        monkeypatch.setattr(verify, "accept_sampled", everything)
    else:
        monkeypatch.setattr(acceptance, "residual", lambda p, q: q)
    told = sampled(llm)
    assert told.verdict == DIFFERENT


def test_a_token_that_is_never_drawn_is_named(llm):
    text = llm.generate(PROMPT, WARM, max_new_tokens=8).token_ids
    p = distribution(llm.target.model.prefill([*PROMPT, *text[:4]])[None].float(), 1.0, 20, 0.95)[0]
    never = int(p.argmin())
    audit = llm.audit(PROMPT, [*text[:4], never, *text[5:]], WARM)
    assert audit.verdict == DIFFERENT and audit.divergences[0].token == 5
    assert audit.divergences[0].gap > audit.divergences[0].tolerance
    assert "leaves out" in report([audit]).lines()[1]


def test_a_token_at_the_edge_of_the_nucleus_is_a_near_tie(llm):
    """The 21st token of top-k 20, where fp32 says that it is as likely as the 20th."""
    logits = llm.target.model.prefill(PROMPT).float()
    ids = logits.topk(21).indices.tolist()
    equal = logits.clone()
    equal[ids[20]] = equal[ids[19]]
    auditor = Auditor(llm, reference=lambda ids: equal)
    assert auditor.sampled(PROMPT, [ids[20]], SamplingParams(temperature=1.0, top_k=20)).verdict == NEAR_TIE


def test_the_transform_of_tokens_drawn_from_the_distributions_is_uniform(llm):
    """Plain decoding, many texts: no p-value of their common test is small, and it is not always the same."""
    plain = []
    for seed in range(30):
        sampling = SamplingParams(1.0, 20, 0.95, seed)
        text = llm.generate(PROMPT, sampling, max_new_tokens=10, stop_ids=(), speculate=False).token_ids
        plain.append(llm.audit(PROMPT, text, sampling).uniforms)
    values = torch.tensor([each for text in plain for each in text])
    assert len(values) == 300 and 0 <= values.min() < 0.02 and 0.98 < values.max() <= 1
    assert abs(float(values.mean()) - 0.5) < 4 / math.sqrt(12 * 300)


def test_p_values_are_corrected_by_holm():
    source = random.Random(0)
    uniforms = [[source.random(), source.random() ** 3, source.random()] for _ in range(50)]
    tests = uniformity_tests(uniforms)
    assert [test.p_value for test in tests] == sorted(test.p_value for test in tests)
    assert tests[0].position == 2 and tests[0].corrected == pytest.approx(tests[0].p_value * len(tests))
    running = 0.0
    for rank, test in enumerate(tests):
        running = max(running, min(1.0, test.p_value * (len(tests) - rank)))
        assert test.corrected == pytest.approx(running)
    assert uniformity_tests([[0.5]] * 4) == []  # too few to say anything
