"""Train the embedded draft/target pair from Python source that every installation has.

    python scripts/train_pair.py --work-dir build/pair --output models/checkpoints

Stages, in order; each leaves its result in the work directory and is skipped when that exists:

1. corpus     the standard library's .py files, split by file into training and validation text
2. tokenizer  a byte-level BPE of 4096 entries, shared by both models
3. target     16 layers, grown 4 -> 8 -> 16: a new layer is a copy of its neighbour whose output
              projections are zero, so that growing changes nothing at first
4. replies    greedy continuations of corpus prompts, written by the trained target
5. draft      1 layer, started from the target's embedding and first layer, then distilled: half of
              each batch is corpus text under the target's soft labels, half is `replies`, where the
              target's own greedy choice is the label. Greedy acceptance is exactly that agreement.
6. export     Hugging Face directories (safetensors, bf16) and model cards with the measured figures

A batch is a function of (seed, stage, step) alone and the state is saved every few minutes, so an
interrupted run goes on where it was and gives the same result as one that was never interrupted (up
to the thread count: sums over threads are not associative).
"""

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from loguru import logger
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from models.cli.command import Parser, run_command
from models.errors import UserError
from models.llama.config import LlamaConfig as CheckpointConfig
from models.speculative.model import Rows
from models.torch_llama.model import TorchLlama

VOCAB_SIZE = 4096
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# A newline keeps its indentation (one token for most of Python's layout); words keep their leading space.
SPLIT = r"\r?\n[ \t]*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
# Tables of characters and generated text teach nothing about writing Python.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "idlelib", "data"}
STATE_EVERY_S = 120.0


@dataclass(frozen=True)
class Phase:
    """One stretch of training at one depth. `steps` batches of `batch` sequences of `length` tokens."""

    layers: int
    steps: int
    batch: int
    length: int


TARGET_PHASES = (Phase(4, 600, 16, 256), Phase(8, 400, 16, 256), Phase(16, 320, 8, 512))
DRAFT_PHASE = Phase(1, 500, 16, 256)
REPLY_BATCHES, REPLY_BATCH, REPLY_PROMPT, REPLY_LENGTH = 24, 96, 64, 256


# ---------------------------------------------------------------------------------- corpus, tokenizer
def collect_corpus(work: Path) -> dict[str, list[str]]:
    """Texts of the standard library's files: {'train': [...], 'validation': [...]}, split by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 200:
            continue
        bucket = hashlib.sha256(str(relative).encode()).digest()[0]
        texts["validation" if bucket < 5 else "train"].append(text)
        digest.update(text.encode())
    info = {
        "source": f"standard library of CPython {sys.version.split()[0]}",
        "sha256": digest.hexdigest(),
        "train_files": len(texts["train"]),
        "validation_files": len(texts["validation"]),
        "train_characters": sum(map(len, texts["train"])),
    }
    (work / "corpus.json").write_text(json.dumps(info, indent=1))
    return texts


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE entries over `texts`; saved as `path`, loaded when it exists."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    tokenizer.save(str(path))
    return tokenizer


def encode_corpus(tokenizer: Tokenizer, texts: dict[str, list[str]], path: Path) -> dict[str, torch.Tensor]:
    """Token streams [N] int32 per split: BOS text EOS BOS text EOS ..."""
    if path.exists():
        return load_file(path)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    streams = {}
    for split, documents in texts.items():
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
            ids += [bos, *encoding.ids, eos]
        streams[split] = torch.tensor(ids, dtype=torch.int32)
    save_file(streams, path)
    return streams


def sample_batch(stream: torch.Tensor, batch: int, length: int, *key: int) -> torch.Tensor:
    """[batch, length + 1] int64 windows of `stream`, chosen by the integers in `key` alone."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    starts = torch.randint(0, stream.numel() - length - 1, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([stream[s : s + length + 1] for s in starts.tolist()]).long()


# ------------------------------------------------------------------------------------------- training
def model_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )


