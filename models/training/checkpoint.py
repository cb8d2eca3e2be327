"""A trained head as a checkpoint directory: bf16 safetensors in the SpecForge layout, config.json, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.errors import UserError
from models.llama import head_checkpoint
from models.llama.head_config import HeadConfig
from models.training.evaluate import Evaluation
from models.training.loss import DraftVocabulary

CARD = """---
license: {licence}
base_model: {base}
tags: [speculative-decoding, eagle3]
---
# {name}

An EAGLE-3 draft head for {about}: one layer that reads hidden states of the
target after layers {taps} and drafts the tokens that the target then verifies. It is of use with
this target alone. {terms}

| | |
|---|---|
| architecture | {architecture} |
| parameters | {parameters:,} |
| draft vocabulary | {vocab} |
| prompts | {prompts} |
| answers | {answered} |
| begun with | {begun} |
| training | {trained} |

Held-out figures, along {held:,} greedy answers of the target to prompts that were not trained on ({held_rows:,}
positions). A position's rate counts where all before it were accepted; tokens per verify are averaged over
all positions of the answers, tokens per round over rounds as decoding makes them.

| drafted position, or K | {ks} |
|---|{rules}|
| acceptance rate at the position | {accepted} |
| tokens per verify with K drafted | {per_verify} |
| tokens per round with K drafted | {per_round} |
| second choice right where the first was not | {second} |

Made by `scripts/train_head.py` from the target's answers alone: no text of others is a label. Sequences in
training had at most {longest} tokens.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the head's shape and figures; see CARD. clock: what its minutes are of."""

    name: str
    about: str
    base: str
    licence: str
    prompts: str
    answers: int
    tokens: int
    greedy: str
    temperature: float
    answer_minutes: float
    begun: str
    steps: int
    epochs: float
    rows: int
    minutes: float
    clock: str
    machine: str
    seed: int
    longest: int


def check_writable(out: Path) -> None:
    """UserError unless a checkpoint can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror or error}") from None


def save_head(
    out: Path,
    config: HeadConfig,
    weights: Mapping[str, torch.Tensor],
    vocabulary: DraftVocabulary,
    result: Evaluation,
    facts: CardFacts,
) -> None:
    """Write model.safetensors, config.json and README.md."""
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    tensors |= vocabulary.tensors()
    head_checkpoint.save_head(out, config, tensors)
    (out / "README.md").write_text(_card(config, vocabulary, result, facts))


def _card(config: HeadConfig, vocabulary: DraftVocabulary, result: Evaluation, facts: CardFacts) -> str:
    layer, size = config.layer, len(vocabulary.ids)
    terms = (
        "Its licence is the target's, Apache-2.0."
        if facts.licence == "apache-2.0"
        else "It falls under the terms of its target."
    )
    return CARD.format(
        **vars(facts),
        terms=terms,
        taps=", ".join(map(str, config.taps[:-1])) + f" and {config.taps[-1]}",
        architecture=f"one Llama layer, width {layer.hidden_size}, {layer.num_attention_heads} heads of "
        f"{layer.head_dim}, {layer.num_key_value_heads} KV heads, FFN {layer.intermediate_size}, one norm per "
        "captured state, bf16",
        answered=f"{facts.answers:,} of the target's own ({facts.tokens:,} tokens; {facts.greedy} greedy, the others "
        f"at temperature {facts.temperature}), in {facts.answer_minutes:.0f} {facts.clock}",
        trained=f"{facts.steps:,} steps, {facts.epochs:.1f} epochs, {facts.rows:,} rows, {facts.minutes:.0f} "
        f"{facts.clock} on {facts.machine} (seed {facts.seed})",
        parameters=config.parameter_count,
        vocab=f"{size:,} ids, the target's whole"
        if vocabulary.whole
        else f"{size:,} ids, the most frequent ones of the answers",
        held=result.answers,
        held_rows=result.rows,
        ks=" | ".join(str(k) for k in range(1, len(result.accepted) + 1)),
        rules="---|" * (len(result.accepted) - 1) + "---",
        accepted=_figures(result.accepted),
        per_verify=_figures(result.tokens_per_verify),
        per_round=_figures(result.tokens_per_round),
        second=_figures(result.second),
    )


def _figures(values: list[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)
