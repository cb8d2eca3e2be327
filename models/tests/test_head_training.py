"""Training a draft head: its data, its unrolled forward, its loss, and that a killed training goes on bit for bit."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.errors import UserError
from models.llama.head_config import HeadConfig
from models.tests.llama_fixtures import random_tensors, tiny_config
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.model import TorchLlama
from models.training.answers import Answer, AnswerOptions, write_answers
from models.training.batches import BatchOrder, read_batch, rows_of, usable
from models.training.evaluate import evaluate
from models.training.head import TrainedHead
from models.training.loss import DraftVocabulary, SoftCrossEntropy, target_probabilities
from models.training.shards import AnswerStore, save_shard
from models.training.start import FirstHead
from models.training.trainer import Trainer, TrainingOptions, first_weights

TAPS = (1, 2, 4)
PROMPTS = [[3, 9, 27, 5], [7, 7, 50], [100, 2, 60, 61, 62, 63, 40], [12], [90, 91], [5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def target():
    config = tiny_config(num_hidden_layers=5)
    return config, random_tensors(config, seed=2)


@pytest.fixture(scope="module")
def head_config(target):
    layer = dataclasses.replace(target[0], num_hidden_layers=1, tie_word_embeddings=False, rope_scaling=None)
    return HeadConfig(layer, 40, layer.hidden_size, TAPS, fc_norm=True)


@pytest.fixture(scope="module")
def store(target, tmp_path_factory):
    """Answers of a random Llama to 60 prompts."""
    config, tensors = target
    model = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64, slots=4)
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(2, 128, (3 + i % 5,), generator=draw).tolist() for i in range(60)]
    answers = list(write_answers(model, prompts, range(60), AnswerOptions(TAPS, max_new_tokens=14)))
    folder = tmp_path_factory.mktemp("answers")
    save_shard(folder, "0of1-0000", answers[:25])
    save_shard(folder, "0of1-0001", answers[25:])
    return AnswerStore(folder)


def trained_head(config, target, seed=3):
    tensors = target[1]
    sample = torch.randn(50, len(TAPS) * 64, generator=torch.Generator().manual_seed(seed))
    weights = first_weights(config, tensors["lm_head.weight"][:40], tensors["model.norm.weight"], sample, seed)
    return TrainedHead(config, tensors["model.embed_tokens.weight"], weights, torch.float32)


def new_trainer(config, target, store, state, first=None, **options):
    tensors = target[1]
    return Trainer(
        config,
        TrainingOptions(**({"steps": 6, "rows": 40, "warm_up": 2, "save_every": 0.0} | options)),
        store,
        state,
        teacher=tensors["lm_head.weight"],
        norm=tensors["model.norm.weight"],
        embedding=tensors["model.embed_tokens.weight"],
        compute=torch.float32,
        first=first,
    )


# ----------------------------------------------------------------------------------------------------- answers
def test_answers_written_side_by_side_equal_answers_written_alone(target):
    """Ids and hidden states in fp32, greedy: whoever stands beside them, and whoever stood there before."""
    config, tensors = target
    options = AnswerOptions(TAPS, max_new_tokens=12, greedy_share=1.0)
    together = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64, slots=4)
    answers = {a.number: a for a in write_answers(together, PROMPTS, range(len(PROMPTS)), options)}
    assert sorted(answers) == list(range(len(PROMPTS)))
    for number, prompt in enumerate(PROMPTS):
        alone = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64)
        ids = [*prompt, int(alone.prefill(prompt).argmax())]
        while len(ids) < len(prompt) + 12 and ids[-1] not in config.eos_token_ids:
            ids.append(int(alone.forward(ids[-1:], len(ids) - 1)[0].argmax()))
        with alone.tap((*TAPS, 5)) as kept:
            alone.prefill(ids[:-1])
        last = F.rms_norm(kept[-1], (64,), tensors["model.norm.weight"], config.rms_norm_eps)
        assert answers[number].ids.tolist() == ids
        expected = torch.cat((*kept[:-1], last), dim=-1)
        torch.testing.assert_close(answers[number].states.float(), expected, atol=2e-2, rtol=2e-2)  # kept in bf16


def test_an_answer_ends_at_a_stop_id_and_at_its_limit(target):
    config, tensors = target
    free = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64, slots=2)
    options = AnswerOptions(TAPS, max_new_tokens=10, greedy_share=1.0)
    before = {a.number: a.ids.tolist() for a in write_answers(free, PROMPTS, range(6), options)}
    assert all(len(ids) == len(PROMPTS[number]) + 10 or ids[-1] == 1 for number, ids in before.items())
    stop = before[2][len(PROMPTS[2]) + 3]
    stopping = dataclasses.replace(config, eos_token_ids=(stop,))
    model = TorchLlama(stopping, tensors, dtype="fp32", max_seq_len=64, slots=2)
    after = {a.number: a.ids.tolist() for a in write_answers(model, PROMPTS, range(6), options)}
    assert after[2] == before[2][: before[2].index(stop, len(PROMPTS[2])) + 1]


def test_sampled_answers_depend_on_their_number_not_on_the_batch(target):
    config, tensors = target
    options = AnswerOptions(TAPS, max_new_tokens=9, greedy_share=0.0, temperature=1.0)
    found = []
    for batch, order in ((2, range(6)), (3, [5, 4, 3, 2, 1, 0])):
        model = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64, slots=batch)
        found.append({a.number: a.ids.tolist() for a in write_answers(model, PROMPTS, order, options)})
    assert found[0] == found[1]
    greedy = AnswerOptions(TAPS, max_new_tokens=9, greedy_share=1.0)
    assert found[0] != {a.number: a.ids.tolist() for a in write_answers(model, PROMPTS, range(6), greedy)}


def test_shards_give_back_what_was_written(tmp_path):
    answers = [Answer(n, 2, n % 2 == 0, torch.arange(4 + n).int(), torch.randn(3 + n, 8).bfloat16()) for n in (5, 1, 3)]
    save_shard(tmp_path, "0of1-0000", answers[:2])
    save_shard(tmp_path, "0of1-0001", answers[1:])  # number 1 is there twice
    store = AnswerStore(tmp_path)
    assert store.numbers == [1, 3, 5] and store.reply_tokens() == 3 + 5 + 7
    for answer in answers:
        assert store.ids(answer.number).tolist() == answer.ids.tolist()
        assert torch.equal(store.states(answer.number), answer.states)
        assert store.greedy(answer.number) == answer.greedy
    (tmp_path / "answers-0of1-0002.safetensors").write_bytes(b"no shard")
    with pytest.raises(UserError, match="0002.safetensors is damaged"):
        AnswerStore(tmp_path)


# ----------------------------------------------------------------------------------------------------- forward
def test_unrolled_forward_equals_drafting_step_by_step_with_a_cache(target, head_config, store):
    """Every row of every step against the head that the engine runs: positions, masks, a row's own earlier steps."""
    head = trained_head(head_config, target)
    numbers = usable(store)[:5]
    batch = read_batch(store, numbers, 64).to(torch.device("cpu"), torch.float32)
    seen = {}

    def judge(step, rows, normed):
        for row, logits in zip(rows.tolist(), F.linear(normed, head.weights["lm_head.weight"]), strict=True):
            seen[row, step] = logits.detach()
        return (rows * 7 + step) % 4 != 0  # some end here, others there

    head.unroll(batch, 4, judge)
    tensors = {name: weight.detach() for name, weight in head.weights.items()} | {"d2t": torch.zeros(40).long()}
    compared = 0
    for number, span in zip(numbers, batch.spans, strict=True):
        ids, states = store.ids(number).tolist(), store.states(number)[:, :-64].float()
        for row in range(span.rows):
            token = span.first + row  # its state is the last one known
            engine = TorchHead(head_config, tensors, head.embedding, dtype="fp32", max_seq_len=64)
            engine.states(states, range(token + 1), 0)
            logits = engine.prefill(ids[: token + 2])
            for step in range(4):
                if (span.row + row, step) not in seen:
                    break
                torch.testing.assert_close(seen[span.row + row, step], logits, atol=1e-5, rtol=1e-5)
                compared += 1
                if token + step + 3 < len(ids):
                    logits = engine.forward([ids[token + step + 2]], token + step + 2)[-1]
    assert compared == len(seen) and {step for _, step in seen} == {0, 1, 2, 3}


