"""From a target to a head: all stages of `models.training`, each gone on from where it was."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from loguru import logger

from models import loading
from models.device import check_device
from models.errors import UserError
from models.fetch import PACKAGED
from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig, default_taps
from models.loading import OpenedModel, open_model
from models.options import describe_source, named_head, named_target
from models.torch_llama.model import TorchLlama
from models.training.answers import AnswerOptions, Stopwatch
from models.training.checkpoint import CardFacts, check_writable, save_head
from models.training.evaluate import Evaluation
from models.training.start import FirstHead, first_head, open_first_head
from models.training.trainer import Progress, Trainer, TrainingOptions
from models.training.workdir import DataOptions, WorkDirectory
from models.user_cache import user_cache

LICENCES = {"smollm2": ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")}


@dataclass(frozen=True)
class JobOptions:
    """What `train_head` does.

    Args:
        target: a checkpoint directory, a hub id, a GGUF file, or a name. out: where the checkpoint is written.
        work: the work directory; None: one in the user's cache, named after the target.
        hours: of all runs on the work directory together. answer_hours: of it for answers; None: a third, or with steps
            alone until all prompts are answered.
        steps: of training, instead of as many as there is time for.
        device, dtype: of the target; the head is trained on the same device.
        batch: answers side by side. draft_vocab: ids that the head can draft, None for all. taps: None for the usual.
        part: (i, n): answer only each n-th prompt from the i-th on, then stop.
        disk_gb: of answers, at most.
        init_head: a head that training begins with, its weights and its draft vocabulary: a directory, a hub id or a
            name.
    """

    target: str
    out: Path
    work: Path | None = None
    hours: float | None = 1.0
    answer_hours: float | None = None
    steps: int | None = None
    device: str = "cpu"
    dtype: str = "bf16"
    batch: int = 48
    draft_vocab: int | None = 8192
    taps: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None
    disk_gb: float = 20.0
    init_head: str | None = None
    prompts: Path | None = None
    prompt_count: int = 20000
    max_prompt: int = 190
    max_new_tokens: int = 200
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.hours is None and self.steps is None:
            raise UserError("neither --hours nor --steps is given: how long shall the head be trained?")
        least = (
            ("hours", self.hours, 0),
            ("steps", self.steps, 0),
            ("batch", self.batch, 0),
            ("draft-vocab", self.draft_vocab, 1),
            ("disk-gb", self.disk_gb, 0),
            ("prompt-count", self.prompt_count, 1),
            ("max-prompt", self.max_prompt, 1),
            ("max-new-tokens", self.max_new_tokens, 2),
        )
        for name, value, below in least:
            if value is not None and not value > below:
                raise UserError(f"--{name} {value} must be more than {below}")
        if self.answer_hours is not None and self.answer_hours < 0:
            raise UserError(f"--answer-hours {self.answer_hours} must not be negative")
        if self.hours is not None and self.answer_hours is not None and self.answer_hours >= self.hours:
            raise UserError(
                f"--answer-hours {self.answer_hours:g} leaves nothing of --hours {self.hours:g} for training"
            )
        if self.part and not 0 <= self.part[0] < self.part[1]:
            raise UserError(f"--part {self.part[0] + 1}/{self.part[1]}: give the first as 1/{self.part[1]}")


class Watcher(Protocol):
    """Told how a job gets on."""

    def moved(self, stage: str, share: float, text: str) -> None:
        """share: of the stage that is done, 0 to 1. text: a few figures."""
        ...


def head_config(target: LlamaConfig, taps: tuple[int, ...], draft_vocab: int | None) -> HeadConfig:
    """A head of the target's own width, heads and RoPE base, with one norm per captured state."""
    layer = dataclasses.replace(
        target, num_hidden_layers=1, tie_word_embeddings=False, rope_scaling=None, dtype="bfloat16"
    )
    size = min(draft_vocab or target.vocab_size, target.vocab_size)
    return HeadConfig(layer, size, target.hidden_size, taps, fc_norm=True)


def train_head(options: JobOptions, watcher: Watcher) -> Evaluation | None:
    """Run every stage that is not done yet, and write the checkpoint. None where only answers were asked for.

    Raises:
        UserError: whatever is wrong with the target, the prompts, the directories or the options.
    """
    if options.device == "tt":
        raise UserError("--device tt: a head is trained on cpu or cuda")
    check_device(options.device)
    target = open_model(named_target(options.target))
    config = target.checkpoint.config
    source = named_head(options.init_head) if options.init_head else None
    opened = open_first_head(source, config, options.taps) if source else None
    taps = opened.config.taps if opened else options.taps or default_taps(config.num_hidden_layers)
    head = head_config(config, taps, options.draft_vocab)
    head.check_target(config)
    first = first_head(source, opened, head) if source and opened else None
    check_writable(options.out)
    work = WorkDirectory(
        options.work or default_work(options.target),
        target,
        DataOptions(
            AnswerOptions(taps, options.max_new_tokens, seed=options.training.seed),
            options.prompts,
            options.prompt_count,
            options.max_prompt,
        ),
    )
    answer(work, options, watcher)
    if options.part:
        return None
    trainer = make_trainer(work, head, options, first)
    trainer.run(_reporter(trainer, watcher))
    logger.info(f"looking at {len(trainer.held_out)} held-out answers")
    result = trainer.look(trainer.held_out)
    trainer.save()
    facts = card_facts(work, trainer, options, first)
    save_head(options.out, head, trainer.head.weights, trainer.vocabulary, result, facts)
    (work.path / "curve.json").write_text(json.dumps(trainer.progress.curve, indent=1))
    return result


