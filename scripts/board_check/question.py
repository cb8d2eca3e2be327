"""What to check: models, board and sizes, all of it checked for sense before anything slow begins."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from models.board_mock import cluster
from models.boards import Board
from models.cache_size import asked_pool
from models.errors import UserError
from models.llama.config import NAMED_SIZES, LlamaConfig, named_config
from models.llama.head_config import HeadConfig, typical_head
from models.speculative.drafters.registry import spec_of
from models.ttnn_llama.device.mesh import target_chips
from models.ttnn_llama.shapes import MAX_ROWS
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.head_tensors import head_specs
from models.ttnn_llama.weights.precision import PRECISION, Precision, default_precision, precision_named
from models.ttnn_llama.weights.tensors import check_split

DEFAULT_CONTEXT = 2048
MAX_SLOTS = 1024
DEFAULT_ROWS = (1, 2, 5, 8, 32)
DEFAULT_PROMPTS = (1, 127, 128, 129, 1000)


def find_config(name: str) -> LlamaConfig:
    """The architecture of a directory with a config.json, a published size ("8B", or a hub id that has its name), or
    a hub id whose config.json is downloaded. Raises UserError for anything else."""
    path = Path(name)
    if path.is_dir():
        return LlamaConfig.from_json(path / "config.json")
    size = name.rpartition("/")[2].lower().removesuffix("-instruct").removeprefix("meta-")
    if size in NAMED_SIZES or size in (key.rpartition("-")[2] for key in NAMED_SIZES):
        return named_config(size)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(
            f"no such directory or size: {name!r}: give a directory with a config.json, a hub id, or one of 1B, 3B, 8B"
        )
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json")
    except Exception as error:  # network, licence, a name that does not exist: they have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot get config.json of {name}: {text}: give a directory that has it, or one of 1B, 3B, 8B"
        ) from None
    return LlamaConfig.from_json(file)


def find_head(name: str, target: LlamaConfig) -> HeadConfig:
    """The shape of a head in a directory, or of published heads for a size. UserError if it is not the target's."""
    path = Path(name)
    config = HeadConfig.from_json(path / "config.json", target) if path.is_dir() else typical_head(find_config(name))
    config.check_target(target)
    return config


@dataclass(frozen=True)
class Question:
    """What to check, all of it checked for sense."""

    board: Board
    configs: dict[str, LlamaConfig | HeadConfig]  # "target" and, if there is one, "draft", a model or a head
    precisions: dict[str, Precision]
    placement: str
    max_seq_len: int
    rows: list[int]
    prompts: list[int]
    draft_tokens: int
    slots: int = 1
    pool: int | None = None  # positions of all texts together; None: the whole context for each


def question(options: argparse.Namespace) -> Question:
    """Raises UserError for whatever is wrong with the options, or with the models for this board."""
    board = cluster.board_of(options.mesh)
    drafts = options.draft is not None or options.draft_head is not None
    if not drafts and (options.draft_precision or options.draft_placement != "shared"):
        raise UserError("--draft-precision and --draft-placement are about a draft: name it with --draft")
    if options.draft is not None and options.draft_head is not None:
        raise UserError("--draft and --draft-head are both given: a target has one draft")
    if options.draft_head is not None and options.draft_placement != "shared":
        raise UserError("a draft head lies on its target's chips: use --draft-placement shared")
    of_target = find_config(options.model)
    configs: dict[str, LlamaConfig | HeadConfig] = {"target": of_target}
    default = default_precision(of_target.hidden_size)
    precisions = {"target": precision_named(options.precision or default)}
    chips = {"target": board.chips}
    if options.draft is not None:
        own_chip = options.draft_placement == "own-chip"
        draft_config = configs["draft"] = find_config(options.draft)
        precisions["draft"] = precision_named(options.draft_precision or options.precision or PRECISION)
        chips = {
            "target": target_chips(board, own_chip_for_draft=own_chip),
            "draft": 1 if own_chip else board.chips,
        }
        target, draft = of_target.vocab_size, draft_config.vocab_size
        if target != draft:
            raise UserError(f"target vocabulary {target} != draft vocabulary {draft}: the pair must share a tokenizer")
    if options.draft_head is not None:
        configs["draft"] = find_head(options.draft_head, of_target)
        precisions["draft"] = precision_named(options.draft_precision or options.precision or PRECISION)
        chips["draft"] = board.chips
    drafted = options.num_draft_tokens
    if not 1 <= drafted < MAX_ROWS:
        raise UserError(
            f"--num-draft-tokens {drafted} is outside 1..{MAX_ROWS - 1}: a forward verifies at most {MAX_ROWS} rows"
        )
    shortest, longest = (
        drafted + 3 if options.draft_head is None else 2 * drafted + 5,
        min(config.max_position_embeddings for config in configs.values() if isinstance(config, LlamaConfig)),
    )
    length = options.max_seq_len if options.max_seq_len is not None else min(DEFAULT_CONTEXT, longest)
    if not shortest <= length <= longest:
        raise UserError(
            f"--max-seq-len {length} is outside {shortest}..{longest}: {drafted} drafted tokens need {shortest}, and "
            f"the models have been trained for {longest}"
        )
    most = min(MAX_ROWS, length)
    rows = options.rows or [count for count in DEFAULT_ROWS if count <= most]
    prompts = options.prompts or [*(count for count in DEFAULT_PROMPTS if count < length), length]
    for flag, counts, limit in (("--rows", rows, most), ("--prompts", prompts, length)):
        wrong = [count for count in counts if not 1 <= count <= limit]
        if wrong:
            raise UserError(
                f"{flag} {wrong[0]} is outside 1..{limit}, for a context of {length}: use one in that range"
            )
    if not 1 <= options.slots <= MAX_SLOTS:
        raise UserError(f"--slots {options.slots} is outside 1..{MAX_SLOTS}: use a number in that range")
    if options.slots > 1 and options.draft_head is not None:
        raise UserError("several texts at once are drafted by a model, not by a head: use --draft, or --slots 1")
    for name, config in configs.items():
        if isinstance(config, HeadConfig):
            head_specs(config, chips[name], precisions[name])
        else:
            check_split(config, chips[name])
    return Question(
        board=board,
        configs=configs,
        precisions=precisions,
        placement=options.draft_placement,
        max_seq_len=length,
        rows=sorted(set(rows)),
        prompts=sorted(set(prompts)),
        draft_tokens=drafted,
        slots=options.slots,
        pool=asked_pool(options.pool_size, options.slots, length),
    )


def memory_plans(asked: Question) -> dict[str, memory.MemoryPlan]:
    """What the demo would plan for these models, by "target" and "draft"; imports ttnn."""
    from models.ttnn_llama import board_models as pair
    from models.ttnn_llama.programs.options import BoardOptions

    options = BoardOptions(
        precision=asked.precisions["target"].name,
        draft_precision=asked.precisions.get("draft", asked.precisions["target"]).name,
        placement=asked.placement,
        workload=spec_of("head" if isinstance(asked.configs.get("draft"), HeadConfig) else "model").workload,
        draft_lengths=(asked.draft_tokens,),
        slots=asked.slots,
        pool=asked.pool,
    )
    # of an opened model only the configuration is looked at
    opened = [
        SimpleNamespace(checkpoint=SimpleNamespace(config=asked.configs[name])) if name in asked.configs else None
        for name in ("target", "draft")
    ]
    return pair.memory_plans(asked.board, *opened, asked.max_seq_len, options)
