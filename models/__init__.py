"""Speculative decoding of Llama 3.x: one text faster, not one token different.

    from models import LLM, SamplingParams

    with LLM.load("tiny") as llm:
        for piece in llm.stream("def add(a, b):", max_new_tokens=60):
            print(piece.text, end="", flush=True)

- `llm`: the front door: load a pair, then stream, generate, chat. Below it `loaded`, `drafting`, `completion`
- `options`, `loading`, `device`, `boards`, `errors`: what a user may choose, and what is wrong with it
- `llama`: what a Llama is. Configuration, checkpoint, tokenizer
- `torch_llama`, `ttnn_llama`: the network on CPU and CUDA, and on Tenstorrent boards
- `speculative`: how text is generated. Engine, drafters, acceptance rules, policies, statistics
- `training`: draft heads for any target, from its own answers
- `board_mock`, `simulator`: ttnn without a board. `checkpoints`: the small pair that comes with the package

The names below are loaded when they are first used: importing this package imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.completion import Completion, Piece
    from models.drafting import Drafting
    from models.errors import UserError
    from models.llm import LLM
    from models.speculative.sampling import SamplingParams
    from models.speculative.stats import GenerationStats

_HOMES = {
    "LLM": "models.llm",
    "Completion": "models.completion",
    "Drafting": "models.drafting",
    "Piece": "models.completion",
    "SamplingParams": "models.speculative.sampling",
    "GenerationStats": "models.speculative.stats",
    "UserError": "models.errors",
}

__all__ = ["LLM", "Completion", "Drafting", "GenerationStats", "Piece", "SamplingParams", "UserError"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
