"""What a peer of this project is to the suite peers, and the names of the rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from models.cache_size import VALUE_BYTES
from models.errors import UserError
from models.llama.config import LlamaConfig
from scripts.suites.hardware import available_bytes

if TYPE_CHECKING:
    from scripts.suites.bench import Bench

OWN_PLAIN, OWN_MODEL, OWN_LOOKUP = "own baseline", "own speculative", "own prompt lookup"
OWN_HEAD = "own draft head"
OWN_AUTO, OWN_AUTO_LOOKUP = "own combined, auto", "own prompt lookup, auto"
HF_PLAIN, HF_LOOKUP = "HF generate", "HF prompt lookup, same K"
HF_ASSISTED, HF_DEFAULTS = "HF assisted, same K", "HF assisted, defaults"
LLAMA_PLAIN, LLAMA_MODEL = "llama.cpp", "llama.cpp draft model, same K"
LLAMA_LOOKUP, LLAMA_LOOKUP_DEFAULTS = "llama.cpp prompt lookup, same K", "llama.cpp prompt lookup, defaults"
OPENVINO_PLAIN, OPENVINO_MODEL = "OpenVINO", "OpenVINO draft model, same K"
OPENVINO_LOOKUP = "OpenVINO prompt lookup, same K"
# What each is to be compared with.
COUNTERPART = {
    HF_PLAIN: OWN_PLAIN,
    HF_ASSISTED: OWN_MODEL,
    HF_DEFAULTS: OWN_MODEL,
    HF_LOOKUP: OWN_LOOKUP,
    LLAMA_PLAIN: OWN_PLAIN,
    LLAMA_MODEL: OWN_MODEL,
    LLAMA_LOOKUP: OWN_LOOKUP,
    LLAMA_LOOKUP_DEFAULTS: OWN_LOOKUP,
    OPENVINO_PLAIN: OWN_PLAIN,
    OPENVINO_MODEL: OWN_MODEL,
    OPENVINO_LOOKUP: OWN_LOOKUP,
}
REMEDY = "`pip install -e '.[peers]'` to have it take part"
LONGEST_COPIED = 2  # tokens that prompt lookup matches at most, transformers' default


@dataclass(frozen=True)
class Written:
    """A text, and seconds to its first token where they are known."""

    ids: list[int]
    ttft_s: float | None = None


Generate = Callable[[list[int]], Written]


@dataclass(frozen=True)
class Peer:
    """Another program, ready to write.

    Args:
        version: its package and version, and what else a reader should know of the build.
        precision: of its weights and arithmetic; cache: of its KV cache.
        ways: row -> function from prompt ids to a text.
        notes: rows that are left out, a line each with the reason.
    """

    version: str
    precision: str
    cache: str
    ways: dict[str, Generate]
    notes: list[str] = field(default_factory=list)
    threads: int = field(default_factory=torch.get_num_threads)


def check_cpu(name: str, bench: "Bench") -> None:
    """UserError unless the run is on the CPU."""
    if bench.settings.device != "cpu":
        raise UserError(f"{name} is left out: it is compared on the CPU only, not on {bench.settings.device}")


def check_memory(name: str, configs: list[LlamaConfig], dtype: str) -> None:
    """UserError unless memory holds these models once more."""
    needed, free = sum(config.parameter_count for config in configs) * VALUE_BYTES[dtype][0], available_bytes()
    if needed > 0.95 * free:
        raise UserError(
            f"{name} is left out: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: name fewer with --peers"
        )


def configs_of(bench: "Bench", draft: bool) -> list[LlamaConfig]:
    """Of the target, and of the draft model where it takes part."""
    models = [bench.target, bench.draft_model] if draft and bench.draft_model else [bench.target]
    return [loaded.opened.checkpoint.config for loaded in models]


def longest_text(bench: "Bench", k: int) -> int:
    """Positions that the longest text takes, with a last draft behind it."""
    return max(len(prompt.ids) for prompt in bench.prompts) + bench.settings.max_new_tokens + k + 1