def grow(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """A deeper model that computes the same function: each layer is followed by a copy that adds nothing yet."""
    old = model.model.layers
    if layers == len(old):
        return model
    factor = layers // len(old)
    deeper = LlamaForCausalLM(model_config(layers))
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(deeper.model.layers):
        layer.load_state_dict(old[index // factor].state_dict())
        if index % factor:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deeper


def make_optimizers(model: LlamaForCausalLM, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02 * scale, weight_decay=0.02, momentum=0.95, nesterov=True),
        torch.optim.AdamW(others, lr=2e-3 * scale, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def logits_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=ids).logits


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean cross-entropy (nats per token) on 24 fixed windows of 256 tokens."""
    losses = []
    for index in range(3):
        ids = sample_batch(stream, 8, 256, 0, index)
        logits = logits_of(model, ids[:, :-1]).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
    return sum(losses) / len(losses)


def save_state(path: Path, model: LlamaForCausalLM, optimizers: list, **progress) -> None:
    """Atomic: a run killed while saving keeps the state before."""
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **progress}, partial)
    os.replace(partial, path)


def train_target(work: Path, streams: dict[str, torch.Tensor], phases: tuple[Phase, ...], seed: int) -> dict:
    """Trains through `phases`; writes target.safetensors. Returns what the model card reports."""
    done, state_path, result_path = work / "target.safetensors", work / "target.state", work / "target.json"
    if done.exists():
        return json.loads(result_path.read_text())
    torch.manual_seed(seed)
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    phase_index, first_step = (state["phase"], state["step"]) if state else (0, 0)
    curve, seconds = (state["curve"], state["seconds"]) if state else ([], 0.0)
    model = LlamaForCausalLM(model_config(phases[phase_index].layers))
    if state:
        model.load_state_dict(state["model"])
    total = sum(p.steps * p.batch * p.length for p in phases)
    seen = sum(p.steps * p.batch * p.length for p in phases[:phase_index])
    for index in range(phase_index, len(phases)):
        phase = phases[index]
        model = grow(model, phase.layers)
        optimizers = make_optimizers(model)
        if state and index == phase_index:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        saved_at = started = time.monotonic()
        for step in range(first_step, phase.steps):
            progress = (seen + step * phase.batch * phase.length) / total
            decay = min(1.0, (1.0 - progress) / 0.45)
            set_lr(optimizers, min(1.0, (step + 1) / 40) * max(decay, 0.02))
            ids = sample_batch(streams["train"], phase.batch, phase.length, seed, index, step)
            logits = logits_of(model, ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            now = time.monotonic()
            if step % 50 == 49 or step + 1 == phase.steps:
                validation = validation_loss(model, streams["validation"])
                tokens = seen + (step + 1) * phase.batch * phase.length
                curve.append({"tokens": tokens, "layers": phase.layers, "train": loss.item(), "validation": validation})
                logger.info(
                    f"target, {phase.layers} layers, step {step + 1}/{phase.steps}: loss {loss.item():.3f}, "
                    f"validation {validation:.3f}, {seconds + now - started:.0f} s"
                )
            if now - saved_at > STATE_EVERY_S:
                elapsed = seconds + now - started
                save_state(state_path, model, optimizers, phase=index, step=step + 1, curve=curve, seconds=elapsed)
                saved_at = now
        seconds += time.monotonic() - started
        seen += phase.steps * phase.batch * phase.length
        first_step = 0
    result = {"tokens": seen, "seconds": round(seconds), "curve": curve, "validation_loss": curve[-1]["validation"]}
    result_path.write_text(json.dumps(result, indent=1))
    save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, done)
    return result


def load_trained(path: Path, layers: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(model_config(layers))
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.eval()


# --------------------------------------------------------------------------------------- distillation
def write_replies(work: Path, target: LlamaForCausalLM, stream: torch.Tensor, batches: int, seed: int) -> torch.Tensor:
    """[N, REPLY_LENGTH] int32: corpus prompts of REPLY_PROMPT tokens and the target's greedy continuation.

    Written by the runtime that will be used with the pair, many sequences at a time.
    """
    path = work / "replies.safetensors"
    if path.exists():
        return load_file(path)["replies"]
    config = CheckpointConfig.from_dict(target.config.to_dict())
    writer = TorchLlama(config, target.state_dict(), dtype="bf16", max_seq_len=REPLY_LENGTH, slots=REPLY_BATCH)
    rows = []
    for index in range(batches):
        text = sample_batch(stream, REPLY_BATCH, REPLY_PROMPT - 1, seed, 101, index)
        replies = text.tolist()
        fed, position = replies, 0
        while position < REPLY_LENGTH - 1:
            step = writer.extend([Rows(slot, each, position, last=True) for slot, each in enumerate(fed)])
            position += len(fed[0])
            fed = [ids[-1:] for ids in step.ids()]
            replies = [[*reply, *new] for reply, new in zip(replies, fed, strict=True)]
        rows.append(torch.tensor(replies, dtype=torch.int))
        if index % 4 == 3:
            logger.info(f"replies: batch {index + 1}/{batches}")
    written = torch.cat(rows)
    save_file({"replies": written}, path)
    return written


def distillation_loss(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """KL(target || draft) in nats per position; logits [B, n, V]."""
    p = F.log_softmax(target_logits.flatten(0, 1).float(), dim=-1)
    q = F.log_softmax(draft_logits.flatten(0, 1).float(), dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@torch.no_grad()
def acceptance_by_position(draft: LlamaForCausalLM, replies: torch.Tensor, k: int = 8) -> list[float]:
    """Share of positions in the target's greedy text where at least i+1 chained draft guesses would be right.

    Teacher-forced on the target's own text, which is what the draft sees after each verification; the
    (i+1)-th guess counts only where all guesses before it were right.
    """
    right = []
    for rows in replies.split(16):
        ids = rows.long()
        guess = logits_of(draft, ids[:, :-1]).argmax(-1)
        right.append((guess == ids[:, 1:])[:, REPLY_PROMPT - 1 :])
    match = torch.cat(right).float()
    runs = match.unfold(1, k, 1).cumprod(-1)
    return [round(x, 4) for x in runs.mean((0, 1)).tolist()]


def train_draft(
    work: Path,
    streams: dict[str, torch.Tensor],
    replies: torch.Tensor,
    target: LlamaForCausalLM,
    phase: Phase,
    seed: int,
) -> dict:
    """Distils the draft; writes draft.safetensors. Returns what the model card reports."""
    done, state_path, result_path = work / "draft.safetensors", work / "draft.state", work / "draft.json"
    if done.exists():
        return json.loads(result_path.read_text())
    held_out, replies = replies[: len(replies) // 12], replies[len(replies) // 12 :]
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    draft = LlamaForCausalLM(model_config(phase.layers))
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    draft.model.layers[0].load_state_dict(target.model.layers[0].state_dict())
    optimizers = make_optimizers(draft, scale=0.7)
    first_step, seconds = 0, 0.0
    if state:
        draft.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step, seconds = state["step"], state["seconds"]
    half = phase.batch // 2
    teacher = target.to(torch.bfloat16)
    saved_at = started = time.monotonic()
    for step in range(first_step, phase.steps):
        progress = step / phase.steps
        set_lr(optimizers, min(1.0, (step + 1) / 30) * max(min(1.0, (1.0 - progress) / 0.6), 0.02))
        text = sample_batch(streams["train"], half, phase.length, seed, 201, step)[:, :-1]
        with torch.no_grad():
            soft = teacher(input_ids=text).logits
        picks = torch.randint(0, len(replies), (2 * phase.batch,), generator=torch.Generator().manual_seed(seed + step))
        own = replies[picks].long()
        from_text = distillation_loss(logits_of(draft, text), soft)
        logits = logits_of(draft, own[:, :-1])[:, REPLY_PROMPT - 1 :]
        from_replies = F.cross_entropy(logits.flatten(0, 1).float(), own[:, REPLY_PROMPT:].flatten())
        (from_text + from_replies).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        if step % 50 == 49 or step + 1 == phase.steps:
            accepted = acceptance_by_position(draft, held_out, 4)
            logger.info(
                f"draft, step {step + 1}/{phase.steps}: KL {from_text.item():.3f}, "
                f"reply loss {from_replies.item():.3f}, agreement {accepted}, {seconds + now - started:.0f} s"
            )
        if now - saved_at > STATE_EVERY_S:
            save_state(state_path, draft, optimizers, step=step + 1, seconds=seconds + now - started)
            saved_at = now
    result = {
        "seconds": round(seconds + time.monotonic() - started),
        "steps": phase.steps,
        "tokens": phase.steps * (half * phase.length + 2 * phase.batch * REPLY_LENGTH),
        "validation_loss": validation_loss(draft, streams["validation"]),
        "acceptance_by_position": acceptance_by_position(draft, held_out),
    }
    result_path.write_text(json.dumps(result, indent=1))
    save_file({k: v for k, v in draft.state_dict().items() if k != "lm_head.weight"}, done)
    return result


# --------------------------------------------------------------------------------------------- export
CARD = """---
license: other
library_name: transformers
---
# {name}

{role}

| | |
|---|---|
| architecture | Llama; layers: {layers}, width 256, 4 heads of 64, 2 KV heads, FFN 768, tied embeddings, bf16 |
| parameters | {parameters:,} |
| vocabulary | {vocab} byte-level BPE entries, the same file for both models of the pair |
| data | {source}: {train_files} files, {train_mb:.1f} MB of text ({validation_files} files kept for validation) |
| sha256 of the corpus | `{sha256}` |
| training | {training} |
| trained on | {tokens:,} tokens, {minutes:.0f} minutes on {threads} CPU threads (seed {seed}) |
| validation loss | {loss:.3f} nats per token |
{extra}
It writes text that looks like Python and means little: it is here to show and test speculative decoding with real,
trained weights on a machine without a board or a download. Made by `scripts/train_pair.py`.
"""


def export(work: Path, output: Path, tokenizer: Tokenizer, corpus: dict, results: dict[str, dict], seed: int) -> None:
    """Hugging Face directories tiny-target and tiny-draft with model cards."""
    roles = {
        "target": "The target of the embedded pair: the model whose text is generated.",
        "draft": "The draft of the embedded pair: distilled from tiny-target, it proposes tokens for it to verify.",
    }
    growth = ", then ".join(
        f"{p.steps} steps at {p.layers} layers ({p.batch} x {p.length} tokens)" for p in TARGET_PHASES
    )
    training = {
        "target": f"{growth}; Muon and AdamW",
        "draft": f"{DRAFT_PHASE.steps} steps from the target's embedding and first layer, on the target's soft labels "
        f"for corpus text and on {REPLY_BATCHES * REPLY_BATCH} texts it wrote greedily itself",
    }
    for role, text in roles.items():
        layers = TARGET_PHASES[-1].layers if role == "target" else DRAFT_PHASE.layers
        folder = output / f"tiny-{role}"
        model = load_trained(work / f"{role}.safetensors", layers).to(torch.bfloat16)
        model.config.use_cache = model.generation_config.use_cache = True
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=EOS,
            model_max_length=2048,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
        result, extra = results[role], ""
        if role == "draft":
            rates = ", ".join(f"{x:.3f}" for x in result["acceptance_by_position"])
            extra = f"| greedy agreement with the target, by drafted position | {rates} (held-out prompts) |\n"
        (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
        (folder / "README.md").write_text(
            CARD.format(
                name=f"tiny-{role}",
                role=text,
                layers=layers,
                parameters=sum(p.numel() for p in model.parameters()),
                vocab=VOCAB_SIZE,
                training=training[role],
                train_mb=corpus["train_characters"] / 1e6,
                tokens=result["tokens"],
                minutes=result["seconds"] / 60,
                threads=torch.get_num_threads(),
                seed=seed,
                loss=result["validation_loss"],
                extra=extra,
                **{k: corpus[k] for k in ("source", "train_files", "validation_files", "sha256")},
            )
        )
        logger.info(f"wrote {folder}")


def scaled(phase: Phase, factor: float) -> Phase:
    return Phase(phase.layers, max(1, math.ceil(phase.steps * factor)), phase.batch, phase.length)


def command(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("build/pair"), help="state and intermediate results")
    parser.add_argument("--output", type=Path, default=Path("models/checkpoints"), help="where the pair is written")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="scale all step counts (0.01: a quick check)")
    args = parser.parse_args(argv)
    if not 0 < args.steps_scale <= 100:
        raise UserError(f"--steps-scale {args.steps_scale} must be above 0 and at most 100")
    hf_logging.set_verbosity_error()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    texts = collect_corpus(args.work_dir)
    corpus = json.loads((args.work_dir / "corpus.json").read_text())
    tokenizer = train_tokenizer(texts["train"], args.work_dir / "tokenizer.json")
    streams = encode_corpus(tokenizer, texts, args.work_dir / "tokens.safetensors")
    logger.info(f"{streams['train'].numel():,} training tokens from {corpus['train_files']} files")
    phases = tuple(scaled(p, args.steps_scale) for p in TARGET_PHASES)
    results = {"target": train_target(args.work_dir, streams, phases, args.seed)}
    target = load_trained(args.work_dir / "target.safetensors", phases[-1].layers)
    batches = math.ceil(REPLY_BATCHES * min(1.0, args.steps_scale))
    replies = write_replies(args.work_dir, target, streams["train"], batches, args.seed)
    draft_phase = scaled(DRAFT_PHASE, args.steps_scale)
    results["draft"] = train_draft(args.work_dir, streams, replies, target, draft_phase, args.seed)
    export(args.work_dir, args.output, tokenizer, corpus, results, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, interrupted="interrupted: the same command goes on where this stopped"))
