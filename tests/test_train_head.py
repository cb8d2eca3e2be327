"""The command that trains a draft head: from a target to a checkpoint, and what it says to mistakes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.cli.command import run_command
from models.llama.checkpoint import Checkpoint
from models.llama.head_checkpoint import EMBEDDING, save_head
from models.llama.head_config import SPECULATORS, HeadConfig
from models.loading import open_model
from models.tests import head_fixtures
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from models.torch_llama.draft_head import TorchHead
from models.torch_llama.model import TorchLlama
from models.training.answers import AnswerOptions
from models.training.evaluate import evaluate
from models.training.job import JobOptions, head_config, make_trainer, train_head
from models.training.shards import AnswerStore
from models.training.trainer import TrainingOptions
from models.training.workdir import DataOptions, WorkDirectory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_head", ROOT / "scripts" / "train_head.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    """A checkpoint of a random Llama of eight layers, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_checkpoint(folder, tiny_config(num_hidden_layers=8, vocab_size=300))
    write_tiny_tokenizer(folder, vocab_size=300)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n---\n".join(f"Question {i}: what is {i} and {i * i}?" for i in range(45)))
    return folder


def arguments(target, tmp_path, *more):
    small = "--steps 3 --max-new-tokens 8 --batch 8 --rows 64 --draft-vocab 64 --dtype fp32".split()
    return [
        *("--target", str(target), "--prompts", str(target / "prompts.txt"), "--out", str(tmp_path / "head")),
        *("--work-dir", str(tmp_path / "work"), *small, *more),
    ]


def failure(script, capsys, *argv):
    """What the command prints on stderr when it fails for a mistake of the user's."""
    capsys.readouterr()
    assert run_command(lambda: script.command([str(each) for each in argv])) == 2
    return capsys.readouterr().err


def test_the_checkpoint_is_one_that_the_engine_opens(script, random_llama, tmp_path, capsys):
    assert script.command(arguments(random_llama, tmp_path)) == 0
    assert "tokens a verify" in capsys.readouterr().out
    out, target = tmp_path / "head", Checkpoint.open(random_llama)
    config = HeadConfig.from_json(out / "config.json")
    assert config.taps == (2, 4, 5) and config.fc_norm and config.draft_vocab_size == 64
    tensors = load_file(out / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == config.tensor_shapes() | {"t2d": (300,)}
    assert tensors["fc.weight"].dtype == torch.bfloat16 and tensors["d2t"].dtype == torch.int64
    ids = tensors["d2t"] + torch.arange(64)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids)
    config.check_target(target.config)
    model = TorchLlama.from_checkpoint(target, dtype="fp32", max_seq_len=64)
    head = TorchHead(config, tensors, target["model.embed_tokens.weight"], dtype="fp32", max_seq_len=64)
    with model.tap(config.taps) as kept:
        model.prefill([1, 2, 3, 4])
    head.states(torch.cat(kept, dim=-1), range(4), 0)
    head.read([2, 3, 4], 1)
    drafted = head.draft_greedy([5], 4, 4)
    assert len(drafted) == 4 and set(drafted) <= set(ids.tolist())
    card = (out / "README.md").read_text()
    assert "3 steps" in card and "64 ids" in card and "{" not in card


