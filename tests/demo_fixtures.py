"""What tests of the demos share: a tiny random pair with a tokenizer of its own, and what to look at in a run."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.harness import main
from models.llama.checkpoint import save_checkpoint
from models.tests.engine_fixtures import perturbed
from models.tests.llama_fixtures import random_tensors, tiny_config

BOS, EOS = "<bos>", "<eos>"
FOUR = ("--num-draft-tokens", "4")  # what auto, the default, chooses depends on times


def make_tokenizer(text: str = "def add(self, value):\n    return self.total + value\n") -> Tokenizer:
    """A byte-level BPE of all bytes, two special tokens and at most 30 merges learnt from ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=[BOS, EOS], initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write it into an existing checkpoint directory."""
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": BOS, "add_bos_token": True, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_pair(root: Path, noise: float = 0.05, **overrides) -> tuple[Path, Path]:
    """(target, draft) directories under ``root``. The draft is the target with ``noise``, so that it is often right.

    No stop ids, so that every text has its full length.
    """
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 64, "eos_token_ids": ()}
    config = tiny_config(**{**sizes, **overrides})
    tensors = random_tensors(config, seed=1)
    for path, weights in ((root / "target", tensors), (root / "draft", perturbed(tensors, noise, seed=2))):
        save_checkpoint(path, config, weights)
        write_tokenizer(path, tokenizer)
    return root / "target", root / "draft"


def texts(results, path):
    return [row[path]["text"] for row in results["prompts"]]


def refused(capsys, argv, *words):
    """The demo ends with code 2 and one line that holds all words."""
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