# -------------------------------------------------------------------------------------------------------- loss
def test_loss_is_cross_entropy_with_the_distribution_over_the_draft_vocabulary():
    draw = torch.Generator().manual_seed(0)
    final, teacher = torch.randn(600, 16, generator=draw), torch.randn(90, 16, generator=draw)
    vocabulary = DraftVocabulary(torch.arange(0, 90, 3), 90)
    x, matrix = (torch.randn(n, 16, generator=draw, requires_grad=True) for n in (600, 30))
    weights = torch.rand(600, generator=draw)
    labels = vocabulary.inverse[torch.randint(0, 90, (600,), generator=draw)]
    p = target_probabilities(final, teacher[vocabulary.ids])
    whole = (final @ teacher.T).softmax(-1)[:, vocabulary.ids]
    torch.testing.assert_close(p, whole / whole.sum(-1, keepdim=True))

    loss, ranks = SoftCrossEntropy.apply(x, matrix, p, weights, labels, torch.float32)
    (2 * loss).backward()
    found = [x.grad.clone(), matrix.grad.clone()]
    x.grad = matrix.grad = None
    logits = x @ matrix.T
    expected = (-(p * logits.log_softmax(-1)).sum(-1) * weights).sum()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, [x.grad, matrix.grad], atol=1e-4, rtol=1e-4)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    places = [
        row.index(label) if label >= 0 else 30 for row, label in zip(order.tolist(), labels.tolist(), strict=True)
    ]
    assert ranks.tolist() == places and 30 in places and 0 in places