def test_a_finished_training_is_not_repeated_and_more_steps_go_on(script, random_llama, tmp_path):
    weights = tmp_path / "head" / "model.safetensors"
    assert script.command(arguments(random_llama, tmp_path)) == 0
    first = weights.read_bytes()
    assert script.command(arguments(random_llama, tmp_path)) == 0
    assert weights.read_bytes() == first
    assert script.command(arguments(random_llama, tmp_path, "--steps", "5")) == 0
    assert weights.read_bytes() != first
    curve = json.loads((tmp_path / "work" / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [3, 5]


def test_parts_of_the_answers_are_written_apart_and_trained_on_together(script, random_llama, tmp_path):
    folder = tmp_path / "work"
    for part in ("1/2", "2/2"):
        assert script.command(arguments(random_llama, tmp_path, "--part", part)) == 0
        assert not (folder / "head.state").exists()
    shards = {path.name: path.read_bytes() for path in folder.glob("answers-*")}
    assert sorted(shards) == ["answers-0of2-0000.safetensors", "answers-1of2-0000.safetensors"]
    assert script.command(arguments(random_llama, tmp_path)) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("answers-*")} == shards
    assert "45 of the target's own" in (tmp_path / "head" / "README.md").read_text()


def test_time_that_parts_took_side_by_side_is_not_there_for_more_answers(script, random_llama, tmp_path):
    folder = tmp_path / "work"
    assert script.command(arguments(random_llama, tmp_path, "--part", "1/2")) == 0
    (folder / "answering-0of2.json").write_text(json.dumps({"seconds": 1800, "busy": 1}))
    (folder / "answering-1of2.json").write_text(json.dumps({"seconds": 1700, "busy": 1}))
    assert script.command(arguments(random_llama, tmp_path, "--answer-hours", "0.5")) == 0
    assert len(AnswerStore(folder)) == 23
    assert script.command(arguments(random_llama, tmp_path, "--answer-hours", "0.6", "--steps", "4")) == 0
    assert len(AnswerStore(folder)) == 45


def test_answers_stop_at_the_disk_limit(script, random_llama, tmp_path):
    assert script.command(arguments(random_llama, tmp_path, "--disk-gb", "0.001")) == 0
    sizes = [path.stat().st_size for path in (tmp_path / "work").glob("answers-*")]
    assert 1_000_000 < sum(sizes) < 1_800_000  # those that ended together with the last one come on top
    assert len(AnswerStore(tmp_path / "work")) < 45


def test_a_head_is_trained_on_with_other_answers_and_keeps_its_draft_vocabulary(script, random_llama, tmp_path):
    assert script.command(arguments(random_llama, tmp_path)) == 0
    first, second = tmp_path / "head", tmp_path / "second"
    prompts = tmp_path / "others.txt"
    prompts.write_text("\n---\n".join(f"What else is {i}?" for i in range(45)))
    more = ("--init-head", first, "--out", second, "--work-dir", tmp_path / "other", "--prompts", prompts)
    assert script.command(arguments(random_llama, tmp_path, *map(str, more))) == 0
    before, after = (load_file(path / "model.safetensors") for path in (first, second))
    assert torch.equal(before["d2t"], after["d2t"]) and torch.equal(before["t2d"], after["t2d"])
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    # three steps are hardly anything beside where another seed would have begun
    close = F.cosine_similarity(before["fc.weight"].float().flatten(), after["fc.weight"].float().flatten(), dim=0)
    assert close > 0.9
    assert "begun with | the weights of head (digest" in (second / "README.md").read_text()
    assert "begun with | noise" in (first / "README.md").read_text()


def test_time_for_answers_ends_them_with_steps_too(script, random_llama, tmp_path):
    assert script.command(arguments(random_llama, tmp_path, "--part", "1/9", "--answer-hours", "0.1")) == 0
    assert len(AnswerStore(tmp_path / "work")) == 5  # the part's all
    assert script.command(arguments(random_llama, tmp_path, "--answer-hours", "0")) == 0
    assert len(AnswerStore(tmp_path / "work")) == 5 and (tmp_path / "head" / "README.md").exists()


def test_training_on_the_embedded_target_improves_on_an_untrained_head(tmp_path):
    """Tokens per verify at K = 4, held out, after a few steps on a few answers: by at least 0.2, from next to 1."""
    options = JobOptions(
        target="tiny",
        out=tmp_path / "head",
        work=tmp_path / "work",
        hours=None,
        steps=28,
        dtype="fp32",
        batch=32,
        prompt_count=100,
        max_prompt=32,
        max_new_tokens=40,
        draft_vocab=1024,
        training=TrainingOptions(rows=400, warm_up=5, unroll=3),
    )

    class Silent:
        def moved(self, stage, share, text):
            pass

    result = train_head(options, Silent())
    target = Checkpoint.open(ROOT / "models" / "checkpoints" / "tiny-target")
    (tmp_path / "work" / "head.state").unlink()
    data = DataOptions(AnswerOptions((2, 8, 13), 40), None, 100, 32)
    work = WorkDirectory(tmp_path / "work", open_model(str(target.path)), data)
    untrained = make_trainer(work, head_config(target.config, (2, 8, 13), 1024), options)
    before = evaluate(
        untrained.head, untrained.store, untrained.held_out, untrained.vocabulary, untrained.teacher
    ).tokens_per_verify
    assert before[3] < 1.1
    assert result.tokens_per_verify[3] > before[3] + 0.2, result


# ------------------------------------------------------------------------------------------------------ mistakes
def test_a_head_of_another_shape_is_nothing_to_begin_with(script, random_llama, tmp_path, capsys):
    target = Checkpoint.open(random_llama).config
    other = dataclasses.replace(target, vocab_size=301)
    made = {
        "other target": head_fixtures.head_config(other, 64, taps=(2, 4, 5), fc_norm=True),
        "other vocabulary": head_fixtures.head_config(target, 60, taps=(2, 4, 5), fc_norm=True),
        "no norms": head_fixtures.head_config(target, 64, taps=(2, 4, 5)),
        "other layout": head_fixtures.head_config(target, 64, taps=(2, 4, 5), fc_norm=True, layout=SPECULATORS),
        "good": head_fixtures.head_config(target, 64, taps=(1, 4, 5), fc_norm=True),
    }
    for name, config in made.items():
        save_head(tmp_path / name, config, head_fixtures.random_head_tensors(config, 0))
    embedding = {EMBEDDING: torch.zeros(300, target.hidden_size)} | head_fixtures.random_head_tensors(made["good"], 0)
    save_head(tmp_path / "own embedding", made["good"], embedding)
    save_file(embedding, tmp_path / "own embedding" / "model.safetensors")
    cases = (
        ("nothing", (), "nothing"),
        ("other target", (), "the head is for a target of vocabulary 301, this one has 300"),
        ("other vocabulary", (), "drafts 60 ids, this training 64: give --draft-vocab 60"),
        ("no norms", (), "has fc_norm False, heads that are trained for this target have True"),
        ("other layout", (), "has layout speculators, heads that are trained for this target have specforge"),
        ("good", ("--taps", "2,4,5"), "reads the target after layers 1,4,5, --taps says 2,4,5"),
        ("own embedding", (), "has an embedding of its own"),
        ("good", ("--peak", "0"), "--peak 0 must be more than 0"),
    )
    for name, more, expected in cases:
        told = failure(script, capsys, *arguments(random_llama, tmp_path, "--init-head", str(tmp_path / name), *more))
        assert expected in told and told.count("\n") == 1 and "Traceback" not in told, told
    assert not (tmp_path / "work").exists()
    assert script.command(arguments(random_llama, tmp_path, "--init-head", str(tmp_path / "good"))) == 0


def test_mistakes_are_told_in_one_line(script, random_llama, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = ("--out", tmp_path / "head", "--work-dir", tmp_path / "work")
    cases = [
        ((*out,), "--target"),
        (("--target", tmp_path / "nothing", *out), "nothing"),
        (
            ("--target", random_llama, "--out", blocked / "head", "--work-dir", tmp_path / "work"),
            "cannot write to --out",
        ),
        (("--target", random_llama, *out[:2], "--work-dir", blocked / "work"), "cannot write to the work directory"),
        (("--target", random_llama, *out, "--prompts", tmp_path / "none.txt"), "cannot read the prompt file"),
        (("--target", random_llama, *out, "--hours", "0"), "--hours 0.0 must be more than 0"),
        (("--target", random_llama, *out, "--steps", "-1"), "--steps -1 must be more than 0"),
        (("--target", random_llama, *out, "--hours", "1", "--answer-hours", "2"), "leaves nothing"),
        (("--target", random_llama, *out, "--taps", "2,99"), "layer 99"),
        (("--target", random_llama, *out, "--taps", "2,x"), "'2,x' are no layers"),
        (("--target", random_llama, *out, "--part", "3/2"), "--part 3/2"),
        (("--target", random_llama, *out, "--draft-vocab", "1"), "--draft-vocab 1 must be more than 1"),
        (("--target", random_llama, *out, "--threads", "0"), "--threads 0"),
    ]
    for argv, expected in cases:
        told = failure(script, capsys, *argv)
        assert expected in told and told.count("\n") == 1 and "Traceback" not in told, told


def test_a_work_directory_of_other_options_is_refused(script, random_llama, tmp_path, capsys):
    assert script.command(arguments(random_llama, tmp_path)) == 0
    told = failure(script, capsys, *arguments(random_llama, tmp_path, "--max-new-tokens", "9"))
    assert "was begun with new tokens 8, this run has 9" in told and told.count("\n") == 1
    other = tmp_path / "other"
    write_tiny_checkpoint(other, tiny_config(num_hidden_layers=8, vocab_size=300), seed=1)
    write_tiny_tokenizer(other, vocab_size=300)
    told = failure(script, capsys, *arguments(random_llama, tmp_path, "--target", str(other)))
    assert "was begun with target" in told and "another --work-dir" in told
