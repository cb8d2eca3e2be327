"""A Llama's layers as machine code, made on the machine that runs them: on CPUs.

kernels.py is that code, with products.py, and threads.py runs it; builder.py is what they are written in, and
machine_code.py compiles and keeps them. network.py lays out weights and hands over what a forward needs. Nothing of
this is imported before a model is to be compiled.
"""

from __future__ import annotations

import importlib.util

import torch

from models.llama.config import LlamaConfig

LANES = 16  # numbers of a vector: so many positions' keys are stored together


def readable(table: torch.Tensor) -> bool:
    """Whether compiled layers can look up embeddings [V, H] by themselves."""
    return table.is_contiguous() and table.dtype in (torch.bfloat16, torch.float16, torch.float32)


def not_compiled(config: LlamaConfig, device: torch.device) -> str:
    """Why the layers of a model cannot be compiled, to follow "compiled layers"; "" where they can."""
    if device.type != "cpu":
        return f"run on the CPU only, not on {device}"
    if config.head_dim % LANES:
        return f"take heads of whole vectors of {LANES} numbers, not of {config.head_dim}"
    if importlib.util.find_spec("llvmlite") is None:
        return "need llvmlite, which is not installed (pip install llvmlite)"
    return ""