def test_of_equal_logits_only_the_first_is_the_first_choice():
    x, matrix = torch.ones(2, 4), torch.ones(3, 4)
    p, weights = torch.full((2, 3), 1 / 3), torch.ones(2)
    _, ranks = SoftCrossEntropy.apply(x, matrix, p, weights, torch.tensor([0, 2]), torch.float32)
    assert ranks.tolist() == [0, 1]


def test_draft_vocabulary_survives_its_file():
    counts = torch.tensor([0, 5, 1, 0, 5, 9, 1, 1])
    vocabulary = DraftVocabulary.of_counts(counts, 4)
    assert vocabulary.ids.tolist() == [1, 2, 4, 5]  # of those said once, the smallest id
    tensors = vocabulary.tensors()
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].nonzero()[:, 0].tolist() == [1, 2, 4, 5]
    again = DraftVocabulary.of_offsets(tensors["d2t"], 8)
    assert torch.equal(again.ids, vocabulary.ids) and torch.equal(again.inverse, vocabulary.inverse)
    assert DraftVocabulary.of_counts(counts, 8).tensors() == {}


# ---------------------------------------------------------------------------------------------------- training
def test_batches_are_a_function_of_seed_and_step_and_every_epoch_has_all_answers(store):
    rows = {n: rows_of(store, n) for n in usable(store)}
    order, again, other = BatchOrder(rows, 40, 1), BatchOrder(rows, 40, 1), BatchOrder(rows, 40, 2)
    count = next(step for step in range(1, 99) if sum(len(order(i)) for i in range(step)) == len(rows))
    assert sorted(n for step in range(count) for n in order(step)) == sorted(rows)
    assert again(count + 1) == order(count + 1)  # without having seen those before
    assert [order(i) for i in range(count)] != [other(i) for i in range(count)]
    assert set(order(0)) != set(order(count)) and order.epoch(2 * count) == pytest.approx(2, abs=0.2)


def test_a_killed_training_ends_in_the_same_head_bit_for_bit(target, head_config, store, tmp_path):
    straight = new_trainer(head_config, target, store, tmp_path / "straight.state")
    straight.run()
    killed = new_trainer(head_config, target, store, tmp_path / "killed.state")

    def kill(progress, share, loss):
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.run(kill)
    resumed = new_trainer(head_config, target, store, tmp_path / "killed.state")
    assert resumed.progress.step == 3
    resumed.run()
    assert resumed.progress.step == 6
    for name, weight in straight.head.weights.items():
        assert torch.equal(weight, resumed.head.weights[name]), name
    other = new_trainer(head_config, target, store, tmp_path / "other.state", seed=2)
    other.run()
    assert not torch.equal(other.head.weights["fc.weight"], straight.head.weights["fc.weight"])


