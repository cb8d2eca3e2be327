"""The training loop: unrolled soft cross-entropy, Muon and AdamW, a state that a killed run goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.llama.head_config import HeadConfig
from models.training.batches import BatchOrder, read_batch, rows_of, usable
from models.training.evaluate import Evaluation, evaluate
from models.training.head import TrainedHead
from models.training.loss import DraftVocabulary, SoftCrossEntropy, target_probabilities
from models.training.shards import AnswerStore
from models.training.start import FirstHead

HELD_OUT = 20  # every so manyth prompt is held out
QUICK_ANSWERS = 64  # held-out answers looked at in between


@dataclass(frozen=True)
class TrainingOptions:
    """How a head is trained.

    Args:
        steps: batches in all; None: as many as fit `seconds`, and the learning rate follows the clock.
        seconds: time of training in all, over all runs on one directory; None with steps.
        rows: positions in a batch, at least.
        unroll: drafted tokens that are trained. decay: weight of each step against the one before.
        survive: a row is drafted on while the answer's token is among so many first choices of the head, as a draft
            that is read on was right so far.
        muon, adamw: learning rates. peak: share of both that is reached. warm_up: steps. seed: of order and first
            weights.
        evaluate_every, save_every: seconds.
    """

    steps: int | None = None
    seconds: float | None = None
    rows: int = 2000
    unroll: int = 5
    decay: float = 1.0
    survive: int = 2
    muon: float = 0.02
    adamw: float = 1e-3
    peak: float = 1.0
    warm_up: int = 20
    seed: int = 1
    evaluate_every: float = 600.0
    save_every: float = 180.0


@dataclass
class Progress:
    """How far a training is; saved with its state.

    Args:
        seconds: by the clock. busy: processor time of all threads together. rows: trained, of all steps.
        curve: an entry for every look at held-out answers.
    """

    step: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    rows: int = 0
    curve: list[dict[str, Any]] | None = None


# told after each step: progress, share done, mean loss per row
Report = Callable[[Progress, float, float], None]


def held_out(number: int) -> bool:
    """Whether the answer to a prompt is kept from training."""
    return number % HELD_OUT == 0


def count_replies(store: AnswerStore, numbers: list[int], vocab: int) -> torch.Tensor:
    """[target V] how often each id is said in these answers."""
    counts = torch.zeros(vocab, dtype=torch.long)
    for number in numbers:
        counts += torch.bincount(store.ids(number)[store.prompt(number) :], minlength=vocab)
    return counts


def first_weights(config: HeadConfig, lm_head: torch.Tensor, norm: torch.Tensor, sample: torch.Tensor, seed: int):
    """What training begins with: small noise; the target's own rows as lm_head; norms that whiten the states.

    lm_head: [V, H] rows of the draft vocabulary. norm: [H] the target's last. sample: [n, taps H] states of answers.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        if name == "d2t":
            continue
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] *= 0.5
    width = config.target_hidden_size
    for index in range(len(config.taps)):
        states = sample[:, index * width : (index + 1) * width].float()
        states = states * states.pow(2).mean(-1, keepdim=True).add(config.layer.rms_norm_eps).rsqrt()
        weights[f"fc_norm.{index}.weight"] = states.pow(2).mean(0).sqrt().clamp_min(0.02).reciprocal()
    weights["lm_head.weight"] = lm_head.detach().to("cpu", torch.float32, copy=True)
    # A first guess is far from the target's certainty: smaller logits begin nearer to it.
    weights["norm.weight"] = 0.4 * norm.detach().to("cpu", torch.float32)
    return weights