def default_work(target: str) -> Path:
    """The work directory for a target that none was named for."""
    return user_cache("train-head") / (target if "/" not in target else Path(target).name)


def answer(work: WorkDirectory, options: JobOptions, watcher: Watcher) -> None:
    """The answers that are missing, within the time for them."""
    part = options.part or (0, 1)
    hours, limit = options.answer_hours, None
    if hours is None and options.hours is not None:
        hours = options.hours if options.part else options.hours / 3
    if hours is not None:
        limit = 3600 * hours - work.answering_seconds(*part)
        if limit <= 0:
            return
    total = len(work.prompts)
    if not set(range(part[0], total, part[1])) - set(work.answers().numbers):
        return
    watch = Stopwatch(limit)
    loaded = load_for_answers(work.target, options, work.room())

    def progress(tokens: int, answers: int) -> None:
        share = answers / total if limit is None else max(answers / total, watch.used / limit)
        rate = tokens / max(1e-9, watch.used)
        watcher.moved("answers", min(1.0, share), f"{answers} answers, {rate:.0f} tokens/s")

    work.write_answers(loaded, watch, part=part, most_bytes=int(options.disk_gb * 1e9), progress=progress)


def load_for_answers(target: OpenedModel, options: JobOptions, room: int) -> TorchLlama:
    """The target with a slot for each answer; in compiled layers where these are faster."""
    compiled = options.device == "cpu" and loading.compiles(target.checkpoint.config, options.dtype)
    try:
        return TorchLlama.from_checkpoint(
            target.checkpoint,
            device=options.device,
            dtype=options.dtype,
            max_seq_len=room,
            slots=options.batch,
            compiled=compiled,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"{describe_source(target.source)} with {options.batch} caches of {room} positions needs more memory than "
            f"{options.device} has free: lower --batch"
        ) from None


def make_trainer(work: WorkDirectory, head: HeadConfig, options: JobOptions, first: FirstHead | None = None) -> Trainer:
    """The trainer of a work directory, at the state where it was left; first: what it begins with, None: anew."""
    store = work.answers()
    seconds = None
    if options.steps is None:
        assert options.hours is not None
        seconds = 3600 * options.hours - work.answering_seconds(0, 1)
    training = dataclasses.replace(options.training, steps=options.steps, seconds=seconds)
    checkpoint, config = work.target.checkpoint, work.target.checkpoint.config
    device = torch.device(options.device)
    compute = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    embedding = checkpoint["model.embed_tokens.weight"].to(device, compute)
    teacher = embedding if config.tie_word_embeddings else checkpoint["lm_head.weight"].to(device, compute)
    norm = checkpoint["model.norm.weight"]
    state = work.path / "head.state"
    return Trainer(
        head, training, store, state, teacher=teacher, norm=norm, embedding=embedding, compute=compute, first=first
    )


def _reporter(trainer: Trainer, watcher: Watcher):
    def report(progress: Progress, share: float, loss: float) -> None:
        rate = progress.rows / max(1e-9, progress.seconds)
        text = f"step {progress.step}, loss {loss:.3f}, {rate:.0f} rows/s"
        if progress.curve:
            text += f", {progress.curve[-1]['tokens_per_verify'][3]:.2f} tokens a verify at K = 4"
        watcher.moved("training", share, text)

    return report


def card_facts(work: WorkDirectory, trainer: Trainer, options: JobOptions, first: FirstHead | None = None) -> CardFacts:
    """What the model card says of the data and the training."""
    store, progress, about = trainer.store, trainer.progress, work.options
    licence, base = LICENCES.get(options.target, ("other", describe_source(options.target)))
    chat = bool(work.target.tokenizer and work.target.tokenizer.has_chat_template)
    built_in = (
        "questions of this project's own templates, about texts and functions of installed packages too"
        if chat
        else "beginnings of source files of Python's standard library"
    )
    greedy = sum(store.greedy(n) for n in store.numbers) / max(1, len(store))
    packaged = PACKAGED.get(options.target)
    on_cpu = options.device == "cpu"
    return CardFacts(
        name=options.out.resolve().name,
        about=packaged.about.split(",")[0] if packaged else describe_source(options.target),
        base=base,
        licence=licence,
        prompts=f"{len(work.prompts):,} prompts: {built_in}"
        if about.prompts is None
        else f"{len(work.prompts):,} of a file",
        answers=len(store),
        tokens=store.reply_tokens(),
        greedy=f"{100 * greedy:.0f} %",
        temperature=about.answers.temperature,
        answer_minutes=work.answering_time("busy" if on_cpu else "seconds") / 60,
        begun=f"the weights of {first.name} (digest {first.digest})" if first else "noise, lm_head of the target",
        steps=progress.step,
        epochs=trainer.order.epoch(progress.step),
        rows=progress.rows,
        minutes=(progress.busy if on_cpu else progress.seconds) / 60,
        clock="processor-minutes" if on_cpu else "minutes",
        machine=_processor() if on_cpu else torch.cuda.get_device_name(),
        seed=options.training.seed,
        longest=work.room(),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