def test_a_training_begins_with_the_head_that_it_is_given(target, head_config, store, tmp_path):
    before = new_trainer(head_config, target, store, tmp_path / "before.state", steps=30)
    before.run()
    ids = before.vocabulary.ids.flip(0)  # in an order that counting would not give
    weights = {name: weight.detach().clone() for name, weight in before.head.weights.items()}
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)
    first = FirstHead("before", "0123", ids, weights)
    trainer = new_trainer(head_config, target, store, tmp_path / "state", first, peak=0.5)
    assert torch.equal(trainer.vocabulary.ids, ids) and trainer.progress.step == 0
    for name, weight in trainer.head.weights.items():
        assert torch.equal(weight, weights[name]), name
    anew = new_trainer(head_config, target, store, tmp_path / "anew.state")
    assert trainer.look(trainer.training).loss < anew.look(anew.training).loss - 0.1
    trainer.run()
    trained = trainer.head.weights["fc.weight"].detach()
    assert not torch.equal(trained, weights["fc.weight"])
    resumed = new_trainer(head_config, target, store, tmp_path / "state", first)
    assert resumed.progress.step == 6 and torch.equal(resumed.head.weights["fc.weight"], trained)
    assert torch.equal(resumed.vocabulary.ids, ids)
    with pytest.raises(UserError, match="begun with the head of digest 0123, this run is without --init-head"):
        new_trainer(head_config, target, store, tmp_path / "state")
    anew.save()
    with pytest.raises(UserError, match="begun anew, this run is with before, digest 0123"):
        new_trainer(head_config, target, store, tmp_path / "anew.state", first)


def test_half_the_peak_moves_the_first_steps_half_as_far(target, head_config, store, tmp_path):
    moved = []
    for peak in (1.0, 0.5):
        trainer = new_trainer(head_config, target, store, tmp_path / f"{peak}.state", peak=peak)
        before = trainer.head.weights["fc.weight"].detach().clone()
        trainer.train_step(0.0)
        moved.append((trainer.head.weights["fc.weight"].detach() - before).norm().item())
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-3)


def test_evaluation_counts_what_drafting_from_every_position_accepts(target, head_config, store, tmp_path):
    """Against the head that the engine runs, greedily, position by position and round by round."""
    trainer = new_trainer(head_config, target, store, tmp_path / "state", steps=40)
    trainer.run()
    numbers = trainer.training[:12]
    found = evaluate(trainer.head, store, numbers, trainer.vocabulary, trainer.teacher, positions=3, together=5)
    tensors = {name: weight.detach() for name, weight in trainer.head.weights.items()} | trainer.vocabulary.tensors()
    engine = TorchHead(head_config, tensors, trainer.head.embedding, dtype="fp32", max_seq_len=64)
    right, starts, rounds = [0, 0, 0], 0, []
    for number in numbers:
        ids, states = store.ids(number).tolist(), store.states(number)[:, :-64].float()
        depths = []
        for token in range(store.prompt(number) - 1, len(ids) - 2):
            engine.states(states, range(token + 1), 0)
            engine.read(ids[1 : token + 1], 1) if token else None
            drafted = engine.draft_greedy([ids[token + 1]], token + 1, 3)
            agree = [a == b for a, b in zip(drafted, ids[token + 2 :], strict=False)]
            depth = agree.index(False) if False in agree else len(agree)
            depths.append(depth)
            if len(ids) - token - 2 >= 3:
                starts += 1
                for position in range(depth):
                    right[position] += 1
        at = 0
        while at + 3 <= len(depths):
            rounds.append(1 + depths[at])
            at += 1 + depths[at]
    assert found.rows == starts and sum(right) > 20
    assert found.tokens_per_verify[2] == pytest.approx(1 + sum(right) / starts, abs=1e-3)
    assert found.accepted[1] == pytest.approx(right[1] / right[0], abs=1e-3)
    assert found.tokens_per_round[2] == pytest.approx(sum(rounds) / len(rounds), abs=1e-3)
