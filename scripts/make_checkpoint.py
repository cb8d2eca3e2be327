"""Write a Llama checkpoint with random weights, to time full-size models without a download.

    python scripts/make_checkpoint.py --size llama-3.2-3b build/random-3b
    python scripts/make_checkpoint.py --size 1b --layers 2 --vocab-size 4096 build/random-small

Sizes, layout and tensor names are those of the real models, the text is noise. Weights are written shard by shard,
so that memory holds about three shards whatever the model's size, and depend on the seed and the shape alone. The
tokenizer of the embedded pair is added where the vocabulary has its size, another by --tokenizer; without one, a
model can still be run on token ids.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch

from models.cli.command import Parser, run_command
from models.cli.console import writing_bar
from models.errors import UserError
from models.llama.checkpoint import SHARD_BYTES, CheckpointWriter
from models.llama.config import DTYPES, NAMED_SIZES, LlamaConfig, named_config
from models.llama.random_weights import RandomWeights
from models.llama.tokenizer import LlamaTokenizer
from models.options import CHECKPOINTS

EMBEDDED = CHECKPOINTS / "tiny-target"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SHAPE_FLAGS = {
    "--vocab-size": "vocab_size",
    "--hidden": "hidden_size",
    "--ffn": "intermediate_size",
    "--layers": "num_hidden_layers",
    "--heads": "num_attention_heads",
    "--kv-heads": "num_key_value_heads",
    "--head-dim": "head_dim",
    "--context": "max_position_embeddings",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return run_command(lambda: command(arguments), interrupted="interrupted: nothing was written")


def command(arguments: list[str] | None) -> int:
    args = parse(arguments)
    base = base_config(args)
    tokenizer = find_tokenizer(args.tokenizer, args.vocab_size or base.vocab_size)
    config = build_config(base, args, tokenizer)
    check_space(args.output.expanduser(), config)
    write(args.output, config, args.seed, tokenizer, int(args.shard_gb * 1e9))
    added = tokenizer.path if tokenizer else "none (run it on token ids)"
    print(f"{args.output}: {config.parameter_count:,} parameters in {config.dtype}, tokenizer: {added}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Shape options that are left away come from --size or --config."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--size", default="llama-3.2-1b", help=f"{', '.join(NAMED_SIZES)} (or 1b, 3b, 8b); default: 1b")
    base.add_argument("--config", help="a config.json, or the directory that holds it, instead of a named size")
    shape = parser.add_argument_group("shape, where it differs from the size")
    for flag, field in SHAPE_FLAGS.items():
        shape.add_argument(flag, dest=field, type=int, metavar="N", help=field)
    shape.add_argument("--tied", dest="tie_word_embeddings", action=argparse.BooleanOptionalAction, help="one matrix")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; default: 0")
    parser.add_argument("--dtype", choices=DTYPES, help="stored as; default: as the size says (bfloat16)")
    parser.add_argument("--tokenizer", help="directory whose tokenizer to copy")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="largest file, GB; default: 2")
    parser.add_argument("output", type=Path, help="directory to create")
    args = parser.parse_args(arguments)
    if args.shard_gb <= 0:
        parser.error(f"--shard-gb {args.shard_gb}: it must be above 0")
    return args


def base_config(args: argparse.Namespace) -> LlamaConfig:
    """The configuration that --size or --config names."""
    if args.config is None:
        return named_config(args.size)
    path = Path(args.config).expanduser()
    return LlamaConfig.from_json(path / "config.json" if path.is_dir() else path)


def find_tokenizer(given: str | None, vocab_size: int) -> LlamaTokenizer | None:
    """The tokenizer to copy: the given directory's, else the embedded pair's if that has ``vocab_size`` entries."""
    if given is not None:
        tokenizer = LlamaTokenizer.load(given)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer in {given} has {tokenizer.vocab_size} tokens, the model {vocab_size}: "
                f"use --vocab-size {tokenizer.vocab_size}"
            )
        return tokenizer
    embedded = LlamaTokenizer.load(EMBEDDED) if (EMBEDDED / "tokenizer.json").is_file() else None
    return embedded if embedded and embedded.vocab_size == vocab_size else None


def build_config(base: LlamaConfig, args: argparse.Namespace, tokenizer: LlamaTokenizer | None) -> LlamaConfig:
    """``base`` with the options applied. Special ids are the tokenizer's; ids beyond the vocabulary are dropped."""
    fields = (*SHAPE_FLAGS.values(), "tie_word_embeddings", "dtype")
    changes = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    config = dataclasses.replace(base, bos_token_id=None, eos_token_ids=(), **changes)
    if args.head_dim is None and (args.hidden_size or args.num_attention_heads):
        hidden, heads = config.hidden_size, config.num_attention_heads
        if hidden % heads:
            raise UserError(f"--hidden {hidden} is not a multiple of --heads {heads}: give --head-dim")
        config = dataclasses.replace(config, head_dim=hidden // heads)
    bos, stops = (tokenizer.bos_id, tokenizer.eos_ids) if tokenizer else (base.bos_token_id, base.eos_token_ids)
    bos = bos if bos is not None and bos < config.vocab_size else None
    stops = tuple(id for id in stops if id < config.vocab_size)
    return dataclasses.replace(config, bos_token_id=bos, eos_token_ids=stops)


def check_space(output: Path, config: LlamaConfig) -> None:
    """UserError if the disk that will hold ``output`` is too small for it."""
    need = config.parameter_count * getattr(torch, config.dtype).itemsize
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise UserError(
            f"the checkpoint needs {need / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free: choose another disk"
        )


def write(output: Path, config: LlamaConfig, seed: int, tokenizer: LlamaTokenizer | None, shard_bytes: int) -> None:
    """Draw and write all tensors, then the tokenizer's files."""
    total = config.parameter_count * getattr(torch, config.dtype).itemsize
    with CheckpointWriter(output, config, shard_bytes) as writer, writing_bar(output.name, total) as written:
        for name, tensor in RandomWeights(config, seed).items():
            writer.add(name, tensor)
            written(tensor.nbytes)
        present = [name for name in TOKENIZER_FILES if tokenizer and (tokenizer.path / name).is_file()]
        for name in present:
            shutil.copyfile(tokenizer.path / name, writer.folder / name)


if __name__ == "__main__":
    sys.exit(main())