class Trainer:
    """Trains one head on the answers in a store; its state lies in `state`, and is gone on from where it exists.

    Args:
        config, store: what is trained, and on what. teacher: [target V, H] the target's lm_head. norm: [H] its last.
        embedding: [target V, H]. state: a file. device: where it is trained.
        compute: dtype of products. first: what it begins with; None: anew.

    Raises:
        UserError: the state was begun with another head.
    """

    def __init__(
        self,
        config: HeadConfig,
        options: TrainingOptions,
        store: AnswerStore,
        state: Path,
        *,
        teacher: torch.Tensor,
        norm: torch.Tensor,
        embedding: torch.Tensor,
        compute: torch.dtype = torch.bfloat16,
        first: FirstHead | None = None,
    ) -> None:
        self.config, self.options, self.store, self._state = config, options, store, state
        numbers = usable(store)
        self.training = [n for n in numbers if not held_out(n)]
        self.held_out = [n for n in numbers if held_out(n) and store.greedy(n)]
        self.order = BatchOrder({n: rows_of(store, n) for n in self.training}, options.rows, options.seed)
        device = embedding.device
        saved = torch.load(state, weights_only=True, map_location=device) if state.exists() else None
        self._first = first.digest if first else None
        if saved:
            _check_first(state, saved.get("first"), first)
            ids, weights = saved["vocabulary"], saved["weights"]
            self.progress = Progress(**saved["progress"])
        elif first:
            ids, self.progress = first.ids.to(device), Progress(curve=[])
            weights = {name: weight.clone() for name, weight in first.weights.items()}
        else:
            counts = count_replies(store, self.training, len(embedding))
            ids = DraftVocabulary.of_counts(counts, config.draft_vocab_size).ids.to(device)
            some = self.training[:: max(1, len(self.training) // 64)]
            sample = torch.cat([store.states(n)[4:, : -config.target_hidden_size] for n in some])
            weights = first_weights(config, teacher[ids], norm, sample, options.seed)
            self.progress = Progress(curve=[])
        self.vocabulary = DraftVocabulary(ids, len(embedding))
        self.teacher = teacher[ids].to(compute)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        self.head = TrainedHead(config, embedding, weights, compute)
        self._optimizers = make_optimizers(self.head.weights, options)
        if saved:
            for optimizer, before in zip(self._optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(before)

    def share_done(self) -> float:
        """0 at the beginning, 1 at the end."""
        if self.options.steps is not None:
            return self.progress.step / self.options.steps
        assert self.options.seconds is not None
        return self.progress.seconds / self.options.seconds

    def run(self, report: Report = lambda progress, share, loss: None) -> None:
        """Train to the end. A killed run loses what came after its last saved state."""
        last = saved = time.monotonic()
        looked, busy = self.progress.seconds, time.process_time()
        while (share := self.share_done()) < 1.0:
            loss = self.train_step(share)
            now = time.monotonic()
            self.progress.seconds += now - last
            last = now
            self.progress.busy += time.process_time() - busy
            busy = time.process_time()
            report(self.progress, min(1.0, self.share_done()), loss)
            if self.progress.seconds - looked >= self.options.evaluate_every and self.share_done() < 0.97:
                self.look(self.held_out[:QUICK_ANSWERS])
                self.progress.seconds += time.monotonic() - last
                last, looked = time.monotonic(), self.progress.seconds
            if time.monotonic() - saved >= self.options.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def train_step(self, share: float) -> float:
        """One batch; returns the mean loss of a first drafted token. share: of the training that is done."""
        options, head = self.options, self.head
        numbers = self.order(self.progress.step)
        batch = read_batch(self.store, numbers, self.config.target_hidden_size)
        batch = batch.to(head.embedding.device, head.compute)
        p = target_probabilities(batch.final, self.teacher)
        labels = self.vocabulary.inverse[batch.labels]
        known = max(1, int((labels >= 0).sum()))
        losses: list[torch.Tensor] = []

        def judge(step: int, rows: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
            label = labels[rows + step]
            there = (label >= 0).nonzero()[:, 0]  # only these need the vocabulary
            later = rows[there] + step
            weights = torch.full((len(there),), options.decay**step / known, device=label.device)
            loss, ranks = SoftCrossEntropy.apply(
                normed[there], head.weights["lm_head.weight"], p[later], weights, label[there], head.compute
            )
            losses.append(loss)
            alive = torch.zeros(len(rows), dtype=torch.bool, device=label.device)
            alive[there] = ranks < options.survive
            return alive

        head.unroll(batch, options.unroll, judge)
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(head.weights.values(), 1.0)
        factor = min(1.0, (self.progress.step + 1) / options.warm_up) * (1.0 - share) * options.peak
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.rows += len(labels)
        return float(losses[0].detach())

    def look(self, numbers: list[int]) -> Evaluation:
        """Held-out figures now; they are kept in the curve."""
        result = evaluate(self.head, self.store, numbers, self.vocabulary, self.teacher)
        assert self.progress.curve is not None
        at = {"step": self.progress.step, "seconds": round(self.progress.seconds)}
        entry = at | asdict(result)
        if self.progress.curve[-1:] != [entry]:  # the end is looked at again by a run that finds nothing to do
            self.progress.curve.append(entry)
        return result

    def save(self) -> None:
        """Atomic: a run killed while saving keeps the state before."""
        state = {
            "weights": {name: weight.detach() for name, weight in self.head.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "vocabulary": self.vocabulary.ids,
            "first": self._first,
            "progress": asdict(self.progress),
        }
        partial = self._state.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._state)


def _check_first(state: Path, before: str | None, first: FirstHead | None) -> None:
    """Raise UserError unless a saved training was begun with this head."""
    if before == (first.digest if first else None):
        return
    begun = "anew" if before is None else f"with the head of digest {before}"
    now = f"with {first.name}, digest {first.digest}" if first else "without --init-head"
    raise UserError(
        f"{state} was begun {begun}, this run is {now}: give the same --init-head, or remove {state.name} to train "
        "again on the same answers"
    )


def make_optimizers(weights: dict[str, torch.Tensor], options: TrainingOptions) -> list[torch.optim.Optimizer]:
    """Muon for the layer's matrices and fc, AdamW for the lm_head and, three times as fast, the norms."""
    matrices = [w for name, w in weights.items() if w.ndim == 2 and name != "lm_head.weight"]
    norms = [w for w in weights.values() if w.ndim == 1]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=options.muon, weight_decay=0.0, momentum=0.95, nesterov=True),
        torch.optim.AdamW(
            [
                {"params": [weights["lm_head.weight"]], "lr": options.adamw, "weight_decay": 0.01},
                {"params": norms, "lr": 3 * options.adamw, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return made
