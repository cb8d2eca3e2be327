"""Rotary position embedding tables with Llama 3's frequency scaling.

Source: Su et al. 2021 (RoPE) and the `llama3` rope type of Hugging Face's `modeling_rope_utils.py`.
"""

import math

import torch

from models.llama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """[head_dim / 2] fp32 inverse frequencies; long wavelengths are stretched by the scaling factor.

    A wavelength below original/high_freq_factor keeps its frequency, one above original/low_freq_factor is divided by
    `factor`, and those between are blended linearly in original/wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rope_tables(config: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, both [length, head_dim] fp32, for positions 0..length-1 in the half-split (HF) layout.

    The first half of the sin table is negated, so that rotating a head x = (a, b) is `x * cos + (b, a) * sin`.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
